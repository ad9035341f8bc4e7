// The fast path of a module's call. One function reads the module's attributes and its input, checks all there is to check, and
// walks the layers, past torch's dispatcher, which takes longer than a small step does. With gradients it applies an
// autograd.Function to each layer. None means that it declines the call: the fallback in Python runs, which has torch's words
// for what is wrong.
#include <algorithm>
#include <array>
#include <cstring>
#include <forward_list>
#include <iterator>
#include <memory_resource>
#include <optional>
#include <string>
#include <string_view>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "python.h"
#include "replay.h"

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

// The states a caller gave, or gets: h and the others, which a layer has side by side.
struct States {
  View h, c;
  const View* h_or_none = nullptr;
  const View* c_or_none = nullptr;

 private:
  // A cell has few: space for them without an allocation, which would take a part of a small step's time that can be measured.
  std::array<std::byte, 512> room_;
  std::pmr::monotonic_buffer_resource memory_{room_.data(), room_.size()};

 public:
  std::pmr::vector<Owned> objects{&memory_};  // looking at them, others may run and drop theirs
  std::pmr::vector<View> seen{&memory_};

  // False where they are not what the cell has, h and so many others. look_at(object, view): whether a tensor is seen.
  template <class Look>
  bool read(PyObject* given, int64_t others, const Look& look_at) {
    if (given == Py_None) return true;
    const Py_ssize_t count = 1 + others;
    objects.reserve(static_cast<size_t>(count));
    if (!others)
      objects.push_back(kept(given));
    else if (PyTuple_CheckExact(given) && PyTuple_Size(given) == count)
      for (Py_ssize_t i = 0; i < count; ++i) objects.push_back(kept(PyTuple_GetItem(given, i)));
    else if (PyList_CheckExact(given) && PyList_Size(given) == count)
      for (Py_ssize_t i = 0; i < count; ++i) objects.push_back(kept(PyList_GetItem(given, i)));
    else
      return false;
    seen.resize(objects.size());
    for (size_t i = 0; i < seen.size(); ++i)
      if (!look_at(objects[i].get(), seen[i])) return false;
    place();
    return true;
  }
  // New ones: h of these sizes, the others as wide as the cell.
  void make(Results& results, std::vector<int64_t> sizes, const LayerSizes& of, Dtype dtype) {
    const int64_t count = 1 + of.layer.cell->states;
    objects.reserve(static_cast<size_t>(count));
    seen.reserve(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
      objects.push_back(results.make(sizes, dtype, seen.emplace_back()));
      sizes.back() = of.hidden_size;
    }
    place();
  }
  // Several others have a place together, to which they are copied, or from there.
  void reserve() {
    if (seen.size() < 3) return;
    joined_ = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(others() * seen[1].numel() * bytes_of(c.dtype)));
    sizes_.assign(c.sizes, c.sizes + c.dims);
    sizes_.back() *= others();
    c.address = reinterpret_cast<int64_t>(joined_.get());
    c.sizes = sizes_.data();
  }
  void copy(bool together) const {
    if (!joined_) return;
    const int64_t bytes = seen[1].size(-1) * bytes_of(c.dtype), rows = seen[1].numel() / seen[1].size(-1);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < others(); ++i) {
        auto* apart = reinterpret_cast<char*>(seen[static_cast<size_t>(1 + i)].address + row * bytes);
        char* place = joined_.get() + (row * others() + i) * bytes;
        std::memcpy(together ? place : apart, together ? apart : place, static_cast<size_t>(bytes));
      }
  }

 private:
  std::unique_ptr<char[]> joined_;
  std::vector<int64_t> sizes_;

  void place() {
    h = seen[0];
    h_or_none = &h;
    if (seen.size() < 2) return;
    c = seen[1];
    c_or_none = &c;
  }
  int64_t others() const { return static_cast<int64_t>(seen.size()) - 1; }
};

// Layers on top of each other, as a module holds them, without dropout.
class Stack {
 public:
  explicit Stack(bool on_gpu = false) : on_gpu(on_gpu) {}

