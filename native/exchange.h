// Tensors of a framework read without asking Python for each number: by the table of C functions that DLPack defines from version
// 1.3 on (https://dmlc.github.io/dlpack, DLPackExchangeAPI). PyTorch has it since 2.10, as torch.Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <vector>

namespace evennorm {

// The binary interface, under DLPack's names; what is not asked for stands as a plain pointer.
struct DLDevice {
  int32_t device_type, device_id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  struct {
    uint32_t major, minor;
  } version;
  void* prev_api;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object_no_sync;
  void* managed_tensor_to_py_object_no_sync;
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);
  void* current_work_stream;
};

constexpr int kCpuDevice = 1;
constexpr int kInteger = 0, kFloat = 2;

// The tensors of the framework that has registered, of exactly the types it has named: a subclass may stand for something else.
class Exchange {
 public:
  void enable(const nanobind::capsule& table, const std::vector<nanobind::handle>& types) {
    auto* const api = static_cast<const DLPackExchangeAPI*>(table.data("dlpack_exchange_api"));
    if (api->version.major != 1 || api->dltensor_from_py_object_no_sync == nullptr) return;
    for (const nanobind::handle type : types) types_.push_back(type.ptr());
    read_ = api->dltensor_from_py_object_no_sync;
  }

  bool enabled() const { return read_ != nullptr; }

  bool knows(PyObject* object) const {
    for (PyObject* const type : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(object)) == type) return true;
    }
    return false;
  }

  // False where the framework cannot show the tensor.
  bool read(PyObject* object, DLTensor& tensor) const {
    if (read_(object, &tensor) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  std::vector<PyObject*> types_;
  int (*read_)(void*, DLTensor*) = nullptr;
};

// Arrays of one call: absent (None), by address (an integer), or tensors that are checked before they are used.
class Arrays {
 public:
  explicit Arrays(const Exchange& exchange) : exchange_(exchange) {}

  // Whether all arrays so far lie in CPU memory as they were said to.
  bool fit() const { return fit_; }

  // An array that the caller has looked at: of any strides and dtype.
  void* array(nanobind::handle object) {
    void* address;
    DLTensor tensor;
    return known(object, address, tensor) ? address : start(tensor);
  }

  // `count` numbers of a type one behind the other, in memory that the caller has allocated.
  void* own_row(nanobind::handle object, int64_t count, int code, int bits) {
    void* address;
    DLTensor tensor;
    if (known(object, address, tensor)) return address;
    fit_ = fit_ && tensor.dtype.code == code && tensor.dtype.bits == bits && dense(tensor, count);
    return start(tensor);
  }

  // The same in memory of the user's.
  void* row(nanobind::handle object, int64_t count, int code, int bits) {
    void* const address = own_row(object, count, code, bits);
    fit_ = fit_ && (address == nullptr || PyLong_CheckExact(object.ptr()) || !negated(object.ptr()));
    return address;
  }

 private:
  // True where there is nothing to read: an address, or null.
  bool known(nanobind::handle object, void*& address, DLTensor& tensor) {
    address = nullptr;
    if (object.is_none()) return true;
    if (PyLong_CheckExact(object.ptr())) {
      address = PyLong_AsVoidPtr(object.ptr());
      return true;
    }
    if (!exchange_.enabled() || !exchange_.knows(object.ptr()) || !exchange_.read(object.ptr(), tensor) ||
        tensor.device.device_type != kCpuDevice) {
      fit_ = false;
      return true;
    }
    return false;
  }

  // x.conj().imag holds the opposite of its values, which DLPack does not say.
  static bool negated(PyObject* object) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* const answer = PyObject_CallMethodObjArgs(object, name, nullptr);
    const bool yes = answer != Py_False;
    if (answer == nullptr) PyErr_Clear();
    Py_XDECREF(answer);
    return yes;
  }

  static void* start(const DLTensor& tensor) { return static_cast<char*>(tensor.data) + tensor.byte_offset; }

  static bool dense(const DLTensor& tensor, int64_t count) {
    int64_t step = 1;
    bool in_order = true;
    for (int i = tensor.ndim; i-- > 0; step *= tensor.shape[i]) {
      in_order = in_order && (tensor.shape[i] == 1 || tensor.strides == nullptr || tensor.strides[i] == step);
    }
    return step == count && (in_order || count == 0);  // of no elements, strides may be anything
  }

  const Exchange& exchange_;
  bool fit_ = true;
};

}  // namespace evennorm
