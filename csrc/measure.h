// Times the loops of ceiling.h on all threads at once.
#pragma once

#include "kernel_table.h"

namespace xfast {

// 1e9 operations per second (a multiplication and an addition count as two) of the multiply-accumulate that `kernels`
// uses for `precision`, summed over `threads`, during about `seconds`.
double measure_arithmetic(const KernelTable& kernels, Precision precision, int threads, double seconds);

// 1e9 bytes per second read from memory too large for any cache, summed over `threads`.
double measure_read(const KernelTable& kernels, int threads, double seconds);

}  // namespace xfast
