// The Python module `_runtime`: which tiers there are, and the short way of a call without gradients. One function takes a
// module's attributes and its input, checks all there is to check, and walks the layers; the dispatcher, which takes longer
// than a small step does, is not asked. None means: not taken. Whoever called goes the long way then, which has torch's words for
// what is wrong. Python's limited API, and torch's tensors by DLPack's exchange table, so that one binary serves all versions.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <forward_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

// Plain C, of DLPack and not of torch: but torch's copy stops whoever asks for its stable ABI.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include "layer.h"
#include "memory.h"
#include "ops.h"

namespace fastrnn {
namespace {

// A reference that is given back.
struct Release {
  void operator()(PyObject* object) const { Py_DECREF(object); }
};
using Owned = std::unique_ptr<PyObject, Release>;
Owned owned(PyObject* object) { return Owned(object); }
Owned kept(PyObject* object) {
  Py_INCREF(object);
  return Owned(object);
}

struct PythonError {};  // Python has its exception already
struct NotTaken {};     // the call goes the long way

// What `prepare` is given.
const DLPackExchangeAPI* exchange = nullptr;
PyObject* tensor_type;
PyObject* parameter_type;
PyObject* empty_like;
PyObject* increment_version;
PyObject* watched;  // a tuple of functions: where one says so, somebody looks at the call from outside. See `watch`
// What `differentiate` is given.
PyObject *apply, *apply_half, *apply_step, *recompute_is_on, *cat, *float32_pattern;

// clang-format off
enum Key : size_t {
  MODE, NUM_LAYERS, BIDIRECTIONAL, BATCH_FIRST, DROPOUT, TRAINING, FLAT_WEIGHTS, FLAT_WEIGHTS_NAMES, PARAMETERS, PANELS,
  WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH, RECOMPUTE, NEW_EMPTY, IS_NEG, REQUIRES_GRAD, CHUNK, KEYS
};
const char* const KEY_NAMES[KEYS] = {
  "mode", "num_layers", "bidirectional", "batch_first", "dropout", "training", "_flat_weights", "_flat_weights_names",
  "_parameters", "_fastrnn_panels", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "recompute", "new_empty",
  "is_neg", "requires_grad", "chunk"
};
// clang-format on
PyObject* keys[KEYS];

// An attribute in the instance's dictionary, borrowed; null where it is not there, or is not the module's own any more.
PyObject* find(PyObject* attributes, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(attributes, key);
  if (!found && PyErr_Occurred()) throw PythonError();
  return found == Py_None ? nullptr : found;
}
PyObject* find(PyObject* attributes, Key key) { return find(attributes, keys[key]); }

// One that a module has, unless somebody made something else of it, such as a property.
bool is_true(PyObject* attributes, Key key) {
  PyObject* found = find(attributes, key);
  if (!found) throw NotTaken();
  const int truth = PyObject_IsTrue(found);
  if (truth < 0) throw PythonError();
  return truth;
}

// True where a plain dense tensor of the CPU is seen, whose last axis has its numbers next to each other.
bool look(PyObject* object, View& seen, bool maybe_parameter = false) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != tensor_type && !(maybe_parameter && type == parameter_type)) return false;
  DLTensor t;
  if (exchange->dltensor_from_py_object_no_sync(object, &t) != 0) {  // such as a sparse one
    PyErr_Clear();
    return false;
  }
  if (t.device.device_type != kDLCPU || t.dtype.lanes != 1 || t.ndim < 1 || t.strides[t.ndim - 1] != 1) return false;
  seen.address = reinterpret_cast<int64_t>(t.data) + static_cast<int64_t>(t.byte_offset);
  seen.dims = t.ndim;
  seen.sizes = t.shape;
  seen.strides = t.strides;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) seen.kind = Kind::f32;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 64) seen.kind = Kind::f64;
  if (t.dtype.code == kDLBfloat) seen.kind = Kind::bf16;
  if (t.dtype.code == kDLUInt && t.dtype.bits == 8) seen.kind = Kind::byte;
  if (t.dtype.code == kDLInt && t.dtype.bits == 64) seen.kind = Kind::i64;
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
  if (!watched) return true;
  for (Py_ssize_t i = 0; i < PyTuple_Size(watched); ++i) {
    const Owned answer = owned(PyObject_CallNoArgs(PyTuple_GetItem(watched, i)));
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

// None in the place of what is not there.
Owned tuple_of(std::vector<Owned> items) {
  Owned tuple = owned(PyTuple_New(static_cast<Py_ssize_t>(items.size())));
  if (!tuple || PyErr_Occurred()) throw PythonError();
  Py_ssize_t at = 0;
  for (Owned& item : items) PyTuple_SetItem(tuple.get(), at++, (item ? std::move(item) : kept(Py_None)).release());
  return tuple;
}

// How a layer's frozen weights begin; a line for each of these, then the panels. See fastrnn.freeze.
struct alignas(64) PackHeader {
  int64_t tier, cell, layers, directions, input_size, hidden_size, output_size, bias, projected, kind, bytes;
};

// Tensors in bfloat16 as float32, and back.
class Widened {
 public:
  View like(const View& given, Kind kind = Kind::f32) {
    View made = given;
    made.kind = kind;
    const auto bytes = static_cast<size_t>(product({given.numel(), bytes_of(kind)}));
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
    const View rounded = like(wide, Kind::bf16);
    round(wide, rounded);
    widen(rounded, wide);
    buffers_.pop_front();
  }

 private:
  std::forward_list<std::unique_ptr<char[]>> buffers_;
};

// The states a caller gave, or wants filled.
struct States {
  View h, c;
  const View* h_or_none = nullptr;
  const View* c_or_none = nullptr;
  Owned objects[2];  // looking at them, others may run and drop theirs

  // False where they are not what the cell has.
  bool read(PyObject* given, bool pair) {
    if (given == Py_None) return true;
    if (!pair) {
      objects[0] = kept(given);
    } else if (PyTuple_CheckExact(given) && PyTuple_Size(given) == 2) {
      for (int i = 0; i < 2; ++i) objects[i] = kept(PyTuple_GetItem(given, i));
    } else if (PyList_CheckExact(given) && PyList_Size(given) == 2) {
      for (int i = 0; i < 2; ++i) objects[i] = kept(PyList_GetItem(given, i));
    } else {
      return false;
    }
    if (!look(objects[0].get(), h) || (pair && !look(objects[1].get(), c))) return false;
    h_or_none = &h;
    if (pair) c_or_none = &c;
    return true;
  }
};

// Layers on top of each other, as a module holds them, without gradients and dropout.
class Stack {
 public:
  // Of a module (RNN, LSTM, GRU), or a cell; false where its weights are not its parameters any more, or not of one kind.
  bool read(PyObject* attributes, const char* mode, bool frozen_too = true) {
    if (mode) return read_cell(attributes, mode, frozen_too);
    PyObject* own_mode = find(attributes, MODE);
    PyObject* number = find(attributes, NUM_LAYERS);
    if (!own_mode || !number || !set_cell(own_mode)) return false;
    layers = PyLong_AsLong(number);
    if (layers == -1 && PyErr_Occurred()) throw PythonError();
    if (layers < 1) return false;
    directions = 1 + is_true(attributes, BIDIRECTIONAL);
    batch_first = is_true(attributes, BATCH_FIRST);
    if (PyObject* pack = frozen_too ? find(attributes, PANELS) : nullptr) return read_pack(pack);
    PyObject *flat = find(attributes, FLAT_WEIGHTS), *names = find(attributes, FLAT_WEIGHTS_NAMES);
    PyObject* parameters = find(attributes, PARAMETERS);
    if (!flat || !names || !parameters || !PyList_Check(flat) || !PyList_Check(names)) return false;
    const Py_ssize_t count = PyList_Size(flat);
    if (PyList_Size(names) != count || count == 0 || count % (layers * directions)) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* weight = PyList_GetItem(flat, i);
      if (weight != find(parameters, PyList_GetItem(names, i))) return false;
      objects.push_back(kept(weight));
    }
    return look_at_weights();
  }

  // Whether it takes input and states of these shapes; they are of one kind, and states are contiguous.
  bool takes(const View& x, Layout of, const View* h0, const View* c0, int64_t state_dims) {
    if (half && !bias) all_half = x.kind == Kind::bf16;
    if (x.kind != given_kind() || x.dims != (of == Layout::batch ? 2 : 3) || x.size(-1) != input_size) return false;
    if (x.numel() == 0 || (all_half && !x.is_contiguous())) return false;
    layout = of;
    batch = x.size(layout == Layout::time_batch ? 1 : 0);
    return is_state(h0, output_size, state_dims) && is_state(c0, hidden_size, state_dims);
  }
  bool is_state(const View* state, int64_t width, int64_t dims) const {
    if (!state) return true;
    const bool shaped = state->dims == dims && state->size(-1) == width && state->size(-2) == batch;
    return shaped && state->kind == given_kind() && state->is_contiguous() &&
           (dims == 2 || state->size(0) == layers * directions);
  }

  // Writes y, h_n and c_n (where the cell has it), which may be h0 and c0 where there is one step. Absent states are zero.
  void run(const View& x, const View* h0, const View* c0, const View& y, const View& h_n, const View* c_n) const {
    if (!all_half) return run_wide(x, h0, c0, y, h_n, c_n);
    View states[2];
    if (h0) states[0] = wide.of(*h0);
    if (c0) states[1] = wide.of(*c0);
    const View wide_y = wide.like(y), wide_h = wide.like(h_n), wide_c = c_n ? wide.like(*c_n) : View();
    run_wide(wide.of(x), h0 ? &states[0] : nullptr, c0 ? &states[1] : nullptr, wide_y, wide_h, c_n ? &wide_c : nullptr);
    round(wide_y, y);
    round(wide_h, h_n);
    if (c_n) round(wide_c, *c_n);
  }
  void run_wide(const View& x, const View* h0, const View* c0, const View& y, const View& h_n, const View* c_n) const {
    View input = x;
    torch::stable::Tensor between;
    std::vector<int64_t> sizes(x.sizes, x.sizes + x.dims);
    std::unique_ptr<char[]> many_zeros;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const LayerSizes own{*cell, kind, directions, input.size(-1), hidden_size, output_size, bias, projected, half};
      Call call(own, input, layout, false);
      if (!packs.empty()) call.packs(packs[layer]);
      if (packs.empty()) give_weights(call, layer);
      const auto initial = [&](const View* given, int64_t Record::*field, int64_t width) {
        if (given) return call.states(*given, field, batch * width, layer, layers);
        for (Record& record : call.records) record.*field = zeros(many_zeros);
      };
      initial(h0, &Record::h0, output_size);
      call.states(h_n, &Record::h_n, batch * output_size, layer, layers);
      if (cell->has_cell_state) {
        initial(c0, &Record::c0, hidden_size);
        call.states(*c_n, &Record::c_n, batch * hidden_size, layer, layers);
      }
      View output = y;
      torch::stable::Tensor made;
      if (layer < layers - 1) {
        sizes.back() = directions * output_size;
        made = empty_tensor(sizes, kind == Kind::f32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64());
        output = {reinterpret_cast<int64_t>(made.data_ptr()), x.dims, made.sizes().data(), made.strides().data(), kind};
      }
      call.rows(output, &Record::y, &Record::y_step, &Record::y_row, output_size);
      call.run(true);
      if (all_half && layer < layers - 1) wide.round_in_place(output);  // as every layer's result is
      between = std::move(made);                                            // the input of this layer goes
      input = output;
    }
  }

  Kind given_kind() const { return all_half ? Kind::bf16 : kind; }
  Layout sequence_layout() const { return batch_first ? Layout::batch_time : Layout::time_batch; }

  // The weights of all layers, packed, in a tensor of `allocate`(bytes).
  Owned pack(PyObject* allocate) const {
    const auto pack_layer = [&](int64_t layer, const Packs& places) {
      const int64_t width = layer ? directions * output_size : input_size, sizes[] = {1, width}, strides[] = {width, 1};
      Call call({*cell, kind, directions, width, hidden_size, output_size, bias, projected, half},
                {0, 2, sizes, strides, kind}, Layout::batch, false);
      call.packs(places);
      give_weights(call, layer);
      return call.pack();
    };
    std::vector<int64_t> bytes;
    int64_t total = sizeof(PackHeader) * layers;
    for (int64_t layer = 0; layer < layers; ++layer) total += directions * bytes.emplace_back(pack_layer(layer, {}));
    Owned tensor = owned(PyObject_CallFunction(allocate, "L", static_cast<long long>(total)));
    DLTensor t;
    if (!tensor || exchange->dltensor_from_py_object_no_sync(tensor.get(), &t) != 0) throw PythonError();
    auto* headers = static_cast<PackHeader*>(t.data);
    int64_t at = reinterpret_cast<int64_t>(headers + layers);
    for (int64_t layer = 0; layer < layers; ++layer) {
      headers[layer] = {tier - TIERS, cell - CELLS, layers, directions, layer ? directions * output_size : input_size,
                        hidden_size, output_size, bias, projected, static_cast<int64_t>(kind), bytes[layer]};
      pack_layer(layer, {at, at + bytes[layer]});
      at += directions * bytes[layer];
    }
    return tensor;
  }

  // The weights of one layer: each direction's w_ih, each one's w_hh, and so on.
  std::vector<PyObject*> by_kind(int64_t layer) const {
    std::vector<PyObject*> sorted;
    const size_t count = objects.size() / layers, kinds = count / directions, first = layer * count;
    for (size_t i = 0; i < count; ++i) sorted.push_back(objects[first + i % directions * kinds + i / directions].get());
    return sorted;
  }

  bool wants_gradient() const {
    return std::any_of(objects.begin(), objects.end(), [](const Owned& weight) { return fastrnn::wants_gradient(weight.get()); });
  }

  double operations(const View& x) const {
    const auto rows = static_cast<double>(x.numel() / x.size(-1));
    const auto units = static_cast<double>(layers * directions * cell->gates * hidden_size);
    return 2 * rows * units * static_cast<double>(input_size + output_size);
  }

  const Cell* cell = nullptr;
  Kind kind = Kind::other;
  Layout layout = Layout::batch;
  int64_t layers = 1, directions = 1, batch = 0, input_size = 0, hidden_size = 0, output_size = 0;
  bool batch_first = false, frozen = false;
  bool half = false, all_half = false;  // matrices in bfloat16; all else, too

 private:
  bool set_cell(PyObject* mode) {
    if (!PyUnicode_Check(mode)) return false;
    for (const Cell& c : CELLS)
      if (PyUnicode_CompareWithASCIIString(mode, c.mode) == 0) cell = &c;
    return cell;
  }

  bool read_cell(PyObject* attributes, const char* mode, bool frozen_too) {
    for (const Cell& c : CELLS)
      if (std::strcmp(mode, c.mode) == 0) cell = &c;
    if (PyObject* pack = frozen_too ? find(attributes, PANELS) : nullptr) return read_pack(pack);
    PyObject* parameters = find(attributes, PARAMETERS);
    if (!cell || !parameters) return false;
    for (const Key key : {WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH}) {
      PyObject* weight = find(parameters, key);
      if (!weight && (key == BIAS_IH || key == BIAS_HH) && PyDict_Contains(parameters, keys[key]) == 1) continue;
      if (!weight) return false;
      objects.push_back(kept(weight));
    }
    return look_at_weights();
  }

  bool look_at_weights() {
    weights.resize(objects.size());
    for (size_t i = 0; i < objects.size(); ++i)
      if (!look(objects[i].get(), weights[i], true) || !weights[i].is_contiguous()) return false;
    return understand();
  }

  // The sizes, by the weights' own; false where they do not fit each other.
  bool understand() {
    const auto count = static_cast<int64_t>(weights.size()), kinds = count / (layers * directions);
    if (kinds < 2 || kinds > 5) return false;
    bias = kinds > 3;
    projected = kinds % 2;
    if (weights[0].dims != 2 || weights[1].dims != 2 || (projected && !cell->has_cell_state)) return false;
    const int64_t gate_rows = weights[1].size(0);
    input_size = weights[0].size(1);
    output_size = weights[1].size(1);
    hidden_size = gate_rows / cell->gates;
    if (hidden_size * cell->gates != gate_rows || (!projected && output_size != hidden_size)) return false;
    half = weights[0].kind == Kind::bf16;
    all_half = half && (!bias || weights[2].kind == Kind::bf16);
    kind = half ? Kind::f32 : weights[0].kind;
    if (kind == Kind::other || (half && output_size % 2)) return false;
    const auto is = [&](const View& w, int64_t height, int64_t width = 0) {
      if (w.kind != (width && half ? Kind::bf16 : given_kind())) return false;
      return w.dims == 1 + (width > 0) && w.size(0) == height && (!width || w.size(1) == width);
    };
    for (int64_t i = 0; i < count; i += kinds) {
      if (!is(weights[i], gate_rows, i < directions * kinds ? input_size : directions * output_size)) return false;
      if (!is(weights[i + 1], gate_rows, output_size)) return false;
      if (bias && !(is(weights[i + 2], gate_rows) && is(weights[i + 3], gate_rows))) return false;
      if (projected && !is(weights[i + kinds - 1], output_size, hidden_size)) return false;
    }
    return true;
  }

  bool read_pack(PyObject* pack) {
    frozen = true;
    objects.push_back(kept(pack));
    View t;
    if (!look(pack, t) || t.kind != Kind::byte || t.dims != 1) return false;
    if (t.size(0) / static_cast<int64_t>(sizeof(PackHeader)) < layers) return false;
    const auto* headers = reinterpret_cast<const PackHeader*>(t.address);
    const PackHeader& first = headers[0];
    if (first.tier != tier - TIERS || first.cell != cell - CELLS || first.layers != layers || first.directions != directions)
      return false;
    kind = static_cast<Kind>(first.kind);
    input_size = first.input_size;
    hidden_size = first.hidden_size;
    output_size = first.output_size;
    bias = first.bias;
    projected = first.projected;
    int64_t at = reinterpret_cast<int64_t>(headers + layers);
    for (int64_t layer = 0; layer < layers; ++layer) {
      packs.push_back({at, at + headers[layer].bytes});
      at += directions * headers[layer].bytes;
    }
    return at == t.address + t.size(0);
  }

  void give_weights(Call& call, int64_t layer) const {
    const int64_t kinds = static_cast<int64_t>(weights.size()) / (layers * directions), gate_rows = cell->gates * hidden_size;
    for (int64_t d = 0; d < directions; ++d) {
      const View* own = &weights[(layer * directions + d) * kinds];
      call.weight(d, own[0], &Record::w_ih, gate_rows, call.records[0].input_size);
      call.weight(d, own[1], &Record::w_hh, gate_rows, output_size);
      if (bias) {
        call.weight(d, widened(own[2]), &Record::b_ih, gate_rows);
        call.weight(d, widened(own[3]), &Record::b_hh, gate_rows);
      }
      if (projected) call.weight(d, own[kinds - 1], &Record::w_hr, output_size, hidden_size);
    }
  }

  // A state of zeros, hidden or cell, which nobody writes.
  int64_t zeros(std::unique_ptr<char[]>& many) const {
    static const char few[64 << 10] = {};
    const int64_t bytes = product({batch, std::max(hidden_size, output_size), bytes_of(kind)});
    if (bytes <= static_cast<int64_t>(sizeof few)) return reinterpret_cast<int64_t>(few);
    if (!many) many = std::make_unique<char[]>(static_cast<size_t>(bytes));
    return reinterpret_cast<int64_t>(many.get());
  }

  View widened(const View& given) const { return all_half ? wide.of(given) : given; }

  bool bias = false, projected = false;
  mutable Widened wide;
  std::vector<View> weights;  // of each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr, those that are there
  std::vector<Packs> packs;   // of each layer, in the place of weights
  std::vector<Owned> objects;  // the weights, or the panels: looking at them, others may run and drop theirs
};

