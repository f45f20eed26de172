// Attention of one sequence, heads one after another: softmax(scale q k^T) v over real tokens only, in fp32 or, for
// int8, int4 and bf16, with both products in 16-bit integers (attention_operands.h).
//
// Both products reuse the GEMM tile: keys are transposed into weight panels, values are copied into panels. Keys come
// in blocks of kKeyBlock with an online softmax (Milakov & Gimelshein 2018), so memory does not grow with length^2 and
// a query's bits depend only on its sequence.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// Where the scores of a row with 16 keys lie: [key panel][kMaxTileRows][32], as the tile leaves them.
inline float* scores_of(const AttentionScratch& s, int64_t row, int64_t key) {
  return s.scores + (key / kPanel * kMaxTileRows + row) * kPanel + key % kPanel;
}

// Sums of `rows` queries with n packed keys -> scratch.scores.
template <class Kind>
void score_tile(const AttentionScratch& s, const uint8_t* query, int64_t rows, int64_t n, int64_t chunks) {
  const TileFn multiply = tile_for<typename Kind::Dot, false>(static_cast<int>(rows));
  for (int64_t key = 0; key < n; key += kPanel)
    multiply(query, Kind::Dot::kMaxRows * kChunkBytes,
             reinterpret_cast<const uint8_t*>(s.keys) + key / kPanel * chunks * kPanelChunkBytes, chunks, nullptr, 0,
             scores_of(s, 0, key), nullptr);
}

// x, but -FLT_MAX in lanes without a key.
inline V16 lowest_beyond(V16 x, int64_t count) {
  const V16 lowest = set1(-FLT_MAX);
  return add(keep_first(x, count), sub(lowest, keep_first(lowest, count)));
}

// NOTE: the loops below walk with pointers of their own. A vector store may alias anything, so whatever they read from
// `s` would be loaded again after each, and addresses computed anew: a third of their time.

// Sums of one row -> scores, in place; returns the largest.
template <class Kind>
float score_row(const AttentionScratch& s, int64_t row, int64_t n) {
  V16 largest[2] = {set1(-FLT_MAX), set1(-FLT_MAX)};
  float* scores = scores_of(s, row, 0);
  const float* key_scale = s.key_scale;
  int64_t left = n;
  for (; left >= kPanel; left -= kPanel, scores += kMaxTileRows * kPanel, key_scale += kPanel)
    for (int i = 0; i < 2; ++i) largest[i] = max(Kind::score(scores + 16 * i, key_scale + 16 * i), largest[i]);
  for (int i = 0; left > 0; left -= 16, ++i)
    largest[i] = max(lowest_beyond(Kind::score(scores + 16 * i, key_scale + 16 * i), left), largest[i]);
  return reduce_max(max(largest[0], largest[1]));
}

// Scores of one row -> probabilities (relative to the largest) in operand layout; returns their sum.
// The query's scale comes after the subtraction, so that the largest score gives exactly 1 however large it is.
template <class Kind>
float exp_row(const AttentionScratch& s, int64_t row, int64_t n, float query_scale, float largest) {
  const V16 shift = set1(largest), scale = set1(query_scale);
  V16 sum = set1(0.0f);
  const float* scores = scores_of(s, row, 0);
  uint8_t* probs = reinterpret_cast<uint8_t*>(s.probs) + row * kChunkBytes;
  const auto exponent = [&](int i) { return mul(sub(load(scores + i), shift), scale); };
  constexpr int64_t kProbBytes = kPanel / Kind::kChunk * kProbChunkStride;
  int64_t left = n;
  for (; left >= kPanel; left -= kPanel, scores += kMaxTileRows * kPanel, probs += kProbBytes)
    sum = add(sum, Kind::template take_probs<true>(probs, kPanel, exponent(0), exponent(16)));
  if (left > 0) sum = add(sum, Kind::template take_probs<false>(probs, left, exponent(0), exponent(16)));
  return Kind::total(sum);
}

// One online-softmax step of up to 16 rows: the block's sums, and the factors of what earlier blocks and this one add,
// exp(their maximum - the maximum of all).
struct SoftmaxStep {
  alignas(64) float earlier[16], block[16], sum[16];
};

