// The gradient of forward.h: two sums per channel, and from them the gradient of every element. See core/normalize.py.
#pragma once

#include "schedule.h"

namespace evennorm::EVENNORM_ISA {

constexpr int64_t kBackwardSharedFrom = 1 << 16;  // elements

template <class S>
class BackwardGroup {
 public:
  using A = Compute<S>;

  BackwardGroup(const Backward& call, int64_t g)
      : call_(call),
        group_(g * call.shape.channel),
        dy_(shifted(call.dy, g)),
        x_(shifted(call.x, g)),
        dx_(shifted(call.dx, g)),
        d_residual_(shifted(call.d_residual, g)),
        layout_(laid_out()),
        coefficients_(layout_, 5),
        mask_(call.mask == nullptr ? nullptr : const_cast<uint8_t*>(call.mask) + g * layout_.mask_bytes()) {}

  void run(Visit what, Workers& workers) {
    if (what == Visit::apply) {
      start(0, layout_.channel);
      set_gradient(0, layout_.channel);
      coefficients_.repeat(0, layout_.channel);
    }
    visit(*this, layout_, direct(layout_, x_) && direct(layout_, dy_), what, workers);
  }

  void start(int64_t c, int64_t channels) {
    linear_of(statistics(c), parameter(call_.gamma, c), parameter(call_.beta, c), call_.epsilon, channels, coefficients_.all.from(c));
    coefficients_.repeat(c, channels);
  }

  void sums(const Chunk& chunk, int64_t c, int64_t channels, double* first, double* second) const {
    with_gate([&](auto gate) { sums_with<gate.activation, gate.from_mask>(chunk, c, channels, first, second); });
  }

  bool finish(int64_t c, int64_t channels, const double* first, const double* second, bool) {
    centred_sums_of(first, second, statistics(c).mean_low, channels, of_group<A>(call_.sum_dz, c), of_group<A>(call_.sum_dz_centred, c));
    if (dx_.data != nullptr) set_gradient(c, channels);
    coefficients_.repeat(c, channels);
    return false;
  }

  void apply(const Chunk& chunk, int64_t c, int64_t channels) const {
    with_gate([&](auto gate) { apply_with<gate.activation, gate.from_mask>(chunk, c, channels); });
    if (past_cache_) fence();
  }

 private:
  template <Activation activation_, bool from_mask_>
  struct Gate {
    static constexpr Activation activation = activation_;
    static constexpr bool from_mask = from_mask_;
  };
  template <class Body>
  void with_gate(const Body& body) const {
    const bool from_mask = mask_ != nullptr;
    switch (activation_of(call_.negative_slope, call_.limit)) {
      case Activation::none: return body(Gate<Activation::none, false>{});
      case Activation::relu: return from_mask ? body(Gate<Activation::relu, true>{}) : body(Gate<Activation::relu, false>{});
      case Activation::relu6:  // with a mask as relu
        return from_mask ? body(Gate<Activation::relu, true>{}) : body(Gate<Activation::relu6, false>{});
      case Activation::leaky_relu:
        return from_mask ? body(Gate<Activation::leaky_relu, true>{}) : body(Gate<Activation::leaky_relu, false>{});
    }
  }

  View shifted(View v, int64_t g) const {
    if (v.data != nullptr) v.data = static_cast<S*>(v.data) + g * v.group;
    return v;
  }

  Layout laid_out() {
    View* const views[] = {&dx_, &x_, &dy_, &d_residual_};
    const int absent = dx_.data == nullptr ? 1 : 0;
    return layout_of(call_.shape, views + absent, 4 - absent, call_.mask != nullptr);
  }

  template <class T, class Pointer>
  T* of_group(Pointer statistic, int64_t c) const {
    return statistic == nullptr ? nullptr : static_cast<T*>(statistic) + group_ + c;
  }
  static const A* parameter(const void* values, int64_t c) { return values == nullptr ? nullptr : static_cast<const A*>(values) + c; }
  Statistics<A> statistics(int64_t c) const {
    return {of_group<const A>(call_.mean, c), of_group<const A>(call_.mean_low, c), of_group<const A>(call_.variance, c)};
  }

  void set_gradient(int64_t c, int64_t channels) {
    input_gradient_of(statistics(c), parameter(call_.gamma, c), call_.epsilon, of_group<const A>(call_.sum_dz, c),
                      of_group<const A>(call_.sum_dz_centred, c), of_group<const A>(call_.d_mean, c),
                      of_group<const A>(call_.d_variance, c), call_.count > 1 ? call_.count : 1, channels, coefficients_.all.from(c));
  }

  static constexpr auto part = [](const auto& p, int64_t at) { return p.data == nullptr ? nullptr : p.data + at; };

