// The fast path of a module's call. One function reads the module's attributes and its input, checks all there is to check, and
// walks the layers, past torch's dispatcher, which takes longer than a small step does. With gradients it applies an
// autograd.Function to each layer. None means that it declines the call: the fallback in Python runs, which has torch's words
// for what is wrong.
#include <algorithm>
#include <array>
#include <cstring>
#include <iterator>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "python.h"

namespace fastrnn {
namespace {

// What is in a dictionary, borrowed; null where it is not there, or None.
PyObject* find(PyObject* dictionary, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dictionary, key);
  if (!found && PyErr_Occurred()) throw PythonError();
  return found == Py_None ? nullptr : found;
}
PyObject* find(PyObject* dictionary, Key key) { return find(dictionary, keys[key]); }

// An attribute that torch.nn's constructor made a bool, or an int. It may have been replaced since, by anything.
bool flag(PyObject* attributes, Key key) {
  PyObject* found = find(attributes, key);
  if (found != Py_True && found != Py_False) throw Declined();
  return found == Py_True;
}
int64_t number(PyObject* attributes, Key key) {
  PyObject* found = find(attributes, key);
  if (!found || !PyLong_CheckExact(found)) throw Declined();
  const int64_t value = PyLong_AsLongLong(found);
  if (value == -1 && PyErr_Occurred()) {  // of more than 64 bits
    PyErr_Clear();
    throw Declined();
  }
  return value;
}

// Another mapping in the place of a module's parameters may compute what it holds.
bool is_plain_dictionary(PyObject* object) { return object && PyDict_CheckExact(object); }

// Which of these keys a text is; KEYS where it is none. Most are the very same object.
Key which(PyObject* text, std::initializer_list<Key> expected) {
  for (const Key key : expected)
    if (text == keys[key]) return key;
  for (const Key key : expected)
    if (text && PyUnicode_Check(text) && PyUnicode_Compare(text, keys[key]) == 0) return key;
  return KEYS;
}

// Whether an attribute of the module stands in the place of something that its class has. more: attributes that are known to be
// there beyond those that the constructor makes; weights: a list of further names.
bool has_overrides(PyObject* attributes, const Imported::Overrides& overrides, Py_ssize_t more, PyObject* weights = nullptr) {
  if (PyDict_Size(attributes) == overrides.made + more) return false;
  if (!overrides.names) return true;
  for (Py_ssize_t i = 0; i < PyTuple_Size(overrides.names); ++i)
    if (find(attributes, PyTuple_GetItem(overrides.names, i))) return true;
  for (Py_ssize_t i = 0; weights && i < PyList_Size(weights); ++i)
    if (find(attributes, PyList_GetItem(weights, i))) return true;
  return false;
}

// How a layer's frozen weights begin; a line for each of these, then the panels. See fastrnn.freeze.
struct alignas(64) PackHeader {
  int64_t tier, layers, bytes;
  LayerSizes sizes;
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

// Layers on top of each other, as a module holds them, without dropout.
class Stack {
 public:
  // Of a module, whose class stands for this one of torch.nn; false where its attributes do not agree with its weights, or where
  // these are not its parameters any more, or not of one kind.
  bool read(PyObject* attributes, PyObject* torch_class, bool frozen_too = true) {
    const Key of = which(torch_class, {LSTM, GRU, RNN, LSTM_CELL, GRU_CELL, RNN_CELL});
    if (of == LSTM_CELL || of == GRU_CELL || of == RNN_CELL) return read_cell(attributes, of, frozen_too);
    const Key mode = of == RNN ? which(find(attributes, MODE), {RNN_TANH, RNN_RELU}) : of;
    if (!set_cell(mode)) return false;
    layers = number(attributes, NUM_LAYERS);
    if (layers < 1) return false;
    described.directions = 1 + flag(attributes, BIDIRECTIONAL);
    described.batch_first = flag(attributes, BATCH_FIRST);
    described.bias = flag(attributes, BIAS);
    const int64_t projection = number(attributes, PROJ_SIZE);
    described.projected = projection > 0;
    if (drops(attributes)) return false;
    PyObject *parameters = find(attributes, PARAMETERS), *names = find(attributes, FLAT_WEIGHTS_NAMES);
    if (!is_plain_dictionary(parameters) || !names || !PyList_Check(names)) return false;
    PyObject* pack = frozen_too ? find(attributes, PANELS) : nullptr;
    if (!(pack ? read_pack(pack, parameters) : read_weights(attributes, parameters, names))) return false;
    if (number(attributes, INPUT_SIZE) != sizes.input_size) return false;
    if (number(attributes, HIDDEN_SIZE) != sizes.hidden_size) return false;
    if (described.bias != sizes.layer.bias || described.projected != sizes.layer.projected) return false;  // what was packed
    if (described.projected && projection != sizes.output_size) return false;
    sizes.layer = described;
    return !has_overrides(attributes, imported.of_layer, (pack != nullptr) + compressed, names);
  }

