// Argument checks shared by the binding files.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernel_table.h"

namespace xfast {

namespace py = pybind11;

using I32 = py::array_t<int32_t, py::array::c_style>;
using I64 = py::array_t<int64_t, py::array::c_style>;
using U8 = py::array_t<uint8_t, py::array::c_style>;
using F32 = py::array_t<float, py::array::c_style>;

inline void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

// Throws unless `array` is C-contiguous with the given shape (-1 = any size).
inline void require_array(const py::array& array, const char* name, const std::vector<int64_t>& shape) {
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size()) && (array.flags() & py::array::c_style) != 0;
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || array.shape(i) == shape[i];
  if (same) return;
  std::string wanted, got;
  for (int64_t size : shape) wanted += (wanted.empty() ? "" : ", ") + (size < 0 ? "n" : std::to_string(size));
  for (py::ssize_t i = 0; i < array.ndim(); ++i) got += (i ? ", " : "") + std::to_string(array.shape(i));
  throw py::value_error(std::string(name) + ": expected a contiguous array of shape (" + wanted + "), got (" + got +
                        ")");
}

// Rows of something with `size` rows (`what`): each at most once, in order.
inline void require_ascending(const I32& rows, const char* name, int64_t size, const char* what) {
  require_array(rows, name, {-1});
  const int32_t* values = rows.data();
  for (int64_t i = 0; i < rows.size(); ++i)
    if (values[i] < 0 || values[i] >= size || (i > 0 && values[i] <= values[i - 1]))
      throw py::value_error(std::string(name) + ": must ascend and be below " + what);
}

// `count` rows of a table with `size` rows.
inline void require_ids(const I32& ids, const char* name, int64_t count, int64_t size) {
  require_array(ids, name, {count});
  const int32_t* values = ids.data();
  for (int64_t i = 0; i < count; ++i)
    if (values[i] < 0 || values[i] >= size) throw py::value_error(std::string(name) + ": value out of range");
}

// NumPy's letter for the kind of values, or one that it does not have where their bytes are in another order.
inline char native_kind(const py::array& array) {
  const char order = array.dtype().byteorder();
  return order == '=' || order == '|' ? array.dtype().kind() : '>';
}

inline TableView table_view(const py::array& array, const char* name) {
  const char kind = native_kind(array);
  const auto size = array.dtype().itemsize();
  if (kind == 'f' && size == 4) return {array.data(), TableType::kF32};
  if (kind == 'f' && size == 2) return {array.data(), TableType::kF16};
  if (kind == 'u' && size == 2) return {array.data(), TableType::kBf16};
  throw py::value_error(std::string(name) + ": expected float32, float16 or uint16 (bf16 bits) values");
}

inline void require_divisor(const std::optional<F32>& divisor, Precision precision, int64_t in_features) {
  if (!divisor) return;
  require(is_quantised(precision), "divisor: quantised precisions only");
  require_array(*divisor, "divisor", {in_features});
}

inline void require_group(int64_t group) {
  require(group == 32 || group == 64 || group == 128, "group: expected 32, 64 or 128");
}

inline Precision precision_of(const std::string& name) {
  if (name == "fp32") return Precision::kFp32;
  if (name == "bf16") return Precision::kBf16;
  if (name == "int8") return Precision::kInt8;
  if (name == "int4") return Precision::kInt4;
  throw py::value_error("precision: expected fp32, bf16, int8 or int4, got " + name);
}

}  // namespace xfast
