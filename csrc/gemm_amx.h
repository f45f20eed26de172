// Products on AMX tiles: eight registers of 16 rows x 64 bytes, and instructions that multiply two of them and add to a
// third. The packed layouts (layout.h) suit them as they are: 16 rows of an operand's chunk are an A tile, the 16
// groups of 16 outputs of a weight panel a B tile. Sums of bytes are exact, so int8 has the bits of every other target.
//
//   C 0, 1   rows 0 .. 15, times outputs 0 .. 15 and 16 .. 31      A 4   rows 0 .. 15      B 6   outputs 0 .. 15
//   C 2, 3   rows 16 .. 31, likewise                               A 5   rows 16 .. 31     B 7   outputs 16 .. 31
//
// NOTE (inline assembly): the intrinsics of GCC 12 do not say that a tile load reads memory. With XFAST_MODEL_AMX the
// eight instructions are plain code on eight arrays, so that everything else is tested where no CPU has them.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

constexpr int kAmxRows = 16;  // of one register

struct alignas(64) AmxConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(AmxConfig) == 64, "the processor's layout");

#if defined(XFAST_MODEL_AMX)

struct AmxModel {
  AmxConfig config;
  uint8_t tile[8][kAmxRows][64];
};
inline AmxModel& amx_model() {
  static thread_local AmxModel model;
  return model;
}
inline void amx_configure(const AmxConfig& config) {
  amx_model() = AmxModel{};
  amx_model().config = config;
}
inline void amx_release() { amx_model() = AmxModel{}; }
template <int T>
void amx_zero() {
  __builtin_memset(amx_model().tile[T], 0, sizeof amx_model().tile[T]);
}
template <int T>
void amx_load(const void* p, int64_t stride) {
  amx_zero<T>();
  for (int r = 0; r < amx_model().config.rows[T]; ++r)
    __builtin_memcpy(amx_model().tile[T][r], static_cast<const uint8_t*>(p) + r * stride, 64);
}
template <int T>
void amx_store(void* p, int64_t stride) {
  for (int r = 0; r < amx_model().config.rows[T]; ++r)
    __builtin_memcpy(static_cast<uint8_t*>(p) + r * stride, amx_model().tile[T][r], 64);
}
template <int C, int A, int B>
void amx_multiply_int8() {
  AmxModel& m = amx_model();
  for (int r = 0; r < m.config.rows[C]; ++r)
    for (int n = 0; n < 16; ++n) {
      int32_t sum;
      __builtin_memcpy(&sum, &m.tile[C][r][4 * n], 4);
      for (int g = 0; g < m.config.rows[B]; ++g)
        for (int k = 0; k < 4; ++k) sum += m.tile[A][r][4 * g + k] * static_cast<int8_t>(m.tile[B][g][4 * n + k]);
      __builtin_memcpy(&m.tile[C][r][4 * n], &sum, 4);
    }
}
// Even and odd elements are summed apart, by fused steps, and added at the end.
template <int C, int A, int B>
void amx_multiply_bf16() {
  AmxModel& m = amx_model();
  const auto value = [](const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return bits_to_float(static_cast<uint32_t>(bits) << 16);
  };
  for (int r = 0; r < m.config.rows[C]; ++r)
    for (int n = 0; n < 16; ++n) {
      float sum, half[2] = {0.0f, 0.0f};
      for (int g = 0; g < m.config.rows[B]; ++g)
        for (int k = 0; k < 2; ++k)
          half[k] = __builtin_fmaf(value(&m.tile[A][r][4 * g + 2 * k]), value(&m.tile[B][g][4 * n + 2 * k]), half[k]);
      __builtin_memcpy(&sum, &m.tile[C][r][4 * n], 4);
      sum += half[0] + half[1];
      __builtin_memcpy(&m.tile[C][r][4 * n], &sum, 4);
    }
}

#else

inline void amx_configure(const AmxConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void amx_release() { asm volatile("tilerelease" : : : "memory"); }
template <int T>
void amx_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(T) : "memory");
}
template <int T>
void amx_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
void amx_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
void amx_multiply_int8() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
}
template <int C, int A, int B>
void amx_multiply_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B) : "memory");
}

#endif

// How rows are cut: tiles of 32, the last one of 16 or 32 moved back over rows that are done already, since registers
// of another height would want another configuration. Up to 32 rows are one tile of just that height.
struct AmxTiles {
  static constexpr int64_t kTallest = 2 * kAmxRows;
  static constexpr int64_t kMostOverlap = kAmxRows - 1;
  int64_t rows, count;
  explicit AmxTiles(int64_t total) : rows(total), count(ceil_div(total, kTallest)) {}
  int64_t size(int64_t t) const {
    if (t + 1 < count) return kTallest;
    const int64_t left = rows - t * kTallest;
    return count == 1 ? left : ceil_div(left, kAmxRows) * kAmxRows;
  }
  int64_t overlap(int64_t t) const { return t + 1 < count ? 0 : t * kTallest + size(t) - rows; }
};

