#include "openmp.h"

#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include <atomic>

namespace xfast::openmp {
namespace {

// The entry points of the OpenMP that torch is linked to, by GNU's interface, which LLVM's and Intel's have as well.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool there = false;

  Runtime() {
    // Already loaded or not at all. Symbols are looked up in the library and in what it is linked to.
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    there = torch != nullptr && find(torch, "GOMP_parallel", parallel) &&
            find(torch, "omp_get_thread_num", thread_num) && find(torch, "omp_get_num_threads", num_threads) &&
            find(torch, "omp_get_max_threads", max_threads) && find(torch, "omp_in_parallel", in_parallel);
  }

 private:
  template <class F>
  static bool find(void* library, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(library, name));
    return function != nullptr;
  }
};

std::atomic<int64_t> regions{0};

// A child of fork() has none of its parent's threads, and OpenMP does not notice.
std::atomic<bool> forked{false};

const Runtime* runtime() {
  static const Runtime loaded;
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  static_cast<void>(registered);
  return loaded.there && !forked.load(std::memory_order_relaxed) ? &loaded : nullptr;
}

int64_t now_of(clockid_t clock) {
  timespec time{};
  return clock_gettime(clock, &time) == 0 ? time.tv_sec * int64_t{1000000000} + time.tv_nsec : -1;
}

// Threads of this process.
int tasks() {
  DIR* folder = opendir("/proc/self/task");
  if (folder == nullptr) return 0;
  int count = -2;  // "." and ".."
  while (readdir(folder) != nullptr) ++count;
  closedir(folder);
  return count;
}

// What one thread knows of its OpenMP threads: the processor time of the first stands for all of them.
struct Helper {
  int pushed = 0;  // times that a region was pushed aside, one soon after another
  int64_t pushed_at = 0;
  bool suspected = false, known = false;
  clockid_t clock{};
  int64_t looked = 0, looked_cpu = 0;  // when it was looked at last, and its processor time then, ns

  void update() {
    looked_cpu = now_of(clock);
    looked = now_of(CLOCK_MONOTONIC);
    known = looked_cpu >= 0;  // the thread may have ended
  }
  // Its own region starts the threads if they are not there, and a forked child could not use them any more.
  void learn(int threads) {
    suspected = false;
    known = run(threads, [this](int id) {
      if (id == 1) pthread_getcpuclockid(pthread_self(), &clock);
    });
  }
};
thread_local Helper helper;

struct Region {
  const Runtime& omp;
  const std::function<void(int)>& body;
  int threads;
  bool complete;  // written by thread 0
};

void member(void* data) {
  Region& region = *static_cast<Region*>(data);
  const int id = region.omp.thread_num();
  const bool complete = region.omp.num_threads() == region.threads;
  if (id == 0) region.complete = complete;
  if (complete) region.body(id);
}

}  // namespace

void suspect(int others) {
  const Runtime* omp = runtime();
  if (omp == nullptr || helper.known) return;
  constexpr int64_t kApart = 100000000;  // ns; rarer ones are another process
  constexpr int kTimes = 3;
  const int64_t now = now_of(CLOCK_MONOTONIC);
  helper.pushed = now - helper.pushed_at < kApart ? helper.pushed + 1 : 1;
  helper.pushed_at = now;
  helper.suspected = helper.pushed >= kTimes && tasks() >= 1 + others + omp->max_threads() - 1;
}

bool look(int threads) {
  const Runtime* omp = runtime();
  if (omp == nullptr || threads < 2 || omp->max_threads() != threads || omp->in_parallel() != 0) return false;
  if (!helper.known && helper.suspected) helper.learn(threads);
  if (!helper.known) return false;
  const int64_t before = helper.looked_cpu;
  helper.update();
  return helper.looked_cpu > before;
}

bool awake(int threads) {
  const Runtime* omp = runtime();
  if (omp == nullptr || !helper.known || omp->max_threads() != threads || omp->in_parallel() != 0) return false;
  constexpr int64_t kStale = 5000000;  // ns
  const int64_t wall = now_of(CLOCK_MONOTONIC) - helper.looked;
  return wall < kStale &&
         2 * (now_of(helper.clock) - helper.looked_cpu) > wall;  // more than half: it may be pushed aside
}

int64_t regions_run() { return regions.load(std::memory_order_relaxed); }

bool run(int threads, const std::function<void(int id)>& body) {
  const Runtime* omp = runtime();
  if (omp == nullptr) return false;
  Region region{*omp, body, threads, false};
  omp->parallel(&member, &region, static_cast<unsigned>(threads), 0);
  if (helper.known) helper.update();  // they spin on: the next region may follow at once
  if (region.complete) regions.fetch_add(1, std::memory_order_relaxed);
  return region.complete;
}

}  // namespace xfast::openmp
