// What the attributes of a module say, read without Python's words for it.
#pragma once

#include <Python.h>
#include <torch/csrc/autograd/python_variable.h>

#include <bit>

#include "torch_plan.h"

namespace evennorm {

// Names of attributes.
struct Names {
  PyObject *parameters, *buffers, *weight, *bias, *running_mean, *running_var, *running_mean_low, *skipped_batches, *num_batches_tracked,
      *training, *track_running_stats, *eps, *momentum, *activation, *negative_slope, *virtual_batch_size, *memory;
};
inline Names names;

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

}  // namespace evennorm
