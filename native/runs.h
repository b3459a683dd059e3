// The loops over runs of contiguous elements: planes, which belong to one channel, and rows, which hold one element of each channel.
#pragma once

#include <algorithm>

#include "channels.h"
#include "elements.h"

namespace evennorm::EVENNORM_ISA {

// `runs` of them lie `stride` elements apart. A null pointer stays null.
template <class S>
struct Span {
  S* data = nullptr;
  int64_t stride = 0;

  S* run(int64_t r) const { return data == nullptr ? nullptr : data + r * stride; }
};

struct MaskSpan {
  uint8_t* data = nullptr;
  int64_t stride = 0;

  uint8_t* run(int64_t r) const { return data == nullptr ? nullptr : data + r * stride; }
};

// What coefficients there are: one of each for all runs, one for each run, or one for each element of a run.
enum class Each { call, run, element };

// One coefficient of a vector of elements. Arrays end in room for a whole vector more.
template <class A, bool by_element>
struct Parameter;
template <class A>
struct Parameter<A, false> {
  Vec<A> value;

  EVENNORM_INLINE explicit Parameter(const A* at) : value(at == nullptr ? Vec<A>{} : splat(*at)) {}
  EVENNORM_INLINE Vec<A> at(int64_t) const { return value; }
};
template <class A>
struct Parameter<A, true> {
  const A* values;

  EVENNORM_INLINE explicit Parameter(const A* at) : values(at) {}
  EVENNORM_INLINE Vec<A> at(int64_t i) const { return load(values + i); }
};

template <class A, Each each>
struct Parameters {
  Parameter<A, each == Each::element> mean, scale, shift, slope, offset;

  EVENNORM_INLINE explicit Parameters(const Coefficients<A>& of)
      : mean(of.mean), scale(of.scale), shift(of.shift), slope(of.slope), offset(of.offset) {}
  EVENNORM_INLINE const Parameters& of_run(int64_t) const { return *this; }
  EVENNORM_INLINE Linear<A> linear(int64_t i) const { return {mean.at(i), scale.at(i), shift.at(i)}; }
  EVENNORM_INLINE InputGradient<A> gradient(int64_t i) const { return {scale.at(i), slope.at(i), offset.at(i)}; }
};
template <class A>
struct Parameters<A, Each::run> {
  Coefficients<A> of;

  explicit Parameters(const Coefficients<A>& of) : of(of) {}
  EVENNORM_INLINE Parameters<A, Each::call> of_run(int64_t r) const { return Parameters<A, Each::call>(of.from(r)); }
};

// Calls at(i) for whole vectors and some(i, n) for what is left, both before `begin` and after it.
template <class A, class At, class Some>
EVENNORM_INLINE void over(int64_t n, int64_t begin, const At& at, const Some& some) {
  int64_t i = 0;
  for (; i + kLanes<A> <= begin; i += kLanes<A>) at(i);
  if (i < begin) some(i, begin - i);
  for (i = begin; i + kLanes<A> <= n; i += kLanes<A>) at(i);
  if (i < n) some(i, n - i);
}

// Sums of x - shift and of its square.

template <class S>
Pair moment_planes(Span<const S> x, int64_t planes, int64_t n, Compute<S> shift) {
  using A = Compute<S>;
  const Vec<A> k = splat(shift);
  const bool overlap = n >= kLanes<A>;  // the last elements come with some that were counted already
  const auto inside = overlap ? last_lanes<A>(n % kLanes<A>) : first_lanes<A>(n % kLanes<A>);
  const auto terms = [](Vec<A> d) { return Terms<A>{d, d * d}; };
  return sum_planes<A>(
      planes, n,
      [&](int64_t plane, int64_t i) {
        const S* const at = x.run(plane) + i;
        prefetch(at + x.stride);
        return terms(load(at) - k);
      },
      [&](int64_t plane, int64_t i, int64_t left) {
        const S* const p = x.run(plane);
        return terms(select(inside, (overlap ? load(p + n - kLanes<A>) : load_some(p + i, left)) - k, Vec<A>{}));
      });
}

template <class S>
struct MomentBlock {
  using A = Compute<S>;
  Span<const S> x;
  const A* shift;

  int64_t row_bytes() const { return x.stride * static_cast<int64_t>(sizeof(S)); }

  struct Stream {
    Span<const S> x;
    Vec<A> k;
    int64_t left;

