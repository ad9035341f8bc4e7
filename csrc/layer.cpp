#include "layer.h"

#include <algorithm>
#include <charconv>
#include <memory>
#include <utility>

#include <unistd.h>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "memory.h"
#include "team.h"

namespace fastrnn {

const Tier* tier;
std::atomic<const AddedCell*> last_added;

int64_t l2_bytes() {
  static const int64_t bytes = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 256 * 1024);
  return bytes;
}

int64_t View::numel() const {
  int64_t count = 1;
  for (int64_t axis = 0; axis < dims; ++axis) count *= sizes[axis];
  return count;
}

bool View::is_contiguous() const {
  int64_t expected = 1;
  for (int64_t axis = dims; axis-- > 0; expected *= std::max<int64_t>(sizes[axis], 1))
    if (sizes[axis] != 1 && strides[axis] != expected) return false;
  return true;
}

namespace {

constexpr int64_t CONVERTED = 1 << 15;  // numbers that a thread converts in less time than another takes to wake

void convert(Conversion kernel, const View& from, const View& to) {
  const int64_t count = from.numel(), most = count > CONVERTED ? team_limit().threads() : 1;
  torch::stable::parallel_for(0, count, std::max(CONVERTED, (count + most - 1) / most), [&](int64_t begin, int64_t end) {
    const int64_t source = from.address + begin * bytes_of(from.dtype), out = to.address + begin * bytes_of(to.dtype);
    const std::array<int64_t, 3> job{source, out, end - begin};
    kernel(reinterpret_cast<int64_t>(job.data()), 0);
  });
}

}  // namespace

void widen(const View& half, const View& out) { convert(tier->widen, half, out); }
void round(const View& wide, const View& out) { convert(tier->round, wide, out); }

constexpr std::pair<std::string_view, bool Layer::*> FLAGS[] = {
    {"bias", &Layer::bias},
    {"projected", &Layer::projected},
    {"reverse", &Layer::reverse},
    {"batch_first", &Layer::batch_first},
    {"restarts", &Layer::restarts}};

constexpr std::pair<std::string_view, int64_t Layer::*> NUMBERS[] = {{"directions=", &Layer::directions}, {"heads=", &Layer::heads}};

namespace {

// "heads=4" to its field; false where a layer has no such number, or it is not positive.
bool read_number(std::string_view word, Layer& layer) {
  for (const auto& [name, number] : NUMBERS) {
    if (!word.starts_with(name)) continue;
    const char* const end = word.data() + word.size();
    const auto [rest, error] = std::from_chars(word.data() + name.size(), end, layer.*number);
    return error == std::errc() && rest == end && layer.*number > 0;
  }
  return false;
}

}  // namespace

std::optional<Layer> Layer::of(std::string_view text) {
  const auto word = [&] {
    const size_t end = std::min(text.find(' '), text.size());
    const std::string_view found = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    return found;
  };
  Layer layer;
  const std::string_view name = word();
  layer.cell = find_cell([&](const Cell& c) { return name == c.name; });
  if (!layer.cell) return std::nullopt;
  while (!text.empty()) {
    const std::string_view property = word();
    const auto* flag = std::find_if(std::begin(FLAGS), std::end(FLAGS), [&](const auto& f) { return f.first == property; });
    if (flag != std::end(FLAGS))
      layer.*flag->second = true;
    else if (!read_number(property, layer))
      return std::nullopt;
  }
  if (layer.directions > 2) return std::nullopt;
  return layer;
}

std::string Layer::text() const {
  std::string words = cell->name;
  for (const auto& [name, number] : NUMBERS)
    if (this->*number != 1) ((words += ' ') += name) += std::to_string(this->*number);
  for (const auto& [name, flag] : FLAGS)
    if (this->*flag) (words += ' ') += name;
  return words;
}

