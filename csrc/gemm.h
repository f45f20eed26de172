// Packed matrix product with fused epilogues: y = epilogue(x . W^T). Layouts: layout.h. Arithmetic: gemm_dot.h.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// One tile: R rows of the operand times one panel of 32 outputs, accumulated over all of `in` in registers.
//   a: [chunk][R rows][64 bytes]   b: [chunk][16 groups][32 outputs][4 bytes]   out: [R][32] accumulators
// Each output is one chain of multiply-accumulates in the order of `in`: its bits depend neither on R nor on threads.
// PrefetchLines: cache lines of the next panel requested per group (the weights are the only stream that misses).
template <class Dot, int R, int PrefetchLines>
void tile(const uint8_t* a, int64_t chunk_stride, const uint8_t* b, int64_t chunks, const int32_t* start, void* out,
          const uint8_t* prefetch) {
  using Acc = typename Dot::Acc;
  constexpr int V = kVectorsPerHalf;
  for (int half = 0; half < kHalves; ++half) {
    Acc acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        if constexpr (sizeof(Acc) == sizeof(IntReg) && __is_same(Acc, IntReg))
          acc[r][v] = load_acc(start + (half * V + v) * (kRegBytes / 4));
        else
          acc[r][v] = zero_acc(Acc{});
      }
    const uint8_t* a_chunk = a;
    const uint8_t* b_group = b + half * V * kRegBytes;
    for (int64_t c = 0; c < chunks; ++c, a_chunk += chunk_stride) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g, b_group += kPanel * 4) {
        if constexpr (PrefetchLines > 0) {
#pragma GCC unroll 2
          for (int line = 0; line < PrefetchLines; ++line) __builtin_prefetch(prefetch + line * 64, 0, 3);
          prefetch += PrefetchLines * 64;
        }
        typename Dot::B bv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) bv[v] = Dot::load_b(b_group + v * kRegBytes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const typename Dot::A av = Dot::load_a(a_chunk + r * kChunkBytes + g * 4);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) Dot::step(acc[r][v], av, bv[v]);
        }
      }
    }
    uint8_t* dst = static_cast<uint8_t*>(out) + half * V * kRegBytes;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store_acc(dst + r * kPanel * 4 + v * kRegBytes, acc[r][v]);
  }
}

using TileFn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const int32_t*, void*, const uint8_t*);

// The tile function for `rows` rows (1 .. Dot::kMaxRows) and 0, 1 or 2 prefetched lines a group.
template <class Dot, int R = Dot::kMaxRows>
TileFn tile_for(int rows, int prefetch_lines) {
  if constexpr (R > 1) {
    if (rows != R) return tile_for<Dot, R - 1>(rows, prefetch_lines);
  }
  return prefetch_lines == 0 ? tile<Dot, R, 0> : prefetch_lines == 1 ? tile<Dot, R, 1> : tile<Dot, R, 2>;
}

// Rows [0, rows) cut into the fewest tiles of at most max_rows, all within one row of each other (32 = 11 + 11 + 10).
struct RowTiles {
  int64_t count, base, extra;
  RowTiles(int64_t rows, int64_t max_rows)
      : count(ceil_div(rows, max_rows)), base(count ? rows / count : 0), extra(count ? rows % count : 0) {}
  int64_t size(int64_t t) const { return base + (t < extra ? 1 : 0); }
};

// Accumulators of one row -> two vectors of real values.
inline void dequantize_row(const GemmArgs& args, const uint8_t* acc, int64_t row, int64_t col, V16 y[2]) {
  for (int v = 0; v < 2; ++v) {
    const V16 bias = load(args.w.bias + col + 16 * v);
    if (args.precision == Precision::kInt8) {
      const V16 sum = to_float(load_i32(reinterpret_cast<const int32_t*>(acc) + 16 * v));
      y[v] = fma(sum, mul(load(args.w.scale + col + 16 * v), set1(args.a.scale[row])), bias);
    } else {
      y[v] = add(load(reinterpret_cast<const float*>(acc) + 16 * v), bias);
    }
  }
}

// Epilogue of one tile: acc [rows][32] -> args.out or args.out_operand.
inline void finish_tile(const GemmArgs& args, const uint8_t* acc, int64_t row0, int64_t rows, int64_t panel) {
  const int64_t col = panel * kPanel, valid = args.w.out_features - col;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = row0 + r;
    V16 y[2];
    dequantize_row(args, acc + r * kPanel * 4, row, col, y);
    for (int v = 0; v < 2; ++v) {
      const int64_t n = valid - 16 * v;
      if (args.epilogue == Epilogue::kBiasGelu) y[v] = gelu(y[v]);
      if (args.epilogue == Epilogue::kBiasResidual)
        y[v] = add(y[v], load_n(args.residual + row * args.ldr + col + 16 * v, n));
      if (args.out_operand.data == nullptr) store_n(args.out + row * args.ldo + col + 16 * v, y[v], n);
    }
    if (args.out_operand.data == nullptr) continue;
    // A panel of 32 outputs is two fp32 chunks or one bf16 chunk; padded outputs are zero (weights and bias are).
    uint8_t* dst = args.out_operand.data + row * kChunkBytes;
    if (args.precision == Precision::kFp32) {
      store(reinterpret_cast<float*>(dst + 2 * panel * args.out_operand.chunk_stride), y[0]);
      if (valid > 16) store(reinterpret_cast<float*>(dst + (2 * panel + 1) * args.out_operand.chunk_stride), y[1]);
    } else {
      uint16_t* bf16 = reinterpret_cast<uint16_t*>(dst + panel * args.out_operand.chunk_stride);
      store_bf16(bf16, y[0]);
      store_bf16(bf16 + 16, y[1]);
    }
  }
}

template <class Dot>
void gemm_with(const GemmArgs& args) {
  const RowTiles tiles(args.rows, Dot::kMaxRows);
  const int64_t panel_bytes = args.w.chunks * kPanelChunkBytes;
  alignas(64) uint8_t acc[kMaxTileRows * kPanel * 4];
  for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
    const uint8_t* weights = args.w.data + panel * panel_bytes;
    const bool last = panel + 1 == args.panel_end;
    const uint8_t* next = last ? args.next : weights + panel_bytes;
    if (last && args.next_bytes < panel_bytes) next = nullptr;
    const int32_t* start = args.precision == Precision::kInt8 ? args.w.compensation + panel * kPanel : nullptr;
    int64_t row = 0;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t);
      // The first one or two tiles fetch the whole next panel; portable code has no use for it.
      const int lines = next == nullptr || t > 1 || kHalves > 1 ? 0 : tiles.count == 1 ? 2 : 1;
      const uint8_t* prefetch = lines == 0 ? nullptr : next + (t == 1 ? panel_bytes / 2 : 0);
      tile_for<Dot>(static_cast<int>(rows), lines)(args.a.data + row * kChunkBytes, args.a.chunk_stride, weights,
                                                   args.w.chunks, start, acc, prefetch);
      finish_tile(args, acc, row, rows, panel);
      row += rows;
    }
  }
}

inline void gemm(const GemmArgs& args) {
  switch (args.precision) {
    case Precision::kFp32: return gemm_with<DotF32>(args);
    case Precision::kBf16: return gemm_with<DotBf16>(args);
    case Precision::kInt8: return gemm_with<DotInt8>(args);
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