// Results, made one after the other. Where there is a tensor of the size already it serves as a pattern: torch takes half as
// long for a tensor as for numbers.
class Results {
 public:
  void like(PyObject* object, const View& seen) {
    if (count_ < std::size(patterns_)) patterns_[count_++] = {object, seen};
  }
  void like(PyObject* x, const View& seen, const States& states) {
    like(x, seen);
    if (states.h_or_none) like(states.objects[0].get(), states.h);
    if (states.c_or_none) like(states.objects[1].get(), states.c);
  }

  Owned make(const std::vector<int64_t>& sizes, Kind kind, View& seen) {
    Owned made;
    PyObject* of_kind = nullptr;
    for (size_t i = count_; i-- > 0 && !made;) {
      const auto& [object, pattern] = patterns_[i];
      if (pattern.kind != kind) continue;
      of_kind = object;
      if (pattern.is_contiguous() && std::equal(sizes.begin(), sizes.end(), pattern.sizes, pattern.sizes + pattern.dims))
        made = owned(PyObject_CallFunctionObjArgs(empty_like, object, nullptr));
    }
    if (!made && of_kind) {
      const Owned shape = owned(PyTuple_New(static_cast<Py_ssize_t>(sizes.size())));
      if (!shape) throw PythonError();
      Py_ssize_t axis = 0;
      for (const int64_t size : sizes) {
        PyObject* number = PyLong_FromLongLong(size);
        if (!number) throw PythonError();
        PyTuple_SetItem(shape.get(), axis++, number);
      }
      made = owned(PyObject_CallMethodObjArgs(of_kind, keys[NEW_EMPTY], shape.get(), nullptr));
    }
    if (!made || !look(made.get(), seen)) throw PythonError();
    like(made.get(), seen);
    return made;
  }

