// AVX-512 with the byte dot product (Cascade Lake, Ice Lake).
#define XFAST_TARGET avx512_vnni
#define XFAST_AVX512
#define XFAST_VNNI
#define XFAST_INTEL
#include "target.inc"