std::optional<LayerSizes> LayerSizes::of(const Layer& layer, const View* weights, size_t count, Dtype vectors) {
  const bool counted = count == layer.weights() * static_cast<size_t>(layer.directions);
  if (!counted || weights[0].dims != 2 || weights[1].dims != 2 || (layer.cell->weights && !layer.bias) ||
      (layer.projected && (!layer.cell->states || layer.heads > 1)))
    return std::nullopt;
  const bool half = weights[0].dtype == Dtype::bf16;
  const Dtype matrices = weights[0].dtype;
  const int64_t gate_rows = weights[1].size(0), hidden = gate_rows / layer.cell->gates;
  const int64_t of_head = weights[1].size(1), output = product({of_head, layer.heads});
  const LayerSizes sizes{layer, half ? Dtype::f32 : matrices, weights[0].size(1), hidden, output, half};
  if (hidden == 0 || hidden * layer.cell->gates != gate_rows || !(layer.projected || output == hidden)) return std::nullopt;
  if ((sizes.dtype != Dtype::f32 && sizes.dtype != Dtype::f64) || (half && of_head % 2)) return std::nullopt;
  for (size_t i = 0; i < count; ++i) {
    const View& w = weights[i];
    const Layer::Weight which = layer.weight(i);
    const bool vector = which == Layer::B_IH || which == Layer::B_HH;
    const int64_t own_weights = which == Layer::B_IH ? layer.cell->weights * hidden : 0;  // behind the biases
    const int64_t height = which == Layer::W_HR ? output : gate_rows + own_weights;
    if (w.dims != (vector ? 1 : 2) || w.size(0) != height) return std::nullopt;
    if (vector ? vectors != Dtype::other && w.dtype != vectors : w.dtype != matrices) return std::nullopt;
    const int64_t width = which == Layer::W_IH ? sizes.input_size : which == Layer::W_HH ? of_head : hidden;
    if (!vector && w.size(1) != width) return std::nullopt;
  }
  return sizes;
}

Call::Call(const LayerSizes& sizes, const View& x, Layout layout, const int64_t* batch_sizes, int64_t steps)
    : layer(sizes.layer), dtype_(sizes.dtype), layout_(layout), records{} {
  const bool packed = layout == Layout::packed, dense = is_dense(layout);
  STD_TORCH_CHECK(x.dims == (dense ? 3 : 2), "fastrnn: x has ", x.dims, " dimensions");
  Record& r = records[0];
  r.steps = dense ? x.size(layout == Layout::batch_time ? 1 : 0) : steps;
  STD_TORCH_CHECK(r.steps > 0, "fastrnn: expected at least one step");
  r.batch = packed ? batch_sizes[0] : x.size(layout == Layout::time_batch ? 1 : 0);
  STD_TORCH_CHECK(r.batch > 0, "fastrnn: expected at least one row");
  STD_TORCH_CHECK(sizes.input_size > 0 && sizes.hidden_size > 0 && sizes.output_size > 0,
                  "fastrnn: expected at least one feature and one unit");
  r.rows = packed ? x.size(0) : product({r.steps, r.batch});
  r.input_size = sizes.input_size;
  r.output_size = sizes.output_size;
  r.hidden_size = sizes.hidden_size;
  r.heads = layer.heads;
  r.bias = layer.bias;
  r.projected = layer.projected;
  r.half = sizes.half;
  r.directions = layer.directions;
  // More than the bytes of anything and than the operations, whatever is rounded up to whole vectors and panels: nothing that
  // is computed from sizes below, or in a kernel, overflows.
  product({8, r.directions, r.rows + r.steps, layer.cell->gates, r.hidden_size + 256, r.input_size + r.output_size + 256});
  if (packed) {
    int64_t total = 0, previous = r.batch;
    for (int64_t t = 0; t < r.steps; ++t) {
      offsets_.push_back(total);
      const bool in_order = batch_sizes[t] > 0 && batch_sizes[t] <= previous;
      STD_TORCH_CHECK(in_order, "fastrnn: batch_sizes must be positive and not increase");
      previous = batch_sizes[t];
      total += previous;
    }
    STD_TORCH_CHECK(total == r.rows, "fastrnn: batch_sizes do not fit x");
    r.batch_sizes = reinterpret_cast<int64_t>(batch_sizes);
    r.offsets = reinterpret_cast<int64_t>(offsets_.data());
    r.packed = 1;
  }
  r.padded_steps = r.steps;
  r.l2_bytes = l2_bytes();
  r.wait = reinterpret_cast<int64_t>(&wait_at);
  r.reverse = layer.reverse;
  if (layer.directions > 1) {
    records[1] = r;
    records[1].direction = 1;
    records[1].reverse = !layer.reverse;
  }
  rows(x, &Record::x, &Record::x_step, &Record::x_row, 0);
}

void Call::weights(const View* given) {
  static constexpr int64_t Record::*FIELDS[] = {&Record::w_ih, &Record::w_hh, &Record::b_ih, &Record::b_hh, &Record::w_hr};
  for (size_t i = 0; i < layer.weights() * static_cast<size_t>(layer.directions); ++i)
    records[layer.direction(i)].*FIELDS[layer.weight(i)] = given[i].address;
}

