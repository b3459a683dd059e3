// evennorm.kernels._cpu: the kernels on addresses and strides. The Python side has checked shapes, dtypes and strides.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "batch_norm.h"
#include "exchange.h"
#include "exported.h"
#include "pages.h"
#include "running.h"

namespace nb = nanobind;
using namespace evennorm;

namespace {

using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

View view(uintptr_t address, const Sizes& strides) {
  const auto [group, outer, channel, inner] = strides;
  return {at(address), group, outer, channel, inner};
}

Shape shape_of(const Sizes& sizes) {
  const auto [groups, outer, channel, inner] = sizes;
  return {groups, outer, channel, inner};
}

Dtype dtype_of(int dtype) {
  if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype is 0 to 3, for float32, float64, bfloat16 and float16");
  return static_cast<Dtype>(dtype);
}

nb::dlpack::dtype dlpack_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::float32: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 32, 1};
    case Dtype::float64: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 64, 1};
    case Dtype::bfloat16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat), 16, 1};
    case Dtype::float16: return {static_cast<uint8_t>(nb::dlpack::dtype_code::Float), 16, 1};
  }
  return {};
}

struct Taken {
  void* data;
  size_t bytes;
};

const Operations* forced = nullptr;  // by a test

const Operations& current() { return forced != nullptr ? *forced : operations(); }

Exchange exchange;

int bits_of(Dtype dtype) { return dtype == Dtype::float64 ? 64 : 32; }

// mean, mean_low and variance, one behind the other.
struct Statistics {
  void *mean, *mean_low, *variance;

  Statistics(void* first, Dtype dtype, const Shape& shape) : mean(first), mean_low(first), variance(first) {
    if (first == nullptr) return;
    const int64_t step = shape.groups * shape.channel * (bits_of(dtype) / 8);
    mean_low = static_cast<char*>(first) + step;
    variance = static_cast<char*>(first) + 2 * step;
  }
};

bool update_running_stats(Dtype dtype, const Running& running, const void* mean, const void* mean_low, const void* variance, int64_t count,
                          int64_t channels) {
  const auto as = [&]<class A>(A*) {
    const auto array = [](const void* address) { return static_cast<const A*>(address); };
    return update_stats_and_counters<A>(running, {array(mean), array(mean_low), array(variance)}, count, 1, channels);
  };
  return dtype == Dtype::float64 ? as(static_cast<double*>(nullptr)) : as(static_cast<float*>(nullptr));
}

// What a forward pass returns: kernels/cpu.py and torch_plan.h read the numbers.
enum Fate { kAccepted, kSkipped, kUnfit };

// Forward passes over arrays of one shape that lie in one way.
class ForwardPlan {
 public:
  ForwardPlan(int dtype, const Sizes& sizes, const Sizes& x, const Sizes& residual, const Sizes& y, double epsilon, double negative_slope,
              double limit)
      : call_{} {
    call_.dtype = dtype_of(dtype);
    call_.shape = shape_of(sizes);
    call_.x = view(0, x);
    call_.residual = view(0, residual);
    call_.y = view(0, y);
    call_.epsilon = epsilon;
    call_.negative_slope = negative_slope;
    call_.limit = limit;
  }

