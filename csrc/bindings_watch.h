// What notices changed weights (bindings_watch.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace xfast {

// Adds the class `Watch`.
void bind_watch(pybind11::module_& m);

}  // namespace xfast
