// What happens to one element: its normalized value, its share in the sums, its gradient. The formulas of core/normalize.py.
#pragma once

#include "sums.h"
#include "vector.h"

namespace evennorm::EVENNORM_ISA {

enum class Activation { none, relu, relu6, leaky_relu };

constexpr int kRelu6Limit = 6;

inline Activation activation_of(double negative_slope, double limit) {
  if (limit == kRelu6Limit) return Activation::relu6;
  return negative_slope == 1 ? Activation::none : negative_slope == 0 ? Activation::relu : Activation::leaky_relu;
}

// Of one channel, or of a vector of channels: z = (x - mean) * scale + shift.
template <class A>
struct Linear {
  Vec<A> mean, scale, shift;

  EVENNORM_INLINE Vec<A> centred(Vec<A> x) const { return x - mean; }
  EVENNORM_INLINE Vec<A> operator()(Vec<A> centred) const { return centred * scale + shift; }
};

// a <= b. GCC 12 fails on this comparison of two doubles on a processor that has SSE2 only.
template <class V>
EVENNORM_INLINE auto at_most(V a, V b) {
#if defined(__SSE2__) && !defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 8) return bit_cast<decltype(a <= b)>(_mm_cmple_pd(bit_cast<__m128d>(a), bit_cast<__m128d>(b)));
  else return a <= b;
#else
  return a <= b;
#endif
}

// Where the activation's derivative is its slope, which is 0 beyond relu6's limit too; not where z is NaN.
template <Activation activation, class V>
EVENNORM_INLINE auto sloped(V z) {
  if constexpr (activation == Activation::relu6) return at_most(z, V{}) | at_most(V{} + kRelu6Limit, z);
  else return at_most(z, V{});
}

// The value where the activation's derivative is 1, elsewhere the slope times the value.
template <Activation activation, class Mask, class V, class A>
EVENNORM_INLINE V gated(Mask sloped, V value, A negative_slope) {
  if constexpr (activation == Activation::none) return value;
  else if constexpr (activation == Activation::leaky_relu) return select(sloped, value * negative_slope, value);
  else return select(sloped, V{}, value);
}

template <Activation activation, class V, class A>
EVENNORM_INLINE V activated(V z, A negative_slope) {
  if constexpr (activation == Activation::relu6) {
    const V limit = V{} + kRelu6Limit;
    return select(at_most(z, V{}), V{}, select(at_most(limit, z), limit, z));
  } else {
    return gated<activation>(sloped<activation>(z), z, negative_slope);
  }
}

// dx = scale * dz - centred * slope - offset.
template <class A>
struct InputGradient {
  Vec<A> scale, slope, offset;

  EVENNORM_INLINE Vec<A> operator()(Vec<A> dz, Vec<A> centred) const { return dz * scale - (centred * slope + offset); }
};

// The activation mask of a vector of a run: a bit per element, 1 if the activation's derivative is 1.
template <class A>
inline void store_mask(uint8_t* mask, int64_t i, unsigned bits) {
  if constexpr (kLanes<A> >= 8) {
    std::memcpy(mask + i / 8, &bits, kLanes<A> / 8);
  } else {
    const int shift = static_cast<int>(i % 8);
    mask[i / 8] = static_cast<uint8_t>(shift == 0 ? bits : mask[i / 8] | bits << shift);
  }
}

// The last vector of a run may have fewer bytes left than it has lanes.
template <class A>
inline void store_some_mask(uint8_t* mask, int64_t i, unsigned bits, int64_t n) {
  if (kLanes<A> >= 16 && n <= 8) mask[i / 8] = static_cast<uint8_t>(bits);
  else store_mask<A>(mask, i, bits);
}

template <class A>
inline unsigned load_mask(const uint8_t* mask, int64_t i, int64_t n) {
  if constexpr (kLanes<A> >= 16) {
    uint16_t bits = mask[i / 8];
    if (n > 8) std::memcpy(&bits, mask + i / 8, 2);
    return bits;
  } else {
    return mask[i / 8] >> (i % 8);
  }
}

}  // namespace evennorm::EVENNORM_ISA
