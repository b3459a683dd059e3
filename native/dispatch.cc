// The best kernels that this processor has, chosen when they are first asked for.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "batch_norm.h"

namespace evennorm {

extern const Operations operations_baseline;
#if defined(__x86_64__)
extern const Operations operations_avx2, operations_avx512;
#endif

const Operations* operations(const char* name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (std::strcmp(name, "avx512") == 0) return avx512 ? &operations_avx512 : nullptr;
  if (std::strcmp(name, "avx2") == 0) return avx2 ? &operations_avx2 : nullptr;
#endif
  return std::strcmp(name, "baseline") == 0 ? &operations_baseline : nullptr;
}

const Operations& operations() {
  static const Operations& best = [&]() -> const Operations& {
    for (const char* name : {"avx512", "avx2"}) {
      if (const Operations* found = operations(name)) return *found;
    }
    return operations_baseline;
  }();
  return best;
}

}  // namespace evennorm
