#include "running.h"

#include <cmath>

#include "channel_blocks.h"

namespace evennorm {
namespace {

template <class A>
struct Average {
  A mean_low[kTogether], variance[kTogether];
};

// The averages over ghost batches of what lies beyond the first one's mean, and of the variance, for the channels from `from` on.
template <class A>
Average<A> average_of(const Statistics<A>& batch, int64_t from, int64_t width, int64_t count, int64_t groups, int64_t channels,
                      bool unbiased) {
  const A correction = unbiased && count > 1 ? static_cast<A>(count) / static_cast<A>(count - 1) : A{1};
  Average<A> sum;  // written first, not cleared: that takes as long as the sums
  const A *const base = batch.mean + from, *const low = batch.mean_low + from, *const variance = batch.variance + from;
  for (int64_t c = 0; c < width; ++c) {
    sum.mean_low[c] = A{0} + ((base[c] - base[c]) + low[c]);
    sum.variance[c] = count == 1 ? 0 : A{0} + variance[c] * correction;
  }
  for (int64_t i = from + channels; i < groups * channels; i += channels) {
    for (int64_t c = 0; c < width; ++c) sum.mean_low[c] += (batch.mean[i + c] - base[c]) + batch.mean_low[i + c];
    if (count == 1) continue;  // of one value there is no variance
    for (int64_t c = 0; c < width; ++c) sum.variance[c] += batch.variance[i + c] * correction;
  }
  for (int64_t c = 0; groups > 1 && c < width; ++c) {
    sum.mean_low[c] /= static_cast<A>(groups);
    sum.variance[c] /= static_cast<A>(groups);
  }
  return sum;
}

}  // namespace

template <class A>
bool update_running_stats(const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels, bool unbiased, double decay,
                          A* running_mean, A* running_mean_low, A* running_variance) {
  if (count == 0 || groups == 0 || channels == 0) return false;
  const auto each_part = [&](const auto& body) {
    each_block(channels, [&](int64_t c, int64_t width) { body(c, width, average_of(batch, c, width, count, groups, channels, unbiased)); });
  };
  A poison[kTogether] = {};  // 0 as long as all is finite, else NaN: loops that leave early are no vectors
  each_part([&](int64_t from, int64_t width, const Average<A>& is) {
    for (int64_t c = 0; c < width; ++c) poison[c] += (batch.mean[from + c] + is.mean_low[c]) * A{0} + is.variance[c] * A{0};
  });
  for (const A p : poison) {
    if (p != 0) return false;
  }
  const A share = static_cast<A>(1 - decay), old_share = static_cast<A>(decay);
  each_part([&](int64_t from, int64_t width, const Average<A>& is) {
    A *const mean = running_mean + from, *const mean_low = running_mean_low + from, *const variance = running_variance + from;
    for (int64_t c = 0; c < width; ++c) {
      // More than rounding, or NaN, is not of this mean: it was set from outside.
      const A old = mean[c], kept = mean_low[c], before = std::abs(kept) <= static_cast<A>(0x1p-24) * std::abs(old) ? kept : A{0};
      const A low = before + ((batch.mean[from + c] - old) + (is.mean_low[c] - before)) * share;
      const A now = old + low;
      mean[c] = now;
      mean_low[c] = low - (now - old);
    }
    if (count == 1) return;
    // From the nearer end: with decay 0, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
    if (decay < 0.5) {
      for (int64_t c = 0; c < width; ++c) variance[c] = is.variance[c] + (variance[c] - is.variance[c]) * old_share;
    } else {
      for (int64_t c = 0; c < width; ++c) variance[c] = variance[c] + (is.variance[c] - variance[c]) * share;
    }
  });
  return true;
}

template <class A>
bool update_stats_and_counters(const Running& running, const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels) {
  // An array of no channels may be null too; its batches are counted.
  const bool counts = running.batches != nullptr || running.skipped != nullptr;
  if (running.mean == nullptr && (channels > 0 || !counts)) return true;
  double decay = running.decay;
  if (decay < 0) {
    const A before = running.batches == nullptr ? 0 : static_cast<A>(*running.batches);
    decay = running.batches == nullptr ? 1 : before / (before + 1);
  }
  const bool accepted =
      update_running_stats<A>(batch, count, groups, channels, running.unbiased, decay, static_cast<A*>(running.mean),
                              static_cast<A*>(running.mean_low), static_cast<A*>(running.variance));
  if (running.batches != nullptr && (accepted || running.decay >= 0)) ++*running.batches;
  if (running.skipped != nullptr && !accepted) ++*running.skipped;
  return accepted;
}

#define EVENNORM_FOR(A)                                                                                                            \
  template bool update_running_stats<A>(const Statistics<A>&, int64_t, int64_t, int64_t, bool, double, A*, A*, A*);                  \
  template bool update_stats_and_counters<A>(const Running&, const Statistics<A>&, int64_t, int64_t, int64_t);
EVENNORM_FOR(float)
EVENNORM_FOR(double)

}  // namespace evennorm
