#include "cpus.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <limits>
#include <sstream>
#include <thread>

#ifdef __linux__
#include <sched.h>
#include <unistd.h>

// Of torch's OpenMP; null where its threads are others. Where OpenMP has bound each of its threads to a CPU, the calling one
// too, this still counts those of the process.
extern "C" __attribute__((weak)) int omp_get_num_procs();
#endif

namespace fastrnn {
namespace {

constexpr double UNLIMITED = std::numeric_limits<double>::infinity();

// quota / period, as the first words of `text`; unlimited where they are not two positive numbers ("max 100000", "-1 100000").
double quota_in(const std::string& text) {
  std::istringstream words(text);
  double quota = 0, period = 0;
  return words >> quota >> period && quota > 0 && period > 0 ? quota / period : UNLIMITED;
}

std::string contents(const std::string& path) {
  std::ifstream file(path);
  std::string text;
  std::getline(file, text);
  return text;
}

double quota_of(const std::string& group, bool second) {
  if (second) return quota_in(contents(group + "/cpu.max"));
  return quota_in(contents(group + "/cpu.cfs_quota_us") + ' ' + contents(group + "/cpu.cfs_period_us"));
}

}  // namespace

double cpu_quota(const std::string& root) {
  double least = UNLIMITED;
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // such as "0::/a/b" (version 2) and "4:cpu,cpuacct:/a/b"
    const size_t first = line.find(':'), last = first == line.npos ? line.npos : line.find(':', first + 1);
    if (last == line.npos) continue;
    const std::string controllers = ',' + line.substr(first + 1, last - first - 1) + ',';
    const bool second = controllers == ",,";
    if (!second && controllers.find(",cpu,") == line.npos) continue;
    const std::array<std::string, 2> mounts =
        second ? std::array<std::string, 2>{"", "/unified"} : std::array<std::string, 2>{"/cpu", "/cpu,cpuacct"};
    // From the group itself up to the mount. A container may be told a path that it does not see: its own group is the mount.
    for (const std::string& mount : mounts) {
      for (std::string path = line.substr(last + 1);; path.erase(path.rfind('/'))) {
        least = std::min(least, quota_of(root + "/sys/fs/cgroup" + mount + path, second));
        if (path.find('/') == path.npos) break;
      }
    }
  }
  return least;
}

int64_t Cpus::threads() const {
  return std::max<int64_t>(1, static_cast<int64_t>(std::min(static_cast<double>(allowed), std::floor(quota + 0.5))));
}

bool are_idle(int64_t count, const Cpus& cpus, const std::string& root) {
#ifdef __linux__
  const int64_t online = sysconf(_SC_NPROCESSORS_ONLN);
  if (cpus.allowed < online || cpus.quota < static_cast<double>(online)) return false;
  std::istringstream words(contents(root + "/proc/loadavg"));  // such as "0.21 0.33 0.40 1/135 25803": one ready of 135 threads
  std::string average;
  int64_t ready = 0;  // the calling thread is one; 0 where a sandbox does not say
  words >> average >> average >> average >> ready;
  return ready > 0 && ready + count - 1 <= online;
#else
  return false;
#endif
}

Cpus usable_cpus() {
#ifdef __linux__
  cpu_set_t set;
  const int64_t own = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : CPU_SETSIZE;
  return {omp_get_num_procs ? omp_get_num_procs() : own, cpu_quota()};
#else
  return {std::max<int64_t>(1, std::thread::hardware_concurrency()), UNLIMITED};
#endif
}

}  // namespace fastrnn