 private:
  std::pair<PyObject*, View> patterns_[12];
  size_t count_ = 0;
};

constexpr double LONG = 4e6;  // operations: for so many others may run meanwhile

template <class Work>
void run(double operations, const Work& work) {
  if (operations < LONG) return work();
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } unlocked;
  work();
}

void run(const Stack& stack, const View& x, const States& before, const View& y, const View& h_n, const View* c_n) {
  run(stack.operations(x), [&] { stack.run(x, before.h_or_none, before.c_or_none, y, h_n, c_n); });
}

// The body of a function for Python: None where `body` gives nothing.
template <class Body>
PyObject* answer(const Body& body) {
  try {
    if (Owned result = body()) return result.release();
    if (PyErr_Occurred()) return nullptr;
    Py_RETURN_NONE;
  } catch (const NotTaken&) {
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

// Has torch to differentiate this call? A frozen module has no gradients but its input's.
bool differentiates(const Stack& stack, PyObject* x, const States& before) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  return wants_gradient(x) || wants_gradient(before.objects[0].get()) || wants_gradient(before.objects[1].get()) ||
         (!stack.frozen && stack.wants_gradient());
}

bool overlap(const View& a, const View& b) {
  const auto end = [](const View& t) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dims; ++axis) last += (t.sizes[axis] - 1) * t.strides[axis];
    return t.address + (last + 1) * bytes_of(t.kind);
  };
  return a.dims && b.dims && a.address < end(b) && b.address < end(a);
}

