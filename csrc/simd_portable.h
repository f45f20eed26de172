// V16 in plain C++: the reference semantics that the x86 versions reproduce bit for bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace xfast {
namespace XFAST_TARGET {

struct V16 {
  float v[16];
};
struct I16 {
  int32_t v[16];
};

#define XFAST_LANES for (int i = 0; i < 16; ++i)

inline V16 load(const float* p) {
  V16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void store(float* p, V16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline V16 load_n(const float* p, int64_t n) {
  V16 r;
  XFAST_LANES r.v[i] = i < n ? p[i] : 0.0f;
  return r;
}
inline void store_n(float* p, V16 a, int64_t n) { XFAST_LANES if (i < n) p[i] = a.v[i]; }
inline V16 set1(float x) {
  V16 r;
  XFAST_LANES r.v[i] = x;
  return r;
}
inline V16 add(V16 a, V16 b) {
  XFAST_LANES a.v[i] += b.v[i];
  return a;
}
inline V16 sub(V16 a, V16 b) {
  XFAST_LANES a.v[i] -= b.v[i];
  return a;
}
inline V16 mul(V16 a, V16 b) {
  XFAST_LANES a.v[i] *= b.v[i];
  return a;
}
inline V16 div(V16 a, V16 b) {
  XFAST_LANES a.v[i] /= b.v[i];
  return a;
}
// a * b + c with one rounding, as the hardware instruction does (libm's fmaf where the CPU has none).
inline V16 fma(V16 a, V16 b, V16 c) {
  XFAST_LANES a.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
  return a;
}
// Like the x86 instructions: the second operand wins when either is NaN.
inline V16 max(V16 a, V16 b) {
  XFAST_LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline V16 min(V16 a, V16 b) {
  XFAST_LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline V16 abs(V16 a) {
  XFAST_LANES a.v[i] = std::fabs(a.v[i]);
  return a;
}
// The larger of |a| and `largest`, which has no sign. Compared as integers, whose order is that of the numbers, with
// NaN beyond infinity: unlike max, this keeps a NaN.
inline V16 max_magnitude(V16 a, V16 largest) {
  XFAST_LANES {
    int32_t x, y;
    std::memcpy(&x, &a.v[i], 4);
    std::memcpy(&y, &largest.v[i], 4);
    x &= 0x7FFFFFFF;
    if (x < y) x = y;
    std::memcpy(&a.v[i], &x, 4);
  }
  return a;
}
// cond < 0 ? a : b
inline V16 select_negative(V16 cond, V16 a, V16 b) {
  XFAST_LANES a.v[i] = cond.v[i] < 0.0f ? a.v[i] : b.v[i];
  return a;
}
// lanes [0, n) of a, the others 0
inline V16 keep_first(V16 a, int64_t n) {
  XFAST_LANES a.v[i] = i < n ? a.v[i] : 0.0f;
  return a;
}
// Fixed tree (i + 8, + 4, + 2, + 1): the same order on every target.
inline float reduce_add(V16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
inline float reduce_max(V16 a) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}
// The largest of 16 that have no sign, or NaN.
inline float reduce_max_magnitude(V16 a) {
  V16 half = a;
  for (int n = 8; n > 0; n /= 2) {
    for (int i = 0; i < n; ++i) half.v[i] = a.v[i + n];
    a = max_magnitude(a, half);
  }
  return a.v[0];
}
// Round to nearest even, |x| < 2^22: adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
inline I16 round_to_int(V16 a) {
  I16 r;
  XFAST_LANES {
    const float shifted = a.v[i] + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, 4);
    r.v[i] = static_cast<int32_t>(bits - 0x4B400000u);
  }
  return r;
}
inline V16 to_float(I16 a) {
  V16 r;
  XFAST_LANES r.v[i] = static_cast<float>(a.v[i]);
  return r;
}
inline I16 load_i32(const int32_t* p) {
  I16 r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline I16 add(I16 a, I16 b) {
  XFAST_LANES a.v[i] += b.v[i];
  return a;
}
inline V16 floor(V16 a) {
  XFAST_LANES a.v[i] = std::floor(a.v[i]);
  return a;
}
// a * 2^n for integers n and normal results
inline V16 scale_by_power(V16 a, V16 n) {
  XFAST_LANES {
    const uint32_t bits = (static_cast<uint32_t>(static_cast<int32_t>(n.v[i])) + 127u) << 23;
    float factor;
    std::memcpy(&factor, &bits, 4);
    a.v[i] *= factor;
  }
  return a;
}
// 16 values in [-127, 127] -> bytes
inline void store_i8(uint8_t* p, I16 a) { XFAST_LANES p[i] = static_cast<uint8_t>(static_cast<int8_t>(a.v[i])); }
// likewise, + 128
inline void store_u8(uint8_t* p, I16 a) { XFAST_LANES p[i] = static_cast<uint8_t>(a.v[i] + 128); }
// a's and b's values in [-32767, 32767] -> 16 bits each, in the order that costs this target least: the pair of values
// 2p and 2p + 1 (of 32: a's, then b's) lies at pair_slot(p).
inline void store_i16(uint8_t* p, I16 a, I16 b) {
  int16_t words[32];
  XFAST_LANES words[i] = static_cast<int16_t>(a.v[i]);
  XFAST_LANES words[16 + i] = static_cast<int16_t>(b.v[i]);
  std::memcpy(p, words, sizeof words);
}
constexpr int64_t pair_slot(int64_t pair) { return pair; }
// likewise, alternating (a0 b0 a1 b1 and so on): as many bytes as 16 floats
inline void store_pairs(float* p, I16 a, I16 b) {
  XFAST_LANES {
    const int16_t pair[2] = {static_cast<int16_t>(a.v[i]), static_cast<int16_t>(b.v[i])};
    std::memcpy(p + i, pair, 4);
  }
}
// round to nearest even bf16; NaN stays NaN
inline void store_bf16_half(uint16_t* p, V16 a) {
  XFAST_LANES {
    uint32_t bits;
    std::memcpy(&bits, &a.v[i], 4);
    const bool nan = a.v[i] != a.v[i];
    p[i] = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
  }
}
inline void store_bf16(uint16_t* p, V16 a, V16 b) {
  store_bf16_half(p, a);
  store_bf16_half(p + 16, b);
}
inline V16 load_bf16(const uint16_t* p) {
  V16 r;
  XFAST_LANES {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
inline V16 load_f16(const uint16_t* p) {
  V16 r;
  XFAST_LANES r.v[i] = half_to_float(p[i]);
  return r;
}
// src[16 rows, ld] -> dst[16 columns][dst_ld]
inline void transpose16(const float* src, int64_t ld, float* dst, int64_t dst_ld) {
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) dst[c * dst_ld + r] = src[r * ld + c];
}

#undef XFAST_LANES

}  // namespace XFAST_TARGET
}  // namespace xfast
