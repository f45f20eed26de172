// Torch's own threads (OpenMP), borrowed while they are awake.
//
// After a parallel operation of torch - a task head, a pooling - its idle threads spin for milliseconds on the cores
// that an encoder needs next, and two threads that spin for one core hand it over every few milliseconds only. While
// they do, a region runs on them; otherwise on the extension's own threads, which leave the cores to others.
#pragma once

#include <cstdint>
#include <functional>

namespace xfast::openmp {

// Says that a region of the calling thread was pushed off its cores, perhaps by OpenMP's threads. Nothing here touches
// OpenMP before that has happened a few times: a process that never uses it stays without its threads. `others`:
// threads of the process beside the calling one that cannot be OpenMP's.
void suspect(int others);

// Looks at the calling thread's OpenMP threads; to be called shortly before `awake`. Whether they ran since it was
// called last.
bool look(int threads);

// Whether they ran all the time since `look` or the last region on them, and are `threads` with the calling thread.
bool awake(int threads);

// Runs body(id) on `threads` threads, the caller being id 0; false, with nothing run, when OpenMP gives fewer.
bool run(int threads, const std::function<void(int id)>& body);

// How many regions ran on them in this process.
int64_t regions_run();

}  // namespace xfast::openmp