  // Of this plan as a struct without arrays, for those who place them without Python.
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(&call_); }

  int64_t mask_bytes() const {
    View y = call_.y;
    y.data = at(1);
    return current().mask_bytes(call_.shape, y);
  }

  // By the moments of x, which are written to `statistics`.
  int forward(nb::handle x, nb::handle residual, nb::handle y, nb::handle gamma, nb::handle beta, nb::handle statistics, nb::handle mask,
              nb::handle running_mean, nb::handle running_mean_low, nb::handle running_variance, double decay, bool unbiased,
              nb::handle batches, nb::handle skipped) const {
    Arrays arrays(exchange);
    Forward call = placed(arrays, x, residual, y, gamma, beta, mask);
    const auto all = statistics_of(arrays, statistics);
    call.mean = all.mean;
    call.mean_low = all.mean_low;
    call.variance = all.variance;
    call.running.mean = row(arrays, running_mean);
    call.running.mean_low = row(arrays, running_mean_low);
    call.running.variance = row(arrays, running_variance);
    call.running.decay = decay;
    call.running.unbiased = unbiased;
    call.running.batches = static_cast<int64_t*>(arrays.row(batches, 1, kInteger, 64));
    call.running.skipped = static_cast<int64_t*>(arrays.row(skipped, 1, kInteger, 64));
    const bool whole = running_mean.is_none() == running_mean_low.is_none() && running_mean.is_none() == running_variance.is_none();
    if (!arrays.fit() || !whole) return kUnfit;
    return run(current().forward, call) ? kAccepted : kSkipped;
  }

  int normalize(nb::handle x, nb::handle residual, nb::handle y, nb::handle gamma, nb::handle beta, nb::handle mean, nb::handle mean_low,
                nb::handle variance, nb::handle mask) const {
    Arrays arrays(exchange);
    Forward call = placed(arrays, x, residual, y, gamma, beta, mask);
    call.mean = row(arrays, mean);
    call.mean_low = row(arrays, mean_low);
    call.variance = row(arrays, variance);
    return finished(arrays, call);
  }

  int normalize_again(nb::handle x, nb::handle residual, nb::handle y, nb::handle gamma, nb::handle beta, nb::handle statistics,
                      nb::handle mask) const {
    Arrays arrays(exchange);
    Forward call = placed(arrays, x, residual, y, gamma, beta, mask);
    const auto all = statistics_of(arrays, statistics);
    call.mean = all.mean;
    call.mean_low = all.mean_low;
    call.variance = all.variance;
    return finished(arrays, call);
  }

  int moments(nb::handle x, nb::handle statistics) const {
    Arrays arrays(exchange);
    Forward call = call_;
    call.x.data = arrays.array(x);
    const auto all = statistics_of(arrays, statistics);
    call.mean = all.mean;
    call.mean_low = all.mean_low;
    call.variance = all.variance;
    if (!arrays.fit()) return kUnfit;
    run(current().moments, call);
    return kAccepted;
  }

 private:
  template <class Result>
  static Result run(Result (*operation)(const Forward&, Workers&), const Forward& call) {
    const nb::gil_scoped_release released;
    return operation(call, process_workers());
  }

  static int finished(const Arrays& arrays, const Forward& call) {
    if (!arrays.fit()) return kUnfit;
    run(current().normalize, call);
    return kAccepted;
  }

  void* row(Arrays& arrays, nb::handle object) const {
    return arrays.row(object, call_.shape.channel, kFloat, bits_of(call_.dtype));
  }

  Statistics statistics_of(Arrays& arrays, nb::handle object) const {
    const int64_t count = 3 * call_.shape.groups * call_.shape.channel;
    return Statistics(arrays.own_row(object, count, kFloat, bits_of(call_.dtype)), call_.dtype, call_.shape);
  }

  Forward placed(Arrays& arrays, nb::handle x, nb::handle residual, nb::handle y, nb::handle gamma, nb::handle beta,
                 nb::handle mask) const {
    Forward call = call_;
    call.x.data = arrays.array(x);
    call.residual.data = arrays.array(residual);
    call.y.data = arrays.array(y);
    call.gamma = row(arrays, gamma);
    call.beta = row(arrays, beta);
    call.mask = static_cast<uint8_t*>(arrays.array(mask));
    return call;
  }

  Forward call_;
};

// Likewise of backward passes. `count` are the values behind each mean, infinite where statistics were given.
class BackwardPlan {
 public:
  BackwardPlan(int dtype, const Sizes& sizes, const Sizes& dy, const Sizes& x, const Sizes& dx, double epsilon, double negative_slope,
               double limit, double count)
      : call_{} {
    call_.dtype = dtype_of(dtype);
    call_.shape = shape_of(sizes);
    call_.dy = view(0, dy);
    call_.x = view(0, x);
    call_.dx = call_.d_residual = view(0, dx);
    call_.epsilon = epsilon;
    call_.negative_slope = negative_slope;
    call_.limit = limit;
    call_.count = count;
  }

  uintptr_t address() const { return reinterpret_cast<uintptr_t>(&call_); }

