// What the tiles of every precision share: how rows are cut, and what happens to finished accumulators.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// Weights on their way from memory. Intel's cores keep more lines on their way to L2 than to L1, so there they go to L2
// first, and from there to L1 a little ahead of their use; Zen 5 ignores the first of these prefetches.
#if defined(XFAST_INTEL)
constexpr int kFromMemory = 2;              // __builtin_prefetch's locality: 2 is L2, 3 is L1
constexpr int64_t kAheadOfOneTile = 16384;  // bytes ahead in memory, where a panel is read once
constexpr int64_t kAheadInL2 = 2048;        // bytes of weights that are fetched from L2 ahead of their use
#else
constexpr int kFromMemory = 3;
constexpr int64_t kAheadOfOneTile = 4096;
constexpr int64_t kAheadInL2 = 1024;
#endif

// Rows [0, rows) cut into the fewest tiles of at most max_rows, all within one row of each other (32 = 11 + 11 + 10).
struct RowTiles {
  int64_t count, base, extra;
  RowTiles(int64_t rows, int64_t max_rows)
      : count(ceil_div(rows, max_rows)), base(count ? rows / count : 0), extra(count ? rows % count : 0) {}
  int64_t size(int64_t t) const { return base + (t < extra ? 1 : 0); }
};

// A tile of rows times a panel: operand, its chunk_stride, weights, chunks, start, start_stride, out, prefetch
// (gemm.h).
using TileFn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const void*, int64_t, void*, const uint8_t*);

inline void prefetch_panel(const void* vector, int64_t panel) {
  const uint8_t* at = static_cast<const uint8_t*>(vector) + panel * kPanel * 4;
  __builtin_prefetch(at, 0, 3);
  __builtin_prefetch(at + 64, 0, 3);
}

// What the panel's epilogue reads beside the accumulators, and what the next panel's tiles start from: by then weights
// have driven them out of every cache, and each would be waited for by itself.
template <Precision P>
void prefetch_vectors(const LinearView& w, int64_t panel) {
  prefetch_panel(w.bias, panel);
  if constexpr (P == Precision::kInt8) {
    prefetch_panel(w.scale, panel);
    prefetch_panel(w.compensation, panel + 1);
  }
}

// Epilogue of one tile: acc [rows][32] -> args.out or args.out_operand. Everything that is the same for all rows is a
// template argument or stays in registers.
template <Precision P, Epilogue E, bool Direct>
void finish_tile(const GemmArgs& args, const uint8_t* acc, int64_t row0, int64_t rows, int64_t panel) {
  const int64_t col = panel * kPanel, valid = args.w.out_features - col;
  V16 bias[2], scale[2];
  for (int v = 0; v < 2; ++v) {
    bias[v] = load(args.w.bias + col + 16 * v);
    scale[v] = P == Precision::kInt8 ? load(args.w.scale + col + 16 * v) : set1(1.0f);
  }
  for (int64_t r = 0; r < rows; ++r, acc += kPanel * 4) {
    const int64_t row = row0 + r;
    V16 y[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if constexpr (P == Precision::kInt8) {
        const V16 sum = to_float(load_i32(reinterpret_cast<const int32_t*>(acc) + 16 * v));
        y[v] = fma(sum, mul(scale[v], set1(args.a.scale[row])), bias[v]);
      } else if constexpr (P == Precision::kInt4) {
        y[v] = fma(load(reinterpret_cast<const float*>(acc) + 16 * v), set1(args.a.scale[row]), bias[v]);
      } else {
        y[v] = add(load(reinterpret_cast<const float*>(acc) + 16 * v), bias[v]);
      }
      if constexpr (E == Epilogue::kBiasGelu) y[v] = P == Precision::kFp32 ? gelu(y[v]) : gelu_rounded(y[v]);
      if constexpr (E == Epilogue::kBiasResidual)
        y[v] = add(y[v], load_n(args.residual + row * args.ldo + col + 16 * v, valid - 16 * v));
      if constexpr (!Direct) store_n(args.out + row * args.ldo + col + 16 * v, y[v], valid - 16 * v);
    }
    // A panel of 32 outputs is two fp32 chunks or one bf16 chunk; padded outputs are zero (weights and bias are).
    if constexpr (Direct && P == Precision::kFp32) {
      uint8_t* dst = args.out_operand.data + row * kChunkBytes + 2 * panel * args.out_operand.chunk_stride;
      store(reinterpret_cast<float*>(dst), y[0]);
      if (valid > 16) store(reinterpret_cast<float*>(dst + args.out_operand.chunk_stride), y[1]);
    } else if constexpr (Direct) {
      uint8_t* dst = args.out_operand.data + row * kChunkBytes + panel * args.out_operand.chunk_stride;
      store_bf16(reinterpret_cast<uint16_t*>(dst), y[0], y[1]);
    }
  }
}

using FinishFn = void (*)(const GemmArgs&, const uint8_t*, int64_t, int64_t, int64_t);

template <Precision P>
FinishFn finish_for(const GemmArgs& args) {
  constexpr bool kCanBeDirect = !is_quantised(P);  // a quantised row's scale is known only at its end
  const bool direct = kCanBeDirect && args.out_operand.data != nullptr;
  switch (args.epilogue) {
    case Epilogue::kBias:
      return direct ? finish_tile<P, Epilogue::kBias, kCanBeDirect> : finish_tile<P, Epilogue::kBias, false>;
    case Epilogue::kBiasResidual: return finish_tile<P, Epilogue::kBiasResidual, false>;
    case Epilogue::kBiasGelu:
      return direct ? finish_tile<P, Epilogue::kBiasGelu, kCanBeDirect> : finish_tile<P, Epilogue::kBiasGelu, false>;
  }
  return nullptr;
}

}  // namespace XFAST_TARGET
}  // namespace xfast
