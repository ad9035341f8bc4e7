// Passes of the GPU engine that are recorded, and tensors on its devices.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "python.h"

namespace fastrnn {

// The same as in python.h, of the GPU engine's kind of device.
bool look_on_gpu(PyObject* object, View& seen, OnGpu& where);
bool is_on_gpu(PyObject* object);

// Whether the engine takes a module's call, as Python says of the first one of a layer's text and these numbers: layers, the two
// leading sizes of x, units, outputs, dtype, device. w_hh: of the lowest layer.
bool is_taken(const std::string& text, const int64_t (&numbers)[7], PyObject* x, PyObject* w_hh);

// The results of a pass, or else the key of one that has no tape, or neither where it has to run in Python.
struct Found {
  std::vector<Owned> results;
  Owned key;
};

// The first tensors that a pass is given: the inputs and the weights among what autograd.LayerFunction is given, or keeps.
std::vector<PyObject*> inputs_and_weights(PyObject* tuple);

// A pass by its name and the tensors that it is given, x and batch_sizes first, Py_None for one that is absent.
Found replay(std::string name, const std::vector<PyObject*>& tensors);

}  // namespace fastrnn
