// Clocks in nanoseconds.
#pragma once

#include <time.h>

#include <cstdint>

namespace xfast {

// CLOCK_MONOTONIC, or the processor time of a thread or the process; -1 when it has ended.
inline int64_t clock_ns(clockid_t clock) {
  timespec time{};
  return clock_gettime(clock, &time) == 0 ? time.tv_sec * int64_t{1000000000} + time.tv_nsec : -1;
}

}  // namespace xfast
