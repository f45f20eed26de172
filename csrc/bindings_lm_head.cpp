#include "bindings_lm_head.h"

#include <pybind11/stl.h>

#include <optional>

#include "checks.h"
#include "isa.h"
#include "lm_head.h"
#include "thread_pool.h"

namespace xfast {
namespace {

// x [tokens, hidden] -> out[indices, :] = decoder(layer_norm(gelu(dense(x)))), the rows between them zeros
void py_lm_head(const std::string& isa, const std::string& precision, const F32& x, const py::array& dense,
                const F32& dense_bias, const F32& gamma, const F32& beta, float eps, const py::array& decoder,
                const std::optional<F32>& decoder_bias, const I32& indices, const py::array& out, int threads) {
  LmHeadArgs args{};
  args.precision = precision_of(precision);
  require(!is_quantised(args.precision), "precision: expected fp32 or bf16");
  require(threads >= 1 && threads <= kMaxThreads, "threads: out of range");
  require_array(x, "x", {-1, -1});
  args.tokens = x.shape(0);
  args.hidden = x.shape(1);
  require(args.hidden > 0, "x: must have columns");
  require_array(dense, "dense", {args.hidden, args.hidden});
  require_array(dense_bias, "dense_bias", {args.hidden});
  require_array(gamma, "gamma", {args.hidden});
  require_array(beta, "beta", {args.hidden});
  require_array(decoder, "decoder", {-1, args.hidden});
  args.vocab = decoder.shape(0);
  require(args.vocab > 0, "decoder: must not be empty");
  if (decoder_bias) require_array(*decoder_bias, "decoder_bias", {args.vocab});
  require_array(indices, "indices", {args.tokens});
  require_array(out, "out", {-1, args.vocab});
  require(out.writeable(), "out: read-only");
  args.slots = out.shape(0);
  require_ascending(indices, "indices", args.slots, "out's rows");
  const TableView result = table_view(out, "out");
  require(result.type != TableType::kF16, "out: expected float32 or uint16 (bf16 bits) values");
  args.out = const_cast<void*>(result.data);
  args.out_type = result.type;
  args.x = x.data();
  args.dense = table_view(dense, "dense");
  args.dense_bias = dense_bias.data();
  args.gamma = gamma.data();
  args.beta = beta.data();
  args.eps = eps;
  args.decoder = table_view(decoder, "decoder");
  args.decoder_bias = decoder_bias ? decoder_bias->data() : nullptr;
  args.indices = indices.data();
  args.threads = threads;
  const KernelTable& kernels = kernel_table(isa);
  py::gil_scoped_release release;
  lm_head(kernels, args);
}

}  // namespace

void bind_lm_head(py::module_& m) {
  m.def("lm_head", &py_lm_head, py::arg("isa"), py::arg("precision"), py::arg("x").noconvert(), py::arg("dense"),
        py::arg("dense_bias").noconvert(), py::arg("gamma").noconvert(), py::arg("beta").noconvert(), py::arg("eps"),
        py::arg("decoder"), py::arg("decoder_bias").noconvert(), py::arg("indices").noconvert(), py::arg("out"),
        py::arg("threads"));
}

}  // namespace xfast
