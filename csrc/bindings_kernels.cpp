#include "bindings_kernels.h"

#include <pybind11/stl.h>

#include <optional>

#include "buffer.h"
#include "checks.h"
#include "isa.h"
#include "weights.h"

namespace xfast {
namespace {

// An operand with its memory.
struct OwnedOperand {
  OwnedOperand(const InputFormat& format, int64_t rows, int64_t cols)
      : data(operand_bytes(format.precision, rows, cols)), scale(rows, 0.0f) {
    sums.assign(format.group > 0 ? operand_sums(rows, cols, format.group) : 0, 0);
    view = {data.data(), operand_capacity(rows) * kChunkBytes, scale.data(), sums.data()};
  }
  AlignedBuffer data;
  std::vector<float> scale;
  std::vector<int32_t> sums;
  Operand view;
};

// Packed weights [out, in] and bias of one linear layer, for repeated products.
class PyLinear {
 public:
  PyLinear(const std::string& precision, const py::array& weight, const std::optional<F32>& bias, int64_t group,
           const std::optional<F32>& divisor)
      : precision_(precision_of(precision)) {
    require_group(group);
    require_array(weight, "weight", {-1, -1});
    require(weight.shape(0) > 0 && weight.shape(1) > 0, "weight: must not be empty");
    if (bias) require_array(*bias, "bias", {weight.shape(0)});
    require_divisor(divisor, precision_, weight.shape(1));
    linear_ = PackedLinear(precision_, group, weight.shape(0), weight.shape(1), divisor ? divisor->data() : nullptr);
    const MatrixView view{table_view(weight, "weight"), weight.shape(0), weight.shape(1)};
    require(linear_.set_rows(0, view, bias ? bias->data() : nullptr, 1), "weight: holds NaN or infinity");
  }

  // epilogue(x . W^T + b): x [rows, in], residual [rows, out] for "residual" -> [rows, out]
  F32 multiply(const std::string& isa, const F32& x, const std::string& epilogue,
               const std::optional<F32>& residual) const {
    const KernelTable& kernels = kernel_table(isa);
    require_array(x, "x", {-1, linear_.in_features()});
    const int64_t rows = x.shape(0), out = linear_.out_features();
    Epilogue kind = Epilogue::kBias;
    if (epilogue == "gelu") kind = Epilogue::kBiasGelu;
    if (epilogue == "residual") kind = Epilogue::kBiasResidual;
    require(kind != Epilogue::kBias || epilogue == "bias", "epilogue: expected bias, gelu or residual");
    require((kind == Epilogue::kBiasResidual) == residual.has_value(), "residual: given exactly for epilogue residual");
    if (residual) require_array(*residual, "residual", {rows, out});
    OwnedOperand a(linear_.input(), rows, linear_.in_features());
    kernels.to_operand({linear_.input(), x.data(), linear_.in_features(), 0, rows, linear_.in_features(), a.view});
    F32 y({rows, out});
    kernels.gemm({precision_,
                  a.view,
                  rows,
                  linear_.view(),
                  0,
                  panels_for(out),
                  kind,
                  y.mutable_data(),
                  out,
                  residual ? residual->data() : nullptr,
                  {},
                  nullptr,
                  0});
    return y;
  }

