// AVX-512 F/BW/DQ/VL (Skylake-SP).
#define XFAST_TARGET avx512
#define XFAST_AVX512
#define XFAST_INTEL
#include "target.inc"
