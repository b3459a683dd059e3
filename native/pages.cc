#include "pages.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <deque>
#include <mutex>

namespace evennorm {
namespace {

constexpr size_t kHuge = 2 << 20;

size_t mapped_bytes(size_t bytes) { return (bytes + kHuge - 1) & ~(kHuge - 1); }

struct Kept {
  void* data;
  size_t bytes;
};

// Never destroyed: tensors may outlive static objects.
struct Buffers {
  std::mutex mutex;
  std::deque<Kept> kept;  // the one unused longest in front
  size_t bytes = 0, limit = size_t{256} << 20;
};

Buffers& buffers() {
  static Buffers* const all = [] {
    Buffers* const fresh = new Buffers;
    pthread_atfork([] { buffers().mutex.lock(); }, [] { buffers().mutex.unlock(); }, [] { buffers().mutex.unlock(); });
    return fresh;
  }();
  return *all;
}

void shrink(Buffers& all, size_t limit) {
  while (all.bytes > limit) {
    munmap(all.kept.front().data, all.kept.front().bytes);
    all.bytes -= all.kept.front().bytes;
    all.kept.pop_front();
  }
}

}  // namespace

void advise_huge([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace {
std::atomic<int64_t> past_cache{kPastCache};
}

void write_past_cache_from(int64_t bytes) { past_cache.store(bytes, std::memory_order_relaxed); }

int64_t past_cache_from() { return past_cache.load(std::memory_order_relaxed); }

void* take_buffer(size_t bytes) {
  const size_t wanted = mapped_bytes(bytes);
  Buffers& all = buffers();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    for (auto at = all.kept.rbegin(); at != all.kept.rend(); ++at) {  // the last one given is warm
      if (at->bytes != wanted) continue;
      void* const data = at->data;
      all.bytes -= wanted;
      all.kept.erase(std::next(at).base());
      return data;
    }
  }
  // One huge page too many, cut off where the alignment does not need it.
  void* const raw = mmap(nullptr, wanted + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(raw);
  char* const data = begin + (mapped_bytes(reinterpret_cast<uintptr_t>(begin)) - reinterpret_cast<uintptr_t>(begin));
  if (data != begin) munmap(begin, static_cast<size_t>(data - begin));
  if (data + wanted != begin + wanted + kHuge) munmap(data + wanted, static_cast<size_t>(begin + wanted + kHuge - (data + wanted)));
  advise_huge(data, static_cast<int64_t>(wanted));
  return data;
}

void give_buffer(void* data, size_t bytes) {
  Buffers& all = buffers();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.kept.push_back({data, mapped_bytes(bytes)});
  all.bytes += mapped_bytes(bytes);
  shrink(all, all.limit);
}

void set_buffer_limit(size_t bytes) {
  Buffers& all = buffers();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.limit = bytes;
  shrink(all, bytes);
}

size_t buffered_bytes() {
  Buffers& all = buffers();
  std::lock_guard<std::mutex> lock(all.mutex);
  return all.bytes;
}

}  // namespace evennorm
