// V16 as two 8-lane AVX2 registers. Needs AVX2, FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace xfast {
namespace XFAST_TARGET {

struct V16 {
  __m256 lo, hi;
};
struct I16 {
  __m256i lo, hi;
};

inline V16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, V16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
// All-ones in lanes [0, n - offset)
inline __m256i lane_mask(int64_t n, int offset) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n) - offset), lane);
}
inline V16 load_n(const float* p, int64_t n) {
  return {_mm256_maskload_ps(p, lane_mask(n, 0)), _mm256_maskload_ps(p + 8, lane_mask(n, 8))};
}
inline void store_n(float* p, V16 a, int64_t n) {
  _mm256_maskstore_ps(p, lane_mask(n, 0), a.lo);
  _mm256_maskstore_ps(p + 8, lane_mask(n, 8), a.hi);
}
inline V16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline V16 add(V16 a, V16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline V16 sub(V16 a, V16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline V16 mul(V16 a, V16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline V16 div(V16 a, V16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline V16 fma(V16 a, V16 b, V16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline V16 max(V16 a, V16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline V16 min(V16 a, V16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline V16 abs(V16 a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
inline __m256 max_bits(__m256 a, __m256 b) {
  return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline V16 max_magnitude(V16 a, V16 largest) {
  a = abs(a);
  return {max_bits(a.lo, largest.lo), max_bits(a.hi, largest.hi)};
}
inline V16 select_negative(V16 cond, V16 a, V16 b) {
  const __m256 zero = _mm256_setzero_ps();
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_cmp_ps(cond.lo, zero, _CMP_LT_OQ)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_cmp_ps(cond.hi, zero, _CMP_LT_OQ))};
}
inline V16 keep_first(V16 a, int64_t n) {
  return {_mm256_and_ps(a.lo, _mm256_castsi256_ps(lane_mask(n, 0))),
          _mm256_and_ps(a.hi, _mm256_castsi256_ps(lane_mask(n, 8)))};
}
inline float reduce_add(V16 a) {
  const __m256 s8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float reduce_max(V16 a) {
  const __m256 s8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float reduce_max_magnitude(V16 a) {
  const __m256i s8 = _mm256_castps_si256(max_bits(a.lo, a.hi));
  const __m128i s4 = _mm_max_epi32(_mm256_castsi256_si128(s8), _mm256_extracti128_si256(s8, 1));
  const __m128i s2 = _mm_max_epi32(s4, _mm_shuffle_epi32(s4, 0x4E));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(s2, _mm_shuffle_epi32(s2, 0xB1))));
}
inline I16 round_to_int(V16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline V16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline I16 load_i32(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline I16 add(I16 a, I16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline V16 floor(V16 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline V16 scale_by_power(V16 a, V16 n) {
  const __m256i bias = _mm256_set1_epi32(127);
  const I16 power = round_to_int(n);
  const __m256 flo = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power.lo, bias), 23));
  const __m256 fhi = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(power.hi, bias), 23));
  return {_mm256_mul_ps(a.lo, flo), _mm256_mul_ps(a.hi, fhi)};
}
// packs work within 128-bit halves; the permute puts the four groups of four back in order
inline __m256i to_words(I16 a) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xD8); }
inline __m128i to_bytes(I16 a) {
  const __m256i words = to_words(a);
  return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
inline void store_i8(uint8_t* p, I16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bytes(a)); }
inline void store_u8(uint8_t* p, I16 a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(to_bytes(a), _mm_set1_epi8(static_cast<char>(0x80))));
}
inline void store_i16(uint8_t* p, I16 a, I16 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_packs_epi32(a.lo, a.hi));  // within 128-bit halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), _mm256_packs_epi32(b.lo, b.hi));
}
constexpr int64_t pair_slot(int64_t pair) { return pair / 8 * 8 + pair % 4 / 2 * 4 + pair % 8 / 4 * 2 + pair % 2; }
inline void store_pairs(float* p, I16 a, I16 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_blend_epi16(a.lo, _mm256_slli_epi32(b.lo, 16), 0xAA));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), _mm256_blend_epi16(a.hi, _mm256_slli_epi32(b.hi, 16), 0xAA));
}
inline __m256i to_bf16_bits(__m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}
inline __m256i to_bf16_bits(V16 a) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(to_bf16_bits(a.lo), to_bf16_bits(a.hi)), 0xD8);
}
inline void store_bf16(uint16_t* p, V16 a, V16 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), to_bf16_bits(b));
}
inline V16 load_bf16(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(words)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(words, 1)), 16))};
}
inline V16 load_f16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

// 8 x 8 transpose: interleave pairs, then quads, then halves.
inline void transpose8(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  __m256 r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(src + i * ld);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * dst_ld, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
inline void transpose16(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  for (int r = 0; r < 16; r += 8)
    for (int c = 0; c < 16; c += 8) transpose8(src + r * ld + c, ld, dst + c * dst_ld + r, dst_ld);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
