#include "team.h"

#include <thread>

#include <torch/csrc/stable/ops.h>

#ifdef __GLIBC__
// libstdc++ leaves out atomics while this is true. It is glibc's own from 2.32 on; torch's wheels want 2.28.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

namespace fastrnn {
namespace {

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait until done() holds: at first without a pause, which takes longer than a thread that is nearly there.
template <class Done>
void spin_until(const Done& done) {
  for (int spins = 0; spins < 4000; ++spins) {
    if (done()) return;
    if (spins > 50) pause();
  }
  while (!done()) std::this_thread::yield();
}

constexpr int64_t CLOSED = int64_t{1} << 32;  // set in `arrivals` once the team's size is settled

}  // namespace

void wait_at(int64_t arrivals, int64_t member, int64_t size) {
  auto* of = reinterpret_cast<Arrivals*>(arrivals);
  int64_t count = of[member].count.load(std::memory_order_relaxed);
  for (int64_t distance = 1; distance < size; distance *= 2) {
    of[member].count.store(++count, std::memory_order_release);
    const auto& other = of[(member + distance) % size].count;
    spin_until([&] { return other.load(std::memory_order_acquire) >= count; });
  }
}

void run_team(int64_t threads, std::chrono::nanoseconds patience, const std::function<void(int64_t)>& gathered,
              const std::function<void(int64_t)>& work) {
  std::atomic<int64_t> arrivals{0}, shares{0};
  std::atomic<bool> ready{false};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t rank = arrivals.fetch_add(1, std::memory_order_acq_rel);
    if (rank & CLOSED) return;  // too late: the others have shared out the work
    shares.fetch_add(end - begin, std::memory_order_acq_rel);
    if (rank == 0) {
      const auto start = std::chrono::steady_clock::now();
      while (shares.load(std::memory_order_acquire) < threads && std::chrono::steady_clock::now() - start < patience) pause();
      gathered(arrivals.fetch_or(CLOSED, std::memory_order_acq_rel));
      ready.store(true, std::memory_order_release);
    } else {
      spin_until([&] { return ready.load(std::memory_order_acquire); });
    }
    work(rank);
  });
}

}  // namespace fastrnn
