// The kernels against a textbook in double, in every layout, on every instruction set and by several threads. Run under sanitizers.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "batch_norm.h"
#include "pages.h"
#include "running.h"

using namespace evennorm;

namespace {

int failures = 0;

void check(bool holds, const char* what, const Shape& s, const char* where) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s on %s, groups %ld outer %ld channel %ld inner %ld\n", what, where, static_cast<long>(s.groups),
               static_cast<long>(s.outer), static_cast<long>(s.channel), static_cast<long>(s.inner));
}

// An array of exactly the size it needs, so that a sanitizer sees one element too many; it may lie as planes, rows or with gaps.
enum class Lie { planes, rows, gaps };

template <class T>
struct Array {
  std::vector<T> values;
  View view;

  Array(const Shape& s, Lie lie) {
    const int64_t gap = lie == Lie::gaps ? 2 : 1;
    if (lie == Lie::rows) view = {nullptr, s.outer * s.channel * s.inner, s.inner * s.channel, 1, s.channel};
    else view = {nullptr, s.outer * s.channel * s.inner * gap, s.channel * s.inner * gap, s.inner * gap, gap};
    values.resize(static_cast<size_t>(s.groups * s.outer * s.channel * s.inner * gap));
    view.data = values.data();
  }
  T& at(int64_t g, int64_t o, int64_t c, int64_t i) {
    return values[static_cast<size_t>(g * view.group + o * view.outer + c * view.channel + i * view.inner)];
  }
};

template <class T>
void each(const Shape& s, const T& body) {
  for (int64_t g = 0; g < s.groups; ++g)
    for (int64_t o = 0; o < s.outer; ++o)
      for (int64_t c = 0; c < s.channel; ++c)
        for (int64_t i = 0; i < s.inner; ++i) body(g, o, c, i);
}

// An activation, and a gamma by which its bends matter.
struct Bend {
  double slope, limit = std::numeric_limits<double>::infinity();

  double gamma() const { return limit == 6 ? 4 : 1.5; }
  double derivative(double z) const { return z >= limit ? 0 : z > 0 ? 1 : slope; }
};

template <class A>
struct Result {
  Array<A> y, dx, d_residual;
  std::vector<A> statistics, d_gamma, d_beta;
  bool same_in_steps = true;  // what forward and backward compute at once, and their parts one after the other
};

template <class A>
Result<A> run(const Operations& kernels, const Shape& s, Array<A>& x, Array<A>& dy, Array<A>* residual, Lie lie, Bend bend) {
  const size_t channels = static_cast<size_t>(s.channel), all = static_cast<size_t>(s.groups) * channels;
  Result<A> r{{s, lie}, {s, lie}, {s, lie}, std::vector<A>(3 * all), std::vector<A>(channels), std::vector<A>(channels)};
  const std::vector<A> gamma(channels, A(bend.gamma())), beta(channels, A(0.25));
  const bool keeps_mask = residual != nullptr && bend.slope != 1;
  std::vector<uint8_t> mask(keeps_mask ? static_cast<size_t>(kernels.mask_bytes(s, r.y.view)) : 0);
  uint8_t* const kept = keeps_mask ? mask.data() : nullptr;
  A* const mean = r.statistics.data();
  const Dtype dtype = sizeof(A) == 8 ? Dtype::float64 : Dtype::float32;
  const Forward forward{dtype, s, x.view, residual == nullptr ? View{} : residual->view, r.y.view, gamma.data(), beta.data(),
                        mean, mean + all, mean + 2 * all, kept, 1e-3, bend.slope, bend.limit};
  kernels.forward(forward, process_workers());
  const Backward backward{dtype, s, dy.view, x.view, r.dx.view, keeps_mask ? r.d_residual.view : View{}, gamma.data(), beta.data(),
                          mean, mean + all, mean + 2 * all, kept, nullptr, nullptr, nullptr, nullptr, r.d_gamma.data(), r.d_beta.data(),
                          1e-3, bend.slope, bend.limit, static_cast<double>(s.outer * s.inner)};
  kernels.backward(backward, process_workers());

  Array<A> y(s, lie), dx(s, lie), d_residual(s, lie);
  std::vector<A> sums(2 * all);
  Forward normalize = forward;
  normalize.y.data = y.view.data;
  kernels.normalize(normalize, process_workers());
  Backward in_steps = backward;
  in_steps.dx.data = dx.view.data;
  in_steps.d_residual.data = keeps_mask ? d_residual.view.data : nullptr;
  in_steps.sum_dz = sums.data();
  in_steps.sum_dz_centred = sums.data() + all;
  kernels.gradient_sums(in_steps, process_workers());
  kernels.input_gradient(in_steps, process_workers());
  r.same_in_steps = y.values == r.y.values && dx.values == r.dx.values && d_residual.values == r.d_residual.values;
  return r;
}

