// The tile of int4 weights: layout.h describes the records it reads. Sums within a group are exact integers; groups are
// added up in fp32, in their order, by one fused multiply-add each, so that an output's bits depend neither on the
// target nor on tiles nor on threads.
//
// A policy per target, DotInt4:
//   unpack(p, low, high)               one register of nibble pairs -> two of weights, unsigned q + 8
//   step(acc, low, a0, high, a1)       acc[n] += low[n] . a0 + high[n] . a1, each the sum over four bytes
//   scales(p)                          32 bf16 -> fp32, a register of them
#pragma once

namespace xfast {
namespace XFAST_TARGET {

#if defined(XFAST_AVX512)

constexpr int kRowsInt4 = 12;
inline IntReg splat(int32_t value) { return _mm512_set1_epi32(value); }
inline IntReg shift_right_4(IntReg a) { return _mm512_srli_epi32(a, 4); }
inline FloatReg int_to_float(IntReg a) { return _mm512_cvtepi32_ps(a); }
inline IntReg load_words(const uint8_t* p) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// Four products of at most 15 * 127 fit 16 bits.
inline IntReg add_dots(IntReg acc, IntReg low, IntReg a0, IntReg high, IntReg a1) {
  const IntReg pairs = _mm512_add_epi16(_mm512_maddubs_epi16(low, a0), _mm512_maddubs_epi16(high, a1));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}

#elif defined(XFAST_AVX2)

#if defined(XFAST_VNNI)
constexpr int kRowsInt4 = 5;
#else
constexpr int kRowsInt4 = 3;
#endif
inline IntReg splat(int32_t value) { return _mm256_set1_epi32(value); }
inline IntReg shift_right_4(IntReg a) { return _mm256_srli_epi32(a, 4); }
inline FloatReg int_to_float(IntReg a) { return _mm256_cvtepi32_ps(a); }
inline IntReg load_words(const uint8_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline IntReg add_dots(IntReg acc, IntReg low, IntReg a0, IntReg high, IntReg a1) {
  const IntReg pairs = _mm256_add_epi16(_mm256_maddubs_epi16(low, a0), _mm256_maddubs_epi16(high, a1));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#endif

#if defined(XFAST_AVX512) || defined(XFAST_AVX2)

struct DotInt4 {
  static constexpr int kMaxRows = kRowsInt4;
  static void unpack(const uint8_t* p, IntReg& low, IntReg& high) {
    const IntReg pairs = load_group(p);
    low = and_mask(pairs, 0x0F0F0F0F);
    high = and_mask(shift_right_4(pairs), 0x0F0F0F0F);
  }
  static IntReg load_a(const uint8_t* p) { return broadcast_group(p); }
  static void step(IntReg& acc, IntReg low, IntReg a0, IntReg high, IntReg a1) {
#if defined(XFAST_VNNI)
    dot_bytes(acc, low, a0);
    dot_bytes(acc, high, a1);
#else
    acc = add_dots(acc, low, a0, high, a1);
#endif
  }
  static FloatReg scales(const uint8_t* p) { return as_float(shift_left_16(load_words(p))); }
  static FloatReg to_float(IntReg a) { return int_to_float(a); }
};

#else

struct DotInt4 {
  static constexpr int kMaxRows = 4;
  static void unpack(const uint8_t* p, IntReg& low, IntReg& high) {
    const IntReg pairs = load_acc(p, IntReg{});
    for (int n = 0; n < 32; ++n) {
      low.v[n] = pairs.v[n] & 0x0F0F0F0F;
      high.v[n] = static_cast<int32_t>(static_cast<uint32_t>(pairs.v[n]) >> 4) & 0x0F0F0F0F;
    }
  }
  static uint32_t load_a(const uint8_t* p) {
    uint32_t a;
    __builtin_memcpy(&a, p, 4);
    return a;
  }
  static void step(IntReg& acc, const IntReg& low, uint32_t a0, const IntReg& high, uint32_t a1) {
    for (int j = 0; j < 4; ++j) {
      const int x0 = static_cast<int8_t>(a0 >> 8 * j), x1 = static_cast<int8_t>(a1 >> 8 * j);
      for (int n = 0; n < 32; ++n) acc.v[n] += (low.v[n] >> 8 * j & 0x0F) * x0 + (high.v[n] >> 8 * j & 0x0F) * x1;
    }
  }
  static FloatReg scales(const uint8_t* p) {
    FloatReg r;
    for (int n = 0; n < 32; ++n) {
      uint16_t bits;
      __builtin_memcpy(&bits, p + 2 * n, 2);
      r.v[n] = bits_to_float(static_cast<uint32_t>(bits) << 16);
    }
    return r;
  }
  static FloatReg to_float(const IntReg& a) {
    FloatReg r;
    for (int n = 0; n < 32; ++n) r.v[n] = static_cast<float>(a.v[n]);
    return r;
  }
};
inline IntReg splat(int32_t value) {
  IntReg r;
  for (int n = 0; n < 32; ++n) r.v[n] = value;
  return r;
}
inline FloatReg fma_reg(FloatReg a, const FloatReg& b, const FloatReg& c) {
  for (int n = 0; n < 32; ++n) a.v[n] = __builtin_fmaf(a.v[n], b.v[n], c.v[n]);
  return a;
}

#endif

// Groups of one panel for R rows; out [R][32] fp32 is added to.
//   a: [chunk][R rows][64 bytes], from the first group on   sums: [group][stride], from the tile's first row on
//   b: the first group's record   chunks: how many are left, whole groups but for the panel's end
// `Lines` (0, 1, 2) cache lines are prefetched per pair of weight groups, and one more per group if any: with 2 that is
// as much as the tile reads, at an even pace. Faster, and the line fill buffers would be full when loads need them.
template <int R, int Lines>
void tile_int4(const uint8_t* a, int64_t chunk_stride, const int32_t* sums, int64_t sums_stride, const uint8_t* b,
               int64_t chunks, int64_t group, float* out, const uint8_t* prefetch) {
  constexpr int V = kVectorsPerHalf;
  constexpr int64_t kUnit = kInt4ChunkBytes / 2;  // weights of 32 inputs: four pairs of groups
  const int64_t units_per_group = group / 32;
  for (int half = 0; half < kHalves; ++half) {
    const uint8_t* record = b + half * V * kRegBytes;
    const uint8_t* scale = b + half * V * kRegBytes / 2;
    float* sum_out = out + half * V * kRegBytes / 4;
    const int32_t* start = sums;
    int64_t unit = 0;
    for (int64_t left = chunks * 2; left > 0; start += sums_stride) {
      const int64_t units = left < units_per_group ? left : units_per_group;
      IntReg acc[R][V];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = splat(start[r]);
      const uint8_t* w = record + kInt4ScaleBytes;
      if constexpr (Lines > 0) {
        __builtin_prefetch(prefetch, 0, kFromMemory);
        prefetch += 64;
      }
      for (int64_t u = 0; u < units; ++u, ++unit) {
        const uint8_t* rows = a + (unit >> 1) * chunk_stride + (unit & 1) * 32;
#pragma GCC unroll 1
        for (int pair = 0; pair < 4; ++pair, w += kPanel * 4, rows += 8) {
#pragma GCC unroll 2
          for (int line = 0; line < Lines; ++line) __builtin_prefetch(prefetch + line * 64, 0, kFromMemory);
          prefetch += Lines * 64;
          if constexpr (kHalves == 1 && R >= 12) {
            __builtin_prefetch(w + kAheadInL2, 0, 3);
            __builtin_prefetch(w + kAheadInL2 + 64, 0, 3);
            __builtin_prefetch(rows + chunk_stride + 2 * pair * kChunkBytes, 0, 3);
            __builtin_prefetch(rows + chunk_stride + (2 * pair + 1) * kChunkBytes, 0, 3);
          }
          IntReg low[V], high[V];
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) DotInt4::unpack(w + v * kRegBytes, low[v], high[v]);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
            const auto a0 = DotInt4::load_a(rows + r * kChunkBytes), a1 = DotInt4::load_a(rows + r * kChunkBytes + 4);
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) DotInt4::step(acc[r][v], low[v], a0, high[v], a1);
          }
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const FloatReg by = DotInt4::scales(scale + v * kRegBytes / 2);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          float* to = sum_out + r * kPanel + v * kRegBytes / 4;
          store_acc(to, fma_reg(DotInt4::to_float(acc[r][v]), by, load_acc(to, FloatReg{})));
        }
      }
      const int64_t bytes = kInt4ScaleBytes + units * kUnit;
      record += bytes;
      scale += bytes;
      left -= units;
    }
  }
}

using TileInt4Fn = void (*)(const uint8_t*, int64_t, const int32_t*, int64_t, const uint8_t*, int64_t, int64_t, float*,
                            const uint8_t*);

template <int R = DotInt4::kMaxRows>
TileInt4Fn tile_int4_for(int rows, int lines) {
  if constexpr (R > 1) {
    if (rows != R) return tile_int4_for<R - 1>(rows, lines);
  }
  constexpr TileInt4Fn kTiles[] = {tile_int4<R, 0>, tile_int4<R, 1>, tile_int4<R, 2>};
  return kTiles[lines];
}

// Chunks that one pass takes: about the same bytes of weights as in the other precisions, and whole groups.
constexpr int64_t kInt4PassChunks = 48;

// multiply_panel for int4 weights.
inline void multiply_panel_int4(const GemmArgs& args, FinishFn finish, int64_t row_begin, int64_t row_end,
                                int64_t panel, const uint8_t* next) {
  alignas(64) float acc[kPassRows * kPanel];
  const int64_t count = (row_end - row_begin) * kPanel;
  for (int64_t i = 0; i < count; ++i) acc[i] = 0.0f;
  const RowTiles tiles(row_end - row_begin, DotInt4::kMaxRows);
  const uint8_t* weights = args.w.data + panel * args.w.panel_bytes;
  prefetch_vectors<Precision::kInt4>(args.w, panel);
  for (int64_t chunk = 0; chunk < args.w.chunks; chunk += kInt4PassChunks) {
    const bool last = chunk + kInt4PassChunks >= args.w.chunks;
    const int64_t chunks = last ? args.w.chunks - chunk : kInt4PassChunks;
    const int64_t bytes = panel_bytes(Precision::kInt4, chunks, args.w.group);
    const uint8_t* ahead = last ? next : weights + bytes;
    if (tiles.count == 1) ahead = weights + kAheadOfOneTile;
    int64_t lines_ahead = ahead == nullptr || kRegBytes > 64 ? 0 : bytes / 64;
    const int32_t* sums = args.a.sums + chunk * 64 / args.w.group * args.a.capacity();
    int64_t row = row_begin;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t);
      float* tile_acc = acc + (row - row_begin) * kPanel;
      // Lines that one a pair of groups makes; of twice that, as many as are left.
      const int64_t pairs = chunks * 8 * kHalves, groups = int4_groups(chunks, args.w.group) * kHalves;
      const int lines = lines_ahead <= 0 ? 0 : lines_ahead <= (pairs + groups) * (tiles.count - t) ? 1 : 2;
      tile_int4_for(static_cast<int>(rows), lines)(args.a.data + chunk * args.a.chunk_stride + row * kChunkBytes,
                                                   args.a.chunk_stride, sums + row, args.a.capacity(), weights, chunks,
                                                   args.w.group, tile_acc, ahead);
      const int64_t fetched = lines == 0 ? 0 : lines * pairs + groups;
      ahead += fetched * 64;
      lines_ahead -= fetched;
      if (last) finish(args, reinterpret_cast<const uint8_t*>(tile_acc), row, rows, panel);
      row += rows;
    }
    weights += bytes;
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