void Call::states(const View& given, int64_t Record::*field, int64_t numbers_a_direction, int64_t index, int64_t layers) {
  STD_TORCH_CHECK(given.numel() == numbers_a_direction * layer.directions * layers && given.dtype == dtype_,
                  "fastrnn: a state's shape or dtype does not fit the layer");
  for (int64_t d = 0; d < layer.directions; ++d)
    records[d].*field = given.address + (index * layer.directions + d) * numbers_a_direction * bytes_of(dtype_);
}

// Behind the rows of the batch stand those that resets go back to, where these are others.
void Call::initial_states(const View& given, int64_t Record::*field, int64_t Record::*at_reset, int64_t numbers_a_row) {
  const int64_t numbers = records[0].batch * numbers_a_row;
  STD_TORCH_CHECK(!layer.restarts || given.dims == 3, "fastrnn: expected states [directions, rows, numbers]");
  states(given, field, numbers * (1 + layer.restarts));
  for (Record& r : records) r.*at_reset = r.*field + layer.restarts * numbers * bytes_of(dtype_);
}

void Call::rows(const View& given, int64_t Record::*field, int64_t Record::*step, int64_t Record::*row, int64_t width) {
  const Record& r = records[0];
  const bool dense = is_dense(layout_);
  STD_TORCH_CHECK(given.dims == (dense ? 3 : 2) && given.dtype == dtype_, "fastrnn: a sequence's layout or dtype does not fit x");
  const int64_t T = r.padded_steps, outer = layout_ == Layout::time_batch ? T : layout_ == Layout::packed ? r.rows : r.batch;
  const bool fits = given.size(0) == outer && (!dense || given.size(1) == (layout_ == Layout::time_batch ? r.batch : T));
  STD_TORCH_CHECK(fits && given.size(-1) == (width ? layer.directions * width : r.input_size),
                  "fastrnn: a sequence's shape does not fit x or the layer");
  for (int64_t d = 0; d < layer.directions; ++d) {
    records[d].*field = given.address + d * width * bytes_of(dtype_);
    records[d].*step = given.stride(layout_ == Layout::batch_time ? 1 : 0) * bytes_of(dtype_);
    records[d].*row = given.stride(layout_ == Layout::time_batch ? 1 : 0) * bytes_of(dtype_);
  }
}

void Call::resets(const View& given) {
  const Record& r = records[0];
  const bool dense = is_dense(layout_), by_time = layout_ == Layout::time_batch;
  const bool shaped = dense ? given.dims == 2 && given.size(0) == (by_time ? r.padded_steps : r.batch) &&
                                  given.size(1) == (by_time ? r.batch : r.padded_steps)
                            : layout_ == Layout::packed && given.dims == 1 && given.size(0) == r.rows;
  STD_TORCH_CHECK(shaped && given.dtype == Dtype::flag, "fastrnn: resets: expected bool for each row of x, on the CPU");
  for (Record& record : records) {
    record.resets = given.address;
    record.resets_step = given.stride(layout_ == Layout::batch_time ? 1 : 0);
    record.resets_row = given.stride(dense && by_time ? 1 : 0);
  }
}

// Kernels see the rows with the longest first, as in a packed sequence, but that each lies where it lies.
void Call::lengths(const View& given) {
  Record& r = records[0];
  const int64_t T = r.steps, B = r.batch;
  const bool shaped = is_dense(layout_) && given.dims == 1 && given.size(0) == B && given.dtype == Dtype::i64;
  STD_TORCH_CHECK(shaped && given.is_contiguous(), "fastrnn: lengths: expected int64 [B] on the CPU, of a dense sequence");
  const auto* of_rows = reinterpret_cast<const int64_t*>(given.address);
  std::vector<int64_t> ending(T + 1), places(T + 1);  // of each length: rows, and the place of the first
  for (int64_t b = 0; b < B; ++b) {
    STD_TORCH_CHECK(of_rows[b] >= 0 && of_rows[b] <= T, "fastrnn: lengths: expected numbers from 0 to ", T, ", got ", of_rows[b]);
    ++ending[of_rows[b]];
  }
  int64_t longer = 0, longest = 0, total = 0;
  for (int64_t length = T; length >= 0; --length) {
    places[length] = longer;
    longer += ending[length];
    if (!longest && ending[length]) longest = length;
  }
  order_.resize(B);
  for (int64_t b = 0; b < B; ++b) order_[places[of_rows[b]]++] = b;
  // A single step has an order of its own, which must not depend on the other rows.
  r.steps = std::max(longest, std::min<int64_t>(T, 2));
  for (int64_t t = 0; t < r.steps; ++t) {
    longer -= ending[t];  // those that are longer than t
    batch_sizes_.push_back(longer);
    offsets_.push_back(total);
    total += longer;
  }
  r.rows = total;
  r.batch_sizes = reinterpret_cast<int64_t>(batch_sizes_.data());
  r.offsets = reinterpret_cast<int64_t>(offsets_.data());
  r.order = reinterpret_cast<int64_t>(order_.data());
  for (int64_t Record::*field : {&Record::steps, &Record::rows, &Record::batch_sizes, &Record::offsets, &Record::order})
    records[1].*field = r.*field;
}

