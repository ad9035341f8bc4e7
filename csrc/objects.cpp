#include "python.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include <torch/headeronly/core/DeviceType.h>

#include "tensors.h"

// torch's, which its C functions lack; null where this torch has no such function.
namespace at {
class Tensor;
namespace native {
[[gnu::weak, gnu::visibility("default")]] bool is_neg(const Tensor&);
}
namespace autocast {
[[gnu::weak, gnu::visibility("default")]] bool is_autocast_enabled(c10::DeviceType);
}
}  // namespace at

namespace fastrnn {

Imported imported;
PyObject* keys[KEYS];

namespace {

Py_ssize_t place = 0;  // of the pointer to torch's tensor in Python's; 0 where it is not known

const void* pointer_at(PyObject* object, Py_ssize_t at) {
  const void* found;
  std::memcpy(&found, reinterpret_cast<const char*>(object) + at, sizeof found);
  return found;
}

const void* pointer_by_attribute(PyObject* tensor) {
  const Owned number = owned(PyObject_GetAttr(tensor, keys[CDATA]));
  if (!number) throw PythonError();
  return PyLong_AsVoidPtr(number.get());
}

// An at::Tensor, which is one pointer to what it shares with its copies; that of a tensor of Python's.
class TorchTensor {
 public:
  explicit TorchTensor(PyObject* object) : pointer_(place ? pointer_at(object, place) : pointer_by_attribute(object)) {}
  AtenTensorHandle handle() const { return reinterpret_cast<AtenTensorHandle>(const_cast<const void**>(&pointer_)); }
  const at::Tensor& tensor() const { return *reinterpret_cast<const at::Tensor*>(&pointer_); }

 private:
  const void* pointer_;
};

// The imaginary part of a conjugate, for one, holds its numbers negated.
bool is_negated(PyObject* object, const TorchTensor& tensor) {
  if (at::native::is_neg) return at::native::is_neg(tensor.tensor());
  const Owned answer = owned(PyObject_CallMethodObjArgs(object, keys[IS_NEG], nullptr));
  if (!answer) throw PythonError();
  return answer.get() != Py_False;
}

// A tensor of zeros that has no memory (torch._efficientzerotensor). torch gives it some where an operation reads it.
bool is_zero(PyObject* object) {
  const Owned answer = owned(PyObject_CallMethod(object, "_is_zerotensor", nullptr));
  if (!answer) throw PythonError();
  return answer.get() == Py_True;
}

}  // namespace

bool make_keys() {
  // clang-format off
  static const char* const KEY_NAMES[KEYS] = {
    "RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "RNN_TANH", "RNN_RELU", "tanh", "relu",
    "mode", "input_size", "hidden_size", "proj_size", "num_heads", "num_layers", "bias", "bidirectional", "batch_first", "dropout",
    "training", "nonlinearity", "_flat_weights", "_flat_weights_names", "_parameters", "_fastrnn_panels", "_fastrnn_compressed",
    "weight_ih", "weight_hh", "bias_ih", "bias_hh", "new_empty", "new_zeros", "is_neg", "requires_grad", "_cdata", "_current_level"
  };
  // clang-format on
  for (size_t i = 0; i < KEYS; ++i)
    if (!(keys[i] = PyUnicode_InternFromString(KEY_NAMES[i]))) return false;
  return true;
}

void find_torch_tensor(PyObject* tensor, PyObject* parameter) {
  std::vector<Py_ssize_t> places[2];
  PyObject* const samples[] = {tensor, parameter};
  for (size_t i = 0; i < 2; ++i) {
    const Owned size = owned(PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(samples[i])), "__basicsize__"));
    const auto bytes = size ? PyLong_AsSsize_t(size.get()) : -1;
    if (bytes < 0) throw PythonError();
    for (Py_ssize_t at = sizeof(PyObject); at + static_cast<Py_ssize_t>(sizeof(void*)) <= bytes; at += sizeof(void*))
      if (pointer_at(samples[i], at) == pointer_by_attribute(samples[i])) places[i].push_back(at);
  }
  if (places[0].size() == 1 && places[0] == places[1]) place = places[0][0];
}

bool is_plain(PyObject* object, bool maybe_parameter) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == imported.tensor_type || (maybe_parameter && type == imported.parameter_type);
}

bool look_strided(PyObject* object, View& seen, bool maybe_parameter, bool unread) {
  if (!is_plain(object, maybe_parameter)) return false;
  const TorchTensor tensor(object);
  if (!see(tensor.handle(), seen) || seen.dtype == Dtype::other || seen.dtype == Dtype::f16 || seen.dims < 1) return false;
  return (unread || in_memory(tensor.handle(), seen)) && !is_negated(object, tensor);
}

