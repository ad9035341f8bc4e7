// A pass of the GPU engine without Python: what kernels/gpu/tape.py recorded, with other tensors. That file says what a tape is,
// and the numbers of its words.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "replay.h"

namespace fastrnn {
namespace {

using torch::stable::Tensor;

enum Place : int64_t { WORKSPACE, RESULT };
enum Operation : int64_t { MM, ADDMM, BADDBMM, COPY, ZERO, SUM, CAT, LAUNCH };
enum Parameter : int64_t { POINTER, DISTANCE, NUMBER, BEGIN, END };
constexpr int64_t ALIGNED = 16;  // bytes, and numbers that kernels take for a multiple of it

// What `connect` was told.
struct Engine {
  int32_t type = -1;  // torch's number for the kind of device; -1: there is none yet
  using Blocks = unsigned;
  int (*launch)(void*, Blocks, Blocks, Blocks, Blocks, Blocks, Blocks, Blocks, void*, void**, void**);
  int (*launch_together)(void*, Blocks, Blocks, Blocks, Blocks, Blocks, Blocks, Blocks, void*, void**);
  int (*context)(void**);  // null where there are no contexts
  AOTITorchError (*mm)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle);
  using Added = AOTITorchError(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, AtenTensorHandle, double, double);
  Added *addmm, *baddbmm;
  int (*is_capturing)(void*, int*);  // a graph on this stream; null where there are no graphs
  PyObject *current_device, *current_stream, *settings, *set_products, *wrap;
} engine;

struct Tape {
  std::vector<int64_t> words;
  Owned alive;
};
// By the keys of what they are for. Neither goes before the process does: Python, whose objects a tape holds, has gone by then.
auto& tapes = *new std::unordered_map<std::string, std::shared_ptr<const Tape>>;
auto& taken = *new std::unordered_map<std::string, bool>;

// Where an operation of torch's fails, Python's way does too, with torch's words for it.
void check(AOTITorchError error) {
  if (error) throw Declined();
}

int64_t number_of(const Owned& object) {
  const int64_t value = object ? PyLong_AsLongLong(object.get()) : -1;
  if (PyErr_Occurred()) throw PythonError();
  return value;
}

// Memory of torch's, of any content.
Tensor empty(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t index) {
  AtenTensorHandle made;
  check(aoti_torch_empty_strided(dims, sizes, strides, dtype, engine.type, index, &made));
  return Tensor(made);
}

// The steps of a tape.
class Steps {
 public:
  // places: addresses of what words call places.
  Steps(const int64_t* words, const int64_t* end, const std::vector<int64_t>& places, int32_t index, void* stream)
      : at_(words), end_(end), places_(places), index_(index), stream_(stream) {}

  void run() {
    while (at_ < end_) step(next());
  }

 private:
  int64_t next() { return *at_++; }
  int64_t address() {
    const int64_t place = next(), offset = next();
    return place < 0 ? offset : places_[static_cast<size_t>(place)] + offset;
  }
  Tensor array() {
    void* data = reinterpret_cast<void*>(address());
    const auto dtype = static_cast<int32_t>(next());
    const int64_t dims = next(), *sizes = at_, *strides = at_ + dims;
    at_ += 2 * dims;
    AtenTensorHandle made;
    check(aoti_torch_create_tensor_from_blob(data, dims, sizes, strides, 0, dtype, engine.type, index_, &made));
    return Tensor(made);
  }

