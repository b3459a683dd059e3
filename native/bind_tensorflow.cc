// evennorm/kernels/_tensorflow.so: the kernels as operations of TensorFlow on the CPU, on dense views (groups, outer, channel, inner).
// tf.load_op_library makes Python functions of them. T is the type of x, U the one that it is computed in.
//
// gamma, beta, residual and mask are empty where there are none. Numbers are text, because TensorFlow's own attributes are floats.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "batch_norm.h"
#include "pages.h"
#include "tensorflow_c.h"

using namespace evennorm;

namespace {

constexpr size_t kHugeBytes = 4 << 20;  // outputs from here on are written to buffers that were used before

struct Status {
  TF_Status* const get = TF_NewStatus();
  ~Status() { TF_DeleteStatus(get); }
  Status() = default;
  Status(const Status&) = delete;
  Status& operator=(const Status&) = delete;
  bool ok() const { return TF_GetCode(get) == TF_OK; }
};

// TensorFlow's own word is in the status.
struct Failure {};

void check(const Status& status) {
  if (!status.ok()) throw Failure();
}

void demand(bool holds, const char* rule) {
  if (!holds) throw std::invalid_argument(rule);
}

struct Attributes {
  int64_t keep_mask;
  double epsilon, negative_slope, limit;

  Attributes(TF_OpKernelConstruction* from, const Status& status) {
    const auto whole = [&](const char* name) {
      int64_t value = 0;
      TF_OpKernelConstruction_GetAttrInt64(from, name, &value, status.get);
      check(status);
      return value;
    };
    const auto real = [&](const char* name) {
      char text[64] = {};
      TF_OpKernelConstruction_GetAttrString(from, name, text, sizeof(text) - 1, status.get);
      check(status);
      return std::strtod(text, nullptr);
    };
    keep_mask = whole("keep_mask");
    epsilon = real("epsilon");
    negative_slope = real("negative_slope");
    limit = real("limit");
  }
};

using Tensor = std::unique_ptr<TF_Tensor, void (*)(TF_Tensor*)>;

Tensor owned(TF_Tensor* tensor) {
  return {tensor, [](TF_Tensor* t) {
            if (t != nullptr) TF_DeleteTensor(t);
          }};
}

void* data(const Tensor& tensor) { return TF_TensorData(tensor.get()); }

bool empty(const Tensor& tensor) { return TF_TensorElementCount(tensor.get()) == 0; }

// One call: inputs are asked for in their order.
class Call {
 public:
  Call(TF_OpKernelContext* context, const Status& status) : context_(context), status_(status) {}

  Tensor input() {
    TF_Tensor* found = nullptr;
    TF_GetInput(context_, next_++, &found, status_.get);
    check(status_);
    return owned(found);
  }

  template <size_t rank>
  Tensor output(int place, TF_DataType type, size_t item, const std::array<int64_t, rank>& sizes) {
    size_t bytes = item;
    for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
    if (bytes < kHugeBytes) {
      Tensor made = owned(TF_AllocateOutput(context_, place, type, sizes.data(), rank, bytes, status_.get));
      check(status_);
      return made;
    }
    void* const buffer = take_buffer(bytes);
    if (buffer == nullptr) throw std::bad_alloc();
    Tensor made = owned(TF_NewTensor(
        type, sizes.data(), rank, buffer, bytes, [](void* memory, size_t size, void*) { give_buffer(memory, size); }, nullptr));
    TF_SetOutput(context_, place, made.get(), status_.get);
    check(status_);
    return made;
  }

 private:
  TF_OpKernelContext* context_;
  const Status& status_;
  int next_ = 0;
};

struct Precision {
  Dtype dtype;
  TF_DataType computed;
  size_t item, computed_item;

