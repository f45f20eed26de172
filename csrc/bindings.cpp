// Python <-> C++: checks every argument, releases the GIL, forwards. No arithmetic here.
//
// Arrays cross as NumPy arrays, i.e. pointer + shape + dtype of memory that torch owns. bf16, which NumPy lacks,
// crosses as uint16. Errors here are ValueError: the Python layer gives users typed errors before it calls, so that
// these checks only have to keep a wrong call from reading or writing outside its arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>

#include "bindings_kernels.h"
#include "bindings_lm_head.h"
#include "bindings_watch.h"
#include "checks.h"
#include "encoder.h"
#include "isa.h"
#include "measure.h"
#include "openmp.h"
#include "packing.h"
#include "thread_pool.h"

namespace xfast {
namespace {

// Data pointer of an array whose element type must be exactly T: no hidden copies of outputs or large inputs.
template <class T>
T* exact(const py::array& array, const char* name) {
  require(py::isinstance<py::array_t<T>>(array), std::string(name) + ": wrong dtype");
  return const_cast<T*>(static_cast<const T*>(array.data()));
}

class PyEncoder {
 public:
  PyEncoder(const py::dict& shape, const std::string& precision, const std::string& isa)
      : encoder_(make_shape(shape), precision_of(precision), kernel_table(isa)) {}

  // `word_scale`, one a row, comes with a word table in 8 bits a value.
  void set_tables(const py::array& word, const py::array& position, const std::optional<py::array>& type,
                  const std::optional<F32>& word_scale) {
    const EncoderShape& s = encoder_.shape();
    require_array(word, "word", {s.vocab, s.hidden});
    if (word_scale) require_array(*word_scale, "word_scale", {s.vocab});
    require_array(position, "position", {s.positions, s.hidden});
    require(type.has_value() == (s.types > 0), "type: given exactly when the shape has types");
    if (type) require_array(*type, "type", {s.types, s.hidden});
    const TableView words = word_scale ? TableView{exact<int8_t>(word, "word"), TableType::kInt8, word_scale->data()}
                                       : table_view(word, "word");
    encoder_.set_tables(words, table_view(position, "position"), type ? table_view(*type, "type") : TableView{});
    tables_ = py::make_tuple(word, position, type, word_scale);  // keeps the memory alive
  }

  void quantize_word_table(int threads) {
    require(encoder_.tables()[0].data != nullptr, "word: set_tables comes first");
    require(encoder_.tables()[0].type != TableType::kInt8 && !encoder_.owns_word_table(), "word: is quantised already");
    {
      py::gil_scoped_release release;
      encoder_.quantize_word_table(threads);
    }
    const py::tuple old = tables_;
    tables_ = py::make_tuple(py::none(), old[1], old[2], py::none());
  }

  // Another precision for one product, and divisors of its inputs; before its weights.
  void choose(int64_t layer, const std::string& name, const std::string& precision, int64_t group,
              const std::optional<F32>& divisor) {
    PackedLinear& linear = find_linear(layer, name);
    require(!linear.owns() && !linear.complete(), "linear: has its weights already");
    const Precision chosen = precision_of(precision);
    require_group(group);
    require_divisor(divisor, chosen, linear.in_features());
    linear =
        PackedLinear(chosen, group, linear.out_features(), linear.in_features(), divisor ? divisor->data() : nullptr);
  }

  bool set_linear(int64_t layer, const std::string& name, int64_t first, const py::array& weight,
                  const std::optional<F32>& bias, int threads) {
    PackedLinear& linear = find_linear(layer, name);
    require(linear.owns() || !linear.complete(), "linear: reads the caller's memory");
    require_array(weight, "weight", {-1, linear.in_features()});
    const int64_t rows = weight.shape(0);
    require(first >= 0 && rows <= linear.out_features() && first <= linear.out_features() - rows,
            "first: rows exceed the layer's outputs");
    if (bias) require_array(*bias, "bias", {rows});
    const MatrixView view{table_view(weight, "weight"), rows, weight.shape(1)};
    const float* bias_data = bias ? bias->data() : nullptr;
    py::gil_scoped_release release;
    return linear.set_rows(first, view, bias_data, threads);
  }

