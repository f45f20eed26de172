// How attention's two products see their operands: AttentionF32 and AttentionInt16, policies of attention.h. `Whole`: a
// head is whole panels wide, so that nothing needs a mask.
//
//   Dot           multiply-accumulate of both products (gemm_dot.h)       kChunk   elements of a 64-byte chunk
//   pack_keys     a block of keys -> weight panels, one after another     pack_values   likewise, of the values
//   take_query    one query -> a row of the first product's operand; returns what its scores are to be multiplied by
//   score         16 sums of the first product -> scores, but for that factor (and written back if they differ)
//   take_probs    32 scores, less their maximum, times the factor -> a row of the second product's operand; returns
//                 what they add to the row's Sum
//   power         what take_probs would make of a score, as fp32
//   weighted      16 sums of the second product -> sum of p v, in units of the row's sum
//
// Integers (for all encoders but fp32 ones): queries and keys are rounded per row to 12 bits and a sign, probabilities
// to 13 bits, values per column of a key block to 10 bits and a sign, so that sums of kInt16MaxHeadDim and of kKeyBlock
// products are exact in 32 bits, and so the same on every target. The products take half of fp32's time where there is
// vpdpwssd, and are far finer than the 8 bits that the input was computed in and the output is rounded to.
// Probabilities of 8 bits would not do: a key with less than 1/510 of the largest would vanish, and beside an attention
// sink most do. Scores beyond fp32 give NaN.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

constexpr int64_t kProbChunkStride = kMaxTileRows * kChunkBytes;
// Rows of the QKV buffer lie too far apart for hardware prefetchers, and long sequences' do not fit in L2.
constexpr int64_t kRowsAhead = 8;

struct AttentionScratch {
  float *keys, *values, *query, *scores, *probs, *tile, *key_scale, *value_scale, *query_scale, *row_max, *row_sum;
  AttentionScratch(const AttentionArgs& args, int64_t d32) {
    keys = args.scratch;
    values = keys + kKeyBlock * d32;
    query = values + kKeyBlock * d32;
    scores = query + (args.q_count + kMaxTileRows) * d32;
    probs = scores + kMaxTileRows * kKeyBlock;
    tile = probs + kMaxTileRows * kKeyBlock;
    key_scale = tile + kMaxTileRows * kPanel;
    value_scale = key_scale + kKeyBlock;
    query_scale = value_scale + d32;
    row_max = query_scale + args.q_count + 16;
    row_sum = row_max + args.q_count + 16;
  }
};

inline void prefetch_row(const float* row, int64_t head_dim) {
  for (int64_t d = 0; d < head_dim; d += 16) __builtin_prefetch(row + d, 0, 3);
}

template <bool Whole>
struct AttentionF32 {
  using Dot = DotF32Exact;
  static constexpr bool kWhole = Whole;
  static constexpr int64_t kChunk = 16;

