// Preloaded into a process, makes its CPU look like one without AVX-512, AMX and, unless compiled with -DSHOW_AVX_VNNI,
// AVX-VNNI.
//
//     cc -O2 -shared -fPIC -Wl,-z,initfirst -o cpuid_mask.so cpuid_mask.c && LD_PRELOAD=$PWD/cpuid_mask.so program
//
// ONNX Runtime and OpenVINO choose their kernels by CPUID alone and have no switch. Linux can make the instruction fault
// (arch_prctl ARCH_SET_CPUID, needs the cpuid_fault flag in /proc/cpuinfo); the handler runs it and clears feature bits.
// The setting holds for every thread started later. A process where the kernel refuses it ends with status 97.
#define _GNU_SOURCE
#include <cpuid.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

enum { kArchSetCpuid = 0x1012, kRefused = 97 };

static long allow_cpuid(unsigned long allowed) { return syscall(SYS_arch_prctl, kArchSetCpuid, allowed); }

static unsigned bit(int n) { return 1u << n; }

static void hide(unsigned leaf, unsigned subleaf, unsigned* eax, unsigned* ebx, unsigned* ecx, unsigned* edx) {
  if (leaf == 7 && subleaf == 0) {
    // AVX512 F, DQ, IFMA, PF, ER, CD, BW, VL
    *ebx &= ~(bit(16) | bit(17) | bit(21) | bit(26) | bit(27) | bit(28) | bit(30) | bit(31));
    // AVX512 VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
    *ecx &= ~(bit(1) | bit(6) | bit(11) | bit(12) | bit(14));
    // AVX512 4VNNIW, 4FMAPS, VP2INTERSECT, FP16; AMX BF16, TILE, INT8
    *edx &= ~(bit(2) | bit(3) | bit(8) | bit(23) | bit(22) | bit(24) | bit(25));
  } else if (leaf == 7 && subleaf == 1) {
#ifndef SHOW_AVX_VNNI
    *eax &= ~bit(4);
#endif
    *eax &= ~(bit(5) | bit(21) | bit(23));                    // AVX512-BF16, AMX-FP16, AVX-IFMA
    *edx &= ~(bit(4) | bit(5) | bit(8) | bit(10) | bit(19));  // AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX, AVX-VNNI-INT16, AVX10
  }
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  (void)info;
  greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
  const unsigned char* instruction = (const unsigned char*)registers[REG_RIP];
  if (instruction[0] != 0x0f || instruction[1] != 0xa2) {  // a real fault: let it happen again, unhandled
    signal(signal_number, SIG_DFL);
    return;
  }
  unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
  unsigned eax, ebx, ecx, edx;
  allow_cpuid(1);
  __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
  allow_cpuid(0);
  hide(leaf, subleaf, &eax, &ebx, &ecx, &edx);
  registers[REG_RAX] = eax;
  registers[REG_RBX] = ebx;
  registers[REG_RCX] = ecx;
  registers[REG_RDX] = edx;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void install(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGSEGV, &action, NULL);
  if (allow_cpuid(0) != 0) _exit(kRefused);
}
