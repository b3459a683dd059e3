#define EVENNORM_ISA baseline
#include "kernels.inc"
