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
  Views all(const Tensors& given, bool read = true) {
    Views seen;
    for (const Tensor& t : given) seen.push_back(contiguous(t, read));
    return seen;
  }
  View zeros_like(const Tensor& t) {
    copies_.push_front(torch::stable::empty_like(t));
    torch::stable::zero_(copies_.front());
    return rows(copies_.front());
  }

  // gradients: which of them are asked for, in backward.
  Layer layer(const Tensor& x, const MaybeTensor& batch_sizes, const Tensor& h0, const MaybeTensor& c0, const Tensors& w_ih,
              const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh, const Tensors& w_hr, const std::string& name,
              bool reverse, bool batch_first, const Gradients* gradients = nullptr) {
    Layer seen{};
    seen.cell = find_cell([&](const Cell& c) { return name == c.name; });
    STD_TORCH_CHECK(seen.cell, "fastrnn: unknown cell '", name, "'");
    STD_TORCH_CHECK(batch_sizes || x.dim() == 3, "fastrnn: x has ", x.dim(), " dimensions");
    STD_TORCH_CHECK(!batch_sizes || batch_sizes->dim() == 1, "fastrnn: expected batch_sizes of int64 [T] on the CPU");
    seen.reverse = reverse;
    seen.batch_first = batch_first;
    seen.x = view(x, true);
    seen.batch_sizes = contiguous(batch_sizes);
    const Reads reads = gradients ? Reads(seen, *gradients) : Reads();
    seen.x = rows(x, reads.x);
    seen.h0 = contiguous(h0);
    seen.c0 = contiguous(c0);
    seen.w_ih = all(w_ih, reads.w_ih);
    seen.w_hh = all(w_hh, reads.w_hh);
    seen.b_ih = all(b_ih, reads.biases);
    seen.b_hh = all(b_hh, reads.biases);
    seen.w_hr = all(w_hr);
    return seen;
  }

 private:
  std::forward_list<Tensor> copies_;
};

// An op's results, made as the call asks for them; weights' gradients of all directions as one tensor, one below the other.
template <size_t Count>
class Outputs {
 public:
  explicit Outputs(size_t directions) : directions_(static_cast<int64_t>(directions)) {}

  Make make() {
    return [this](size_t result, std::vector<int64_t> sizes, Dtype dtype, size_t direction) {
      const int64_t height = sizes[0];
      if (Count == FORWARD_RESULTS && result == SAVED) return view(made_[result].emplace(empty_kept(sizes, code_of(dtype))));
      if (Count == BACKWARD_RESULTS && result >= DW_IH) sizes[0] *= directions_;
      if (direction == 0) made_[result].emplace(empty_tensor(sizes, code_of(dtype)));
      View part = view(*made_[result]);
      part.address += static_cast<int64_t>(direction) * height * part.strides[0] * bytes_of(dtype);
      return part;
    };
  }
  // One that was not made is a tensor without numbers, its own: outputs of an op may not share memory.
  Tensor take(size_t result, Dtype dtype) { return made_[result] ? *made_[result] : empty_tensor({0}, code_of(dtype)); }

 private:
  int64_t directions_;
  std::array<MaybeTensor, Count> made_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(
    const Tensor& x, const MaybeTensor& batch_sizes, const Tensor& h0, const MaybeTensor& c0, const Tensors& w_ih,
    const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh, const Tensors& w_hr, const std::string& cell, bool reverse,
    bool batch_first, bool save) {
  Copies copies;
  Outputs<FORWARD_RESULTS> results(w_ih.size());
  const Layer layer = copies.layer(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first);
  forward_call(layer, save, results.make()).run(true);
  const auto take = [&](size_t result) { return results.take(result, layer.x.dtype); };
  return {take(Y), take(H_N), take(C_N), take(SAVED)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const Tensor& x, const MaybeTensor& batch_sizes,
    const Tensor& h0, const MaybeTensor& c0, const Tensors& w_ih, const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh,
    const Tensors& w_hr, const Tensor& y, const Tensor& saved, const std::string& cell, bool reverse, bool batch_first,
    bool need_dx, bool need_dh0, bool need_dw) {
  Copies copies;
  Outputs<BACKWARD_RESULTS> results(w_ih.size());
  const View outer = dy ? copies.rows(*dy) : copies.zeros_like(y);
  const Gradients gradients{outer, copies.contiguous(dh_n), copies.contiguous(dc_n), need_dx, need_dh0, need_dw};
  const Layer layer =
      copies.layer(x, batch_sizes, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, cell, reverse, batch_first, &gradients);
  backward_call(layer, gradients, copies.rows(y), copies.contiguous(saved), results.make()).run(false);
  const auto take = [&](size_t result) { return results.take(result, layer.x.dtype); };
  return {take(DX), take(DH0), take(DC0), take(DW_IH), take(DW_HH), take(DB_IH), take(DB_HH), take(DW_HR)};
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
