// Moments, and normalization by them or by given ones. The formulas of core/moments.py and core/normalize.py.
#pragma once

#include "schedule.h"

namespace evennorm::EVENNORM_ISA {

constexpr int64_t kFirst = 16;  // values whose mean is the first shift
constexpr int64_t kForwardSharedFrom = 3 << 15;  // elements; for 1 << 16, two threads take as long as one

template <class S>
class ForwardGroup {
 public:
  using A = Compute<S>;

  ForwardGroup(const Forward& call, int64_t g, Visit what)
      : call_(call),
        x_(shifted(call.x, g)),
        residual_(shifted(call.residual, g)),
        y_(shifted(call.y, g)),
        layout_(laid_out(what)),
        coefficients_(layout_, 3),
        mean_(static_cast<A*>(call.mean) + g * call.shape.channel),
        mean_low_(call.mean_low == nullptr ? nullptr : static_cast<A*>(call.mean_low) + g * call.shape.channel),
        variance_(static_cast<A*>(call.variance) + g * call.shape.channel),
        mask_(call.mask == nullptr ? nullptr : call.mask + g * layout_.mask_bytes()) {}

  void run(Visit what, Workers& workers) {
    if (what == Visit::apply) {
      set_linear(0, layout_.channel);
      coefficients_.repeat(0, layout_.channel);
    }
    visit(*this, layout_, direct(layout_, x_) && direct(layout_, residual_), what, workers);
  }

  // The shift of the sums, the mean of the first values.
  void start(int64_t from, int64_t channels) {
    const int64_t n = layout_.inner < kFirst ? layout_.inner : kFirst;
    A* const shift = coefficients_.all.mean + from;
    const S* const x = static_cast<const S*>(x_.data) + from * x_.channel;
    if (x_.channel == 1) {
      constexpr int64_t kTogether = 256;
      for (int64_t begin = 0; begin < channels; begin += kTogether) {
        const int64_t width = channels - begin < kTogether ? channels - begin : kTogether;
        double sums[kTogether];
        for (int64_t c = 0; c < width; ++c) sums[c] = 0;
        for (int64_t i = 0; i < n; ++i) {
          const S* const row = x + begin + i * x_.inner;
          over<A>(
              width, 0, [&](int64_t c) { add_to<A>(&sums[c], load(row + c)); },
              [&](int64_t c, int64_t left) { add_some_to<A>(&sums[c], load_some(row + c, left), left); });
        }
        for (int64_t c = 0; c < width; ++c) shift[begin + c] = static_cast<A>(sums[c] / static_cast<double>(n));
      }
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += load_one(x + c * x_.channel + i * x_.inner);
        shift[c] = static_cast<A>(sum / static_cast<double>(n));
      }
    }
    coefficients_.repeat(from, channels);
  }

  void sums(const Chunk& chunk, int64_t c, int64_t channels, double* first, double* second) const {
    Buffer<S> scratch(direct(layout_, x_) ? 0 : chunk.positions() * channels);
    const Placed<S> x = place<S>(layout_, x_, chunk, c, channels, scratch.get());
    if (!layout_.in_rows()) {
      for (int64_t i = 0; i < channels; ++i) {
        const Pair pair = moment_planes<S>({x.data + i * x.channel, x.outer}, chunk.outers, chunk.inners, coefficients_.all.mean[c + i]);
        first[i] += pair.first;
        second[i] += pair.second;
      }
      return;
    }
    const RowTotals totals(layout_, channels, first, second);
    over_rows(layout_, chunk, channels, [&](int64_t number, int64_t n, const Rows& rows) {
      moment_rows<S>({rows.data(x), rows.stride(x)}, number, n, coefficients_.in_row(c).mean, totals.first(), totals.second());
    });
  }

  bool finish(int64_t c, int64_t channels, const double* first, const double* second, bool last) {
    const double n = static_cast<double>(layout_.count());
    const bool done =
        moments_of(first, second, n, channels, last, coefficients_.all.mean + c, mean_ + c, mean_low_ + c, variance_ + c);
    if (done) set_linear(c, channels);
    coefficients_.repeat(c, channels);
    return !done;
  }

  void apply(const Chunk& chunk, int64_t c, int64_t channels) const {
    switch (activation_of(call_.negative_slope, call_.limit)) {
      case Activation::none: apply_with<Activation::none>(chunk, c, channels); break;
      case Activation::relu: apply_with<Activation::relu>(chunk, c, channels); break;
      case Activation::relu6: apply_with<Activation::relu6>(chunk, c, channels); break;
      case Activation::leaky_relu: apply_with<Activation::leaky_relu>(chunk, c, channels); break;
    }
    if (past_cache_) fence();
  }

 private:
  View shifted(View v, int64_t g) const {
    if (v.data != nullptr) v.data = static_cast<S*>(v.data) + g * v.group;
    return v;
  }

