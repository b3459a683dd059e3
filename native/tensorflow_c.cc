#include "tensorflow_c.h"

#include <dlfcn.h>

#include <initializer_list>

namespace evennorm {

bool find_tensorflow() {
  void* library = nullptr;
  for (const char* name :
       {"libtensorflow_framework.so.2", "libtensorflow_framework.2.dylib", "@rpath/libtensorflow_framework.2.dylib"}) {
    if (library == nullptr) library = dlopen(name, RTLD_NOLOAD | RTLD_LAZY);
  }
  if (library == nullptr) return false;
#define EVENNORM_FIND(Result, name, Arguments)                   \
  name = reinterpret_cast<decltype(name)>(dlsym(library, #name)); \
  if (name == nullptr) return false;
  EVENNORM_TENSORFLOW(EVENNORM_FIND)
#undef EVENNORM_FIND
  return true;
}

}  // namespace evennorm