// Scores -> probabilities. All maxima first: one row's reduction hides behind the next row's work.
template <class Kind>
void softmax_tile(const AttentionScratch& s, int64_t q, int64_t rows, int64_t n, SoftmaxStep* step) {
  float *row_max = s.row_max + q, *row_sum = s.row_sum + q;
  const float* scale = s.query_scale + q;
  alignas(64) float largest[16];
  for (int64_t r = 0; r < rows; ++r) largest[r] = score_row<Kind>(s, r, n);
  for (int64_t r = 0; r < rows; ++r) step->sum[r] = exp_row<Kind>(s, r, n, scale[r], largest[r]);
  const V16 before = load_n(row_max, rows), here = load_n(largest, rows), now = max(before, here);
  store(step->earlier, Kind::power(mul(sub(before, now), load_n(scale, rows))));
  store(step->block, Kind::power(mul(sub(here, now), load_n(scale, rows))));
  for (int64_t r = 0; r < rows; ++r)
    row_sum[r] = __builtin_fmaf(row_sum[r], step->earlier[r], step->sum[r] * step->block[r]);
  store_n(row_max, now, rows);
}

// out[rows, head_dim] = out * earlier + block * (probs . values); on the last key block, divided by the sum.
template <class Kind>
void accumulate_tile(const AttentionArgs& args, const AttentionScratch& s, float* out, int64_t rows, int64_t n,
                     const SoftmaxStep& step, const float* row_sum, bool first, bool last) {
  const TileFn multiply = tile_for<typename Kind::Dot, false>(static_cast<int>(rows));
  const uint8_t* values = reinterpret_cast<const uint8_t*>(s.values);
  alignas(64) float inverse[16];
  store(inverse, last ? div(set1(1.0f), load_n(row_sum, rows)) : set1(1.0f));
  for (int64_t d = 0; d < args.head_dim; d += kPanel, values += kKeyBlock / Kind::kChunk * kPanelChunkBytes) {
    multiply(reinterpret_cast<const uint8_t*>(s.probs), kProbChunkStride, values, ceil_div(n, Kind::kChunk), nullptr, 0,
             s.tile, nullptr);
    for (int64_t j = 0; j < kPanel && d + j < args.head_dim; j += 16) {
      const int64_t left = args.head_dim - d - j;
      for (int64_t r = 0; r < rows; ++r) {
        float* dst = out + r * args.ldo + d + j;
        V16 y = Kind::weighted(s, s.tile + r * kPanel + j, d + j, set1(step.sum[r]));
        if (!first) y = fma(load_part<Kind::kWhole>(dst, left), set1(step.earlier[r]), mul(y, set1(step.block[r])));
        store_part<Kind::kWhole>(dst, mul(y, set1(inverse[r])), left);
      }
    }
  }
}

// All queries of a head -> operands of the first product, one tile after another.
template <class Kind>
void take_queries(const AttentionArgs& args, const AttentionScratch& s, const RowTiles& tiles, const float* q) {
  constexpr int64_t kStride = Kind::Dot::kMaxRows * kChunkBytes;
  const int64_t bytes = kStride * ceil_div(args.head_dim, Kind::kChunk);
  int64_t row = 0;
  for (int64_t t = 0; t < tiles.count; ++t)
    for (int64_t r = 0; r < tiles.size(t); ++r, ++row) {
      if (row + kRowsAhead < args.q_count) prefetch_row(q + (row + kRowsAhead) * args.ldq, args.head_dim);
      s.query_scale[row] =
          args.scale * Kind::take_query(q + row * args.ldq, args.head_dim,
                                        reinterpret_cast<uint8_t*>(s.query) + t * bytes + r * kChunkBytes, kStride);
      s.row_max[row] = -FLT_MAX, s.row_sum[row] = 0.0f;
    }
}

template <class Kind>
void attend_head(const AttentionArgs& args, const AttentionScratch& s, int head) {
  const int64_t column = static_cast<int64_t>(head) * args.head_dim, chunks = ceil_div(args.head_dim, Kind::kChunk);
  const RowTiles tiles(args.q_count, Kind::Dot::kMaxRows);
  take_queries<Kind>(args, s, tiles, args.q + column);
  for (int64_t key = 0; key < args.kv_len; key += kKeyBlock) {
    const int64_t n = args.kv_len - key < kKeyBlock ? args.kv_len - key : kKeyBlock;
    const bool first = key == 0, last = key + n == args.kv_len;
    Kind::pack_keys(s, args.k + key * args.ldkv + column, args.ldkv, n, args.head_dim);
    Kind::pack_values(s, args.v + key * args.ldkv + column, args.ldkv, n, args.head_dim);
    const uint8_t* query = reinterpret_cast<const uint8_t*>(s.query);
    int64_t q = 0;
    for (int64_t t = 0; t < tiles.count; ++t, query += Kind::Dot::kMaxRows * kChunkBytes * chunks) {
      const int64_t rows = tiles.size(t);
      score_tile<Kind>(s, query, rows, n, chunks);
      SoftmaxStep step;
      softmax_tile<Kind>(s, q, rows, n, &step);
      accumulate_tile<Kind>(args, s, args.out + q * args.ldo + column, rows, n, step, s.row_sum + q, first, last);
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
