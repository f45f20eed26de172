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
      const uint8_t* a_rows = a_chunk;
      constexpr int64_t kUnpacked = kUnpackedBytes<Dot>, kRowBytes = kUnpacked > 0 ? kUnpacked : kChunkBytes;
      alignas(64) uint8_t unpacked[kUnpacked > 0 ? R * kUnpacked : 1];
      if constexpr (kUnpacked > 0) {
        for (int r = 0; r < R; ++r) Dot::unpack(a_chunk + r * kChunkBytes, unpacked + r * kUnpacked);
        a_rows = unpacked;
      }
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g, b_group += kPanel * 4) {
        if constexpr (PrefetchLines > 1) {
#pragma GCC unroll 2
          for (int line = 0; line < PrefetchLines / 2; ++line) __builtin_prefetch(prefetch + line * 64, 0, kFromMemory);
          prefetch += PrefetchLines / 2 * 64;
        } else if constexpr (PrefetchLines == 1) {
          if (g % 2 == 0) {
            __builtin_prefetch(prefetch, 0, kFromMemory);
            prefetch += 64;
          }
        }
        if constexpr (kHalves == 1 && R >= 8) __builtin_prefetch(a_chunk + chunk_stride + g * kChunkBytes, 0, 3);
        if constexpr (kHalves == 1 && (R >= 8 || (kFromMemory == 2 && PrefetchLines == 4))) {
          __builtin_prefetch(b_group + kAheadInL2, 0, 3);
          __builtin_prefetch(b_group + kAheadInL2 + 64, 0, 3);
        }
        typename Dot::B bv[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) bv[v] = Dot::load_b(b_group + v * kRegBytes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const typename Dot::A av = Dot::load_a(a_rows + r * kRowBytes + g * 4);
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

// What multiplies: here the vector registers, in gemm_amx.h AMX tiles.
//   Tiles            how rows are cut: count, size(t), and overlap(t), the rows that tile t - 1 has done
//   Scope            lives while blocks of so many rows are multiplied
//   starts_at_zero   int8: no compensation (gemm_dot.h)
template <class Dot>
struct Vectors {
  struct Tiles : RowTiles {
    static constexpr int64_t kMostOverlap = 0;
    explicit Tiles(int64_t rows) : RowTiles(rows, Dot::kMaxRows) {}
    static constexpr int64_t overlap(int64_t) { return 0; }
  };
  struct Scope {
    explicit Scope(int64_t) {}
  };
  static constexpr bool starts_at_zero() { return Dot::kSigned; }
  static TileFn tile_for(int64_t rows, int lines) { return XFAST_TARGET::tile_for<Dot>(static_cast<int>(rows), lines); }
};

// Chunks of `in` that one pass over the rows takes: 48 KiB of weights, so that they and the operand's part stay in L2
// however long `in` is.
constexpr int64_t kPassChunks = 24;

// Rows [row_begin, row_end) of one panel. `next` is where the weights continue after this panel, or null.
template <class Unit, Precision P>
void multiply_panel(const GemmArgs& args, FinishFn finish, int64_t row_begin, int64_t row_end, int64_t panel,
                    const uint8_t* next) {
  using Tiles = typename Unit::Tiles;
  alignas(64) uint8_t acc[(kPassRows + Tiles::kMostOverlap) * kPanel * 4];
  const Tiles tiles(row_end - row_begin);
  const uint8_t* weights = args.w.data + panel * args.w.panel_bytes;
  const void* start = nullptr;
  if constexpr (P == Precision::kInt8) start = Unit::starts_at_zero() ? nullptr : args.w.compensation + panel * kPanel;
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
    uint8_t* tile_acc = acc;  // rows that tiles share have accumulators in each
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t), done = tiles.overlap(t);
      row -= done;
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
      Unit::tile_for(rows, lines)(args.a.data + chunk * args.a.chunk_stride + row * kChunkBytes, args.a.chunk_stride,
                                  pass_weights, chunks, start_stride == 0 ? start : tile_acc, start_stride, tile_acc,
                                  ahead);
      ahead += lines * steps * 64;
      lines_ahead -= lines * steps;
      if (last) finish(args, tile_acc + done * kPanel * 4, row + done, rows - done, panel);
      row += rows;
      tile_acc += rows * kPanel * 4;
    }
    start_stride = kPanel * 4;
  }
}

using PanelFn = void (*)(const GemmArgs&, FinishFn, int64_t, int64_t, int64_t, const uint8_t*);

template <class Unit>
void gemm_with(const GemmArgs& args, FinishFn finish, PanelFn multiply) {
  const int64_t bytes = args.w.panel_bytes;
  for (int64_t begin = 0; begin < args.rows; begin += kPassRows) {
    const int64_t end = args.rows - begin < kPassRows ? args.rows : begin + kPassRows;
    const typename Unit::Scope scope(end - begin);
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

#if defined(XFAST_AMX)
using UnitBf16 = Amx<false>;
using UnitInt8 = Amx<true>;
#else
using UnitBf16 = Vectors<DotBf16>;
using UnitInt8 = Vectors<DotInt8>;
#endif
using UnitF32 = Vectors<DotF32>;

inline void gemm(const GemmArgs& args) {
  constexpr Precision F = Precision::kFp32, B = Precision::kBf16, I = Precision::kInt8, I4 = Precision::kInt4;
  switch (args.precision) {
    case F: return gemm_with<UnitF32>(args, finish_for<F>(args), multiply_panel<UnitF32, F>);
    case B: return gemm_with<UnitBf16>(args, finish_for<B>(args), multiply_panel<UnitBf16, B>);
    case I: return gemm_with<UnitInt8>(args, finish_for<I>(args), multiply_panel<UnitInt8, I>);
    case I4: return gemm_with<Vectors<DotInt4>>(args, finish_for<I4>(args), multiply_panel_int4);
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