  // A tensor of the call. On a GPU all are on the same one, and of one dtype, which is a view's float32: only sizes matter here.
  bool look_at(PyObject* object, View& seen, bool maybe_parameter = false) {
    if (!on_gpu) return look(object, seen, maybe_parameter);
    OnGpu here;
    if (!look_on_gpu(object, seen, here) || seen.dims < 1 || seen.stride(-1) != 1) return false;
    if (seen.dtype != Dtype::f32 && seen.dtype != Dtype::f16 && seen.dtype != Dtype::bf16) return false;
    if (!place) place = here;
    seen.dtype = Dtype::f32;
    return *place == here;
  }

  // Of a module, whose class stands for this one of torch.nn, or has the cell of this name; false where its attributes do not agree
  // with its weights, or where these are not its parameters any more, or not of one kind.
  bool read(PyObject* attributes, PyObject* torch_class, bool frozen_too = true) {
    const Key of = which(torch_class, {LSTM, GRU, RNN, LSTM_CELL, GRU_CELL, RNN_CELL});
    if (of == LSTM_CELL || of == GRU_CELL || of == RNN_CELL) return read_cell(attributes, of, frozen_too);
    const bool own = of == KEYS;
    if (!(own ? set_own_cell(torch_class) : set_cell(of == RNN ? which(find(attributes, MODE), {RNN_TANH, RNN_RELU}) : of)))
      return false;
    layers = number(attributes, NUM_LAYERS);
    if (layers < 1) return false;
    described.directions = 1 + flag(attributes, BIDIRECTIONAL);
    described.batch_first = flag(attributes, BATCH_FIRST);
    described.bias = flag(attributes, BIAS);
    const int64_t projection = own ? 0 : number(attributes, PROJ_SIZE);
    described.projected = projection > 0;
    if (own) described.heads = number(attributes, NUM_HEADS);
    if (drops(attributes)) return false;
    PyObject *parameters = find(attributes, PARAMETERS), *names = find(attributes, FLAT_WEIGHTS_NAMES);
    if (!is_plain_dictionary(parameters) || !names || !PyList_Check(names)) return false;
    PyObject* pack = frozen_too ? find(attributes, PANELS) : nullptr;
    if (!(pack ? read_pack(pack, parameters) : read_weights(attributes, parameters, names, own))) return false;
    if (number(attributes, INPUT_SIZE) != sizes.input_size) return false;
    if (number(attributes, HIDDEN_SIZE) != sizes.hidden_size) return false;
    if (described.bias != sizes.layer.bias || described.projected != sizes.layer.projected) return false;  // what was packed
    if (described.projected && projection != sizes.output_size) return false;
    sizes.layer = described;
    const Imported::Overrides overrides{imported.of_layer.names, own ? -1 : imported.of_layer.made};
    return !has_overrides(attributes, overrides, (pack != nullptr) + compressed, names);
  }

  // Whether it takes input and states of these shapes; they are of one kind, and states are contiguous.
  bool takes(const View& x, Layout of, const States& states, int64_t state_dims) {
    if (x.dtype != given_dtype() || x.dims != (of == Layout::batch ? 2 : 3) || x.size(-1) != sizes.input_size) return false;
    if (x.numel() == 0 || (all_half && !x.is_contiguous())) return false;
    layout = of;
    batch = x.size(layout == Layout::time_batch ? 1 : 0);
    for (size_t i = 0; i < states.seen.size(); ++i)
      if (!is_state(states.seen[i], i ? sizes.hidden_size : sizes.output_size, state_dims)) return false;
    return true;
  }
  bool is_state(const View& state, int64_t width, int64_t dims) const {
    const bool shaped = state.dims == dims && state.size(-1) == width && state.size(-2) == batch;
    return shaped && state.dtype == given_dtype() && state.is_contiguous() &&
           (dims == 2 || state.size(0) == layers * sizes.layer.directions);
  }

