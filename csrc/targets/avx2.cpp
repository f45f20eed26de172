// AVX2 + FMA (Haswell, Zen and later).
#define XFAST_TARGET avx2
#define XFAST_AVX2
#define XFAST_BF16_NOTE \
  "no bf16 instruction here: values are widened to fp32, so bf16 is slower than int8 and no faster than fp32"
#include "target.inc"