  // Whether it takes input and states of these shapes; they are of one kind, and states are contiguous.
  bool takes(const View& x, Layout of, const View* h0, const View* c0, int64_t state_dims) {
    if (x.dtype != given_dtype() || x.dims != (of == Layout::batch ? 2 : 3) || x.size(-1) != sizes.input_size) return false;
    if (x.numel() == 0 || (all_half && !x.is_contiguous())) return false;
    layout = of;
    batch = x.size(layout == Layout::time_batch ? 1 : 0);
    return is_state(h0, sizes.output_size, state_dims) && is_state(c0, sizes.hidden_size, state_dims);
  }
  bool is_state(const View* state, int64_t width, int64_t dims) const {
    if (!state) return true;
    const bool shaped = state->dims == dims && state->size(-1) == width && state->size(-2) == batch;
    return shaped && state->dtype == given_dtype() && state->is_contiguous() &&
           (dims == 2 || state->size(0) == layers * sizes.layer.directions);
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
    std::vector<Call> calls;                     // those that wait for others to run at once
    std::vector<torch::stable::Tensor> between;  // and what goes from layer to layer
    std::vector<int64_t> shape(x.sizes, x.sizes + x.dims);
    std::unique_ptr<char[]> many_zeros;
    int64_t at_once = 0;  // threads of those
    for (int64_t layer = 0; layer < layers; ++layer) {
      Call call(sizes_of(layer), input, layout);
      if (!packs.empty()) call.packs(packs[layer]);
      if (packs.empty()) give_weights(call, layer);
      const auto initial = [&](const View* given, int64_t Record::*field, int64_t width) {
        if (given) return call.states(*given, field, batch * width, layer, layers);
        for (Record& record : call.records) record.*field = zeros(many_zeros);
      };
      initial(h0, &Record::h0, sizes.output_size);
      call.states(h_n, &Record::h_n, batch * sizes.output_size, layer, layers);
      if (sizes.layer.cell->states) {
        initial(c0, &Record::c0, sizes.hidden_size);
        call.states(*c_n, &Record::c_n, batch * sizes.hidden_size, layer, layers);
      }
      View output = y;
      torch::stable::Tensor made;
      if (layer < layers - 1) {
        shape.back() = sizes.layer.directions * sizes.output_size;
        made = empty_tensor(shape, sizes.dtype == Dtype::f32 ? aoti_torch_dtype_float32() : aoti_torch_dtype_float64());
        output = {reinterpret_cast<int64_t>(made.data_ptr()), x.dims, made.sizes().data(), made.strides().data(), sizes.dtype};
      }
      call.rows(output, &Record::y, &Record::y_step, &Record::y_row, sizes.output_size);
      if (layer == 0 && !sizes.half) at_once = call.threads_at_once(layers);
      if (at_once) {
        calls.push_back(std::move(call));
      } else {
        call.run(true);
        if (all_half && layer < layers - 1) wide.round_in_place(output);  // as every layer's result is
        between.clear();                                                      // the input of this layer goes
      }
      if (layer < layers - 1) between.push_back(std::move(made));
      input = output;
    }
    if (at_once) Call::run_at_once(calls, at_once);
  }