  int backward(nb::handle dy, nb::handle x, nb::handle dx, nb::handle d_residual, nb::handle gamma, nb::handle beta,
               nb::handle statistics, nb::handle mask, nb::handle d_mean, nb::handle d_variance, nb::handle d_gamma,
               nb::handle d_beta) const {
    Arrays arrays(exchange);
    Backward call = placed(arrays, dy, x, gamma, beta, statistics, mask);
    call.dx.data = arrays.array(dx);
    call.d_residual.data = arrays.array(d_residual);
    call.d_mean = row(arrays, d_mean, call_.shape.groups);
    call.d_variance = row(arrays, d_variance, call_.shape.groups);
    call.d_gamma = own_row(arrays, d_gamma, 1);
    call.d_beta = own_row(arrays, d_beta, 1);
    return run(arrays, call, current().backward);
  }

  // The first half, up to what devices exchange: sum dz and sum dz * (x - mean), one behind the other, and the gradients of gamma and beta.
  int gradient_sums(nb::handle dy, nb::handle x, nb::handle gamma, nb::handle beta, nb::handle statistics, nb::handle mask,
                    nb::handle sums, nb::handle d_gamma, nb::handle d_beta) const {
    Arrays arrays(exchange);
    Backward call = placed(arrays, dy, x, gamma, beta, statistics, mask);
    call.dx.data = call.x.data;  // nothing is written there; bits of the activation mask lie as they do for dx
    set_sums(arrays, call, sums);
    call.d_gamma = own_row(arrays, d_gamma, 1);
    call.d_beta = own_row(arrays, d_beta, 1);
    return run(arrays, call, current().gradient_sums);
  }

  // The second half, by the sums over all devices and the `count` of values on all of them.
  int input_gradient(nb::handle dy, nb::handle x, nb::handle dx, nb::handle d_residual, nb::handle gamma, nb::handle beta,
                     nb::handle statistics, nb::handle mask, nb::handle sums, nb::handle d_mean, nb::handle d_variance,
                     double count) const {
    Arrays arrays(exchange);
    Backward call = placed(arrays, dy, x, gamma, beta, statistics, mask);
    call.dx.data = arrays.array(dx);
    call.d_residual.data = arrays.array(d_residual);
    set_sums(arrays, call, sums);
    call.d_mean = row(arrays, d_mean, call_.shape.groups);
    call.d_variance = row(arrays, d_variance, call_.shape.groups);
    call.count = count;
    return run(arrays, call, current().input_gradient);
  }

 private:
  static int run(const Arrays& arrays, const Backward& call, void (*operation)(const Backward&, Workers&)) {
    if (!arrays.fit()) return kUnfit;
    const nb::gil_scoped_release released;
    operation(call, process_workers());
    return kAccepted;
  }

  void* row(Arrays& arrays, nb::handle object, int64_t rows) const {
    return arrays.row(object, rows * call_.shape.channel, kFloat, bits_of(call_.dtype));
  }

  void* own_row(Arrays& arrays, nb::handle object, int64_t rows) const {
    return arrays.own_row(object, rows * call_.shape.channel, kFloat, bits_of(call_.dtype));
  }

  void set_sums(Arrays& arrays, Backward& call, nb::handle object) const {
    const int64_t groups = call_.shape.groups;
    call.sum_dz = own_row(arrays, object, 2 * groups);
    call.sum_dz_centred = static_cast<char*>(call.sum_dz) + groups * call_.shape.channel * (bits_of(call_.dtype) / 8);
  }

  Backward placed(Arrays& arrays, nb::handle dy, nb::handle x, nb::handle gamma, nb::handle beta, nb::handle statistics,
                  nb::handle mask) const {
    Backward call = call_;
    call.dy.data = arrays.array(dy);
    call.x.data = arrays.array(x);
    call.gamma = row(arrays, gamma, 1);
    call.beta = row(arrays, beta, 1);
    const Statistics all(own_row(arrays, statistics, 3 * call_.shape.groups), call.dtype, call.shape);
    call.mean = all.mean;
    call.mean_low = all.mean_low;
    call.variance = all.variance;
    call.mask = static_cast<const uint8_t*>(arrays.array(mask));
    return call;
  }

  Backward call_;
};

}  // namespace

