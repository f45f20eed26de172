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

// One linear layer in packed layout. It owns its memory, taken when the first rows are set, or reads the caller's.
class PackedLinear {
 public:
  PackedLinear() = default;
  // `group`: int4 only. Inputs are divided by `divisor` [in_features] (null = not smoothed; quantised precisions) when
  // they are quantised, weights multiplied when they are packed: the same product, with outliers moved to where they
  // do less harm.
  PackedLinear(Precision precision, int64_t group, int64_t out_features, int64_t in_features,
               const float* divisor = nullptr)
      : precision_(precision),
        group_(precision == Precision::kInt4 ? group : 0),
        out_features_(out_features),
        in_features_(in_features),
        chunks_(chunks_for(precision, in_features)) {
    if (divisor != nullptr) smooth(divisor);
  }

  // Packs w [rows, in_features] and bias [rows] (null = zeros) as outputs [first, first + w.rows), on `threads`
  // threads. Returns false, leaving those outputs unusable, when w or bias holds a NaN or infinity.
  bool set_rows(int64_t first, const MatrixView& w, const float* bias, int threads);
  // Reads packed memory in place: data_bytes() at `data`, in_features() entries in `column_scale` (null = not smoothed)
  // and padded_outputs() in the others (`scale` and `compensation`: int8 only). It stays the caller's. Not after
  // set_rows.
  void borrow(const uint8_t* data, const float* scale, const float* bias, const int32_t* compensation,
              const float* column_scale);

  LinearView view() const;
  // How inputs are to be laid out.
  InputFormat input() const;
  Precision precision() const { return precision_; }
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  int64_t padded_outputs() const { return panels_for(out_features_) * kPanel; }
  int64_t group() const { return group_; }
  bool smoothed() const { return input().column_scale != nullptr; }
  int64_t data_bytes() const { return panels_for(out_features_) * panel_bytes(precision_, chunks_, group_); }
  int64_t bytes() const {
    return data_bytes() + padded_outputs() * (precision_ == Precision::kInt8 ? 12 : 4) +
           (smoothed() ? in_features_ * 4 : 0);
  }
  bool owns() const { return !set_.empty(); }
  bool complete() const {
    return borrowed_.data != nullptr ||
           (owns() && std::all_of(set_.begin(), set_.end(), [](uint8_t set) { return set != 0; }));
  }

 private:
  void smooth(const float* divisor);
  void allocate();
  bool set_row(int64_t n, const MatrixView& w, int64_t row, float* values);
  void set_row_int4(int64_t n, const float* values);

  Precision precision_ = Precision::kFp32;
  int64_t group_ = 0, out_features_ = 0, in_features_ = 0, chunks_ = 0;
  std::vector<float> divisor_, column_scale_;  // one the inverse of the other; empty = not smoothed
  AlignedBuffer data_;
  std::vector<float> scale_, bias_;
  std::vector<int32_t> compensation_;
  std::vector<uint8_t> set_;  // per output: packed and usable; empty = no memory of its own
  LinearView borrowed_{};
  const float* borrowed_column_scale_ = nullptr;
};

// `table` [rows, cols], which must hold finite values, in 8 bits a value: symmetric, one scale a row.
void quantize_rows(const TableView& table, int64_t rows, int64_t cols, int8_t* out, float* scale, int threads);

// A word table so quantised.
class QuantizedTable {
 public:
  QuantizedTable() = default;
  QuantizedTable(const TableView& table, int64_t rows, int64_t cols, int threads) : data_(rows * cols), scale_(rows) {
    quantize_rows(table, rows, cols, reinterpret_cast<int8_t*>(data_.data()), scale_.data(), threads);
  }
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
// A 64-bit checksum at memory speed, the same for every number of threads. Any one changed byte changes it; other
// accidents go unseen with a chance of about 2^-64. It is no protection against an adversary.
uint64_t checksum(const uint8_t* data, int64_t bytes, int threads);

}  // namespace xfast
