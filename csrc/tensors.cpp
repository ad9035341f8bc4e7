#include "tensors.h"

#include <algorithm>
#include <iterator>
#include <sstream>
#include <string>
#include <utility>

#include <torch/headeronly/util/Exception.h>

namespace fastrnn {
namespace {

const int32_t CPU = aoti_torch_device_type_cpu(), STRIDED = aoti_torch_layout_strided();
const std::pair<int32_t, Dtype> DTYPES[] = {{aoti_torch_dtype_float32(), Dtype::f32},
                                            {aoti_torch_dtype_float64(), Dtype::f64},
                                            {aoti_torch_dtype_bfloat16(), Dtype::bf16},
                                            {aoti_torch_dtype_int64(), Dtype::i64},
                                            {aoti_torch_dtype_uint8(), Dtype::byte}};

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

bool see(AtenTensorHandle tensor, View& seen) {
  int32_t device, layout, dtype;
  int64_t *sizes, *strides;
  void* data;
  seen = {};
  if (aoti_torch_get_device_type(tensor, &device) || aoti_torch_get_layout(tensor, &layout) || layout != STRIDED) return false;
  if (aoti_torch_get_dim(tensor, &seen.dims) || aoti_torch_get_sizes(tensor, &sizes)) return false;
  if (aoti_torch_get_strides(tensor, &strides)) return false;
  seen.sizes = sizes;
  seen.strides = strides;
  if (device != CPU) return true;
  if (aoti_torch_get_dtype(tensor, &dtype) || aoti_torch_get_data_ptr(tensor, &data)) return false;
  seen.dtype = dtype_of(dtype);
  seen.address = reinterpret_cast<int64_t>(data);
  return true;
}

bool in_memory(AtenTensorHandle tensor, const View& seen) {
  if (seen.dtype == Dtype::other) return true;  // nobody reads it
  const int64_t bytes = span(seen);
  if (!bytes) return true;
  int64_t offset, stored;
  if (aoti_torch_get_storage_offset(tensor, &offset) || aoti_torch_get_storage_size(tensor, &stored)) return false;
  offset *= bytes_of(seen.dtype);
  return offset + bytes <= stored && seen.address != offset;  // where a storage has no memory, the address is the offset alone
}

void check_in_memory(AtenTensorHandle tensor, const View& seen) {
  if (in_memory(tensor, seen)) return;
  int64_t offset = 0, stored = 0;
  aoti_torch_get_storage_offset(tensor, &offset);
  aoti_torch_get_storage_size(tensor, &stored);
  STD_TORCH_CHECK(stored > 0 && seen.address != offset * bytes_of(seen.dtype),
                  "The tensor has a non-zero number of elements, but its data is not allocated yet.");
  STD_TORCH_CHECK(false, "setStorage: sizes ", list(seen.sizes, seen.dims), ", strides ", list(seen.strides, seen.dims),
                  ", storage offset ", offset, ", and itemsize ", bytes_of(seen.dtype), " requiring a storage size of ",
                  span(seen) + offset * bytes_of(seen.dtype), " are out of bounds for storage of size ", stored);
}

}  // namespace fastrnn