NB_MODULE(_cpu, m) {
  nb::set_leak_warnings(false);  // plans are kept in caches until the interpreter ends
  constexpr auto array = nb::arg().none();  // or None where there is no such array
  constexpr auto number = nb::arg();
  nb::class_<ForwardPlan>(m, "ForwardPlan")
      .def(nb::init<int, const Sizes&, const Sizes&, const Sizes&, const Sizes&, double, double, double>())
      .def_prop_ro("mask_bytes", &ForwardPlan::mask_bytes)
      .def_prop_ro("address", &ForwardPlan::address)
      .def("forward", &ForwardPlan::forward, array, array, array, array, array, array, array, array, array, array, number, number, array, array)
      .def("normalize", &ForwardPlan::normalize, array, array, array, array, array, array, array, array, array)
      .def("normalize_again", &ForwardPlan::normalize_again, array, array, array, array, array, array, array)
      .def("moments", &ForwardPlan::moments);
  nb::class_<BackwardPlan>(m, "BackwardPlan")
      .def(nb::init<int, const Sizes&, const Sizes&, const Sizes&, const Sizes&, double, double, double, double>())
      .def_prop_ro("address", &BackwardPlan::address)
      .def("backward", &BackwardPlan::backward, array, array, array, array, array, array, array, array, array, array, array, array)
      .def("gradient_sums", &BackwardPlan::gradient_sums, array, array, array, array, array, array, array, array, array)
      .def("input_gradient", &BackwardPlan::input_gradient, array, array, array, array, array, array, array, array, array, array, array,
           number);
  m.def("enable_exchange", [](const nb::capsule& table, const std::vector<nb::handle>& types) {
    exchange.enable(table, types);
    return exchange.enabled();
  });
  m.def("update_running_stats", [](int dtype, int64_t groups, int64_t channels, int64_t count, bool unbiased, double decay,
                                   nb::handle mean, nb::handle mean_low, nb::handle variance, nb::handle running_mean,
                                   nb::handle running_mean_low, nb::handle running_variance) {
    Arrays arrays(exchange);
    const int bits = bits_of(dtype_of(dtype));
    void* moments[] = {arrays.row(mean, groups * channels, kFloat, bits), arrays.row(mean_low, groups * channels, kFloat, bits),
                       arrays.row(variance, groups * channels, kFloat, bits)};
    void* running[] = {arrays.row(running_mean, channels, kFloat, bits), arrays.row(running_mean_low, channels, kFloat, bits),
                       arrays.row(running_variance, channels, kFloat, bits)};
    if (!arrays.fit()) throw std::invalid_argument("statistics are dense, of one dtype and in CPU memory");
    const auto as = [&]<class A>(A*) {
      const auto array = [](void* address) { return static_cast<A*>(address); };
      return update_running_stats<A>({array(moments[0]), array(moments[1]), array(moments[2])}, count, groups, channels, unbiased,
                                     decay, array(running[0]), array(running[1]), array(running[2]));
    };
    return bits == 64 ? as(static_cast<double*>(nullptr)) : as(static_cast<float*>(nullptr));
  });
  m.def("instruction_set", [] { return std::string(current().name); });
  m.def("use_instruction_set", [](const std::string& name) {
    const Operations* const found = name.empty() ? nullptr : operations(name.c_str());
    if (found == nullptr && !name.empty()) throw std::invalid_argument("this processor has no " + name);
    forced = found;
  });
  m.def("set_num_threads", &set_num_threads);
  m.def("num_threads", &num_threads);
  m.def("buffer", [](int dtype, const std::vector<size_t>& shape, const std::vector<int64_t>& strides) {
    const nb::dlpack::dtype type = dlpack_type(dtype_of(dtype));
    size_t bytes = type.bits / 8;
    for (const size_t size : shape) bytes *= size;
    auto taken = std::make_unique<Taken>(Taken{take_buffer(bytes), bytes});
    if (taken->data == nullptr) throw std::bad_alloc();
    void* const data = taken->data;
    const nb::capsule owner(taken.release(), [](void* owned) noexcept {
      const std::unique_ptr<Taken> buffer(static_cast<Taken*>(owned));
      give_buffer(buffer->data, buffer->bytes);
    });
    return nb::ndarray<>(data, shape.size(), shape.data(), owner, strides.data(), type);
  });
  m.def("set_buffer_limit", &set_buffer_limit);
  m.def("buffered_bytes", &buffered_bytes);
  m.def("write_past_cache_from", &write_past_cache_from);
  m.attr("PAST_CACHE") = kPastCache;
  static const Exported exported{&current, &process_workers, &take_buffer, &give_buffer, &advise_huge, &update_running_stats};
  m.attr("exported") = nb::capsule(&exported, kExported);
  m.def("advise", [](nb::handle array, int64_t bytes) { advise_huge(Arrays(exchange).array(array), bytes); });
}
