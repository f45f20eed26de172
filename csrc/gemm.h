// Packed matrix product with fused epilogues: y = epilogue(x . W^T). Layouts: layout.h. Arithmetic: gemm_dot.h. What is
// done with finished tiles: gemm_epilogue.h. int4 weights: gemm_int4.h.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// One tile: R rows of the operand times one panel of 32 outputs, accumulated over `chunks` chunks in registers.
//   a: [chunk][R rows][64 bytes]   b: [chunk][16 groups][32 outputs][4 bytes]   out: [R][32] accumulators
// `start` holds the first values of the accumulators, one row for all (stride 0) or [R][32]; null is zero.
// Each output is one chain of multiply-accumulates in the order of `in`: its bits depend neither on R nor on how
// `in` is cut into calls nor on threads.
// Three streams are prefetched: from memory, PrefetchLines cache lines in two groups of the weights that come next;
// from L2, this panel's weights a little ahead (they have left L1 since the last row tile) and the operand's next
// chunk, which lies a whole stride further, where no hardware prefetcher looks for it.
template <class Dot, int R, int PrefetchLines>
void tile(const uint8_t* a, int64_t chunk_stride, const uint8_t* b, int64_t chunks, const void* start,
          int64_t start_stride, void* out, const uint8_t* prefetch) {
  using Acc = typename Dot::Acc;
  constexpr int V = kVectorsPerHalf;
  for (int half = 0; half < kHalves; ++half) {
    Acc acc[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        acc[r][v] =
            start == nullptr
                ? zero_acc(Acc{})
                : load_acc(static_cast<const uint8_t*>(start) + r * start_stride + (half * V + v) * kRegBytes, Acc{});
    const uint8_t* a_chunk = a;
    const uint8_t* b_group = b + half * V * kRegBytes;
    for (int64_t c = 0; c < chunks; ++c, a_chunk += chunk_stride) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g, b_group += kPanel * 4) {
        if constexpr (PrefetchLines > 1) {
#pragma GCC unroll 2
          for (int line = 0; line < PrefetchLines / 2; ++line) __builtin_prefetch(prefetch + line * 64, 0, 3);
          prefetch += PrefetchLines / 2 * 64;
        } else if constexpr (PrefetchLines == 1) {
          if (g % 2 == 0) {
            __builtin_prefetch(prefetch, 0, 3);
            prefetch += 64;
          }
        }
        if constexpr (kHalves == 1 && R >= 8) {
          __builtin_prefetch(a_chunk + chunk_stride + g * kChunkBytes, 0, 3);
          __builtin_prefetch(b_group + kAheadInL2, 0, 3);
          __builtin_prefetch(b_group + kAheadInL2 + 64, 0, 3);
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

using TileFn = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, const void*, int64_t, void*, const uint8_t*);

// The tile function for `rows` rows (1 .. Dot::kMaxRows) and 0, 1, 2 or 4 prefetched lines in two groups. Without
// `Prefetches` only tiles that prefetch nothing from memory are compiled: attention's operands are in L1 or L2.
template <class Dot, bool Prefetches = true, int R = Dot::kMaxRows>
TileFn tile_for(int rows, int prefetch_lines = 0) {
  if constexpr (R > 1) {
    if (rows != R) return tile_for<Dot, Prefetches, R - 1>(rows, prefetch_lines);
  }
  if constexpr (Prefetches) {
    constexpr TileFn kTiles[] = {tile<Dot, R, 0>, tile<Dot, R, 1>, tile<Dot, R, 2>, nullptr, tile<Dot, R, 4>};
    return kTiles[prefetch_lines];
  } else {
    return tile<Dot, R, 0>;
  }
}

// Chunks of `in` that one pass over the rows takes: 48 KiB of weights, so that they and the operand's part stay in L2
// however long `in` is.
constexpr int64_t kPassChunks = 24;

// Rows [row_begin, row_end) of one panel. `next` is where the weights continue after this panel, or null.
template <class Dot, Precision P>
void multiply_panel(const GemmArgs& args, FinishFn finish, int64_t row_begin, int64_t row_end, int64_t panel,
                    const uint8_t* next) {
  alignas(64) uint8_t acc[kPassRows * kPanel * 4];
  const RowTiles tiles(row_end - row_begin, Dot::kMaxRows);
  const uint8_t* weights = args.w.data + panel * args.w.panel_bytes;
  const void* start = nullptr;
  if constexpr (P == Precision::kInt8) start = Dot::kSigned ? nullptr : args.w.compensation + panel * kPanel;
  prefetch_vectors<P>(args.w, panel);
  int64_t start_stride = 0;
  for (int64_t chunk = 0; chunk < args.w.chunks; chunk += kPassChunks) {
    const bool last = chunk + kPassChunks >= args.w.chunks;
    const int64_t chunks = last ? args.w.chunks - chunk : kPassChunks, bytes = chunks * kPanelChunkBytes;
    const uint8_t* pass_weights = weights + chunk * kPanelChunkBytes;
    const uint8_t* ahead = last ? next : pass_weights + bytes;
    if (tiles.count == 1) ahead = pass_weights + kAheadOfOneTile;
    int64_t lines_ahead = bytes / 64;
    if (args.weights_in_cache) {  // what `next` holds is spread over the passes
      ahead = next == nullptr ? nullptr : next + args.next_bytes * chunk / args.w.chunks;
      lines_ahead = args.next_bytes * chunks / args.w.chunks / 64;
    }
    if (ahead == nullptr || kRegBytes > 64) lines_ahead = 0;  // portable code has no use for it
    int64_t row = row_begin;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t);
      uint8_t* tile_acc = acc + (row - row_begin) * kPanel * 4;
      // As much as this pass reads is fetched for the next one, spread over the tiles: memory has no bursts to give.
      const int64_t steps = chunks * kGroups / 2 * kHalves, wanted = ceil_div(lines_ahead, steps * (tiles.count - t));
      const int lines = wanted > 2 ? 4 : static_cast<int>(wanted);
      // Here and not in a function: that made `full` 2 % slower, for a reason not found.
      if (last && args.out_operand.data == nullptr)
        for (int64_t r = 0; r < rows; ++r) {
          const float* dst = args.out + (row + r) * args.ldo + panel * kPanel;
          __builtin_prefetch(dst, 1, 3);
          __builtin_prefetch(dst + 16, 1, 3);
        }
      tile_for<Dot>(static_cast<int>(rows), lines)(args.a.data + chunk * args.a.chunk_stride + row * kChunkBytes,
                                                   args.a.chunk_stride, pass_weights, chunks,
                                                   start_stride == 0 ? start : tile_acc, start_stride, tile_acc, ahead);
      ahead += lines * steps * 64;
      lines_ahead -= lines * steps;
      if (last) finish(args, tile_acc, row, rows, panel);
      row += rows;
    }
    start_stride = kPanel * 4;
  }
}

using PanelFn = void (*)(const GemmArgs&, FinishFn, int64_t, int64_t, int64_t, const uint8_t*);

inline void gemm_with(const GemmArgs& args, FinishFn finish, PanelFn multiply) {
  const int64_t bytes = args.w.panel_bytes;
  for (int64_t begin = 0; begin < args.rows; begin += kPassRows) {
    const int64_t end = args.rows - begin < kPassRows ? args.rows : begin + kPassRows;
    for (int64_t panel = args.panel_begin; panel < args.panel_end; ++panel) {
      const bool last = panel + 1 == args.panel_end;
      const uint8_t* next = nullptr;
      if (last)
        next = args.weights_in_cache || args.next_bytes >= bytes ? args.next : nullptr;
      else if (!args.weights_in_cache)
        next = args.w.data + (panel + 1) * bytes;
      multiply(args, finish, begin, end, panel, next);
    }
  }
}

inline void gemm(const GemmArgs& args) {
  constexpr Precision F = Precision::kFp32, B = Precision::kBf16, I = Precision::kInt8;
  switch (args.precision) {
    case F: return gemm_with(args, finish_for<F>(args), multiply_panel<DotF32, F>);
    case B: return gemm_with(args, finish_for<B>(args), multiply_panel<DotBf16, B>);
    case I: return gemm_with(args, finish_for<I>(args), multiply_panel<DotInt8, I>);
    case Precision::kInt4: return gemm_with(args, finish_for<Precision::kInt4>(args), multiply_panel_int4);
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
