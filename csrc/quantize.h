// Row-major fp32 rows -> the operand layout that matrix products read (layout.h).
#pragma once

namespace xfast {
namespace XFAST_TARGET {

// 16 values of a row that has `n` more, zero beyond them. Whole: there are 16.
template <bool Whole>
V16 load_part(const float* x, int64_t n) {
  return Whole ? load(x) : load_n(x, n);
}
template <bool Whole>
void store_part(float* x, V16 values, int64_t n) {
  if constexpr (Whole)
    store(x, values);
  else
    store_n(x, values, n);
}

// One row, columns beyond `cols` zero. x: [cols], out row at `row` of an operand with out.chunk_stride.
inline void operand_row_f32(const float* x, int64_t cols, const Operand& out, int64_t row) {
  uint8_t* dst = out.data + row * kChunkBytes;
  for (int64_t c = 0; c < cols; c += 16, dst += out.chunk_stride)
    store(reinterpret_cast<float*>(dst), load_n(x + c, cols - c));
}

inline void operand_row_bf16(const float* x, int64_t cols, const Operand& out, int64_t row) {
  uint8_t* dst = out.data + row * kChunkBytes;
  for (int64_t c = 0; c < cols; c += 32, dst += out.chunk_stride)
    store_bf16(reinterpret_cast<uint16_t*>(dst), load_n(x + c, cols - c), load_n(x + c + 16, cols - c - 16));
}

// The 16 values of a row from column c on, smoothed if they are to be. Beyond `cols` zero.
template <bool Scaled, bool Whole>
V16 input_values(const float* x, const float* column_scale, int64_t c, int64_t cols) {
  const V16 values = load_part<Whole>(x + c, cols - c);
  if constexpr (Scaled) return mul(values, load_part<Whole>(column_scale + c, cols - c));
  return values;
}

// The largest |x| of a row; NaN if one is, so that the row's scale, and with it its products, are NaN too. Four maxima:
// one would wait for itself.
template <bool Scaled>
float row_absmax(const float* x, const float* column_scale, int64_t cols) {
  V16 largest[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      largest[i] = max_magnitude(input_values<Scaled, true>(x, column_scale, c + 16 * i, cols), largest[i]);
  for (; c < cols; c += 16)
    largest[0] = max_magnitude(input_values<Scaled, false>(x, column_scale, c, cols), largest[0]);
  return reduce_max_magnitude(
      max_magnitude(max_magnitude(largest[0], largest[1]), max_magnitude(largest[2], largest[3])));
}

// To the nearest integer, ties to even. The clamp only matters for NaN and infinities, which it makes integers of the
// range: that the result is none is in the scale.
inline I16 round_within(V16 x, float limit) { return round_to_int(min(max(x, set1(-limit)), set1(limit))); }

// 64 values from column c on -> a chunk of an operand.
template <bool Signed, bool Scaled, bool Whole>
void quantise_chunk(const float* x, const float* column_scale, int64_t c, int64_t cols, V16 inverse, uint8_t* dst) {
#pragma GCC unroll 4
  for (int64_t g = 0; g < 64; g += 16) {
    const I16 q = round_within(mul(input_values<Scaled, Whole>(x, column_scale, c + g, cols), inverse), 127.0f);
    if constexpr (Signed)
      store_i8(dst + g, q);
    else
      store_u8(dst + g, q);
  }
}

// Symmetric per row: scale = max|x| / 127, q = round-to-nearest-even(x / scale), stored as q + 128 (int8) or as it is
// (int4, whose weights are the unsigned side).
template <bool Signed, bool Scaled>
void operand_row_quantised(const float* x, const float* column_scale, int64_t cols, const Operand& out, int64_t row) {
  const float absmax = row_absmax<Scaled>(x, column_scale, cols);
  out.scale[row] = absmax / 127.0f;
  const V16 inverse = set1(absmax > 1e-30f ? 127.0f / absmax : 0.0f);
  uint8_t* dst = out.data + row * kChunkBytes;
  int64_t c = 0;
  for (; c + 64 <= cols; c += 64, dst += out.chunk_stride)
    quantise_chunk<Signed, Scaled, true>(x, column_scale, c, cols, inverse, dst);
  if (c < cols) quantise_chunk<Signed, Scaled, false>(x, column_scale, c, cols, inverse, dst);
}

template <bool Signed>
void operand_row_quantised(const InputFormat& format, const float* x, int64_t cols, const Operand& out, int64_t row) {
  if (format.column_scale != nullptr)
    operand_row_quantised<Signed, true>(x, format.column_scale, cols, out, row);
  else
    operand_row_quantised<Signed, false>(x, nullptr, cols, out, row);
}

// What layout.h calls "sums", of one quantised row.
inline void group_sums(int64_t group, int64_t cols, const Operand& out, int64_t row) {
  const uint8_t* chunk = out.data + row * kChunkBytes;
  int32_t* sums = out.sums + row;
  const int64_t units = ceil_div(cols, 64) * 2, per_group = group / 32;
  int32_t sum = 0;
  for (int64_t unit = 0; unit < units; ++unit) {
    const int8_t* values = reinterpret_cast<const int8_t*>(chunk + unit / 2 * out.chunk_stride + unit % 2 * 32);
    for (int i = 0; i < 32; ++i) sum += values[i];
    if ((unit + 1) % per_group != 0 && unit + 1 != units) continue;
    *sums = -8 * sum;
    sums += out.capacity();
    sum = 0;
  }
}

inline void operand_row(const InputFormat& format, const float* x, int64_t cols, const Operand& out, int64_t row) {
  switch (format.precision) {
    case Precision::kFp32: return operand_row_f32(x, cols, out, row);
    case Precision::kBf16: return operand_row_bf16(x, cols, out, row);
    case Precision::kInt8: return operand_row_quantised<false>(format, x, cols, out, row);
    case Precision::kInt4:
      operand_row_quantised<true>(format, x, cols, out, row);
      return group_sums(format.group, cols, out, row);
  }
}

inline void to_operand(const OperandArgs& args) {
  for (int64_t row = args.row_begin; row < args.row_end; ++row)
    operand_row(args.format, args.x + row * args.ldx, args.cols, args.out, row);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
