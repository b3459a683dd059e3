#define EVENNORM_ISA avx2
#include "kernels.inc"
