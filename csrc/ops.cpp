// The raw layer ops on a CPU. Schemas and shapes: fastrnn/ops.py. Built on torch's stable ABI, without ATen headers.
#include "ops.h"

#include <array>
#include <forward_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "layer.h"
#include "memory.h"
#include "tensors.h"

namespace fastrnn {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// unread: its memory need not be there.
View view(const Tensor& t, bool unread = false) {
  View seen;
  STD_TORCH_CHECK(see(t.get(), seen), "fastrnn: expected tensors with strides");
  if (!unread) check_in_memory(t.get(), seen);
  return seen;
}

int32_t code_of(Dtype dtype) {
  return dtype == Dtype::f64    ? aoti_torch_dtype_float64()
         : dtype == Dtype::bf16 ? aoti_torch_dtype_bfloat16()
                                : aoti_torch_dtype_float32();
}

// Tensors as views: copies, where the kernels need what is contiguous, live as long as this. read: whether they read it at all.
class Copies {
 public:
  View contiguous(const Tensor& t, bool read = true) {
    const View seen = view(t, !read);
    return !read || seen.is_contiguous() ? seen : view(copies_.emplace_front(torch::stable::contiguous(t)));
  }
  View contiguous(const MaybeTensor& t) { return t ? contiguous(*t) : View(); }
  View rows(const Tensor& t, bool read = true) {
    const View seen = view(t, !read);
    return !read || (seen.dims > 0 && seen.stride(-1) == 1) ? seen : contiguous(t);
  }
  // dy: rows too, or one number, again and again.
  View rows_of_gradient(const Tensor& t) {
    const View seen = view(t);
    return Repeated::is(seen) && seen.dtype != Dtype::bf16 ? repeated_.row(seen) : rows(t);
  }
  View zeros_like(const View& y) {
    STD_TORCH_CHECK(y.dims > 0 && (y.dtype == Dtype::f32 || y.dtype == Dtype::f64), "fastrnn: y has no such dtype or shape");
    return repeated_.zeros(y);
  }

  // gradients: which of them are asked for, in backward.
  Inputs inputs(const Tensor& x, const MaybeTensor& batch_sizes, const Tensor& h0, const MaybeTensor& c0,
                const Tensors& weights, const std::string& text, const MaybeTensor& resets, const MaybeTensor& lengths,
                const MaybeTensor& mask, const MaybeTensor& noise, const Gradients* gradients = nullptr) {
    const auto layer = Layer::of(text);
    STD_TORCH_CHECK(layer, "fastrnn: unknown layer '", text, "'");
    STD_TORCH_CHECK(batch_sizes || x.dim() == 3, "fastrnn: x has ", x.dim(), " dimensions");
    STD_TORCH_CHECK(!batch_sizes || batch_sizes->dim() == 1, "fastrnn: expected batch_sizes of int64 [T] on the CPU");
    Inputs seen{};
    seen.layer = *layer;
    seen.x = view(x, true);
    seen.batch_sizes = contiguous(batch_sizes);
    const Reads reads = gradients ? Reads(seen, *gradients) : Reads();
    seen.x = rows(x, reads.x);
    seen.h0 = contiguous(h0);
    seen.c0 = contiguous(c0);
    if (resets) seen.resets = view(*resets);
    seen.lengths = contiguous(lengths);
    seen.mask = contiguous(mask);
    if (noise) seen.noise = rows(*noise);
    for (size_t i = 0; i < weights.size(); ++i) seen.weights.push_back(contiguous(weights[i], reads.weight(layer->weight(i))));
    return seen;
  }

 private:
  std::forward_list<Tensor> copies_;
  Repeated repeated_;
};

// An op's results, made as the call asks for them.
template <size_t Count>
class Outputs {
 public:
  explicit Outputs(Dtype dtype) : dtype_(dtype) {}

  Make make() {
    return [this](size_t result, const std::vector<int64_t>& sizes, Dtype dtype, size_t direction) {
      const bool kept = Count == FORWARD_RESULTS && result == SAVED;
      MaybeTensor& made = made_[direction][result];
      return view(made.emplace(kept ? empty_kept(sizes, code_of(dtype)) : empty_tensor(sizes, code_of(dtype))));
    };
  }
  // One that was not made is a tensor without numbers, its own: outputs of an op may not share memory.
  Tensor take(size_t result) { return made_[0][result] ? *made_[0][result] : empty_tensor({0}, code_of(dtype_)); }
  // Those of the weights, if they were made.
  Tensors take_weights(const Layer& layer, size_t count) {
    Tensors taken;
    for (size_t i = 0; i < count; ++i)
      if (MaybeTensor& made = made_[layer.direction(i)][gradient_of(layer.weight(i))]) taken.push_back(*made);
    return taken;
  }

 private:
  Dtype dtype_;
  std::array<std::array<MaybeTensor, Count>, 2> made_;  // of each direction, or all that there is in the first
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(const Tensor& x, const MaybeTensor& batch_sizes, const Tensor& h0,
                                                         const MaybeTensor& c0, const Tensors& weights, const std::string& text,
                                                         bool save, const MaybeTensor& resets, const MaybeTensor& lengths,
                                                         const MaybeTensor& mask, const MaybeTensor& noise) {
  Copies copies;
  const Inputs inputs = copies.inputs(x, batch_sizes, h0, c0, weights, text, resets, lengths, mask, noise);
  Outputs<FORWARD_RESULTS> results(inputs.x.dtype);
  forward_call(inputs, save, results.make()).run(true);
  return {results.take(Y), results.take(H_N), results.take(C_N), results.take(SAVED)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> layer_backward(const MaybeTensor& dy, const MaybeTensor& dh_n,
                                                           const MaybeTensor& dc_n, const Tensor& x,
                                                           const MaybeTensor& batch_sizes, const Tensor& h0,
                                                           const MaybeTensor& c0, const Tensors& weights, const Tensor& y,
                                                           const Tensor& saved, const std::string& text,
                                                           const std::vector<bool>& needs, const MaybeTensor& resets,
                                                           const MaybeTensor& lengths, const MaybeTensor& mask,
                                                           const MaybeTensor& noise) {
  STD_TORCH_CHECK(needs.size() == 3, "fastrnn: needs has ", needs.size(), " members, expected those of dx, dh0 and dw");
  Copies copies;
  const View of_y = copies.rows(y), outer = dy ? copies.rows_of_gradient(*dy) : copies.zeros_like(of_y);
  const Gradients gradients{outer, copies.contiguous(dh_n), copies.contiguous(dc_n), View(), needs[0], needs[1], needs[2]};
  const Inputs inputs = copies.inputs(x, batch_sizes, h0, c0, weights, text, resets, lengths, mask, noise, &gradients);
  Outputs<BACKWARD_RESULTS> results(inputs.x.dtype);
  backward_call(inputs, gradients, of_y, copies.contiguous(saved), results.make()).run(false);
  return {results.take(DX), results.take(DH0), results.take(DC0), results.take_weights(inputs.layer, weights.size())};
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("layer_forward", TORCH_BOX(&layer_forward));
  m.impl("layer_backward", TORCH_BOX(&layer_backward));
}

}  // namespace

void register_ops() {
  using Library = torch::stable::detail::StableTorchLibraryInit;
  static const Library library(torch::stable::detail::StableLibrary::Kind::IMPL, implement, "fastrnn", "CPU", __FILE__, __LINE__);
}

}  // namespace fastrnn
