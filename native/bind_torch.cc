// evennorm.kernels._torch_VERSION: the calls that modules make most, without Python between torch's autograd and the kernels.
//
// Linked to libtorch, and so to one version of it. It computes nothing of its own and decides nothing: Python (torch/native.py)
// works out each plan, and whatever is unusual about a call is handed back to Python, as None.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/record_function.h>
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/node.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "exported.h"

namespace evennorm {
namespace {

using at::Tensor;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

const Exported* kernels = nullptr;

// Given by torch/native.py; each is called with the GIL.
PyObject* python_forward_plan = nullptr;
PyObject* python_backward_plan = nullptr;
PyObject* python_gradients = nullptr;

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }

 private:
  PyGILState_STATE state_;
};

// A reference that is owned; to be let go of with the GIL held.
struct Release {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;

// Passes on the error that Python has set.
[[noreturn]] void raise() {
  python_error error;
  error.persist();
  throw error;
}

// Arrays as kernels have planned to write them, and how their memory is taken.
struct Fresh {
  std::vector<int64_t> strides;
  bool buffered;
  int64_t advised;  // bytes to ask huge pages for, or 0

  Tensor like(const Tensor& x) const {
    if (buffered) {
      const size_t bytes = x.numel() * x.itemsize();
      void* const data = kernels->take_buffer(bytes);
      TORCH_CHECK_WITH(OutOfMemoryError, data != nullptr, "evennorm could not allocate ", bytes, " bytes");
      return at::from_blob(data, x.sizes(), strides, [bytes](void* taken) { kernels->give_buffer(taken, bytes); }, x.options());
    }
    Tensor y = at::detail::empty_strided_cpu(x.sizes(), strides, x.scalar_type());
    if (advised != 0) kernels->advise_huge(y.data_ptr(), advised);
    return y;
  }
};

struct BackwardPlan {
  std::vector<int64_t> dy_strides;
  Fresh fresh;
  Backward call;  // without addresses
};

// What Python has worked out for one kind of call.
struct Plan {
  bool fits = false;  // else no kernel reads arrays that lie so, or the call is wrong: Python says it
  Owned type;         // of the module, so that no other gets its address
  Owned call;         // evennorm.core.call.Call
  Fresh fresh;
  Forward forward;  // without addresses
  std::array<int64_t, 3> statistics;
  int64_t mask_bytes;
  bool masked;
  std::mutex guard;
  std::vector<std::unique_ptr<BackwardPlan>> backward;  // never taken away, so that pointers into it stay

  ~Plan() {
    if (!Py_IsInitialized()) {
      static_cast<void>(type.release());
      static_cast<void>(call.release());
      return;
    }
    const WithGil gil;
    type.reset();
    call.reset();
  }
};

// Tensors that are arrays in memory, and nothing more.

c10::DispatchKeySet ordinary;

bool plain(const Tensor& tensor) { return (tensor.key_set() | ordinary) == ordinary && !tensor._fw_grad(0).defined(); }

bool row(const Tensor& tensor, int64_t count, at::ScalarType type) {
  return plain(tensor) && tensor.scalar_type() == type && tensor.dim() == 1 && tensor.numel() == count && tensor.is_contiguous();
}

bool counter(const Tensor& tensor) { return plain(tensor) && tensor.scalar_type() == at::kLong && tensor.numel() == 1; }

// Whether operations run as they are called: nobody vectorizes, traces or records them, or repeats them for the backward pass.
bool undisturbed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
  return included.empty() && torch::autograd::get_current_graph_task_id() == -1;
}

