// The masked-LM head (bindings_lm_head.cpp).
#pragma once

#include <pybind11/pybind11.h>

namespace xfast {

// Adds the function `lm_head`.
void bind_lm_head(pybind11::module_& m);

}  // namespace xfast
