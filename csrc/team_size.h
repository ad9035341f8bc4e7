// How many threads the next calls use, by what earlier ones lost because a thread was not there: it ran late, or had to let
// others run. A neighbour that keeps a core busy makes a team wait, at every barrier, for the thread that has to share it.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrnn {

class TeamSize {
 public:
  // Threads to use of `most`, at a time in nanoseconds.
  int64_t of(int64_t most, int64_t now) const { return now < until_ ? std::min(most, fewer_) : most; }

  // Whether it is worth a look now if the CPUs of a full team are idle.
  bool look_due(int64_t now) const { return now < until_ && now >= next_look_; }

  // What was found. Idle twice in a row ends the time of the smaller team: a neighbour that pauses all the time is seen so
  // about as often as the threads come back without a look. A neighbour that no look shows, such as one on the same cores of a
  // large machine, or beside a virtual one, brings the losses back at once: then looks become rare.
  void looked(bool idle, int64_t now) {
    idle_looks_ = idle ? idle_looks_ + 1 : 0;
    next_look_ = now + look_time();
    if (idle_looks_ < 2) return;
    until_ = now;
    ended_by_looks_ = true;
  }

  // A call that wanted `threads` and got `size` took `total` nanoseconds until `now`, and lost so many of them, because `away`
  // threads were not there all the time. What it lost counts against what its last thread gained: a team that is worth it in
  // spite of losses stays as it is.
  void note(int64_t threads, int64_t size, int64_t away, int64_t total, int64_t lost, int64_t now) {
    const int64_t gained = size < threads ? 0 : (total - lost) * 3 / 4 / (threads - 1);
    balance_ = std::max(-CREDIT, balance_ + lost - gained);
    const bool again = now - total < until_ + time_;  // it began soon after a smaller team
    const int64_t debt = again ? std::max(DEBT, time_ / 32) : DEBT;
    if (balance_ < debt) return;
    if (ended_by_looks_) mistaken_ = now - total < until_ + 4 * debt ? std::min(mistaken_ + 1, BLIND) : 0;
    ended_by_looks_ = false;
    fewer_ = again && threads <= fewer_ ? threads / 2 : threads - std::clamp<int64_t>(away, 1, threads - 1);
    time_ = again ? std::min(2 * time_, LONGEST) : SHORTEST;
    if (!again) mistaken_ = 0;
    until_ = now + time_;
    next_look_ = now + look_time();
    idle_looks_ = 0;
    balance_ = 0;
  }

 private:
  static constexpr int64_t MS = 1'000'000;
  static constexpr int64_t CREDIT = 40 * MS;  // what a team has gained and may lose: more than a quota of 1.5 takes at once
  // Lost before a team becomes smaller. After a time of a smaller one it is a part of that time, if that is more: the threads
  // have to find their CPUs again, which others were given meanwhile.
  static constexpr int64_t DEBT = 4 * MS;
  static constexpr int64_t SHORTEST = 10 * MS, LONGEST = 800 * MS;  // of a smaller team
  static constexpr int64_t LOOK = 5 * MS;  // between looks, at least: one takes some microseconds

  static constexpr int BLIND = 3;  // mistaken looks, after which the next look is due when the time is over anyway

  int64_t look_time() const { return std::max(LOOK, time_ >> (BLIND - mistaken_)); }

  int64_t balance_ = -CREDIT / 2, fewer_ = 0, time_ = 0, until_ = 0, next_look_ = 0, idle_looks_ = 0;
  bool ended_by_looks_ = false;
  int mistaken_ = 0;  // how often losses came back at once after looks had ended a time
};

}  // namespace fastrnn