  template <Activation activation, bool from_mask>
  void sums_with(const Chunk& chunk, int64_t c, int64_t channels, double* first, double* second) const {
    const A slope = static_cast<A>(call_.negative_slope);
    Buffer<S> x_scratch(direct(layout_, x_) ? 0 : chunk.positions() * channels);
    Buffer<S> dy_scratch(direct(layout_, dy_) ? 0 : chunk.positions() * channels);
    const Placed<S> x = place<S>(layout_, x_, chunk, c, channels, x_scratch.get());
    const Placed<S> dy = place<S>(layout_, dy_, chunk, c, channels, dy_scratch.get());
    const Placed<uint8_t> mask = layout_.mask(mask_, chunk, c);
    if (!layout_.in_rows()) {
      for (int64_t i = 0; i < channels; ++i) {
        const Pair pair = gradient_planes<S, activation, from_mask>(
            {part(dy, i * dy.channel), dy.outer}, {part(x, i * x.channel), x.outer}, {part(mask, i * mask.channel), mask.outer},
            chunk.outers, chunk.inners, Parameters<A, Each::call>(coefficients_.all.from(c + i)), slope);
        first[i] += pair.first;
        second[i] += pair.second;
      }
      return;
    }
    const RowTotals totals(layout_, channels, first, second);
    over_rows(layout_, chunk, channels, [&](int64_t number, int64_t n, const Rows& rows) {
      gradient_rows<S, activation, from_mask>({rows.data(dy), rows.stride(dy)}, {rows.data(x), rows.stride(x)},
                                              {rows.data(mask), rows.stride(mask)}, number, n,
                                              Parameters<A, Each::element>(coefficients_.in_row(c)), slope, totals.first(), totals.second());
    });
  }

  template <Activation activation, bool from_mask>
  void apply_with(const Chunk& chunk, int64_t c, int64_t channels) const {
    const A slope = static_cast<A>(call_.negative_slope);
    Buffer<S> x_scratch(direct(layout_, x_) ? 0 : chunk.positions() * channels);
    Buffer<S> dy_scratch(direct(layout_, dy_) ? 0 : chunk.positions() * channels);
    const Placed<S> x = place<S>(layout_, x_, chunk, c, channels, x_scratch.get());
    const Placed<S> dy = place<S>(layout_, dy_, chunk, c, channels, dy_scratch.get());
    const Placed<S> dx = place<S>(layout_, dx_, chunk, c, channels, nullptr);
    const Placed<S> dz = place<S>(layout_, d_residual_, chunk, c, channels, nullptr);
    const Placed<uint8_t> mask = layout_.mask(mask_, chunk, c);
    if (!layout_.in_rows()) {
      if (chunk.outers == 1) {  // a run of each channel
        input_gradient_runs<S, activation, from_mask, Each::run>(
            {dy.data, dy.channel}, {x.data, x.channel}, {dx.data, dx.channel}, {dz.data, dz.channel}, {mask.data, mask.channel},
            channels, chunk.inners, Parameters<A, Each::run>(coefficients_.all.from(c)), slope, past_cache_);
        return;
      }
      for (int64_t i = 0; i < channels; ++i) {
        input_gradient_runs<S, activation, from_mask, Each::call>(
            {part(dy, i * dy.channel), dy.outer}, {part(x, i * x.channel), x.outer}, {part(dx, i * dx.channel), dx.outer},
            {part(dz, i * dz.channel), dz.outer}, {part(mask, i * mask.channel), mask.outer}, chunk.outers, chunk.inners,
            Parameters<A, Each::call>(coefficients_.all.from(c + i)), slope, past_cache_);
      }
      return;
    }
    over_rows(layout_, chunk, channels, [&](int64_t number, int64_t n, const Rows& rows) {
      input_gradient_runs<S, activation, from_mask, Each::element>(
          {rows.data(dy), rows.stride(dy)}, {rows.data(x), rows.stride(x)}, {rows.data(dx), rows.stride(dx)},
          {rows.data(dz), rows.stride(dz)}, {rows.data(mask), rows.stride(mask)}, number, n,
          Parameters<A, Each::element>(coefficients_.in_row(c)), slope, past_cache_);
    });
  }

  const Backward& call_;
  const bool past_cache_ = goes_past_cache<S>(call_.shape);
  int64_t group_;
  View dy_, x_, dx_, d_residual_;
  Layout layout_;
  CoefficientBuffer<A> coefficients_;
  uint8_t* mask_;
};

template <class S>
void backward_as(Backward call, Visit what, Workers& workers) {
  using A = Compute<S>;
  const int64_t channels = call.shape.groups * call.shape.channel;
  const Buffer<A> scratch(call.sum_dz == nullptr ? 2 * channels : 0);
  if (call.sum_dz == nullptr) call.sum_dz = scratch.get(), call.sum_dz_centred = scratch.get() + channels;
  if (call.shape.outer * call.shape.inner == 0) {
    for (int64_t i = 0; what != Visit::apply && i < channels; ++i) {
      static_cast<A*>(call.sum_dz)[i] = static_cast<A*>(call.sum_dz_centred)[i] = 0;
    }
  } else if (call.shape.channel > 0) {
    each_group(call.shape, kBackwardSharedFrom, workers, [&](int64_t g, Workers& these) { BackwardGroup<S>(call, g).run(what, these); });
  }
  if (what != Visit::apply) {
    parameter_gradients_of(static_cast<const A*>(call.variance), call.epsilon, static_cast<const A*>(call.sum_dz),
                           static_cast<const A*>(call.sum_dz_centred), call.shape.groups, call.shape.channel,
                           static_cast<A*>(call.d_gamma), static_cast<A*>(call.d_beta));
  }
}

inline void backward_any(const Backward& call, Visit what, Workers& workers) {
  switch (call.dtype) {
    case Dtype::float32: return backward_as<float>(call, what, workers);
    case Dtype::float64: return backward_as<double>(call, what, workers);
    case Dtype::bfloat16: return backward_as<BFloat16>(call, what, workers);
    case Dtype::float16: return backward_as<Float16>(call, what, workers);
  }
}

}  // namespace evennorm::EVENNORM_ISA
