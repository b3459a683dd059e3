// evennorm.kernels._torch_VERSION: the calls that modules make most, without Python between torch's autograd and the kernels.
//
// Linked to libtorch, and so to one version of it. It computes nothing of its own and decides nothing: Python (torch/native.py)
// works out each plan, and whatever is unusual about a call is handed back to Python, as None.
#include <ATen/record_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "torch_node.h"
#include "torch_plan.h"
#include "torch_settings.h"

namespace evennorm {
namespace {

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

// `answer` is Python's, a new reference.
std::shared_ptr<Plan> made(PyObject* from_python, bool masked) {
  const Owned answer(from_python);
  if (answer == nullptr) raise();
  auto plan = std::make_shared<Plan>();
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

// The plan with this key, made where there is none yet.
template <class Make>
std::shared_ptr<Plan> planned(const Key& key, const Make& make) {
  const auto known = plans.find(key);
  if (known != plans.end()) return known->second;
  if (plans.size() >= kMostPlans) plans.clear();
  auto plan = make();
  return plans.insert_or_assign(key, std::move(plan)).first->second;
}

bool needs_gradient(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) { return tensor->defined() && tensor->requires_grad(); });
}

// Whether the kernels read a residual as they read x.
bool is_like(const Tensor& residual, const Tensor& x) {
  return !residual.defined() || (plain(residual) && residual.scalar_type() == x.scalar_type() && residual.sizes().equals(x.sizes()));
}

c10::intrusive_ptr<EvennormBatchNorm> node_of(const std::shared_ptr<Plan>& plan, const Tensor& x, const Tensor& gamma, const Tensor& beta,
                                              const Tensor& residual, const Tensor& statistics, const Tensor& mask) {
  auto node = c10::make_intrusive<EvennormBatchNorm>();
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
  return node;
}

// forward(module, module.__dict__, input, residual, slope, limit): the output; or None, for what Python has to do.
PyObject* forward(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "forward takes a module, its attributes, input, residual, slope and limit");
  PyObject *const module = given[0], *const py_x = given[2], *const py_residual = given[3], *const slope = given[4], *const limit = given[5];
  if (!THPVariable_CheckExact(py_x) || !undisturbed()) Py_RETURN_NONE;

  Settings own(given[1]);
  const Tensor& x = THPVariable_Unpack(py_x);
  const Tensor residual = own.tensor_of(py_residual);
  PyObject *const parameters = own.get(names.parameters), *const buffers = own.get(names.buffers);
  const Tensor gamma = own.tensor(parameters, names.weight), beta = own.tensor(parameters, names.bias);
  Tensor mean = own.tensor(buffers, names.running_mean), variance = own.tensor(buffers, names.running_var);
  const bool training = own.flag(names.training), tracks = training && own.flag(names.track_running_stats);
  PyObject* const activation = own.get(names.activation);
  const bool relu = own.text_is(activation, "relu"), relu6 = own.text_is(activation, "relu6");
  const bool leaky = own.text_is(activation, "leaky_relu"), activates = relu || relu6 || leaky || slope != Py_None;
  if (!own.usual || !own.text_is(own.get(names.memory), "save") || !(relu || relu6 || leaky || activation == Py_None)) {
    Py_RETURN_NONE;
  }
  const bool by_batch = training || (!mean.defined() && !variance.defined());
  if (by_batch && !tracks) mean = variance = Tensor();

  const bool differentiates = needs_gradient({&x, &gamma, &beta, &residual});
  if (!by_batch && differentiates) Py_RETURN_NONE;
  const bool masked = by_batch && residual.defined() && activates;

  if (!plain(x) || x.numel() == 0 || x.dim() < 2 || mean.defined() != variance.defined()) Py_RETURN_NONE;
  const int64_t channels = x.size(1);
  const at::ScalarType computed = computed_in(x);
  for (const Tensor* const each : std::initializer_list<const Tensor*>{&gamma, &beta, &mean, &variance}) {
    if (each->defined() && !row(*each, channels, computed)) Py_RETURN_NONE;
  }
  if (!is_like(residual, x)) Py_RETURN_NONE;
  Tensor mean_low, batches, skipped;
  if (by_batch && tracks) {
    if (!mean.defined()) Py_RETURN_NONE;
    mean_low = own.tensor(buffers, names.running_mean_low);
    skipped = own.tensor(buffers, names.skipped_batches);
    batches = own.tensor(buffers, names.num_batches_tracked);
    if (!own.usual || !row(mean_low, channels, computed) || !counter(skipped) || (batches.defined() && !counter(batches))) Py_RETURN_NONE;
  }

