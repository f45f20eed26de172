// Torch's own threads (OpenMP), borrowed while they are awake.
//
// After a parallel operation of torch - a task head, a pooling - its idle threads spin for milliseconds on the cores
// that an encoder needs next, and two threads that spin for one core hand it over every few milliseconds only. While
// they do, a region runs on them; otherwise on the extension's own threads, which leave the cores to others.
//
// OpenMP is asked for nothing until regions of the calling thread were pushed off their cores by other threads of the
// process, and never in a process that was forked and did not exec: there its threads may be gone without its knowing,
// and it would wait for them.
#pragma once

#include <cstdint>
#include <functional>

namespace xfast::openmp {

// To be called when the extension is loaded: forks are noticed from then on.
void prepare();

// Says that a region of the calling thread on `threads` threads was pushed aside by other threads of the process.
void suspect(int threads);

// Looks at the calling thread's OpenMP threads, shortly before `awake`. Whether they are running.
bool look(int threads);

// Whether they ran most of the time since `look` or the last region on them, and are `threads` with the caller.
bool awake(int threads);

// Runs body(id), which must not throw, on `threads` threads, the caller being id 0; false, with nothing run, when
// OpenMP gives fewer.
bool run(int threads, const std::function<void(int id)>& body);

// For tests: "auto"; "always": `awake` wherever there is an OpenMP; "never". False: another name.
bool set_policy(const char* name);

// How many regions ran on them in this process.
int64_t regions_run();

}  // namespace xfast::openmp