at::ScalarType computed_in(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

void place(void*& mean, void*& mean_low, void*& variance, const Tensor& statistics) {
  char* const first = static_cast<char*>(statistics.data_ptr());
  const int64_t step = statistics.numel() / 3 * statistics.itemsize();
  mean = first;
  mean_low = first + step;
  variance = first + 2 * step;
}

void* address(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

// Backward

Owned wrapped(const Tensor& tensor) { return Owned(tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None)); }

struct EvennormBatchNorm : torch::autograd::Node {
  std::shared_ptr<Plan> plan;
  SavedVariable x, gamma, beta, statistics, mask;
  bool has_gamma = false, has_beta = false, has_mask = false, has_residual = false;

  std::string name() const override { return "EvennormBatchNormBackward"; }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* const saved : all()) saved->reset_data();
  }

  variable_list apply(variable_list&& given) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& dy = given[0];
    if (!dy.defined()) return variable_list(4);
    return computed(dy, unpacked());
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(reinterpret_cast<uint64_t>(plan.get()));
    args.collect(static_cast<uint64_t>(flags()));
    args.collect(x, false);
    args.collect(gamma, false);
    args.collect(beta, false);
    args.collect(statistics, false);
    args.collect(mask, false);
  }

  // Compiled autograd records a call of what `apply` does, and makes it when the program that it compiles runs.
  variable_list apply_with_saved(const variable_list& given, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    namespace dynamo = torch::dynamo::autograd;
    static std::unordered_map<int64_t, std::shared_ptr<Plan>> kept;  // programs hold addresses
    const auto plan_address = static_cast<int64_t>(reinterpret_cast<intptr_t>(plan.get()));
    kept.emplace(plan_address, plan);
    for (SavedVariable* const saved : all()) swap.before(*saved);
    const Arrays arrays = unpacked();
    dynamo::PackedArgs packed;
    for (const int64_t number : {plan_address, static_cast<int64_t>(flags())}) packed.pack(number);
    for (const Tensor* const array : arrays.all()) {
      if (array->defined()) packed.pack(*array);
    }
    const auto arguments = std::move(packed).vec();
    std::vector<at::TypePtr> schema;
    for (const auto& argument : arguments) schema.push_back(argument.isTensor() ? at::TensorType::get() : argument.type());
    const auto metadata = dynamo::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        dynamo::get_input_metadata(next_edges()));
    const auto& compiler = dynamo::getPyCompilerInterface();
    const auto function = compiler->bind_function(swap.get_py_compiler(), name(), replayed, schema, true, false);
    auto results = compiler->call_function(swap.get_py_compiler(), "apply_functional", function, given, arguments, metadata);
    for (SavedVariable* const saved : all()) swap.after(*saved);
    return results;
  }

 private:
  struct Arrays {
    Tensor x, gamma, beta, statistics, mask;

    std::array<const Tensor*, 5> all() const { return {&x, &gamma, &beta, &statistics, &mask}; }
  };

  int flags() const { return has_gamma << 0 | has_beta << 1 | has_mask << 2 | has_residual << 3; }

  Arrays unpacked() {
    const auto optional = [](const SavedVariable& saved, bool has) { return has ? saved.unpack() : Tensor(); };
    return {x.unpack(), optional(gamma, has_gamma), optional(beta, has_beta), statistics.unpack(), optional(mask, has_mask)};
  }

  variable_list computed(const Tensor& dy, const Arrays& saved) const {
    const BackwardPlan* const found = at::GradMode::is_enabled() ? nullptr : planned(dy, saved.x);
    return found == nullptr ? by_python(dy, saved) : by_kernel(*found, dy, saved);
  }

  // By the arguments that apply_with_saved packed.
  static variable_list replayed(const variable_list& given, const std::vector<c10::IValue>& arguments) {
    EvennormBatchNorm node;
    // Of a plan that is kept for ever.
    node.plan = std::shared_ptr<Plan>(std::shared_ptr<Plan>(), reinterpret_cast<Plan*>(static_cast<intptr_t>(arguments[0].toInt())));
    const int64_t flags = arguments[1].toInt();
    node.has_residual = (flags & 8) != 0;
    size_t next = 2;
    const auto array = [&](bool has) { return has ? arguments[next++].toTensor() : Tensor(); };
    Arrays saved;
    saved.x = array(true);
    saved.gamma = array((flags & 1) != 0);
    saved.beta = array((flags & 2) != 0);
    saved.statistics = array(true);
    saved.mask = array((flags & 4) != 0);
    if (!given[0].defined()) return variable_list(4);
    return node.computed(given[0], saved);
  }

  std::array<SavedVariable*, 5> all() { return {&x, &gamma, &beta, &statistics, &mask}; }

  variable_list by_kernel(const BackwardPlan& found, const Tensor& dy, const Arrays& saved) const {
    Backward call = found.call;
    Tensor dx = found.fresh.like(saved.x);
    Tensor d_residual = saved.mask.defined() ? found.fresh.like(saved.x) : Tensor();
    const auto like = [](const Tensor& row) {
      return row.defined() ? at::detail::empty_cpu(row.sizes(), row.scalar_type()) : Tensor();
    };
    Tensor d_gamma = like(saved.gamma), d_beta = like(saved.beta);
    call.dy.data = dy.data_ptr();
    call.x.data = saved.x.data_ptr();
    call.dx.data = dx.data_ptr();
    call.d_residual.data = address(d_residual);
    call.gamma = address(saved.gamma);
    call.beta = address(saved.beta);
    void *mean, *mean_low, *variance;
    place(mean, mean_low, variance, saved.statistics);
    call.mean = mean;
    call.mean_low = mean_low;
    call.variance = variance;
    call.signs = static_cast<const uint8_t*>(address(saved.mask));
    call.d_gamma = address(d_gamma);
    call.d_beta = address(d_beta);
    kernels->operations().backward(call, kernels->workers());
    if (!has_residual) return {std::move(dx), std::move(d_gamma), std::move(d_beta), Tensor()};
    return {std::move(dx), std::move(d_gamma), std::move(d_beta), d_residual.defined() ? std::move(d_residual) : dy};
  }

  // None where dy lies, or is, as the kernel cannot read it.
  const BackwardPlan* planned(const Tensor& dy, const Tensor& x) const {
    if (!plain(dy) || !plain(x) || dy.scalar_type() != x.scalar_type() || !dy.sizes().equals(x.sizes())) return nullptr;
    const auto included = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
    if (!included.empty()) return nullptr;
    {
      const std::lock_guard<std::mutex> lock(plan->guard);
      for (const auto& known : plan->backward) {
        if (dy.strides().equals(known->dy_strides)) return known.get();
      }
    }
    return made(dy, x);
  }

  const BackwardPlan* made(const Tensor& dy, const Tensor& x) const;
  variable_list by_python(const Tensor& dy, const Arrays& saved) const;
};