  // Are there kernels? Those of a cell of one's own are compiled when first used, by the fallback.
  bool is_compiled(bool training) const {
    const auto has = [&](bool forward) { return unit_of(*sizes.layer.cell, sizes.dtype, forward).run != nullptr; };
    return has(true) && (!training || has(false));
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
        const int64_t width = sizes.layer.cell->states * sizes.hidden_size;
        initial(c0, &Record::c0, width);
        call.states(*c_n, &Record::c_n, batch * width, layer, layers);
      }
      View output = y;
      torch::stable::Tensor made;
      if (layer < layers - 1) {
        std::vector<int64_t> shape(x.sizes, x.sizes + x.dims);
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

  // A layer's weights as operators take them.
  std::vector<Owned> weights_of(int64_t layer) const {
    const size_t own = weights_apart(sizes.layer), each = sizes.layer.weights() + own;
    std::vector<Owned> found;
    found.reserve(sizes.layer.weights() * static_cast<size_t>(sizes.layer.directions));
    for (int64_t d = 0; d < sizes.layer.directions; ++d) {
      const Owned* first = &objects[static_cast<size_t>(layer * sizes.layer.directions + d) * each];
      for (size_t i = 0; i < sizes.layer.weights(); ++i) {
        found.push_back(kept(first[i].get()));
        if (!own || i != Layer::B_IH) continue;
        std::vector<Owned> parts;
        parts.push_back(std::move(found.back()));
        for (size_t k = 0; k < own; ++k) parts.push_back(kept(first[sizes.layer.weights() + k].get()));
        found.back() = owned(PyObject_CallFunctionObjArgs(imported.cat, tuple_of(parts).get(), nullptr));
        if (!found.back()) throw PythonError();
      }
    }
    return found;
  }

  double operations(const View& x) const {
    const auto rows = static_cast<double>(x.numel() / x.size(-1));
    const auto units = static_cast<double>(layers * sizes.layer.directions * sizes.layer.cell->gates * sizes.hidden_size);
    return 2 * rows * units * static_cast<double>(sizes.input_size + sizes.output_size / sizes.layer.heads);
  }

  LayerSizes sizes;  // of the lowest layer
  Layout layout = Layout::batch;
  int64_t layers = 1, batch = 0;
  const bool on_gpu;
  std::optional<OnGpu> place;  // of all tensors
  bool frozen = false;
  bool compressed = false, all_half = false;  // which of the matrices in bfloat16: nothing else is; all is
  std::vector<Owned> objects;  // the weights, or the panels: looking at them, others may run and drop theirs
  Owned mask, noise;           // of a single layer that is differentiated, or null

  // drawn: a pair of these.
  void give_noise(const Owned& drawn) {
    if (!drawn || !PyTuple_CheckExact(drawn.get()) || PyTuple_Size(drawn.get()) != 2) throw PythonError();
    mask = kept(PyTuple_GetItem(drawn.get(), 0));
    noise = kept(PyTuple_GetItem(drawn.get(), 1));
  }

 private:
  // Weights of the cell's own of each direction that do not stand behind its biases yet.
  size_t weights_apart(const Layer& layer) const {
    const auto sides = static_cast<size_t>(layers * layer.directions);
    return objects.size() == layer.weights() * sides ? 0 : static_cast<size_t>(layer.cell->weights);
  }

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
  bool set_own_cell(PyObject* name) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name, &length);
    if (!text) throw PythonError();
    const std::string_view wanted(text, static_cast<size_t>(length));
    described.cell = find_cell([&](const Cell& c) { return wanted == c.name; });
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

  // Of a layer: by their names, and of torch.nn's from a flat list too, where its forward finds them.
  bool read_weights(PyObject* attributes, PyObject* parameters, PyObject* names, bool own) {
    PyObject* flat = own ? nullptr : find(attributes, FLAT_WEIGHTS);
    const Py_ssize_t count = PyList_Size(names);
    if (!own && (!flat || !PyList_Check(flat) || PyList_Size(flat) != count)) return false;
    Py_ssize_t place = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject *name = PyList_GetItem(names, i), *key, *parameter;
      const bool in_order = PyDict_Next(parameters, &place, &key, &parameter) && key == name;
      if (!in_order) parameter = find(parameters, name);
      if (!parameter || parameter == Py_None || (flat && PyList_GetItem(flat, i) != parameter)) return false;
      objects.push_back(kept(parameter));
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
      if (!look_at(objects[i].get(), weights[i], true) || !weights[i].is_contiguous()) return false;
    const bool half = !weights.empty() && weights[0].dtype == Dtype::bf16;
    compressed = half && find(attributes, COMPRESSED) == Py_True;
    all_half = half && !compressed;
    return (!weights_apart(described) || join_own_weights()) && understand();
  }

