// evennorm.kernels._xla: the kernels as XLA calls them, on dense views (..., groups, outer, channel, inner) with any number of axes
// in front, along which all arrays are independent. The Python side has checked shapes and dtypes.
//
// x comes first, then the other operands and the results, in the order of the enums below; of those that may be absent, `given` and
// `wanted` have a bit each.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <new>

#include "batch_norm.h"
#include "kept_memory.h"
#include "pages.h"
#include "xla/ffi/api/ffi.h"
#include "xla_workers.h"

namespace nb = nanobind;
namespace ffi = xla::ffi;
using namespace evennorm;

namespace {

constexpr size_t kHugeBytes = 4 << 20;      // outputs from here on are asked for in huge pages
constexpr int64_t kWorthSharing = 1 << 17;  // elements

std::atomic<int> thread_limit{[] {
  const char* text = std::getenv("EVENNORM_NUM_THREADS");
  return text == nullptr ? 0 : std::max(0, std::atoi(text));
}()};

// Operands or results by place; those that are absent are null.
template <class Remaining, int places>
class Arrays {
 public:
  ffi::Error read(const Remaining& from, int64_t present) {
    size_t next = 0;
    for (int place = 0; place < places; ++place) {
      if ((present >> place & 1) == 0) continue;
      auto found = from.template get<ffi::AnyBuffer>(next++);
      if (!found.has_value()) return found.error();
      const ffi::AnyBuffer& array = buffer(*found);
      arrays_[place] = {array.untyped_data(), array.size_bytes()};
    }
    return ffi::Error::Success();
  }

  // What belongs to one of `number` views.
  void* at(int place, int64_t one, int64_t number) const {
    const auto [data, bytes] = arrays_[place];
    return data == nullptr ? nullptr : static_cast<char*>(data) + bytes / number * one;
  }

  void advise() const {
    for (const auto& [data, bytes] : arrays_) {
      if (bytes >= kHugeBytes) advise_huge(data, static_cast<int64_t>(bytes));
    }
  }

 private:
  struct Array {
    void* data = nullptr;
    size_t bytes = 0;
  };

  static const ffi::AnyBuffer& buffer(const ffi::AnyBuffer& operand) { return operand; }
  static const ffi::AnyBuffer& buffer(ffi::Result<ffi::AnyBuffer>& result) { return *result; }

  std::array<Array, places> arrays_;
};

// The view that x is, and how many of them there are.
struct Views {
  Dtype dtype{};
  Shape shape{};
  int64_t number = 1;

  ffi::Error read(const ffi::AnyBuffer& x) {
    switch (x.element_type()) {
      case ffi::DataType::F32: dtype = Dtype::float32; break;
      case ffi::DataType::F64: dtype = Dtype::float64; break;
      case ffi::DataType::BF16: dtype = Dtype::bfloat16; break;
      case ffi::DataType::F16: dtype = Dtype::float16; break;
      default: return ffi::Error::InvalidArgument("evennorm: the kernels take float32, float64, bfloat16 and float16");
    }
    const auto sizes = x.dimensions();
    if (sizes.size() < 4) return ffi::Error::InvalidArgument("evennorm: a view has groups, outer, channel and inner");
    const size_t lead = sizes.size() - 4;
    for (size_t i = 0; i < lead; ++i) number *= sizes[i];
    shape = {sizes[lead], sizes[lead + 1], sizes[lead + 2], sizes[lead + 3]};
    if (shape.channel == 1) shape = {shape.groups, 1, 1, shape.outer * shape.inner};  // one run, however it was cut
    return ffi::Error::Success();
  }

  // Null stays null: an array that is absent.
  View dense(void* data) const {
    const int64_t row = shape.channel * shape.inner;
    return {data, shape.outer * row, row, shape.inner, 1};
  }

  void* of(const ffi::AnyBuffer& array, int64_t one) const {
    return static_cast<char*>(array.untyped_data()) + array.size_bytes() / static_cast<size_t>(number) * static_cast<size_t>(one);
  }

