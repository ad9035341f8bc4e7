// Tensors as views, by torch's C functions; and whether their memory may be read.
#pragma once

#include <cstdint>
#include <forward_list>
#include <vector>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "layer.h"

namespace fastrnn {

// Fill in the view of a tensor. False for one that has no strides, such as a sparse one. A tensor that is not on this kind of device,
// or whose numbers are of another kind, has Dtype::other.
bool see(AtenTensorHandle tensor, View& seen, int32_t device_type = aoti_torch_device_type_cpu());

// A view that is one number, again and again, as the gradient of a sum's summands is: with memory for as much as a kernel reads.
class Repeated {
 public:
  static bool is(const View& seen);  // and in a dtype of those that there is a gradient in

  // A row of features, for every step and row of the batch; numbers in bfloat16 as float32.
  View row(const View& seen);
  // All of them, next to each other.
  View all(const View& seen);
  // A row of zeros, for every one of `like`, which is in float32 or float64.
  View zeros(const View& like);

 private:
  View filled(const View& seen, int64_t count, const int64_t* strides);

  std::forward_list<std::vector<int64_t>> memory_;  // of numbers, whatever they are, and of strides
};

// Whether all numbers of a view of this tensor lie in memory that its storage has: a storage may have been freed or made smaller,
// and torch leaves sizes and strides as they were.
bool in_memory(AtenTensorHandle tensor, const View& seen);

// Raise torch's error where they do not. and_not_null: also where the storage says that it has the memory, and has none. That of a
// tensor which torch makes up of zeros when it is read does so.
void check_in_memory(AtenTensorHandle tensor, const View& seen, bool and_not_null = true);

}  // namespace fastrnn