  // Weights of the cell's own behind the biases of each direction.
  bool join_own_weights() {
    const size_t own = static_cast<size_t>(described.cell->weights), each = described.weights() + own;
    if (!described.bias || weights.size() % each) return false;
    Views joined;
    for (size_t first = 0; first < weights.size(); first += each) {
      const View *given = &weights[first], &biases = given[Layer::B_IH];
      joined.insert(joined.end(), given, given + described.weights());
      std::vector<char>& numbers = own_.emplace_front();
      const auto append = [&](const View& v) {
        if (v.dims != 1 || v.dtype != biases.dtype) return false;
        const auto* begin = reinterpret_cast<const char*>(v.address);
        numbers.insert(numbers.end(), begin, begin + v.numel() * bytes_of(v.dtype));
        return true;
      };
      if (!append(biases)) return false;
      for (size_t k = 0; k < own; ++k) {
        const View& weight = given[described.weights() + k];
        if (!append(weight) || weight.numel() * described.cell->gates != biases.numel()) return false;
      }
      own_size_ = static_cast<int64_t>(numbers.size()) / bytes_of(biases.dtype);
      View& b_ih = joined[joined.size() - described.weights() + Layer::B_IH];
      b_ih.address = reinterpret_cast<int64_t>(numbers.data());
      b_ih.sizes = &own_size_;
    }
    weights = std::move(joined);
    return true;
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
    if (std::string_view(sizes.layer.cell->name) != described.cell->name) return false;  // it may have been added again since
    if (sizes.layer.directions != described.directions || sizes.layer.heads != described.heads) return false;
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
    const int64_t width = std::max(sizes.hidden_size * sizes.layer.cell->states, sizes.output_size);
    const int64_t bytes = product({batch, width, bytes_of(sizes.dtype)});
    if (bytes <= static_cast<int64_t>(sizeof few)) return reinterpret_cast<int64_t>(few);
    if (!many) many = std::make_unique<char[]>(static_cast<size_t>(bytes));
    return reinterpret_cast<int64_t>(many.get());
  }

  Layer described;  // by the module's attributes
  mutable Widened wide;
  Views weights;  // of each layer in turn
  std::forward_list<std::vector<char>> own_;  // biases with the cell's own weights behind them,
  int64_t own_size_ = 0;                      // so many numbers
  std::vector<Packs> packs;   // of each layer, in the place of weights
};

bool look_state(PyObject* object, View& seen) { return look(object, seen); }

// Patterns of results, what the call was given.
Results like(PyObject* x, const View& seen, const States& states) {
  Results results;
  results.like(x, seen);
  for (size_t i = 0; i < states.seen.size(); ++i) results.like(states.objects[i].get(), states.seen[i]);
  return results;
}

void run(const Stack& stack, const View& x, States& before, const View& y, States& after) {
  run_unlocked(stack.operations(x), [&] {
    before.reserve();
    before.copy(true);
    after.reserve();
    stack.run(x, before.h_or_none, before.c_or_none, y, after.h, after.c_or_none);
    after.copy(false);
  });
}