// Would a step write what it, or a later layer, still has to read? A state may be written where it was read.
bool mixes(const View& x, const States& before, const View& y, const States& after) {
  const auto other = [](const View& now, const View& then) { return overlap(now, then) && now.address != then.address; };
  return overlap(y, x) || overlap(y, before.h) || overlap(y, before.c) || overlap(y, after.h) || overlap(y, after.c) ||
         overlap(after.h, x) || overlap(after.c, x) || overlap(after.h, after.c) || overlap(after.h, before.c) ||
         overlap(after.c, before.h) || other(after.h, before.h) || other(after.c, before.c);
}

bool drops(PyObject* attributes) { return is_true(attributes, TRAINING) && is_true(attributes, DROPOUT); }

// (y, h), or (y, (h, c)).
Owned with_state(const Owned& y, const Owned& h, const Owned& c) {
  if (!c) return owned(PyTuple_Pack(2, y.get(), h.get()));
  const Owned state = owned(PyTuple_Pack(2, h.get(), c.get()));
  return state ? owned(PyTuple_Pack(2, y.get(), state.get())) : nullptr;
}

bool recomputes(PyObject* attributes) {
  const Owned mode = owned(PyObject_CallNoArgs(recompute_is_on));
  if (!mode) throw PythonError();
  return mode.get() == Py_True || find(attributes, RECOMPUTE);
}

