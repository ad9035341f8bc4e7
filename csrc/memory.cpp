#include "memory.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <memory>

#include <sys/mman.h>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

// Of torch from 2.11 on; null in 2.10, whose headers and library lack it.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t dimensions, const int64_t* sizes,
                                                                const int64_t* strides, int64_t storage_offset, int32_t dtype,
                                                                int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* result, int32_t layout,
                                                                const uint8_t* metadata, int64_t metadata_size,
                                                                void (*deleter)(void* data, void* context), void* context);

namespace fastrnn {
namespace {

using torch::stable::Tensor;

constexpr int64_t LARGE_BYTES = 8 << 20;  // a smaller workspace would be a large part of a step's memory if it stayed
constexpr int64_t SMALL_BYTES = 64 << 10;
constexpr int64_t HUGE_PAGE_BYTES = 2 << 20;

// Have fresh memory come in huge pages: in small ones its first use costs up to a quarter of a forward pass. Only a wish.
void want_huge_pages(int64_t begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const int64_t first = (begin + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
  const int64_t last = (begin + bytes) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
  madvise(reinterpret_cast<void*>(first), static_cast<size_t>(last - first), MADV_HUGEPAGE);
#endif
}

void unmap(Block block) {
  if (block.bytes) munmap(reinterpret_cast<void*>(block.begin), static_cast<size_t>(block.bytes));
}

// Large blocks, in huge pages, that stay for the next call, because the first use of fresh memory takes up to half as long as
// the call: as many as there are places, KEPT_BYTES together at most, and the system may take them whenever it is short of
// memory. With one place, a block that is too small goes, and any other will do. No locks: a fork may come at any time.
template <size_t Places>
class Blocks {
 public:
  // One that was kept, or none.
  Block find(int64_t bytes) {
    for (auto& place : places_) {
      const std::unique_ptr<Block> block{place.exchange(nullptr)};
      if (!block) continue;
      kept_bytes_ -= block->bytes;
      if (block->bytes >= bytes && (Places == 1 || block->bytes / 2 <= bytes)) return *block;
      if (Places == 1)
        unmap(*block);
      else
        keep(*block);
    }
    return {};
  }

  Block take(int64_t bytes) {
    if (const Block kept = find(bytes); kept.bytes) return kept;
    const int64_t whole = product({(bytes + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES, HUGE_PAGE_BYTES});
    void* mapped = mmap(nullptr, static_cast<size_t>(whole + HUGE_PAGE_BYTES), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(mapped != MAP_FAILED, "fastrnn: can't allocate memory: a call needs ", bytes, " bytes");
    const auto first = reinterpret_cast<int64_t>(mapped);
    const int64_t begin = (first + HUGE_PAGE_BYTES - 1) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    unmap({first, begin - first});
    unmap({begin + whole, first + HUGE_PAGE_BYTES - begin});
    want_huge_pages(begin, whole);
    return {begin, whole};
  }

  // used: so many bytes of it. To mark a few would take longer than a small call.
  void give_back(Block block, int64_t used) {
#ifdef MADV_FREE
    if (used >= LARGE_BYTES) madvise(reinterpret_cast<void*>(block.begin), static_cast<size_t>(block.bytes), MADV_FREE);
#endif
    keep(block);
  }

 private:
  static constexpr int64_t KEPT_BYTES = 256 << 20;

  void keep(Block block) {
    if ((kept_bytes_ += block.bytes) <= KEPT_BYTES) {
      auto owned = std::make_unique<Block>(block);
      for (auto& place : places_) {
        Block* none = nullptr;
        if (!place.compare_exchange_strong(none, owned.get())) continue;
        owned.release();
        return;
      }
    }
    kept_bytes_ -= block.bytes;
    unmap(block);
  }

  std::array<std::atomic<Block*>, Places> places_{};
  std::atomic<int64_t> kept_bytes_{0};
};

Blocks<1> workspaces;
Blocks<8> saved_blocks;

struct Strides {
  std::vector<int64_t> strides;
  int64_t numbers = 1;  // that they span; 1 at least

  explicit Strides(const std::vector<int64_t>& sizes) : strides(sizes.size()) {
    for (size_t i = sizes.size(); i-- > 0; numbers = product({numbers, std::max<int64_t>(sizes[i], 1)})) strides[i] = numbers;
  }
};

}  // namespace

int64_t product(std::initializer_list<int64_t> sizes) {
  int64_t total = 1;
  for (const int64_t size : sizes)
    STD_TORCH_CHECK(!__builtin_mul_overflow(total, size, &total), "fastrnn: sizes too large for 64 bits to count");
  return total;
}

Tensor empty_tensor(const std::vector<int64_t>& sizes, int32_t dtype) {
  const Strides contiguous(sizes);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), contiguous.strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor tensor(handle);
  const int64_t bytes = contiguous.numbers * static_cast<int64_t>(tensor.element_size());
  if (bytes >= MAPPED_BYTES) want_huge_pages(reinterpret_cast<int64_t>(tensor.data_ptr()), bytes);
  return tensor;
}

Tensor empty_kept(const std::vector<int64_t>& sizes, int32_t dtype) {
  const Strides contiguous(sizes);
  const int64_t bytes = product({contiguous.numbers, dtype == aoti_torch_dtype_float32() ? 4 : 8});
  if (bytes < MAPPED_BYTES || !torch_from_blob) return empty_tensor(sizes, dtype);
  auto block = std::make_unique<Block>(saved_blocks.take(bytes));
  const auto give_back = [](void*, void* owned) {
    const std::unique_ptr<Block> block{static_cast<Block*>(owned)};
    saved_blocks.give_back(*block, block->bytes);
  };
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(reinterpret_cast<void*>(block->begin), static_cast<int64_t>(sizes.size()),
                                         sizes.data(), contiguous.strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1,
                                         &handle, aoti_torch_layout_strided(), nullptr, 0, give_back, block.get()));
  block.release();
  return Tensor(handle);
}

Workspace::Workspace() : bytes_(SMALL_BYTES) {
  alignas(64) static thread_local char small[SMALL_BYTES];
  begin = reinterpret_cast<int64_t>(small);
}

bool Workspace::reserve(int64_t bytes) {
  if (bytes <= bytes_) return false;
  bytes_ = bytes;
  if (large_ = bytes < LARGE_BYTES ? workspaces.find(bytes) : workspaces.take(bytes); large_.bytes) {
    begin = large_.begin;
  } else {
    medium_ = empty_tensor({bytes + 64}, aoti_torch_dtype_uint8());
    begin = (reinterpret_cast<int64_t>(medium_->data_ptr()) + 63) / 64 * 64;
  }
  return true;
}

Workspace::~Workspace() {
  if (large_.bytes) workspaces.give_back(large_, bytes_);
}

}  // namespace fastrnn