// The registers as tiles of `rows` rows want them, for as long as the object lives.
class AmxScope {
 public:
  explicit AmxScope(int64_t rows) {
    AmxConfig config;
    const int64_t first = rows < kAmxRows ? rows : kAmxRows;
    const int64_t second = rows >= 2 * kAmxRows ? kAmxRows : rows - first;
    for (int t = 0; t < 8; ++t) {
      const bool lower = t == 2 || t == 3 || t == 5;
      config.rows[t] = static_cast<uint8_t>(t >= 6 ? kAmxRows : lower ? second : first);
      config.row_bytes[t] = config.rows[t] > 0 ? 64 : 0;
    }
    amx_configure(config);
  }
  ~AmxScope() { amx_release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

template <bool kInt8, int C, int A, int B>
void amx_multiply() {
  if constexpr (kInt8)
    amx_multiply_int8<C, A, B>();
  else
    amx_multiply_bf16<C, A, B>();
}

// As `tile` in gemm.h, on one or two A registers of rows. The prefetches lie between the products: one of full
// registers takes 16 cycles, in which the load ports have little else to do.
template <bool kInt8, int kRegisters, int kPrefetchLines>
void amx_tile(const uint8_t* a, int64_t chunk_stride, const uint8_t* b, int64_t chunks, const void* start,
              int64_t start_stride, void* out, const uint8_t* prefetch) {
  constexpr int64_t kRow = kPanel * 4, kLines = 8 * kPrefetchLines / (2 * kRegisters);
  constexpr bool kTwo = kRegisters == 2;
  const uint8_t* first = static_cast<const uint8_t*>(start);
  if (first == nullptr) {
    amx_zero<0>(), amx_zero<1>();
    if constexpr (kTwo) amx_zero<2>(), amx_zero<3>();
  } else {
    amx_load<0>(first, start_stride), amx_load<1>(first + 64, start_stride);
    first += kAmxRows * start_stride;
    if constexpr (kTwo) amx_load<2>(first, start_stride), amx_load<3>(first + 64, start_stride);
  }
  const auto fetch = [&](int part) {
    for (int64_t line = 0; line < kLines; ++line, prefetch += 64) __builtin_prefetch(prefetch, 0, kFromMemory);
    // The operand's next chunk lies a whole stride further, where no hardware prefetcher looks for it.
    for (int r = part * 8; r < part * 8 + 8; ++r) __builtin_prefetch(a + chunk_stride + r * kChunkBytes, 0, 3);
  };
  for (int64_t c = 0; c < chunks; ++c, a += chunk_stride, b += kPanelChunkBytes) {
    amx_load<4>(a, kChunkBytes);
    amx_load<6>(b, kRow);
    amx_multiply<kInt8, 0, 4, 6>();
    fetch(0);
    amx_load<7>(b + 64, kRow);
    amx_multiply<kInt8, 1, 4, 7>();
    fetch(1);
    if constexpr (kTwo) {
      amx_load<5>(a + kAmxRows * kChunkBytes, kChunkBytes);
      amx_multiply<kInt8, 2, 5, 6>();
      fetch(2);
      amx_multiply<kInt8, 3, 5, 7>();
      fetch(3);
    }
  }
  uint8_t* dst = static_cast<uint8_t*>(out);
  amx_store<0>(dst, kRow), amx_store<1>(dst + 64, kRow);
  dst += kAmxRows * kRow;
  if constexpr (kTwo) amx_store<2>(dst, kRow), amx_store<3>(dst + 64, kRow);
}

// What multiply_panel (gemm.h) asks of a unit.
template <bool kInt8>
struct Amx {
  using Tiles = AmxTiles;
  using Scope = AmxScope;
  static constexpr bool starts_at_zero() { return false; }
  static TileFn tile_for(int64_t rows, int lines) {
    constexpr TileFn kOne[] = {amx_tile<kInt8, 1, 0>, amx_tile<kInt8, 1, 1>, amx_tile<kInt8, 1, 2>, nullptr,
                               amx_tile<kInt8, 1, 4>};
    constexpr TileFn kTwo[] = {amx_tile<kInt8, 2, 0>, amx_tile<kInt8, 2, 1>, amx_tile<kInt8, 2, 2>, nullptr,
                               amx_tile<kInt8, 2, 4>};
    return (rows > kAmxRows ? kTwo : kOne)[lines];
  }
};

// The ceiling (ceiling.h): products on registers alone.
template <bool kInt8>
int64_t spin_amx(int64_t iterations) {
  const AmxScope scope(2 * kAmxRows);
  amx_zero<0>(), amx_zero<1>(), amx_zero<2>(), amx_zero<3>(), amx_zero<4>(), amx_zero<5>(), amx_zero<6>(),
      amx_zero<7>();
  for (int64_t i = 0; i < iterations; ++i) {
    amx_multiply<kInt8, 0, 4, 6>();
    amx_multiply<kInt8, 1, 4, 7>();
    amx_multiply<kInt8, 2, 5, 6>();
    amx_multiply<kInt8, 3, 5, 7>();
  }
  return iterations * 4 * kAmxRows * 16 * (kInt8 ? 64 : 32) * 2;
}

}  // namespace XFAST_TARGET
}  // namespace xfast