  explicit Precision(TF_DataType type) {
    switch (type) {
      case TF_FLOAT: *this = {Dtype::float32, TF_FLOAT, 4, 4}; break;
      case TF_DOUBLE: *this = {Dtype::float64, TF_DOUBLE, 8, 8}; break;
      case TF_BFLOAT16: *this = {Dtype::bfloat16, TF_FLOAT, 2, 4}; break;
      case TF_HALF: *this = {Dtype::float16, TF_FLOAT, 2, 4}; break;
      default: throw std::invalid_argument("evennorm: the kernels take float32, float64, bfloat16 and float16");
    }
  }
  Precision(Dtype d, TF_DataType c, size_t i, size_t ci) : dtype(d), computed(c), item(i), computed_item(ci) {}
};

// The view that x is.
struct Dense {
  TF_DataType type;
  Precision precision;
  std::array<int64_t, 4> sizes{};
  Shape shape{};

  explicit Dense(const Tensor& x) : type(TF_TensorType(x.get())), precision(type) {
    demand(TF_NumDims(x.get()) == 4, "evennorm: a view has groups, outer, channel and inner");
    for (int i = 0; i < 4; ++i) sizes[static_cast<size_t>(i)] = TF_Dim(x.get(), i);
    shape = {sizes[0], sizes[1], sizes[2], sizes[3]};
    if (shape.channel == 1) shape = {shape.groups, 1, 1, shape.outer * shape.inner};  // one run, however it was cut
  }

  int64_t elements() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }

  // Null where there is none.
  View optional_view(const Tensor& tensor) const { return empty(tensor) ? View{} : view(tensor); }
  void* optional_per_channel(const Tensor& tensor) const { return empty(tensor) ? nullptr : per_channel(tensor); }

  View view(const Tensor& tensor) const {
    demand(TF_TensorElementCount(tensor.get()) == elements(), "evennorm: dy and residual have as many values as x");
    const int64_t row = shape.channel * shape.inner;
    return {TF_TensorData(tensor.get()), shape.outer * row, row, shape.inner, 1};
  }

  void* per_channel(const Tensor& tensor) const { return counted(tensor, sizes[2]); }
  void* per_group(const Tensor& tensor) const { return counted(tensor, sizes[0] * sizes[2]); }
  void* counted(const Tensor& tensor, int64_t number) const {
    demand(TF_TensorElementCount(tensor.get()) == number,
           "evennorm: parameters have one value per channel, statistics one per group and channel");
    return TF_TensorData(tensor.get());
  }

  int64_t mask_bytes() const {
    View dense{};
    const int64_t row = shape.channel * shape.inner;
    dense = {nullptr, shape.outer * row, row, shape.inner, 1};
    return operations().mask_bytes(shape, dense);
  }
};

void forward(const Attributes& attributes, Call& call) {
  const Tensor x = call.input(), gamma = call.input(), beta = call.input(), residual = call.input();
  const Dense dense(x);
  const auto [dtype, computed, item, computed_item] = dense.precision;
  const std::array<int64_t, 2> each{dense.sizes[0], dense.sizes[2]};
  const Tensor y = call.output(0, dense.type, item, dense.sizes), mean = call.output(1, computed, computed_item, each),
               mean_low = call.output(2, computed, computed_item, each), variance = call.output(3, computed, computed_item, each);
  const int64_t mask_bytes = attributes.keep_mask != 0 ? dense.mask_bytes() : 0;
  const Tensor mask = call.output(4, TF_UINT8, 1, std::array<int64_t, 1>{mask_bytes});
  const Forward arrays{
      .dtype = dtype,
      .shape = dense.shape,
      .x = dense.view(x),
      .residual = dense.optional_view(residual),
      .y = dense.view(y),
      .gamma = dense.optional_per_channel(gamma),
      .beta = dense.optional_per_channel(beta),
      .mean = data(mean),
      .mean_low = data(mean_low),
      .variance = data(variance),
      .mask = attributes.keep_mask != 0 ? static_cast<uint8_t*>(data(mask)) : nullptr,
      .epsilon = attributes.epsilon,
      .negative_slope = attributes.negative_slope,
      .limit = attributes.limit,
  };
  operations().forward(arrays, process_workers());
}

