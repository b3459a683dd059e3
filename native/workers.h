// Threads that share the parts of one operation. How the parts are cut is never the workers' choice, so that the result does not
// depend on them.
#pragma once

#include <cstdint>

namespace evennorm {

class Workers {
 public:
  virtual ~Workers() = default;

  // How many threads may take part, this one included.
  virtual int count() const = 0;

  // Whether the others are awake more often than not, so that less work is worth their help.
  virtual bool awake() const { return false; }

  // Calls work(context, i) for every i in [0, tasks), each exactly once, and returns when all are done. Neighbouring parts go to
  // the same thread, the same ones each time where nobody is late, so that a second pass finds its data in that thread's cache.
  virtual void run(int64_t tasks, void (*work)(const void* context, int64_t i), const void* context) = 0;

  template <class Body>
  void each(int64_t tasks, const Body& body) {
    if (tasks == 1 || count() == 1) {
      for (int64_t i = 0; i < tasks; ++i) body(i);
    } else {
      run(tasks, [](const void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, &body);
    }
  }
};

class Serial final : public Workers {
 public:
  int count() const override { return 1; }
  void run(int64_t tasks, void (*work)(const void*, int64_t), const void* context) override {
    for (int64_t i = 0; i < tasks; ++i) work(context, i);
  }
};

// The threads of this process: those of the OpenMP runtime that a framework has brought along (torch's own), so that no two sets
// of threads compete for the cores; else a pool of our own. Serial inside another parallel region, and where the pool is busy.
Workers& process_workers();

// 0 is the initial setting: EVENNORM_NUM_THREADS, or else the framework's, or else the cores that this process may use.
void set_num_threads(int threads);
int num_threads();

}  // namespace evennorm
