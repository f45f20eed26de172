#include "packing.h"

#include <algorithm>
#include <cstring>

#include "thread_pool.h"

namespace xfast {
namespace {

double mask_value(const UnpadArgs& args, int64_t i) {
  switch (args.mask_type) {
    case MaskType::kNone: return 1;
    case MaskType::kI64: return static_cast<double>(static_cast<const int64_t*>(args.mask)[i]);
    case MaskType::kI32: return static_cast<const int32_t*>(args.mask)[i];
    case MaskType::kU8: return static_cast<const uint8_t*>(args.mask)[i];
    case MaskType::kF32: return static_cast<const float*>(args.mask)[i];
  }
  return 1;
}

bool inside(int64_t value, int64_t size) { return value >= 0 && value < size; }

}  // namespace

UnpadResult unpad(const UnpadArgs& args, int32_t* ids, int32_t* position_ids, int32_t* type_ids, int32_t* indices,
                  int32_t* cu_seqlens) {
  UnpadResult result;
  const auto fail = [&](UnpadError error, int64_t row, int64_t col, double value) {
    result.error = error;
    result.row = row;
    result.col = col;
    result.value = value;
    return result;
  };
  int64_t t = 0;
  cu_seqlens[0] = 0;
  for (int64_t row = 0; row < args.batch; ++row) {
    int64_t seen = 0;  // ids other than padding so far in this row
    for (int64_t col = 0; col < args.length; ++col) {
      const int64_t i = row * args.length + col;
      const double keep = mask_value(args, i);
      if (!(keep == 0 || keep == 1)) return fail(UnpadError::kMask, row, col, keep);
      const int64_t id = args.ids.data != nullptr ? args.ids.at(row, col, args.length) : -1;
      if (args.ids.data != nullptr && !inside(id, args.vocab))
        return fail(UnpadError::kToken, row, col, static_cast<double>(id));
      const int64_t type = args.type_ids.data != nullptr ? args.type_ids.at(row, col, args.length) : 0;
      if (args.type_ids.data != nullptr && !inside(type, args.types))
        return fail(UnpadError::kType, row, col, static_cast<double>(type));
      int64_t position = col;
      if (args.padding_idx >= 0) {
        const bool counts = args.ids.data == nullptr || id != args.padding_idx;
        seen += counts ? 1 : 0;
        position = args.padding_idx + (counts ? seen : 0);
      }
      if (args.position_ids.data != nullptr) position = args.position_ids.at(row, col, args.length);
      if (!inside(position, args.positions))
        return fail(UnpadError::kPosition, row, col, static_cast<double>(position));
      if (keep == 0) {
        result.first_masked += col == 0 ? 1 : 0;
        continue;
      }
      if (args.ids.data != nullptr) ids[t] = static_cast<int32_t>(id);
      position_ids[t] = static_cast<int32_t>(position);
      type_ids[t] = static_cast<int32_t>(type);
      indices[t++] = static_cast<int32_t>(i);
    }
    cu_seqlens[row + 1] = static_cast<int32_t>(t);
  }
  result.total = t;
  return result;
}

void pad(const float* packed, const int32_t* indices, int64_t total, int64_t slots, int64_t cols, float* out,
         int threads) {
  const size_t row_bytes = cols * sizeof(float);
  run_parallel(threads, [&](const Member& member) {
    walk_slots(
        share(member, 0, slots), indices, total,
        [&](int64_t t, int64_t slot) { std::memcpy(out + slot * cols, packed + t * cols, row_bytes); },
        [&](int64_t slot) { std::memset(out + slot * cols, 0, row_bytes); });
  });
}

}  // namespace xfast
