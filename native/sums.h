// Sums over one chunk: runs of contiguous elements go in, doubles come out.
//
// A plane holds values of one channel, a row one value of each channel. Float lanes take 16 additions before they are flushed to
// double: 64 leave a systematic bias.
#pragma once

#include <type_traits>

#include "vector.h"

namespace evennorm::EVENNORM_ISA {

constexpr int kFlush = 16;
constexpr int kPlaneLanes = 4;                        // independent vectors, to hide the latency of an addition

struct Pair {
  double first = 0, second = 0;
};

template <class Half>
EVENNORM_INLINE Vec<double> to_doubles(Half half) {
  if constexpr (sizeof(Half) == kVectorBytes) return half;
#if defined(__AVX512F__)
  else return bit_cast<Vec<double>>(_mm512_cvtps_pd(bit_cast<__m256>(half)));
#elif defined(__AVX2__)  // GCC 12 converts two at a time by itself
  else return bit_cast<Vec<double>>(_mm256_cvtps_pd(bit_cast<__m128>(half)));
#else
  else return __builtin_convertvector(half, Vec<double>);
#endif
}

// Adds every lane to a double in memory, as many at a time as a vector holds doubles.
template <class A>
EVENNORM_INLINE void add_to(double* totals, Vec<A> v) {
  constexpr int kHalf = kVectorBytes / sizeof(double);
  typedef A Half __attribute__((vector_size(kHalf * sizeof(A))));
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<A>; i += kHalf) {
    Half half;
    std::memcpy(&half, reinterpret_cast<const char*>(&v) + i * sizeof(A), sizeof(half));
    Vec<double> total;
    std::memcpy(&total, totals + i, sizeof(total));
    total += to_doubles(half);
    std::memcpy(totals + i, &total, sizeof(total));
  }
}

// Adds the first n lanes.
template <class A>
EVENNORM_INLINE void add_some_to(double* totals, Vec<A> v, int64_t n) {
  if (n >= kLanes<A>) return add_to<A>(totals, v);
  for (int64_t i = 0; i < n; ++i) totals[i] += v[i];
}

// The sum of all lanes in double, halves first: lane 0 with the middle one, and so on.
EVENNORM_INLINE double sum_of_lanes(Vec<double> v) {
#if defined(__AVX512F__)
  const __m512d all = bit_cast<__m512d>(v);
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(all), _mm512_extractf64x4_pd(all, 1));
#elif defined(__AVX2__)
  const __m256d four = bit_cast<__m256d>(v);
#endif
#if defined(__AVX2__)
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(two) + _mm_cvtsd_f64(_mm_unpackhi_pd(two, two));
#else
  return v[0] + v[1];
#endif
}
EVENNORM_INLINE double sum_of_lanes(Vec<float> v) {
  double halves[kLanes<float>] = {};
  add_to<float>(halves, v);
  Vec<double> low, high;
  std::memcpy(&low, halves, sizeof(low));
  std::memcpy(&high, halves + kLanes<double>, sizeof(high));
  return sum_of_lanes(low + high);
}

// Two sums over planes; their terms come from the caller, a vector of each for one lane at a time.
template <class A>
class PlaneSums {
 public:
  EVENNORM_INLINE void add(int lane, Vec<A> first, Vec<A> second) {
    first_[lane] += first;
    second_[lane] += second;
  }
  // After at most one addition to every lane.
  EVENNORM_INLINE void step() {
    if (++steps_ == kFlush) flush();
  }
  EVENNORM_INLINE Pair total() {
    flush();
    return total_;
  }

 private:
  EVENNORM_INLINE void flush() {
    if (steps_ == 0) return;
    steps_ = 0;
    total_.first += drained(first_);
    total_.second += drained(second_);
  }
  EVENNORM_INLINE static double drained(Vec<A>* lanes) {
    const Vec<A> sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    for (int i = 0; i < kPlaneLanes; ++i) lanes[i] = Vec<A>{};
    return sum_of_lanes(sum);
  }

  Vec<A> first_[kPlaneLanes] = {}, second_[kPlaneLanes] = {};
  Pair total_;
  int steps_ = 0;
};

