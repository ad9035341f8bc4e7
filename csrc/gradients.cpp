// The fast path of a layer's autograd.Function, see fastrnn/autograd.py: the raw ops past the dispatcher. None means that it
// declines.
#include <array>
#include <iterator>
#include <optional>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "python.h"
#include "replay.h"
#include "tensors.h"

namespace fastrnn {
namespace {

// What layer_forward and layer_backward have in common. Numbers in bfloat16 but for matrices are widened first, where there are
// few: the ops get float32.
class Arguments {
 public:
  // The first eight of a tuple: x, batch_sizes, h0, c0, resets, lengths, mask, noise; and its weights, from the eleventh on. False
  // where that is not what a kernel reads.
  bool tensors(PyObject* tuple, const Reads& reads) {
    const Py_ssize_t count = PyTuple_Size(tuple) - FIRST_WEIGHT;
    results.like(imported.float32_pattern, FLOAT32);
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* object = PyTuple_GetItem(tuple, FIRST_WEIGHT + i);
      View& seen = inputs.weights.emplace_back();
      const Layer::Weight which = inputs.layer.weight(i);
      const bool matrix = which != Layer::B_IH && which != Layer::B_HH, unread = !reads.weight(which);
      if (matrix ? !whole(object, seen, unread) : !numbers(object, seen, bias, true, unread)) return false;
    }
    return numbers(PyTuple_GetItem(tuple, 0), inputs.x, x, false, !reads.x) &&
           maybe(PyTuple_GetItem(tuple, 1), inputs.batch_sizes) &&
           numbers(PyTuple_GetItem(tuple, 2), inputs.h0, h) && maybe_numbers(PyTuple_GetItem(tuple, 3), inputs.c0, c) &&
           maybe(PyTuple_GetItem(tuple, 4), inputs.resets) && maybe(PyTuple_GetItem(tuple, 5), inputs.lengths) &&
           maybe(PyTuple_GetItem(tuple, 6), inputs.mask) && maybe_rows(PyTuple_GetItem(tuple, 7), inputs.noise);
  }
  // Two of a tuple: the layer as text, and segments. False in recompute mode.
  bool options(PyObject* tuple, Py_ssize_t at) {
    Py_ssize_t length = 0;
    const char* text = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(tuple, at), &length);
    const auto segments = PyLong_AsLong(PyTuple_GetItem(tuple, at + 1));
    if (PyErr_Occurred()) throw PythonError();
    const auto layer = Layer::of({text, static_cast<size_t>(length)});
    if (layer) inputs.layer = *layer;
    return layer && !segments;
  }
  bool whole(PyObject* object, View& seen, bool unread = false) {
    if (!look(object, seen, true, unread)) return false;
    results.like(object, seen);
    return seen.is_contiguous();
  }
  bool maybe_rows(PyObject* object, View& seen) {
    if (object == Py_None) return true;
    if (!look(object, seen, true, false)) return false;
    return seen.dims > 0 && seen.stride(-1) == 1;
  }
  bool maybe(PyObject* object, View& seen) { return object == Py_None || whole(object, seen); }
  // dtype: what it was before it was widened.
  bool numbers(PyObject* object, View& seen, Dtype& dtype, bool contiguous = true, bool unread = false) {
    if (!look(object, seen, true, unread)) return false;
    results.like(object, seen);
    dtype = seen.dtype;
    if (dtype != Dtype::bf16) return (dtype == Dtype::f32 || dtype == Dtype::f64) && (!contiguous || seen.is_contiguous());
    if (!seen.is_contiguous() || seen.numel() > FEW) return false;
    seen = unread ? wide.like(seen) : wide.of(seen);
    return true;
  }
  bool maybe_numbers(PyObject* object, View& seen, Dtype& dtype) { return object == Py_None || numbers(object, seen, dtype); }
  // A gradient from outside, which may be one number, again and again. rows: of a sequence; else it is to be contiguous.
  bool gradient(PyObject* object, View& seen, bool rows) {
    Dtype any;
    if (!look_strided(object, seen) || !Repeated::is(seen)) return numbers(object, seen, any, !rows);
    seen = rows ? repeated.row(seen) : repeated.all(seen);
    return true;
  }

  Inputs inputs{};
  Dtype x{}, h{}, c{}, bias{};
  Widened wide;
  Repeated repeated;
  Results results;

 private:
  static constexpr int64_t FEW = 1 << 16;  // of more torch's threads convert a part each
  static constexpr int64_t ONE[] = {1};
  static constexpr View FLOAT32{0, 1, ONE, ONE, Dtype::f32};
};