void backward(const Attributes& attributes, Call& call) {
  const bool keeps_mask = attributes.keep_mask != 0;
  const Tensor dy = call.input(), d_mean = call.input(), d_variance = call.input(), x = call.input(), gamma = call.input(),
               beta = call.input(), mean = call.input(), mean_low = call.input(), variance = call.input(), mask = call.input();
  const Dense dense(x);
  const auto [dtype, computed, item, computed_item] = dense.precision;
  const auto size = [](const Tensor& tensor) { return std::array<int64_t, 1>{TF_TensorElementCount(tensor.get())}; };
  const Tensor dx = call.output(0, dense.type, item, dense.sizes);
  const Tensor d_gamma = call.output(1, computed, computed_item, size(gamma));
  const Tensor d_beta = call.output(2, computed, computed_item, size(beta));
  const Tensor d_residual = call.output(3, dense.type, item, keeps_mask ? dense.sizes : std::array<int64_t, 4>{});
  demand(!keeps_mask || TF_TensorElementCount(mask.get()) == dense.mask_bytes(), "evennorm: mask must be the one that forward returned");
  const Backward arrays{
      .dtype = dtype,
      .shape = dense.shape,
      .dy = dense.view(dy),
      .x = dense.view(x),
      .dx = dense.view(dx),
      .d_residual = keeps_mask ? dense.view(d_residual) : View{},
      .gamma = dense.optional_per_channel(gamma),
      .beta = dense.optional_per_channel(beta),
      .mean = dense.per_group(mean),
      .mean_low = dense.per_group(mean_low),
      .variance = dense.per_group(variance),
      .mask = keeps_mask ? static_cast<const uint8_t*>(data(mask)) : nullptr,
      .d_mean = dense.per_group(d_mean),
      .d_variance = dense.per_group(d_variance),
      .sum_dz = nullptr,
      .sum_dz_centred = nullptr,
      .d_gamma = empty(gamma) ? nullptr : data(d_gamma),
      .d_beta = empty(beta) ? nullptr : data(d_beta),
      .epsilon = attributes.epsilon,
      .negative_slope = attributes.negative_slope,
      .limit = attributes.limit,
      .count = static_cast<double>(dense.shape.outer * dense.shape.inner),
  };
  operations().backward(arrays, process_workers());
}

void* create(TF_OpKernelConstruction* from) {
  const Status status;
  try {
    return new Attributes(from, status);
  } catch (const Failure&) {
  } catch (const std::exception& error) {
    TF_SetStatus(status.get, TF_INVALID_ARGUMENT, error.what());
  }
  TF_OpKernelConstruction_Failure(from, status.get);
  return nullptr;
}

template <void (*compute)(const Attributes&, Call&)>
void run(void* attributes, TF_OpKernelContext* context) {
  const Status status;
  try {
    Call call(context, status);
    compute(*static_cast<const Attributes*>(attributes), call);
    return;
  } catch (const Failure&) {
  } catch (const std::bad_alloc&) {
    TF_SetStatus(status.get, TF_RESOURCE_EXHAUSTED, "evennorm: no memory for the results, or for the sums of the channels");
  } catch (const std::exception& error) {
    TF_SetStatus(status.get, TF_INVALID_ARGUMENT, error.what());
  }
  TF_OpKernelContext_Failure(context, status.get);
}

// Shapes, as far as a graph knows them.
class Shapes {
 public:
  Shapes(TF_ShapeInferenceContext* context, TF_Status* status, int x) : context_(context), status_(status) {
    TF_ShapeInferenceContextSetUnknownShape(context, status);
    TF_ShapeHandle* const given = handle();
    TF_ShapeInferenceContextGetInput(context, x, given, status);
    TF_ShapeInferenceContextWithRank(context, given, 4, view, status);
    if (!ok()) return;
    TF_ShapeInferenceContextSubshape(context, view, 2, 3, channel, status);
    TF_ShapeHandle* const groups = handle();
    TF_ShapeInferenceContextSubshape(context, view, 0, 1, groups, status);
    TF_ShapeInferenceContextConcatenateShapes(context, groups, channel, each, status);
  }
  ~Shapes() {
    for (TF_ShapeHandle* made : made_) {
      if (made != nullptr) TF_DeleteShapeHandle(made);
    }
  }