bool input_wants_gradient(PyObject* x, const States& before) {
  const auto wants = [](const Owned& state) { return wants_gradient(state.get()); };
  return wants_gradient(x) || std::any_of(before.objects.begin(), before.objects.end(), wants);
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

// (y, h), or (y, (h, c)), or with more states.
Owned with_state(const Owned& y, std::span<Owned> states) {
  const Owned state = states.size() == 1 ? std::move(states[0]) : tuple_of(states);
  return owned(PyTuple_Pack(2, y.get(), state.get()));
}

bool recompute_is_on() {
  const Owned mode = owned(PyObject_CallNoArgs(imported.recompute_is_on));
  if (!mode) throw PythonError();
  return mode.get() == Py_True;
}

// One layer of a call, by a function that takes what LayerFunction does. states: h, and c or nothing.
Owned layer_by(PyObject* function, const Stack& stack, int64_t layer, PyObject* x, std::array<Owned, 2> states) {
  std::vector<Owned> weights = stack.weights_of(layer), arguments;  // of fastrnn.autograd.LayerFunction
  arguments.reserve(FIRST_WEIGHT + weights.size());
  arguments.push_back(kept(x));
  arguments.push_back(nullptr);
  arguments.push_back(std::move(states[0]));
  arguments.push_back(std::move(states[1]));
  arguments.push_back(nullptr);  // resets
  arguments.push_back(nullptr);  // lengths
  for (const Owned* drawn : {&stack.mask, &stack.noise}) arguments.push_back(*drawn ? kept(drawn->get()) : nullptr);
  const std::string text = stack.sizes.layer.text();
  arguments.push_back(owned(PyUnicode_FromString(text.c_str())));
  arguments.push_back(owned(PyLong_FromLong(0)));
  for (Owned& weight : weights) arguments.push_back(std::move(weight));
  const Owned given = tuple_of(arguments);
  if (function == imported.without_gradients) {
    Found found = replay(text + " forward", inputs_and_weights(given.get()));
    if (!found.results.empty()) return tuple_of(found.results);
  }
  Owned results = owned(PyObject_CallObject(function, given.get()));
  if (!results) throw PythonError();
  return results;
}

// Zeros of x's kind.
Owned zeros_like(PyObject* x, const std::vector<int64_t>& sizes) {
  Owned zeros = owned(PyObject_CallMethodObjArgs(x, keys[NEW_ZEROS], shape_of(sizes).get(), nullptr));
  if (!zeros) throw PythonError();
  return zeros;
}

// Initial states of zeros, of these sizes but for the last: one tensor where both have the same.
std::array<Owned, 2> zero_states(const Stack& stack, PyObject* x_object, const View& x, std::vector<int64_t> sizes) {
  std::array<Owned, 2> states;
  Results results;
  results.like(x_object, x);
  const auto make = [&](int64_t width) {
    View seen;
    sizes.push_back(width);
    Owned made = stack.on_gpu ? zeros_like(x_object, sizes) : results.zeros(sizes, x.dtype, seen);
    sizes.pop_back();
    return made;
  };
  const LayerSizes& own = stack.sizes;
  states[0] = make(own.output_size);
  if (const int64_t width = own.layer.cell->states * own.hidden_size)
    states[1] = width == own.output_size ? kept(states[0].get()) : make(width);
  return states;
}

// h, and the others side by side, as torch sees it.
std::array<Owned, 2> together(const States& states) {
  std::array<Owned, 2> found;
  std::vector<Owned> others;
  for (const Owned& state : states.objects) others.push_back(kept(state.get()));
  found[0] = std::move(others.front());
  others.erase(others.begin());
  if (others.size() == 1) found[1] = std::move(others.front());
  if (others.size() > 1) {
    const Owned axis = owned(PyLong_FromLong(-1));
    found[1] = owned(PyObject_CallFunctionObjArgs(imported.cat, tuple_of(others).get(), axis.get(), nullptr));
    if (!found[1]) throw PythonError();
  }
  return found;
}

// All layers of a call, by a function that takes what LayerFunction does.
Owned layers_by(PyObject* function, const Stack& stack, PyObject* x_object, const View& x, const States& before) {
  const size_t kinds = stack.sizes.layer.cell->states ? 2 : 1;
  const int64_t D = stack.sizes.layer.directions;
  std::array<Owned, 2> zeros, given;
  if (before.h_or_none)
    given = together(before);
  else
    zeros = zero_states(stack, x_object, x, {D, stack.batch});
  Owned y = kept(x_object);
  std::vector<Owned> last[2];
  for (int64_t layer = 0; layer < stack.layers; ++layer) {
    std::array<Owned, 2> states;
    for (size_t i = 0; i < kinds; ++i) {
      if (zeros[i])
        states[i] = kept(zeros[i].get());
      else if (stack.layers == 1)
        states[i] = kept(given[i].get());
      else
        states[i] = owned(PyObject_CallMethod(given[i].get(), "narrow", "iLL", 0, layer * D, D));
    }
    const Owned results = layer_by(function, stack, layer, y.get(), std::move(states));
    y = kept(PyTuple_GetItem(results.get(), 0));
    for (size_t i = 0; i < kinds; ++i) last[i].push_back(kept(PyTuple_GetItem(results.get(), static_cast<Py_ssize_t>(i + 1))));
  }
  std::vector<Owned> joined;
  for (size_t i = 0; i < kinds; ++i) {
    if (stack.layers == 1)
      joined.push_back(std::move(last[i][0]));
    else
      joined.push_back(owned(PyObject_CallFunctionObjArgs(imported.cat, tuple_of(last[i]).get(), nullptr)));
    if (!joined[i]) throw PythonError();
  }
  if (const int64_t others = stack.sizes.layer.cell->states; others > 1) {
    const Owned parts = owned(PyObject_CallMethod(joined[1].get(), "chunk", "Li", static_cast<long long>(others), -1));
    if (!parts) throw PythonError();
    joined.pop_back();
    for (Py_ssize_t i = 0; i < others; ++i) joined.push_back(kept(PyTuple_GetItem(parts.get(), i)));
  }
  return with_state(y, joined);
}

// The same on a GPU, where Python says once of each kind of call whether the engine takes it.
Owned forward_on_gpu(PyObject* const* args) {
  PyObject *attributes = args[0], *x_object = args[2];
  Stack stack(true);
  View x;
  States before;
  const auto look_at = [&](PyObject* object, View& seen) { return stack.look_at(object, seen); };
  if (!is_plain(x_object) || is_watched(true) || recompute_is_on()) return nullptr;
  if (!look_at(x_object, x) || x.dims != 3 || !stack.read(attributes, args[1], false)) return nullptr;
  if (!before.read(args[3], stack.sizes.layer.cell->states, look_at)) return nullptr;
  if (!stack.takes(x, stack.sequence_layout(), before, 3)) return nullptr;
  const LayerSizes& own = stack.sizes;
  const auto [index, dtype] = *stack.place;
  const int64_t numbers[] = {stack.layers, x.size(0), x.size(1), own.hidden_size, own.output_size, dtype, index};
  const std::string text = own.layer.text();
  if (!is_taken(text, numbers, x_object, stack.objects[Layer::W_HH].get())) return nullptr;
  const bool training = differentiates(stack, x_object, before);
  if (training && (args[4] != Py_False || (stack.layers > 1 && !lowest_differentiates(stack, x_object, before)))) return nullptr;
  return layers_by(training ? imported.apply : imported.without_gradients, stack, x_object, x, before);
}

// A module's call on a CPU. draw: null, or a function that returns the mask and the noise of a single layer, or None in their
// places. It is called where nothing stands in the way any more of a call that torch differentiates; others are declined.
Owned forward_on_cpu(PyObject* const* args, PyObject* draw) {
  PyObject *attributes = args[0], *x_object = args[2];
  Stack stack;
  View x;
  States before;
  if (!is_plain(x_object) || is_watched()) return nullptr;
  if (!look(x_object, x) || x.dims != 3 || !stack.read(attributes, args[1])) return nullptr;
  if (!before.read(args[3], stack.sizes.layer.cell->states, look_state)) return nullptr;
  if (!stack.takes(x, stack.sequence_layout(), before, 3)) return nullptr;
  const bool training = differentiates(stack, x_object, before);
  if (!stack.is_compiled(training)) return nullptr;
  if (training) {
    if (stack.frozen || args[4] != Py_False || recompute_is_on()) return nullptr;
    // Layers below the first that is differentiated keep nothing: the fallback asks each.
    if (stack.layers > 1 && (draw || !lowest_differentiates(stack, x_object, before))) return nullptr;
    if (draw) stack.give_noise(owned(PyObject_CallNoArgs(draw)));
    return layers_by(stack.sizes.half ? imported.apply_half : imported.apply, stack, x_object, x, before);
  }
  if (draw) return nullptr;
  const int64_t D = stack.sizes.layer.directions, B = stack.batch, R = stack.sizes.output_size;
  View y;
  States after;
  Results results = like(x_object, x, before);
  after.make(results, {stack.layers * D, B, R}, stack.sizes, x.dtype);
  Owned y_object = results.make({x.size(0), x.size(1), D * R}, x.dtype, y);
  run(stack, x, before, y, after);
  return with_state(y_object, after.objects);
}

}  // namespace