// One layer of a call that is differentiated, by an autograd.Function. states: h, and c or nothing.
Owned differentiated(PyObject* function, const Stack& stack, int64_t layer, PyObject* x, std::array<Owned, 2> states) {
  std::vector<Owned> arguments;  // of fastrnn.ops.Layer
  arguments.push_back(kept(x));
  arguments.push_back(nullptr);
  arguments.push_back(std::move(states[0]));
  arguments.push_back(std::move(states[1]));
  arguments.push_back(owned(PyUnicode_InternFromString(stack.cell->name)));
  arguments.push_back(kept(Py_False));
  arguments.push_back(kept(stack.batch_first ? Py_True : Py_False));
  arguments.push_back(owned(PyLong_FromLong(0)));
  arguments.push_back(owned(PyLong_FromLongLong(stack.directions)));
  for (PyObject* weight : stack.by_kind(layer)) arguments.push_back(kept(weight));
  Owned results = owned(PyObject_CallObject(function, tuple_of(std::move(arguments)).get()));
  if (!results) throw PythonError();
  return results;
}

// Initial states of zeros, of these sizes but for the last: one tensor where both have the same.
std::array<Owned, 2> zero_states(const Stack& stack, PyObject* x_object, const View& x, std::vector<int64_t> sizes) {
  std::array<Owned, 2> states;
  Results zeros;
  zeros.like(x_object, x);
  const auto make = [&](int64_t width) {
    View seen;
    sizes.push_back(width);
    Owned made = zeros.make(sizes, x.kind, seen);
    sizes.pop_back();
    std::memset(reinterpret_cast<void*>(seen.address), 0, static_cast<size_t>(seen.numel() * bytes_of(seen.kind)));
    return made;
  };
  states[0] = make(stack.output_size);
  if (stack.cell->has_cell_state)
    states[1] = stack.hidden_size == stack.output_size ? kept(states[0].get()) : make(stack.hidden_size);
  return states;
}

// All layers of a call that is differentiated.
Owned differentiated(const Stack& stack, PyObject* x_object, const View& x, const States& before) {
  const bool pair = stack.cell->has_cell_state, alone = stack.layers == 1;
  const int64_t D = stack.directions;
  Owned y = kept(x_object);
  std::vector<Owned> last[2];
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    std::array<Owned, 2> states;
    if (!before.h_or_none) states = zero_states(stack, x_object, x, {D, stack.batch});
    for (size_t i = 0; before.h_or_none && i < 1U + pair; ++i) {
      PyObject* all = before.objects[i].get();
      states[i] = alone ? kept(all) : owned(PyObject_CallMethod(all, "narrow", "iLL", 0, layer * D, D));
    }
    const Owned results = differentiated(stack.half ? apply_half : apply, stack, layer, y.get(), std::move(states));
    y = kept(PyTuple_GetItem(results.get(), 0));
    for (int i = 0; i < 1 + pair; ++i) last[i].push_back(kept(PyTuple_GetItem(results.get(), i + 1)));
  }
  const auto state = [&](std::vector<Owned>& of_layers) {
    if (of_layers.size() < 2) return of_layers.empty() ? Owned() : std::move(of_layers[0]);
    Owned joined = owned(PyObject_CallFunctionObjArgs(cat, tuple_of(std::move(of_layers)).get(), nullptr));
    if (!joined) throw PythonError();
    return joined;
  };
  const Owned h = state(last[0]), c = state(last[1]);
  return with_state(y, h, c);
}

// forward(module.__dict__, x, hx) -> (y, state) of batched dense input, or None.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[1];
    Stack stack;
    View x;
    States before;
    if (!look(x_object, x) || x.dims != 3 || !stack.read(attributes, nullptr)) return nullptr;
    if (stack.layers > 1 && drops(attributes)) return nullptr;
    const bool pair = stack.cell->has_cell_state;
    if (!before.read(args[2], pair) || somebody_watches()) return nullptr;
    if (!stack.takes(x, stack.sequence_layout(), before.h_or_none, before.c_or_none, 3)) return nullptr;
    if (differentiates(stack, x_object, before))
      return stack.frozen || recomputes(attributes) ? nullptr : differentiated(stack, x_object, x, before);
    const int64_t D = stack.directions, B = stack.batch, R = stack.output_size;
    View y, h_n, c_n;
    Results results;
    results.like(x_object, x, before);
    Owned h_object = results.make({stack.layers * D, B, R}, x.kind, h_n), y_object = results.make({x.size(0), x.size(1), D * R}, x.kind, y);
    Owned c_object = pair ? results.make({stack.layers * D, B, stack.hidden_size}, x.kind, c_n) : nullptr;
    run(stack, x, before, y, h_n, pair ? &c_n : nullptr);
    return with_state(y_object, h_object, c_object);
  });
}