template <class A>
void compare(const Operations& kernels, const Shape& s, Lie lie, Lie other, Bend bend, bool with_residual) {
  std::mt19937_64 random(7);
  std::normal_distribution<double> normal;
  Array<A> x(s, other), dy(s, lie == Lie::rows ? Lie::planes : other), residual(s, other);
  each(s, [&](int64_t g, int64_t o, int64_t c, int64_t i) {
    x.at(g, o, c, i) = static_cast<A>(normal(random) + 1000);
    dy.at(g, o, c, i) = static_cast<A>(normal(random));
    residual.at(g, o, c, i) = static_cast<A>(normal(random));
  });
  set_num_threads(1);
  Result<A> one = run(kernels, s, x, dy, with_residual ? &residual : nullptr, lie, bend);
  for (const int threads : {2, 5}) {
    set_num_threads(threads);
    const Result<A> many = run(kernels, s, x, dy, with_residual ? &residual : nullptr, lie, bend);
    check(one.same_in_steps && many.same_in_steps, "same bits at once and in steps", s, kernels.name);
    check(one.y.values == many.y.values && one.dx.values == many.dx.values && one.statistics == many.statistics &&
              one.d_gamma == many.d_gamma && one.d_beta == many.d_beta,
          "same bits for any number of threads", s, kernels.name);
  }
  const double bound = sizeof(A) == 8 ? 1e-9 : 2e-5, n = static_cast<double>(s.outer * s.inner);
  double worst = 0;
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t c = 0; c < s.channel; ++c) {
      const auto over = [&](const auto& body) {
        for (int64_t o = 0; o < s.outer; ++o)
          for (int64_t i = 0; i < s.inner; ++i) body(o, i);
      };
      double mean = 0, variance = 0, sum = 0, sum_centred = 0;
      bool near = false;
      over([&](int64_t o, int64_t i) { mean += x.at(g, o, c, i) / n; });
      over([&](int64_t o, int64_t i) { variance += (x.at(g, o, c, i) - mean) * (x.at(g, o, c, i) - mean) / n; });
      const double inverse = 1 / std::sqrt(variance + 1e-3);
      const auto z = [&](int64_t o, int64_t i) {
        return bend.gamma() * (x.at(g, o, c, i) - mean) * inverse + 0.25 + (with_residual ? residual.at(g, o, c, i) : A(0));
      };
      const auto dz = [&](int64_t o, int64_t i) { return bend.derivative(z(o, i)) * dy.at(g, o, c, i); };
      over([&](int64_t o, int64_t i) {
        near = near || (bend.slope != 1 && std::min(std::abs(z(o, i)), std::abs(z(o, i) - bend.limit)) < 1e-5);
        sum += dz(o, i);
        sum_centred += dz(o, i) * (x.at(g, o, c, i) - mean);
        worst = std::max(worst, std::abs(one.y.at(g, o, c, i) - std::min(bend.limit, (z(o, i) > 0 ? 1 : bend.slope) * z(o, i))));
      });
      if (near) continue;  // a sign that rounding decides
      over([&](int64_t o, int64_t i) {
        const double dx = bend.gamma() * inverse * (dz(o, i) - sum / n - (x.at(g, o, c, i) - mean) * inverse * inverse * sum_centred / n);
        worst = std::max(worst, std::abs(one.dx.at(g, o, c, i) - dx) / (1 + inverse));
        if (with_residual && bend.slope != 1) worst = std::max(worst, std::abs(one.d_residual.at(g, o, c, i) - dz(o, i)));
      });
    }
  }
  check(worst < bound, "y, dx and the residual's gradient", s, kernels.name);
}

