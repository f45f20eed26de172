#include "weights.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "half.h"
#include "thread_pool.h"

namespace xfast {

using namespace baseline;

namespace {

// NaN and infinity are exactly the values whose difference with themselves is not zero. Summing the differences lets
// the compiler vectorise the check.
bool finite(const float* values, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += values[i] - values[i];
  return sum == 0.0f;
}

// Symmetric 8 bits: q = round-to-nearest-even(value / scale), in [-127, 127].
struct Scale {
  float scale, inverse;
  Scale(const float* values, int64_t count) {
    float absmax = 0.0f;
    for (int64_t i = 0; i < count; ++i) absmax = std::max(absmax, std::fabs(values[i]));
    scale = absmax / 127.0f;
    inverse = absmax > 1e-30f ? 127.0f / absmax : 0.0f;
  }
  int8_t quantize(float value) const { return static_cast<int8_t>(std::nearbyintf(value * inverse)); }
};

// Symmetric 4 bits for a group: q = round-to-nearest-even(value / scale), clamped to [-8, 7]. The scale is rounded to
// bf16 first; its sign is such that the value of largest size lies on the side of -8. Of several sizes the one with the
// least squared error is taken: cutting off the largest value a little makes the others' steps finer.
struct GroupScale {
  static constexpr float kSteps[] = {8.0f, 8.4f, 8.8f, 9.3f, 9.9f, 10.6f, 7.5f};
  uint16_t bits = 0;
  float inverse = 0.0f;

  // `values` [size], size a multiple of 8.
  GroupScale(const float* values, int64_t size) {
    float low = 0.0f, high = 0.0f;
    for (int64_t i = 0; i < size; ++i) {
      low = values[i] < low ? values[i] : low;
      high = values[i] > high ? values[i] : high;
    }
    const float extreme = -low >= high ? low : high;
    if (std::fabs(extreme) <= 1e-30f) return;
    float least = 0.0f;
    for (const float steps : kSteps) {
      const uint16_t tried = float_to_bf16(-extreme / steps);
      const float scale = bf16_to_float(tried), inverted = 1.0f / scale;
      const float error = squared_error(values, size, scale, inverted);
      if (bits != 0 && !(error < least)) continue;
      least = error;
      bits = tried;
      inverse = inverted;
    }
  }
  int quantize(float value) const { return static_cast<int>(round_clamped(F4{value * inverse})[0]); }

 private:
  // Four at a time, written out: no compiler at hand vectorises the search by itself.
  typedef float F4 __attribute__((vector_size(16)));

  static F4 splat(float value) { return F4{value, value, value, value}; }
  // Adding and taking away 1.5 * 2^23 rounds to nearest even.
  static F4 round_clamped(F4 value) {
    const F4 low = splat(-8.0f), high = splat(7.0f), magic = splat(12582912.0f);
    value = value < low ? low : value;
    value = value > high ? high : value;
    return (value + magic) - magic;
  }
  static float squared_error(const float* values, int64_t size, float scale, float inverted) {
    constexpr int64_t kLanes = 8;  // part of the definition: which sums are rounded
    F4 sums[kLanes / 4] = {};
    for (int64_t i = 0; i < size; i += kLanes)
      for (int64_t half = 0; half < kLanes / 4; ++half) {
        F4 value;
        std::memcpy(&value, values + i + 4 * half, sizeof value);
        const F4 d = value - splat(scale) * round_clamped(value * splat(inverted));
        sums[half] += d * d;
      }
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += sums[lane / 4][lane % 4];
    return total;
  }
};

}  // namespace

void read_values(const TableView& table, int64_t begin, int64_t count, float* out) {
  if (table.type == TableType::kF32) {
    std::memcpy(out, static_cast<const float*>(table.data) + begin, count * sizeof(float));
    return;
  }
  const uint16_t* source = static_cast<const uint16_t*>(table.data) + begin;
  for (int64_t i = 0; i < count; ++i)
    out[i] = table.type == TableType::kBf16 ? bf16_to_float(source[i]) : half_to_float(source[i]);
}

bool all_finite(const TableView& table, int64_t count, int threads) {
  std::atomic<bool> good{true};
  run_parallel(threads, [&](const Member& member) {
    constexpr int64_t kStep = 4096;
    float values[kStep];
    const Range mine = share(member, 0, count);
    for (int64_t i = mine.begin; i < mine.end && good; i += kStep) {
      const int64_t n = std::min(kStep, mine.end - i);
      read_values(table, i, n, values);
      if (!finite(values, n)) good = false;
    }
  });
  return good;
}

void quantize_rows(const TableView& table, int64_t rows, int64_t cols, int8_t* quantized, float* scales, int threads) {
  std::vector<float> scratch(most_members(threads) * cols);
  run_parallel(threads, [&](const Member& member) {
    float* values = scratch.data() + member.id * cols;
    const Range mine = share(member, 0, rows);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      read_values(table, row * cols, cols, values);
      const Scale scale(values, cols);
      int8_t* out = quantized + row * cols;
      for (int64_t k = 0; k < cols; ++k) out[k] = scale.quantize(values[k]);
      scales[row] = scale.scale;
    }
  });
}

