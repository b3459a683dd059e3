// What happens once per channel, between the passes over the elements. The formulas of core/moments.py and core/normalize.py.
//
// Compiled for each instruction set, but always without contraction: a channel's numbers depend neither on the processor nor on how
// many are computed together.
#pragma once

#include <cstdint>

#include "running.h"

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

namespace EVENNORM_ISA {

// Optional arrays may be null: gamma for 1, all others for 0.

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

}  // namespace EVENNORM_ISA
}  // namespace evennorm
