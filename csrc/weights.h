// Weights packed once into the layout of layout.h. Quantisation happens here, in baseline code, so that packed int8
// weights are the same bytes whatever CPU packs or runs them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernel_table.h"

namespace xfast {

// A row-major [rows, cols] matrix of fp32, bf16 or fp16 that belongs to the caller.
struct MatrixView {
  TableView table;
  int64_t rows, cols;
};

class PackedLinear {
 public:
  PackedLinear() = default;
  PackedLinear(Precision precision, int64_t out_features, int64_t in_features);

  // Packs w [rows, in_features] and bias [rows] (null = zeros) as outputs [first, first + w.rows), on `threads`
  // threads. Returns false, leaving those outputs unusable, when w or bias holds a NaN or infinity.
  bool set_rows(int64_t first, const MatrixView& w, const float* bias, int threads);

  LinearView view() const;
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  int64_t bytes() const;
  bool complete() const {
    return std::all_of(set_.begin(), set_.end(), [](uint8_t set) { return set != 0; });
  }

 private:
  bool set_row(int64_t n, const MatrixView& w, int64_t row, float* values);

  Precision precision_ = Precision::kFp32;
  int64_t out_features_ = 0, in_features_ = 0, chunks_ = 0;
  AlignedBuffer data_;
  std::vector<float> scale_, bias_;
  std::vector<int32_t> compensation_;
  std::vector<uint8_t> set_;  // per output: packed and usable
};

// A word table in 8 bits a value: symmetric, one scale a row.
class QuantizedTable {
 public:
  QuantizedTable() = default;
  // `table` [rows, cols] must hold finite values.
  QuantizedTable(const TableView& table, int64_t rows, int64_t cols, int threads);
  TableView view() const { return {data_.data(), TableType::kInt8, scale_.data()}; }
  int64_t bytes() const { return data_.bytes() + static_cast<int64_t>(scale_.size() * sizeof(float)); }

 private:
  AlignedBuffer data_;
  std::vector<float> scale_;
};

// Values [begin, begin + count) of row-major table memory as fp32.
void read_values(const TableView& table, int64_t begin, int64_t count, float* out);
// True when all `count` values are finite.
bool all_finite(const TableView& table, int64_t count, int threads);

}  // namespace xfast
