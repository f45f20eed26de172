// Row-major fp32 rows -> the operand layout that matrix products read (layout.h).
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// One row, columns beyond `cols` zero. x: [cols], out row at `row` of an operand with out.chunk_stride.
inline void operand_row_f32(const float* x, int64_t cols, const Operand& out, int64_t row) {
  uint8_t* dst = out.data + row * kChunkBytes;
  for (int64_t c = 0; c < cols; c += 16, dst += out.chunk_stride)
    store(reinterpret_cast<float*>(dst), load_n(x + c, cols - c));
}

inline void operand_row_bf16(const float* x, int64_t cols, const Operand& out, int64_t row) {
  uint8_t* dst = out.data + row * kChunkBytes;
  for (int64_t c = 0; c < cols; c += 32, dst += out.chunk_stride) {
    store_bf16(reinterpret_cast<uint16_t*>(dst), load_n(x + c, cols - c));
    store_bf16(reinterpret_cast<uint16_t*>(dst) + 16, load_n(x + c + 16, cols - c - 16));
  }
}

// Symmetric per-row int8: scale = max|x| / 127, q = round-to-nearest-even(x / scale), stored as q + 128.
// The clamp only matters for NaN and infinities, which it makes harmless integers.
inline void operand_row_int8(const float* x, int64_t cols, const Operand& out, int64_t row) {
  V16 largest = set1(0.0f);
  for (int64_t c = 0; c < cols; c += 16) largest = max(abs(load_n(x + c, cols - c)), largest);
  const float absmax = reduce_max(largest);
  out.scale[row] = absmax / 127.0f;
  const V16 inverse = set1(absmax > 1e-30f ? 127.0f / absmax : 0.0f);
  uint8_t* dst = out.data + row * kChunkBytes;
  for (int64_t c = 0; c < cols; c += 64, dst += out.chunk_stride)
    for (int64_t g = 0; g < 64; g += 16) {
      const V16 scaled = mul(load_n(x + c + g, cols - c - g), inverse);
      store_u8(dst + g, round_to_int(min(max(scaled, set1(-127.0f)), set1(127.0f))));
    }
}

inline void operand_row(Precision precision, const float* x, int64_t cols, const Operand& out, int64_t row) {
  switch (precision) {
    case Precision::kFp32: return operand_row_f32(x, cols, out, row);
    case Precision::kBf16: return operand_row_bf16(x, cols, out, row);
    case Precision::kInt8: return operand_row_int8(x, cols, out, row);
  }
}

inline void to_operand(const OperandArgs& args) {
  for (int64_t row = args.row_begin; row < args.row_end; ++row)
    operand_row(args.precision, args.x + row * args.ldx, args.cols, args.out, row);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
