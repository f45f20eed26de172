// Embedding gather over packed tokens: word + type + position, added in the order transformers adds them.
#pragma once

#include "half.h"

namespace xfast {
namespace XFAST_TARGET {

// 16 values (the first n of them) of table row `row`, from column `col`. table: [rows, cols]
inline V16 load_table(const TableView& table, int64_t row, int64_t cols, int64_t col) {
  const int64_t n = cols - col, offset = row * cols + col;
  if (table.type == TableType::kF32) return load_n(static_cast<const float*>(table.data) + offset, n);
  if (table.type == TableType::kInt8) {
    const int8_t* bytes = static_cast<const int8_t*>(table.data) + offset;
    float values[16] = {};
    for (int i = 0; i < 16 && i < n; ++i) values[i] = static_cast<float>(bytes[i]);
    return mul(load(values), set1(table.scale[row]));
  }
  const uint16_t* source = static_cast<const uint16_t*>(table.data) + offset;
  if (n >= 16) return table.type == TableType::kBf16 ? load_bf16(source) : load_f16(source);
  float values[16] = {};
  for (int i = 0; i < 16 && i < n; ++i)
    values[i] = table.type == TableType::kBf16 ? bf16_to_float(source[i]) : half_to_float(source[i]);
  return load(values);
}

inline void embed(const EmbeddingArgs& args) {
  for (int64_t row = args.row_begin; row < args.row_end; ++row) {
    float* x = args.x + row * args.ldx;
    const int64_t type = args.type_ids != nullptr ? args.type_ids[row] : 0;
    for (int64_t c = 0; c < args.cols; c += 16) {
      const V16 word = args.embeds != nullptr ? load_n(args.embeds + row * args.cols + c, args.cols - c)
                                              : load_table(args.word, args.ids[row], args.cols, c);
      const V16 sum = args.type.data != nullptr ? add(word, load_table(args.type, type, args.cols, c)) : word;
      store_n(x + c, add(sum, load_table(args.position, args.position_ids[row], args.cols, c)), args.cols - c);
    }
  }
}

}  // namespace XFAST_TARGET
}  // namespace xfast
