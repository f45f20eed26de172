// AVX2 with the byte dot product (Intel's client CPUs since Alder Lake, its servers of efficient cores).
#define XFAST_TARGET avx2_vnni
#define XFAST_AVX2
#define XFAST_VNNI
#define XFAST_INTEL
#include "target.inc"