  Layout laid_out(Visit what) {
    View* const views[] = {&y_, &x_, &residual_};
    const int absent = y_.data == nullptr ? 1 : 0;
    Layout layout = layout_of(call_.shape, views + absent, 3 - absent, call_.mask != nullptr);
    // What is read once, and is too large for the cache, leaves no room there for coefficients of every element.
    if (what == Visit::apply && past_cache_ && call_.mask == nullptr && layout.inner >= kLanes<A>) layout.bundled = false;
    return layout;
  }

  void set_linear(int64_t c, int64_t channels) {
    const A *const gamma = static_cast<const A*>(call_.gamma), *const beta = static_cast<const A*>(call_.beta);
    const A* const low = mean_low_ == nullptr ? nullptr : mean_low_ + c;
    linear_of<A>({mean_ + c, low, variance_ + c}, gamma == nullptr ? nullptr : gamma + c, beta == nullptr ? nullptr : beta + c,
                 call_.epsilon, channels, coefficients_.all.from(c));
  }

  template <Activation activation>
  void apply_with(const Chunk& chunk, int64_t c, int64_t channels) const {
    const A slope = static_cast<A>(call_.negative_slope);
    Buffer<S> x_scratch(direct(layout_, x_) ? 0 : chunk.positions() * channels);
    Buffer<S> residual_scratch(direct(layout_, residual_) ? 0 : chunk.positions() * channels);
    const Placed<S> x = place<S>(layout_, x_, chunk, c, channels, x_scratch.get());
    const Placed<S> residual = place<S>(layout_, residual_, chunk, c, channels, residual_scratch.get());
    const Placed<S> y = place<S>(layout_, y_, chunk, c, channels, nullptr);
    const Placed<uint8_t> mask = layout_.mask(mask_, chunk, c);
    const auto part = [](const auto& p, int64_t at) { return p.data == nullptr ? nullptr : p.data + at; };
    if (!layout_.in_rows()) {
      if (chunk.outers == 1) {  // a run of each channel
        normalize_runs<S, activation, Each::run>({x.data, x.channel}, {residual.data, residual.channel}, {y.data, y.channel},
                                                 {mask.data, mask.channel}, channels, chunk.inners,
                                                 Parameters<A, Each::run>(coefficients_.all.from(c)), slope, past_cache_);
        return;
      }
      for (int64_t i = 0; i < channels; ++i) {
        normalize_runs<S, activation, Each::call>({part(x, i * x.channel), x.outer}, {part(residual, i * residual.channel), residual.outer},
                                                  {part(y, i * y.channel), y.outer}, {part(mask, i * mask.channel), mask.outer},
                                                  chunk.outers, chunk.inners,
                                                  Parameters<A, Each::call>(coefficients_.all.from(c + i)), slope, past_cache_);
      }
      return;
    }
    over_rows(layout_, chunk, channels, [&](int64_t number, int64_t n, const Rows& rows) {
      normalize_runs<S, activation, Each::element>({rows.data(x), rows.stride(x)}, {rows.data(residual), rows.stride(residual)},
                                          {rows.data(y), rows.stride(y)}, {rows.data(mask), rows.stride(mask)}, number, n,
                                          Parameters<A, Each::element>(coefficients_.in_row(c)), slope, past_cache_);
    });
  }

  const Forward& call_;
  const bool past_cache_ = goes_past_cache<S>(call_.shape);
  View x_, residual_, y_;
  Layout layout_;
  CoefficientBuffer<A> coefficients_;
  A *mean_, *mean_low_, *variance_;
  uint8_t* mask_;
};

template <class S>
bool forward_as(const Forward& call, Visit what, Workers& workers) {
  using A = Compute<S>;
  if (call.shape.outer * call.shape.inner == 0) {  // no values: mean and variance are 0
    for (int64_t i = 0; what != Visit::apply && i < call.shape.groups * call.shape.channel; ++i) {
      static_cast<A*>(call.mean)[i] = static_cast<A*>(call.mean_low)[i] = static_cast<A*>(call.variance)[i] = 0;
    }
  } else if (call.shape.channel > 0) {
    each_group(call.shape, kForwardSharedFrom, workers, [&](int64_t g, Workers& these) { ForwardGroup<S>(call, g, what).run(what, these); });
  }
  const Statistics<A> batch{static_cast<const A*>(call.mean), static_cast<const A*>(call.mean_low), static_cast<const A*>(call.variance)};
  const Shape& shape = call.shape;
  return what == Visit::apply || update_stats_and_counters<A>(call.running, batch, shape.outer * shape.inner, shape.groups, shape.channel);
}

inline bool forward_any(const Forward& call, Visit what, Workers& workers) {
  switch (call.dtype) {
    case Dtype::float32: return forward_as<float>(call, what, workers);
    case Dtype::float64: return forward_as<double>(call, what, workers);
    case Dtype::bfloat16: return forward_as<BFloat16>(call, what, workers);
    case Dtype::float16: return forward_as<Float16>(call, what, workers);
  }
  return true;
}

}  // namespace evennorm::EVENNORM_ISA
