#include "isa.h"

#include <stdexcept>

#ifdef XFAST_X86
#include <cpuid.h>
#endif

namespace xfast {

namespace portable {
const KernelTable& table();
}
#ifdef XFAST_X86
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512_vnni {
const KernelTable& table();
}
namespace avx512_bf16 {
const KernelTable& table();
}
#endif

namespace {

struct Target {
  const char* name;
  bool (*supported)();
  const KernelTable& (*table)();
};

bool always() { return true; }
#ifdef XFAST_X86
// Conversions of halves. Every CPU with AVX2 has them, but a virtual one may hide them, and clang 14 cannot ask by
// name.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
// __builtin_cpu_supports also checks that the operating system saves the wide registers (XGETBV).
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

const Target kTargets[] = {
    {"portable", always, portable::table},
#ifdef XFAST_X86
    {"avx2", has_avx2, avx2::table},
    {"avx512", has_avx512, avx512::table},
    {"avx512_vnni", has_vnni, avx512_vnni::table},
    {"avx512_bf16", has_bf16, avx512_bf16::table},
#endif
};

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

std::vector<std::string> available_targets() {
  std::vector<std::string> names;
  for (const Target& target : kTargets)
    if (target.supported()) names.emplace_back(target.name);
  return names;
}

std::vector<std::string> built_targets() {
  std::vector<std::string> names;
  for (const Target& target : kTargets) names.emplace_back(target.name);
  return names;
}

const KernelTable& kernel_table(const std::string& name) {
  const Target* best = nullptr;
  for (const Target& target : kTargets) {
    if (name == target.name) {
      if (!target.supported())
        throw std::invalid_argument("instruction set '" + name +
                                    "' is not supported by this CPU, which has: " + join(available_targets()));
      return target.table();
    }
    if (target.supported()) best = &target;
  }
  if (!name.empty() && name != "auto")
    throw std::invalid_argument("unknown instruction set '" + name + "'; accepted: auto, " + join(built_targets()));
  return best->table();
}

}  // namespace xfast