  template <class Call>
  ffi::Error each(ffi::ThreadPool pool, const Call& call) const try {
    XlaWorkers workers(pool, thread_limit.load(std::memory_order_relaxed));
    const int64_t elements = number * shape.groups * shape.outer * shape.channel * shape.inner;
    if (number >= 4 * workers.count() && elements >= kWorthSharing) {
      workers.each(number, [&](int64_t i) {
        Serial alone;
        call(i, alone);
      });
    } else {
      for (int64_t i = 0; i < number; ++i) call(i, workers);
    }
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "evennorm: no memory for the sums of the channels");
  }
};

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::RemainingRets results, int64_t given,
                   int64_t wanted, double epsilon, double negative_slope, double limit) {
  enum { gamma, beta, residual, all_given };
  enum { y, mean, mean_low, variance, mask, all_wanted };
  Views views;
  Arrays<ffi::RemainingArgs, all_given> in;
  Arrays<ffi::RemainingRets, all_wanted> out;
  if (auto error = views.read(x); error.failure()) return error;
  if (auto error = in.read(rest, given); error.failure()) return error;
  if (auto error = out.read(results, wanted); error.failure()) return error;
  out.advise();
  return views.each(pool, [&](int64_t i, Workers& workers) {
    const auto given_at = [&](int place) { return in.at(place, i, views.number); };
    const auto wanted_at = [&](int place) { return out.at(place, i, views.number); };
    const Forward call{
        .dtype = views.dtype,
        .shape = views.shape,
        .x = views.dense(views.of(x, i)),
        .residual = views.dense(given_at(residual)),
        .y = views.dense(wanted_at(y)),
        .gamma = given_at(gamma),
        .beta = given_at(beta),
        .mean = wanted_at(mean),
        .mean_low = wanted_at(mean_low),
        .variance = wanted_at(variance),
        .mask = static_cast<uint8_t*>(wanted_at(mask)),
        .epsilon = epsilon,
        .negative_slope = negative_slope,
        .limit = limit,
    };
    const Operations& kernels = operations();
    ((wanted >> y & 1) != 0 ? kernels.forward : kernels.moments)(call, workers);
  });
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs rest, ffi::RemainingRets results, int64_t given,
                    int64_t wanted, double epsilon, double negative_slope, double limit) {
  enum { gamma, beta, mean, mean_low, variance, mask, dy, d_mean, d_variance, all_given };
  enum { dx, d_gamma, d_beta, d_residual, all_wanted };
  Views views;
  Arrays<ffi::RemainingArgs, all_given> in;
  Arrays<ffi::RemainingRets, all_wanted> out;
  if (auto error = views.read(x); error.failure()) return error;
  if (auto error = in.read(rest, given); error.failure()) return error;
  if (auto error = out.read(results, wanted); error.failure()) return error;
  out.advise();
  return views.each(pool, [&](int64_t i, Workers& workers) {
    const auto given_at = [&](int place) { return in.at(place, i, views.number); };
    const auto wanted_at = [&](int place) { return out.at(place, i, views.number); };
    const Backward call{
        .dtype = views.dtype,
        .shape = views.shape,
        .dy = views.dense(given_at(dy)),
        .x = views.dense(views.of(x, i)),
        .dx = views.dense(wanted_at(dx)),
        .d_residual = views.dense(wanted_at(d_residual)),
        .gamma = given_at(gamma),
        .beta = given_at(beta),
        .mean = given_at(mean),
        .mean_low = given_at(mean_low),
        .variance = given_at(variance),
        .mask = static_cast<const uint8_t*>(given_at(mask)),
        .d_mean = given_at(d_mean),
        .d_variance = given_at(d_variance),
        .sum_dz = nullptr,
        .sum_dz_centred = nullptr,
        .d_gamma = wanted_at(d_gamma),
        .d_beta = wanted_at(d_beta),
        .epsilon = epsilon,
        .negative_slope = negative_slope,
        .limit = limit,
        .count = static_cast<double>(views.shape.outer * views.shape.inner),
    };
    const Operations& kernels = operations();
    ((wanted >> dx & 1) != 0 ? kernels.backward : kernels.gradient_sums)(call, workers);
  });
}

auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets()
      .Attr<int64_t>("given")
      .Attr<int64_t>("wanted")
      .Attr<double>("epsilon")
      .Attr<double>("negative_slope")
      .Attr<double>("limit");
}

XLA_FFI_DEFINE_HANDLER(forward_handler, forward, binding());
XLA_FFI_DEFINE_HANDLER(backward_handler, backward, binding());

}  // namespace

NB_MODULE(_xla, m) {
  m.attr("BUNDLED_PLANE") = kBundledPlane;
  m.def("registrations", [] {
    nb::dict targets;
    targets["evennorm_forward"] = nb::capsule(reinterpret_cast<void*>(forward_handler));
    targets["evennorm_backward"] = nb::capsule(reinterpret_cast<void*>(backward_handler));
    return targets;
  });
  m.def("allocator", [] {
    const Allocator found = allocator();
    return nb::make_tuple(found.name, found.settable);
  });
  m.def("keep_memory", &keep_memory);
  m.def("arenas", &arenas);
  m.def("set_num_threads", [](int threads) { thread_limit = std::max(0, threads); });
}
