// Attention of one sequence, heads one after another: softmax(scale q k^T) v, in fp32, over real tokens only.
//
// Both products reuse the GEMM tile: keys are transposed into a weight panel ([key panel][head_dim][32 keys]), values
// are copied into panels ([head_dim panel][key][32 columns]). Keys come in blocks of kKeyBlock with an online softmax
// (Milakov & Gimelshein 2018), so memory does not grow with length^2 and a query's bits depend only on its sequence.
#pragma once

#include <cfloat>

namespace xfast {
namespace XFAST_TARGET {

constexpr int64_t kQueryChunkStride = kMaxTileRows * kChunkBytes;

struct AttentionScratch {
  float *keys, *values, *query, *scores, *probs, *tile, *row_max, *row_sum;
  AttentionScratch(const AttentionArgs& args, int64_t d16, int64_t d32) {
    keys = args.scratch;
    values = keys + kKeyBlock * d16;
    query = values + kKeyBlock * d32;
    scores = query + kMaxTileRows * d16;
    probs = scores + kMaxTileRows * kKeyBlock;
    tile = probs + kMaxTileRows * kKeyBlock;
    row_max = tile + kMaxTileRows * kPanel;
    row_sum = row_max + args.q_count;
  }
};

// k [n keys, ld] -> dst [key panel][d16][32 keys]; absent keys and columns are zero.
inline void pack_keys(const float* k, int64_t ld, int64_t n, int64_t head_dim, int64_t d16, float* dst) {
  for (int64_t panel = 0; panel < ceil_div(n, kPanel); ++panel, dst += d16 * kPanel)
    for (int64_t j = 0; j < kPanel; j += 16) {
      const int64_t key = panel * kPanel + j, count = n - key < 16 ? n - key : 16;
      for (int64_t d = 0; d < d16; d += 16) {
        const float* src = k + key * ld + d;
        alignas(64) float block[16 * 16];
        if (count == 16 && d + 16 <= head_dim) {
          transpose16(src, ld, dst + d * kPanel + j, kPanel);
          continue;
        }
        for (int64_t i = 0; i < 16; ++i)
          store(block + 16 * i, i < count ? load_n(src + i * ld, head_dim - d) : set1(0));
        transpose16(block, 16, dst + d * kPanel + j, kPanel);
      }
    }
}

// v [n keys, ld] -> dst [head_dim panel][kKeyBlock][32]; keys up to a multiple of 16 and absent columns are zero.
inline void pack_values(const float* v, int64_t ld, int64_t n, int64_t head_dim, float* dst) {
  const int64_t n16 = ceil_div(n, 16) * 16;
  for (int64_t d = 0; d < head_dim; d += kPanel, dst += kKeyBlock * kPanel)
    for (int64_t key = 0; key < n16; ++key)
      for (int64_t j = 0; j < kPanel; j += 16)
        store(dst + key * kPanel + j, key < n ? load_n(v + key * ld + d + j, head_dim - d - j) : set1(0));
}

// Scores of `rows` queries with n packed keys -> scratch.scores [rows][kKeyBlock], scaled.
inline void score_tile(const AttentionArgs& args, const AttentionScratch& s, int64_t rows, int64_t n, int64_t d16) {
  const V16 scale = set1(args.scale);
  const TileFn multiply = tile_for<DotF32Exact>(static_cast<int>(rows), 0);
  for (int64_t panel = 0; panel < ceil_div(n, kPanel); ++panel) {
    multiply(reinterpret_cast<const uint8_t*>(s.query), kQueryChunkStride,
             reinterpret_cast<const uint8_t*>(s.keys + panel * d16 * kPanel), d16 / 16, nullptr, 0, s.tile, nullptr);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < kPanel; j += 16)
        store(s.scores + r * kKeyBlock + panel * kPanel + j, mul(load(s.tile + r * kPanel + j), scale));
  }
}

// One online-softmax step for row r: scores -> probabilities in operand layout; returns the factor exp(old - new
// maximum) by which earlier contributions shrink.
inline float softmax_row(const AttentionScratch& s, int64_t r, int64_t n, float* row_max, float* row_sum) {
  const float* scores = s.scores + r * kKeyBlock;
  const V16 floor = set1(*row_max), lowest = set1(-FLT_MAX);
  V16 largest = floor;
  for (int64_t j = 0; j < n; j += 16) {
    const V16 x = load(scores + j);
    const int64_t left = n - j;
    // lanes without a key become -FLT_MAX
    largest = max(left >= 16 ? x : add(keep_first(x, left), sub(lowest, keep_first(lowest, left))), largest);
  }
  const float new_max = reduce_max(largest);
  const V16 shift = set1(new_max);
  V16 sum = set1(0.0f);
  for (int64_t j = 0; j < n; j += 16) {
    V16 p = exp_nonpositive(sub(load(scores + j), shift));
    if (n - j < 16) p = keep_first(p, n - j);
    store(s.probs + (j / 16) * kMaxTileRows * 16 + r * 16, p);
    sum = add(sum, p);
  }
  float shrink[16];
  store(shrink, exp_nonpositive(sub(floor, shift)));
  *row_sum = __builtin_fmaf(*row_sum, shrink[0], reduce_add(sum));
  *row_max = new_max;
  return shrink[0];
}

// out[rows, head_dim] = out * shrink + probs . values; on the last key block, divided by the sum.
inline void accumulate_tile(const AttentionArgs& args, const AttentionScratch& s, float* out, int64_t rows, int64_t n,
                            const float* shrink, const float* row_sum, bool first, bool last) {
  const TileFn multiply = tile_for<DotF32Exact>(static_cast<int>(rows), 0);
  for (int64_t d = 0; d < args.head_dim; d += kPanel) {
    multiply(reinterpret_cast<const uint8_t*>(s.probs), kQueryChunkStride,
             reinterpret_cast<const uint8_t*>(s.values + d * kKeyBlock), ceil_div(n, 16), nullptr, 0, s.tile, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      const V16 inverse = set1(1.0f / row_sum[r]);
      for (int64_t j = 0; j < kPanel && d + j < args.head_dim; j += 16) {
        const int64_t left = args.head_dim - d - j;
        float* dst = out + r * args.ldo + d + j;
        V16 y = load(s.tile + r * kPanel + j);
        if (!first) y = fma(load_n(dst, left), set1(shrink[r]), y);
        store_n(dst, last ? mul(y, inverse) : y, left);
      }
    }
  }
}

inline void attend_head(const AttentionArgs& args, const AttentionScratch& s, int head, int64_t d16) {
  const int64_t column = static_cast<int64_t>(head) * args.head_dim;
  const Operand query_operand{reinterpret_cast<uint8_t*>(s.query), kQueryChunkStride, nullptr};
  for (int64_t q = 0; q < args.q_count; ++q) s.row_max[q] = -FLT_MAX, s.row_sum[q] = 0.0f;
  for (int64_t key = 0; key < args.kv_len; key += kKeyBlock) {
    const int64_t n = args.kv_len - key < kKeyBlock ? args.kv_len - key : kKeyBlock;
    const bool first = key == 0, last = key + n == args.kv_len;
    pack_keys(args.k + key * args.ldkv + column, args.ldkv, n, args.head_dim, d16, s.keys);
    pack_values(args.v + key * args.ldkv + column, args.ldkv, n, args.head_dim, s.values);
    const RowTiles tiles(args.q_count, DotF32Exact::kMaxRows);
    int64_t q = 0;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t);
      for (int64_t r = 0; r < rows; ++r)
        operand_row_f32(args.q + (q + r) * args.ldq + column, args.head_dim, query_operand, r);
      score_tile(args, s, rows, n, d16);
      float shrink[kMaxTileRows];
      for (int64_t r = 0; r < rows; ++r) shrink[r] = softmax_row(s, r, n, s.row_max + q + r, s.row_sum + q + r);
      accumulate_tile(args, s, args.out + q * args.ldo + column, rows, n, shrink, s.row_sum + q, first, last);
      q += rows;
    }
  }
}

inline void attention(const AttentionArgs& args) {
  if (args.kv_len == 0) return;
  const int64_t d16 = ceil_div(args.head_dim, 16) * 16, d32 = ceil_div(args.head_dim, kPanel) * kPanel;
  const AttentionScratch scratch(args, d16, d32);
  for (int head = args.head_begin; head < args.head_end; ++head) attend_head(args, scratch, head, d16);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
