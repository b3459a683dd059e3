// Running statistics and counters, updated as core/running.py defines.
//
// Compiled once, without contraction: a channel's numbers do not depend on how many are computed together.
#pragma once

#include <cstdint>

#include "batch_norm.h"

namespace evennorm {

// Of a batch, for each channel. Optional arrays may be null, for 0.
template <class A>
struct Statistics {
  const A *mean, *mean_low, *variance;
};

// Updates running statistics by one batch of `count` values per group and channel. If the batch is
// empty or not finite, writes nothing and returns false. Ghost batches, (groups, channels), weigh the same.
template <class A>
bool update_running_stats(const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels, bool unbiased, double decay,
                          A* running_mean, A* running_mean_low, A* running_variance);

// The same for the running statistics of a call, whose counters it updates too. True if the call has none.
template <class A>
bool update_stats_and_counters(const Running& running, const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels);

}  // namespace evennorm
