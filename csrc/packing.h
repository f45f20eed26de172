// Padded batches <-> packed tokens, on the CPU: one pass that also checks every value, before any kernel reads them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "thread_pool.h"

namespace xfast {

// A [batch or 1, length] view of int64 values; null data = not given. A single row is shared by the whole batch.
struct IdView {
  const int64_t* data = nullptr;
  bool one_row = false;
  int64_t at(int64_t row, int64_t col, int64_t length) const { return data[(one_row ? 0 : row * length) + col]; }
};

enum class MaskType : int { kNone, kI64, kI32, kU8, kF32 };

struct UnpadArgs {
  int64_t batch, length;
  IdView ids;           // null when embeddings are given instead
  IdView position_ids;  // null = by rule
  IdView type_ids;      // null = all zero
  const void* mask;     // [batch, length] of 0 and 1, or null = all real
  MaskType mask_type;
  int64_t vocab, positions, types;
  // Position rule: padding_idx < 0: 0, 1, 2, ... for every column (BERT). Otherwise (RoBERTa family) ids other than
  // padding_idx count padding_idx + 1, padding_idx + 2, ... and padding keeps padding_idx; without ids, columns count.
  int64_t padding_idx;
};

// What stopped unpad(): the first bad element, as (row, col, value). kPosition also covers sequences that are too long.
enum class UnpadError : int { kNone, kToken, kMask, kType, kPosition };
struct UnpadResult {
  UnpadError error = UnpadError::kNone;
  int64_t row = 0, col = 0;
  double value = 0;
  int64_t total = 0;         // packed tokens written
  int64_t first_masked = 0;  // sequences whose column 0 is masked
};

// Writes the packed arrays (room for batch * length each; cu_seqlens: batch + 1). indices[t] = row * length + col.
UnpadResult unpad(const UnpadArgs& args, int32_t* ids, int32_t* position_ids, int32_t* type_ids, int32_t* indices,
                  int32_t* cu_seqlens);

// Calls token(t, slot) for the slots in `slots` that packed token t owns, and padding(slot) for the others. indices
// ascend.
template <class Token, class Padding>
void walk_slots(Range slots, const int32_t* indices, int64_t total, Token&& token, Padding&& padding) {
  int64_t t = std::lower_bound(indices, indices + total, slots.begin) - indices;
  for (int64_t slot = slots.begin; slot < slots.end; ++slot) {
    if (t < total && indices[t] == slot)
      token(t++, slot);
    else
      padding(slot);
  }
}

// out [slots, cols] = zeros, then out[indices[t]] = packed[t]. indices ascend and are below slots.
void pad(const float* packed, const int32_t* indices, int64_t total, int64_t slots, int64_t cols, float* out,
         int threads);

}  // namespace xfast
