// What the extension for torch uses of evennorm.kernels._cpu, so that a process has one set of workers and buffers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "batch_norm.h"

namespace evennorm {

struct Exported {
  const Operations& (*operations)();
  Workers& (*workers)();
  void* (*take_buffer)(size_t bytes);
  void (*give_buffer)(void* data, size_t bytes);
  void (*advise_huge)(void* data, int64_t bytes);
  // Of float32 or float64: by one batch of `count` values per channel.
  bool (*update_running_stats)(Dtype dtype, const Running& running, const void* mean, const void* mean_low, const void* variance,
                               int64_t count, int64_t channels);
};

constexpr const char* kExported = "evennorm.kernels._cpu.exported";

}  // namespace evennorm
