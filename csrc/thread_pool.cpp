#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

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

class Pool {
 public:
  bool try_acquire() { return !busy_.exchange(true, std::memory_order_acquire); }
  void release() { busy_.store(false, std::memory_order_release); }

  // Makes sure of `wanted` workers; fewer when the system refuses more threads. Returns how many there are to use.
  int start_workers(int wanted) {
    try {
      for (; workers_ < wanted; ++workers_) {
        const int id = workers_ + 1;
        // Detached: workers live as long as the process, and joining at exit could hang an embedding program.
        std::thread([this, id] { work(id); }).detach();
      }
    } catch (const std::system_error&) {
    }
    return std::min(workers_, wanted);
  }

  void run(int threads, const std::function<void(const Member&)>& body) {
    Barrier barrier(threads);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = &body;
      barrier_ = &barrier;
      threads_ = threads;
      left_.store(threads - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(Member{0, threads, &barrier});
    for (int spin = 0; left_.load(std::memory_order_acquire) != 0; ++spin) relax(spin);
  }

 private:
  void work(int id) {
    int seen = 0;
    while (true) {
      // Stay hot for a moment between back-to-back calls, then sleep so that nobody else is slowed down.
      for (int spin = 0; spin < 2000 && generation_.load(std::memory_order_acquire) == seen; ++spin) relax(0);
      const std::function<void(const Member&)>* body;
      Barrier* barrier;
      int threads;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        body = body_;
        barrier = barrier_;
        threads = threads_;
      }
      if (id >= threads) continue;
      (*body)(Member{id, threads, barrier});
      left_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::atomic<bool> busy_{false};
  int workers_ = 0;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> generation_{0};
  std::atomic<int> left_{0};
  const std::function<void(const Member&)>* body_ = nullptr;
  Barrier* barrier_ = nullptr;
  int threads_ = 0;
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

Team::Team(int wanted) {
  if (wanted <= 1 || !pool().try_acquire()) return;
  pool_ = &pool();
  size_ = 1 + static_cast<Pool*>(pool_)->start_workers(std::min(wanted, kMaxThreads) - 1);
}

Team::~Team() {
  if (pool_ != nullptr) static_cast<Pool*>(pool_)->release();
}

void Team::run(const std::function<void(const Member&)>& body) const {
  if (pool_ != nullptr && size_ > 1) return static_cast<Pool*>(pool_)->run(size_, body);
  Barrier alone(1);
  body(Member{0, 1, &alone});
}

}  // namespace xfast
