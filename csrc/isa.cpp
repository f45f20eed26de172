#include "isa.h"

#include <stdexcept>

#ifdef XFAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace xfast {

namespace portable {
const KernelTable& table();
}
#ifdef XFAST_X86
namespace avx2 {
const KernelTable& table();
}
namespace avx2_vnni {
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
namespace amx {
const KernelTable& table();
}
#endif

namespace {

struct Target {
  const char* name;
  bool (*supported)();
  const KernelTable& (*table)();
  bool (*slower)() = nullptr;  // than the target before it: not taken unless asked for by name
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
// Asked for by number: gcc 11 has no name for it.
bool has_avx2_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAvxVnni = 1u << 4;
  return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & kAvxVnni) != 0;
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_bf16() { return has_vnni() && __builtin_cpu_supports("avx512bf16"); }
// Intel's cores with AVX-512 FP16 (Sapphire Rapids and later) start a vdpbf16ps every second cycle: half the rate at
// which they multiply the same values in fp32 (docs/cpu-tuning.md). But for bf16 the two targets are the same.
bool slow_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kFp16 = 1u << 23;
  return __builtin_cpu_is("intel") && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kFp16) != 0;
}

#ifdef XFAST_MODEL_AMX
bool has_amx() { return has_bf16(); }
#else
// The processor has tiles with int8 and bf16 products, the system saves them at a switch (XCR0 bits 17 and 18), and it
// lets this process use their 8 KiB a thread, which Linux (5.16 and later) wants to be asked for, once for all threads.
bool may_use_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (edx & kAll) != kAll) return false;
  unsigned low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if ((low >> 17 & 3) != 3) return false;
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  static const bool kMay = has_bf16() && may_use_amx();
  return kMay;
}
#endif
#endif

const Target kTargets[] = {
    {"portable", always, portable::table},
#ifdef XFAST_X86
    {"avx2", has_avx2, avx2::table},
    {"avx2_vnni", has_avx2_vnni, avx2_vnni::table},
    {"avx512", has_avx512, avx512::table},
    {"avx512_vnni", has_vnni, avx512_vnni::table},
    {"avx512_bf16", has_bf16, avx512_bf16::table, slow_bf16},
    {"amx", has_amx, amx::table},
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
  for (const Target& target : kTargets) {
    if (name != target.name) continue;
    if (target.supported()) return target.table();
    throw std::invalid_argument("instruction set '" + name +
                                "' is not supported by this CPU, which has: " + join(available_targets()));
  }
  if (!name.empty() && name != "auto")
    throw std::invalid_argument("unknown instruction set '" + name + "'; accepted: auto, " + join(built_targets()));
  const Target* best = nullptr;
  for (const Target& target : kTargets)
    if (target.supported() && (target.slower == nullptr || !target.slower())) best = &target;
  return best->table();
}

}  // namespace xfast
