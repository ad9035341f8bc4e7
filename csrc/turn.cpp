// Matrices of gates from another library's layout to torch's, and back, for fastrnn/keras.py.
#include <algorithm>
#include <array>

#include <torch/csrc/stable/ops.h>

#include "python.h"
#include "team.h"

namespace fastrnn {
namespace {

constexpr int64_t TURNED = 1 << 15;  // numbers that a thread turns in less time than another takes to wake
constexpr int64_t WHOLE = 16;        // rows, of which every tier's vectors have a whole part

}  // namespace

// turn(matrix, (place of each gate in the source), gates_last) -> float32 [n, gates * H] as [gates * H, n] with the gates in this
// order if gates_last, or [gates * H, n] as [n, gates * H]; None where that is not what it is given.
PyObject* turn(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    View from, to;
    if (!PyTuple_Check(args[1]) || is_watched() || !look(args[0], from, true)) return nullptr;
    const int64_t gates = PyTuple_Size(args[1]);
    const bool last = args[2] == Py_True;
    if (from.dims != 2 || from.dtype != Dtype::f32 || !from.is_contiguous() || !from.numel()) return nullptr;
    if (!gates || from.size(last ? 1 : 0) % gates) return nullptr;
    std::array<int64_t, 8> places{};
    if (gates > static_cast<int64_t>(places.size())) return nullptr;
    for (int64_t gate = 0; gate < gates; ++gate) {
      places[gate] = PyLong_AsLongLong(PyTuple_GetItem(args[1], static_cast<Py_ssize_t>(gate)));
      if (PyErr_Occurred()) throw PythonError();
      if (places[gate] < 0 || places[gate] >= gates) return nullptr;
    }
    Results results;
    results.like(args[0], from);
    Owned made = results.make({from.size(1), from.size(0)}, from.dtype, to);
    const int64_t size = bytes_of(from.dtype), from_row = from.size(1) * size, to_row = to.size(1) * size;
    const int64_t rows = last ? from.size(0) : from.size(0) / gates, columns = last ? from.size(1) / gates : from.size(1);
    const auto part = [&](int64_t begin, int64_t end) {
      for (int64_t gate = 0; gate < gates; ++gate) {
        const int64_t source = last ? places[gate] * columns * size : places[gate] * rows * from_row;
        const int64_t out = last ? gate * columns * to_row : gate * rows * size;
        const std::array<int64_t, 6> job{from.address + source + begin * from_row, from_row, end - begin, columns,
                                         to.address + out + begin * size,          to_row};
        tier->turn(reinterpret_cast<int64_t>(job.data()), 0);
      }
    };
    const int64_t blocks = (rows + WHOLE - 1) / WHOLE, most = from.numel() > TURNED ? team_limit().threads() : 1;
    if (most == 1) {
      part(0, rows);
    } else {
      const int64_t least = std::max<int64_t>(1, TURNED / (WHOLE * columns * gates));
      torch::stable::parallel_for(0, blocks, std::max(least, (blocks + most - 1) / most), [&](int64_t begin, int64_t end) {
        part(begin * WHOLE, std::min(rows, end * WHOLE));
      });
    }
    return made;
  });
}

}  // namespace fastrnn
