#include "layer.h"

#include <algorithm>
#include <memory>

#include <unistd.h>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "memory.h"
#include "team.h"

namespace fastrnn {

const Tier* tier;

int64_t View::numel() const {
  int64_t count = 1;
  for (int64_t axis = 0; axis < dims; ++axis) count *= sizes[axis];
  return count;
}

bool View::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t axis = dims; axis-- > 0; expected *= sizes[axis])
    if (sizes[axis] != 1 && strides[axis] != expected) return false;
  return true;
}

namespace {

constexpr int64_t CONVERTED = 1 << 15;  // numbers that a thread converts in less time than another takes to wake

void convert(Conversion kernel, const View& from, const View& to) {
  torch::stable::parallel_for(0, from.numel(), CONVERTED, [&](int64_t begin, int64_t end) {
    const int64_t source = from.address + begin * bytes_of(from.kind), out = to.address + begin * bytes_of(to.kind);
    const std::array<int64_t, 3> job{source, out, end - begin};
    kernel(reinterpret_cast<int64_t>(job.data()), 0);
  });
}

}  // namespace

void widen(const View& half, const View& out) { convert(tier->widen, half, out); }
void round(const View& wide, const View& out) { convert(tier->round, wide, out); }

Call::Call(const LayerSizes& sizes, const View& x, Layout layout, bool reverse, const int64_t* batch_sizes, int64_t steps)
    : cell(sizes.cell), kind_(sizes.kind), layout_(layout), directions_(sizes.directions), records{} {
  STD_TORCH_CHECK(directions_ == 1 || directions_ == 2, "fastrnn: expected one or two directions, got ", directions_);
  STD_TORCH_CHECK(kind_ == Kind::f32 || kind_ == Kind::f64, "fastrnn: the CPU engine takes float32 and float64");
  const bool packed = layout == Layout::packed, dense = layout == Layout::time_batch || layout == Layout::batch_time;
  STD_TORCH_CHECK(x.dims == (dense ? 3 : 2), "fastrnn: x has ", x.dims, " dimensions");
  Record& r = records[0];
  r.steps = dense ? x.size(layout == Layout::batch_time ? 1 : 0) : steps;
  STD_TORCH_CHECK(r.steps > 0, "fastrnn: expected at least one step");
  r.batch = packed ? batch_sizes[0] : x.size(layout == Layout::time_batch ? 1 : 0);
  STD_TORCH_CHECK(r.batch > 0, "fastrnn: expected at least one row");
  r.rows = packed ? x.size(0) : product({r.steps, r.batch});
  r.input_size = sizes.input_size;
  r.output_size = sizes.output_size;
  r.hidden_size = sizes.hidden_size;
  r.bias = sizes.bias;
  r.projected = sizes.projected;
  r.half = sizes.half;
  STD_TORCH_CHECK(!r.half || (kind_ == Kind::f32 && r.output_size % 2 == 0),
                  "fastrnn: weights in bfloat16 go with float32 and an even number of outputs");
  r.directions = directions_;
  // More than the bytes of anything and than the operations, whatever is rounded up to whole vectors and panels: nothing that
  // is computed from sizes below, or in a kernel, overflows.
  product({8, directions_, r.rows + r.steps, cell.gates, r.hidden_size + 256, r.input_size + r.output_size + 256});
  STD_TORCH_CHECK(r.projected || r.output_size == r.hidden_size, "fastrnn: w_hh's shape does not fit the cell");
  if (packed) {
    int64_t total = 0, previous = r.batch;
    for (int64_t t = 0; t < r.steps; ++t) {
      offsets_.push_back(total);
      STD_TORCH_CHECK(batch_sizes[t] > 0 && batch_sizes[t] <= previous, "fastrnn: batch_sizes must be positive and not increase");
      previous = batch_sizes[t];
      total += previous;
    }
    STD_TORCH_CHECK(total == r.rows, "fastrnn: batch_sizes do not fit x");
    r.batch_sizes = reinterpret_cast<int64_t>(batch_sizes);
    r.offsets = reinterpret_cast<int64_t>(offsets_.data());
  }
  static const int64_t l2_bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 * 1024);
  r.l2_bytes = l2_bytes;
  r.wait = reinterpret_cast<int64_t>(&wait_at);
  r.reverse = reverse;
  records[1] = r;
  records[1].direction = 1;
  records[1].reverse = !reverse;
  rows(x, &Record::x, &Record::x_step, &Record::x_row, 0);
}

