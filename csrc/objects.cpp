#include "python.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace fastrnn {

Handed handed;
PyObject* keys[KEYS];

bool make_keys() {
  // clang-format off
  static const char* const KEY_NAMES[KEYS] = {
    "mode", "num_layers", "bidirectional", "batch_first", "dropout", "training", "_flat_weights", "_flat_weights_names",
    "_parameters", "_fastrnn_panels", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "new_empty",
    "is_neg", "requires_grad"
  };
  // clang-format on
  for (size_t i = 0; i < KEYS; ++i)
    if (!(keys[i] = PyUnicode_InternFromString(KEY_NAMES[i]))) return false;
  return true;
}

bool look(PyObject* object, View& seen, bool maybe_parameter) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != handed.tensor_type && !(maybe_parameter && type == handed.parameter_type)) return false;
  DLTensor t;
  if (handed.exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {  // such as a sparse one
    PyErr_Clear();
    return false;
  }
  if (t.device.device_type != kDLCPU || t.dtype.lanes != 1 || t.ndim < 1 || t.strides[t.ndim - 1] != 1) return false;
  seen.address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
  seen.dims = t.ndim;
  seen.sizes = t.shape;
  seen.strides = t.strides;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) seen.dtype = Dtype::f32;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 64) seen.dtype = Dtype::f64;
  if (t.dtype.code == kDLBfloat) seen.dtype = Dtype::bf16;
  if (t.dtype.code == kDLUInt && t.dtype.bits == 8) seen.dtype = Dtype::byte;
  if (t.dtype.code == kDLInt && t.dtype.bits == 64) seen.dtype = Dtype::i64;
  const int64_t numbers = seen.numel();
  if (!t.data && numbers) return false;
  // The imaginary part of a conjugate holds its numbers negated, and DLPack does not say so. It has gaps, or one number.
  bool whole = numbers != 1;
  for (int64_t axis = seen.dims - 1, expected = 1; axis >= 0; expected *= seen.sizes[axis], --axis)
    whole = whole && seen.strides[axis] == expected;
  if (whole) return true;
  const Owned negated = owned(PyObject_CallMethodObjArgs(object, keys[IS_NEG], nullptr));
  if (!negated) throw PythonError();
  return negated.get() == Py_False;
}

bool somebody_watches() {
  if (!handed.watchers) return true;
  for (Py_ssize_t i = 0; i < PyTuple_Size(handed.watchers); ++i) {
    const Owned answer = owned(PyObject_CallNoArgs(PyTuple_GetItem(handed.watchers, i)));
    if (!answer) throw PythonError();
    const int truth = PyObject_IsTrue(answer.get());
    if (truth < 0) throw PythonError();
    if (truth) return true;
  }
  return false;
}

bool wants_gradient(PyObject* tensor) {
  if (!tensor) return false;
  const Owned answer = owned(PyObject_GetAttr(tensor, keys[REQUIRES_GRAD]));
  if (!answer) throw PythonError();
  return answer.get() == Py_True;
}

Owned tuple_of(std::vector<Owned> items) {
  Owned tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  if (!tuple || PyErr_Occurred()) throw PythonError();
  Py_ssize_t at = 0;
  for (Owned& item : items) PyTuple_SetItem(tuple.get(), at++, (item ? std::move(item) : kept(Py_None)).release());
  return tuple;
}

Owned Results::make(const std::vector<int64_t>& sizes, Dtype dtype, View& seen) {
  Owned made;
  PyObject* of_dtype = nullptr;
  for (size_t i = count_; i-- > 0 && !made;) {
    const auto& [object, pattern] = patterns_[i];
    if (pattern.dtype != dtype) continue;
    of_dtype = object;
    if (pattern.is_contiguous() && std::equal(sizes.begin(), sizes.end(), pattern.sizes, pattern.sizes + pattern.dims))
      made = owned(PyObject_CallFunctionObjArgs(handed.empty_like, object, nullptr));
  }
  if (!made && of_dtype) {
    const Owned shape = owned(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
    if (!shape) throw PythonError();
    Py_ssize_t axis = 0;
    for (const int64_t size : sizes) {
      PyObject* number = PyLong_FromLongLong(size);
      if (!number) throw PythonError();
      PyTuple_SetItem(shape.get(), axis++, number);
    }
    made = owned(PyObject_CallMethodObjArgs(of_dtype, keys[NEW_EMPTY], shape.get(), nullptr));
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
