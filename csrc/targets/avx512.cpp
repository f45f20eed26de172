// AVX-512 F/BW/DQ/VL (Skylake-SP).
#define XFAST_TARGET avx512
#define XFAST_AVX512
#define XFAST_BF16_NOTE \
  "no bf16 instruction here: values are widened to fp32, so bf16 is slower than int8 and no faster than fp32"
#include "target.inc"
