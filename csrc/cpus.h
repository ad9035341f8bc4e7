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

}  // namespace fastrnn