void Call::scratch(int64_t Record::*field, int64_t numbers_a_direction) {
  const int64_t bytes = product({numbers_a_direction, layer.directions, bytes_of(dtype_)});
  const char* begin = scratch_.emplace_front(std::make_unique_for_overwrite<char[]>(static_cast<size_t>(bytes))).get();
  for (int64_t d = 0; d < layer.directions; ++d)
    records[d].*field = reinterpret_cast<int64_t>(begin) + d * numbers_a_direction * bytes_of(dtype_);
}

const Unit& unit_of(const Cell& cell, Dtype dtype, bool forward) {
  const bool wide = dtype == Dtype::f64, built_in = std::begin(CELLS) <= &cell && &cell < std::end(CELLS);
  if (built_in) return tier->units[(wide * (std::end(CELLS) - std::begin(CELLS)) + (&cell - CELLS)) * 2 + !forward];
  return static_cast<const AddedCell&>(cell).units[wide * 2 + !forward];
}

const Unit& Call::unit(bool forward) const {
  const Unit& found = unit_of(*layer.cell, dtype_, forward);
  STD_TORCH_CHECK(found.run, "fastrnn: ", forward ? "forward" : "backward", " of ", layer.cell->name,
                  " is not compiled for this dtype");
  return found;
}

void Call::run(bool forward) { run(unit(forward), records.data(), 2, patience(forward), team_limit().threads()); }

int64_t Call::threads_at_once(int64_t layers) const {
  if (layers == 1 || layer.directions > 1 || records[0].steps == 1) return 0;
  const int64_t threads = team_limit().threads();
  if (threads == 1) return 0;
  std::vector<Record> sizes(static_cast<size_t>(layers), records[0]);
  for (Record& r : sizes) r.layers = layers;  // the lowest one's own sizes will do: the others' inputs are known from them
  return unit(true).arrange(reinterpret_cast<int64_t>(sizes.data()), threads) > 0 ? threads : 0;
}

void Call::run_at_once(const std::vector<Call>& layers, int64_t threads) {
  std::vector<Record> own;
  std::chrono::nanoseconds patience{0};
  for (const Call& call : layers) {
    own.push_back(call.records[0]);
    own.back().layers = static_cast<int64_t>(layers.size());
    patience += call.patience(true);
  }
  run(layers[0].unit(true), own.data(), static_cast<int64_t>(own.size()), patience, threads);
}

void Call::run(const Unit& kernel, Record* records, int64_t count, std::chrono::nanoseconds patience, int64_t most) {
  const Running running;
  const auto at = reinterpret_cast<int64_t>(records);
  const auto each = [&](const auto& set) { std::for_each(records, records + count, set); };
  Workspace workspace;
  int64_t bytes;
  do {  // once, where a call is small
    each([&](Record& r) { r.workspace = workspace.begin; });
    bytes = kernel.arrange(at, most);
  } while (workspace.reserve(bytes));
  const int64_t threads = records[0].threads;
  if (threads == 1) return kernel.run(at, 0);

  // The team's, each crew's and its row groups', which a smaller team has room in: nothing may fail once threads have come.
  const auto arrivals = std::make_unique<Arrivals[]>(threads * (1 + 2 * count));
  const auto gathered = [&](int64_t size) {
    if (size < threads) {  // share out anew, among as many as the workspace has room for: it has for one
      for (int64_t workers = size; kernel.arrange(at, workers) > bytes && workers > 1;) --workers;
    }
    each([&](Record& r) {
      r.threads = size;
      r.arrivals = reinterpret_cast<int64_t>(arrivals.get());
    });
  };
  run_team(threads, patience, gathered, [&](int64_t rank) { kernel.run(at, rank); });
}