  Dtype given_dtype() const { return all_half ? Dtype::bf16 : sizes.dtype; }
  Layout sequence_layout() const { return sizes.layer.batch_first ? Layout::batch_time : Layout::time_batch; }

  // The weights of all layers, packed, in a tensor of `allocate`(bytes).
  Owned pack(PyObject* allocate) const {
    const auto pack_layer = [&](int64_t layer, const Packs& places) {
      const LayerSizes own = sizes_of(layer);
      const int64_t shape[] = {1, own.input_size}, strides[] = {own.input_size, 1};
      Call call(own, {0, 2, shape, strides, own.dtype}, Layout::batch);
      call.packs(places);
      give_weights(call, layer);
      return call.pack();
    };
    std::vector<int64_t> bytes;
    int64_t total = sizeof(PackHeader) * layers;
    for (int64_t layer = 0; layer < layers; ++layer)
      total += sizes.layer.directions * bytes.emplace_back(pack_layer(layer, {}));
    Owned tensor = owned(PyObject_CallFunction(allocate, "L", static_cast<long long>(total)));
    View t;
    if (!tensor || !look(tensor.get(), t) || t.dtype != Dtype::byte || t.numel() != total) throw PythonError();
    auto* headers = reinterpret_cast<PackHeader*>(t.address);
    int64_t at = reinterpret_cast<int64_t>(headers + layers);
    for (int64_t layer = 0; layer < layers; ++layer) {
      headers[layer] = {tier - TIERS, layers, bytes[layer], sizes_of(layer)};
      pack_layer(layer, {at, at + bytes[layer]});
      at += sizes.layer.directions * bytes[layer];
    }
    return tensor;
  }

  // Does a weight of the first layers?
  bool wants_gradient(int64_t first_layers) const {
    const auto wants = [](const Owned& weight) { return fastrnn::wants_gradient(weight.get()); };
    const auto count = static_cast<int64_t>(objects.size()) / layers * first_layers;
    return std::any_of(objects.begin(), objects.begin() + count, wants);
  }

  double operations(const View& x) const {
    const auto rows = static_cast<double>(x.numel() / x.size(-1));
    const auto units = static_cast<double>(layers * sizes.layer.directions * sizes.layer.cell->gates * sizes.hidden_size);
    return 2 * rows * units * static_cast<double>(sizes.input_size + sizes.output_size);
  }

  LayerSizes sizes;  // of the lowest layer
  Layout layout = Layout::batch;
  int64_t layers = 1, batch = 0;
  bool frozen = false;
  bool compressed = false, all_half = false;  // which of the matrices in bfloat16: nothing else is; all is
  std::vector<Owned> objects;  // the weights, or the panels: looking at them, others may run and drop theirs

 private:
  // mode: the key of one of torch.nn's modes.
  bool set_cell(Key mode) {
    static const std::pair<Key, const Cell*> cells[] = {{LSTM, cell_of("LSTM")},
                                                        {GRU, cell_of("GRU")},
                                                        {RNN_TANH, cell_of("RNN_TANH")},
                                                        {RNN_RELU, cell_of("RNN_RELU")}};
    for (const auto& [key, found] : cells)
      if (key == mode) described.cell = found;
    return described.cell;
  }
  static const Cell* cell_of(const char* mode) {
    return find_cell([&](const Cell& c) { return std::strcmp(mode, c.mode) == 0; });
  }

  bool read_cell(PyObject* attributes, Key of, bool frozen_too) {
    const auto by_nonlinearity = [&] {
      const Key found = which(find(attributes, NONLINEARITY), {TANH, RELU});
      return found == TANH ? RNN_TANH : found == RELU ? RNN_RELU : KEYS;
    };
    PyObject* parameters = find(attributes, PARAMETERS);
    if (!set_cell(of == LSTM_CELL ? LSTM : of == GRU_CELL ? GRU : by_nonlinearity())) return false;
    if (!is_plain_dictionary(parameters)) return false;
    PyObject* pack = frozen_too ? find(attributes, PANELS) : nullptr;
    if (has_overrides(attributes, imported.of_cell, (of == RNN_CELL) + (pack != nullptr))) return false;
    if (pack) return read_pack(pack, parameters);
    for (const Key key : {WEIGHT_IH, WEIGHT_HH, BIAS_IH, BIAS_HH}) {
      PyObject* weight = find(parameters, key);
      if (!weight && (key == BIAS_IH || key == BIAS_HH) && PyDict_Contains(parameters, keys[key]) == 1) continue;
      if (!weight) return false;
      objects.push_back(kept(weight));
    }
    described.bias = objects.size() > 2;
    return look_at_weights(attributes);
  }

