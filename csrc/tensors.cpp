#include "tensors.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>

#include <torch/headeronly/util/Exception.h>

namespace fastrnn {
namespace {

const int32_t STRIDED = aoti_torch_layout_strided();
const std::pair<int32_t, Dtype> DTYPES[] = {{aoti_torch_dtype_float32(), Dtype::f32},
                                            {aoti_torch_dtype_float64(), Dtype::f64},
                                            {aoti_torch_dtype_bfloat16(), Dtype::bf16},
                                            {aoti_torch_dtype_float16(), Dtype::f16},
                                            {aoti_torch_dtype_int64(), Dtype::i64},
                                            {aoti_torch_dtype_uint8(), Dtype::byte},
                                            {aoti_torch_dtype_bool(), Dtype::flag}};

Dtype dtype_of(int32_t code) {
  const auto* found = std::find_if(std::begin(DTYPES), std::end(DTYPES), [&](const auto& pair) { return pair.first == code; });
  return found == std::end(DTYPES) ? Dtype::other : found->second;
}

// Bytes from the first number of a view to the end of its last one.
int64_t span(const View& seen) {
  int64_t last = 0;
  for (int64_t axis = 0; axis < seen.dims; ++axis) {
    if (seen.sizes[axis] == 0) return 0;
    last += (seen.sizes[axis] - 1) * seen.strides[axis];
  }
  return (last + 1) * bytes_of(seen.dtype);
}

std::string list(const int64_t* numbers, int64_t count) {
  std::ostringstream text;
  for (int64_t i = 0; i < count; ++i) text << (i ? ", " : "[") << numbers[i];
  return text.str() + "]";
}

}  // namespace

bool see(AtenTensorHandle tensor, View& seen, int32_t device_type) {
  int32_t device, layout, dtype;
  int64_t *sizes, *strides;
  void* data;
  seen = {};
  if (aoti_torch_get_device_type(tensor, &device) || aoti_torch_get_layout(tensor, &layout) || layout != STRIDED) return false;
  if (aoti_torch_get_dim(tensor, &seen.dims) || aoti_torch_get_sizes(tensor, &sizes)) return false;
  if (aoti_torch_get_strides(tensor, &strides)) return false;
  seen.sizes = sizes;
  seen.strides = strides;
  if (device != device_type) return true;
  if (aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_data_ptr(tensor, &data)) return false;
  seen.dtype = dtype_of(dtype);
  seen.address = reinterpret_cast<int64_t>(data);
  return true;
}

bool Repeated::is(const View& seen) {
  if (seen.dtype != Dtype::f32 && seen.dtype != Dtype::f64 && seen.dtype != Dtype::bf16) return false;
  for (int64_t axis = 0; axis < seen.dims; ++axis)
    if (seen.sizes[axis] != 1 && seen.strides[axis] != 0) return false;
  return seen.numel() > 1;
}

View Repeated::row(const View& seen) {
  auto& strides = memory_.emplace_front(seen.dims, 0);
  strides.back() = 1;
  return filled(seen, seen.size(-1), strides.data());
}

View Repeated::zeros(const View& like) {
  constexpr int64_t zero = 0;
  View seen = like;
  seen.address = reinterpret_cast<int64_t>(&zero);
  return row(seen);
}

View Repeated::all(const View& seen) {
  auto& strides = memory_.emplace_front(seen.dims, 1);
  for (int64_t axis = seen.dims - 1; axis-- > 0;) strides[axis] = strides[axis + 1] * seen.sizes[axis + 1];
  return filled(seen, seen.numel(), strides.data());
}

View Repeated::filled(const View& seen, int64_t count, const int64_t* strides) {
  View made = seen;
  made.strides = strides;
  if (seen.dtype == Dtype::bf16) made.dtype = Dtype::f32;
  auto& numbers = memory_.emplace_front((count * bytes_of(made.dtype) + 7) / 8);
  made.address = reinterpret_cast<int64_t>(numbers.data());
  if (made.dtype == Dtype::f64) {
    std::fill_n(numbers.data(), count, *reinterpret_cast<const int64_t*>(seen.address));
  } else {
    const bool half = seen.dtype == Dtype::bf16;  // the upper half of a float32
    const auto* from = reinterpret_cast<const void*>(seen.address);
    const uint32_t bits = half ? uint32_t{*static_cast<const uint16_t*>(from)} << 16 : *static_cast<const uint32_t*>(from);
    std::fill_n(reinterpret_cast<uint32_t*>(numbers.data()), count, bits);
  }
  return made;
}

namespace {

// Where a view lies in a storage: bytes before it, and to its end; bytes that the storage has, and whether these are anywhere.
struct Place {
  Place(AtenTensorHandle tensor, const View& seen) {
    const int64_t bytes = span(seen);
    if (!bytes || seen.dtype == Dtype::other) return;  // nobody reads it
    if (aoti_torch_get_storage_offset(tensor, &begin) || aoti_torch_get_storage_size(tensor, &stored)) stored = 0;
    begin *= bytes_of(seen.dtype);
    end = begin + bytes;
    is_null = seen.address == begin;  // the address is that of the storage and this
  }
  int64_t begin = 0, end = 0, stored = 0;
  bool is_null = false;
};

}  // namespace

bool in_memory(AtenTensorHandle tensor, const View& seen) {
  const Place place(tensor, seen);
  return place.end <= place.stored && !place.is_null;
}

void check_in_memory(AtenTensorHandle tensor, const View& seen, bool and_not_null) {
  const Place place(tensor, seen);
  if (place.end <= place.stored && !(and_not_null && place.is_null)) return;
  STD_TORCH_CHECK(place.stored > 0 && !place.is_null,
                  "The tensor has a non-zero number of elements, but its data is not allocated yet.");
  STD_TORCH_CHECK(false, "setStorage: sizes ", list(seen.sizes, seen.dims), ", strides ", list(seen.strides, seen.dims),
                  ", storage offset ", place.begin / bytes_of(seen.dtype), ", and itemsize ", bytes_of(seen.dtype),
                  " requiring a storage size of ", place.end, " are out of bounds for storage of size ", place.stored);
}

}  // namespace fastrnn