// step(module.__dict__, x, state, out) -> (y, state), which are out's if it is given, or None. Without gradients, whoever asks.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[1], *out = args[3];
    Stack stack;
    View x, y, h_n, c_n;
    States before, after;
    if (!look(x_object, x) || !stack.read(attributes, nullptr) || stack.directions != 1 || drops(attributes)) return nullptr;
    const bool pair = stack.cell->has_cell_state;
    if (!before.read(args[2], pair) || somebody_watches()) return nullptr;
    if (!stack.takes(x, Layout::batch, before.h_or_none, before.c_or_none, 3)) return nullptr;
    const int64_t B = stack.batch, R = stack.output_size;
    if (out != Py_None) {
      if (!PyTuple_CheckExact(out) || PyTuple_Size(out) != 2 || !after.read(PyTuple_GetItem(out, 1), pair)) return nullptr;
      if (!after.h_or_none || !look(PyTuple_GetItem(out, 0), y) || mixes(x, before, y, after)) return nullptr;
      if (!stack.takes(x, Layout::batch, after.h_or_none, after.c_or_none, 3) || !stack.is_state(&y, R, 2)) return nullptr;
      PyObject *y_object = PyTuple_GetItem(out, 0), *h_object = after.objects[0].get(), *c_object = after.objects[1].get();
      const bool watched_by_autograd = wants_gradient(y_object) || wants_gradient(h_object) || wants_gradient(c_object);
      if (aoti_torch_grad_mode_is_enabled() && watched_by_autograd) return nullptr;
      const Owned written = owned(pair ? PyTuple_Pack(3, y_object, h_object, c_object) : PyTuple_Pack(2, y_object, h_object));
      if (!written) throw PythonError();
      run(stack, x, before, y, after.h, after.c_or_none);
      // So that autograd notices if one of them was kept for a backward pass.
      if (!owned(PyObject_CallFunctionObjArgs(increment_version, written.get(), nullptr))) throw PythonError();
      return kept(out);
    }
    Results results;
    results.like(x_object, x, before);
    Owned h_object = results.make({stack.layers, B, R}, x.kind, h_n), y_object = results.make({B, R}, x.kind, y);
    Owned c_object = pair ? results.make({stack.layers, B, stack.hidden_size}, x.kind, c_n) : nullptr;
    run(stack, x, before, y, h_n, pair ? &c_n : nullptr);
    return with_state(y_object, h_object, c_object);
  });
}

// cell(module.__dict__, x, hx, mode) -> h, or (h, c), of a batch, or None. mode: as RNN, LSTM and GRU have it.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[1];
    const char* mode = PyUnicode_AsUTF8AndSize(args[3], nullptr);
    if (!mode) throw PythonError();
    Stack stack;
    View x, h, c;
    States before;
    if (!look(x_object, x) || !stack.read(attributes, mode)) return nullptr;
    const bool pair = stack.cell->has_cell_state;
    if (!before.read(args[2], pair) || somebody_watches()) return nullptr;
    if (!stack.takes(x, Layout::batch, before.h_or_none, before.c_or_none, 2)) return nullptr;
    if (differentiates(stack, x_object, before)) {
      if (stack.frozen || stack.half) return nullptr;
      std::array<Owned, 2> states;
      if (!before.h_or_none) states = zero_states(stack, x_object, x, {stack.batch});
      for (size_t i = 0; before.h_or_none && i < 1U + pair; ++i) states[i] = kept(before.objects[i].get());
      Owned results = differentiated(apply_step, stack, 0, x_object, std::move(states));
      return pair ? std::move(results) : kept(PyTuple_GetItem(results.get(), 0));
    }
    Results results;
    results.like(x_object, x, before);
    Owned h_object = results.make({stack.batch, stack.output_size}, x.kind, h);
    Owned c_object = pair ? results.make({stack.batch, stack.hidden_size}, x.kind, c) : nullptr;
    run(stack, x, before, h, h, pair ? &c : nullptr);  // the output is the state
    return pair ? owned(PyTuple_Pack(2, h_object.get(), c_object.get())) : std::move(h_object);
  });
}

