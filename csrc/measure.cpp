#include "measure.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>

#include "buffer.h"
#include "thread_pool.h"

namespace xfast {
namespace {

// Calls step() on every thread until the time is over; step returns its amount of work. Returns 1e9 units per second.
double rate(int threads, double seconds, const std::function<int64_t(const Member&)>& step) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int64_t> work{0};
  std::atomic<double> longest{0.0};
  run_parallel(threads, [&](const Member& member) {
    step(member);  // reaches the clock rate of wide instructions
    member.barrier->wait();
    const auto start = Clock::now();
    int64_t done = 0;
    double spent = 0.0;
    do {
      done += step(member);
      spent = std::chrono::duration<double>(Clock::now() - start).count();
    } while (spent < seconds);
    work += done;
    for (double seen = longest; spent > seen && !longest.compare_exchange_weak(seen, spent);) {
    }
  });
  return static_cast<double>(work) / longest / 1e9;
}

}  // namespace

double measure_arithmetic(const KernelTable& kernels, Precision precision, int threads, double seconds) {
  constexpr int64_t kIterations = 20000;
  return rate(threads, seconds, [&](const Member&) { return kernels.spin(precision, kIterations); });
}

double measure_read(const KernelTable& kernels, int threads, double seconds) {
  // A thread; all of them more than any cache, and no more than a container with many cores and little memory has.
  const int64_t bytes = std::clamp((int64_t{2} << 30) / threads, int64_t{16} << 20, int64_t{128} << 20) / 256 * 256;
  const AlignedBuffer memory(bytes * threads);
  std::memset(memory.data(), 0, memory.bytes());
  return rate(threads, seconds, [&](const Member& member) {
    const float* mine = reinterpret_cast<const float*>(memory.data() + member.id * bytes);
    volatile float sum = kernels.read_all(mine, bytes / 4);
    static_cast<void>(sum);
    return bytes;
  });
}

}  // namespace xfast
