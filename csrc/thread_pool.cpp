#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "clock.h"
#include "openmp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace xfast {
namespace {

void relax(int spin) {
  if (spin < 4000) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  } else {
    std::this_thread::yield();
  }
}

// Results must not depend on the floating-point mode that the caller happens to have set (torch.set_flush_denormal):
// every member computes in the default mode.
class DefaultFloatMode {
#if defined(__x86_64__)
 public:
  DefaultFloatMode() : before_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~DefaultFloatMode() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
 public:
  DefaultFloatMode() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    set(0);
  }
  ~DefaultFloatMode() { set(before_); }

 private:
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
  uint64_t before_;
#endif
};

class Pool {
 public:
  bool try_acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }

  // Makes sure of `wanted` workers; fewer when the system refuses more threads. Returns how many there are to use.
  int start_workers(int wanted) {
    try {
      workers_.reserve(wanted);  // a thread that has begun is never lost
      while (static_cast<int>(workers_.size()) < wanted) {
        auto worker = std::make_unique<Worker>();
        Worker* raw = worker.get();
        const int id = static_cast<int>(workers_.size()) + 1;
        // Detached: workers live as long as the process, and joining at exit could hang an embedding program.
        std::thread([this, raw, id] { work(*raw, id); }).detach();
        workers_.push_back(std::move(worker));
      }
    } catch (const std::exception&) {  // no more threads, or no memory for them
    }
    return std::min(static_cast<int>(workers_.size()), wanted);
  }

  // Wakes the workers that are there, so that they are awake when work comes.
  void alert(int wanted) {
    const int count = std::min(static_cast<int>(workers_.size()), wanted);
    for (int i = 0; i < count; ++i) {
      Worker& worker = *workers_[i];
      if (!worker.asleep.load(std::memory_order_acquire)) continue;
      {
        std::lock_guard<std::mutex> lock(worker.mutex);
        worker.alerted = true;
      }
      worker.wake.notify_one();
    }
  }

  void run(int threads, const std::function<void(const Member&)>& body) {
    Barrier barrier(threads);
    body_ = &body;
    barrier_ = &barrier;
    threads_ = threads;
    left_.store(threads - 1, std::memory_order_relaxed);
    const int64_t own = clock_ns(CLOCK_THREAD_CPUTIME_ID), all = watching_ ? clock_ns(CLOCK_PROCESS_CPUTIME_ID) : 0;
    rung_at_ = clock_ns(CLOCK_MONOTONIC);
    for (int id = 1; id < threads; ++id) {
      Worker& worker = *workers_[id - 1];
      {
        std::lock_guard<std::mutex> lock(worker.mutex);
        worker.generation.fetch_add(1, std::memory_order_release);
      }
      worker.wake.notify_one();
    }
    body(Member{0, threads, &barrier});
    for (int spin = 0; left_.load(std::memory_order_acquire) != 0; ++spin) relax(spin);
    account(own, all);
  }

 private:
  // Each worker has its own doorbell, so that a call wakes only the threads that it uses.
  struct Worker {
    std::mutex mutex;
    std::condition_variable wake;
    std::atomic<unsigned> generation{0};
    std::atomic<bool> asleep{false};
    bool alerted = false;
  };

  void work(Worker& self, int id) {
    [[maybe_unused]] const DefaultFloatMode mode;
    // Stay awake between back-to-back calls, at first hot, then giving way to whoever wants the core; then sleep.
    constexpr std::chrono::microseconds kHot{100}, kGivingWay{400}, kAlerted{1000};
    for (unsigned seen = 0;; ++seen) {
      bool rung = spin_for(self, seen, kHot, false) || spin_for(self, seen, kGivingWay, true);
      while (!rung) rung = sleep(self, seen) || spin_for(self, seen, kAlerted, false);
      const int64_t before = clock_ns(CLOCK_THREAD_CPUTIME_ID);
      (*body_)(Member{id, threads_, barrier_});
      count(clock_ns(CLOCK_THREAD_CPUTIME_ID) - before);
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  // A member is done after `used` ns of processor time; the rest was spent waiting for a core, or on page faults.
  void count(int64_t used) {
    used_.fetch_add(used, std::memory_order_relaxed);
    if (clock_ns(CLOCK_MONOTONIC) - rung_at_ - used > kPushedAside)
      pushed_aside_.store(true, std::memory_order_relaxed);
  }

  // After a region: was it pushed aside, and by this process? Only asked after one that was. `own`, `all`: processor
  // time of the caller and of the process when it began.
  void account(int64_t own, int64_t all) {
    count(clock_ns(CLOCK_THREAD_CPUTIME_ID) - own);
    const int64_t used = used_.exchange(0, std::memory_order_relaxed);
    const bool pushed = pushed_aside_.exchange(false, std::memory_order_relaxed);
    if (pushed && watching_ && clock_ns(CLOCK_PROCESS_CPUTIME_ID) - all - used > kPushedAside / 2)
      openmp::suspect(threads_);
    watching_ = pushed;
  }

  static bool spin_for(const Worker& self, unsigned seen, std::chrono::microseconds patience, bool give_way) {
    const auto end = std::chrono::steady_clock::now() + patience;
    do {
      if (give_way) std::this_thread::yield();
      for (int spin = 0; spin < 32; ++spin) {
        if (self.generation.load(std::memory_order_acquire) != seen) return true;
        relax(0);
      }
    } while (std::chrono::steady_clock::now() < end);
    return false;
  }

  // Until there is work, which is true, or an alert.
  static bool sleep(Worker& self, unsigned seen) {
    std::unique_lock<std::mutex> lock(self.mutex);
    const auto work = [&] { return self.generation.load(std::memory_order_relaxed) != seen; };
    self.alerted = false;
    self.asleep.store(true, std::memory_order_release);
    self.wake.wait(lock, [&] { return work() || self.alerted; });
    self.asleep.store(false, std::memory_order_relaxed);
    return work();
  }

  static constexpr int64_t kPushedAside = 500000;  // ns that a member did not run

  std::atomic<bool> busy_{false}, pushed_aside_{false};
  std::atomic<int64_t> used_{0};
  bool watching_ = false;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<int> left_{0};
  // The job at hand: written before the doorbells ring, read after.
  const std::function<void(const Member&)>* body_ = nullptr;
  Barrier* barrier_ = nullptr;
  int threads_ = 0;
  int64_t rung_at_ = 0;
};

// A forked child has none of the parent's threads, so it abandons the pool (a few hundred bytes) and starts anew.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  static_cast<void>(registered);
  Pool* existing = current_pool.load(std::memory_order_acquire);
  if (existing != nullptr) return *existing;
  Pool* fresh = new Pool;
  if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
  delete fresh;
  return *existing;
}

}  // namespace