  void step(int64_t operation) {
    switch (operation) {
      case MM: {
        const Tensor out = array(), a = array(), b = array();
        return check(engine.mm(out.get(), a.get(), b.get()));
      }
      case ADDMM:
      case BADDBMM: {
        const Tensor out = array(), a = array(), b = array();
        const auto beta = static_cast<double>(next());
        return check((operation == ADDMM ? engine.addmm : engine.baddbmm)(out.get(), out.get(), a.get(), b.get(), beta, 1.0));
      }
      case COPY: {
        const Tensor to = array(), from = array();
        return check(aoti_torch_copy_(to.get(), from.get(), 0));
      }
      case ZERO: return check(aoti_torch_zero_(array().get()));
      case SUM: {
        Tensor out = array();
        const Tensor of = array();
        constexpr int64_t FIRST[] = {0};
        torch::stable::sum_out(out, of, torch::headeronly::IntHeaderOnlyArrayRef(FIRST, 1));
        return;
      }
      case CAT: return join();
      case LAUNCH: return launch();
      default: throw std::runtime_error("fastrnn: no such step on a tape");
    }
  }

  void join() {
    const Tensor out = array();
    const int64_t axis = next();
    std::vector<Tensor> parts(static_cast<size_t>(next()));
    for (Tensor& part : parts) part = array();
    std::array<StableIValue, 3> stack{torch::stable::detail::from(parts), torch::stable::detail::from(axis),
                                      torch::stable::detail::from(out)};
    check(torch_call_dispatcher("aten::cat", "out", stack.data(), TORCH_ABI_VERSION));
    (void)torch::stable::detail::to<Tensor>(stack[0]);
  }

  // How many numbers further than the one before it each of some tensors lies. Declines where one does not lie as far as others.
  int64_t distance() {
    const int64_t itemsize = next();
    int64_t count = next(), last = address(), found = 0;
    for (bool first = true; --count > 0; first = false) {
      const int64_t at = address(), bytes = at - std::exchange(last, at);
      if (!first && bytes != found) throw Declined();
      found = bytes;
    }
    return found / itemsize;
  }

  // A kernel's words, and where its arguments stand.
  struct Kernel {
    void* function;
    Engine::Blocks blocks[3], threads, shared;
    bool together;
    std::vector<int64_t> values;
    std::vector<void*> arguments;
    std::vector<std::pair<size_t, int64_t>> steps;  // which values are the begin or the end of a range of steps
  };

  Kernel kernel() {
    Kernel found;
    found.function = reinterpret_cast<void*>(next());
    for (auto& count : found.blocks) count = static_cast<Engine::Blocks>(next());
    found.threads = static_cast<Engine::Blocks>(next());
    found.shared = static_cast<Engine::Blocks>(next());
    found.together = next();
    found.values.resize(static_cast<size_t>(next()));
    for (size_t i = 0; i < found.values.size(); ++i) {
      found.arguments.push_back(&found.values[i]);
      const int64_t kind = next();
      if (kind == POINTER) {
        found.values[i] = address();
      } else if (kind == DISTANCE) {
        found.values[i] = distance();
        if (found.values[i] % ALIGNED) throw Declined();  // that is another kernel
      } else if (kind == NUMBER) {
        found.values[i] = next();
      } else {
        found.steps.emplace_back(i, kind);
      }
    }
    return found;
  }

  void launch() {
    const int64_t steps = next();
    const bool each = next();
    std::vector<Kernel> kernels;
    for (int64_t i = next(); i-- > 0;) kernels.push_back(kernel());
    for (int64_t begin = 0; begin < (each ? steps : 1); ++begin)
      for (Kernel& k : kernels) {
        for (const auto& [value, kind] : k.steps) k.values[value] = kind == BEGIN ? begin : each ? begin + 1 : steps;
        const auto& [x, y, z] = k.blocks;
        const int error = k.together
                              ? engine.launch_together(k.function, x, y, z, k.threads, 1, 1, k.shared, stream_, k.arguments.data())
                              : engine.launch(k.function, x, y, z, k.threads, 1, 1, k.shared, stream_, k.arguments.data(), nullptr);
        if (error) throw std::runtime_error("fastrnn: the driver could not start a kernel, CUDA error " + std::to_string(error));
      }
  }

