// LayerNorm, statistics in fp32 with two passes, then the next product's operand while the row is in L1.
#pragma once

#include <cmath>

namespace xfast {
namespace XFAST_TARGET {

// Rows of x, gamma, beta -> rows of y, which may be x. Several rows at a time: each sum is one chain of additions, in
// an order that is part of the result, and a single chain waits for itself. Whole: cols is a multiple of 16.
template <int Rows, bool Whole>
void layer_norm_rows(const NormArgs& args, const float* x, float* y) {
  const int64_t cols = args.cols;
  V16 mean[Rows], rstd[Rows], squares[Rows];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) mean[r] = squares[r] = set1(0.0f);
  for (int64_t c = 0; c < cols; c += 16)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) mean[r] = add(mean[r], load_part<Whole>(x + r * args.ldx + c, cols - c));
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r) mean[r] = set1(reduce_add(mean[r]) / static_cast<float>(cols));
  for (int64_t c = 0; c < cols; c += 16)
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      V16 d = sub(load_part<Whole>(x + r * args.ldx + c, cols - c), mean[r]);
      if constexpr (!Whole) d = keep_first(d, cols - c);
      squares[r] = fma(d, d, squares[r]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
    rstd[r] = set1(1.0f / std::sqrt(reduce_add(squares[r]) / static_cast<float>(cols) + args.eps));
  for (int64_t c = 0; c < cols; c += 16) {
    const int64_t n = cols - c;
    const V16 gamma = load_part<Whole>(args.gamma + c, n), beta = load_part<Whole>(args.beta + c, n);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const V16 normed = mul(sub(load_part<Whole>(x + r * args.ldx + c, n), mean[r]), rstd[r]);
      store_part<Whole>(y + r * args.ldy + c, fma(normed, gamma, beta), n);
    }
  }
}

template <bool Whole>
void layer_norm_with(const NormArgs& args) {
  constexpr int kRows = 4;
  for (int64_t row = args.row_begin; row < args.row_end;) {
    const float* x = args.x + row * args.ldx;
    float* y = args.y + row * args.ldy;
    // Where every row overwrites the last one's place, its operand comes first.
    const int rows = args.ldy != 0 && args.row_end - row >= kRows ? kRows : 1;
    if (rows == 1)
      layer_norm_rows<1, Whole>(args, x, y);
    else
      layer_norm_rows<kRows, Whole>(args, x, y);
    if (args.out.data != nullptr)
      for (int r = 0; r < rows; ++r) operand_row(args.format, y + r * args.ldy, args.cols, args.out, row + r);
    row += rows;
  }
}

inline void layer_norm(const NormArgs& args) {
  return args.cols % 16 == 0 ? layer_norm_with<true>(args) : layer_norm_with<false>(args);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