 private:
  Precision precision_;
  PackedLinear linear_;
};

// Per-row int8: x [rows, cols] -> (q int8 [rows, cols], scale [rows]). q is read back from the kernel's layout, which
// takes ten times as long as the kernel: benchmarks do without (`unpack` false: q is empty).
py::tuple quantize(const std::string& isa, const F32& x, bool unpack) {
  require_array(x, "x", {-1, -1});
  const int64_t rows = x.shape(0), cols = x.shape(1);
  const InputFormat format{Precision::kInt8, 0, nullptr};
  OwnedOperand a(format, rows, cols);
  kernel_table(isa).to_operand({format, x.data(), cols, 0, rows, cols, a.view});
  py::array_t<int8_t> q({unpack ? rows : 0, cols});
  for (int64_t row = 0; row < q.shape(0); ++row)
    for (int64_t col = 0; col < cols; ++col)
      q.mutable_at(row, col) = static_cast<int8_t>(
          a.view.data[col / kChunkBytes * a.view.chunk_stride + row * kChunkBytes + col % kChunkBytes] - 128);
  return py::make_tuple(q, F32(static_cast<py::ssize_t>(rows), a.scale.data()));
}

// LayerNorm of x [rows, cols] with gamma, beta [cols]
F32 layer_norm(const std::string& isa, const F32& x, const F32& gamma, const F32& beta, float eps) {
  require_array(x, "x", {-1, -1});
  const int64_t rows = x.shape(0), cols = x.shape(1);
  require_array(gamma, "gamma", {cols});
  require_array(beta, "beta", {cols});
  F32 y({rows, cols});
  kernel_table(isa).layer_norm(
      {{}, x.data(), cols, y.mutable_data(), cols, 0, rows, cols, gamma.data(), beta.data(), eps, {}});
  return y;
}

// Attention of one sequence, its products in fp32 or 16-bit integers: q [queries, heads, head_dim], k and v [keys,
// heads, head_dim] -> like q
F32 attention(const std::string& isa, const F32& q, const F32& k, const F32& v, float scale, bool int16) {
  require_array(q, "q", {-1, -1, -1});
  require_array(k, "k", {-1, -1, -1});
  const int64_t queries = q.shape(0), heads = q.shape(1), head_dim = q.shape(2), keys = k.shape(0);
  require(heads > 0 && head_dim > 0 && heads * head_dim < (int64_t{1} << 24), "q: heads and head_dim must be positive");
  require_array(k, "k", {keys, heads, head_dim});
  require_array(v, "v", {keys, heads, head_dim});
  const int64_t ld = heads * head_dim;
  require(keys > 0, "k: must not be empty");
  F32 out({queries, heads, head_dim});
  AlignedBuffer scratch(attention_scratch_floats(head_dim, queries) * static_cast<int64_t>(sizeof(float)));
  kernel_table(isa).attention({q.data(), ld, queries, k.data(), v.data(), ld, keys, 0, static_cast<int>(heads),
                               static_cast<int>(head_dim), scale, int16, out.mutable_data(), ld,
                               reinterpret_cast<float*>(scratch.data())});
  return out;
}

// word[ids] + type[type_ids] + position[position_ids] -> [tokens, hidden]
F32 embed(const std::string& isa, const py::array& word, const py::array& position, const py::array& type,
          const I32& ids, const I32& position_ids, const I32& type_ids) {
  require_array(word, "word", {-1, -1});
  const int64_t hidden = word.shape(1), tokens = ids.size();
  require_array(position, "position", {-1, hidden});
  require_array(type, "type", {-1, hidden});
  require_ids(ids, "ids", tokens, word.shape(0));
  require_ids(position_ids, "position_ids", tokens, position.shape(0));
  require_ids(type_ids, "type_ids", tokens, type.shape(0));
  F32 x({tokens, hidden});
  kernel_table(isa).embed({table_view(word, "word"), table_view(position, "position"), table_view(type, "type"),
                           ids.data(), nullptr, position_ids.data(), type_ids.data(), x.mutable_data(), hidden, 0,
                           tokens, hidden});
  return x;
}

}  // namespace

void bind_kernels(py::module_& m) {
  py::module_ k = m.def_submodule("kernels", "Single kernels on one thread, for tests and benchmarks.");
  py::class_<PyLinear>(k, "Linear")
      .def(py::init<const std::string&, const py::array&, const std::optional<F32>&, int64_t,
                    const std::optional<F32>&>(),
           py::arg("precision"), py::arg("weight"), py::arg("bias"), py::arg("group") = kDefaultGroup,
           py::arg("divisor").noconvert() = py::none())
      .def("multiply", &PyLinear::multiply, py::arg("isa"), py::arg("x"), py::arg("epilogue"), py::arg("residual"));
  k.def("quantize", &quantize, py::arg("isa"), py::arg("x"), py::arg("unpack") = true);
  k.def("layer_norm", &layer_norm, py::arg("isa"), py::arg("x"), py::arg("gamma"), py::arg("beta"), py::arg("eps"));
  k.def("attention", &attention, py::arg("isa"), py::arg("q"), py::arg("k"), py::arg("v"), py::arg("scale"),
        py::arg("int16") = false);
  k.def("embed", &embed, py::arg("isa"), py::arg("word"), py::arg("position"), py::arg("type"), py::arg("ids"),
        py::arg("position_ids"), py::arg("type_ids"));
}

}  // namespace xfast