  const int64_t *at_, *end_;
  const std::vector<int64_t>& places_;
  int32_t index_;
  void* stream_;
};

// The index of the current device, and its stream; declines where no context of the driver's is this thread's yet.
std::pair<int32_t, void*> current() {
  const Owned device = owned(PyObject_CallNoArgs(engine.current_device));
  const auto index = static_cast<int32_t>(number_of(device));
  const Owned stream = owned(PyObject_CallFunctionObjArgs(engine.current_stream, device.get(), nullptr));
  auto* handle = reinterpret_cast<void*>(number_of(stream));
  void* context = nullptr;
  if (engine.context && (engine.context(&context) || !context)) throw Declined();
  return {index, handle};
}

// What `settings` says.
class Settings {
 public:
  explicit Settings(bool float32)
      : found_(owned(PyObject_CallFunctionObjArgs(engine.settings, float32 ? Py_True : Py_False, nullptr))) {
    if (!found_) throw PythonError();
  }
  explicit operator bool() const { return found_.get() != Py_None; }
  std::string_view precision() const {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(found_.get(), 0), &length);
    if (!text) throw PythonError();
    return {text, static_cast<size_t>(length)};
  }
  PyObject* products() const { return PyTuple_GetItem(found_.get(), 1); }

 private:
  Owned found_;
};

// torch's float32 products as a tape wants them, while this lives. change: what they are set to, and back to, or None.
class Products {
 public:
  explicit Products(PyObject* change) : change_(change) {
    if (!set(0)) throw PythonError();
  }
  ~Products() {
    if (!set(1)) PyErr_Clear();
  }
  Products(const Products&) = delete;
  Products& operator=(const Products&) = delete;

 private:
  bool set(Py_ssize_t which) const {
    return change_ == Py_None || owned(PyObject_CallFunctionObjArgs(engine.set_products, PyTuple_GetItem(change_, which), nullptr));
  }
  PyObject* change_;
};

// Without Python's lock.
template <class Work>
void unlocked(const Work& work) {
  struct Unlocked {
    PyThreadState* state = PyEval_SaveThread();
    ~Unlocked() { PyEval_RestoreThread(state); }
  } lock;
  work();
}

void append(std::string& key, const int64_t* numbers, int64_t count) {
  key.append(reinterpret_cast<const char*>(numbers), static_cast<size_t>(count) * sizeof *numbers);
}

}  // namespace

bool is_on_gpu(PyObject* object) {
  OnGpu where;
  View seen;
  return look_on_gpu(object, seen, where);
}

bool look_on_gpu(PyObject* object, View& seen, OnGpu& where) {
  return engine.type >= 0 && look_on_gpu(object, seen, where, engine.type);
}

bool is_taken(const std::string& text, const int64_t (&numbers)[7], PyObject* x, PyObject* w_hh) {
  std::string key = text;
  append(key, numbers, std::size(numbers));
  const Settings settings(numbers[5] == aoti_torch_dtype_float32());
  if (!settings) return false;
  key += settings.precision();
  const auto known = taken.find(key);
  if (known != taken.end()) return known->second;
  const Owned layers = owned(PyLong_FromLongLong(numbers[0])), words = owned(PyUnicode_FromString(text.c_str()));
  if (!layers || !words) throw PythonError();
  const Owned answer = owned(PyObject_CallFunctionObjArgs(imported.engine_takes, words.get(), x, w_hh, layers.get(), nullptr));
  if (!answer) throw PythonError();
  return taken[key] = answer.get() == Py_True;
}

std::vector<PyObject*> inputs_and_weights(PyObject* tuple) {
  std::vector<PyObject*> tensors;
  for (Py_ssize_t i = 0; i < PyTuple_Size(tuple); ++i)
    if (i < OPTIONS || i >= FIRST_WEIGHT) tensors.push_back(PyTuple_GetItem(tuple, i));
  return tensors;
}