std::vector<int64_t> integers(PyObject* tuple) {
  std::vector<int64_t> all;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) all.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i)));
  return all;
}

// The first fields of what Python answers: address of a native plan without arrays; strides, whether in a buffer, bytes to advise.
template <class Call>
std::pair<const Call*, Fresh> parsed(PyObject* answer) {
  auto* const call = static_cast<const Call*>(PyLong_AsVoidPtr(PyTuple_GET_ITEM(answer, 0)));
  return {call,
          {integers(PyTuple_GET_ITEM(answer, 1)), PyTuple_GET_ITEM(answer, 2) == Py_True, PyLong_AsLongLong(PyTuple_GET_ITEM(answer, 3))}};
}

const BackwardPlan* EvennormBatchNorm::made(const Tensor& dy, const Tensor& x) const {
  const WithGil gil;
  const Owned py_dy = wrapped(dy), py_x = wrapped(x);
  const Owned answer(PyObject_CallFunctionObjArgs(python_backward_plan, plan->call.get(), py_dy.get(), py_x.get(),
                                                  plan->masked ? Py_True : Py_False, nullptr));
  if (answer == nullptr) raise();
  if (answer.get() == Py_None) return nullptr;
  auto [call, fresh] = parsed<Backward>(answer.get());
  auto made = std::make_unique<BackwardPlan>(BackwardPlan{dy.strides().vec(), std::move(fresh), *call});
  if (PyErr_Occurred() != nullptr) raise();
  const std::lock_guard<std::mutex> lock(plan->guard);
  return plan->backward.emplace_back(std::move(made)).get();
}

