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
};

constexpr const char* kExported = "evennorm.kernels._cpu.exported";

}  // namespace evennorm
