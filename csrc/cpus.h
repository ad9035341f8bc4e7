// The CPUs that this process may use: what its affinity and its control groups' quotas leave of the machine's.
#pragma once

#include <cstdint>
#include <string>

namespace fastrnn {

// CPUs' worth of time a second that control groups grant, the least of the process's own and of those above it; infinite where
// nothing limits it. Versions 1 and 2. root: where /proc and /sys are looked for, "" but in tests.
double cpu_quota(const std::string& root = "");

struct Cpus {
  int64_t allowed;  // by the affinity of the calling thread
  double quota;
  // Threads that these keep busy. A quota of 1.5 is worth two threads: they do more in all, though they stand still for part of
  // each period; one of 1.4 is worth one, which never does.
  int64_t threads() const;
};
Cpus usable_cpus();

// Whether so many CPUs, the calling thread's among them, are idle but for it. Never where the process may not use all CPUs of the
// machine all the time, as the kernel counts what is ready to run for the machine alone. root: as above.
bool are_idle(int64_t count, const Cpus& cpus, const std::string& root = "");

}  // namespace fastrnn
