// 64-byte aligned, uninitialised memory for weights and workspaces.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

namespace xfast {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes) : bytes_(bytes) {
    if (bytes <= 0) return;
    constexpr int64_t kHuge = int64_t{1} << 21;
    const int64_t alignment = bytes >= kHuge ? kHuge : 64;
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, (bytes + alignment - 1) / alignment * alignment) != 0)
      throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(memory);
#ifdef MADV_HUGEPAGE
    if (bytes >= kHuge) madvise(data_, bytes, MADV_HUGEPAGE);  // a hint: fewer TLB misses on large weights
#endif
  }
  AlignedBuffer(AlignedBuffer&& other) noexcept { swap(other); }
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(AlignedBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
  }
  uint8_t* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Hands out consecutive 64-byte aligned pieces of one buffer. With a null base it only adds up sizes.
class Carver {
 public:
  explicit Carver(uint8_t* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

}  // namespace xfast
