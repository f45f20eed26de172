#include "openmp.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

#include "clock.h"

namespace xfast::openmp {
namespace {

// The entry points of the OpenMP that torch calls, by GNU's interface, which LLVM's and Intel's have as well.
struct Runtime {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;
  bool there = false;

  Runtime() {
    // As torch's own calls are bound: first to what all libraries see (LD_PRELOAD), then to what it is linked to. All
    // of them from one place, for there may be two OpenMPs.
    there = find_all(RTLD_DEFAULT);
    if (there) return;
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    there = torch != nullptr && find_all(torch);
  }

 private:
  bool find_all(void* where) {
    return find(where, "GOMP_parallel", parallel) && find(where, "omp_get_thread_num", thread_num) &&
           find(where, "omp_get_num_threads", num_threads) && find(where, "omp_get_max_threads", max_threads) &&
           find(where, "omp_in_parallel", in_parallel);
  }
  template <class F>
  static bool find(void* where, const char* name, F& function) {
    function = reinterpret_cast<F>(dlsym(where, name));
    return function != nullptr;
  }
};

std::atomic<bool> forked{false};
enum class Policy { kAuto, kAlways, kNever };
std::atomic<Policy> policy{Policy::kAuto};
std::atomic<int64_t> regions{0};

// Whether this process is a copy of another one (PF_FORKNOEXEC of Linux); true where that cannot be read.
bool is_copy() {
  FILE* file = std::fopen("/proc/self/stat", "r");
  if (file == nullptr) return true;
  char text[1024];
  const size_t size = std::fread(text, 1, sizeof text - 1, file);
  std::fclose(file);
  text[size] = 0;
  const char* name_end = std::strrchr(text, ')');  // the name may hold anything
  unsigned flags = 0;
  if (name_end == nullptr || std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) != 1) return true;
  constexpr unsigned kForkNoExec = 0x40;
  return (flags & kForkNoExec) != 0;
}

const Runtime* runtime() {
  if (forked.load(std::memory_order_relaxed) || policy.load(std::memory_order_relaxed) == Policy::kNever)
    return nullptr;
  static const Runtime loaded;
  return loaded.there ? &loaded : nullptr;
}

// The runtime, if it would give the calling thread `threads` threads.
const Runtime* runtime_for(int threads) {
  const Runtime* omp = runtime();
  return omp != nullptr && threads > 1 && omp->max_threads() == threads && omp->in_parallel() == 0 ? omp : nullptr;
}

// What one thread knows of its OpenMP threads: the first stands for all of them.
struct Helper {
  int pushed = 0;  // regions that were pushed aside
  bool suspected = false, known = false;
  clockid_t clock{};                   // its processor time
  int64_t looked = 0, looked_cpu = 0;  // when it was looked at last, and its processor time then

  void learn(int threads) {
    pushed = 0;
    suspected = false;
    known = run(threads, [this](int id) {  // only the thread itself can tell
      if (id == 1) pthread_getcpuclockid(pthread_self(), &clock);
    });
  }
  void update() {
    looked_cpu = clock_ns(clock);
    looked = clock_ns(CLOCK_MONOTONIC);
    known = looked_cpu >= 0;
  }
};
thread_local Helper helper;

struct Region {
  const Runtime& omp;
  const std::function<void(int)>& body;
  int threads;
  bool complete;  // written by thread 0
};

void member(void* data) noexcept {  // nothing can be thrown through OpenMP
  Region& region = *static_cast<Region*>(data);
  const int id = region.omp.thread_num();
  const bool complete = region.omp.num_threads() == region.threads;
  if (id == 0) region.complete = complete;
  if (complete) region.body(id);
}

}  // namespace

void prepare() {
  forked.store(is_copy());
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}

void suspect(int threads) {
  if (helper.known || runtime_for(threads) == nullptr) return;
  constexpr int kTimes = 3;
  helper.pushed = std::min(helper.pushed + 1, kTimes);
  helper.suspected = helper.pushed == kTimes;
}

bool look(int threads) {
  if (runtime_for(threads) == nullptr) return false;
  if (!helper.known && helper.suspected) helper.learn(threads);
  if (!helper.known) return false;
  const int64_t before = clock_ns(helper.clock);
  helper.update();
  return helper.looked_cpu > before;
}

bool awake(int threads) {
  if (runtime_for(threads) == nullptr) return false;
  if (policy.load(std::memory_order_relaxed) == Policy::kAlways) return true;
  if (!helper.known) return false;
  constexpr int64_t kStale = 5000000;
  const int64_t wall = clock_ns(CLOCK_MONOTONIC) - helper.looked;
  return wall < kStale && 2 * (clock_ns(helper.clock) - helper.looked_cpu) > wall;
}

bool run(int threads, const std::function<void(int id)>& body) {
  const Runtime* omp = runtime();
  if (omp == nullptr) return false;
  Region region{*omp, body, threads, false};
  omp->parallel(&member, &region, static_cast<unsigned>(threads), 0);
  if (helper.known) helper.update();  // they spin on: the next region may follow at once
  if (region.complete) regions.fetch_add(1, std::memory_order_relaxed);
  return region.complete;
}

bool set_policy(const char* name) {
  constexpr const char* kNames[] = {"auto", "always", "never"};
  for (int i = 0; i < 3; ++i)
    if (std::strcmp(name, kNames[i]) == 0) {
      policy.store(static_cast<Policy>(i));
      return true;
    }
  return false;
}

int64_t regions_run() { return regions.load(std::memory_order_relaxed); }

}  // namespace xfast::openmp