  // Packed memory of another encoder or of a file, read in place.
  void use_linear(int64_t layer, const std::string& name, const U8& data, const F32& bias,
                  const std::optional<F32>& scale, const std::optional<I32>& compensation,
                  const std::optional<F32>& column_scale) {
    PackedLinear& linear = find_linear(layer, name);
    require(!linear.owns(), "linear: holds weights of its own");
    const bool int8 = linear.precision() == Precision::kInt8;
    require(scale.has_value() == int8 && compensation.has_value() == int8,
            "scale and compensation: given exactly with int8");
    require_array(data, "data", {linear.data_bytes()});
    require_aligned(data, "data", kChunkBytes);
    require_array(bias, "bias", {linear.padded_outputs()});
    require_aligned(bias, "bias", alignof(float));
    if (int8) {
      require_array(*scale, "scale", {linear.padded_outputs()});
      require_aligned(*scale, "scale", alignof(float));
      require_array(*compensation, "compensation", {linear.padded_outputs()});
      require_aligned(*compensation, "compensation", alignof(int32_t));
    }
    if (column_scale) {
      require(is_quantised(linear.precision()), "column_scale: quantised precisions only");
      require_array(*column_scale, "column_scale", {linear.in_features()});
      require_aligned(*column_scale, "column_scale", alignof(float));
    }
    py::dict arrays;
    arrays["data"] = data;
    arrays["bias"] = bias;
    if (column_scale) arrays["column_scale"] = *column_scale;
    if (int8) {
      arrays["scale"] = *scale;
      arrays["compensation"] = *compensation;
    }
    linear.borrow(data.data(), int8 ? scale->data() : nullptr, bias.data(), int8 ? compensation->data() : nullptr,
                  column_scale ? column_scale->data() : nullptr);
    borrowed_[py::make_tuple(layer, name)] = arrays;  // keeps the memory alive
  }

  // The packed memory of one linear layer, as use_linear takes it: read-only arrays that keep `self` alive.
  static py::dict linear(const py::object& self, int64_t layer, const std::string& name) {
    PyEncoder& encoder = self.cast<PyEncoder&>();
    const PackedLinear& packed = encoder.find_linear(layer, name);
    require(packed.complete(), "linear: weights are missing");
    if (!packed.owns()) return encoder.borrowed_[py::make_tuple(layer, name)];
    const LinearView view = packed.view();
    py::dict arrays;
    arrays["data"] = read_only(U8(packed.data_bytes(), view.data, self));
    arrays["bias"] = read_only(F32(packed.padded_outputs(), view.bias, self));
    if (packed.precision() == Precision::kInt8) {
      arrays["scale"] = read_only(F32(packed.padded_outputs(), view.scale, self));
      arrays["compensation"] = read_only(I32(packed.padded_outputs(), view.compensation, self));
    }
    if (packed.smoothed())
      arrays["column_scale"] = read_only(F32(packed.in_features(), packed.input().column_scale, self));
    return arrays;
  }

  // The word table in 8 bits a value and its scales, or None.
  static py::object word_table(const py::object& self) {
    const PyEncoder& given = self.cast<const PyEncoder&>();
    const Encoder& encoder = given.encoder_;
    const TableView& words = encoder.tables()[0];
    if (words.data == nullptr || words.type != TableType::kInt8) return py::none();
    if (!encoder.owns_word_table()) return py::make_tuple(given.tables_[py::int_(0)], given.tables_[py::int_(3)]);
    const EncoderShape& s = encoder.shape();
    const py::array_t<int8_t> values({s.vocab, s.hidden}, static_cast<const int8_t*>(words.data), self);
    return py::make_tuple(read_only(values), read_only(F32(s.vocab, words.scale, self)));
  }