constexpr std::array<Shape, 19> kShapes{{{1, 1, 1, 1},
                                         {1, 2, 3, 1},
                                         {1, 5, 7, 3},
                                         {1, 3, 17, 49},
                                         {1, 64, 5, 1},
                                         {1, 300, 33, 1},
                                         {2, 4, 3, 31},
                                         {1, 2, 2, 20001},
                                         {9, 3, 16, 4},
                                         {1, 2, 37, 2},
                                         {2, 19, 21, 9},
                                         {1, 40, 35, 33},
                                         {1, 9, 40, 70},
                                         {1, 0, 4, 3},
                                         {0, 2, 4, 3},
                                         {1, 2, 0, 3},
                                         {1, 16, 1, 5},
                                         {1, 40, 64, 196},
                                         {1, 49, 1603, 1}}};

void layouts() {
  for (const char* name : {"baseline", "avx2", "avx512"}) {
    const Operations* const kernels = operations(name);
    if (kernels == nullptr) {
      std::printf("this processor has no %s: not tested\n", name);
      continue;
    }
    for (const Shape& s : kShapes) {
      for (const Lie lie : {Lie::planes, Lie::rows}) {
        for (const Lie other : {Lie::planes, Lie::rows, Lie::gaps}) {
          for (const Bend bend : {Bend{1}, Bend{0}, Bend{0, 6}, Bend{0.1}}) {
            for (const bool residual : {false, true}) {
              write_past_cache_from(residual == (bend.slope > 0) ? 0 : kPastCache);
              compare<float>(*kernels, s, lie, other, bend, residual);
              if (s.inner < 1000) compare<double>(*kernels, s, lie, other, bend, residual);
            }
          }
        }
      }
    }
  }
}

// Running statistics inside the forward call: as `update_running_stats` leaves them after it, counted, and skipped as a whole.
template <class A>
void running_statistics(Dtype dtype) {
  constexpr double kCumulative = -1;
  for (const Shape& s : kShapes) {
    for (const double decay : {0.9, 0.0, kCumulative}) {
      for (const bool poisoned : {false, true}) {
        const size_t channels = static_cast<size_t>(s.channel), all = static_cast<size_t>(s.groups) * channels;
        Array<A> x(s, Lie::planes), y(s, Lie::planes);
        each(s, [&](int64_t g, int64_t o, int64_t c, int64_t i) { x.at(g, o, c, i) = static_cast<A>((g + 3 * o + c * i) % 17 + 100); });
        const bool has_values = !x.values.empty();
        if (poisoned && has_values) x.values.back() = std::numeric_limits<A>::infinity();
        const bool taken = has_values && !poisoned;
        std::vector<A> batch(3 * all, A(7)), running(3 * channels, A(2)), expected = running;
        std::fill(running.begin() + s.channel, running.begin() + 2 * s.channel, A(1e-8));
        std::copy(running.begin(), running.end(), expected.begin());
        int64_t batches = 6, skipped = 2;
        A* const mean = batch.data();
        const Bend relu{0};
        Forward call{dtype, s, x.view, {}, y.view, nullptr, nullptr, mean, mean + all, mean + 2 * all, nullptr,
                     1e-3, relu.slope, relu.limit};
        call.running = {running.data(), running.data() + s.channel, running.data() + 2 * s.channel, &batches, &skipped, decay, true};
        check(operations().forward(call, process_workers()) == taken, "which batches are skipped", s, operations().name);
        const bool counts = taken || decay != kCumulative;  // the plain average counts what has a part in it
        check(batches == (counts ? 7 : 6) && skipped == (taken ? 2 : 3), "batches are counted", s, operations().name);
        const double weight = decay == kCumulative ? static_cast<A>(6) / static_cast<A>(7) : decay;
        update_running_stats<A>({mean, mean + all, mean + 2 * all}, s.outer * s.inner, s.groups, s.channel, true, weight,
                                expected.data(), expected.data() + s.channel, expected.data() + 2 * s.channel);
        check(running == expected, "running statistics inside the call", s, operations().name);

        call.running.batches = call.running.skipped = nullptr;  // without a count the cumulative average stays where it is
        operations().moments(call, process_workers());
        update_running_stats<A>({mean, mean + all, mean + 2 * all}, s.outer * s.inner, s.groups, s.channel, true,
                                decay == kCumulative ? 1 : decay, expected.data(), expected.data() + s.channel,
                                expected.data() + 2 * s.channel);
        check(running == expected, "running statistics beside the moments", s, operations().name);
        operations().normalize(call, process_workers());
        check(running == expected, "given statistics update nothing", s, operations().name);
      }
    }
  }
}

