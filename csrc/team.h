// The threads of one call: torch's own, met at barriers that live no longer than the call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

namespace fastrnn {

// How often a thread has told the others of a group that it is there. Two cache lines, as processors fetch them in pairs.
// kernels/cpu/plan.py knows the size as ARRIVALS_BYTES.
struct alignas(128) Arrivals {
  std::atomic<int64_t> count{0};
};
static_assert(sizeof(Arrivals) == 128);

// The barrier of `size` threads, whose Arrivals are next to each other. In round r each waits for the one 2**r places on, which
// by then has heard of as many as lie between: every line is written by one and read by one at a time (D. Hensgen, R. Finkel,
// U. Manber, Two algorithms for barrier synchronization, 1988). What was written before is seen by all after. Spins a while,
// then gives up the processor at every look, so that more threads than processors slow down and do not stall. For the kernels.
void wait_at(int64_t arrivals, int64_t member, int64_t size);

// Run work(rank) on up to `threads` of torch's threads, for rank 0 .. size-1. `gathered(size)` runs first, on one of them,
// once it is known how many came: a nested call gets one, a busy machine fewer than asked for. The first to come waits for
// the others for at most `patience`, then goes on without them.
void run_team(int64_t threads, std::chrono::nanoseconds patience, const std::function<void(int64_t)>& gathered,
              const std::function<void(int64_t)>& work);

}  // namespace fastrnn