variable_list EvennormBatchNorm::by_python(const Tensor& dy, const Arrays& saved) const {
  const WithGil gil;
  const Owned py_dy = wrapped(dy), py_x = wrapped(saved.x), py_gamma = wrapped(saved.gamma), py_beta = wrapped(saved.beta),
              py_statistics = wrapped(saved.statistics), py_mask = wrapped(saved.mask);
  const Owned answer(PyObject_CallFunctionObjArgs(python_gradients, plan->call.get(), py_dy.get(), py_x.get(), py_gamma.get(),
                                                  py_beta.get(), py_statistics.get(), py_mask.get(),
                                                  has_residual ? Py_True : Py_False, nullptr));
  if (answer == nullptr) raise();
  variable_list gradients(4);
  for (size_t i = 0; i < 4; ++i) {
    PyObject* const gradient = PyTuple_GET_ITEM(answer.get(), i);
    if (gradient != Py_None) gradients[i] = THPVariable_Unpack(gradient);
  }
  return gradients;
}

// Forward

// All that decides about a plan beside what is checked at each call.
struct Key {
  std::array<int64_t, 40> words{};
  size_t used = 0;

  bool add(int64_t word) {
    if (used == words.size()) return false;
    words[used++] = word;
    return true;
  }
  bool add(at::IntArrayRef more) {
    bool whole = true;
    for (const int64_t word : more) whole = add(word);
    return whole;
  }
  bool operator==(const Key& other) const { return used == other.used && words == other.words; }
};

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = key.used;
    for (size_t i = 0; i < key.used; ++i) hash = (std::rotl(hash, 5) ^ static_cast<uint64_t>(key.words[i])) * 0x9E3779B97F4A7C15;
    return hash ^ (hash >> 32);
  }
};

// Used with the GIL held.
std::unordered_map<Key, std::shared_ptr<Plan>, Hash> plans;
constexpr size_t kMostPlans = 4096;

// Names of attributes.
struct Names {
  PyObject *parameters, *buffers, *weight, *bias, *running_mean, *running_var, *running_mean_low, *refused_batches, *num_batches_tracked,
      *training, *track_running_stats, *eps, *momentum, *activation, *negative_slope, *virtual_batch_size, *memory;
} names;

// What a module's attributes say. `usual` is false where something stands there that Python is to look at.
class Settings {
 public:
  explicit Settings(PyObject* own) : own_(own) {}

  bool usual = true;

  PyObject* get(PyObject* name) { return in(own_, name); }

  PyObject* in(PyObject* dict, PyObject* name) {
    PyObject* const value = dict != nullptr && PyDict_CheckExact(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
    usual = usual && value != nullptr;
    return value;
  }

  bool flag(PyObject* name) {
    PyObject* const value = get(name);
    usual = usual && (value == Py_True || value == Py_False);
    return value == Py_True;
  }

  // The bits of a number; for None those of -1, which are a NaN's.
  int64_t number(PyObject* name) { return number_of(get(name)); }

  int64_t number_of(PyObject* value) {
    if (value == Py_None) return -1;
    if (value == nullptr || !PyFloat_CheckExact(value)) {
      usual = false;
      return 0;
    }
    return std::bit_cast<int64_t>(PyFloat_AS_DOUBLE(value));
  }

  // A number of samples, or -1 for None.
  int64_t count(PyObject* name) {
    PyObject* const value = get(name);
    if (value == Py_None) return -1;
    const bool whole = value != nullptr && PyLong_CheckExact(value);
    const int64_t samples = whole ? PyLong_AsLongLong(value) : 0;
    usual = usual && samples > 0;
    return samples;
  }

  bool text_is(PyObject* value, const char* text) {
    return value != nullptr && PyUnicode_CheckExact(value) && PyUnicode_CompareWithASCIIString(value, text) == 0;
  }

  // A tensor, or an undefined one for None.
  Tensor tensor(PyObject* dict, PyObject* name) { return tensor_of(in(dict, name)); }

  Tensor tensor_of(PyObject* value) {
    if (value == Py_None) return {};
    if (value == nullptr || !THPVariable_CheckExact(value)) {
      usual = false;
      return {};
    }
    return THPVariable_Unpack(value);
  }

 private:
  PyObject* own_;
};

std::shared_ptr<Plan> made(PyObject* module, PyObject* input, PyObject* residual, PyObject* slope, bool by_batch, bool masked) {
  const Owned answer(PyObject_CallFunctionObjArgs(python_forward_plan, module, input, residual, slope, by_batch ? Py_True : Py_False,
                                                  masked ? Py_True : Py_False, nullptr));
  if (answer == nullptr) raise();
  auto plan = std::make_shared<Plan>();
  plan->type.reset(Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(module))));
  if (answer.get() == Py_None) return plan;
  plan->fits = true;
  auto [call, fresh] = parsed<Forward>(answer.get());
  const auto statistics = integers(PyTuple_GET_ITEM(answer.get(), 4));
  plan->fresh = std::move(fresh);
  plan->forward = *call;
  plan->statistics = {statistics[0], statistics[1], statistics[2]};
  plan->mask_bytes = PyLong_AsLongLong(PyTuple_GET_ITEM(answer.get(), 5));
  plan->masked = masked;
  plan->call.reset(Py_NewRef(PyTuple_GET_ITEM(answer.get(), 7)));
  if (PyErr_Occurred() != nullptr) raise();
  return plan;
}