Found replay(std::string name, const std::vector<PyObject*>& tensors) {
  Found found;
  if (engine.type < 0 || is_watched(true)) return found;
  std::string key = std::move(name);
  key.reserve(1024);
  std::vector<int64_t> places;
  places.reserve(32);
  std::optional<int32_t> device;
  bool float32 = false, packed = false;  // what a pass does with a packed sequence depends on its sizes
  for (PyObject* object : tensors) {
    View seen;
    OnGpu where;
    int64_t head[3] = {-1};
    if (object != Py_None && places.size() == BATCH_SIZES) {
      packed = look(object, seen) && seen.dtype == Dtype::i64 && seen.dims == 1;
      if (!packed) return found;
    } else if (object != Py_None) {
      if (!look_on_gpu(object, seen, where) || seen.address % ALIGNED || device.value_or(where.index) != where.index) return found;
      device = where.index;
      head[0] = where.dtype;
      float32 |= seen.dtype == Dtype::f32;
    }
    head[1] = seen.dims;
    append(key, head, 2);
    append(key, seen.sizes, seen.dims);
    append(key, seen.strides, seen.dims);
    if (places.size() == BATCH_SIZES && packed) append(key, reinterpret_cast<const int64_t*>(seen.address), seen.numel());
    places.push_back(seen.address);
  }
  const auto [index, stream] = current();
  if (!device || index != *device) return found;
  if (packed) {  // Python knows how long a graph, or another stream, may read what follows from the sizes: see packed.py
    int status = 0;
    if (engine.is_capturing && (engine.is_capturing(stream, &status) || status)) return found;
    const auto handle = reinterpret_cast<int64_t>(stream);
    append(key, &handle, 1);
  }
  const Settings settings(float32);
  if (!settings) return found;
  key += settings.precision();
  key += static_cast<char>(index);
  const auto known = tapes.find(key);
  if (known == tapes.end()) {
    found.key = owned(PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size())));
    return found;
  }

  const std::shared_ptr<const Tape> tape = known->second;
  const int64_t* at = tape->words.data();
  const int64_t *const end = tape->words.data() + tape->words.size(), bytes = *at++, alarm = *at++, made = *at++;
  if (alarm && *reinterpret_cast<const volatile int32_t*>(alarm)) return found;  // Python's way says what happened
  std::vector<Tensor> results;
  std::span<const int64_t> order;
  {
    const Products products(settings.products());
    unlocked([&] {
      constexpr int64_t ONE[] = {1};
      std::optional<Tensor> workspace;
      if (bytes) workspace = empty(1, &bytes, ONE, aoti_torch_dtype_uint8(), index);
      const int64_t begin = workspace ? reinterpret_cast<int64_t>(workspace->data_ptr()) : 0;
      for (int64_t i = 0; i < made; ++i) {
        if (*at++ == WORKSPACE) {
          places.push_back(begin + *at++);
          continue;
        }
        const auto dtype = static_cast<int32_t>(*at++);
        const int64_t dims = *at++;
        results.push_back(empty(dims, at, at + dims, dtype, index));
        places.push_back(reinterpret_cast<int64_t>(results.back().data_ptr()));
        at += 2 * dims;
      }
      order = {at + 1, static_cast<size_t>(*at)};
      Steps(order.data() + order.size(), end, places, index, stream).run();
    });
  }
  std::vector<Owned> wrapped(results.size());
  const Owned handles = owned(PyList_New(static_cast<Py_ssize_t>(results.size())));
  if (!handles) throw PythonError();
  for (size_t i = 0; i < results.size(); ++i) {
    AtenTensorHandle handle;
    check(aoti_torch_new_tensor_handle(results[i].get(), &handle));
    PyObject* capsule = PyCapsule_New(handle, nullptr, nullptr);
    if (!capsule) throw PythonError();
    PyList_SetItem(handles.get(), static_cast<Py_ssize_t>(i), capsule);
  }
  const Owned made_objects = owned(PyObject_CallFunctionObjArgs(engine.wrap, handles.get(), nullptr));
  if (!made_objects) throw PythonError();
  for (const int64_t which : order)
    found.results.push_back(kept(which < 0 ? PyTuple_GetItem(tape->alive.get(), static_cast<Py_ssize_t>(-1 - which))
                                           : PyList_GetItem(made_objects.get(), static_cast<Py_ssize_t>(which))));
  return found;
}

