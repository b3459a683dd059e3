#define EVENNORM_ISA avx512
#include "kernels.inc"
