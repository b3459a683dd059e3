#include "kept_memory.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__GLIBC__)
#include <dlfcn.h>
#include <gnu/libc-version.h>
#include <malloc.h>
#endif

namespace evennorm {

#if defined(__GLIBC__)
namespace {

std::string file_of(const void* function) {
  Dl_info found{};
  return dladdr(function, &found) != 0 && found.dli_fname != nullptr ? found.dli_fname : "";
}

struct Settings {
  int mapped, trimmed, padded, arenas;
};

// No piece mapped by itself; the heap's end never given back; asked for by 64 MB; one heap for all threads, since an arena of a
// thread's own ends at 64 MB, and what is larger is mapped by itself there whatever the first setting says.
constexpr Settings kKept{0, -1, 64 << 20, 1};
constexpr Settings kInitial{65536, 128 << 10, 128 << 10, 0};

}  // namespace

Allocator allocator() {
  const std::string serving = file_of(dlsym(RTLD_DEFAULT, "malloc"));
  const std::string own = file_of(reinterpret_cast<const void*>(&gnu_get_libc_version));
  if (serving != own) return {"malloc of " + serving, false};  // as by LD_PRELOAD
  return {std::string("glibc ") + gnu_get_libc_version(), true};
}

bool keep_memory(bool keep) {
  if (!allocator().settable) return false;
  const Settings set = keep ? kKept : kInitial;
  bool taken = mallopt(M_MMAP_MAX, set.mapped) == 1;
  taken = mallopt(M_TRIM_THRESHOLD, set.trimmed) == 1 && taken;
  taken = mallopt(M_TOP_PAD, set.padded) == 1 && taken;
  taken = mallopt(M_ARENA_MAX, set.arenas) == 1 && taken;
  if (!keep) {
    taken = mallopt(M_MMAP_THRESHOLD, 128 << 10) == 1 && taken;
    malloc_trim(0);
  }
  return taken;
}

int arenas() {
  if (!allocator().settable) return 0;
  char* text = nullptr;
  size_t size = 0;
  FILE* const file = open_memstream(&text, &size);
  if (file == nullptr) return 0;
  malloc_info(0, file);
  fclose(file);
  int found = 0;
  for (const char* at = text; (at = std::strstr(at, "<heap nr=")) != nullptr; ++at) ++found;
  std::free(text);
  return found;
}
#else
Allocator allocator() { return {"a C library other than glibc", false}; }

bool keep_memory(bool) { return false; }

int arenas() { return 0; }
#endif

}  // namespace evennorm