  void set_norm(int64_t layer, const std::string& name, const F32& gamma, const F32& beta) {
    require_array(gamma, "gamma", {encoder_.shape().hidden});
    require_array(beta, "beta", {encoder_.shape().hidden});
    Norm& norm = find_norm(layer, name);
    norm.gamma.assign(gamma.data(), gamma.data() + gamma.size());
    norm.beta.assign(beta.data(), beta.data() + beta.size());
  }

  void forward(const std::optional<I32>& ids, const std::optional<F32>& embeds, const I32& position_ids,
               const std::optional<I32>& type_ids, const I32& cu_seqlens, const std::optional<I32>& rows,
               int64_t layers, const py::array& out, const std::optional<py::array>& hidden_states, int threads) const {
    const EncoderShape& s = encoder_.shape();
    require(encoder_.complete(), "encoder: weights are missing");
    require(layers >= 0 && layers <= s.layers, "layers: out of range");
    const int64_t total = check_lengths(cu_seqlens, s);
    require(ids.has_value() != embeds.has_value(), "give exactly one of ids and embeds");
    if (ids) require_ids(*ids, "ids", total, s.vocab);
    if (embeds) require_array(*embeds, "embeds", {total, s.hidden});
    require_ids(position_ids, "position_ids", total, s.positions);
    if (type_ids) require_ids(*type_ids, "type_ids", total, s.types);
    if (rows) require_ascending(*rows, "rows", total, "the number of tokens");
    require_array(out, "out", {rows ? rows->shape(0) : total, s.hidden});
    require(out.writeable(), "out: read-only");
    float* states = nullptr;
    if (hidden_states) {
      require(!rows, "hidden_states: all rows are needed, so rows must not be given");
      require_array(*hidden_states, "hidden_states", {layers + 1, total, s.hidden});
      require(hidden_states->writeable(), "hidden_states: read-only");
      states = exact<float>(*hidden_states, "hidden_states");
    }
    require(threads >= 1, "threads: must be at least 1");
    const ForwardArgs args{ids ? ids->data() : nullptr,
                           embeds ? embeds->data() : nullptr,
                           position_ids.data(),
                           type_ids ? type_ids->data() : nullptr,
                           cu_seqlens.data(),
                           cu_seqlens.shape(0) - 1,
                           rows ? rows->data() : nullptr,
                           rows ? rows->shape(0) : 0,
                           layers,
                           exact<float>(out, "out"),
                           states,
                           threads};
    py::gil_scoped_release release;
    encoder_.forward(args);
  }

  const Encoder& encoder() const { return encoder_; }

 private:
  static EncoderShape make_shape(const py::dict& d) {
    const auto item = [&](const char* key) {
      require(d.contains(key), std::string("shape: ") + key + " is missing");
      return d[key];
    };
    const auto size = [&](const char* key) { return item(key).cast<int64_t>(); };
    const EncoderShape s{
        size("layers"), size("hidden"),    size("heads"), size("head_dim"),          size("intermediate"),
        size("vocab"),  size("positions"), size("types"), item("eps").cast<float>(), item("pre_norm").cast<bool>()};
    for (const int64_t value : {s.hidden, s.heads, s.head_dim, s.intermediate, s.vocab, s.positions})
      require(value > 0 && value < (int64_t{1} << 31), "shape: sizes must be positive 32-bit numbers");
    require(s.layers >= 0 && s.types >= 0, "shape: sizes must not be negative");
    constexpr int64_t kLargest = int64_t{1} << 16;  // 32-bit sums of products of bytes stay exact
    require(s.hidden <= kLargest && s.intermediate <= kLargest && s.layers <= (1 << 16), "shape: too large");
    require(s.heads * s.head_dim == s.hidden, "shape: hidden must be heads * head_dim");
    return s;
  }

