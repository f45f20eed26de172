// Attention of one sequence, heads one after another: softmax(scale q k^T) v over real tokens only, in fp32 or, for
// int8, int4 and bf16, with both products in 16-bit integers (attention_operands.h).
//
// Both products reuse the GEMM tile: keys are transposed into weight panels, values are copied into panels. Keys come
// in blocks of kKeyBlock with an online softmax (Milakov & Gimelshein 2018), so memory does not grow with length^2 and
// a query's bits depend only on its sequence.
#pragma once

#include <cfloat>

namespace xfast {
namespace XFAST_TARGET {

// Where the scores of a row with 16 keys lie: [key panel][kMaxTileRows][32], as the tile leaves them.
inline float* scores_of(const AttentionScratch& s, int64_t row, int64_t key) {
  return s.scores + (key / kPanel * kMaxTileRows + row) * kPanel + key % kPanel;
}

// Sums of `rows` queries with n packed keys -> scratch.scores.
template <class Kind>
void score_tile(const AttentionScratch& s, int64_t rows, int64_t n, int64_t chunks) {
  const TileFn multiply = tile_for<typename Kind::Dot, false>(static_cast<int>(rows));
  for (int64_t key = 0; key < n; key += kPanel)
    multiply(reinterpret_cast<const uint8_t*>(s.query), kQueryChunkStride,
             reinterpret_cast<const uint8_t*>(s.keys) + key / kPanel * chunks * kPanelChunkBytes, chunks, nullptr, 0,
             scores_of(s, 0, key), nullptr);
}

// x, but -FLT_MAX in lanes without a key.
inline V16 lowest_beyond(V16 x, int64_t count) {
  const V16 lowest = set1(-FLT_MAX);
  return add(keep_first(x, count), sub(lowest, keep_first(lowest, count)));
}

// Scores of one row -> scaled, in place; returns the largest, or `floor`.
template <class Kind>
float scale_row(const AttentionScratch& s, int64_t row, int64_t n, float floor) {
  const V16 query_scale = set1(s.query_scale[row]);
  V16 largest[2] = {set1(floor), set1(floor)};
  const auto scale = [&](int64_t at) {
    float* scores = scores_of(s, row, at);
    const V16 x = Kind::score(s, scores, query_scale, at);
    store(scores, x);
    return x;
  };
  int64_t key = 0;
  for (; key + kPanel <= n; key += kPanel)
    for (int i = 0; i < 2; ++i) largest[i] = max(scale(key + 16 * i), largest[i]);
  for (int i = 0; key < n; key += 16, ++i) largest[i] = max(lowest_beyond(scale(key), n - key), largest[i]);
  return reduce_max(max(largest[0], largest[1]));
}

// Scaled scores of one row -> probabilities (relative to the largest score so far) in operand layout; returns their
// sum.
template <class Kind>
float exp_row(const AttentionScratch& s, int64_t row, int64_t n, float largest) {
  const V16 shift = set1(largest);
  V16 sum = set1(0.0f);
  int64_t key = 0;
  for (; key + kPanel <= n; key += kPanel) {
    const float* scores = scores_of(s, row, key);
    sum = add(sum, Kind::template take_probs<true>(s, row, key, kPanel, sub(load(scores), shift),
                                                   sub(load(scores + 16), shift)));
  }
  if (key < n) {
    const float* scores = scores_of(s, row, key);
    sum = add(sum, Kind::template take_probs<false>(s, row, key, n - key, sub(load(scores), shift),
                                                    sub(load(scores + 16), shift)));
  }
  return reduce_add(sum);
}

// One online-softmax step: scores -> probabilities, and shrink[row] = exp(old - new maximum), the factor of what
// earlier blocks contributed. All maxima first: one row's reduction hides behind the next row's work.
template <class Kind>
void softmax_tile(const AttentionScratch& s, int64_t rows, int64_t n, float* row_max, float* row_sum, float* shrink) {
  const V16 before = load_n(row_max, rows);
  for (int64_t r = 0; r < rows; ++r) row_max[r] = scale_row<Kind>(s, r, n, row_max[r]);
  store(shrink, exp_nonpositive(sub(before, load_n(row_max, rows))));
  for (int64_t r = 0; r < rows; ++r)
    row_sum[r] = __builtin_fmaf(row_sum[r], shrink[r], exp_row<Kind>(s, r, n, row_max[r]));
}

// out[rows, head_dim] = out * shrink + probs . values; on the last key block, divided by the sum.
template <class Kind>
void accumulate_tile(const AttentionArgs& args, const AttentionScratch& s, float* out, int64_t rows, int64_t n,
                     const float* shrink, const float* row_sum, bool first, bool last) {
  const TileFn multiply = tile_for<typename Kind::Dot, false>(static_cast<int>(rows));
  const uint8_t* values = reinterpret_cast<const uint8_t*>(s.values);
  alignas(64) float inverse[16];
  store(inverse, last ? div(set1(1.0f), load_n(row_sum, rows)) : set1(1.0f));
  for (int64_t d = 0; d < args.head_dim; d += kPanel, values += kKeyBlock / Kind::kChunk * kPanelChunkBytes) {
    multiply(reinterpret_cast<const uint8_t*>(s.probs), kQueryChunkStride, values, ceil_div(n, Kind::kChunk), nullptr,
             0, s.tile, nullptr);
    for (int64_t j = 0; j < kPanel && d + j < args.head_dim; j += 16) {
      const int64_t left = args.head_dim - d - j;
      for (int64_t r = 0; r < rows; ++r) {
        float* dst = out + r * args.ldo + d + j;
        V16 y = Kind::weighted(s, s.tile + r * kPanel + j, d + j);
        if (!first) y = fma(load_part<Kind::kWhole>(dst, left), set1(shrink[r]), y);
        store_part<Kind::kWhole>(dst, mul(y, set1(inverse[r])), left);
      }
    }
  }
}

template <class Kind>
void attend_head(const AttentionArgs& args, const AttentionScratch& s, int head) {
  const int64_t column = static_cast<int64_t>(head) * args.head_dim;
  for (int64_t q = 0; q < args.q_count; ++q) s.row_max[q] = -FLT_MAX, s.row_sum[q] = 0.0f;
  for (int64_t key = 0; key < args.kv_len; key += kKeyBlock) {
    const int64_t n = args.kv_len - key < kKeyBlock ? args.kv_len - key : kKeyBlock;
    const bool first = key == 0, last = key + n == args.kv_len;
    Kind::pack_keys(s, args.k + key * args.ldkv + column, args.ldkv, n, args.head_dim);
    Kind::pack_values(s, args.v + key * args.ldkv + column, args.ldkv, n, args.head_dim);
    const RowTiles tiles(args.q_count, Kind::Dot::kMaxRows);
    int64_t q = 0;
    for (int64_t t = 0; t < tiles.count; ++t) {
      const int64_t rows = tiles.size(t);
      for (int64_t r = 0; r < rows; ++r)
        Kind::take_query(s, r, args.q + (q + r) * args.ldq + column, args.head_dim, args.scale);
      score_tile<Kind>(s, rows, n, ceil_div(args.head_dim, Kind::kChunk));
      alignas(64) float shrink[16];
      softmax_tile<Kind>(s, rows, n, s.row_max + q, s.row_sum + q, shrink);
      accumulate_tile<Kind>(args, s, args.out + q * args.ldo + column, rows, n, shrink, s.row_sum + q, first, last);
      q += rows;
    }
  }
}

template <class Kind>
void attend_heads(const AttentionArgs& args) {
  const AttentionScratch scratch(args, ceil_div(args.head_dim, kPanel) * kPanel);
  for (int head = args.head_begin; head < args.head_end; ++head) attend_head<Kind>(args, scratch, head);
}

inline void attention(const AttentionArgs& args) {
  if (args.kv_len == 0) return;
  const bool int16 = args.int16 && args.head_dim <= kInt16MaxHeadDim;
  if (args.head_dim % kPanel == 0)
    return int16 ? attend_heads<AttentionInt16<true>>(args) : attend_heads<AttentionF32<true>>(args);
  return int16 ? attend_heads<AttentionInt16<false>>(args) : attend_heads<AttentionF32<false>>(args);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