namespace {

constexpr int64_t kLanes = 8;  // independent chains: multiplications overlap
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15u;

// Each step is a bijection of the state and of the word: a single changed word always changes the result.
uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kOdd;
  return state ^ (state >> 29);
}

uint64_t block_checksum(const uint8_t* data, int64_t bytes) {
  uint64_t lanes[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<uint64_t>(i + 1) * kOdd;
  uint64_t words[kLanes] = {};
  constexpr int64_t kStep = sizeof words;
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) {
    std::memcpy(words, data + at, kStep);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  if (at < bytes) {
    std::memset(words, 0, kStep);
    std::memcpy(words, data + at, bytes - at);
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t all = static_cast<uint64_t>(bytes);
  for (uint64_t lane : lanes) all = mix(all, lane);
  return all;
}

}  // namespace

uint64_t checksum(const uint8_t* data, int64_t bytes, int threads) {
  constexpr int64_t kBlock = int64_t{1} << 20;  // part of the definition: artifacts hold these numbers
  std::vector<uint64_t> blocks(ceil_div(bytes, kBlock));
  const int64_t count = static_cast<int64_t>(blocks.size());
  run_parallel(threads, [&](const Member& member) {
    const Range mine = share(member, 0, count);
    for (int64_t b = mine.begin; b < mine.end; ++b)
      blocks[b] = block_checksum(data + b * kBlock, std::min(kBlock, bytes - b * kBlock));
  });
  uint64_t all = static_cast<uint64_t>(bytes);
  for (uint64_t block : blocks) all = mix(all, block);
  return all;
}

void PackedLinear::allocate() {
  data_ = AlignedBuffer(data_bytes());
  // Else every byte is set; but int4 sets half bytes.
  if (precision_ == Precision::kInt4 || out_features_ % kPanel != 0 || in_features_ % chunk_elements(precision_) != 0)
    std::memset(data_.data(), 0, data_.bytes());
  set_.assign(out_features_, 0);
  bias_.assign(padded_outputs(), 0.0f);
  if (precision_ == Precision::kInt8) {
    scale_.assign(padded_outputs(), 0.0f);
    compensation_.assign(padded_outputs(), 0);
  }
}

void PackedLinear::smooth(const float* divisor) {
  divisor_.assign(divisor, divisor + in_features_);
  column_scale_.resize(in_features_);
  for (int64_t k = 0; k < in_features_; ++k) column_scale_[k] = 1.0f / divisor[k];
}

void PackedLinear::borrow(const uint8_t* data, const float* scale, const float* bias, const int32_t* compensation,
                          const float* column_scale) {
  const int64_t bytes = panel_bytes(precision_, chunks_, group_);
  borrowed_ = {data, scale, bias, compensation, out_features_, chunks_, bytes, group_};
  borrowed_column_scale_ = column_scale;
}

InputFormat PackedLinear::input() const {
  const float* own = column_scale_.empty() ? nullptr : column_scale_.data();
  return {precision_, group_, borrowed_.data != nullptr ? borrowed_column_scale_ : own};
}

bool PackedLinear::set_rows(int64_t first, const MatrixView& w, const float* bias, int threads) {
  if (!owns()) allocate();
  std::fill_n(set_.begin() + first, w.rows, 0);
  if (bias != nullptr) {
    if (!finite(bias, w.rows)) return false;
    std::memcpy(bias_.data() + first, bias, w.rows * sizeof(float));
  }
  std::atomic<bool> good{true};
  std::vector<float> scratch(most_members(threads) * in_features_);
  // Members take whole panels, so that no two of them write to one cache line.
  run_parallel(threads, [&](const Member& member) {
    float* values = scratch.data() + member.id * in_features_;
    const Range mine = share(member, first / kPanel, ceil_div(first + w.rows, kPanel));
    const int64_t begin = std::max(mine.begin * kPanel, first), end = std::min(mine.end * kPanel, first + w.rows);
    for (int64_t n = begin; n < end && good; ++n)
      if (!set_row(n, w, n - first, values)) good = false;
  });
  std::fill_n(set_.begin() + first, w.rows, good ? 1 : 0);
  return good;
}

bool PackedLinear::set_row(int64_t n, const MatrixView& w, int64_t row, float* values) {
  read_values(w.table, row * w.cols, w.cols, values);
  for (int64_t k = 0; k < static_cast<int64_t>(divisor_.size()); ++k) values[k] *= divisor_[k];
  if (!finite(values, w.cols)) return false;
  if (precision_ == Precision::kInt4) {
    set_row_int4(n, values);
    return true;
  }
  uint8_t* lane = data_.data() + n / kPanel * chunks_ * kPanelChunkBytes + n % kPanel * 4;
  constexpr int64_t kGroupStride = kPanel * 4;  // consecutive groups, chunk after chunk
  if (precision_ == Precision::kFp32) {
    for (int64_t k = 0; k < w.cols; ++k) std::memcpy(lane + k * kGroupStride, values + k, 4);
  } else if (precision_ == Precision::kBf16) {
    for (int64_t k = 0; k < w.cols; ++k) {
      const uint16_t bits = float_to_bf16(values[k]);
      std::memcpy(lane + k / 2 * kGroupStride + k % 2 * 2, &bits, 2);
    }
  } else {
    const Scale scale(values, w.cols);
    int32_t sum = 0;
    for (int64_t k = 0; k < w.cols; ++k) {
      const int8_t q = scale.quantize(values[k]);
      lane[k / 4 * kGroupStride + k % 4] = static_cast<uint8_t>(q);
      sum += q;
    }
    scale_[n] = scale.scale;
    compensation_[n] = -128 * sum;
  }
  return true;
}

void PackedLinear::set_row_int4(int64_t n, const float* values) {
  uint8_t* record = data_.data() + n / kPanel * panel_bytes(precision_, chunks_, group_);
  for (int64_t begin = 0; begin < chunks_ * 64; begin += group_) {
    const int64_t count = std::min(group_, std::max<int64_t>(0, in_features_ - begin));
    const int64_t stored = std::min(group_, chunks_ * 64 - begin);
    float group[kInt4MaxGroup] = {};
    std::copy_n(values + begin, count, group);
    const GroupScale scale(group, group_);
    std::memcpy(record + n % kPanel * 2, &scale.bits, 2);
    uint8_t* lane = record + kInt4ScaleBytes + n % kPanel * 4;
    for (int64_t k = 0; k < stored; ++k) {
      const int value = 8 + (k < count ? scale.quantize(group[k]) : 0);
      uint8_t& byte = lane[k / 8 * kPanel * 4 + k % 4];
      byte = static_cast<uint8_t>(k % 8 < 4 ? value : byte | value << 4);
    }
    record += kInt4ScaleBytes + stored * kPanel / 2;
  }
}

LinearView PackedLinear::view() const {
  if (borrowed_.data != nullptr) return borrowed_;
  return {data_.data(),
          scale_.data(),
          bias_.data(),
          compensation_.data(),
          out_features_,
          chunks_,
          panel_bytes(precision_, chunks_, group_),
          group_};
}

}  // namespace xfast
