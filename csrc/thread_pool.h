// The extension's own threads, which sleep when idle (OpenMP's spin and slow down whatever else runs in the process),
// or torch's while those spin anyway (openmp.h).
//
// A region runs one function on `threads` members that meet at barriers. How work is cut into members never changes
// a result: every output row is computed by one chain of operations, wherever it runs.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace xfast {

// Spinning barrier for the few microseconds between the phases of a layer; yields when a core is shared.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}
  void wait();

 private:
  const int members_;
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
};

struct Member {
  int id, count;
  Barrier* barrier;
};

struct Range {
  int64_t begin, end;
};

// A member's part of [begin, end): consecutive, all parts within one of each other.
inline Range share(const Member& member, int64_t begin, int64_t end) {
  const int64_t count = end - begin;
  return {begin + count * member.id / member.count, begin + count * (member.id + 1) / member.count};
}

// Up to `wanted` threads, the caller included, held for the lifetime of the object. size() is 1 when another caller
// holds the pool, so that concurrent calls neither queue nor deadlock, and less than wanted when the system refuses
// more threads. After fork() the child starts its own pool.
class Team {
 public:
  explicit Team(int wanted);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;
  int size() const { return size_; }
  // Runs body(member) on every member, the caller being member 0, and returns when all are done. Must not throw.
  void run(const std::function<void(const Member&)>& body) const;

 private:
  void* pool_ = nullptr;
  int size_ = 1;
  bool borrowed_ = false;  // torch's threads
};

// Says that a region on so many threads comes within a millisecond: sleeping threads wake meanwhile. Returns at once.
void alert_workers(int threads);

// Team(threads).run(body) for bodies that adapt to whatever member.count they get.
inline void run_parallel(int threads, const std::function<void(const Member&)>& body) { Team(threads).run(body); }

constexpr int kMaxThreads = 256;

// How many members Team(threads) has at most: memory that a body works in is made before, since a body must not throw.
inline int64_t most_members(int threads) { return threads < 1 ? 1 : threads < kMaxThreads ? threads : kMaxThreads; }

}  // namespace xfast
