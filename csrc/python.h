// What the functions for Python have in common: references, tensors as Python has them, and results. Python's limited API, so
// that one binary serves all versions.
#pragma once

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <cstdint>
#include <forward_list>
#include <iterator>
#include <memory>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "layer.h"
#include "memory.h"

namespace fastrnn {

// A reference that is given back.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;
inline Owned owned(PyObject* object) { return Owned(object); }
inline Owned kept(PyObject* object) {
  Py_INCREF(object);
  return Owned(object);
}

struct PythonError {};  // Python has its exception already
struct Declined {};     // the fast path does not take the call: the fallback in Python does

// Python's objects that the functions use. See `prepare`, `watch`, `differentiate` and `expect` in python.cpp.
struct Imported {
  PyObject *tensor_type, *parameter_type, *empty_like, *increment_version;
  PyObject* watchers;  // a tuple of functions: where one returns something true, somebody watches the call from outside
  PyObject *forward_ad, *autocast;  // what torch.autograd.forward_ad holds; the watcher of autocast, where C++ cannot ask torch
  PyObject *apply, *apply_half, *apply_cell, *recompute_is_on, *cat, *float32_pattern;
  PyObject *without_gradients, *engine_takes;  // of calls on a GPU
  // Of a layer, and of a cell: a tuple of the names that may stand among a module's attributes in the place of what its class has,
  // and how many attributes its constructor makes, none of which has such a name.
  struct Overrides {
    PyObject* names;
    Py_ssize_t made;
  } of_layer, of_cell;
};
extern Imported imported;

// clang-format off
enum Key : size_t {
  RNN, LSTM, GRU, RNN_CELL, LSTM_CELL, GRU_CELL, RNN_TANH, RNN_RELU, TANH, RELU,
  MODE, INPUT_SIZE, HIDDEN_SIZE, PROJ_SIZE, NUM_HEADS, NUM_LAYERS, BIAS, BIDIRECTIONAL, BATCH_FIRST, DROPOUT, TRAINING, NONLINEARITY,
  FLAT_WEIGHTS, FLAT_WEIGHTS_NAMES, PARAMETERS, PANELS, COMPRESSED, WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH,
  NEW_EMPTY, NEW_ZEROS, IS_NEG, REQUIRES_GRAD, CDATA, CURRENT_LEVEL, KEYS
};
// clang-format on
extern PyObject* keys[KEYS];
bool make_keys();  // false with an exception of Python's

// Find out where Python's tensors hold torch's own, from one tensor and one parameter.
void find_torch_tensor(PyObject* tensor, PyObject* parameter);

// Whether it is a tensor, and of no class of its own.
bool is_plain(PyObject* object, bool maybe_parameter = false);

// True where a plain dense tensor of the CPU is seen: its last axis has its numbers next to each other, all lie in memory, and
// none is to be read negated. unread: its memory need not be there.
bool look(PyObject* object, View& seen, bool maybe_parameter = false, bool unread = false);

// The same, however far its numbers are from each other.
bool look_strided(PyObject* object, View& seen, bool maybe_parameter = false, bool unread = false);

// on_gpu: the call's tensors are on one.
bool is_watched(bool on_gpu = false);
// Where a tensor is, and its dtype, as torch numbers them.
struct OnGpu {
  int32_t index = 0, dtype = 0;
  bool operator==(const OnGpu&) const = default;
};

// True where a plain dense tensor on this kind of device is seen: all its numbers lie in memory, none is to be read negated.
bool look_on_gpu(PyObject* object, View& seen, OnGpu& where, int32_t device_type);

bool wants_gradient(PyObject* tensor);  // false where there is none

// Takes the items; None in the place of what is not there.
Owned tuple_of(std::span<Owned> items);

// Sizes as Python has them.
Owned shape_of(const std::vector<int64_t>& sizes);

// Tensors in bfloat16 as float32, and back.
class Widened {
 public:
  View like(const View& given, Dtype dtype = Dtype::f32) {
    View made = given;
    made.dtype = dtype;
    const auto bytes = static_cast<size_t>(product({given.numel(), bytes_of(dtype)}));
    made.address = reinterpret_cast<int64_t>(buffers_.emplace_front(std::make_unique_for_overwrite<char[]>(bytes)).get());
    return made;
  }
  View of(const View& given) {
    const View made = like(given);
    widen(given, made);
    return made;
  }
  // What a layer hands to the next in bfloat16.
  void round_in_place(const View& wide) {
    const View rounded = like(wide, Dtype::bf16);
    round(wide, rounded);
    widen(rounded, wide);
    buffers_.pop_front();
  }

 private:
  std::forward_list<std::unique_ptr<char[]>> buffers_;
};

// Results, made one after the other. Where there is a tensor of the size already it serves as a pattern: torch takes half as
// long for a tensor as for numbers.
class Results {
 public:
  void like(PyObject* object, const View& seen) {
    if (count_ < std::size(patterns_)) patterns_[count_++] = {object, seen};
  }

  // Of any content.
  Owned make(const std::vector<int64_t>& sizes, Dtype dtype, View& seen);
  Owned zeros(const std::vector<int64_t>& sizes, Dtype dtype, View& seen);

 private:
  std::pair<PyObject*, View> patterns_[12];
  size_t count_ = 0;
};

constexpr double LONG = 4e6;  // operations: for so many others may run meanwhile

// work(), without Python's lock where it takes long.
template <class Work>
void run_unlocked(double operations, const Work& work) {
  if (operations < LONG) return work();
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } unlocked;
  work();
}

// The body of a function for Python: None where `body` gives nothing.
template <class Body>
PyObject* answer(const Body& body) {
  try {
    if (Owned result = body()) return result.release();
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  } catch (const Declined&) {
    Py_RETURN_NONE;
  } catch (const PythonError&) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "fastrnn: a tensor could not be made");
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// The places of batch_sizes, of the layer's text and of the first weight among the arguments of fastrnn.autograd.LayerFunction, and
// among what it keeps, which has y and saved in the place of options.
constexpr Py_ssize_t BATCH_SIZES = 1, OPTIONS = 8, FIRST_WEIGHT = 10;

// The functions for Python that take a module, and those that take a layer.
using Function = PyObject*(PyObject*, PyObject* const*, Py_ssize_t);
Function forward, forward_noisy, step, cell, pack;
Function layer_forward, layer_backward, check_memory;
Function turn, zones;
Function connect, replay, keep, forget, launch;

}  // namespace fastrnn
