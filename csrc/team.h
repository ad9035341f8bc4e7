// The threads of one call: how many it may use, and torch's own, met at barriers that live no longer than the call.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>

#include "cpus.h"

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

// What limits the team of a call that this thread makes now.
struct TeamLimit {
  int64_t set;      // threads that torch is set to
  Cpus cpus;        // that the process may use, looked up each second
  int64_t running;  // calls of other threads, which share the CPUs with this one
  int64_t fewer;    // threads to use because more lost time in earlier calls of this thread; `set` where they did not

  int64_t threads() const;
};
TeamLimit team_limit();

// Whether anything but torch's number of threads limits a team: it does, except in tests of more threads than there are CPUs.
void set_limits(bool on);

// A call is running as long as this lives.
class Running {
 public:
  Running();
  ~Running();
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;
};

// Run work(rank) on up to `threads` of torch's threads, for rank 0 .. size-1. `gathered(size)` runs first, on one of them,
// once it is known how many came: a nested call gets one, a busy machine fewer than asked for. The first to come waits for
// the others for at most `patience`, then goes on without them. What was lost by waiting counts for this thread's next calls.
void run_team(int64_t threads, std::chrono::nanoseconds patience, const std::function<void(int64_t)>& gathered,
              const std::function<void(int64_t)>& work);

}  // namespace fastrnn