  Key key;
  const int64_t momentum = own.number(names.momentum);
  const int64_t epsilon = own.number(names.eps), own_slope = own.number(names.negative_slope), given_slope = own.number_of(slope);
  const int64_t given_limit = own.number_of(limit);
  const int64_t group_size = own.count(names.virtual_batch_size);
  const int64_t flags = (by_batch << 0) | (masked << 1) | (relu << 2) | (leaky << 3) | ((slope != Py_None) << 4) | (residual.defined() << 5) |
                        (relu6 << 6);
  bool whole = key.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(Py_TYPE(module)))) && key.add(flags) &&
               key.add(static_cast<int64_t>(x.scalar_type())) && key.add(epsilon) && key.add(momentum) && key.add(own_slope) &&
               key.add(given_slope) && key.add(given_limit) && key.add(group_size) && key.add(x.sizes()) && key.add(x.strides());
  if (residual.defined()) whole = whole && key.add(residual.strides());
  if (!own.usual || !whole) Py_RETURN_NONE;

  const std::shared_ptr<Plan> plan = planned(key, [&] {
    auto made_now = made(PyObject_CallFunctionObjArgs(python_forward_plan, module, py_x, py_residual, slope, limit,
                                                      by_batch ? Py_True : Py_False, masked ? Py_True : Py_False, nullptr),
                         masked);
    made_now->type.reset(Py_NewRef(reinterpret_cast<PyObject*>(Py_TYPE(module))));
    return made_now;
  });
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
      call.mask = static_cast<uint8_t*>(mask.data_ptr());
    }
    call.running.mean = address(mean);
    call.running.mean_low = address(mean_low);
    call.running.variance = address(variance);
    call.running.batches = static_cast<int64_t*>(address(batches));
    call.running.skipped = static_cast<int64_t*>(address(skipped));
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
  if (differentiates) torch::autograd::set_history(y, node_of(plan, x, gamma, beta, residual, statistics, mask));
  return THPVariable_Wrap(y);
  END_HANDLE_TH_ERRORS
}

// batch_norm(call, input, gamma, beta, residual, masked, grouped): the output, mean, mean_low and variance; or None, for what Python has
// to do. `call` has one channel axis and no ghost batches; grouped moments are (1, channel), others (channel).
PyObject* batch_norm(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 7, "batch_norm takes a call, input, gamma, beta, residual, masked and grouped");
  PyObject *const py_call = given[0], *const py_x = given[1], *const py_residual = given[4];
  const bool masked = given[5] == Py_True;
  if (!THPVariable_CheckExact(py_x) || !undisturbed()) Py_RETURN_NONE;

  Settings own(nullptr);
  const Tensor& x = THPVariable_Unpack(py_x);
  const Tensor gamma = own.tensor_of(given[2]), beta = own.tensor_of(given[3]), residual = own.tensor_of(py_residual);
  if (!own.usual || !plain(x) || x.numel() == 0 || !is_like(residual, x)) Py_RETURN_NONE;
  Key key;
  bool whole = key.add(static_cast<int64_t>(reinterpret_cast<intptr_t>(py_call))) && key.add(static_cast<int64_t>(x.scalar_type())) &&
               key.add(residual.defined()) && key.add(x.sizes()) && key.add(x.strides());
  if (residual.defined()) whole = whole && key.add(residual.strides());
  if (!whole) Py_RETURN_NONE;
  const std::shared_ptr<Plan> plan = planned(key, [&] {
    auto made_now = made(PyObject_CallFunctionObjArgs(python_function_plan, py_call, py_x, py_residual, given[5], nullptr), masked);
    made_now->call.reset(Py_NewRef(py_call));
    return made_now;
  });
  if (!plan->fits) Py_RETURN_NONE;
  const int64_t channels = plan->statistics[2];
  const at::ScalarType computed = computed_in(x);
  const auto fits = [&](const Tensor& parameter) { return !parameter.defined() || row(parameter, channels, computed); };
  if (!fits(gamma) || !fits(beta)) Py_RETURN_NONE;

  RECORD_FUNCTION("evennorm::batch_norm", std::vector<c10::IValue>({x}));
  Forward call = plan->forward;
  const Tensor y = plan->fresh.like(x), statistics = at::detail::empty_cpu(plan->statistics, computed);
  const Tensor mask = masked ? at::detail::empty_cpu({plan->mask_bytes}, at::kByte) : Tensor();
  call.x.data = x.data_ptr();
  call.residual.data = address(residual);
  call.y.data = y.data_ptr();
  call.gamma = address(gamma);
  call.beta = address(beta);
  call.mask = static_cast<uint8_t*>(address(mask));
  place(call.mean, call.mean_low, call.variance, statistics);
  {
    const WithoutGil released;
    kernels->operations().forward(call, kernels->workers());
  }
  // Copies: who writes into them writes into nothing that the gradient needs.
  const std::array<int64_t, 2> sizes{1, channels};
  const at::IntArrayRef of_moments = at::IntArrayRef(sizes).slice(given[6] == Py_True ? 0 : 1);
  const auto copied = [&](const void* from) {
    Tensor moment = at::detail::empty_cpu(of_moments, computed);
    std::memcpy(moment.data_ptr(), from, moment.nbytes());
    return moment;
  };
  const Tensor mean = copied(call.mean), mean_low = copied(call.mean_low), variance = copied(call.variance);
  if (needs_gradient({&x, &gamma, &beta, &residual})) {
    const auto node = node_of(plan, x, gamma, beta, residual, statistics, mask);
    for (const Tensor* const output : {&y, &mean_low, &variance}) torch::autograd::set_history(*output, node);
  }
  const Owned results[] = {wrapped(y), wrapped(mean), wrapped(mean_low), wrapped(variance)};
  return PyTuple_Pack(4, results[0].get(), results[1].get(), results[2].get(), results[3].get());
  END_HANDLE_TH_ERRORS
}