// Results of an op, made as the call asks for them, some to be rounded to bfloat16 in the end.
template <size_t Count>
class MadeResults {
 public:
  // dtypes: of each result, where it is float32 for the op. wide: the result that is to be had unrounded too.
  MadeResults(Arguments& own, const std::array<Dtype, Count>& dtypes, size_t wide = Count)
      : own_(own), dtypes_(dtypes), wide_result_(wide) {}

  Make make() {
    return [this](size_t result, const std::vector<int64_t>& sizes, Dtype dtype, size_t direction) {
      const bool half = dtype == Dtype::f32 && dtypes_[result] == Dtype::bf16;
      View seen;
      made[direction][result] = own_.results.make(sizes, half ? Dtype::bf16 : dtype, seen);
      if (seen.numel() * bytes_of(dtype) >= MAPPED_BYTES) throw Declined();  // the op has better memory for them
      if (!half) return seen;
      View wide;
      if (result == wide_result_)
        unrounded = own_.results.make(sizes, dtype, wide);
      else
        wide = own_.wide.like(seen);
      to_round_.emplace_back(wide, seen);
      return wide;
    };
  }
  void run(Call call, bool forward) {
    run_unlocked(static_cast<double>(call.operations(forward)), [&] {
      call.run(forward);
      for (const auto& [wide, half] : to_round_) round(wide, half);
    });
  }

  std::array<std::array<Owned, Count>, 2> made;  // of each direction, or all that there is in the first
  Owned unrounded;

 private:
  Arguments& own_;
  std::array<Dtype, Count> dtypes_;
  size_t wide_result_;
  std::vector<std::pair<View, View>> to_round_;
};

// The text of a layer at a place of a tuple, behind which stands the number of segments; nothing in recompute mode.
std::optional<std::string> text_of(PyObject* tuple, Py_ssize_t at) {
  const char* text = PyUnicode_AsUTF8AndSize(PyTuple_GetItem(tuple, at), nullptr);
  const auto segments = PyLong_AsLong(PyTuple_GetItem(tuple, at + 1));
  if (PyErr_Occurred()) throw PythonError();
  return segments ? std::nullopt : std::optional<std::string>(text);
}

// A result of the GPU engine, and nothing in the place of an empty one.
Owned there(Owned result) {
  View seen;
  OnGpu where;
  return look_on_gpu(result.get(), seen, where) && seen.numel() == 0 && seen.dims == 1 ? nullptr : std::move(result);
}

Owned forward_on_gpu(PyObject* arguments) {
  const auto text = text_of(arguments, OPTIONS);
  if (!text) return nullptr;
  Found found = replay(*text + " forward saved", inputs_and_weights(arguments));
  if (found.results.empty()) return nullptr;
  found.results[C_N] = there(std::move(found.results[C_N]));
  return tuple_of(found.results);
}

Owned backward_on_gpu(PyObject* outer, PyObject* tensors, PyObject* options, PyObject* needs) {
  const auto text = text_of(options, 0);
  const auto needed = [&](Py_ssize_t input) { return PyTuple_GetItem(needs, input) == Py_True; };
  if (!text) return nullptr;
  std::vector<PyObject*> given = inputs_and_weights(tensors);
  bool weights = false, any = false;
  for (Py_ssize_t i = FIRST_WEIGHT; i < PyTuple_Size(needs); ++i) weights |= needed(i);
  for (const Py_ssize_t i : {0, 1}) given.push_back(PyTuple_GetItem(tensors, OPTIONS + i));  // y, saved
  for (const Py_ssize_t i : {0, 1, 2}) {
    given.push_back(PyTuple_GetItem(outer, i));
    any |= given.back() != Py_None;
  }
  if (!any) return nullptr;
  std::string name = *text + " backward";
  for (const bool need : {needed(0), needed(2) || needed(3), weights}) name += need ? '1' : '0';
  Found made = replay(std::move(name), given);
  if (made.results.empty()) return nullptr;
  std::vector<Owned> found(static_cast<size_t>(PyTuple_Size(needs)));
  found[0] = there(std::move(made.results[DX]));
  found[2] = there(std::move(made.results[DH0]));
  found[3] = there(std::move(made.results[DC0]));
  std::move(made.results.begin() + DC0 + 1, made.results.end(), found.begin() + FIRST_WEIGHT);
  return tuple_of(found);
}

}  // namespace

