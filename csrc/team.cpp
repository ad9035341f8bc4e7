#include "team.h"

#include <algorithm>
#include <limits>
#include <thread>
#include <vector>

#include <pthread.h>
#include <time.h>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "team_size.h"

#ifdef __GLIBC__
// libstdc++ leaves out atomics while this is true. It is glibc's own from 2.32 on; torch's wheels want 2.28.
extern "C" char __libc_single_threaded;
char __libc_single_threaded = 0;
#endif

namespace fastrnn {
namespace {

constexpr int64_t MICROSECOND = 1000, SECOND = 1'000'000'000;  // in nanoseconds, as all times here
constexpr int64_t SPIN = 100 * MICROSECOND;                    // longer than a thread takes to wake
constexpr int64_t SHORT_CALL = 1000 * MICROSECOND;             // more than a short call takes
constexpr int64_t FOREVER = std::numeric_limits<int64_t>::max();
constexpr int64_t CLOSED = int64_t{1} << 32;  // set in `arrivals` once the team's size is settled

int64_t read_clock(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec * SECOND + time.tv_nsec;
}

int64_t now() { return read_clock(CLOCK_MONOTONIC); }

// Some milliseconds behind, in a quarter of the time.
int64_t about_now() {
#ifdef CLOCK_MONOTONIC_COARSE
  return read_clock(CLOCK_MONOTONIC_COARSE);
#else
  return now();
#endif
}

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

// A number that threads add to, and that others wait for: they spin, then sleep, so that whoever is late finds a CPU.
class Signal {
 public:
  void add(int32_t amount) {
    value_.fetch_add(amount);
#ifdef __linux__
    constexpr int ALL = std::numeric_limits<int>::max();
    if (sleepers_.load() > 0) syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, ALL, nullptr, nullptr, 0);
#endif
  }

  // Until it is at least `wanted`, or so many nanoseconds are over.
  void wait(int32_t wanted, int64_t patience) {
    const auto done = [&] { return value_.load(std::memory_order_acquire) >= wanted; };
    if (done()) return;
    const int64_t start = now();
    for (int64_t waited = 0; !done() && waited < patience; waited = now() - start) {
      if (waited < SPIN)
        pause();
      else
        sleep(wanted, patience - waited);
    }
  }

 private:
  void sleep([[maybe_unused]] int32_t wanted, [[maybe_unused]] int64_t most) {
#ifdef __linux__
    const timespec time{static_cast<time_t>(most / SECOND), static_cast<long>(most % SECOND)};
    sleepers_.fetch_add(1);  // before the look at the value, as `add` looks here after it has changed that
    if (const int32_t seen = value_.load(); seen < wanted)
      syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, seen, &time, nullptr, 0);
    sleepers_.fetch_sub(1);
#else
    std::this_thread::yield();
#endif
  }

  std::atomic<int32_t> value_{0}, sleepers_{0};
};

thread_local TeamSize team_size;

std::atomic<bool> limited{true};
std::atomic<int64_t> running{0};
// A child has the thread that forked alone: the calls of others will never end there.
[[maybe_unused]] const int forks = pthread_atfork(nullptr, nullptr, [] { running.store(0); });

}  // namespace

int64_t TeamLimit::threads() const {
  const int64_t most = std::min({set, cpus.threads(), fewer});
  return running > 0 ? std::max<int64_t>(1, std::min(most, cpus.threads() / (running + 1))) : most;
}

TeamLimit team_limit() {
  const int64_t set = torch::stable::get_num_threads();
  if (set <= 1 || !limited.load(std::memory_order_relaxed)) return {set, {set, static_cast<double>(set)}, 0, set};
  static thread_local Cpus cpus;
  static thread_local int64_t known_until;
  const int64_t time = about_now();
  if (time >= known_until) {
    cpus = usable_cpus();
    known_until = time + SECOND;
  }
  if (team_size.look_due(time)) team_size.looked(are_idle(std::min(set, cpus.threads()), cpus), time);
  return {set, cpus, running.load(std::memory_order_relaxed), team_size.of(set, time)};
}

void set_limits(bool on) { limited.store(on); }

Running::Running() { running.fetch_add(1, std::memory_order_relaxed); }
Running::~Running() { running.fetch_sub(1, std::memory_order_relaxed); }

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
  struct Member {
    int64_t done = 0, preempted = 0;  // when its work was, and for how long of it others ran
  };
  std::vector<Member> members(threads);
  std::atomic<int64_t> arrivals{0};
  Signal shares, ready;
  int64_t size = 0, met = 0;
  // A thread's own clock takes a system call, which only a long call can spare.
  const bool long_call = patience.count() > 2 * SPIN;
  const int64_t called = now();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const int64_t rank = arrivals.fetch_add(1, std::memory_order_acq_rel);
    if (rank & CLOSED) return;  // too late: the others have shared out the work
    shares.add(static_cast<int32_t>(end - begin));
    if (rank == 0) {
      shares.wait(static_cast<int32_t>(threads), patience.count());
      size = arrivals.fetch_or(CLOSED, std::memory_order_acq_rel);
      gathered(size);
      met = now();
      ready.add(1);
    } else {
      ready.wait(1, FOREVER);
    }
    Member& own = members[rank];
    const int64_t own_time = long_call ? read_clock(CLOCK_THREAD_CPUTIME_ID) : 0;
    work(rank);
    own.done = now();
    if (long_call) own.preempted = own.done - met - (read_clock(CLOCK_THREAD_CPUTIME_ID) - own_time);
  });

  const int64_t ended = now();
  int64_t done = 0, preempted = 0, away = threads - size;
  for (const Member& member : members) {
    done = std::max(done, member.done);
    preempted = std::max(preempted, member.preempted);
    away += member.preempted > SPIN;
  }
  const auto beyond = [](int64_t time, int64_t usual) { return std::max<int64_t>(0, time - usual); };
  const int64_t waited = long_call ? beyond(preempted, SPIN) : beyond(done - met, SHORT_CALL);
  const int64_t lost = beyond(met - called, SPIN) + waited + beyond(ended - done, SPIN);
  team_size.note(threads, size, away, ended - called, lost, ended);
}

}  // namespace fastrnn
