// Single kernels for tests and benchmarks (bindings_kernels.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace xfast {

// Adds the submodule `kernels`: each function runs one kernel of one target on one thread.
void bind_kernels(pybind11::module_& m);

}  // namespace xfast
