// Loops that show what the machine can do at best: multiply-accumulates on registers alone, and plain reads.
// measure.cpp times them; a kernel's speed is quoted as a share of these.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// Keeps the compiler from computing a loop-invariant product once. Free, but in portable code: a store and loads.
#if defined(XFAST_AVX512) || defined(XFAST_AVX2)
constexpr bool kOpaqueIsFree = true;
template <class Reg>
inline void opaque_reg(Reg& r) {
#if defined(XFAST_AVX512)
  asm volatile("" : "+v"(r));
#else
  asm volatile("" : "+x"(r));
#endif
}
inline void opaque(IntReg& r) { opaque_reg(r); }
inline void opaque(FloatReg& r) { opaque_reg(r); }
template <class Pair>
inline auto opaque(Pair& p) -> decltype(p.even, void()) {
  opaque_reg(p.even);
  opaque_reg(p.odd);
}
#else
constexpr bool kOpaqueIsFree = false;
template <class T>
inline void opaque(T& value) {
  asm volatile("" : "+m"(value));
}
#endif

// `iterations` rounds of independent multiply-accumulates; returns how many single multiplications and additions
// that was.
template <class Dot>
int64_t spin_with(int64_t iterations, int elements) {
  constexpr int R = kRegBytes == 64 ? 10 : Dot::kMaxRows, V = kVectorsPerHalf;
  alignas(128) uint8_t ones[128];
  for (int i = 0; i < 128; ++i) ones[i] = 1;
  typename Dot::Acc acc[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[r][v] = zero_acc(typename Dot::Acc{});
      opaque(acc[r][v]);  // else the compiler sees that all of them are equal, and computes one
    }
  typename Dot::A a = Dot::load_a(ones);
  typename Dot::B b = Dot::load_b(ones);
  for (int64_t i = 0; i < iterations; ++i) {
    if constexpr (!kOpaqueIsFree) opaque(a);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        if constexpr (kOpaqueIsFree) opaque(a);  // else steps of several instructions share products, as no tile can
        Dot::step(acc[r][v], a, b);
      }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) opaque(acc[r][v]);
  return iterations * R * V * (kRegBytes / 4) * elements * 2;
}

inline int64_t spin(Precision precision, int64_t iterations) {
  switch (precision) {
    case Precision::kFp32: return spin_with<DotF32>(iterations, 1);
#if defined(XFAST_AMX)
    case Precision::kBf16: return spin_amx<false>(iterations);
    case Precision::kInt8: return spin_amx<true>(iterations);
#else
    case Precision::kBf16: return spin_with<DotBf16>(iterations, 2);
    case Precision::kInt8: return spin_with<DotInt8>(iterations, 4);
#endif
    case Precision::kInt4: return 0;  // the same instructions as int8, on other weights
  }
  return 0;
}

// Reads count floats (a multiple of 64) and returns their sum, so that the reads happen.
inline float read_all(const float* data, int64_t count) {
  V16 sum[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  for (int64_t i = 0; i < count; i += 64)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sum[k] = add(sum[k], load(data + i + 16 * k));
  return reduce_add(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
}

}  // namespace XFAST_TARGET
}  // namespace xfast