  void set(int output, TF_ShapeHandle* shape) {
    if (ok()) TF_ShapeInferenceContextSetOutput(context_, output, shape, status_);
  }

 private:
  bool ok() const { return TF_GetCode(status_) == TF_OK; }
  TF_ShapeHandle* handle() { return made_[number_++] = TF_NewShapeHandle(); }

  TF_ShapeInferenceContext* context_;
  TF_Status* status_;
  size_t number_ = 0;
  std::array<TF_ShapeHandle*, 8> made_{};

 public:
  TF_ShapeHandle *view = handle(), *channel = handle(), *each = handle();
};

void forward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  Shapes shapes(context, status, 0);
  shapes.set(0, shapes.view);
  for (const int output : {1, 2, 3}) shapes.set(output, shapes.each);
}

void backward_shapes(TF_ShapeInferenceContext* context, TF_Status* status) {
  Shapes shapes(context, status, 3);
  shapes.set(0, shapes.view);
}

struct Operation {
  const char* name;
  TF_ShapeFunction shapes;
  TF_Compute compute;
  std::initializer_list<const char*> inputs, outputs;
};

void register_one(const Operation& operation) {
  const Status status;
  TF_OpDefinitionBuilder* const builder = TF_NewOpDefinitionBuilder(operation.name);
  for (const char* attribute :
       {"T: {float, double, half, bfloat16}", "U: {float, double}", "keep_mask: int", "epsilon: string", "negative_slope: string",
        "limit: string"}) {
    TF_OpDefinitionBuilderAddAttr(builder, attribute);
  }
  for (const char* input : operation.inputs) TF_OpDefinitionBuilderAddInput(builder, input);
  for (const char* output : operation.outputs) TF_OpDefinitionBuilderAddOutput(builder, output);
  TF_OpDefinitionBuilderSetShapeInferenceFunction(builder, operation.shapes);
  TF_RegisterOpDefinition(builder, status.get);
  for (const TF_DataType type : {TF_FLOAT, TF_DOUBLE, TF_HALF, TF_BFLOAT16}) {
    TF_KernelBuilder* const kernel = TF_NewKernelBuilder(operation.name, "CPU", create, operation.compute,
                                                         [](void* attributes) { delete static_cast<Attributes*>(attributes); });
    TF_KernelBuilder_TypeConstraint(kernel, "T", type, status.get);
    TF_KernelBuilder_TypeConstraint(kernel, "U", type == TF_DOUBLE ? TF_DOUBLE : TF_FLOAT, status.get);
    TF_RegisterKernelBuilder(operation.name, kernel, status.get);
  }
}

[[maybe_unused]] const bool registered = [] {
  if (!find_tensorflow()) return false;
  register_one({"EvennormForward",
                forward_shapes,
                run<forward>,
                {"x: T", "gamma: U", "beta: U", "residual: T"},
                {"y: T", "mean: U", "mean_low: U", "variance: U", "mask: uint8"}});
  register_one({"EvennormBackward",
                backward_shapes,
                run<backward>,
                {"dy: T", "d_mean: U", "d_variance: U", "x: T", "gamma: U", "beta: U", "mean: U", "mean_low: U", "variance: U",
                 "mask: uint8"},
                {"dx: T", "d_gamma: U", "d_beta: U", "d_residual: T"}});
  return true;
}();

}  // namespace

extern "C" {
__attribute__((visibility("default"))) void evennorm_set_num_threads(int threads) { set_num_threads(threads); }
__attribute__((visibility("default"))) void evennorm_set_buffer_limit(size_t bytes) { set_buffer_limit(bytes); }
__attribute__((visibility("default"))) size_t evennorm_buffered_bytes() { return buffered_bytes(); }
}
