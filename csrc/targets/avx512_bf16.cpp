// AVX-512 with byte and bf16 dot products (Cooper Lake, Sapphire Rapids, Zen 4 and later).
#define XFAST_TARGET avx512_bf16
#define XFAST_AVX512
#define XFAST_VNNI
#define XFAST_BF16
#include "target.inc"
