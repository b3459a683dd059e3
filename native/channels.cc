#include "channels.h"

#include <cmath>

namespace evennorm {

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
  if (n == 1) {  // the value is its own mean: dz acts on nothing, exactly
    for (int64_t c = 0; c < channels; ++c) {
      to.scale[c] = to.slope[c] = 0;
      to.offset[c] = d_mean == nullptr ? 0 : -d_mean[c];
    }
    return;
  }
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

namespace {

constexpr int64_t kTogether = 64;  // channels at a time, so that what ghost batches say of them needs no memory

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
    for (int64_t c = 0; c < channels; c += kTogether) {
      const int64_t width = c + kTogether < channels ? kTogether : channels - c;
      body(c, width, average_of(batch, c, width, count, groups, channels, unbiased));
    }
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

#define EVENNORM_FOR(A)                                                                                                              \
  template bool moments_of<A>(const double*, const double*, double, int64_t, bool, A*, A*, A*, A*);                                  \
  template void linear_of<A>(const Statistics<A>&, const A*, const A*, double, int64_t, Coefficients<A>);                            \
  template void centred_sums_of<A>(const double*, const double*, const A*, int64_t, A*, A*);                                         \
  template void input_gradient_of<A>(const Statistics<A>&, const A*, double, const A*, const A*, const A*, const A*, double, int64_t, \
                                     Coefficients<A>);                                                                               \
  template void parameter_gradients_of<A>(const A*, double, const A*, const A*, int64_t, int64_t, A*, A*);                           \
  template bool update_running_stats<A>(const Statistics<A>&, int64_t, int64_t, int64_t, bool, double, A*, A*, A*);                  \
  template bool update_stats_and_counters<A>(const Running&, const Statistics<A>&, int64_t, int64_t, int64_t);
EVENNORM_FOR(float)
EVENNORM_FOR(double)

}  // namespace evennorm
