// Samples of weight memory, to notice in microseconds that someone wrote to it; and cache lines to fetch before that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace xfast {

class Probe {
 public:
  // Watches `bytes` bytes at `data`, which must stay readable as long as this object lives.
  void add(const void* data, int64_t bytes) {
    constexpr int64_t kSamples = 6, kWord = 8;
    if (bytes < kWord) return;
    const uint8_t* base = static_cast<const uint8_t*>(data);
    for (int64_t i = 0; i < kSamples; ++i) {
      const uint8_t* at = base + (bytes - kWord) * i / (kSamples - 1);
      samples_.push_back({at, read(at)});
    }
  }
  bool changed() const {
    for (const Sample& sample : samples_)
      if (read(sample.at) != sample.value) return true;
    return false;
  }

 private:
  struct Sample {
    const uint8_t* at;
    uint64_t value;
  };
  static uint64_t read(const uint8_t* at) {
    uint64_t value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  std::vector<Sample> samples_;
};

// Objects that are about to be read one after another, each through a chain of pointers, after a forward pass has
// driven them out of every cache: waiting for each line in turn takes longer than fetching all of them at once.
// Prefetching reads nothing and cannot fault, whatever has become of an object since.
class Prefetcher {
 public:
  // The object itself: `bytes` bytes at `object`.
  void add(uintptr_t object, int64_t bytes) {
    for (uintptr_t line = object / kLine * kLine; line < object + static_cast<uintptr_t>(bytes); line += kLine)
      lines_.push_back(line);
  }
  // What the object points at: `bytes` bytes from every word in it that may be an address. Reads `size` bytes, now.
  void add_targets(uintptr_t object, int64_t size, int64_t bytes) {
    constexpr uintptr_t kLowest = 1 << 16, kHighest = uintptr_t{1} << 47, kAlignment = 8;
    const uint8_t* words = reinterpret_cast<const uint8_t*>(object);
    for (int64_t at = 0; at + static_cast<int64_t>(sizeof(uintptr_t)) <= size; at += sizeof(uintptr_t)) {
      uintptr_t word;
      std::memcpy(&word, words + at, sizeof word);
      if (word >= kLowest && word < kHighest && word % kAlignment == 0) add(word, bytes);
    }
  }
  // Each line once, in the order of addresses.
  void finish() {
    std::sort(lines_.begin(), lines_.end());
    lines_.erase(std::unique(lines_.begin(), lines_.end()), lines_.end());
  }
  void run() const {
    for (uintptr_t line : lines_) __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 3);
  }

 private:
  static constexpr uintptr_t kLine = 64;
  std::vector<uintptr_t> lines_;
};

}  // namespace xfast
