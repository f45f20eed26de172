// AVX-512 with AMX tiles for int8 and bf16 products (Sapphire Rapids and later Xeons, where the machine shows them).
#define XFAST_TARGET amx
#define XFAST_AVX512
#define XFAST_VNNI
#define XFAST_BF16
#define XFAST_AMX
#define XFAST_INTEL
#include "target.inc"