// replay(name, tensors) -> the results of a pass in a list; the key of one that has no tape; None where it has to run in Python.
PyObject* replay(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    Py_ssize_t length = 0;
    const char* name = PyUnicode_AsUTF8AndSize(args[0], &length);
    if (!name) throw PythonError();
    std::vector<PyObject*> tensors;
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[1]); ++i) tensors.push_back(PyTuple_GetItem(args[1], i));
    Found found = replay(std::string(name, static_cast<size_t>(length)), tensors);
    if (found.results.empty()) return std::move(found.key);
    Owned list = owned(PyList_New(static_cast<Py_ssize_t>(found.results.size())));
    if (!list) throw PythonError();
    Py_ssize_t at = 0;
    for (Owned& result : found.results) PyList_SetItem(list.get(), at++, result.release());
    return list;
  });
}

namespace {

std::vector<int64_t> words_of(PyObject* bytes) {
  char* data;
  Py_ssize_t length;
  if (PyBytes_AsStringAndSize(bytes, &data, &length)) throw PythonError();
  std::vector<int64_t> words(static_cast<size_t>(length) / sizeof(int64_t));
  std::memcpy(words.data(), data, words.size() * sizeof(int64_t));
  return words;
}

}  // namespace

// keep(key, words, what has to stay alive: first the results that never change)
PyObject* keep(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    char* key;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(args[0], &key, &length)) throw PythonError();
    auto tape = std::make_shared<const Tape>(Tape{words_of(args[1]), kept(args[2])});
    tapes.insert_or_assign(std::string(key, static_cast<size_t>(length)), std::move(tape));
    return nullptr;
  });
}

// forget(): all tapes.
PyObject* forget(PyObject*, PyObject* const*, Py_ssize_t) {
  const auto gone = std::exchange(tapes, {});  // before others run
  taken.clear();
  Py_RETURN_NONE;
}

// launch(words of LAUNCH) on the current device and stream.
PyObject* launch(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const std::vector<int64_t> words = words_of(args[0]), places;
    const auto [index, stream] = current();
    unlocked([&, index = index, stream = stream] { Steps(words.data(), words.data() + words.size(), places, index, stream).run(); });
    return nullptr;
  });
}

// connect(kind of device, addresses of functions, current_device, current_stream, settings, set_products, wrap): what `Engine` has.
PyObject* connect(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    const char* type = PyUnicode_AsUTF8AndSize(args[0], nullptr);
    if (!type || !PyTuple_Check(args[1]) || PyTuple_Size(args[1]) != 7) throw std::runtime_error("fastrnn: connect wants seven");
    const auto function = [&](Py_ssize_t i, auto& place) {
      void* address = PyLong_AsVoidPtr(PyTuple_GetItem(args[1], i));
      if (PyErr_Occurred()) throw PythonError();
      place = reinterpret_cast<std::remove_reference_t<decltype(place)>>(address);
    };
    Engine told;
    function(0, told.launch);
    function(1, told.launch_together);
    function(2, told.context);
    function(3, told.is_capturing);
    function(4, told.mm);
    function(5, told.addmm);
    function(6, told.baddbmm);
    PyObject** const objects[] = {&told.current_device, &told.current_stream, &told.settings, &told.set_products, &told.wrap};
    for (size_t i = 0; i < std::size(objects); ++i) *objects[i] = kept(args[2 + i]).release();
    told.type = std::strcmp(type, "cuda") == 0 ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
    engine = told;
    return nullptr;
  });
}

}  // namespace fastrnn
