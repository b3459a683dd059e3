// The thread pool of the XLA computation that calls, as Workers.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "workers.h"
#include "xla/ffi/api/ffi.h"

namespace evennorm {

class XlaWorkers final : public Workers {
 public:
  // `limit` threads at most; 0 for as many as the pool has.
  XlaWorkers(xla::ffi::ThreadPool pool, int limit)
      : pool_(pool), count_(std::clamp<int64_t>(limit > 0 ? limit : pool.num_threads(), 1, kMost)) {}

  int count() const override { return count_; }

  void run(int64_t tasks, void (*work)(const void*, int64_t), const void* context) override {
    const int threads = static_cast<int>(std::min<int64_t>(tasks, count_));
    const auto team = std::make_shared<Team>(tasks, threads, work, context);
    for (int thread = 1; thread < threads; ++thread) pool_.Schedule([team, thread] { team->help(thread); });
    team->lead();
  }

 private:
  static constexpr int64_t kMost = 64;

  // This thread may be one of the pool's, and all others may be waiting elsewhere: nobody waits for a helper that has not begun.
  // One that comes too late finds the team closed, which is why it owns a part of it.
  class Team {
   public:
    Team(int64_t tasks, int threads, void (*work)(const void*, int64_t), const void* context)
        : threads_(threads), work_(work), context_(context) {
      for (int t = 0; t < threads; ++t) {
        shares_[t].next.store(tasks * t / threads, std::memory_order_relaxed);
        shares_[t].end = tasks * (t + 1) / threads;
      }
    }

    void help(int thread) {
      busy_.fetch_add(1);
      if (!closed_.load()) work(thread);
      busy_.fetch_sub(1);
      busy_.notify_all();
    }

    void lead() {
      work(0);
      closed_.store(true);
      for (int spin = 0; spin < kSpins && busy_.load() != 0; ++spin) pause();
      for (int busy; (busy = busy_.load()) != 0;) busy_.wait(busy);
    }

   private:
    static constexpr int kSpins = 2000;  // some 30 us: what is left of a task

    struct alignas(64) Share {
      std::atomic<int64_t> next;
      int64_t end;
    };

    static void pause() {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }

    // Everybody begins with a share of their own, and then helps the others.
    void work(int thread) {
      for (int i = 0; i < threads_; ++i) {
        Share& share = shares_[(thread + i) % threads_];
        for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) work_(context_, task);
      }
    }

    int threads_;
    void (*work_)(const void*, int64_t);
    const void* context_;
    std::atomic<int> busy_{0};
    std::atomic<bool> closed_{false};
    Share shares_[kMost];
  };

  xla::ffi::ThreadPool pool_;
  int64_t count_;
};

}  // namespace evennorm