  // Of a layer: a flat list, whose members torch.nn's forward finds there and not among the parameters.
  bool read_weights(PyObject* attributes, PyObject* parameters, PyObject* names) {
    PyObject* flat = find(attributes, FLAT_WEIGHTS);
    if (!flat || !PyList_Check(flat)) return false;
    const Py_ssize_t count = PyList_Size(flat);
    if (PyList_Size(names) != count) return false;
    Py_ssize_t place = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject *weight = PyList_GetItem(flat, i), *name = PyList_GetItem(names, i), *key, *parameter;
      const bool in_order = PyDict_Next(parameters, &place, &key, &parameter) && key == name;
      if (weight != (in_order ? parameter : find(parameters, name))) return false;
      objects.push_back(kept(weight));
    }
    return look_at_weights(attributes);
  }

  // Whether dropout is drawn.
  bool drops(PyObject* attributes) const {
    PyObject* probability = find(attributes, DROPOUT);
    if (!probability || !(PyFloat_CheckExact(probability) || PyLong_CheckExact(probability))) throw Declined();
    return flag(attributes, TRAINING) && layers > 1 && PyFloat_AsDouble(probability) != 0;
  }

  bool look_at_weights(PyObject* attributes) {
    weights.resize(objects.size());
    for (size_t i = 0; i < objects.size(); ++i)
      if (!look(objects[i].get(), weights[i], true) || !weights[i].is_contiguous()) return false;
    const bool half = !weights.empty() && weights[0].dtype == Dtype::bf16;
    compressed = half && find(attributes, COMPRESSED) == Py_True;
    all_half = half && !compressed;
    return understand();
  }

  // The sizes, by the weights' own; false where they do not fit each other.
  bool understand() {
    const size_t each = described.weights() * static_cast<size_t>(described.directions);
    if (weights.size() != each * static_cast<size_t>(layers)) return false;
    const Dtype vectors = compressed ? Dtype::f32 : weights[0].dtype;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const auto own = LayerSizes::of(described, &weights[static_cast<size_t>(layer) * each], each, vectors);
      if (!own) return false;
      if (layer == 0) sizes = *own;
      if (*own != sizes_of(layer)) return false;
    }
    return true;
  }

  LayerSizes sizes_of(int64_t layer) const {
    LayerSizes own = sizes;
    if (layer > 0) own.input_size = sizes.layer.directions * sizes.output_size;
    return own;
  }

  // pack: a tuple of the panels and the parameters that they were made of. False, too, where something took the place of one, as
  // torch.func.functional_call does: panels know nothing of it.
  bool read_pack(PyObject* pack, PyObject* parameters) {
    PyObject *name, *value;
    if (!PyTuple_CheckExact(pack)) return false;
    Py_ssize_t place = 0, count = 0;
    while (PyDict_Next(parameters, &place, &name, &value))
      if (++count >= PyTuple_Size(pack) || PyTuple_GetItem(pack, count) != value) return false;
    if (PyTuple_Size(pack) != count + 1) return false;
    frozen = true;
    objects.push_back(kept(PyTuple_GetItem(pack, 0)));
    View t;
    if (!look(objects[0].get(), t) || t.dtype != Dtype::byte || t.dims != 1) return false;
    if (t.size(0) / static_cast<int64_t>(sizeof(PackHeader)) < layers) return false;
    const auto* headers = reinterpret_cast<const PackHeader*>(t.address);
    sizes = headers[0].sizes;
    if (headers[0].tier != tier - TIERS || headers[0].layers != layers) return false;
    if (sizes.layer.cell != described.cell || sizes.layer.directions != described.directions) return false;
    int64_t at = reinterpret_cast<int64_t>(headers + layers);
    for (int64_t layer = 0; layer < layers; ++layer) {
      packs.push_back({at, at + headers[layer].bytes});
      at += described.directions * headers[layer].bytes;
    }
    return at == t.address + t.size(0);
  }