  PackedLinear& find_linear(int64_t layer, const std::string& name) {
    Layer& l = find_layer(layer);
    if (name == "qkv") return l.qkv;
    if (name == "attention_out") return l.attention_out;
    if (name == "ffn_in") return l.ffn_in;
    if (name == "ffn_out") return l.ffn_out;
    throw py::value_error("name: no linear layer is called " + name);
  }
  Norm& find_norm(int64_t layer, const std::string& name) {
    if (name == (encoder_.shape().pre_norm ? "final_norm" : "embedding_norm")) return encoder_.outer_norm();
    Layer& l = find_layer(layer);
    if (name == "attention_norm") return l.attention_norm;
    if (name == "ffn_norm") return l.ffn_norm;
    throw py::value_error("name: no norm is called " + name);
  }
  Layer& find_layer(int64_t layer) {
    require(layer >= 0 && layer < encoder_.shape().layers, "layer: out of range");
    return encoder_.layers()[layer];
  }

  static int64_t check_lengths(const I32& cu_seqlens, const EncoderShape& s) {
    require_array(cu_seqlens, "cu_seqlens", {-1});
    require(cu_seqlens.shape(0) >= 1 && cu_seqlens.at(0) == 0, "cu_seqlens: must start with 0");
    const int32_t* ends = cu_seqlens.data();
    for (py::ssize_t i = 1; i < cu_seqlens.shape(0); ++i)
      require(ends[i] >= ends[i - 1], "cu_seqlens: must not decrease");
    const int64_t total = ends[cu_seqlens.shape(0) - 1];
    require(total * std::max(3 * s.hidden, s.intermediate) < (int64_t{1} << 40), "cu_seqlens: too many tokens");
    return total;
  }

  static py::array read_only(py::array array) {
    array.attr("setflags")(py::arg("write") = false);
    return array;
  }
  static void require_aligned(const py::array& array, const char* name, size_t bytes) {
    require(reinterpret_cast<uintptr_t>(array.data()) % bytes == 0,
            std::string(name) + ": must start at a multiple of " + std::to_string(bytes) + " bytes");
  }

  Encoder encoder_;
  py::object tables_;
  py::dict borrowed_;  // (layer, name) -> the arrays whose memory it reads
};

IdView id_view(const std::optional<I64>& ids, const char* name, int64_t batch, int64_t length) {
  if (!ids) return {};
  require(ids->ndim() == 2, std::string(name) + ": expected 2 dimensions");
  const bool one_row = ids->shape(0) == 1 && batch != 1;
  require_array(*ids, name, {one_row ? 1 : batch, length});
  return {ids->data(), one_row};
}

MaskType mask_type(const std::optional<py::array>& mask) {
  if (!mask) return MaskType::kNone;
  const char kind = native_kind(*mask);
  const auto size = mask->dtype().itemsize();
  if (kind == 'i' && size == 8) return MaskType::kI64;
  if (kind == 'i' && size == 4) return MaskType::kI32;
  if ((kind == 'u' || kind == 'b') && size == 1) return MaskType::kU8;
  if (kind == 'f' && size == 4) return MaskType::kF32;
  throw py::value_error("mask: expected int64, int32, uint8, bool or float32 values");
}

I32 head_of(const I32& array, int64_t count) { return I32({count}, {sizeof(int32_t)}, array.data(), array); }

py::dict py_unpad(int64_t batch, int64_t length, const std::optional<I64>& ids, const std::optional<py::array>& mask,
                  const std::optional<I64>& position_ids, const std::optional<I64>& type_ids, int64_t vocab,
                  int64_t positions, int64_t types, int64_t padding_idx) {
  require(batch >= 0 && length >= 0, "batch and length must not be negative");
  require(batch < (int64_t{1} << 31), "batch must be below 2^31");
  require(batch == 0 || length < (int64_t{1} << 31) / batch, "batch * length must be below 2^31");
  const int64_t slots = batch * length;
  if (mask) require_array(*mask, "mask", {batch, length});
  I32 out_ids(ids ? slots : 0), out_positions(slots), out_types(slots), indices(slots), cu_seqlens(batch + 1);
  const UnpadArgs args{batch,
                       length,
                       id_view(ids, "ids", batch, length),
                       id_view(position_ids, "position_ids", batch, length),
                       id_view(type_ids, "type_ids", batch, length),
                       mask ? mask->data() : nullptr,
                       mask_type(mask),
                       vocab,
                       positions,
                       types,
                       padding_idx};
  const UnpadResult r = unpad(args, out_ids.mutable_data(), out_positions.mutable_data(), out_types.mutable_data(),
                              indices.mutable_data(), cu_seqlens.mutable_data());
  static const char* const kErrors[] = {"", "token", "mask", "type", "position"};
  py::dict result;
  result["error"] = kErrors[static_cast<int>(r.error)];
  result["at"] = py::make_tuple(r.row, r.col);
  result["value"] = r.value;
  if (r.error != UnpadError::kNone) return result;
  if (ids) result["ids"] = head_of(out_ids, r.total);
  result["position_ids"] = head_of(out_positions, r.total);
  result["type_ids"] = head_of(out_types, r.total);
  result["indices"] = head_of(indices, r.total);
  result["cu_seqlens"] = cu_seqlens;
  result["first_masked"] = r.first_masked;
  return result;
}

void py_pad(const F32& packed, const I32& indices, const py::array& out, int threads) {
  require_array(packed, "packed", {-1, -1});
  const int64_t total = packed.shape(0), cols = packed.shape(1);
  require_array(indices, "indices", {total});
  require_array(out, "out", {-1, cols});
  require(out.writeable(), "out: read-only");
  const int64_t slots = out.shape(0);
  require_ascending(indices, "indices", slots, "out's rows");
  float* dst = exact<float>(out, "out");
  py::gil_scoped_release release;
  pad(packed.data(), indices.data(), total, slots, cols, dst, threads);
}

}  // namespace
}  // namespace xfast

