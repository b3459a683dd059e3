// Vectors of the instruction set this file is compiled for: load from storage as float or double, store back rounded to nearest.
//
// Compiled once per instruction set, each in a namespace of its own, so that the linker never mixes them.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace evennorm::EVENNORM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// What holds vectors must not be called: they would go through memory.
#define EVENNORM_INLINE [[gnu::always_inline]] inline
#define EVENNORM_INLINE_LAMBDA __attribute__((always_inline))

template <class A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / sizeof(A);
template <class A>
constexpr unsigned kAllLanes = (1u << kLanes<A>) - 1;

typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type that a storage type is computed in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

// a where the mask is set, else b. SSE2 has no such instruction, and GCC 12 fails on the operator there.
template <class Mask, class V>
inline V select(Mask mask, V a, V b) {
#if defined(__AVX2__) || !defined(__SSE2__)
  return mask ? a : b;
#else
  return bit_cast<V>((mask & bit_cast<Mask>(a)) | (~mask & bit_cast<Mask>(b)));
#endif
}

inline Vec<float> widen(Bits16 h, BFloat16) { return bit_cast<Vec<float>>(__builtin_convertvector(h, Bits32) << 16); }

inline Bits16 narrow(Vec<float> v, BFloat16) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits32 quiet_nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(select(v == v, rounded, quiet_nan), Bits16);
}

#if defined(__AVX512F__)
inline Vec<float> widen(Bits16 h, Float16) { return bit_cast<Vec<float>>(_mm512_cvtph_ps(bit_cast<__m256i>(h))); }
inline Bits16 narrow(Vec<float> v, Float16) {
  return bit_cast<Bits16>(_mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
inline Vec<float> widen(Bits16 h, Float16) { return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(h))); }
inline Bits16 narrow(Vec<float> v, Float16) {
  return bit_cast<Bits16>(_mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec<float> widen(Bits16 h, Float16) {
  const Bits32 bits = __builtin_convertvector(h, Bits32);
  const Bits32 magnitude = (bits & 0x7fff) << 13;
  // Times 2^112 moves the exponent's bias, and makes normal numbers of subnormal ones.
  const Bits32 finite = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) * splat(0x1p112f));
  const Bits32 infinite = magnitude | 0x7f800000;
  return bit_cast<Vec<float>>(select((bits & 0x7c00) == 0x7c00, infinite, finite) | ((bits & 0x8000) << 16));
}
inline Bits16 narrow(Vec<float> v, Float16) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Below 2^-14 an addition to 0.5 shifts the bits to where they belong, and rounds them to nearest, ties to even.
  const Bits32 subnormal = bit_cast<Bits32>(bit_cast<Vec<float>>(magnitude) + splat(0.5f)) - 0x3f000000;
  const Bits32 normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  const Bits32 nan_or_infinite = 0x7c00 | select(magnitude > 0x7f800000, Bits32{} + 0x200, Bits32{});
  const Bits32 finite = select(magnitude < 0x38800000, subnormal, normal);
  const Bits32 half = select(magnitude >= 0x47800000, nan_or_infinite, finite);
  return __builtin_convertvector(half | (sign >> 16), Bits16);
}
#endif

template <class S>
inline Vec<Compute<S>> load(const S* p) {
  if constexpr (sizeof(S) == 2) {
    Bits16 h;
    std::memcpy(&h, p, sizeof(h));
    return widen(h, S{});
  } else {
    Vec<S> v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
}

template <class S>
inline Compute<S> load_one(const S* p) {
  if constexpr (sizeof(S) == 2) return widen(Bits16{p->bits}, S{})[0];
  else return *p;
}

template <class S>
inline void store(S* p, Vec<Compute<S>> v) {
  if constexpr (sizeof(S) == 2) {
    const Bits16 h = narrow(v, S{});
    std::memcpy(p, &h, sizeof(h));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}

// The elements [begin, end) of a run that fill whole cache lines; none if they have to be those from the start on, and are not. A line
// that is written both past the cache and through it costs several times what it saves.
struct Lines {
  int64_t begin = 0, end = 0;
};

template <class S>
inline Lines whole_lines(const S* p, int64_t n, bool from_start) {
  constexpr uintptr_t kLine = 64;
  constexpr int64_t kInLine = kLine / sizeof(S);
  const uintptr_t before = -reinterpret_cast<uintptr_t>(p) % kLine;
  const int64_t begin = static_cast<int64_t>(before / sizeof(S)), lines = (n - begin) / kInLine;
  return before % sizeof(S) != 0 || (from_start && before != 0) || lines < 1 ? Lines{} : Lines{begin, begin + lines * kInLine};
}

// What lies from `p` on is not needed soon, or does not fit in cache: it is written without being read first, where p is a multiple of
// the vector's bytes. `fence` comes before another thread may look at it.
template <class S>
EVENNORM_INLINE void store_past_cache(S* p, Vec<Compute<S>> v) {
#if defined(__SSE2__)
  const auto stored = [&] {
    if constexpr (sizeof(S) == 2) return narrow(v, S{});
    else return v;
  }();
  constexpr size_t kBytes = sizeof(stored);
  if (reinterpret_cast<uintptr_t>(p) % kBytes == 0) {
#if defined(__AVX512F__)
    if constexpr (kBytes == 64) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bit_cast<__m512i>(stored));
#endif
#if defined(__AVX2__)
    if constexpr (kBytes == 32) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bit_cast<__m256i>(stored));
#endif
    if constexpr (kBytes == 16) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), bit_cast<__m128i>(stored));
  }