  void give_weights(Call& call, int64_t layer) const {
    const size_t each = sizes.layer.weights() * static_cast<size_t>(sizes.layer.directions);
    const View* own = &weights[static_cast<size_t>(layer) * each];
    if (!all_half) return call.weights(own);
    Views given(own, own + each);
    for (View& weight : given)
      if (weight.dims == 1) weight = wide.of(weight);
    call.weights(given.data());
  }

  // A state of zeros, hidden or cell, which nobody writes.
  int64_t zeros(std::unique_ptr<char[]>& many) const {
    static const char few[64 << 10] = {};
    const int64_t bytes = product({batch, std::max(sizes.hidden_size, sizes.output_size), bytes_of(sizes.dtype)});
    if (bytes <= static_cast<int64_t>(sizeof few)) return reinterpret_cast<int64_t>(few);
    if (!many) many = std::make_unique<char[]>(static_cast<size_t>(bytes));
    return reinterpret_cast<int64_t>(many.get());
  }

  Layer described;  // by the module's attributes
  mutable Widened wide;
  Views weights;  // of each layer in turn
  std::vector<Packs> packs;   // of each layer, in the place of weights
};

// Patterns of results, what the call was given.
Results like(PyObject* x, const View& seen, const States& states) {
  Results results;
  results.like(x, seen);
  if (states.h_or_none) results.like(states.objects[0].get(), states.h);
  if (states.c_or_none) results.like(states.objects[1].get(), states.c);
  return results;
}

void run(const Stack& stack, const View& x, const States& before, const View& y, const View& h_n, const View* c_n) {
  run_unlocked(stack.operations(x), [&] { stack.run(x, before.h_or_none, before.c_or_none, y, h_n, c_n); });
}

bool input_wants_gradient(PyObject* x, const States& before) {
  return wants_gradient(x) || wants_gradient(before.objects[0].get()) || wants_gradient(before.objects[1].get());
}

// Has torch to differentiate this call, or its lowest layer? A frozen module has no gradients but its input's.
bool differentiates(const Stack& stack, PyObject* x, const States& before) {
  if (!aoti_torch_grad_mode_is_enabled()) return false;
  return input_wants_gradient(x, before) || (!stack.frozen && stack.wants_gradient(stack.layers));
}
bool lowest_differentiates(const Stack& stack, PyObject* x, const States& before) {
  return input_wants_gradient(x, before) || stack.wants_gradient(1);
}

