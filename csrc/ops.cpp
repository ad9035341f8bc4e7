// The raw layer ops on a CPU. Schemas and shapes: fastrnn/ops.py. Built on torch's stable ABI, without ATen headers.
#include "ops.h"

#include <algorithm>
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

namespace fastrnn {
namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

int32_t dtype_code(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

View view(const Tensor& t) {
  View seen;
  seen.address = reinterpret_cast<int64_t>(t.data_ptr());
  seen.dims = t.dim();
  seen.sizes = t.sizes().data();
  seen.strides = t.strides().data();
  const int32_t code = dtype_code(t);
  if (t.is_cpu()) {
    if (code == aoti_torch_dtype_float32()) seen.kind = Kind::f32;
    if (code == aoti_torch_dtype_float64()) seen.kind = Kind::f64;
    if (code == aoti_torch_dtype_bfloat16()) seen.kind = Kind::bf16;
  }
  return seen;
}

const Cell& find_cell(const std::string& name) {
  const auto cell = std::find_if(std::begin(CELLS), std::end(CELLS), [&](const Cell& c) { return name == c.name; });
  STD_TORCH_CHECK(cell != std::end(CELLS), "fastrnn: unknown cell '", name, "'");
  return *cell;
}

// The arguments that both ops have, as a call: copies, where the kernels need what is contiguous, live as long as this.
class Op {
 public:
  Op(const Tensor& x, const MaybeTensor& batch_sizes, const Tensors& w_ih, const Tensors& w_hh, const Tensors& w_hr,
     const std::string& cell, bool bias, bool reverse, bool batch_first)
      : dtype_(dtype_code(x)),
        batch_sizes_(batch_sizes ? MaybeTensor(checked(*batch_sizes)) : std::nullopt),
        call(sizes(x, w_ih, w_hh, w_hr, cell, bias), rows_of(x),
             batch_sizes   ? Layout::packed
             : batch_first ? Layout::batch_time
                           : Layout::time_batch,
             reverse, batch_sizes ? static_cast<const int64_t*>(batch_sizes_->data_ptr()) : nullptr,
             batch_sizes ? batch_sizes_->numel() : 1) {
    const Record& r = call.records[0];
    matrices(w_ih, &Record::w_ih, gate_rows(), r.input_size);
    matrices(w_hh, &Record::w_hh, gate_rows(), r.output_size);
    if (r.projected) matrices(w_hr, &Record::w_hr, r.output_size, r.hidden_size);
  }

  int64_t gate_rows() const { return call.cell.gates * call.records[0].hidden_size; }

  // One weight of each direction.
  void matrices(const Tensors& given, int64_t Record::*field, int64_t height, int64_t width = 1) {
    STD_TORCH_CHECK(static_cast<int64_t>(given.size()) == call.records[0].directions,
                    "fastrnn: expected a weight for each direction");
    for (size_t d = 0; d < given.size(); ++d)
      call.weight(static_cast<int64_t>(d), view(keep(given[d])), field, height, width);
  }
  void states(const Tensor& given, int64_t Record::*field, int64_t numbers_a_direction) {
    call.states(view(keep(given)), field, numbers_a_direction);
  }
  void rows(const Tensor& given, int64_t Record::*field, int64_t Record::*step, int64_t Record::*row, int64_t width) {
    call.rows(rows_of(given), field, step, row, width);
  }

  Tensor empty(const std::vector<int64_t>& sizes) const { return empty_tensor(sizes, dtype_); }
  Tensor empty_kept(const std::vector<int64_t>& sizes) const { return fastrnn::empty_kept(sizes, dtype_); }

 private:
  static LayerSizes sizes(const Tensor& x, const Tensors& w_ih, const Tensors& w_hh, const Tensors& w_hr,
                          const std::string& name, bool bias) {
    STD_TORCH_CHECK(!w_ih.empty() && !w_hh.empty() && w_hh[0].dim() == 2, "fastrnn: expected matrices w_ih and w_hh");
    const Cell& cell = find_cell(name);
    const auto directions = static_cast<int64_t>(w_ih.size());
    const bool half = view(w_hh[0]).kind == Kind::bf16;
    return {cell, view(x).kind, directions, x.size(-1), w_hh[0].size(0) / cell.gates, w_hh[0].size(1), bias, !w_hr.empty(), half};
  }
  static Tensor checked(const Tensor& batch_sizes) {
    STD_TORCH_CHECK(dtype_code(batch_sizes) == aoti_torch_dtype_int64() && batch_sizes.dim() == 1 && batch_sizes.is_cpu(),
                    "fastrnn: expected batch_sizes of int64 [T] on the CPU");
    return torch::stable::contiguous(batch_sizes);
  }
  const Tensor& keep(const Tensor& t) { return t.is_contiguous() ? t : copies_.emplace_front(torch::stable::contiguous(t)); }
  View rows_of(const Tensor& t) { return view(t.stride(-1) == 1 ? t : keep(t)); }

  int32_t dtype_;
  MaybeTensor batch_sizes_;
  std::forward_list<Tensor> copies_;

 public:
  Call call;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_forward(
    const Tensor& x, const MaybeTensor& batch_sizes, const Tensor& h0, const MaybeTensor& c0, const Tensors& w_ih,
    const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh, const Tensors& w_hr, const std::string& cell, bool reverse,
    bool batch_first, bool save) {
  Op op(x, batch_sizes, w_ih, w_hh, w_hr, cell, !b_ih.empty(), reverse, batch_first);
  Call& call = op.call;
  const Record& r = call.records[0];
  const int64_t D = r.directions, B = r.batch, H = r.hidden_size, R = r.output_size;
  if (r.bias) {
    op.matrices(b_ih, &Record::b_ih, op.gate_rows());
    op.matrices(b_hh, &Record::b_hh, op.gate_rows());
  }
  std::vector<int64_t> y_sizes(x.sizes().begin(), x.sizes().end());
  y_sizes.back() = D * R;
  Tensor y = op.empty(y_sizes), h_n = op.empty({D, B, R}), c_n = op.empty({0}), saved = op.empty({0});
  op.rows(y, &Record::y, &Record::y_step, &Record::y_row, R);
  op.states(h0, &Record::h0, B * R);
  op.states(h_n, &Record::h_n, B * R);
  if (call.cell.has_cell_state) {
    STD_TORCH_CHECK(c0.has_value(), "fastrnn: ", cell, " needs c0");
    c_n = op.empty({D, B, H});
    op.states(*c0, &Record::c0, B * H);
    op.states(c_n, &Record::c_n, B * H);
  }
  if (save) {
    const int64_t width = (call.cell.slots + r.projected) * H;
    saved = op.empty_kept({D, r.rows, width});
    op.states(saved, &Record::saved, r.rows * width);
    for (Record& record : call.records) record.save = 1;
  }
  call.run(true);
  return {y, h_n, c_n, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_backward(
    const MaybeTensor& dy, const MaybeTensor& dh_n, const MaybeTensor& dc_n, const Tensor& x, const MaybeTensor& batch_sizes,
    const Tensor& h0, const MaybeTensor& c0, const Tensors& w_ih, const Tensors& w_hh, const Tensors& b_ih, const Tensors& b_hh,
    const Tensors& w_hr, const Tensor& y, const Tensor& saved, const std::string& cell, bool reverse, bool batch_first,
    bool need_dx, bool need_dh0, bool need_dw) {
  Op op(x, batch_sizes, w_ih, w_hh, w_hr, cell, !b_ih.empty(), reverse, batch_first);
  Call& call = op.call;
  const Record& r = call.records[0];
  const int64_t D = r.directions, B = r.batch, H = r.hidden_size, R = r.output_size, G = call.cell.gates * H;
  for (Record& record : call.records) {
    record.need_dx = need_dx;
    record.need_dh0 = need_dh0;
    record.need_dw = need_dw;
  }
  op.rows(y, &Record::y, &Record::y_step, &Record::y_row, R);
  Tensor zeros;
  if (!dy) {
    zeros = torch::stable::empty_like(y);
    torch::stable::zero_(zeros);
  }
  op.rows(dy ? *dy : zeros, &Record::dy, &Record::dy_step, &Record::dy_row, R);
  op.states(h0, &Record::h0, B * R);
  if (dh_n) op.states(*dh_n, &Record::dh_n, B * R);
  op.states(saved, &Record::saved, r.rows * (call.cell.slots + r.projected) * H);

  const auto absent = [&] { return op.empty({0}); };  // outputs of an op may not share memory
  Tensor dx = absent(), dc0 = absent(), dw_ih = absent(), dw_hh = absent(), db_ih = absent(), db_hh = absent(), dw_hr = absent();
  Tensor dh0 = op.empty({D, B, R});
  op.states(dh0, &Record::dh0, B * R);
  if (call.cell.has_cell_state) {
    STD_TORCH_CHECK(c0.has_value(), "fastrnn: ", cell, " needs c0");
    dc0 = op.empty({D, B, H});
    op.states(*c0, &Record::c0, B * H);
    op.states(dc0, &Record::dc0, B * H);
    if (dc_n) op.states(*dc_n, &Record::dc_n, B * H);
  }
  if (need_dx) {
    dx = op.empty(std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
    op.rows(dx, &Record::dx, &Record::dx_step, &Record::dx_row, 0);
  }
  if (need_dw) {
    const auto bias = [&](Tensor& out, int64_t Record::*field) {
      out = op.empty({D * G});
      op.states(out, field, G);
    };
    const auto matrix = [&](Tensor& out, int64_t Record::*field, int64_t Record::*half, int64_t height, int64_t width) {
      out = empty_tensor({D * height, width}, dtype_code(w_hh[0]));
      const View both = view(out);
      for (int64_t d = 0; d < D; ++d)
        call.records[d].*(r.half ? half : field) = both.address + d * height * width * bytes_of(both.kind);
    };
    matrix(dw_ih, &Record::dw_ih, &Record::dw_ih_half, G, r.input_size);
    matrix(dw_hh, &Record::dw_hh, &Record::dw_hh_half, G, R);
    if (r.bias) bias(db_ih, &Record::db_ih), bias(db_hh, &Record::db_hh);
    if (r.projected) matrix(dw_hr, &Record::dw_hr, &Record::dw_hr_half, R, H);
  }
  call.run(false);
  if (!need_dh0) dh0 = absent(), dc0 = absent();  // they were the carried gradients' place
  return {dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr};
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
