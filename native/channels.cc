#include "channels.h"

#include <cmath>

#include "channel_blocks.h"

namespace evennorm::EVENNORM_ISA {
namespace {

// Numbers of some channels, or `otherwise` where there are none. A copy: compilers make vectors of loops whose arrays cannot overlap.
class Block {
 public:
  template <class A>
  Block(const A* values, int64_t from, int64_t width, double otherwise) {
    for (int64_t c = 0; values != nullptr && c < width; ++c) values_[c] = static_cast<double>(values[from + c]);
    for (int64_t c = 0; values == nullptr && c < width; ++c) values_[c] = otherwise;
  }
  double operator[](int64_t c) const { return values_[c]; }

 private:
  double values_[kTogether];
};

}  // namespace

template <class A>
bool moments_of(const double* first, const double* second, double n, int64_t channels, bool last, A* shift, A* mean, A* mean_low,
                A* variance) {
  if (!last) {
    // rest^2 > kFarShift * biased, times n^2
    const auto far = [&](int64_t c) { return (1 + kFarShift) * (first[c] * first[c]) > kFarShift * n * second[c]; };
    int64_t far_ones = 0;
    for (int64_t c = 0; c < channels; ++c) far_ones += far(c) ? 1 : 0;
    for (int64_t c = 0; far_ones > 0 && c < channels; ++c) {
      if (far(c)) shift[c] = static_cast<A>(shift[c] + first[c] / n);
    }
    if (far_ones > 0) return false;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double rest = first[c] / n, biased = second[c] / n - rest * rest;
    const A rounded = static_cast<A>(shift[c] + rest);
    mean[c] = rounded;
    mean_low[c] = static_cast<A>((shift[c] - static_cast<double>(rounded)) + rest);
    variance[c] = static_cast<A>(biased < 0 ? 0 : biased);
  }
  return true;
}

template <class A>
void linear_of(const Statistics<A>& statistics, const A* gamma, const A* beta, double epsilon, int64_t channels, Coefficients<A> to) {
  each_block(channels, [&](int64_t from, int64_t width) {
    const Block mean(statistics.mean, from, width, 0), low(statistics.mean_low, from, width, 0);
    const Block variance(statistics.variance, from, width, 0), factor(gamma, from, width, 1), offset(beta, from, width, 0);
    const Coefficients<A> here = to.from(from);
    for (int64_t c = 0; c < width; ++c) {
      const A scale = static_cast<A>(factor[c] * (1 / std::sqrt(variance[c] + epsilon)));
      here.mean[c] = static_cast<A>(mean[c]);
      here.scale[c] = scale;
      here.shift[c] = static_cast<A>(offset[c] - low[c] * static_cast<double>(scale));
    }
  });
}

template <class A>
void centred_sums_of(const double* first, const double* second, const A* mean_low, int64_t channels, A* sum_dz, A* sum_dz_centred) {
  for (int64_t c = 0; c < channels; ++c) {
    sum_dz[c] = static_cast<A>(first[c]);
    sum_dz_centred[c] = static_cast<A>(second[c] - first[c] * mean_low[c]);
  }
}

template <class A>
void input_gradient_of(const Statistics<A>& statistics, const A* gamma, double epsilon, const A* sum_dz, const A* sum_dz_centred,
                       const A* d_mean, const A* d_variance, double n, int64_t channels, Coefficients<A> to) {
  if (n == 1) {  // the value is its own mean: dz acts on nothing, exactly
    for (int64_t c = 0; c < channels; ++c) {
      to.scale[c] = to.slope[c] = 0;
      to.offset[c] = d_mean == nullptr ? 0 : -d_mean[c];
    }
    return;
  }
  each_block(channels, [&](int64_t from, int64_t width) {
    const Block low(statistics.mean_low, from, width, 0), variance(statistics.variance, from, width, 0), factor(gamma, from, width, 1);
    const Block sum(sum_dz, from, width, 0), centred(sum_dz_centred, from, width, 0);
    const Block mean_gradient(d_mean, from, width, 0), variance_gradient(d_variance, from, width, 0);
    const Coefficients<A> here = to.from(from);
    for (int64_t c = 0; c < width; ++c) {
      const double squared = 1 / (variance[c] + epsilon), scale = factor[c] * std::sqrt(squared);
      const double slope = (scale * squared * centred[c] - 2 * variance_gradient[c]) / n;
      here.slope[c] = static_cast<A>(slope);
      here.offset[c] = static_cast<A>((scale * sum[c] - mean_gradient[c]) / n - slope * low[c]);
    }
  });
}

template <class A>
void parameter_gradients_of(const A* variance, double epsilon, const A* sum_dz, const A* sum_dz_centred, int64_t groups,
                            int64_t channels, A* d_gamma, A* d_beta) {
  if (d_gamma == nullptr && d_beta == nullptr) return;
  each_block(channels, [&](int64_t from, int64_t width) {
    double gamma[kTogether] = {}, beta[kTogether] = {};
    for (int64_t i = from; i < groups * channels; i += channels) {
      for (int64_t c = 0; c < width; ++c) {
        gamma[c] += sum_dz_centred[i + c] / std::sqrt(static_cast<double>(variance[i + c]) + epsilon);
        beta[c] += sum_dz[i + c];
      }
    }
    for (int64_t c = 0; c < width; ++c) {
      if (d_gamma != nullptr) d_gamma[from + c] = static_cast<A>(gamma[c]);
      if (d_beta != nullptr) d_beta[from + c] = static_cast<A>(beta[c]);
    }
  });
}

#define EVENNORM_FOR(A)                                                                                                              \
  template bool moments_of<A>(const double*, const double*, double, int64_t, bool, A*, A*, A*, A*);                                  \
  template void linear_of<A>(const Statistics<A>&, const A*, const A*, double, int64_t, Coefficients<A>);                            \
  template void centred_sums_of<A>(const double*, const double*, const A*, int64_t, A*, A*);                                         \
  template void input_gradient_of<A>(const Statistics<A>&, const A*, double, const A*, const A*, const A*, const A*, double, int64_t, \
                                     Coefficients<A>);                                                                               \
  template void parameter_gradients_of<A>(const A*, double, const A*, const A*, int64_t, int64_t, A*, A*);
EVENNORM_FOR(float)
EVENNORM_FOR(double)

}  // namespace evennorm::EVENNORM_ISA