// forward(module, module.__dict__, input, residual, slope): the output; or None, for what Python has to do.
PyObject* forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "forward takes a module, its attributes, input, residual and slope");
  PyObject *const module = given[0], *const py_x = given[2], *const py_residual = given[3], *const slope = given[4];
  if (!THPVariable_CheckExact(py_x) || !undisturbed()) Py_RETURN_NONE;

  Settings own(given[1]);
  const Tensor& x = THPVariable_Unpack(py_x);
  const Tensor residual = own.tensor_of(py_residual);
  PyObject *const parameters = own.get(names.parameters), *const buffers = own.get(names.buffers);
  const Tensor gamma = own.tensor(parameters, names.weight), beta = own.tensor(parameters, names.bias);
  Tensor mean = own.tensor(buffers, names.running_mean), variance = own.tensor(buffers, names.running_var);
  const bool training = own.flag(names.training), tracks = training && own.flag(names.track_running_stats);
  PyObject* const activation = own.get(names.activation);
  const bool relu = own.text_is(activation, "relu"), leaky = own.text_is(activation, "leaky_relu");
  if (!own.usual || !own.text_is(own.get(names.memory), "save") || !(relu || leaky || activation == Py_None)) Py_RETURN_NONE;
  const bool by_batch = training || (!mean.defined() && !variance.defined());
  if (by_batch && !tracks) mean = variance = Tensor();

  const bool differentiates = at::GradMode::is_enabled() && (x.requires_grad() || (gamma.defined() && gamma.requires_grad()) ||
                                                             (beta.defined() && beta.requires_grad()) ||
                                                             (residual.defined() && residual.requires_grad()));
  if (!by_batch && differentiates) Py_RETURN_NONE;
  const bool activates = relu || leaky || slope != Py_None;
  const bool masked = by_batch && residual.defined() && activates;

  if (!plain(x) || x.numel() == 0 || x.dim() < 2 || mean.defined() != variance.defined()) Py_RETURN_NONE;
  const int64_t channels = x.size(1);
  const at::ScalarType computed = computed_in(x);
  for (const Tensor* const each : std::initializer_list<const Tensor*>{&gamma, &beta, &mean, &variance}) {
    if (each->defined() && !row(*each, channels, computed)) Py_RETURN_NONE;
  }
  if (residual.defined() && !(plain(residual) && residual.scalar_type() == x.scalar_type() && residual.sizes().equals(x.sizes()))) {
    Py_RETURN_NONE;
  }
  Tensor mean_low, batches, skipped;
  if (by_batch && tracks) {
    if (!mean.defined()) Py_RETURN_NONE;
    mean_low = own.tensor(buffers, names.running_mean_low);
    skipped = own.tensor(buffers, names.refused_batches);
    batches = own.tensor(buffers, names.num_batches_tracked);
    if (!own.usual || !row(mean_low, channels, computed) || !counter(skipped) || (batches.defined() && !counter(batches))) Py_RETURN_NONE;
  }

  Key key;
  const int64_t momentum = own.number(names.momentum);
  const int64_t epsilon = own.number(names.eps), own_slope = own.number(names.negative_slope), given_slope = own.number_of(slope);
  const int64_t group_size = own.count(names.virtual_batch_size);
  const int64_t flags = (by_batch << 0) | (masked << 1) | (relu << 2) | (leaky << 3) | ((slope != Py_None) << 4) | (residual.defined() << 5);
  bool whole = key.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(Py_TYPE(module)))) && key.add(flags) &&
               key.add(static_cast<int64_t>(x.scalar_type())) && key.add(epsilon) && key.add(momentum) && key.add(own_slope) &&
               key.add(given_slope) && key.add(group_size) && key.add(x.sizes()) && key.add(x.strides());
  if (residual.defined()) whole = whole && key.add(residual.strides());
  if (!own.usual || !whole) Py_RETURN_NONE;

  auto place_of = plans.find(key);
  if (place_of == plans.end()) {
    if (plans.size() >= kMostPlans) plans.clear();
    auto plan = made(module, py_x, py_residual, slope, by_batch, masked);
    place_of = plans.insert_or_assign(key, std::move(plan)).first;
  }
  const std::shared_ptr<Plan> plan = place_of->second;
  if (!plan->fits) Py_RETURN_NONE;

  RECORD_FUNCTION("evennorm::batch_norm", std::vector<c10::IValue>({x}));
  Forward call = plan->forward;
  const Tensor y = plan->fresh.like(x);
  call.x.data = x.data_ptr();
  call.residual.data = address(residual);
  call.y.data = y.data_ptr();
  call.gamma = address(gamma);
  call.beta = address(beta);
  Tensor statistics, mask;
  if (by_batch) {
    statistics = at::detail::empty_cpu(plan->statistics, computed);
    place(call.mean, call.mean_low, call.variance, statistics);
    if (masked) {
      mask = at::detail::empty_cpu({plan->mask_bytes}, at::kByte);
      call.signs = static_cast<uint8_t*>(mask.data_ptr());
    }
    call.running.mean = address(mean);
    call.running.mean_low = address(mean_low);
    call.running.variance = address(variance);
    call.running.batches = static_cast<int64_t*>(address(batches));
    call.running.refused = static_cast<int64_t*>(address(skipped));
    call.running.unbiased = true;
    // Without a count nothing moves, as in torch.
    call.running.decay = momentum != -1 ? 1.0 - std::bit_cast<double>(momentum) : batches.defined() ? -1.0 : 1.0;
  } else {
    call.mean = address(mean);
    call.mean_low = nullptr;
    call.variance = address(variance);
  }
  {
    const WithoutGil released;
    if (by_batch) {
      kernels->operations().forward(call, kernels->workers());
    } else {
      kernels->operations().normalize(call, kernels->workers());
    }
  }
  for (const Tensor* const written : {&mean, &mean_low, &variance, &batches, &skipped}) {
    if (by_batch && written->defined()) written->unsafeGetTensorImpl()->bump_version();
  }
  if (differentiates) {
    const auto node = c10::make_intrusive<EvennormBatchNorm>();
    node->set_next_edges(torch::autograd::collect_next_edges(x, gamma, beta, residual));
    node->plan = plan;
    node->x = SavedVariable(x, false);
    node->gamma = SavedVariable(gamma, false);
    node->beta = SavedVariable(beta, false);
    node->statistics = SavedVariable(statistics, false);
    node->mask = SavedVariable(mask, false);
    node->has_gamma = gamma.defined();
    node->has_beta = beta.defined();
    node->has_mask = mask.defined();
    node->has_residual = residual.defined();
    torch::autograd::set_history(y, node);
  }
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// An operator for programs of torch.compile: one node of a graph in place of some thirty, for each of which Inductor writes code.
void update_running_stats(const Tensor& mean, const Tensor& mean_low, const Tensor& variance, const Tensor& skipped,
                          const std::optional<Tensor>& batches, const Tensor& given_mean, const Tensor& given_mean_low,
                          const Tensor& given_variance, int64_t count, std::optional<double> momentum) {
  // Programs pass them on as they were computed, in any layout.
  const Tensor batch_mean = given_mean.contiguous(), batch_mean_low = given_mean_low.contiguous(),
               batch_variance = given_variance.contiguous();
  const int64_t channels = mean.numel();
  const at::ScalarType type = mean.scalar_type();
  for (const Tensor* const each : {&mean, &mean_low, &variance, &batch_mean, &batch_mean_low, &batch_variance}) {
    TORCH_CHECK(each->scalar_type() == type && each->numel() == channels && each->is_contiguous(),
                "running statistics and those of a batch are dense, of one dtype and size");
  }
  TORCH_CHECK((type == at::kFloat || type == at::kDouble) && counter(skipped) && (!batches || counter(*batches)),
              "running statistics are float32 or float64, their counters int64");
  Running running;
  running.mean = mean.data_ptr();
  running.mean_low = mean_low.data_ptr();
  running.variance = variance.data_ptr();
  running.refused = static_cast<int64_t*>(skipped.data_ptr());
  running.batches = batches ? static_cast<int64_t*>(batches->data_ptr()) : nullptr;
  running.decay = momentum ? 1.0 - *momentum : batches ? -1.0 : 1.0;
  kernels->update_running_stats(type == at::kDouble ? Dtype::float64 : Dtype::float32, running, batch_mean.data_ptr(),
                                batch_mean_low.data_ptr(), batch_variance.data_ptr(), count, channels);
}