// Every pair of bytes is a half-precision number; those that a float holds come back as they were.
void half_precision() {
  for (const Dtype dtype : {Dtype::bfloat16, Dtype::float16}) {
    for (const char* name : {"baseline", "avx2", "avx512"}) {
      const Operations* const kernels = operations(name);
      if (kernels == nullptr) continue;
      std::vector<uint16_t> x(1 << 16), y(1 << 16);
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<uint16_t>(i);
      const Shape s{1, 1 << 16, 1, 1};
      float mean = 0, variance = 1;
      const Forward identity{dtype, s, {x.data(), 0, 1, 1, 1}, {}, {y.data(), 0, 1, 1, 1}, nullptr, nullptr, &mean, nullptr, &variance,
                             nullptr, 0, Bend{1}.slope, Bend{1}.limit};
      kernels->normalize(identity, process_workers());
      const int mantissa = dtype == Dtype::bfloat16 ? 0x7f : 0x3ff, exponent = 0x7fff & ~mantissa;
      bool same = true;
      for (size_t i = 0; i < x.size(); ++i) {
        const bool nan = (x[i] & exponent) == exponent && (x[i] & mantissa) != 0;
        const bool still_nan = (y[i] & exponent) == exponent && (y[i] & mantissa) != 0;
        const bool zero = (x[i] & 0x7fff) == 0;  // -0 * 1 + 0 is 0
        same = same && (nan ? still_nan : zero ? (y[i] & 0x7fff) == 0 : y[i] == x[i]);
      }
      check(same, dtype == Dtype::bfloat16 ? "bfloat16 there and back" : "float16 there and back", s, name);
    }
  }
}

void many_callers() {
  const Shape s{1, 64, 33, 100};
  set_num_threads(4);
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t) {
    callers.emplace_back([&s, t] {
      Array<float> x(s, Lie::rows), dy(s, Lie::rows);
      each(s, [&](int64_t g, int64_t o, int64_t c, int64_t i) { x.at(g, o, c, i) = static_cast<float>((o + c * i) % 13); });
      for (int round = 0; round < 20; ++round) run<float>(operations(), s, x, dy, nullptr, Lie::rows, Bend{0});
      void* const buffer = take_buffer(3 << 20);
      std::memset(buffer, t, 3 << 20);
      give_buffer(buffer, 3 << 20);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void forked_child() {
  const Shape s{1, 3000, 64, 1};
  set_num_threads(3);
  Array<float> x(s, Lie::rows), dy(s, Lie::rows);
  run<float>(operations(), s, x, dy, nullptr, Lie::rows, Bend{1});
  const pid_t child = fork();
  if (child == 0) {
    run<float>(operations(), s, x, dy, nullptr, Lie::rows, Bend{1});
    give_buffer(take_buffer(1 << 20), 1 << 20);
    _exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child computes", s, operations().name);
}

}  // namespace

// With an argument, only what ThreadSanitizer can tell something about; it cannot trace a child that starts threads.
int main(int argc, char**) {
  if (argc > 1) {
    compare<float>(operations(), {1, 40, 64, 196}, Lie::planes, Lie::planes, Bend{0}, true);
    compare<float>(operations(), {1, 3000, 64, 1}, Lie::rows, Lie::planes, Bend{0}, false);
    compare<float>(operations(), {1, 80, 1603, 1}, Lie::rows, Lie::rows, Bend{0}, false);
    compare<float>(operations(), {40, 30, 64, 4}, Lie::rows, Lie::rows, Bend{1}, false);
  } else {
    layouts();
    half_precision();
    running_statistics<float>(Dtype::float32);
    running_statistics<double>(Dtype::float64);
    forked_child();
  }
  write_past_cache_from(0);
  many_callers();
  set_buffer_limit(0);
  std::printf("%s: %d failures\n", operations().name, failures);
  return failures == 0 ? 0 : 1;
}
