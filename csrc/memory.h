// Memory of the calls: fresh tensors, and large blocks that stay from one call to the next. See docs/memory.md.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fastrnn {

// The product of sizes; an error where 64 bits do not hold it.
int64_t product(std::initializer_list<int64_t> sizes);

// The C library maps blocks of this size anew each time, and unmaps them when freed; these functions keep them, or ask for huge
// pages.
constexpr int64_t MAPPED_BYTES = 32 << 20;

// torch.empty on the CPU, by the call that does not go through the dispatcher. dtype: one of aoti_torch_dtype_*.
torch::stable::Tensor empty_tensor(const std::vector<int64_t>& sizes, int32_t dtype);

// The same for what only backward will see. Large blocks stay for later calls.
torch::stable::Tensor empty_kept(const std::vector<int64_t>& sizes, int32_t dtype);

struct Block {
  int64_t begin = 0, bytes = 0;
};

// Memory of a call's own, its first byte at the begin of a cache line.
class Workspace {
 public:
  Workspace();  // what each thread has for small calls
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Make it so large, if it is not. Does it begin elsewhere now?
  bool reserve(int64_t bytes);

  int64_t begin;

 private:
  int64_t bytes_;
  std::optional<torch::stable::Tensor> medium_;
  Block large_;
};

}  // namespace fastrnn