// connect(exported, forward_plan, backward_plan, gradients)
PyObject* connect(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 4, "connect takes the kernels and three functions");
  kernels = static_cast<const Exported*>(PyCapsule_GetPointer(given[0], kExported));
  if (kernels == nullptr) return nullptr;
  PyObject** const functions[] = {&python_forward_plan, &python_backward_plan, &python_gradients};
  for (int i = 0; i < 3; ++i) Py_XSETREF(*functions[i], Py_NewRef(given[i + 1]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget_plans(PyObject*, PyObject*) {
  plans.clear();
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(forward)), METH_FASTCALL, nullptr},
    {"connect", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(connect)), METH_FASTCALL, nullptr},
    {"forget_plans", forget_plans, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, EVENNORM_MODULE_NAME, nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyObject* initialized() {
  const auto intern = [](const char* name) { return PyUnicode_InternFromString(name); };
  names = {intern("_parameters"), intern("_buffers"), intern("weight"), intern("bias"), intern("running_mean"), intern("running_var"),
           intern("running_mean_low"), intern("refused_batches"), intern("num_batches_tracked"), intern("training"),
           intern("track_running_stats"), intern("eps"), intern("momentum"), intern("activation"), intern("negative_slope"),
           intern("virtual_batch_size"), intern("memory")};
  ordinary = at::detail::empty_cpu({1}, at::kFloat).key_set();
  return PyModule_Create(&definition);
}

}  // namespace evennorm

TORCH_LIBRARY(evennorm_cpu, library) {
  library.def(
      "update_running_stats(Tensor(a!) mean, Tensor(b!) mean_low, Tensor(c!) variance, Tensor(d!) skipped, Tensor(e!)? batches, "
      "Tensor batch_mean, Tensor batch_mean_low, Tensor batch_variance, SymInt count, float? momentum) -> ()");
}
TORCH_LIBRARY_IMPL(evennorm_cpu, CPU, library) { library.impl("update_running_stats", &evennorm::update_running_stats); }

#define EVENNORM_INIT_(name) PyInit_##name
#define EVENNORM_INIT(name) EVENNORM_INIT_(name)
PyMODINIT_FUNC EVENNORM_INIT(EVENNORM_MODULE)() { return evennorm::initialized(); }