bool look_on_gpu(PyObject* object, View& seen, OnGpu& where, int32_t device_type) {
  if (!is_plain(object, true)) return false;
  const TorchTensor tensor(object);
  if (!see(tensor.handle(), seen, device_type) || seen.dtype == Dtype::other) return false;
  if (aoti_torch_get_device_index(tensor.handle(), &where.index)) return false;
  if (aoti_torch_get_dtype(tensor.handle(), &where.dtype)) return false;
  return in_memory(tensor.handle(), seen) && !is_negated(object, tensor);
}

bool look(PyObject* object, View& seen, bool maybe_parameter, bool unread) {
  return look_strided(object, seen, maybe_parameter, unread) && seen.stride(-1) == 1;
}

// check_memory(tensors): raise where numbers of one lie in memory that is not there.
PyObject* check_memory(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[0]); ++i) {
      PyObject* object = PyTuple_GetItem(args[0], i);
      if (!is_plain(object, true)) continue;
      const TorchTensor tensor(object);
      View seen;
      if (see(tensor.handle(), seen) && !in_memory(tensor.handle(), seen) && !is_zero(object))
        check_in_memory(tensor.handle(), seen, false);
    }
    return nullptr;
  });
}

bool is_watched(bool on_gpu) {
  if (!imported.watchers) return true;
  PyObject* level = PyDict_GetItemWithError(imported.forward_ad, keys[CURRENT_LEVEL]);
  if (!level || PyLong_AsLong(level) >= 0) return true;
  const auto device = on_gpu ? c10::DeviceType::CUDA : c10::DeviceType::CPU;
  if (at::autocast::is_autocast_enabled && at::autocast::is_autocast_enabled(device)) return true;
  const auto is_true = [](PyObject* watcher) {
    const Owned answer = owned(PyObject_CallNoArgs(watcher));
    const int truth = answer ? PyObject_IsTrue(answer.get()) : -1;
    if (truth < 0) throw PythonError();
    return truth != 0;
  };
  if (!at::autocast::is_autocast_enabled && is_true(imported.autocast)) return true;
  for (Py_ssize_t i = 0; i < PyTuple_Size(imported.watchers); ++i)
    if (is_true(PyTuple_GetItem(imported.watchers, i))) return true;
  return false;
}

bool wants_gradient(PyObject* tensor) {
  if (!tensor) return false;
  const Owned answer = owned(PyObject_GetAttr(tensor, keys[REQUIRES_GRAD]));
  if (!answer) throw PythonError();
  return answer.get() == Py_True;
}

Owned tuple_of(std::span<Owned> items) {
  Owned tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  if (!tuple || PyErr_Occurred()) throw PythonError();
  Py_ssize_t at = 0;
  for (Owned& item : items) PyTuple_SetItem(tuple.get(), at++, (item ? std::move(item) : kept(Py_None)).release());
  return tuple;
}

Owned shape_of(const std::vector<int64_t>& sizes) {
  Owned shape = owned(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
  if (!shape) throw PythonError();
  Py_ssize_t axis = 0;
  for (const int64_t size : sizes) {
    PyObject* number = PyLong_FromLongLong(size);
    if (!number) throw PythonError();
    PyTuple_SetItem(shape.get(), axis++, number);
  }
  return shape;
}

Owned Results::make(const std::vector<int64_t>& sizes, Dtype dtype, View& seen) {
  Owned made;
  PyObject* of_dtype = nullptr;
  for (size_t i = count_; i-- > 0 && !made;) {
    const auto& [object, pattern] = patterns_[i];
    if (pattern.dtype != dtype) continue;
    of_dtype = object;
    if (pattern.is_contiguous() && std::equal(sizes.begin(), sizes.end(), pattern.sizes, pattern.sizes + pattern.dims))
      made = owned(PyObject_CallFunctionObjArgs(imported.empty_like, object, nullptr));
  }
  if (!made && of_dtype) {
    made = owned(PyObject_CallMethodObjArgs(of_dtype, keys[NEW_EMPTY], shape_of(sizes).get(), nullptr));
  }
  if (!made || !look(made.get(), seen)) throw PythonError();
  like(made.get(), seen);
  return made;
}

Owned Results::zeros(const std::vector<int64_t>& sizes, Dtype dtype, View& seen) {
  Owned made = make(sizes, dtype, seen);
  std::memset(reinterpret_cast<void*>(seen.address), 0, static_cast<size_t>(seen.numel() * bytes_of(seen.dtype)));
  return made;
}

}  // namespace fastrnn
