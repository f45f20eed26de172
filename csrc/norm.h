// LayerNorm, statistics in fp32 with two passes, then the next product's operand while the row is in L1.
#pragma once

#include <cmath>

namespace xfast {
namespace XFAST_TARGET {

// x, gamma, beta -> y: [cols]; y may be x
inline void layer_norm_row(const float* x, int64_t cols, const float* gamma, const float* beta, float eps, float* y) {
  V16 sum = set1(0.0f);
  for (int64_t c = 0; c < cols; c += 16) sum = add(sum, load_n(x + c, cols - c));
  const float mean = reduce_add(sum) / static_cast<float>(cols);
  const V16 mean16 = set1(mean);
  V16 squares = set1(0.0f);
  for (int64_t c = 0; c < cols; c += 16) {
    const V16 d = keep_first(sub(load_n(x + c, cols - c), mean16), cols - c);
    squares = fma(d, d, squares);
  }
  const V16 rstd = set1(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(cols) + eps));
  for (int64_t c = 0; c < cols; c += 16) {
    const int64_t n = cols - c;
    const V16 normed = mul(sub(load_n(x + c, n), mean16), rstd);
    store_n(y + c, fma(normed, load_n(gamma + c, n), load_n(beta + c, n)), n);
  }
}

inline void layer_norm(const NormArgs& args) {
  for (int64_t row = args.row_begin; row < args.row_end; ++row) {
    float* y = args.y + row * args.ldy;
    layer_norm_row(args.x + row * args.ldx, args.cols, args.gamma, args.beta, args.eps, y);
    if (args.out.data != nullptr) operand_row(args.format, y, args.cols, args.out, row);
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
