#include "channels.h"

#include <cmath>

namespace evennorm {

template <class A>
bool moments_of(const double* first, const double* second, double n, int64_t channels, bool last, A* shift, A* mean, A* mean_low,
                A* variance) {
  const auto rest = [&](int64_t c) { return first[c] / n; };
  const auto biased = [&](int64_t c) { return second[c] / n - rest(c) * rest(c); };
  // rest^2 > kFarShift * biased, times n^2
  const auto far = [&](int64_t c) { return (1 + kFarShift) * (first[c] * first[c]) > kFarShift * n * second[c]; };
  int64_t far_ones = 0;
  for (int64_t c = 0; c < channels && !last; ++c) far_ones += far(c) ? 1 : 0;
  if (far_ones > 0) {
    for (int64_t c = 0; c < channels; ++c) {
      if (far(c)) shift[c] = static_cast<A>(shift[c] + rest(c));
    }
    return false;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const double v = biased(c);
    mean[c] = static_cast<A>(shift[c] + rest(c));
    mean_low[c] = static_cast<A>((shift[c] - static_cast<double>(mean[c])) + rest(c));
    variance[c] = static_cast<A>(v < 0 ? 0 : v);
  }
  return true;
}

template <class A>
void linear_of(const Statistics<A>& statistics, const A* gamma, const A* beta, double epsilon, int64_t channels, Coefficients<A> to) {
  for (int64_t c = 0; c < channels; ++c) {
    const double inverse = 1 / std::sqrt(static_cast<double>(statistics.variance[c]) + epsilon);
    const A scale = static_cast<A>(gamma == nullptr ? inverse : gamma[c] * inverse);
    const double low = statistics.mean_low == nullptr ? 0 : statistics.mean_low[c];
    to.mean[c] = statistics.mean[c];
    to.scale[c] = scale;
    to.shift[c] = static_cast<A>((beta == nullptr ? 0 : beta[c]) - low * scale);
  }
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
  for (int64_t c = 0; c < channels; ++c) {
    const double squared = 1 / (static_cast<double>(statistics.variance[c]) + epsilon);
    const double scale = (gamma == nullptr ? 1 : gamma[c]) * std::sqrt(squared);
    const double slope = (scale * squared * sum_dz_centred[c] - 2 * (d_variance == nullptr ? 0.0 : d_variance[c])) / n;
    const double offset = (scale * sum_dz[c] - (d_mean == nullptr ? 0.0 : d_mean[c])) / n - slope * statistics.mean_low[c];
    to.slope[c] = static_cast<A>(slope);
    to.offset[c] = static_cast<A>(offset);
  }
}

template <class A>
void parameter_gradients_of(const A* variance, double epsilon, const A* sum_dz, const A* sum_dz_centred, int64_t groups,
                            int64_t channels, A* d_gamma, A* d_beta) {
  if (d_gamma == nullptr && d_beta == nullptr) return;
  constexpr int64_t kBlock = 64;  // channels at a time, so that their sums need no memory
  for (int64_t from = 0; from < channels; from += kBlock) {
    const int64_t width = from + kBlock < channels ? kBlock : channels - from;
    double gamma[kBlock] = {}, beta[kBlock] = {};
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
  }
}

template <class A>
bool follow(const Statistics<A>& batch, int64_t count, int64_t groups, int64_t channels, bool unbiased, double decay, A* running_mean,
            A* running_mean_low, A* running_variance) {
  if (count == 0 || groups == 0 || channels == 0) return false;
  const A correction = unbiased && count > 1 ? static_cast<A>(count) / static_cast<A>(count - 1) : A{1};
  const auto mean_low = [&](int64_t c) {
    A sum = 0;
    for (int64_t i = c; i < groups * channels; i += channels) sum += (batch.mean[i] - batch.mean[c]) + batch.mean_low[i];
    return sum / static_cast<A>(groups);
  };
  const auto variance = [&](int64_t c) {
    A sum = 0;  // of one value there is none
    for (int64_t i = c; count > 1 && i < groups * channels; i += channels) sum += batch.variance[i] * correction;
    return sum / static_cast<A>(groups);
  };
  for (int64_t c = 0; c < channels; ++c) {
    if (!std::isfinite(batch.mean[c] + mean_low(c)) || !std::isfinite(variance(c))) return false;
  }
  const A share = static_cast<A>(1 - decay), old_share = static_cast<A>(decay);
  for (int64_t c = 0; c < channels; ++c) {
    // A mean set from outside leaves a low part behind that belongs to another value; it is then at most rounding.
    const A old = running_mean[c], limit = static_cast<A>(0x1p-24) * std::abs(old);
    const A before = running_mean_low[c] > limit ? limit : running_mean_low[c] < -limit ? -limit : running_mean_low[c];
    const A low = before + ((batch.mean[c] - old) + (mean_low(c) - before)) * share;
    running_mean[c] = old + low;
    running_mean_low[c] = low - (running_mean[c] - old);
    if (count == 1) continue;
    // From the nearer end: with decay 0, 1 + (1e-6 - 1) * 1 would have lost most of the new 1e-6.
    const A was = running_variance[c], is = variance(c);
    running_variance[c] = decay < 0.5 ? is + (was - is) * old_share : was + (is - was) * share;
  }
  return true;
}

#define EVENNORM_FOR(A)                                                                                                              \
  template bool moments_of<A>(const double*, const double*, double, int64_t, bool, A*, A*, A*, A*);                                  \
  template void linear_of<A>(const Statistics<A>&, const A*, const A*, double, int64_t, Coefficients<A>);                            \
  template void centred_sums_of<A>(const double*, const double*, const A*, int64_t, A*, A*);                                         \
  template void input_gradient_of<A>(const Statistics<A>&, const A*, double, const A*, const A*, const A*, const A*, double, int64_t, \
                                     Coefficients<A>);                                                                               \
  template void parameter_gradients_of<A>(const A*, double, const A*, const A*, int64_t, int64_t, A*, A*);                           \
  template bool follow<A>(const Statistics<A>&, int64_t, int64_t, int64_t, bool, double, A*, A*, A*);
EVENNORM_FOR(float)
EVENNORM_FOR(double)

}  // namespace evennorm