// Two sums over `planes` runs of n elements. `at(plane, i)` and `some(plane, i, n)` give the terms of the elements from i on.
template <class A, class At, class Some>
EVENNORM_INLINE Pair sum_planes(int64_t planes, int64_t n, const At& at, const Some& some) {
  constexpr int64_t kStep = kPlaneLanes * kLanes<A>;
  PlaneSums<A> sums;
  for (int64_t plane = 0; plane < planes; ++plane) {
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      for (int lane = 0; lane < kPlaneLanes; ++lane) {
        const auto terms = at(plane, i + lane * kLanes<A>);
        sums.add(lane, terms.first, terms.second);
      }
      sums.step();
    }
    if (i == n) continue;
#pragma GCC unroll 4
    for (int lane = 0; lane + 1 < kPlaneLanes; ++lane) {  // lanes by constants, or the compiler keeps them in memory
      if (i + kLanes<A> > n) break;
      const auto terms = at(plane, i);
      sums.add(lane, terms.first, terms.second);
      i += kLanes<A>;
    }
    if (i < n) {
      const auto terms = some(plane, i, n - i);
      sums.add(kPlaneLanes - 1, terms.first, terms.second);
    }
    sums.step();
  }
  return sums.total();
}

template <class A>
struct Terms {
  Vec<A> first, second;
};

// Two sums per channel over `rows` of n elements, added to `first` and `second`. `block.at(i)` makes the function that gives the terms
// of row r in the vector of channels from i on; `block.some(i, n)` does where only n channels are left.
//
// Memory is read from front to back at two places, the halves of the rows: one alone, or sums that stay in registers along rows and so
// read strides apart, take half as long again to twice as long where x is not in cache. Short rows are taken `together`.
template <class A, int together, class Block>
EVENNORM_INLINE void sum_rows_together(int64_t rows, int64_t n, double* first, double* second, const Block& block) {
  constexpr int64_t kTile = 8192 / sizeof(A);  // channels, whose sums stay in the first cache
  constexpr std::integral_constant<int, 1> one;
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, together> some;
  alignas(kVectorBytes) A a[kTile], b[kTile];
  const int64_t half = rows / 2 / together * together;
  for (int64_t tile = 0; tile < n; tile += kTile) {
    const int64_t width = n - tile < kTile ? n - tile : kTile;
    const auto add = [&](auto number, auto places, int64_t r, bool fresh) {
      const auto add_vector = [&](int64_t i, const auto& terms) {
        Terms<A> sum{};
        for (int k = 0; k < number * places; ++k) {
          const Terms<A> t = terms(r + k / places + k % places * half);
          sum.first = k == 0 ? t.first : sum.first + t.first;
          sum.second = k == 0 ? t.second : sum.second + t.second;
        }
        store(a + i, fresh ? sum.first : load(a + i) + sum.first);
        store(b + i, fresh ? sum.second : load(b + i) + sum.second);
      };
      int64_t i = 0;
      for (; i + kLanes<A> <= width; i += kLanes<A>) add_vector(i, block.at(tile + i));
      if (i < width) add_vector(i, block.some(tile + i, width - i));
      asm volatile("" ::: "memory");  // or compilers work on several of these loops at a time, and read strides apart
    };
    const auto flush = [&] {
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        add_some_to<A>(first + tile + i, load(a + i), width - i);
        add_some_to<A>(second + tile + i, load(b + i), width - i);
      }
    };
    for (int64_t begin = 0; begin < half; begin += kFlush / 2) {
      for (int64_t r = begin; r < half && r < begin + kFlush / 2; r += together) add(some, two, r, r == begin);
      flush();
    }
    for (int64_t begin = 2 * half; begin < rows; begin += kFlush) {
      for (int64_t r = begin; r < rows && r < begin + kFlush; ++r) add(one, one, r, r == begin);
      flush();
    }
  }
}

template <class A, class Block>
EVENNORM_INLINE void sum_rows(int64_t rows, int64_t n, double* first, double* second, const Block& block) {
  if (block.row_bytes() <= 256) sum_rows_together<A, 2>(rows, n, first, second, block);
  else sum_rows_together<A, 1>(rows, n, first, second, block);
}

}  // namespace evennorm::EVENNORM_ISA