    EVENNORM_INLINE Terms<A> operator()(int64_t r) const {
      const S* const p = x.data + r * x.stride;
      const Vec<A> d = (left ? load_some(p, left) : load(p)) - k;
      return {d, d * d};
    }
  };
  EVENNORM_INLINE Stream at(int64_t i) const { return some(i, 0); }
  EVENNORM_INLINE Stream some(int64_t i, int64_t left) const { return {{x.data + i, x.stride}, load(shift + i), left}; }
};

template <class S>
void moment_rows(Span<const S> x, int64_t rows, int64_t n, const Compute<S>* shift, double* first, double* second) {
  sum_rows<Compute<S>>(rows, n, first, second, MomentBlock<S>{x, shift});
}

// y.

// Planes of different channels that lie end to end, written past the cache: so is a line that holds the end of one plane and the
// beginning of the next. `n` is at least a vector.
template <class S, Activation activation>
void normalize_joined_planes(const S* x, const S* residual, S* y, const Lines& lines, int64_t planes, int64_t n,
                             const Coefficients<Compute<S>>& of, Compute<S> negative_slope) {
  using A = Compute<S>;
  const auto linear_of_plane = [&](int64_t plane) EVENNORM_INLINE_LAMBDA { return Parameters<A, Each::call>(of.from(plane)).linear(0); };
  const auto finished = [&](const Linear<A>& linear, Vec<A> v) EVENNORM_INLINE_LAMBDA { return linear(linear.centred(v)); };
  int64_t i = 0;
  const auto whole = [&](const Linear<A>& linear, const auto& store_at) EVENNORM_INLINE_LAMBDA {
    const Vec<A> z = finished(linear, load(x + i));
    store_at(y + i, activated<activation>(residual ? z + load(residual + i) : z, negative_slope));
    i += kLanes<A>;
  };
  const auto past_cache = [](S* at, Vec<A> v) EVENNORM_INLINE_LAMBDA { store_past_cache(at, v); };
  // Elements of one plane before the first line, or after the last one.
  const auto through_cache = [&](int64_t end, const Linear<A>& linear) EVENNORM_INLINE_LAMBDA {
    while (i + kLanes<A> <= end) whole(linear, [](S* at, Vec<A> v) EVENNORM_INLINE_LAMBDA { store(at, v); });
    if (i >= end) return;
    const int64_t left = end - i;
    const Vec<A> z = finished(linear, load_some(x + i, left));
    store_some(y + i, activated<activation>(residual ? z + load_some(residual + i, left) : z, negative_slope), left);
    i = end;
  };
  Linear<A> linear = linear_of_plane(0);
  for (int64_t plane = 0; plane < planes; ++plane) {
    const int64_t end = (plane + 1) * n;
    through_cache(std::min(lines.begin, end), linear);
    for (const int64_t last = std::min(lines.end, end); i + kLanes<A> <= last;) whole(linear, past_cache);
    const Linear<A> next = linear_of_plane(std::min(plane + 1, planes - 1));
    if (i < end && i < lines.end) {  // of both planes
      const auto inside = first_lanes<A>(end - i);
      const auto of_either = [&](Vec<A> one, Vec<A> other) EVENNORM_INLINE_LAMBDA { return select(inside, one, other); };
      whole({of_either(linear.mean, next.mean), of_either(linear.scale, next.scale), of_either(linear.shift, next.shift)}, past_cache);
    }
    through_cache(end, linear);
    linear = next;
  }
}

template <class S, Activation activation, Each each>
void normalize_runs(Span<const S> x, Span<const S> residual, Span<S> y, MaskSpan mask, int64_t runs, int64_t n,
                    Parameters<Compute<S>, each> all_parameters, Compute<S> negative_slope, bool past_cache) {
  using A = Compute<S>;
  if constexpr (each == Each::run) {
    const bool joined = x.stride == n && y.stride == n && (residual.data == nullptr || residual.stride == n) && mask.data == nullptr;
    const Lines lines = past_cache && joined && n >= kLanes<A> ? whole_lines(y.data, runs * n, false) : Lines{};
    if (lines.end > 0) {
      return normalize_joined_planes<S, activation>(x.data, residual.data, y.data, lines, runs, n, all_parameters.of, negative_slope);
    }
  }
  for (int64_t r = 0; r < runs; ++r) {
    const S *px = x.run(r), *pr = residual.run(r);
    S* py = y.run(r);
    uint8_t* ps = mask.run(r);
    const auto& parameters = all_parameters.of_run(r);
    const Lines past = past_cache ? whole_lines(py, n, ps != nullptr) : Lines{};
    const auto write = [&](int64_t i, Vec<A> v) EVENNORM_INLINE_LAMBDA {
      i >= past.begin && i < past.end ? store_past_cache(py + i, v) : store(py + i, v);
    };
    const auto value = [&](int64_t i, Vec<A> v) EVENNORM_INLINE_LAMBDA {
      const Linear<A> linear = parameters.linear(i);
      return linear(linear.centred(v));
    };
    if (pr == nullptr) {
      // The last vector overlaps the one before, unless that went past the cache. It is read first: y may be x.
      const int64_t last = past.end > 0 ? -1 : n - kLanes<A>;
      const Vec<A> tail = last >= 0 ? load(px + last) : Vec<A>{};
      const auto finished = [&](int64_t i, Vec<A> v) EVENNORM_INLINE_LAMBDA { return activated<activation>(value(i, v), negative_slope); };
      over<A>(
          n, past.begin,
          [&](int64_t i) EVENNORM_INLINE_LAMBDA {
            if (each != Each::element) prefetch(px + i + x.stride);
            write(i, finished(i, load(px + i)));
          },
          [&](int64_t i, int64_t left) EVENNORM_INLINE_LAMBDA {
            if (last >= 0) store(py + last, finished(last, tail));
            else store_some(py + i, finished(i, load_some(px + i, left)), left);
          });
    } else {
      over<A>(
          n, past.begin,
          [&](int64_t i) EVENNORM_INLINE_LAMBDA {
            const Vec<A> z = value(i, load(px + i)) + load(pr + i);
            if (activation != Activation::none && ps) store_mask<A>(ps, i, ~mask_to_bits(sloped<activation>(z)) & kAllLanes<A>);
            write(i, activated<activation>(z, negative_slope));
          },
          [&](int64_t i, int64_t left) EVENNORM_INLINE_LAMBDA {
            const Vec<A> z = value(i, load_some(px + i, left)) + load_some(pr + i, left);
            if (activation != Activation::none && ps) store_some_mask<A>(ps, i, ~mask_to_bits(sloped<activation>(z)) & kAllLanes<A>, left);
            store_some(py + i, activated<activation>(z, negative_slope), left);
          });
    }
  }
}

// dz, from the saved activation mask or from z.
template <class A, Activation activation, bool from_mask>
EVENNORM_INLINE Vec<A> gate(Vec<A> dy, Vec<A> centred, const Linear<A>& linear, const uint8_t* mask, int64_t i, int64_t n,
                            A negative_slope) {
  if constexpr (activation == Activation::none) return dy;
  else if constexpr (from_mask) return gated<activation>(~bits_to_mask<A>(load_mask<A>(mask, i, n)), dy, negative_slope);
  else return gated<activation>(sloped<activation>(linear(centred)), dy, negative_slope);
}

// Sums of dz and of dz * (x - mean).

template <class S, Activation activation, bool from_mask>
Pair gradient_planes(Span<const S> dy, Span<const S> x, MaskSpan mask, int64_t planes, int64_t n,
                     Parameters<Compute<S>, Each::call> parameters, Compute<S> negative_slope) {
  using A = Compute<S>;
  const Linear<A> linear = parameters.linear(0);
  const bool overlap = n >= kLanes<A> && !from_mask;
  const auto inside = overlap ? last_lanes<A>(n % kLanes<A>) : first_lanes<A>(n % kLanes<A>);
  const auto terms = [&](Vec<A> g, Vec<A> v, int64_t plane, int64_t i, int64_t left) {
    const Vec<A> centred = linear.centred(v);
    const Vec<A> dz = gate<A, activation, from_mask>(g, centred, linear, mask.run(plane), i, left, negative_slope);
    return Terms<A>{dz, dz * centred};
  };
  return sum_planes<A>(
      planes, n,
      [&](int64_t plane, int64_t i) {
        const S *const g = dy.run(plane) + i, *const v = x.run(plane) + i;
        prefetch(g + dy.stride);
        prefetch(v + x.stride);
        return terms(load(g), load(v), plane, i, kLanes<A>);
      },
      [&](int64_t plane, int64_t i, int64_t left) {
        const S *const g = dy.run(plane), *const v = x.run(plane);
        const int64_t last = n - kLanes<A>;
        const auto t = overlap ? terms(load(g + last), load(v + last), plane, last, kLanes<A>)
                               : terms(load_some(g + i, left), load_some(v + i, left), plane, i, left);
        return Terms<A>{select(inside, t.first, Vec<A>{}), select(inside, t.second, Vec<A>{})};
      });
}

template <class S, Activation activation, bool from_mask>
struct GradientBlock {
  using A = Compute<S>;
  Span<const S> dy, x;
  MaskSpan mask;
  Parameters<A, Each::element> parameters;
  A negative_slope;

