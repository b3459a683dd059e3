// Sums over one chunk: runs of contiguous elements go in, doubles come out.
//
// A plane holds values of one channel, a row one value of each channel. Float lanes take 16 additions before they are flushed to
// double: 64 leave a systematic bias.
#pragma once

#include "vector.h"

namespace evennorm::EVENNORM_ISA {

constexpr int kFlush = 16;
constexpr int kPlaneLanes = 4;                        // independent vectors, to hide the latency of an addition
constexpr int kRowVectors = kRegisters == 32 ? 4 : 2;  // vectors of channels kept in registers along the rows

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
    double totals[kLanes<A>] = {};
    add_to<A>(totals, sum);
    for (int width = kLanes<A> / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) totals[i] += totals[i + width];
    }
    return totals[0];
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

// Two sums per channel over `rows` of n elements, added to `first` and `second`. `block<V>(i, n)` makes the function that gives the
// terms of row r in vector v of the V vectors from channel i on; the last one may hold fewer than a vector, n.
//
// All channels of 16 rows come before the next rows, so that memory is read from front to back.
template <class A, class Block>
EVENNORM_INLINE void sum_rows(int64_t rows, int64_t n, double* first, double* second, const Block& block) {
  constexpr int64_t kWidth = kRowVectors * kLanes<A>;
  const int64_t together = block.together();
  for (int64_t begin = 0; begin < rows; begin += together) {
    const int64_t end = begin + together < rows ? begin + together : rows;
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      const auto terms = block.template at<kRowVectors>(i);
      Vec<A> a[kRowVectors] = {}, b[kRowVectors] = {};
      for (int64_t r = begin; r < end; ++r) {
        for (int v = 0; v < kRowVectors; ++v) {
          const Terms<A> t = terms(r, v);
          a[v] += t.first;
          b[v] += t.second;
        }
      }
      for (int v = 0; v < kRowVectors; ++v) {
        add_to<A>(first + i + v * kLanes<A>, a[v]);
        add_to<A>(second + i + v * kLanes<A>, b[v]);
      }
    }
    for (; i < n; i += kLanes<A>) {
      const auto terms = block.some(i, n - i);
      Vec<A> a = {}, b = {};
      for (int64_t r = begin; r < end; ++r) {
        const Terms<A> t = terms(r, 0);
        a += t.first;
        b += t.second;
      }
      add_some_to<A>(first + i, a, n - i);
      add_some_to<A>(second + i, b, n - i);
    }
  }
}

}  // namespace evennorm::EVENNORM_ISA
