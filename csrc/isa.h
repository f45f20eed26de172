// Which instruction-set targets this CPU can run, and which one is in use.
// Built with baseline flags and without LTO, so that the probe itself can never hit an illegal instruction.
#pragma once

#include <string>
#include <vector>

#include "kernel_table.h"

namespace xfast {

// Targets built into this extension that this CPU can run, slowest first ("portable" is always there).
std::vector<std::string> available_targets();
// Targets built into this extension, whether or not this CPU can run them.
std::vector<std::string> built_targets();
// The table of a target by name; the fastest available one for "" or "auto".
// Throws std::invalid_argument for a name that is not built in or that this CPU cannot run.
const KernelTable& kernel_table(const std::string& name);

}  // namespace xfast