int64_t Call::pack() {
  const Unit& kernel = unit(true);
  const auto at = reinterpret_cast<int64_t>(records.data());
  for (Record& r : records) r.pack_only = 1;
  Workspace workspace;
  do {
    for (Record& r : records) r.workspace = workspace.begin;
  } while (workspace.reserve(kernel.arrange(at, 1)));
  if (records[0].pack) kernel.run(at, 0);
  return records[0].pack_bytes;
}

int64_t Call::operations(bool forward) const {
  const Record& r = records[0];
  return (forward ? 2 : 4) * layer.directions * r.rows * layer.cell->gates * r.hidden_size *
         (r.input_size + r.output_size / r.heads);
}

// How long to wait for a thread: waking one takes 5 to 50 us, on a virtual machine now and then a millisecond, which a long
// call should rather wait for than go without. A quarter of what one thread needs, at 50 operations a nanosecond.
std::chrono::nanoseconds Call::patience(bool forward) const {
  return std::chrono::nanoseconds(std::max<int64_t>(100'000, operations(forward) / 200));
}

namespace {

Layout layout_of(const Inputs& inputs) {
  return inputs.batch_sizes.dims    ? Layout::packed
         : inputs.x.dims == 2       ? Layout::batch
         : inputs.layer.batch_first ? Layout::batch_time
                                    : Layout::time_batch;
}

// What both ops have. biases: what dtype they have to have.
Call call_of(const Inputs& inputs, Dtype biases) {
  const View& batch_sizes = inputs.batch_sizes;
  STD_TORCH_CHECK(!batch_sizes.dims || (batch_sizes.dims == 1 && batch_sizes.dtype == Dtype::i64),
                  "fastrnn: expected batch_sizes of int64 [T] on the CPU");
  const auto sizes = LayerSizes::of(inputs.layer, inputs.weights.data(), inputs.weights.size(), biases);
  STD_TORCH_CHECK(sizes, "fastrnn: the number, shape or dtype of the weights does not fit the layer ", inputs.layer.text());
  Call call(*sizes, inputs.x, layout_of(inputs), reinterpret_cast<const int64_t*>(batch_sizes.address), batch_sizes.numel());
  const Record& r = call.records[0];
  call.weights(inputs.weights.data());
  call.initial_states(inputs.h0, &Record::h0, &Record::h_reset, r.output_size);
  const Cell& cell = *call.layer.cell;
  STD_TORCH_CHECK(!cell.states || inputs.c0.dims, "fastrnn: ", cell.name, " needs c0");
  if (cell.states) call.initial_states(inputs.c0, &Record::c0, &Record::c_reset, cell.states * r.hidden_size);
  STD_TORCH_CHECK(!call.layer.restarts || inputs.resets.dims, "fastrnn: a layer that restarts needs resets");
  if (inputs.resets.dims) call.resets(inputs.resets);
  if (inputs.lengths.dims) call.lengths(inputs.lengths);
  if (inputs.mask.dims) call.states(inputs.mask, &Record::mask, r.batch * r.output_size);
  STD_TORCH_CHECK(!cell.noise == !inputs.noise.dims, "fastrnn: ", cell.name, cell.noise ? " needs noise" : " takes no noise");
  if (cell.noise)
    call.rows(inputs.noise, &Record::noise, &Record::noise_step, &Record::noise_row, cell.noise * r.hidden_size);
  return call;
}

std::vector<int64_t> sizes_of(const View& t) { return {t.sizes, t.sizes + t.dims}; }

// Of the final states, as the initial ones without those that resets go back to.
std::vector<int64_t> final_sizes(const View& initial, const Layer& layer) {
  std::vector<int64_t> sizes = sizes_of(initial);
  if (layer.restarts) sizes.end()[-2] /= 2;
  return sizes;
}

// Numbers that are saved for one row.
int64_t saved_width(const Call& call) { return (call.layer.cell->slots + call.layer.projected) * call.records[0].hidden_size; }

}  // namespace

Reads::Reads(const Inputs& inputs, const Gradients& gradients) : x(gradients.need_dw), w_ih(gradients.need_dx), biases(inputs.layer.cell->weights > 0) {
  const Layout layout = layout_of(inputs);
  const bool one_step = layout == Layout::batch || (layout == Layout::packed && inputs.batch_sizes.numel() == 1) ||
                        (is_dense(layout) && inputs.x.dims == 3 && inputs.x.size(inputs.layer.batch_first ? 1 : 0) == 1);
  w_hh = gradients.need_dh0 || !one_step;
}

Call forward_call(const Inputs& inputs, bool save, const Make& make) {
  Call call = call_of(inputs, inputs.x.dtype);
  const Record& r = call.records[0];
  const int64_t D = r.directions, B = r.batch, H = r.hidden_size, R = r.output_size, width = saved_width(call);
  const Dtype dtype = inputs.x.dtype;
  std::vector<int64_t> y_sizes = sizes_of(inputs.x);
  y_sizes.back() = D * R;
  call.states(make(H_N, final_sizes(inputs.h0, call.layer), dtype, 0), &Record::h_n, B * R);
  call.rows(make(Y, y_sizes, dtype, 0), &Record::y, &Record::y_step, &Record::y_row, R);
  const int64_t S = call.layer.cell->states * H;
  if (S) call.states(make(C_N, final_sizes(inputs.c0, call.layer), dtype, 0), &Record::c_n, B * S);
  const int64_t N = call.places();
  if (save) call.states(make(SAVED, {D, N, width}, dtype, 0), &Record::saved, N * width);
  for (Record& record : call.records) record.save = save;
  return call;
}

Call backward_call(const Inputs& inputs, const Gradients& gradients, const View& y, const View& saved, const Make& make) {
  Call call = call_of(inputs, Dtype::other);
  const Record& r = call.records[0];
  const int64_t D = r.directions, B = r.batch, H = r.hidden_size, R = r.output_size, G = call.layer.cell->gates * H;
  const Dtype dtype = inputs.x.dtype;
  for (Record& record : call.records) {
    record.need_dx = gradients.need_dx;
    record.need_dh0 = gradients.need_dh0;
    record.need_dw = gradients.need_dw;
  }
  call.rows(y, &Record::y, &Record::y_step, &Record::y_row, R);
  call.rows(gradients.dy, &Record::dy, &Record::dy_step, &Record::dy_row, R);
  call.states(saved, &Record::saved, call.places() * saved_width(call));
  // The states' gradients are carried back in the place of the result.
  const auto state = [&](const View& initial, const View& final, int64_t Record::*field, size_t result,
                         int64_t Record::*carried, int64_t Record::*at_reset, int64_t width) {
    if (final.dims) call.states(final, field, B * width);
    if (!gradients.need_dh0) return call.scratch(carried, B * width);
    call.initial_states(make(result, sizes_of(initial), dtype, 0), carried, at_reset, width);
  };
  state(inputs.h0, gradients.dh_n, &Record::dh_n, DH0, &Record::dh0, &Record::dh_reset, R);
  const int64_t S = call.layer.cell->states * H, W = call.layer.cell->weights * H;
  if (S) state(inputs.c0, gradients.dc_n, &Record::dc_n, DC0, &Record::dc0, &Record::dc_reset, S);
  if (S && gradients.dc_steps.dims) call.states(gradients.dc_steps, &Record::dc_steps, call.places() * S);
  if (gradients.need_dx) {
    const View dx = make(DX, sizes_of(inputs.x), dtype, 0);
    call.rows(dx, &Record::dx, &Record::dx_step, &Record::dx_row, 0);
  }
  if (gradients.need_dw) {
    const auto each = [&](size_t result, int64_t Record::*field, const std::vector<int64_t>& sizes, Dtype of) {
      for (int64_t d = 0; d < D; ++d) call.records[d].*field = make(result, sizes, of, d).address;
    };
    const auto matrix = [&](size_t result, int64_t Record::*field, int64_t Record::*half, int64_t height, int64_t width) {
      each(result, r.half ? half : field, {height, width}, inputs.weights[0].dtype);
    };
    matrix(DW_IH, &Record::dw_ih, &Record::dw_ih_half, G, r.input_size);
    matrix(DW_HH, &Record::dw_hh, &Record::dw_hh_half, G, R / r.heads);
    if (r.bias) {
      each(DB_IH, &Record::db_ih, {G + W}, dtype);
      each(DB_HH, &Record::db_hh, {G}, dtype);
    }
    if (r.projected) matrix(DW_HR, &Record::dw_hr, &Record::dw_hr_half, R, H);
  }
  return call;
}

}  // namespace fastrnn