bool overlap(const View& a, const View& b) {
  const auto end = [](const View& t) {
    int64_t last = 0;
    for (int64_t axis = 0; axis < t.dims; ++axis) last += (t.sizes[axis] - 1) * t.strides[axis];
    return t.address + (last + 1) * bytes_of(t.dtype);
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

// (y, h), or (y, (h, c)).
Owned with_state(const Owned& y, const Owned& h, const Owned& c) {
  if (!c) return owned(PyTuple_Pack(2, y.get(), h.get()));
  const Owned state = owned(PyTuple_Pack(2, h.get(), c.get()));
  return state ? owned(PyTuple_Pack(2, y.get(), state.get())) : nullptr;
}

bool recompute_is_on() {
  const Owned mode = owned(PyObject_CallNoArgs(imported.recompute_is_on));
  if (!mode) throw PythonError();
  return mode.get() == Py_True;
}

// One layer of a call that is differentiated, by an autograd.Function. states: h, and c or nothing.
Owned differentiated(PyObject* function, const Stack& stack, int64_t layer, PyObject* x, std::array<Owned, 2> states) {
  std::vector<Owned> arguments;  // of fastrnn.autograd.LayerFunction
  arguments.push_back(kept(x));
  arguments.push_back(nullptr);
  arguments.push_back(std::move(states[0]));
  arguments.push_back(std::move(states[1]));
  for (int i = 0; i < 4; ++i) arguments.push_back(nullptr);  // resets, lengths, mask, noise
  arguments.push_back(owned(PyUnicode_FromString(stack.sizes.layer.text().c_str())));
  arguments.push_back(owned(PyLong_FromLong(0)));
  const size_t each = stack.objects.size() / static_cast<size_t>(stack.layers), first = static_cast<size_t>(layer) * each;
  for (size_t i = first; i < first + each; ++i) arguments.push_back(kept(stack.objects[i].get()));
  Owned results = owned(PyObject_CallObject(function, tuple_of(std::move(arguments)).get()));
  if (!results) throw PythonError();
  return results;
}

// Initial states of zeros, of these sizes but for the last: one tensor where both have the same.
std::array<Owned, 2> zero_states(const Stack& stack, PyObject* x_object, const View& x, std::vector<int64_t> sizes) {
  std::array<Owned, 2> states;
  Results results;
  results.like(x_object, x);
  const auto make = [&](int64_t width) {
    View seen;
    sizes.push_back(width);
    Owned made = results.zeros(sizes, x.dtype, seen);
    sizes.pop_back();
    return made;
  };
  const LayerSizes& own = stack.sizes;
  states[0] = make(own.output_size);
  if (own.layer.cell->states)
    states[1] = own.hidden_size == own.output_size ? kept(states[0].get()) : make(own.hidden_size);
  return states;
}

// All layers of a call that is differentiated.
Owned differentiated(const Stack& stack, PyObject* x_object, const View& x, const States& before) {
  const size_t kinds = stack.sizes.layer.cell->states ? 2 : 1;
  const int64_t D = stack.sizes.layer.directions;
  std::array<Owned, 2> zeros;
  if (!before.h_or_none) zeros = zero_states(stack, x_object, x, {D, stack.batch});
  Owned y = kept(x_object);
  std::vector<Owned> last[2];
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    std::array<Owned, 2> states;
    for (size_t i = 0; i < kinds; ++i) {
      if (zeros[i])
        states[i] = kept(zeros[i].get());
      else if (stack.layers == 1)
        states[i] = kept(before.objects[i].get());
      else
        states[i] = owned(PyObject_CallMethod(before.objects[i].get(), "narrow", "iLL", 0, layer * D, D));
    }
    PyObject* function = stack.sizes.half ? imported.apply_half : imported.apply;
    const Owned results = differentiated(function, stack, layer, y.get(), std::move(states));
    y = kept(PyTuple_GetItem(results.get(), 0));
    for (size_t i = 0; i < kinds; ++i) last[i].push_back(kept(PyTuple_GetItem(results.get(), static_cast<Py_ssize_t>(i + 1))));
  }
  Owned joined[2];
  for (size_t i = 0; i < kinds; ++i) {
    if (stack.layers == 1)
      joined[i] = std::move(last[i][0]);
    else
      joined[i] = owned(PyObject_CallFunctionObjArgs(imported.cat, tuple_of(std::move(last[i])).get(), nullptr));
    if (!joined[i]) throw PythonError();
  }
  return with_state(y, joined[0], joined[1]);
}

}  // namespace

// forward(module.__dict__, torch.nn's class by name, x, hx, module.recompute) -> (y, state) of batched dense input, or None.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[2];
    Stack stack;
    View x;
    States before;
    if (!is_plain(x_object) || is_watched()) return nullptr;
    if (!look(x_object, x) || x.dims != 3 || !stack.read(attributes, args[1])) return nullptr;
    const bool pair = stack.sizes.layer.cell->states > 0;
    if (!before.read(args[3], pair)) return nullptr;
    if (!stack.takes(x, stack.sequence_layout(), before.h_or_none, before.c_or_none, 3)) return nullptr;
    if (differentiates(stack, x_object, before)) {
      if (stack.frozen || args[4] != Py_False || recompute_is_on()) return nullptr;
      // Layers below the first that is differentiated keep nothing: the fallback asks each.
      if (stack.layers > 1 && !lowest_differentiates(stack, x_object, before)) return nullptr;
      return differentiated(stack, x_object, x, before);
    }
    const int64_t D = stack.sizes.layer.directions, B = stack.batch, R = stack.sizes.output_size;
    View y, h_n, c_n;
    Results results = like(x_object, x, before);
    Owned h_object = results.make({stack.layers * D, B, R}, x.dtype, h_n);
    Owned y_object = results.make({x.size(0), x.size(1), D * R}, x.dtype, y);
    Owned c_object = pair ? results.make({stack.layers * D, B, stack.sizes.hidden_size}, x.dtype, c_n) : nullptr;
    run(stack, x, before, y, h_n, pair ? &c_n : nullptr);
    return with_state(y_object, h_object, c_object);
  });
}

