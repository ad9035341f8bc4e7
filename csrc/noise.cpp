// Zoneout's noise, for fastrnn/features.py, which has the same in torch's operations.
#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "python.h"
#include "team.h"

namespace fastrnn {
namespace {

constexpr int64_t CHUNK = 256;            // numbers that are made at a time, four of a word
constexpr int64_t CHUNKS_ALONE = 256;     // so many take less time than a thread takes to wake
constexpr int64_t WHOLE = 16;             // numbers that the compiler turns into vectors
constexpr uint64_t STEP = 0x9E3779B97F4A7C15;

// splitmix64 (Steele, Lea and Flood 2014), whose state is a counter: a word does not need those before it.
uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

template <class Number>
void compare(const int16_t* bits, int64_t count, int level, Number* out) {
  int64_t i = 0;
  for (; i + WHOLE <= count; i += WHOLE)
    for (int64_t k = 0; k < WHOLE; ++k) out[i + k] = bits[i + k] >= level ? Number(1) : Number(0);
  for (; i < count; ++i) out[i] = bits[i] >= level ? Number(1) : Number(0);
}

// The numbers begin .. end-1 of all, of which so many in turn have each of the levels; begin is a multiple of CHUNK.
template <class Number>
void fill(uint64_t seed, int64_t begin, int64_t end, const std::vector<int>& levels, int64_t each, Number* out) {
  std::array<int16_t, CHUNK> bits;
  for (; begin < end; begin += CHUNK) {
    for (int64_t word = 0; word < CHUNK / 4; ++word) {
      const uint64_t numbers = mixed(seed + (static_cast<uint64_t>(begin / 4 + word) + 1) * STEP);
      std::memcpy(bits.data() + 4 * word, &numbers, sizeof numbers);
    }
    const int64_t count = std::min(CHUNK, end - begin);
    for (int64_t done = 0; done < count;) {
      const int64_t at = begin + done, some = levels.size() == 1 ? count : std::min(count - done, each - at % each);
      compare(bits.data() + done, some, levels[static_cast<size_t>(at / each) % levels.size()], out + at);
      done += some;
    }
  }
}

}  // namespace

// zones(seed, levels, each, out) -> out, a tensor in float32 or float64, filled with ones and zeros by the int64 [1] seed: number i
// is whether 16 bits of word i / 4 are at least a level, `each` numbers in turn the first, the second and so on. None where that
// is not what it is given, or somebody watches.
PyObject* zones(PyObject*, PyObject* const* args, Py_ssize_t) {
  return answer([&]() -> Owned {
    View seed, out;
    if (is_watched() || !look(args[0], seed) || !look(args[3], out) || !PyTuple_Check(args[1])) return nullptr;
    if (seed.dtype != Dtype::i64 || seed.numel() != 1 || !out.is_contiguous()) return nullptr;
    if (out.dtype != Dtype::f32 && out.dtype != Dtype::f64) return nullptr;
    std::vector<int> levels;
    for (Py_ssize_t i = 0; i < PyTuple_Size(args[1]); ++i)
      levels.push_back(static_cast<int>(PyLong_AsLong(PyTuple_GetItem(args[1], i))));
    const int64_t each = PyLong_AsLongLong(args[2]), count = out.numel(), chunks = (count + CHUNK - 1) / CHUNK;
    if (PyErr_Occurred()) throw PythonError();
    if (levels.empty() || each < 1) return nullptr;
    const uint64_t first = *reinterpret_cast<const uint64_t*>(seed.address);
    const auto part = [&](int64_t begin, int64_t end) {
      begin *= CHUNK, end = std::min(count, end * CHUNK);
      if (out.dtype == Dtype::f32)
        fill(first, begin, end, levels, each, reinterpret_cast<float*>(out.address));
      else
        fill(first, begin, end, levels, each, reinterpret_cast<double*>(out.address));
    };
    const int64_t most = chunks > CHUNKS_ALONE ? team_limit().threads() : 1;
    if (most == 1)
      part(0, chunks);
    else
      torch::stable::parallel_for(0, chunks, std::max(CHUNKS_ALONE, (chunks + most - 1) / most), part);
    return kept(args[3]);
  });
}

}  // namespace fastrnn
