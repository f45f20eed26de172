// V16 as one AVX-512 register. Needs AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace xfast {
namespace XFAST_TARGET {

using V16 = __m512;
using I16 = __m512i;

inline V16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V16 a) { _mm512_storeu_ps(p, a); }
inline __mmask16 lane_mask(int64_t n) {
  return n >= 16 ? __mmask16(0xFFFF) : n <= 0 ? __mmask16(0) : __mmask16((1u << n) - 1);
}
inline V16 load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
inline void store_n(float* p, V16 a, int64_t n) { _mm512_mask_storeu_ps(p, lane_mask(n), a); }
inline V16 set1(float x) { return _mm512_set1_ps(x); }
inline V16 add(V16 a, V16 b) { return _mm512_add_ps(a, b); }
inline V16 sub(V16 a, V16 b) { return _mm512_sub_ps(a, b); }
inline V16 mul(V16 a, V16 b) { return _mm512_mul_ps(a, b); }
inline V16 div(V16 a, V16 b) { return _mm512_div_ps(a, b); }
inline V16 fma(V16 a, V16 b, V16 c) { return _mm512_fmadd_ps(a, b, c); }
inline V16 max(V16 a, V16 b) { return _mm512_max_ps(a, b); }
inline V16 min(V16 a, V16 b) { return _mm512_min_ps(a, b); }
inline V16 abs(V16 a) { return _mm512_abs_ps(a); }
inline V16 max_magnitude(V16 a, V16 largest) {
  return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(abs(a)), _mm512_castps_si512(largest)));
}
inline V16 select_negative(V16 cond, V16 a, V16 b) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(cond, _mm512_setzero_ps(), _CMP_LT_OQ), b, a);
}
inline V16 keep_first(V16 a, int64_t n) { return _mm512_maskz_mov_ps(lane_mask(n), a); }
inline float reduce_add(V16 a) {
  const __m256 s8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 s4 = _mm_add_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_add_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_add_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float reduce_max(V16 a) {
  const __m256 s8 = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 s4 = _mm_max_ps(_mm256_castps256_ps128(s8), _mm256_extractf128_ps(s8, 1));
  const __m128 s2 = _mm_max_ps(s4, _mm_movehl_ps(s4, s4));
  return _mm_cvtss_f32(_mm_max_ss(s2, _mm_shuffle_ps(s2, s2, 1)));
}
inline float reduce_max_magnitude(V16 a) {
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(_mm512_reduce_max_epi32(_mm512_castps_si512(a)))));
}
inline I16 round_to_int(V16 a) { return _mm512_cvtps_epi32(a); }
inline V16 to_float(I16 a) { return _mm512_cvtepi32_ps(a); }
inline I16 load_i32(const int32_t* p) { return _mm512_loadu_si512(p); }
inline I16 add(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
inline V16 floor(V16 a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
inline V16 scale_by_power(V16 a, V16 n) { return _mm512_scalef_ps(a, n); }
inline void store_i8(uint8_t* p, I16 a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a)); }
inline void store_u8(uint8_t* p, I16 a) {
  const __m128i bytes = _mm512_cvtepi32_epi8(a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(static_cast<char>(0x80))));
}
inline void store_i16(uint8_t* p, I16 a, I16 b) {
  _mm512_storeu_si512(p, _mm512_packs_epi32(a, b));  // works within 128-bit quarters: four of a, four of b, and so on
}
constexpr int64_t pair_slot(int64_t pair) { return pair % 8 / 2 * 4 + pair / 8 * 2 + pair % 2; }
inline void store_pairs(float* p, I16 a, I16 b) {
  _mm512_storeu_si512(p, _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16)));
}
#if defined(XFAST_BF16)
// The instruction takes denormal numbers for zero, as the products of bf16 do.
inline void store_bf16(uint16_t* p, V16 a, V16 b) {
  _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
}
#else
inline __m256i to_bf16_bits(V16 a) {
  const __m512i bits = _mm512_castps_si512(a);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet));
}
inline void store_bf16(uint16_t* p, V16 a, V16 b) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16_bits(a));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 16), to_bf16_bits(b));
}
#endif
inline V16 load_bf16(const uint16_t* p) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}
inline V16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// 16 x 16 transpose: pairs, quads, then 128-bit blocks twice.
inline void transpose16(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  __m512 r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(src + i * ld);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_ps(dst + i * dst_ld, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_ps(dst + (i + 8) * dst_ld, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xDD));
    _mm512_storeu_ps(dst + (i + 4) * dst_ld, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
    _mm512_storeu_ps(dst + (i + 12) * dst_ld, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xDD));
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