// layer_forward(arguments of fastrnn.autograd.LayerFunction) -> its results, None for those that are not there, and y before it
// was rounded, or None. Declines a call that is watched.
PyObject* layer_forward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    Arguments own;
    if (!PyTuple_Check(args[0]) || PyTuple_Size(args[0]) < FIRST_WEIGHT) return nullptr;
    if (is_on_gpu(PyTuple_GetItem(args[0], 0))) return forward_on_gpu(args[0]);
    if (is_watched() || !own.options(args[0], OPTIONS) || !own.tensors(args[0], Reads())) return nullptr;
    MadeResults<FORWARD_RESULTS> results(own, {own.x, own.x, own.x, Dtype::f32}, Y);
    results.run(forward_call(own.inputs, true, results.make()), true);
    auto& made = results.made[0];
    std::vector<Owned> found(std::make_move_iterator(made.begin()), std::make_move_iterator(made.end()));
    found.push_back(std::move(results.unrounded));
    return tuple_of(found);
  });
}

// layer_backward((dy, dh_n, dc_n), what it has kept, its options, its needs_input_grad) -> the gradients of its inputs.
// Declines a call that is watched or differentiated.
PyObject* layer_backward(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    PyObject *outer = args[0], *tensors = args[1], *options = args[2], *needs = args[3];
    Arguments own;
    const Py_ssize_t inputs = PyTuple_Size(needs);
    if (PyErr_Occurred()) throw PythonError();
    if (aoti_torch_grad_mode_is_enabled() || inputs < FIRST_WEIGHT) return nullptr;
    if (PyTuple_Size(outer) != 3 || PyTuple_Size(tensors) != inputs || PyTuple_Size(options) != 2) return nullptr;
    if (is_on_gpu(PyTuple_GetItem(tensors, 0))) return backward_on_gpu(outer, tensors, options, needs);
    if (is_watched()) return nullptr;
    if (!own.options(options, 0)) return nullptr;
    const auto needed = [&](Py_ssize_t input) { return PyTuple_GetItem(needs, input) == Py_True; };
    Gradients gradients{};
    gradients.need_dx = needed(0);
    gradients.need_dh0 = needed(2) || needed(3);
    for (Py_ssize_t i = FIRST_WEIGHT; i < inputs; ++i) gradients.need_dw |= needed(i);
    View x, y, saved;
    if (!look(PyTuple_GetItem(tensors, 0), x, true, true)) return nullptr;
    if (!own.maybe(PyTuple_GetItem(tensors, 1), own.inputs.batch_sizes)) return nullptr;
    own.inputs.x = x;
    if (!own.tensors(tensors, Reads(own.inputs, gradients))) return nullptr;
    Dtype any;
    if (!own.numbers(PyTuple_GetItem(tensors, 8), y, any, false)) return nullptr;
    if (!own.whole(PyTuple_GetItem(tensors, 9), saved)) return nullptr;
    PyObject *dy = PyTuple_GetItem(outer, 0), *dh_n = PyTuple_GetItem(outer, 1), *dc_n = PyTuple_GetItem(outer, 2);
    if (dh_n != Py_None && !own.gradient(dh_n, gradients.dh_n, false)) return nullptr;
    if (dc_n != Py_None && !own.gradient(dc_n, gradients.dc_n, false)) return nullptr;
    if (dy != Py_None && !own.gradient(dy, gradients.dy, true)) return nullptr;
    if (!gradients.dy.dims && !gradients.dh_n.dims && !gradients.dc_n.dims) return nullptr;
    if (!gradients.dy.dims) gradients.dy = own.repeated.zeros(y);
    const Dtype as_made = Dtype::f32;
    MadeResults<BACKWARD_RESULTS> results(own, {own.x, own.h, own.c, as_made, as_made, own.bias, own.bias, as_made});
    results.run(backward_call(own.inputs, gradients, y, saved, results.make()), false);
    auto& made = results.made;
    std::vector<Owned> found(static_cast<size_t>(inputs));
    found[0] = std::move(made[0][DX]);
    found[2] = std::move(made[0][DH0]);
    found[3] = std::move(made[0][DC0]);
    const Layer& layer = own.inputs.layer;
    for (size_t i = 0; i < own.inputs.weights.size(); ++i)
      found[FIRST_WEIGHT + i] = std::move(made[layer.direction(i)][gradient_of(layer.weight(i))]);
    return tuple_of(found);
  });
}

}  // namespace fastrnn
