// What happens once per channel, between the passes over the elements. The formulas of core/moments.py and core/normalize.py.
//
// Compiled once, without contraction, for all instruction sets: a channel's numbers do not depend on how many are computed together.
#pragma once

#include <cstdint>

#include "batch_norm.h"

namespace evennorm {

// A shift that lies further from the mean than 4 deviations costs digits.
constexpr double kFarShift = 16;

// z = (x - mean) * scale + shift, and dx = dz * scale - ((x - mean) * slope + offset).
template <class A>
struct Coefficients {
  A *mean, *scale, *shift;
  A *slope, *offset;  // null in the forward pass

  Coefficients from(int64_t c) const {
    return {mean + c, scale + c, shift + c, slope == nullptr ? nullptr : slope + c, offset == nullptr ? nullptr : offset + c};
  }
};

// Optional arrays may be null: gamma for 1, all others for 0.
template <class A>
struct Statistics {
  const A *mean, *mean_low, *variance;
};

// Moments from the sums of x - shift and of its square over n values. False where the shift was far from a mean, unless this is the
// `last` time: the shifts are then means, and the sums have to be taken again.
template <class A>
bool moments_of(const double* first, const double* second, double n, int64_t channels, bool last, A* shift, A* mean, A* mean_low,
                A* variance);

template <class A>
void linear_of(const Statistics<A>& statistics, const A* gamma, const A* beta, double epsilon, int64_t channels, Coefficients<A> to);

// The sum of dz * (x - mean) from that of dz * (x - mean rounded to A).
template <class A>
void centred_sums_of(const double* first, const double* second, const A* mean_low, int64_t channels, A* sum_dz, A* sum_dz_centred);

// Slope and offset of dx; of a value that is alone in its channel (n = 1) the scale too, which no activation is gated by then.
template <class A>
void input_gradient_of(const Statistics<A>& statistics, const A* gamma, double epsilon, const A* sum_dz, const A* sum_dz_centred,
                       const A* d_mean, const A* d_variance, double n, int64_t channels, Coefficients<A> to);

// Over groups: dgamma = sum(dz * (x - mean)) / sqrt(variance + epsilon), dbeta = sum dz.
template <class A>
void parameter_gradients_of(const A* variance, double epsilon, const A* sum_dz, const A* sum_dz_centred, int64_t groups,
                            int64_t channels, A* d_gamma, A* d_beta);

// Updates running statistics by one batch of `count` values per group and channel, as core/running.py defines. If the batch is
// empty or not finite, writes nothing and returns false. Ghost batches, (groups, channels), weigh the same.
template <class A>
bool update_running_stats(const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels, bool unbiased, double decay,
                          A* running_mean, A* running_mean_low, A* running_variance);

// The same for the running statistics of a call, whose counters it updates too. True if the call has none.
template <class A>
bool update_stats_and_counters(const Running& running, const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels);

}  // namespace evennorm