// What layer_forward and layer_backward have in common. Numbers in bfloat16 but for matrices are widened first, where there are
// few; the ops are told in float32.
class LayerArguments {
 public:
  // Two runs of a tuple: x, batch_sizes, h0, c0, and each kind of weights, of all directions. False where that is not what a
  // kernel reads.
  bool tensors(PyObject* tuple, Py_ssize_t weights_at) {
    const Py_ssize_t count = PyTuple_Size(tuple) - weights_at, kinds = count / directions;
    Views* const by_kind[] = {&layer.w_ih, &layer.w_hh, kinds > 3 ? &layer.b_ih : &layer.w_hr, &layer.b_hh, &layer.w_hr};
    if (kinds < 2 || kinds > 5 || count != kinds * directions) return false;
    results.like(float32_pattern, FLOAT32);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* object = PyTuple_GetItem(tuple, weights_at + i);
      View& seen = by_kind[i / directions]->emplace_back();
      const bool matrix = kinds < 4 || i / directions < 2 || i / directions > 3;
      if (matrix ? !whole(object, seen) : !numbers(object, seen, bias)) return false;
    }
    return numbers(PyTuple_GetItem(tuple, 0), layer.x, x, false) && maybe(PyTuple_GetItem(tuple, 1), layer.batch_sizes) &&
           numbers(PyTuple_GetItem(tuple, 2), layer.h0, h) && maybe_numbers(PyTuple_GetItem(tuple, 3), layer.c0, c);
  }
  // Five of a tuple: cell, reverse, batch_first, segments, directions. False in recompute mode.
  bool options(PyObject* tuple, Py_ssize_t at) {
    PyObject* name = PyTuple_GetItem(tuple, at);
    for (const Cell& each : CELLS)
      if (PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, each.name) == 0) layer.cell = &each;
    layer.reverse = PyTuple_GetItem(tuple, at + 1) == Py_True;
    layer.batch_first = PyTuple_GetItem(tuple, at + 2) == Py_True;
    const auto segments = PyLong_AsLong(PyTuple_GetItem(tuple, at + 3));
    directions = PyLong_AsSsize_t(PyTuple_GetItem(tuple, at + 4));
    if (PyErr_Occurred()) throw PythonError();
    return layer.cell && !segments && directions > 0;
  }
  bool whole(PyObject* object, View& seen) {
    if (!look(object, seen, true)) return false;
    results.like(object, seen);
    return seen.is_contiguous();
  }
  bool maybe(PyObject* object, View& seen) { return object == Py_None || whole(object, seen); }
  // kind: what it was before it was widened.
  bool numbers(PyObject* object, View& seen, Kind& kind, bool contiguous = true) {
    if (!look(object, seen, true)) return false;
    results.like(object, seen);
    kind = seen.kind;
    if (kind != Kind::bf16) return (kind == Kind::f32 || kind == Kind::f64) && (!contiguous || seen.is_contiguous());
    if (!seen.is_contiguous() || seen.numel() > FEW) return false;
    seen = wide.of(seen);
    return true;
  }
  bool maybe_numbers(PyObject* object, View& seen, Kind& kind) { return object == Py_None || numbers(object, seen, kind); }

  Layer layer{};
  Py_ssize_t directions = 0;
  Kind x{}, h{}, c{}, bias{};
  Widened wide;
  Results results;

 private:
  static constexpr int64_t FEW = 1 << 16;  // of more torch's threads convert a part each
  static constexpr int64_t NONE[] = {0}, ONE[] = {1};
  static constexpr View FLOAT32{0, 1, NONE, ONE, Kind::f32};
};

// Results of an op, made as the call asks for them, some to be rounded to bfloat16 in the end.
template <size_t Count>
class MadeResults {
 public:
  // kinds: of each result, where it is float32 for the op. wide: the result that is to be had unrounded too.
  MadeResults(LayerArguments& given, const std::array<Kind, Count>& kinds, size_t wide = Count)
      : given_(given), kinds_(kinds), wide_result_(wide) {}

  Make make() {
    return [this](size_t result, const std::vector<int64_t>& sizes, Kind kind) {
      const bool half = kind == Kind::f32 && kinds_[result] == Kind::bf16;
      View seen;
      made[result] = given_.results.make(sizes, half ? Kind::bf16 : kind, seen);
      if (seen.numel() * bytes_of(kind) >= MAPPED_BYTES) throw NotTaken();  // the op has better memory for them
      if (!half) return seen;
      View wide;
      if (result == wide_result_)
        unrounded = given_.results.make(sizes, kind, wide);
      else
        wide = given_.wide.like(seen);
      to_round_.emplace_back(wide, seen);
      return wide;
    };
  }
  void run(Call call, bool forward) {
    fastrnn::run(static_cast<double>(call.operations(forward)), [&] {
      call.run(forward);
      for (const auto& [wide, half] : to_round_) round(wide, half);
    });
  }

  std::array<Owned, Count> made;
  Owned unrounded;

 private:
  LayerArguments& given_;
  std::array<Kind, Count> kinds_;
  size_t wide_result_;
  std::vector<std::pair<View, View>> to_round_;
};

// layer_forward(arguments of fastrnn.ops.Layer) -> its results, None for those that are not there, and y before it was rounded,
// or None. Of a call that nobody watches, or None.
PyObject* layer_forward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    LayerArguments given;
    if (!PyTuple_Check(args[0]) || PyTuple_Size(args[0]) < 9 || somebody_watches()) return nullptr;
    if (!given.options(args[0], 4) || !given.tensors(args[0], 9)) return nullptr;
    MadeResults<FORWARD_RESULTS> results(given, {given.x, given.x, given.x, Kind::f32}, Y);
    results.run(forward_call(given.layer, true, results.make()), true);
    std::vector<Owned> found(std::make_move_iterator(results.made.begin()), std::make_move_iterator(results.made.end()));
    found.push_back(std::move(results.unrounded));
    return tuple_of(std::move(found));
  });
}