// is_finite(tensor): true if all values of an ordinary array in memory are; false where one is not, or Python has to look.
PyObject* is_finite(PyObject*, PyObject* tensor) {
  HANDLE_TH_ERRORS
  if (!THPVariable_CheckExact(tensor) || !undisturbed()) Py_RETURN_FALSE;
  const Tensor& values = THPVariable_Unpack(tensor);
  if (!plain(values) || !values.is_contiguous()) Py_RETURN_FALSE;
  const auto all_finite = [&](const auto* data) {
    bool all = true;
    for (int64_t i = 0, n = values.numel(); i < n; ++i) all &= std::isfinite(data[i]);
    return all;
  };
  const bool found = values.scalar_type() == at::kFloat    ? all_finite(static_cast<const float*>(values.data_ptr()))
                     : values.scalar_type() == at::kDouble ? all_finite(static_cast<const double*>(values.data_ptr()))
                                                           : false;
  return PyBool_FromLong(found);
  END_HANDLE_TH_ERRORS
}

// An operator for programs of torch.compile: one node of a graph in place of some thirty, for each of which Inductor writes code.
void update_running_stats(const Tensor& mean, const Tensor& mean_low, const Tensor& variance, const Tensor& skipped,
                          const std::optional<Tensor>& batches, const Tensor& given_mean, const Tensor& given_mean_low,
                          const Tensor& given_variance, int64_t count, std::optional<double> momentum,
                          const std::optional<Tensor>& /*after*/) {
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
  running.skipped = static_cast<int64_t*>(skipped.data_ptr());
  running.batches = batches ? static_cast<int64_t*>(batches->data_ptr()) : nullptr;
  running.decay = momentum ? 1.0 - *momentum : batches ? -1.0 : 1.0;
  kernels->update_running_stats(type == at::kDouble ? Dtype::float64 : Dtype::float32, running, batch_mean.data_ptr(),
                                batch_mean_low.data_ptr(), batch_variance.data_ptr(), count, channels);
}

// connect(exported, forward_plan, function_plan, backward_plan, gradients)
PyObject* connect(PyObject*, PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "connect takes the kernels and four functions");
  kernels = static_cast<const Exported*>(PyCapsule_GetPointer(given[0], kExported));
  if (kernels == nullptr) return nullptr;
  PyObject** const functions[] = {&python_forward_plan, &python_function_plan, &python_backward_plan, &python_gradients};
  for (int i = 0; i < 4; ++i) Py_XSETREF(*functions[i], Py_NewRef(given[i + 1]));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(forward)), METH_FASTCALL, nullptr},
    {"batch_norm", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(batch_norm)), METH_FASTCALL, nullptr},
    {"is_finite", is_finite, METH_O, nullptr},
    {"connect", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(connect)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, EVENNORM_MODULE_NAME, nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyObject* initialized() {
  const auto intern = [](const char* name) { return PyUnicode_InternFromString(name); };
  names = {intern("_parameters"), intern("_buffers"), intern("weight"), intern("bias"), intern("running_mean"), intern("running_var"),
           intern("running_mean_low"), intern("skipped_batches"), intern("num_batches_tracked"), intern("training"),
           intern("track_running_stats"), intern("eps"), intern("momentum"), intern("activation"), intern("negative_slope"),
           intern("virtual_batch_size"), intern("memory")};
  ordinary = at::detail::empty_cpu({1}, at::kFloat).key_set();
  return PyModule_Create(&definition);
}

}  // namespace evennorm

// `after` is not read. A program that was compiled with it computes it before this call, and so together with the statistics, in one
// kernel.
TORCH_LIBRARY(evennorm_cpu, library) {
  library.def(
      "update_running_stats(Tensor(a!) mean, Tensor(b!) mean_low, Tensor(c!) variance, Tensor(d!) skipped, Tensor(e!)? batches, "
      "Tensor batch_mean, Tensor batch_mean_low, Tensor batch_variance, SymInt count, float? momentum, Tensor? after=None) -> ()");
}
TORCH_LIBRARY_IMPL(evennorm_cpu, CPU, library) { library.impl("update_running_stats", &evennorm::update_running_stats); }
TORCH_LIBRARY_IMPL(evennorm_cpu, Autograd, library) {  // nothing is differentiated, and asking each argument whether it is takes 1 us
  library.impl("update_running_stats", torch::CppFunction::makeFallthrough());
}

#define EVENNORM_INIT_(name) PyInit_##name
#define EVENNORM_INIT(name) EVENNORM_INIT_(name)
PyMODINIT_FUNC EVENNORM_INIT(EVENNORM_MODULE)() { return evennorm::initialized(); }