// forward(module.__dict__, torch.nn's class by name, x, hx, module.recompute) -> (y, state) of batched dense input, or None.
PyObject* forward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&] { return is_on_gpu(args[2]) ? forward_on_gpu(args) : forward_on_cpu(args, nullptr); });
}

// forward_noisy(..., draw) -> the same of what is drawn, see forward_on_cpu.
PyObject* forward_noisy(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&] { return is_on_gpu(args[2]) ? nullptr : forward_on_cpu(args, args[5]); });
}

// step(module.__dict__, torch.nn's class by name, x, state, out) -> (y, state), which are out's if it is given, or None. Without gradients, whoever asks.
PyObject* step(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[2], *out = args[4];
    Stack stack;
    View x, y;
    States before, after;
    if (!is_plain(x_object) || is_watched()) return nullptr;
    if (!look(x_object, x) || !stack.read(attributes, args[1]) || stack.sizes.layer.directions != 1) return nullptr;
    const int64_t others = stack.sizes.layer.cell->states;
    if (!before.read(args[3], others, look_state) || !stack.takes(x, Layout::batch, before, 3) || !stack.is_compiled(false)) return nullptr;
    const int64_t B = stack.batch, R = stack.sizes.output_size;
    if (out != Py_None) {
      if (others > 1) return nullptr;
      if (!PyTuple_CheckExact(out) || PyTuple_Size(out) != 2 || !after.read(PyTuple_GetItem(out, 1), others, look_state)) return nullptr;
      if (!after.h_or_none || !look(PyTuple_GetItem(out, 0), y) || mixes(x, before, y, after)) return nullptr;
      if (!stack.takes(x, Layout::batch, after, 3) || !stack.is_state(y, R, 2)) return nullptr;
      if (aoti_torch_grad_mode_is_enabled() && input_wants_gradient(PyTuple_GetItem(out, 0), after)) return nullptr;
      std::vector<Owned> places;
      places.push_back(kept(PyTuple_GetItem(out, 0)));
      for (const Owned& state : after.objects) places.push_back(kept(state.get()));
      const Owned written = tuple_of(places);
      run(stack, x, before, y, after);
      // So that autograd notices if one of them was kept for a backward pass.
      if (!owned(PyObject_CallFunctionObjArgs(imported.increment_version, written.get(), nullptr))) throw PythonError();
      return kept(out);
    }
    Results results = like(x_object, x, before);
    after.make(results, {stack.layers, B, R}, stack.sizes, x.dtype);
    Owned y_object = results.make({B, R}, x.dtype, y);
    run(stack, x, before, y, after);
    return with_state(y_object, after.objects);
  });
}