// layer_backward((dy, dh_n, dc_n), what `Layer` has saved, its options, its needs_input_grad) -> the gradients of its inputs, of
// a call that nobody watches or differentiates, or None.
PyObject* layer_backward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *outer = args[0], *tensors = args[1], *options = args[2], *needs = args[3];
    LayerArguments given;
    const Py_ssize_t inputs = PyTuple_Size(needs), weights = inputs - 9;
    if (PyErr_Occurred()) throw PythonError();
    if (aoti_torch_grad_mode_is_enabled() || somebody_watches() || weights < 2) return nullptr;
    if (PyTuple_Size(outer) != 3 || PyTuple_Size(tensors) != 6 + weights || PyTuple_Size(options) != 5) return nullptr;
    if (!given.options(options, 0) || !given.tensors(tensors, 6)) return nullptr;
    const auto needed = [&](Py_ssize_t input) { return PyTuple_GetItem(needs, input) == Py_True; };
    Gradients gradients{};
    gradients.need_dx = needed(0);
    gradients.need_dh0 = needed(2) || needed(3);
    for (Py_ssize_t i = 9; i < inputs; ++i) gradients.need_dw |= needed(i);
    View y, saved;
    Kind any;
    if (!given.numbers(PyTuple_GetItem(tensors, 4), y, any, false) || !given.whole(PyTuple_GetItem(tensors, 5), saved)) return nullptr;
    if (!given.maybe_numbers(PyTuple_GetItem(outer, 1), gradients.dh_n, any)) return nullptr;
    if (!given.maybe_numbers(PyTuple_GetItem(outer, 2), gradients.dc_n, any)) return nullptr;
    Owned dy = kept(PyTuple_GetItem(outer, 0));
    if (dy.get() == Py_None) {
      if (!gradients.dh_n.dims && !gradients.dc_n.dims) return nullptr;
      dy = given.results.make({y.sizes, y.sizes + y.dims}, y.kind, gradients.dy);
      std::memset(reinterpret_cast<void*>(gradients.dy.address), 0, static_cast<size_t>(y.numel() * bytes_of(y.kind)));
    } else if (!given.numbers(dy.get(), gradients.dy, any, false)) {
      return nullptr;
    }
    MadeResults<BACKWARD_RESULTS> results(
        given, {given.x, given.h, given.c, Kind::f32, Kind::f32, given.bias, given.bias, Kind::f32});
    results.run(backward_call(given.layer, gradients, y, saved, results.make()), false);
    auto& [dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr] = results.made;
    std::vector<Owned> found(static_cast<size_t>(inputs));
    found[0] = std::move(dx);
    found[2] = std::move(dh0);
    found[3] = std::move(dc0);
    auto place = found.begin() + 9;
    for (Owned* joined : {&dw_ih, &dw_hh, &db_ih, &db_hh, &dw_hr}) {
      if (!*joined) continue;
      if (given.directions == 1) {
        *place++ = std::move(*joined);
        continue;
      }
      const Owned count = owned(PyLong_FromSsize_t(given.directions));
      const Owned parts = owned(PyObject_CallMethodObjArgs(joined->get(), keys[CHUNK], count.get(), nullptr));
      if (!parts) throw PythonError();
      for (Py_ssize_t d = 0; d < given.directions; ++d) *place++ = kept(PyTuple_GetItem(parts.get(), d));
    }
    return tuple_of(std::move(found));
  });
}

// pack(module.__dict__, mode or None, allocate) -> the weights as packed panels in allocate(bytes), or None where it can't.
PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const char* mode = args[1] == Py_None ? nullptr : PyUnicode_AsUTF8AndSize(args[1], nullptr);
    Stack stack;
    if (!stack.read(args[0], mode, false) || stack.half) return nullptr;
    return stack.pack(args[2]);
  });
}

// tiers() -> names of those in here that this processor runs, widest first.
PyObject* tiers(PyObject*, PyObject*) {
  return answer([]() -> Owned {
    Owned names = owned(PyList_New(0));
    for (const Tier& t : TIERS) {
      if (!names || !t.fits()) continue;
      const Owned name = owned(PyUnicode_FromString(t.name.c_str()));
      if (!name || PyList_Append(names.get(), name.get()) != 0) throw PythonError();
    }
    return names;
  });
}

// prepare(tier, DLPack's table, torch.Tensor, torch.nn.Parameter, torch.empty_like, torch.autograd.graph.increment_version):
// register the ops, which run that tier's kernels.
// Not when this library is opened: it may turn out to hold nothing for this processor.
PyObject* prepare(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const char* name = PyUnicode_AsUTF8AndSize(args[0], nullptr);
    if (!name) throw PythonError();
    tier = std::find_if(std::begin(TIERS), std::end(TIERS), [&](const Tier& t) { return t.name == name; });
    exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[1], "dlpack_exchange_api"));
    if (!exchange) throw PythonError();
    if (exchange->header.version.major != DLPACK_MAJOR_VERSION) throw std::runtime_error("fastrnn: DLPack of another version");
    tensor_type = kept(args[2]).release();
    parameter_type = kept(args[3]).release();
    empty_like = kept(args[4]).release();
    increment_version = kept(args[5]).release();
    register_ops();
    return nullptr;
  });
}

// watch(functions): the short way is open from now on, and closed where one of these says something true.
PyObject* watch(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    if (!PyTuple_Check(args[0])) throw std::runtime_error("fastrnn: watch wants a tuple");
    watched = kept(args[0]).release();
    return nullptr;
  });
}

// differentiate(fastrnn.ops.apply_eagerly, apply_half, apply_step, fastrnn.checkpoint.is_on, torch.cat, any tensor in float32)
PyObject* differentiate(PyObject*, PyObject* const* args, Py_ssize_t) {
  PyObject** const places[] = {&apply, &apply_half, &apply_step, &recompute_is_on, &cat, &float32_pattern};
  for (size_t i = 0; i < std::size(places); ++i) *places[i] = kept(args[i]).release();
  Py_RETURN_NONE;
}

// With as many arguments as it wants.
template <PyObject* (*Own)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t Wanted>
PyObject* counted(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count == Wanted) return Own(self, args, count);
  return PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", Wanted, count);
}

template <PyObject* (*Own)(PyObject*, PyObject* const*, Py_ssize_t), Py_ssize_t Wanted>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&counted<Own, Wanted>)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace fastrnn

PyMODINIT_FUNC PyInit__runtime() {
  using namespace fastrnn;
  static PyMethodDef methods[] = {
      method<forward, 3>("forward"), method<step, 4>("step"), method<cell, 4>("cell"), method<pack, 3>("pack"),
      method<layer_forward, 1>("layer_forward"), method<layer_backward, 4>("layer_backward"),
      method<prepare, 6>("prepare"), method<watch, 1>("watch"), method<differentiate, 6>("differentiate"),
      {"tiers", tiers, METH_NOARGS, nullptr}, {}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_runtime", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  for (size_t i = 0; i < KEYS; ++i)
    if (!(keys[i] = PyUnicode_InternFromString(KEY_NAMES[i]))) return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddStringConstant(module, "built_from", FASTRNN_BUILT_FROM) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
