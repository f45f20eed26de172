// How attention's two products see their operands: AttentionF32 and AttentionInt16, policies of attention.h. `Whole`: a
// head is whole panels wide, so that nothing needs a mask.
//
//   Dot           multiply-accumulate of both products (gemm_dot.h)       kChunk   elements of a 64-byte chunk
//   pack_keys     a block of keys -> weight panels, one after another     pack_values   likewise, of the values
//   take_query    one query -> a row of the first product's operand; returns what its scores are to be multiplied by
//   score         16 sums of the first product -> scores, but for that factor (and written back if they differ)
//   take_probs    32 scores, less their block's maximum, times the factor -> a row of the second product's operand;
//                 returns what they add to the block's sum
//   power         what take_probs would make of a score, as fp32
//   total         a block's sum out of its 16 parts
//   weighted      16 sums of the second product and the block's sum -> sum of p v, in units of the block's sum
//
// Integers (for all encoders but fp32 ones): queries and keys are rounded per row to 12 bits and a sign, probabilities
// to 13 bits, values per column of a key block to 10 bits and a sign, so that sums of kInt16MaxHeadDim and of kKeyBlock
// products are exact in 32 bits, and so the same on every target. The products take half of fp32's time where there is
// vpdpwssd, and are far finer than the 8 bits that the input was computed in and the output is rounded to.
//
// Beside an attention sink most probabilities are below the last of 13 bits (1/16382 of the largest) and are rounded to
// zero: thousands of keys that together weigh a tenth. So (1) a block's probabilities are relative to its own maximum,
// not to that of all keys so far: a sink only hides the keys of its block; and (2) values are taken less their mean
// over the block, whose weight is the sum of the probabilities as they were: sum p v = sum p (v - mean) + mean sum p.
// What was rounded away then counts as an average key of the block, where it counted as none. Scores beyond fp32 give
// NaN.
#pragma once

#include <cfloat>
#include <cmath>
#include <limits>