PYBIND11_MODULE(_C, m) {
  using namespace xfast;
  m.doc() = "xfast's CPU kernels. Private: use the xfast package.";
  openmp::prepare();
  m.attr("pack_version") = kPackVersion;
  m.attr("panel_outputs") = kPanel;
  m.attr("chunk_bytes") = kChunkBytes;
  m.attr("max_threads") = kMaxThreads;
  m.def("available_isas", &available_targets);
  m.def("built_isas", &built_targets);
  m.def("check_isa", [](const std::string& name) { return std::string(kernel_table(name).name); });
  m.def(
      "ceiling",
      [](const std::string& kind, const std::string& isa, int threads, double seconds) {
        const KernelTable& kernels = kernel_table(isa);
        require(threads >= 1 && threads <= kMaxThreads, "threads: out of range");
        require(seconds > 0.0 && seconds <= 60.0, "seconds: expected 0 to 60");
        const Precision precision = kind == "read" ? Precision::kFp32 : precision_of(kind);
        require(precision != Precision::kInt4, "kind: int4 has the ceiling of int8");
        py::gil_scoped_release release;
        return kind == "read" ? measure_read(kernels, threads, seconds)
                              : measure_arithmetic(kernels, precision, threads, seconds);
      },
      py::arg("kind"), py::arg("isa"), py::arg("threads"), py::arg("seconds"));
  m.def("all_finite", [](const py::array& values, int threads) {
    require((values.flags() & py::array::c_style) != 0, "values: must be contiguous");
    const TableView view = table_view(values, "values");
    const int64_t count = values.size();
    py::gil_scoped_release release;
    return all_finite(view, count, threads);
  });
  m.def(
      "quantize_rows",
      [](const py::array& table, int threads) {
        require_array(table, "table", {-1, -1});
        require(table.shape(0) > 0 && table.shape(1) > 0, "table: must not be empty");
        const TableView view = table_view(table, "table");
        const int64_t rows = table.shape(0), cols = table.shape(1);
        py::array_t<int8_t> values({rows, cols});
        F32 scale(rows);
        int8_t* out = values.mutable_data();
        float* scales = scale.mutable_data();
        {
          py::gil_scoped_release release;
          quantize_rows(view, rows, cols, out, scales, threads);
        }
        return py::make_tuple(values, scale);
      },
      py::arg("table"), py::arg("threads"));
  m.def(
      "checksum",
      [](const U8& bytes, int threads) {
        require_array(bytes, "bytes", {-1});
        const uint8_t* data = bytes.data();
        const int64_t count = bytes.size();
        py::gil_scoped_release release;
        return checksum(data, count, threads);
      },
      py::arg("bytes").noconvert(), py::arg("threads"));
  m.def("unpad", &py_unpad, py::arg("batch"), py::arg("length"), py::arg("ids").noconvert(), py::arg("mask"),
        py::arg("position_ids").noconvert(), py::arg("type_ids").noconvert(), py::arg("vocab"), py::arg("positions"),
        py::arg("types"), py::arg("padding_idx"));
  m.def("pad", &py_pad, py::arg("packed").noconvert(), py::arg("indices").noconvert(), py::arg("out"),
        py::arg("threads"));
  m.def("alert_workers", &alert_workers, py::arg("threads"));
  m.def("borrowed_regions", &openmp::regions_run);
  m.def(
      "borrow_threads",
      [](const std::string& policy) {
        require(openmp::set_policy(policy.c_str()), "policy: accepted: auto, always, never");
      },
      py::arg("policy"));
  m.def("bf16_instruction", [](const std::string& isa) { return kernel_table(isa).bf16_instruction; }, py::arg("isa"));
  bind_kernels(m);
  bind_lm_head(m);
  bind_watch(m);
  py::class_<PyEncoder>(m, "Encoder")
      .def(py::init<const py::dict&, const std::string&, const std::string&>(), py::arg("shape"), py::arg("precision"),
           py::arg("isa"))
      .def("quantize_word_table", &PyEncoder::quantize_word_table, py::arg("threads"))
      .def("set_tables", &PyEncoder::set_tables, py::arg("word"), py::arg("position"), py::arg("type"),
           py::arg("word_scale").noconvert() = py::none())
      .def("use_linear", &PyEncoder::use_linear, py::arg("layer"), py::arg("name"), py::arg("data").noconvert(),
           py::arg("bias").noconvert(), py::arg("scale").noconvert() = py::none(),
           py::arg("compensation").noconvert() = py::none(), py::arg("column_scale").noconvert() = py::none())
      .def("choose", &PyEncoder::choose, py::arg("layer"), py::arg("name"), py::arg("precision"), py::arg("group"),
           py::arg("divisor").noconvert())
      .def("linear", &PyEncoder::linear, py::arg("layer"), py::arg("name"))
      .def("word_table", &PyEncoder::word_table)
      .def("set_linear", &PyEncoder::set_linear, py::arg("layer"), py::arg("name"), py::arg("first"), py::arg("weight"),
           py::arg("bias").noconvert(), py::arg("threads"))
      .def("set_norm", &PyEncoder::set_norm, py::arg("layer"), py::arg("name"), py::arg("gamma").noconvert(),
           py::arg("beta").noconvert())
      .def("forward", &PyEncoder::forward, py::arg("ids").noconvert(), py::arg("embeds").noconvert(),
           py::arg("position_ids").noconvert(), py::arg("type_ids").noconvert(), py::arg("cu_seqlens").noconvert(),
           py::arg("rows").noconvert(), py::arg("layers"), py::arg("out"), py::arg("hidden_states"), py::arg("threads"))
      .def_property_readonly("isa", [](const PyEncoder& e) { return std::string(e.encoder().kernels().name); })
      .def_property_readonly("bf16_note",
                             [](const PyEncoder& e) { return std::string(e.encoder().kernels().bf16_note); })
      .def_property_readonly("packed_bytes", [](const PyEncoder& e) { return e.encoder().packed_bytes(); });
}
