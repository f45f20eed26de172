// Plain C++ for any CPU.
#define XFAST_TARGET portable
#include "target.inc"