// cell(module.__dict__, torch.nn's class by name, x, hx) -> h, or (h, c), of a batch, or None.
PyObject* cell(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *attributes = args[0], *x_object = args[2];
    Stack stack;
    View x;
    States before, after;
    if (!is_plain(x_object) || is_watched()) return nullptr;
    if (!look(x_object, x) || !stack.read(attributes, args[1])) return nullptr;
    const bool pair = stack.sizes.layer.cell->states > 0;
    if (!before.read(args[3], pair, look_state)) return nullptr;  // torch.nn's cells have no more
    // torch.nn makes absent states of the size that the module says it has
    if (!before.h_or_none && number(attributes, HIDDEN_SIZE) != stack.sizes.hidden_size) return nullptr;
    if (!stack.takes(x, Layout::batch, before, 2)) return nullptr;
    if (differentiates(stack, x_object, before)) {
      if (stack.frozen || stack.sizes.half || recompute_is_on()) return nullptr;
      std::array<Owned, 2> states;
      if (!before.h_or_none) states = zero_states(stack, x_object, x, {stack.batch});
      for (size_t i = 0; before.h_or_none && i < 1U + pair; ++i) states[i] = kept(before.objects[i].get());
      Owned results = layer_by(imported.apply_cell, stack, 0, x_object, std::move(states));
      return pair ? std::move(results) : kept(PyTuple_GetItem(results.get(), 0));
    }
    Results results = like(x_object, x, before);
    after.make(results, {stack.batch, stack.sizes.output_size}, stack.sizes, x.dtype);
    run(stack, x, before, after.h, after);  // the output is the state
    return pair ? tuple_of(after.objects) : std::move(after.objects[0]);
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