  int64_t row_bytes() const { return x.stride * static_cast<int64_t>(sizeof(S)); }

  struct Stream {
    const GradientBlock& block;
    Linear<A> linear;
    int64_t i, left;

    EVENNORM_INLINE Terms<A> operator()(int64_t r) const {
      const S *const pg = block.dy.data + r * block.dy.stride + i, *const px = block.x.data + r * block.x.stride + i;
      const Vec<A> centred = linear.centred(left ? load_some(px, left) : load(px));
      const Vec<A> g = left ? load_some(pg, left) : load(pg);
      const uint8_t* const ps = from_mask ? block.mask.data + r * block.mask.stride : nullptr;
      const Vec<A> dz = gate<A, activation, from_mask>(g, centred, linear, ps, i, left ? left : kLanes<A>, block.negative_slope);
      return {dz, dz * centred};
    }
  };
  EVENNORM_INLINE Stream at(int64_t i) const { return some(i, 0); }
  EVENNORM_INLINE Stream some(int64_t i, int64_t left) const { return {*this, parameters.linear(i), i, left}; }
};

template <class S, Activation activation, bool from_mask>
void gradient_rows(Span<const S> dy, Span<const S> x, MaskSpan mask, int64_t rows, int64_t n,
                   Parameters<Compute<S>, Each::element> parameters, Compute<S> negative_slope, double* first, double* second) {
  sum_rows<Compute<S>>(rows, n, first, second,
                       GradientBlock<S, activation, from_mask>{dy, x, mask, parameters, negative_slope});
}

// dx, and dz where a residual asks for it.

template <class S, Activation activation, bool from_mask, Each each>
void input_gradient_runs(Span<const S> dy, Span<const S> x, Span<S> dx, Span<S> d_residual, MaskSpan mask, int64_t runs, int64_t n,
                         Parameters<Compute<S>, each> all_parameters, Compute<S> negative_slope, bool past_cache) {
  using A = Compute<S>;
  for (int64_t r = 0; r < runs; ++r) {
    const S *pg = dy.run(r), *px = x.run(r);
    S *pdx = dx.run(r), *pdz = d_residual.run(r);
    const uint8_t* ps = mask.run(r);
    const auto& parameters = all_parameters.of_run(r);
    const Lines past = past_cache ? whole_lines(pdx, n, from_mask) : Lines{};
    const auto write = [&](S* p, int64_t i, Vec<A> v) EVENNORM_INLINE_LAMBDA {
      i >= past.begin && i < past.end ? store_past_cache(p + i, v) : store(p + i, v);
    };
    const auto dz_and_dx = [&](Vec<A> g, Vec<A> v, int64_t i, int64_t left) EVENNORM_INLINE_LAMBDA {
      const Linear<A> linear = parameters.linear(i);
      const Vec<A> centred = linear.centred(v);
      const Vec<A> dz = gate<A, activation, from_mask>(g, centred, linear, ps, i, left, negative_slope);
      return Terms<A>{dz, parameters.gradient(i)(dz, centred)};
    };
    const int64_t last = n - kLanes<A>;
    const bool overlap = last >= 0 && !from_mask && past.end == 0;  // dx may be dy: what it needs is read first
    const Vec<A> g_tail = overlap ? load(pg + last) : Vec<A>{}, x_tail = overlap ? load(px + last) : Vec<A>{};
    over<A>(
        n, past.begin,
        [&](int64_t i) EVENNORM_INLINE_LAMBDA {
          if (each != Each::element) prefetch(pg + i + dy.stride), prefetch(px + i + x.stride);
          const auto [dz, d] = dz_and_dx(load(pg + i), load(px + i), i, kLanes<A>);
          write(pdx, i, d);
          if (from_mask && pdz) write(pdz, i, dz);
        },
        [&](int64_t i, int64_t left) EVENNORM_INLINE_LAMBDA {
          if (overlap) return store(pdx + last, dz_and_dx(g_tail, x_tail, last, kLanes<A>).second);
          const auto [dz, d] = dz_and_dx(load_some(pg + i, left), load_some(px + i, left), i, left);
          store_some(pdx + i, d, left);
          if (from_mask && pdz) store_some(pdz + i, dz, left);
        });
  }
}

}  // namespace evennorm::EVENNORM_ISA
