// Tensors as views, by torch's C functions; and whether their memory may be read.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "layer.h"

namespace fastrnn {

// Fill in the view of a tensor. False for one that has no strides, such as a sparse one. A tensor that is not on the CPU, or whose
// numbers are of another kind, has Dtype::other.
bool see(AtenTensorHandle tensor, View& seen);

// Whether all numbers of a view of this tensor lie in memory that its storage has: a storage may have been freed or made smaller,
// and torch leaves sizes and strides as they were.
bool in_memory(AtenTensorHandle tensor, const View& seen);

// Raise torch's error where they do not. and_not_null: also where the storage says that it has the memory, and has none. That of a
// tensor which torch makes up of zeros when it is read does so.
void check_in_memory(AtenTensorHandle tensor, const View& seen, bool and_not_null = true);

}  // namespace fastrnn