void Barrier::wait() {
  if (members_ == 1) return;
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    return;
  }
  for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; ++spin) relax(spin);
}

void alert_workers(int threads) {
  if (threads <= 1 || !pool().try_acquire()) return;
  if (!openmp::look(threads)) pool().alert(threads - 1);
  pool().release();
}

Team::Team(int wanted) {
  if (wanted <= 1 || !pool().try_acquire()) return;
  pool_ = &pool();
  wanted = std::min(wanted, kMaxThreads);
  size_ = 1 + static_cast<Pool*>(pool_)->start_workers(wanted - 1);  // there in any case: OpenMP may give fewer
  borrowed_ = size_ == wanted && openmp::awake(wanted);
}

Team::~Team() {
  if (pool_ != nullptr) static_cast<Pool*>(pool_)->release();
}

void Team::run(const std::function<void(const Member&)>& body) const {
  [[maybe_unused]] const DefaultFloatMode mode;
  if (borrowed_) {
    Barrier barrier(size_);
    if (openmp::run(size_, [&](int id) {
          [[maybe_unused]] const DefaultFloatMode its_mode;
          body(Member{id, size_, &barrier});
        }))
      return;
  }
  if (pool_ != nullptr && size_ > 1) return static_cast<Pool*>(pool_)->run(size_, body);
  Barrier alone(1);
  body(Member{0, 1, &alone});
}

}  // namespace xfast