#endif
  store(p, v);
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// All ones in the first n lanes.
template <class A>
inline auto first_lanes(int64_t n) {
  decltype(Vec<A>{} < Vec<A>{}) index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i < n ? -1 : 0;
  return index;
}

// All ones in the last n lanes.
template <class A>
inline auto last_lanes(int64_t n) {
  return ~first_lanes<A>(kLanes<A> - n);
}

// Fewer than a vector, in powers of two: a plane of 49 ends in one element, over and over, and so the branches are foreseen.
template <class S>
inline void copy_some(S* to, const S* from, int64_t n) {
  int64_t i = 0;
  if constexpr (kLanes<Compute<S>> > 8) {
    if (n & 8) std::memcpy(to + i, from + i, 8 * sizeof(S)), i += 8;
  }
  if constexpr (kLanes<Compute<S>> > 4) {
    if (n & 4) std::memcpy(to + i, from + i, 4 * sizeof(S)), i += 4;
  }
  if constexpr (kLanes<Compute<S>> > 2) {
    if (n & 2) std::memcpy(to + i, from + i, 2 * sizeof(S)), i += 2;
  }
  if (n & 1) to[i] = from[i];
}

// `n` elements, the other lanes 0. Through memory only where no instruction takes some lanes: a vector that is loaded right after it was
// stored in parts waits for them, which on planes of 9 took most of the time.
template <class S>
inline Vec<Compute<S>> load_some(const S* p, int64_t n) {
#if defined(__AVX512F__)
  const unsigned inside = (1u << n) - 1;
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), p));
  else if constexpr (sizeof(S) == 8) return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>(inside), p));
  else return widen(bit_cast<Bits16>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(inside), p)), S{});
#else
#if defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return bit_cast<Vec<float>>(_mm256_maskload_ps(p, bit_cast<__m256i>(first_lanes<float>(n))));
  else if constexpr (sizeof(S) == 8) return bit_cast<Vec<double>>(_mm256_maskload_pd(p, bit_cast<__m256i>(first_lanes<double>(n))));
#endif
  S buffer[kLanes<Compute<S>>] = {};
  copy_some(buffer, p, n);
  return load(buffer);
#endif
}

template <class S>
inline void store_some(S* p, Vec<Compute<S>> v, int64_t n) {
#if defined(__AVX512F__)
  const unsigned inside = (1u << n) - 1;
  if constexpr (sizeof(S) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(inside), bit_cast<__m512>(v));
  else if constexpr (sizeof(S) == 8) _mm512_mask_storeu_pd(p, static_cast<__mmask8>(inside), bit_cast<__m512d>(v));
  else _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(inside), bit_cast<__m256i>(narrow(v, S{})));
#else  // parts of what was stored are loaded without waiting; AVX2's masked stores take longer
  S buffer[kLanes<Compute<S>>];
  store(buffer, v);
  copy_some(p, buffer, n);
#endif
}

// Brings what is at p nearer, ahead of its use; p may lie behind the end of the array.
inline void prefetch(const void* p) { __builtin_prefetch(p); }

// One bit per lane, lane 0 lowest; and back.
template <class Mask>
inline unsigned mask_to_bits(Mask mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(mask[0]) == 4) return _mm512_movepi32_mask(bit_cast<__m512i>(mask));
  else return _mm512_movepi64_mask(bit_cast<__m512i>(mask));
#elif defined(__AVX2__)
  if constexpr (sizeof(mask[0]) == 4) return static_cast<unsigned>(_mm256_movemask_ps(bit_cast<__m256>(mask)));
  else return static_cast<unsigned>(_mm256_movemask_pd(bit_cast<__m256d>(mask)));
#elif defined(__SSE2__)
  if constexpr (sizeof(mask[0]) == 4) return static_cast<unsigned>(_mm_movemask_ps(bit_cast<__m128>(mask)));
  else return static_cast<unsigned>(_mm_movemask_pd(bit_cast<__m128d>(mask)));
#else
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) bits |= (static_cast<unsigned>(mask[i]) & 1u) << i;
  return bits;
#endif
}

template <class A>
inline auto bits_to_mask(unsigned bits) {
  decltype(Vec<A>{} < Vec<A>{}) lane, all = {};
  for (int i = 0; i < kLanes<A>; ++i) lane[i] = 1 << i;
  return ((all + bits) & lane) != 0;
}

}  // namespace evennorm::EVENNORM_ISA