  // k [n keys, ld] -> [key panel][element][32 keys]; absent keys and columns are zero.
  static void pack_keys(const AttentionScratch& s, const float* k, int64_t ld, int64_t n, int64_t head_dim) {
    const int64_t d16 = ceil_div(head_dim, 16) * 16;
    float* dst = s.keys;
    for (int64_t panel = 0; panel < ceil_div(n, kPanel); ++panel, dst += d16 * kPanel)
      for (int64_t j = 0; j < kPanel; j += 16) {
        const int64_t key = panel * kPanel + j, count = n - key < 16 ? n - key : 16;
        for (int64_t i = 16; i < 32 && key + i < n; ++i) prefetch_row(k + (key + i) * ld, head_dim);
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
  // v [n keys, ld] -> [head_dim panel][kKeyBlock][32]; keys up to a multiple of 16 and absent columns are zero.
  static void pack_values(const AttentionScratch& s, const float* v, int64_t ld, int64_t n, int64_t head_dim) {
    const int64_t n16 = ceil_div(n, 16) * 16;
    float* dst = s.values;
    for (int64_t d = 0; d < head_dim; d += kPanel, dst += kKeyBlock * kPanel)
      for (int64_t key = 0; key < n16; ++key) {
        if (d == 0 && key + kRowsAhead < n) prefetch_row(v + (key + kRowsAhead) * ld, head_dim);
        for (int64_t j = 0; j < kPanel; j += 16)
          store(dst + key * kPanel + j, key < n ? load_part<Whole>(v + key * ld + d + j, head_dim - d - j) : set1(0));
      }
  }
  static float take_query(const float* q, int64_t head_dim, uint8_t* dst, int64_t chunk_stride) {
    operand_row_f32(q, head_dim, {dst, chunk_stride, nullptr}, 0);
    return 1.0f;
  }
  static V16 score(float* sums, const float*) { return load(sums); }
  using Sum = V16;
  static Sum zero() { return set1(0.0f); }
  static float total(Sum sum) { return reduce_add(sum); }
  static V16 power(V16 x) { return exp_nonpositive(x); }
  // a, b: scores of keys [key, key + count) less their maximum; 32 of them if Full.
  template <bool Full>
  static Sum take_probs(uint8_t* probs, int64_t count, V16 a, V16 b) {
    a = exp_nonpositive(a), b = Full || count > 16 ? exp_nonpositive(b) : set1(0.0f);
    if constexpr (!Full) a = keep_first(a, count), b = keep_first(b, count - 16);
    store(reinterpret_cast<float*>(probs), a);
    store(reinterpret_cast<float*>(probs + kProbChunkStride), b);
    return add(a, b);
  }
  static V16 weighted(const AttentionScratch&, const float* sums, int64_t) { return load(sums); }
};

template <bool Whole>
struct AttentionInt16 {
  using Dot = DotInt16;
  static constexpr bool kWhole = Whole;
  static constexpr int64_t kChunk = 32;
  static constexpr float kRowLimit = 4095, kValueLimit = 1023;
  // Taken off the keys' scales and put on the queries': sums times a key's scale alone must not overflow.
  static constexpr float kKeyUnits = 4096;
  static_assert(kInt16MaxHeadDim * double{kRowLimit} * kRowLimit <= INT32_MAX, "scores must not overflow");
  static_assert(kKeyBlock * double{kValueLimit} * kRoundedExpOfZero <= INT32_MAX, "nor outputs");

  // x [head_dim] -> 64-byte chunks `stride` bytes apart, the last one filled up with zeros; returns the scale.
  static float round_row(const float* x, int64_t head_dim, uint8_t* dst, int64_t stride) {
    V16 largest = set1(0.0f);  // not row_absmax, which cannot know that heads are whole
    for (int64_t d = 0; d < head_dim; d += 16) largest = max_magnitude(load_part<Whole>(x + d, head_dim - d), largest);
    const float absmax = reduce_max_magnitude(largest), size = absmax < 1e-30f ? 1e-30f : absmax;  // NaN stays
    const V16 inverse = set1(kRowLimit / size);
    for (int64_t d = 0; d < head_dim; d += kChunk, dst += stride)
      store_i16(dst, round_within(mul(load_part<Whole>(x + d, head_dim - d), inverse), kRowLimit),
                round_within(mul(load_part<Whole>(x + d + 16, head_dim - d - 16), inverse), kRowLimit));
    return size * (1.0f / kRowLimit);
  }

  // k [n keys, ld] -> [key panel][pair of elements][32 keys], and key_scale; absent keys and columns are zero.
  static void pack_keys(const AttentionScratch& s, const float* k, int64_t ld, int64_t n, int64_t head_dim) {
    const int64_t chunks = ceil_div(head_dim, kChunk);
    alignas(64) float block[16 * kInt16MaxHeadDim / 2];  // 16 rounded keys, a pair of elements in the place of a float
    for (int64_t key = 0; key < ceil_div(n, kPanel) * kPanel; key += 16) {
      for (int64_t i = 0; i < 16; ++i) {
        uint8_t* dst = reinterpret_cast<uint8_t*>(block + i * chunks * 16);
        if (key + i >= n) {
          s.key_scale[key + i] = 0.0f;
          for (int64_t c = 0; c < chunks; ++c) store(reinterpret_cast<float*>(dst) + c * 16, set1(0.0f));
          continue;
        }
        if (key + i + kRowsAhead < n) prefetch_row(k + (key + i + kRowsAhead) * ld, head_dim);
        s.key_scale[key + i] = round_row(k + (key + i) * ld, head_dim, dst, kChunkBytes) * (1.0f / kKeyUnits);
      }
      float* dst = s.keys + key / kPanel * chunks * kGroups * kPanel + key % kPanel;
      for (int64_t c = 0; c < chunks; ++c) transpose16(block + c * 16, chunks * 16, dst + c * kGroups * kPanel, kPanel);
    }
  }
  // v [n keys, ld] -> [head_dim panel][pair of keys][32], and value_scale. A last odd key's partner is zero; beyond it
  // lies whatever lay there: its probabilities are zero, and these are integers.
  static void pack_values(const AttentionScratch& s, const float* v, int64_t ld, int64_t n, int64_t head_dim) {
    float* dst = s.values;
    // A key that is NaN makes every output NaN: its scores are, which rounded probabilities cannot be.
    V16 scales = set1(0.0f);
    for (int64_t key = 0; key < n; key += 16) scales = max_magnitude(load(s.key_scale + key), scales);
    const float key_scale = reduce_max_magnitude(scales), least = key_scale == key_scale ? 1e-30f : key_scale;
    for (int64_t d = 0; d < head_dim; d += kPanel, dst += kKeyBlock / 2 * kPanel) {
      const int64_t valid = head_dim - d;
      V16 largest[2] = {set1(least), set1(least)}, inverse[2];
      for (int64_t key = 0; key < n; ++key) {
        if (d == 0 && key + kRowsAhead < n) prefetch_row(v + (key + kRowsAhead) * ld, head_dim);
        for (int i = 0; i < 2; ++i)
          largest[i] = max_magnitude(load_part<Whole>(v + key * ld + d + 16 * i, valid - 16 * i), largest[i]);
      }
      for (int i = 0; i < 2; ++i) {
        inverse[i] = div(set1(kValueLimit), largest[i]);
        store(s.value_scale + d + 16 * i, mul(largest[i], set1(1.0f / kValueLimit)));
      }
      for (int64_t key = 0; key < n; key += 2)
        for (int i = 0; i < 2; ++i) {
          const float* pair = v + key * ld + d + 16 * i;
          const V16 second = key + 1 < n ? load_part<Whole>(pair + ld, valid - 16 * i) : set1(0.0f);
          store_pairs(dst + (key / kChunk * kGroups + pair_slot(key % kChunk / 2)) * kPanel + 16 * i,
                      round_within(mul(load_part<Whole>(pair, valid - 16 * i), inverse[i]), kValueLimit),
                      round_within(mul(second, inverse[i]), kValueLimit));
        }
    }
  }
  static float take_query(const float* q, int64_t head_dim, uint8_t* dst, int64_t chunk_stride) {
    return round_row(q, head_dim, dst, chunk_stride) * (kKeyUnits * 1.4426950408889634f);  // exponents of 2, not e
  }
  static V16 score(float* sums, const float* key_scale) {
    const V16 x = mul(to_float(load_i32(reinterpret_cast<const int32_t*>(sums))), load(key_scale));
    store(sums, x);
    return x;
  }
  using Sum = I16;
  static Sum zero() { return round_to_int(set1(0.0f)); }
  static float total(Sum sum) { return reduce_add(to_float(sum)); }
  static V16 power(V16 x) { return exp_nonpositive(mul(x, set1(0.6931471805599453f))); }
  template <bool Full>
  static Sum take_probs(uint8_t* probs, int64_t count, V16 a, V16 b) {
    a = exp2_rounded(a), b = Full || count > 16 ? exp2_rounded(b) : set1(0.0f);
    if constexpr (!Full) a = keep_first(a, count), b = keep_first(b, count - 16);
    const I16 p = round_to_int(a), q = round_to_int(b);
    store_i16(probs, p, q);
    return add(p, q);  // of the rounded ones, so that the weights still add up to 1
  }
  static V16 weighted(const AttentionScratch& s, const float* sums, int64_t column) {
    return mul(to_float(load_i32(reinterpret_cast<const int32_t*>(sums))), load(s.value_scale + column));
  }
};

}  // namespace XFAST_TARGET
}  // namespace xfast
