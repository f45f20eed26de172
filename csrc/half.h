// Scalar conversions between 16-bit floats and fp32. Compiled into the namespace of whoever includes it, so that no
// copy built for a wide target can stand in for the baseline one.
#pragma once

#include <cstdint>

#ifndef XFAST_TARGET
#define XFAST_TARGET baseline
#endif

namespace xfast {
namespace XFAST_TARGET {

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline float bf16_to_float(uint16_t h) { return bits_to_float(static_cast<uint32_t>(h) << 16); }
// IEEE half: shift the exponent field into place and let a multiply renormalise subnormals.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7FFF;
  if (rest >= 0x7C00) return bits_to_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);  // inf, NaN
  const float value = bits_to_float(rest << 13) * 5.192296858534828e33f;               // 2^112
  return sign != 0 ? -value : value;
}
// Round to nearest even; finite values only.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
