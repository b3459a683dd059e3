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
#include "channels.h"
#include "pages.h"

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


}  // namespace

NB_MODULE(_cpu, m) {
  m.def(
      "forward",
      [](int what, int dtype, const Sizes& sizes, uintptr_t x, const Sizes& x_strides, uintptr_t residual, const Sizes& residual_strides,
         uintptr_t y, const Sizes& y_strides, uintptr_t gamma, uintptr_t beta, uintptr_t mean, uintptr_t mean_low, uintptr_t variance,
         uintptr_t signs, double epsilon, double negative_slope) {
        const Forward call{dtype_of(dtype), shape_of(sizes), view(x, x_strides), view(residual, residual_strides), view(y, y_strides),
                           at(gamma),       at(beta),        at(mean),           at(mean_low),                     at(variance),
                           static_cast<uint8_t*>(at(signs)), epsilon,            negative_slope};
        const Operations& all = current();
        const nb::gil_scoped_release released;
        (what == 0 ? all.moments : what == 1 ? all.normalize : all.forward)(call, process_workers());
      });
  m.def(
      "backward",
      [](int what, int dtype, const Sizes& sizes, uintptr_t dy, const Sizes& dy_strides, uintptr_t x, const Sizes& x_strides,
         uintptr_t dx, const Sizes& dx_strides, uintptr_t d_residual, uintptr_t gamma, uintptr_t beta, uintptr_t mean,
         uintptr_t mean_low, uintptr_t variance, uintptr_t signs, uintptr_t d_mean, uintptr_t d_variance, uintptr_t sum_dz,
         uintptr_t sum_dz_centred, uintptr_t d_gamma, uintptr_t d_beta, double epsilon, double negative_slope, double count) {
        const Backward call{dtype_of(dtype),
                            shape_of(sizes),
                            view(dy, dy_strides),
                            view(x, x_strides),
                            view(dx, dx_strides),
                            view(d_residual, dx_strides),
                            at(gamma),
                            at(beta),
                            at(mean),
                            at(mean_low),
                            at(variance),
                            static_cast<const uint8_t*>(at(signs)),
                            at(d_mean),
                            at(d_variance),
                            at(sum_dz),
                            at(sum_dz_centred),
                            at(d_gamma),
                            at(d_beta),
                            epsilon,
                            negative_slope,
                            count};
        const Operations& all = current();
        const nb::gil_scoped_release released;
        (what == 0 ? all.gradient_sums : what == 1 ? all.input_gradient : all.backward)(call, process_workers());
      });
  m.def("follow", [](int dtype, int64_t groups, int64_t channels, int64_t count, uintptr_t mean, uintptr_t mean_low, uintptr_t variance,
                     bool unbiased, double decay, uintptr_t running_mean, uintptr_t running_mean_low, uintptr_t running_variance) {
    const auto as = [&]<class A>(A*) {
      const auto array = [](uintptr_t address) { return static_cast<A*>(at(address)); };
      return follow<A>({array(mean), array(mean_low), array(variance)}, count, groups, channels, unbiased, decay, array(running_mean),
                       array(running_mean_low), array(running_variance));
    };
    return dtype_of(dtype) == Dtype::float64 ? as(static_cast<double*>(nullptr)) : as(static_cast<float*>(nullptr));
  });
  m.def("sign_bytes", [](const Sizes& sizes, const Sizes& y_strides) {
    return current().sign_bytes(shape_of(sizes), view(1, y_strides));
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
  m.def("advise", [](uintptr_t address, int64_t bytes) { advise_huge(at(address), bytes); });
}