namespace xfast {
namespace XFAST_TARGET {

constexpr int64_t kProbChunkStride = kMaxTileRows * kChunkBytes;
// Rows of the QKV buffer lie too far apart for hardware prefetchers, and long sequences' do not fit in L2.
constexpr int64_t kRowsAhead = 8;

struct AttentionScratch {
  float *keys, *values, *query, *scores, *probs, *tile, *key_scale, *value_scale, *value_mean, *query_scale, *row_max,
      *row_sum;
  AttentionScratch(const AttentionArgs& args, int64_t d32) {
    keys = args.scratch;
    values = keys + kKeyBlock * d32;
    query = values + kKeyBlock * d32;
    scores = query + (args.q_count + kMaxTileRows) * d32;
    probs = scores + kMaxTileRows * kKeyBlock;
    tile = probs + kMaxTileRows * kKeyBlock;
    key_scale = tile + kMaxTileRows * kPanel;
    value_scale = key_scale + kKeyBlock;
    value_mean = value_scale + d32;
    query_scale = value_mean + d32;
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
  static float total(V16 sum) { return reduce_add(sum); }
  static V16 power(V16 x) { return exp_nonpositive(x); }
  // a, b: scores of keys [key, key + count) less their maximum; 32 of them if Full.
  template <bool Full>
  static V16 take_probs(uint8_t* probs, int64_t count, V16 a, V16 b) {
    a = exp_nonpositive(a), b = Full || count > 16 ? exp_nonpositive(b) : set1(0.0f);
    if constexpr (!Full) a = keep_first(a, count), b = keep_first(b, count - 16);
    store(reinterpret_cast<float*>(probs), a);
    store(reinterpret_cast<float*>(probs + kProbChunkStride), b);
    return add(a, b);
  }
  static V16 weighted(const AttentionScratch&, const float* sums, int64_t, V16) { return load(sums); }
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
  // v [n keys, ld] -> [head_dim panel][pair of keys][32], value_mean and value_scale. Beyond the last key lies whatever
  // lay there: its probabilities are zero, and these are integers.
  static void pack_values(const AttentionScratch& s, const float* v, int64_t ld, int64_t n, int64_t head_dim) {
    float* dst = s.values;
    // A key that is NaN makes every output NaN: its scores are, which rounded probabilities cannot be. So does one that
    // is infinite, whose rounding has lost the sign; and a value, by the mean.
    V16 scales = set1(0.0f);
    for (int64_t key = 0; key < n; key += 16) scales = max_magnitude(load(s.key_scale + key), scales);
    const float key_scale = reduce_max_magnitude(scales), least = key_scale <= FLT_MAX ? 1e-30f : NAN;
    const V16 part = set1(1.0f / static_cast<float>(n));
    for (int64_t d = 0; d < head_dim; d += kPanel, dst += kKeyBlock / 2 * kPanel) {
      const int64_t valid = head_dim - d;
      V16 mean[2] = {set1(0), set1(0)}, high[2] = {set1(-FLT_MAX), set1(-FLT_MAX)},
          low[2] = {set1(FLT_MAX), set1(FLT_MAX)};
      V16 inverse[2], shift[2];
      for (int64_t key = 0; key < n; ++key) {
        if (d == 0 && key + kRowsAhead < n) prefetch_row(v + (key + kRowsAhead) * ld, head_dim);
        for (int i = 0; i < 2; ++i) {
          const V16 x = load_part<Whole>(v + key * ld + d + 16 * i, valid - 16 * i);
          mean[i] = fma(x, part, mean[i]), high[i] = max(x, high[i]), low[i] = min(x, low[i]);
        }
      }
      for (int i = 0; i < 2; ++i) {
        const V16 size = max(max(sub(high[i], mean[i]), sub(mean[i], low[i])), set1(least));
        inverse[i] = div(set1(kValueLimit), size);
        shift[i] = mul(sub(set1(0), mean[i]), inverse[i]);  // rounded where `size` is nothing beside the mean
        store(s.value_mean + d + 16 * i, mean[i]);
        store(s.value_scale + d + 16 * i, mul(size, set1(1.0f / kValueLimit)));
      }
      for (int64_t key = 0; key < n; key += 2)
        for (int i = 0; i < 2; ++i) {
          const float* pair = v + key * ld + d + 16 * i;
          const V16 first = load_part<Whole>(pair, valid - 16 * i);
          const V16 second = key + 1 < n ? load_part<Whole>(pair + ld, valid - 16 * i) : first;
          store_pairs(dst + (key / kChunk * kGroups + pair_slot(key % kChunk / 2)) * kPanel + 16 * i,
                      round_within(fma(first, inverse[i], shift[i]), kValueLimit),
                      round_within(fma(second, inverse[i], shift[i]), kValueLimit));
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
  // The largest alone adds kRoundedExpOfZero; scores that are NaN add next to nothing (exp2_rounded).
  static float total(V16 sum) {
    const float found = reduce_add(sum);
    return found >= 1.0f ? found : std::numeric_limits<float>::quiet_NaN();
  }
  static V16 power(V16 x) { return exp_nonpositive(mul(x, set1(0.6931471805599453f))); }
  template <bool Full>
  static V16 take_probs(uint8_t* probs, int64_t count, V16 a, V16 b) {
    a = exp2_rounded(a), b = Full || count > 16 ? exp2_rounded(b) : set1(0.0f);
    if constexpr (!Full) a = keep_first(a, count), b = keep_first(b, count - 16);
    store_i16(probs, round_to_int(a), round_to_int(b));
    return add(a, b);
  }
  static V16 weighted(const AttentionScratch& s, const float* sums, int64_t column, V16 total) {
    const V16 deviation = to_float(load_i32(reinterpret_cast<const int32_t*>(sums)));
    return fma(load(s.value_mean + column), total, mul(deviation, load(s.value_scale + column)));
  }
};

}  // namespace XFAST_TARGET
}  // namespace xfast
