// The threads of one call: torch's own, met at barriers that live no longer than the call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace fastrnn {

// Two cache lines: those who wait read only the second one. kernels/cpu/plan.py knows the size as BARRIER_BYTES.
struct alignas(64) Barrier {
  std::atomic<int64_t> arrived{0};
  int64_t size{1};
  alignas(64) std::atomic<int64_t> round{0};
};
static_assert(sizeof(Barrier) == 128);

// Meet at the barrier at `address`: spin a while, then give up the processor at every look, so that more threads than
// processors slow down and do not stall. What was written before is seen by all after. Called from the kernels.
void wait_at(int64_t address);

// Run work(rank) on up to `threads` of torch's threads, for rank 0 .. size-1. `gathered(size)` runs first, on one of them,
// once it is known how many came: a nested call gets one, a busy machine fewer than asked for. The first to come waits for
// the others for at most `patience`, then goes on without them.
void run_team(int64_t threads, std::chrono::nanoseconds patience, const std::function<void(int64_t)>& gathered,
              const std::function<void(int64_t)>& work);

}  // namespace fastrnn
