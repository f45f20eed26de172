// The multiply-accumulate step of each precision on each target. Five policies a target: DotF32, DotF32Exact,
// DotBf16, DotInt8, DotInt16.
//
//   Acc      accumulator register            A   one 4-byte activation group, broadcast
//   B        one register of 4-byte weight groups (Reg lanes = outputs)
//   step(acc, a, b)   acc[n] += sum over the group's elements of a * b[n]
//   kMaxRows tallest row tile that keeps every accumulator in a register
//   unpack   rewrites a row of a chunk for load_a, before all of its multiplications (where kUnpackedBytes > 0)
//   kSigned  (int8) it takes the + 128 off the activations itself: no compensation
//
// NOTE (inline assembly): GCC 12 spills the accumulator array around the dot-product intrinsics, which costs half
// the speed. Writing just that one instruction as asm with the accumulator as "+v" keeps it in its register.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// Bytes of a row's chunk as Dot::unpack leaves it for load_a; 0: load_a takes it as it lies in the operand.
template <class Dot>
inline constexpr int64_t kUnpackedBytes = 0;

#if defined(XFAST_AVX512)

constexpr int kVectorsPerHalf = 2;  // registers of B held at once
constexpr int kHalves = 1;          // passes over a 32-output panel
constexpr int kRegBytes = 64;
using IntReg = __m512i;
using FloatReg = __m512;
inline IntReg zero_acc(IntReg) { return _mm512_setzero_si512(); }
inline FloatReg zero_acc(FloatReg) { return _mm512_setzero_ps(); }
inline IntReg load_acc(const void* p, IntReg) { return _mm512_loadu_si512(p); }
inline FloatReg load_acc(const void* p, FloatReg) { return _mm512_loadu_ps(p); }
inline void store_acc(void* p, IntReg a) { _mm512_storeu_si512(p, a); }
inline void store_acc(void* p, FloatReg a) { _mm512_storeu_ps(p, a); }
inline IntReg load_group(const void* p) { return _mm512_loadu_si512(p); }
inline IntReg broadcast_group(const void* p) {
  int32_t group;
  __builtin_memcpy(&group, p, 4);
  return _mm512_set1_epi32(group);
}
inline FloatReg as_float(IntReg a) { return _mm512_castsi512_ps(a); }
inline FloatReg fma_reg(FloatReg a, FloatReg b, FloatReg c) { return _mm512_fmadd_ps(a, b, c); }
inline IntReg shift_left_16(IntReg a) { return _mm512_slli_epi32(a, 16); }
inline IntReg and_mask(IntReg a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
inline IntReg add_i32(IntReg a, IntReg b) { return _mm512_add_epi32(a, b); }
inline IntReg multiply_pairs(IntReg a, IntReg b) { return _mm512_madd_epi16(a, b); }
constexpr int kRowsF32 = 14, kRowsBf16Widened = 12, kRowsInt16 = 14, kRowsInt8Vnni = 14;

#elif defined(XFAST_AVX2)

constexpr int kVectorsPerHalf = 2;
constexpr int kHalves = 2;
constexpr int kRegBytes = 32;
using IntReg = __m256i;
using FloatReg = __m256;
inline IntReg zero_acc(IntReg) { return _mm256_setzero_si256(); }
inline FloatReg zero_acc(FloatReg) { return _mm256_setzero_ps(); }
inline IntReg load_acc(const void* p, IntReg) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline FloatReg load_acc(const void* p, FloatReg) { return _mm256_loadu_ps(static_cast<const float*>(p)); }
inline void store_acc(void* p, IntReg a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline void store_acc(void* p, FloatReg a) { _mm256_storeu_ps(static_cast<float*>(p), a); }
inline IntReg load_group(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline IntReg broadcast_group(const void* p) {
  int32_t group;
  __builtin_memcpy(&group, p, 4);
  return _mm256_set1_epi32(group);
}
inline FloatReg as_float(IntReg a) { return _mm256_castsi256_ps(a); }
inline FloatReg fma_reg(FloatReg a, FloatReg b, FloatReg c) { return _mm256_fmadd_ps(a, b, c); }
inline IntReg shift_left_16(IntReg a) { return _mm256_slli_epi32(a, 16); }
inline IntReg and_mask(IntReg a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
inline IntReg add_i32(IntReg a, IntReg b) { return _mm256_add_epi32(a, b); }
inline IntReg multiply_pairs(IntReg a, IntReg b) { return _mm256_madd_epi16(a, b); }
constexpr int kRowsF32 = 6, kRowsBf16Widened = 4, kRowsInt16 = 6, kRowsInt8Vnni = 6;

#endif

#if defined(XFAST_AVX512) || defined(XFAST_AVX2)

struct DotF32 {
  using Acc = FloatReg;
  using A = FloatReg;
  using B = FloatReg;
  static constexpr int kMaxRows = kRowsF32;
  static B load_b(const uint8_t* p) { return as_float(load_group(p)); }
  static A load_a(const uint8_t* p) { return as_float(broadcast_group(p)); }
  static void step(Acc& acc, A a, B b) { acc = fma_reg(a, b, acc); }
};

// Without a bf16 instruction: both halves of each pair are widened to fp32 (exactly) and take one FMA each. Activations
// are widened a chunk at a time, before all of its multiplications, which broadcast them from there.
struct DotBf16Widened {
  using Acc = FloatReg;
  struct Pair {
    FloatReg even, odd;
  };
  using A = Pair;
  using B = Pair;
  static constexpr int kMaxRows = kRowsBf16Widened;
  static Pair widen(IntReg pair) {
    return {as_float(shift_left_16(pair)), as_float(and_mask(pair, static_cast<int>(0xFFFF0000u)))};
  }
  // One row of a chunk -> its 16 even elements, then its 16 odd ones.
  static void unpack(const uint8_t* row, uint8_t* out) {
    for (int64_t at = 0; at < kChunkBytes; at += kRegBytes) {
      const Pair pair = widen(load_group(row + at));
      store_acc(out + at, pair.even);
      store_acc(out + kChunkBytes + at, pair.odd);
    }
  }
  static B load_b(const uint8_t* p) { return widen(load_group(p)); }
  static A load_a(const uint8_t* p) {
    return {as_float(broadcast_group(p)), as_float(broadcast_group(p + kChunkBytes))};
  }
  static void step(Acc& acc, const A& a, const B& b) { acc = fma_reg(a.odd, b.odd, fma_reg(a.even, b.even, acc)); }
};

template <>
inline constexpr int64_t kUnpackedBytes<DotBf16Widened> = 2 * kChunkBytes;

// Groups that the instruction takes as they lie in memory.
struct PlainGroups {
  using A = IntReg;
  using B = IntReg;
  static B load_b(const uint8_t* p) { return load_group(p); }
  static A load_a(const uint8_t* p) { return broadcast_group(p); }
};

#if defined(XFAST_VNNI)
// AVX-512 VNNI and AVX-VNNI name their instructions alike; the assembler takes the former unless told.
#if defined(XFAST_AVX512)
#define XFAST_DOT(instruction) instruction " %2, %1, %0"
#else
#define XFAST_DOT(instruction) "%{vex%} " instruction " %2, %1, %0"
#endif
// acc[n] += the sum over four bytes of a, unsigned, times b, signed
inline void dot_bytes(IntReg& acc, IntReg a, IntReg b) { asm(XFAST_DOT("vpdpbusd") : "+v"(acc) : "v"(a), "v"(b)); }
// acc[n] += the sum over two 16-bit integers of a times b
inline void dot_words(IntReg& acc, IntReg a, IntReg b) { asm(XFAST_DOT("vpdpwssd") : "+v"(acc) : "v"(a), "v"(b)); }
#undef XFAST_DOT
#endif

// Pairs of 16-bit integers (attention).
struct DotInt16 : PlainGroups {
  using Acc = IntReg;
  static constexpr int kMaxRows = kRowsInt16;
#if defined(XFAST_VNNI)
  static void step(Acc& acc, A a, B b) { dot_words(acc, a, b); }
#else
  static void step(Acc& acc, A a, B b) { acc = add_i32(acc, multiply_pairs(a, b)); }
#endif
};

#if defined(XFAST_VNNI)
struct DotInt8 : PlainGroups {
  using Acc = IntReg;
  static constexpr int kMaxRows = kRowsInt8Vnni;
  static constexpr bool kSigned = false;
  static void step(Acc& acc, A a, B b) { dot_bytes(acc, a, b); }
};
#elif defined(XFAST_AVX512)
// Without a byte dot product, and no vpsignb this wide: even and odd bytes are widened to 16 bits, where pmaddwd is
// exact (pmaddubsw on bytes would saturate: 2 * 255 * 127 does not fit 16 bits).
struct DotInt8 {
  using Acc = IntReg;
  struct Pair {
    IntReg even, odd;
  };
  using A = Pair;
  using B = Pair;
  static constexpr int kMaxRows = 10;
  static constexpr bool kSigned = false;
  static B load_b(const uint8_t* p) {
    const IntReg bytes = load_group(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(bytes, 8), 8), _mm512_srai_epi16(bytes, 8)};
  }
  static void unpack(const uint8_t* row, uint8_t* out) {
    const IntReg bytes = load_group(row);
    store_acc(out, and_mask(bytes, 0x00FF00FF));
    store_acc(out + kChunkBytes, _mm512_srli_epi16(bytes, 8));
  }
  static A load_a(const uint8_t* p) { return {broadcast_group(p), broadcast_group(p + kChunkBytes)}; }
  static void step(Acc& acc, const A& a, const B& b) {
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a.even, b.even));
    acc = _mm512_add_epi32(acc, _mm512_madd_epi16(a.odd, b.odd));
  }
};
template <>
inline constexpr int64_t kUnpackedBytes<DotInt8> = 2 * kChunkBytes;
#else
// pmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits. With activations + 128 that saturates
// (2 * 255 * 127); with |w| and the activation under w's sign it cannot (2 * 127 * 127), and the sum is the same.
struct DotInt8 {
  using Acc = IntReg;
  struct B {
    IntReg value, size;
  };
  using A = IntReg;
  static constexpr int kMaxRows = 4;
  static constexpr bool kSigned = true;
  static B load_b(const uint8_t* p) {
    const IntReg w = load_group(p);
    return {w, _mm256_abs_epi8(w)};
  }
  static A load_a(const uint8_t* p) {
    return _mm256_xor_si256(broadcast_group(p), _mm256_set1_epi8(static_cast<char>(0x80)));
  }
  static void step(Acc& acc, const A& a, const B& b) {
    const IntReg pairs = _mm256_maddubs_epi16(b.size, _mm256_sign_epi8(a, b.value));
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#endif

#if defined(XFAST_BF16)
struct DotBf16 : PlainGroups {
  using Acc = FloatReg;
  static constexpr int kMaxRows = 14;
  static void step(Acc& acc, A a, B b) { asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b)); }
};
#else
using DotBf16 = DotBf16Widened;
#endif
using DotF32Exact = DotF32;

#else  // portable: a register is an array of 32 outputs, left to the compiler

constexpr int kVectorsPerHalf = 1;
constexpr int kHalves = 1;
constexpr int kRegBytes = 128;
struct IntReg {
  int32_t v[32];
};
struct FloatReg {
  float v[32];
};
inline IntReg zero_acc(IntReg) { return IntReg{}; }
inline FloatReg zero_acc(FloatReg) { return FloatReg{}; }
template <class Reg>
Reg load_acc(const void* p, Reg) {
  Reg r;
  __builtin_memcpy(&r, p, sizeof r);
  return r;
}
inline void store_acc(void* p, const IntReg& a) { __builtin_memcpy(p, &a, sizeof a); }
inline void store_acc(void* p, const FloatReg& a) { __builtin_memcpy(p, &a, sizeof a); }

struct DotF32 {
  using Acc = FloatReg;
  using A = float;
  using B = FloatReg;
  static constexpr int kMaxRows = 4;
  static B load_b(const uint8_t* p) { return load_acc(p, B{}); }
  static A load_a(const uint8_t* p) { return load_acc(p, A{}); }
  static void step(Acc& acc, A a, const B& b) {
    for (int n = 0; n < 32; ++n) acc.v[n] += a * b.v[n];
  }
};
// Attention uses the fused form, so that the int8 forward has the same bits as on targets with FMA.
struct DotF32Exact : DotF32 {
  static void step(Acc& acc, A a, const B& b) {
    for (int n = 0; n < 32; ++n) acc.v[n] = __builtin_fmaf(a, b.v[n], acc.v[n]);
  }
};
struct DotBf16 {
  using Acc = FloatReg;
  struct A {
    float even, odd;
  };
  using B = IntReg;
  static constexpr int kMaxRows = 4;
  static B load_b(const uint8_t* p) { return load_acc(p, IntReg{}); }
  static A load_a(const uint8_t* p) {
    uint32_t pair;
    __builtin_memcpy(&pair, p, 4);
    return {bits_to_float(pair << 16), bits_to_float(pair & 0xFFFF0000u)};
  }
  static void step(Acc& acc, A a, const B& b) {
    for (int n = 0; n < 32; ++n) {
      const uint32_t pair = static_cast<uint32_t>(b.v[n]);
      acc.v[n] += a.even * bits_to_float(pair << 16) + a.odd * bits_to_float(pair & 0xFFFF0000u);
    }
  }
};
struct DotInt16 {
  using Acc = IntReg;
  struct A {
    int16_t v[2];
  };
  struct B {
    int16_t v[64];
  };
  static constexpr int kMaxRows = 4;
  static B load_b(const uint8_t* p) { return load_acc(p, B{}); }
  static A load_a(const uint8_t* p) { return load_acc(p, A{}); }
  static void step(Acc& acc, const A& a, const B& b) {
    for (int n = 0; n < 32; ++n) acc.v[n] += a.v[0] * b.v[2 * n] + a.v[1] * b.v[2 * n + 1];
  }
};
struct DotInt8 {
  using Acc = IntReg;
  struct A {
    int v[4];
  };
  struct B {
    int8_t v[128];
  };
  static constexpr int kMaxRows = 4;
  static constexpr bool kSigned = false;
  static B load_b(const uint8_t* p) { return load_acc(p, B{}); }
  static A load_a(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static void step(Acc& acc, const A& a, const B& b) {
    for (int n = 0; n < 32; ++n)
      acc.v[n] += a.v[0] * b.v[4 * n] + a.v[1] * b.v[4 * n + 1] + a.v[2] * b.v[4 * n + 2] + a.v[3] * b.v[4 * n + 3];
  }
};
#endif

}  // namespace XFAST_TARGET
}  // namespace xfast