// step(module.__dict__, torch.nn's class by name, x, state, out) -> (y, state), which are out's if it is given, or None. Without gradients, whoever asks.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[2], *out = args[4];
    Stack stack;
    View x, y, h_n, c_n;
    States before, after;
    if (!is_plain(x_object) || is_watched()) return nullptr;
    if (!look(x_object, x) || !stack.read(attributes, args[1]) || stack.sizes.layer.directions != 1) return nullptr;
    const bool pair = stack.sizes.layer.cell->states > 0;
    if (!before.read(args[3], pair)) return nullptr;
    if (!stack.takes(x, Layout::batch, before.h_or_none, before.c_or_none, 3)) return nullptr;
    const int64_t B = stack.batch, R = stack.sizes.output_size;
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
      if (!owned(PyObject_CallFunctionObjArgs(imported.increment_version, written.get(), nullptr))) throw PythonError();
      return kept(out);
    }
    Results results = like(x_object, x, before);
    Owned h_object = results.make({stack.layers, B, R}, x.dtype, h_n), y_object = results.make({B, R}, x.dtype, y);
    Owned c_object = pair ? results.make({stack.layers, B, stack.sizes.hidden_size}, x.dtype, c_n) : nullptr;
    run(stack, x, before, y, h_n, pair ? &c_n : nullptr);
    return with_state(y_object, h_object, c_object);
  });
}

// cell(module.__dict__, torch.nn's class by name, x, hx) -> h, or (h, c), of a batch, or None.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[2];
    Stack stack;
    View x, h, c;
    States before;
    if (!is_plain(x_object) || is_watched()) return nullptr;
    if (!look(x_object, x) || !stack.read(attributes, args[1])) return nullptr;
    const bool pair = stack.sizes.layer.cell->states > 0;
    if (!before.read(args[3], pair)) return nullptr;
    // torch.nn makes absent states of the size that the module says it has
    if (!before.h_or_none && number(attributes, HIDDEN_SIZE) != stack.sizes.hidden_size) return nullptr;
    if (!stack.takes(x, Layout::batch, before.h_or_none, before.c_or_none, 2)) return nullptr;
    if (differentiates(stack, x_object, before)) {
      if (stack.frozen || stack.sizes.half || recompute_is_on()) return nullptr;
      std::array<Owned, 2> states;
      if (!before.h_or_none) states = zero_states(stack, x_object, x, {stack.batch});
      for (size_t i = 0; before.h_or_none && i < 1U + pair; ++i) states[i] = kept(before.objects[i].get());
      Owned results = differentiated(imported.apply_cell, stack, 0, x_object, std::move(states));
      return pair ? std::move(results) : kept(PyTuple_GetItem(results.get(), 0));
    }
    Results results = like(x_object, x, before);
    Owned h_object = results.make({stack.batch, stack.sizes.output_size}, x.dtype, h);
    Owned c_object = pair ? results.make({stack.batch, stack.sizes.hidden_size}, x.dtype, c) : nullptr;
    run(stack, x, before, h, h, pair ? &c : nullptr);  // the output is the state
    return pair ? owned(PyTuple_Pack(2, h_object.get(), c_object.get())) : std::move(h_object);
  });
}

// pack(module.__dict__, torch.nn's class by name, allocate) -> the weights as packed panels in allocate(bytes), or None where it
// can't.
PyObject* pack(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    Stack stack;
    if (!stack.read(args[0], args[1], false) || stack.sizes.half) return nullptr;
    return stack.pack(args[2]);
  });
}

}  // namespace fastrnn
