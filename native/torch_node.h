// The node of autograd's graph that stands behind an output: what it saves, and its gradients by the kernel or by Python.
#pragma once

#include <torch/csrc/autograd/node.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <unordered_map>

#include "torch_plan.h"

namespace evennorm {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

inline Owned wrapped(const Tensor& tensor) { return Owned(tensor.defined() ? THPVariable_Wrap(tensor) : Py_NewRef(Py_None)); }

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
    const Incoming incoming(given);
    return incoming.any() ? computed(incoming, unpacked()) : variable_list(4);
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
  // A derivative may be undefined, for 0. A module's statistics have none. That of mean_low is that of the mean.
  struct Incoming {
    Tensor dy, d_mean, d_variance;

    explicit Incoming(const variable_list& given)
        : dy(given[0]), d_mean(given.size() > 1 ? given[1] : Tensor()), d_variance(given.size() > 2 ? given[2] : Tensor()) {}
    bool any() const { return dy.defined() || d_mean.defined() || d_variance.defined(); }
  };

  struct Arrays {
    Tensor x, gamma, beta, statistics, mask;

    std::array<const Tensor*, 5> all() const { return {&x, &gamma, &beta, &statistics, &mask}; }
  };

  int flags() const { return has_gamma << 0 | has_beta << 1 | has_mask << 2 | has_residual << 3; }

  Arrays unpacked() {
    const auto optional = [](const SavedVariable& saved, bool has) { return has ? saved.unpack() : Tensor(); };
    return {x.unpack(), optional(gamma, has_gamma), optional(beta, has_beta), statistics.unpack(), optional(mask, has_mask)};
  }

  variable_list computed(Incoming incoming, const Arrays& saved) const {
    if (!incoming.dy.defined()) incoming.dy = at::zeros_like(saved.x);
    const auto readable = [&](const Tensor& d) {
      return !d.defined() || (plain(d) && d.is_contiguous() && d.scalar_type() == saved.statistics.scalar_type());
    };
    const bool by_plan = !at::GradMode::is_enabled() && readable(incoming.d_mean) && readable(incoming.d_variance);
    const BackwardPlan* const found = by_plan ? planned(incoming.dy, saved.x) : nullptr;
    return found == nullptr ? by_python(incoming, saved) : by_kernel(*found, incoming, saved);
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
    const Incoming incoming(given);
    return incoming.any() ? node.computed(incoming, saved) : variable_list(4);
  }

  std::array<SavedVariable*, 5> all() { return {&x, &gamma, &beta, &statistics, &mask}; }

  variable_list by_kernel(const BackwardPlan& found, const Incoming& incoming, const Arrays& saved) const {
    Backward call = found.call;
    const Tensor& dy = incoming.dy;
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
    call.mask = static_cast<const uint8_t*>(address(saved.mask));
    call.d_mean = address(incoming.d_mean);
    call.d_variance = address(incoming.d_variance);
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
  variable_list by_python(const Incoming& incoming, const Arrays& saved) const;
};

inline const BackwardPlan* EvennormBatchNorm::made(const Tensor& dy, const Tensor& x) const {
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

inline variable_list EvennormBatchNorm::by_python(const Incoming& incoming, const Arrays& saved) const {
  const WithGil gil;
  const Owned py_dy = wrapped(incoming.dy), py_d_mean = wrapped(incoming.d_mean), py_d_variance = wrapped(incoming.d_variance);
  const Owned py_x = wrapped(saved.x), py_gamma = wrapped(saved.gamma), py_beta = wrapped(saved.beta),
              py_statistics = wrapped(saved.statistics), py_mask = wrapped(saved.mask);
  const Owned answer(PyObject_CallFunctionObjArgs(python_gradients, plan->call.get(), py_dy.get(), py_x.get(), py_gamma.get(),
                                                  py_beta.get(), py_statistics.get(), py_mask.get(),
                                                  has_residual ? Py_True : Py_False, py_d_mean.get(), py_d_variance.get(), nullptr));
  if (answer == nullptr) raise();
  variable_list gradients(4);
  for (size_t i = 0; i < 4; ++i) {
    PyObject* const gradient = PyTuple_GET_ITEM(answer.get(), i);
    if (gradient != Py_None) gradients[i] = THPVariable_Unpack(gradient);
  }
  return gradients;
}

}  // namespace evennorm
