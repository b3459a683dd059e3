// What the extension for torch knows of a kind of call, and which tensors it reads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <Python.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/graph_task.h>

#include <array>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "exported.h"

namespace evennorm {

using at::Tensor;

inline const Exported* kernels = nullptr;

// Given by torch/native.py; each is called with the GIL.
inline PyObject* python_forward_plan = nullptr;
inline PyObject* python_function_plan = nullptr;
inline PyObject* python_backward_plan = nullptr;
inline PyObject* python_gradients = nullptr;

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
[[noreturn]] inline void raise() {
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
  Owned type;         // of the module, if it is one's, so that no other gets its address
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

inline c10::DispatchKeySet ordinary;

inline bool plain(const Tensor& tensor) { return (tensor.key_set() | ordinary) == ordinary && !tensor._fw_grad(0).defined(); }

inline bool row(const Tensor& tensor, int64_t count, at::ScalarType type) {
  return plain(tensor) && tensor.scalar_type() == type && tensor.dim() == 1 && tensor.numel() == count && tensor.is_contiguous();
}

inline bool counter(const Tensor& tensor) { return plain(tensor) && tensor.scalar_type() == at::kLong && tensor.numel() == 1; }

// Whether operations run as they are called: nobody vectorizes, traces or records them, or repeats them for the backward pass.
inline bool undisturbed() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set;
  return included.empty() && torch::autograd::get_current_graph_task_id() == -1;
}

inline at::ScalarType computed_in(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline void place(void*& mean, void*& mean_low, void*& variance, const Tensor& statistics) {
  char* const first = static_cast<char*>(statistics.data_ptr());
  const int64_t step = statistics.numel() / 3 * statistics.itemsize();
  mean = first;
  mean_low = first + step;
  variance = first + 2 * step;
}

inline void* address(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

inline std::vector<int64_t> integers(PyObject* tuple) {
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

}  // namespace evennorm
