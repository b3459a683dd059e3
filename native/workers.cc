#include "workers.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#if defined(__linux__)
#include <link.h>
#include <sched.h>
#endif

namespace evennorm {
namespace {

constexpr int kMostThreads = 256;

std::atomic<int> asked_threads{-1};  // -1: EVENNORM_NUM_THREADS was not read yet
std::atomic<bool> forked{false};     // in this process, since threads were started in its parent
thread_local bool inside = false;    // this thread is working on a part already

int from_environment() {
  const char* text = std::getenv("EVENNORM_NUM_THREADS");
  return text == nullptr ? 0 : std::max(0, std::atoi(text));
}

int cores() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// The tasks of one call. Every thread begins with a share of its own, always the same, and then helps the others.
class Tasks {
 public:
  Tasks(int64_t tasks, int threads, void (*work)(const void*, int64_t), const void* context)
      : threads_(threads), work_(work), context_(context) {
    for (int t = 0; t < threads; ++t) {
      shares_[t].next.store(tasks * t / threads, std::memory_order_relaxed);
      shares_[t].end = tasks * (t + 1) / threads;
    }
  }

  void work(int thread) {
    inside = true;
    for (int i = 0; i < threads_; ++i) {
      Share& share = shares_[(thread + i) % threads_];
      for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) work_(context_, task);
    }
    inside = false;
  }

 private:
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  int threads_;
  void (*work_)(const void*, int64_t);
  const void* context_;
  Share shares_[kMostThreads];
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of our own. They stay awake for the next part of an operation, some 50 us, and no longer: whoever spins takes a core from
// the framework's next operation, and to wake one up takes as long.
class Pool {
 public:
  // False where another thread is using the pool.
  bool run(Tasks& tasks, int threads) {
    std::unique_lock<std::mutex> only(in_use_, std::try_to_lock);
    if (!only.owns_lock()) return false;
    bool wake = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; started_ < threads - 1; ++started_) std::thread(&Pool::serve, this, started_ + 1).detach();
      tasks_ = &tasks;
      wanted_ = threads - 1;
      call_.fetch_add(1);
      wake = asleep_ > 0;
    }
    if (wake) wake_.notify_all();
    tasks.work(0);
    // Nothing is left to hand out: a thread that has not woken up yet is not waited for.
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_ = nullptr;
    }
    for (int spin = 0; spin < kSpins && busy_.load() != 0; ++spin) pause();
    if (busy_.load() == 0) return true;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_.load() == 0; });
    return true;
  }

 private:
  static constexpr int kSpins = 2000;

  void serve(int thread) {
    for (int64_t seen = 0;;) {
      for (int spin = 0; spin < kSpins && call_.load() == seen; ++spin) pause();
      std::unique_lock<std::mutex> lock(mutex_);
      ++asleep_;
      wake_.wait(lock, [&] { return call_.load() != seen; });
      --asleep_;
      seen = call_.load();
      if (tasks_ == nullptr || thread > wanted_) continue;
      Tasks* const tasks = tasks_;
      busy_.fetch_add(1);
      lock.unlock();
      tasks->work(thread);
      lock.lock();
      if (busy_.fetch_sub(1) == 1) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, done_;
  Tasks* tasks_ = nullptr;
  int started_ = 0, wanted_ = 0, asleep_ = 0;
  std::atomic<int> busy_{0};
  std::atomic<int64_t> call_{0};
};

// Never destroyed: its threads may outlive static objects. A forked child, which has none of them, starts another.
std::atomic<Pool*> pool{nullptr};

Pool& own_pool() {
  Pool* current = pool.load();
  if (current != nullptr) return *current;
  Pool* const fresh = new Pool;
  if (pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

// GNU's OpenMP runtime, where a framework has loaded it under its standard name: PyTorch's threads, which are awake after its own
// operations. Its threads do not survive a fork.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*max_threads)() = nullptr;
  int (*in_parallel)() = nullptr;

  explicit operator bool() const { return parallel && thread_num && max_threads && in_parallel; }
};

OpenMP find_openmp() {
  OpenMP found;
#if defined(__linux__)
  if (void* library = dlopen("libgomp.so.1", RTLD_NOLOAD | RTLD_LAZY)) {
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(library, "GOMP_parallel"));
    found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(library, "omp_get_thread_num"));
    found.max_threads = reinterpret_cast<decltype(found.max_threads)>(dlsym(library, "omp_get_max_threads"));
    found.in_parallel = reinterpret_cast<decltype(found.in_parallel)>(dlsym(library, "omp_in_parallel"));
  }
#endif
  return found;
}

#if defined(__linux__)
// How many libraries this process has loaded so far.
unsigned long long libraries_loaded() {
  unsigned long long count = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* adds) {
        *static_cast<unsigned long long*>(adds) = info->dlpi_adds;
        return 1;
      },
      &count);
  return count;
}
#endif

// Looked for until it is there: a framework may be imported after us. To look takes 30 us, so only where libraries were added.
const OpenMP* openmp() {
  static std::atomic<const OpenMP*> known{nullptr};
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  if (const OpenMP* found = known.load(std::memory_order_acquire)) return found;
#if defined(__linux__)
  static std::atomic<unsigned long long> looked_at{0};
  const unsigned long long loaded = libraries_loaded();
  if (looked_at.exchange(loaded, std::memory_order_relaxed) == loaded) return nullptr;
#endif
  const OpenMP found = find_openmp();
  if (!found) return nullptr;
  known.store(new OpenMP(found), std::memory_order_release);
  return known.load();
}

void after_fork_in_child() {
  forked = true;
  inside = false;
  pool = nullptr;  // left behind: its locks may be held by threads that are not here
}

class ProcessWorkers final : public Workers {
 public:
  int count() const override {
    if (inside) return 1;
    const OpenMP* const shared = openmp();
    if (shared != nullptr && shared->in_parallel()) return 1;
    return num_threads();
  }

  bool awake() const override { return openmp() != nullptr; }

  void run(int64_t tasks, void (*work)(const void*, int64_t), const void* context) override {
    const int threads = static_cast<int>(std::min<int64_t>(tasks, count()));
    Tasks shared_tasks(tasks, std::max(1, threads), work, context);
    if (threads > 1) {
      if (const OpenMP* const shared = openmp()) {
        struct Team {
          Tasks* tasks;
          int (*thread_num)();
        } team{&shared_tasks, shared->thread_num};
        shared->parallel(
            [](void* data) {
              Team* const these = static_cast<Team*>(data);
              these->tasks->work(these->thread_num());
            },
            &team, static_cast<unsigned>(threads), 0);
        return;
      }
      if (own_pool().run(shared_tasks, threads)) return;
    }
    const bool was_inside = inside;
    shared_tasks.work(0);
    inside = was_inside;
  }
};

}  // namespace

Workers& process_workers() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);
  static_cast<void>(registered);
  static ProcessWorkers* const workers = new ProcessWorkers;
  return *workers;
}

void set_num_threads(int threads) { asked_threads = threads > 0 ? threads : from_environment(); }

int num_threads() {
  int asked = asked_threads.load(std::memory_order_relaxed);
  if (asked < 0) asked_threads = asked = from_environment();
  if (asked == 0) {
    const OpenMP* const shared = openmp();
    asked = shared != nullptr ? shared->max_threads() : cores();
  }
  return std::min(std::max(1, asked), kMostThreads);
}

}  // namespace evennorm
