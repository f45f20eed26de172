// AVX2 + FMA (Haswell, Zen and later).
#define XFAST_TARGET avx2
#define XFAST_AVX2
#include "target.inc"