void Call::weight(int64_t direction, const View& given, int64_t Record::*field, int64_t height, int64_t width) {
  const Kind kind = given.dims == 2 && records[0].half ? Kind::bf16 : kind_;
  STD_TORCH_CHECK(given.dims > 0 && given.size(0) == height && given.numel() == height * width && given.kind == kind,
                  "fastrnn: a weight's shape or dtype does not fit the layer");
  records[direction].*field = given.address;
}

void Call::states(const View& given, int64_t Record::*field, int64_t numbers_a_direction, int64_t layer, int64_t layers) {
  STD_TORCH_CHECK(given.numel() == numbers_a_direction * directions_ * layers && given.kind == kind_,
                  "fastrnn: a state's shape or dtype does not fit the layer");
  for (int64_t d = 0; d < directions_; ++d)
    records[d].*field = given.address + (layer * directions_ + d) * numbers_a_direction * bytes_of(kind_);
}

void Call::rows(const View& given, int64_t Record::*field, int64_t Record::*step, int64_t Record::*row, int64_t width) {
  STD_TORCH_CHECK(given.dims == (layout_ == Layout::time_batch || layout_ == Layout::batch_time ? 3 : 2) && given.kind == kind_,
                  "fastrnn: a sequence's layout or dtype does not fit x");
  for (int64_t d = 0; d < directions_; ++d) {
    records[d].*field = given.address + d * width * bytes_of(kind_);
    records[d].*step = given.stride(layout_ == Layout::batch_time ? 1 : 0) * bytes_of(kind_);
    records[d].*row = given.stride(layout_ == Layout::time_batch ? 1 : 0) * bytes_of(kind_);
  }
}

const Unit& Call::unit(bool forward) const {
  const auto index = ((kind_ == Kind::f64) * (std::end(CELLS) - std::begin(CELLS)) + (&cell - CELLS)) * 2 + !forward;
  return tier->units[index];
}

void Call::run(bool forward) {
  const Unit& kernel = unit(forward);
  const auto at = reinterpret_cast<int64_t>(records.data());
  const int64_t most = torch::stable::get_num_threads(), bytes = kernel.arrange(at, most);
  const Workspace workspace(bytes);
  for (Record& r : records) r.workspace = workspace.begin;
  kernel.arrange(at, most);
  const int64_t threads = records[0].threads;
  if (threads == 1) return kernel.run(at, 0);

  // The team's, each crew's and its row groups', which a smaller team has room in: nothing may fail once threads have come.
  const auto arrivals = std::make_unique<Arrivals[]>(threads * (1 + 2 * directions_));
  const auto gathered = [&](int64_t size) {
    if (size < threads) {  // share out anew, among as many as the workspace has room for: it has for one
      for (int64_t workers = size; kernel.arrange(at, workers) > bytes && workers > 1;) --workers;
    }
    for (Record& record : records) {
      record.threads = size;
      record.arrivals = reinterpret_cast<int64_t>(arrivals.get());
    }
  };
  run_team(threads, patience(forward ? 1 : 2), gathered, [&](int64_t rank) { kernel.run(at, rank); });
}

int64_t Call::pack() {
  const Unit& kernel = unit(true);
  const auto at = reinterpret_cast<int64_t>(records.data());
  for (Record& r : records) r.pack_only = 1;
  const Workspace workspace(kernel.arrange(at, 1));
  for (Record& r : records) r.workspace = workspace.begin;
  kernel.arrange(at, 1);
  if (records[0].pack) kernel.run(at, 0);
  return records[0].pack_bytes;
}

// How long to wait for a thread: waking one takes 5 to 50 us, on a virtual machine now and then a millisecond, which a long
// call should rather wait for than go without. A quarter of what one thread needs, at 50 operations a nanosecond.
std::chrono::nanoseconds Call::patience(int64_t passes) const {
  const Record& r = records[0];
  const int64_t operations = 2 * passes * directions_ * r.rows * cell.gates * r.hidden_size * (r.input_size + r.output_size);
  return std::chrono::nanoseconds(std::max<int64_t>(100'000, operations / 200));
}

}  // namespace fastrnn
