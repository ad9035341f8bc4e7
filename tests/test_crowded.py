"""Teams on crowded machines: what limits them, and that results do not depend on it."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from contract import ROOT, python

import fastrnn
from fastrnn.kernels import cpu

pytestmark = pytest.mark.skipif(cpu.EXTENSION is None, reason="the compiled extension has the teams")
SEVERAL = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs, and affinity"
)


def put(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(root)


V1, V2, HYBRID = "sys/fs/cgroup/cpu", "sys/fs/cgroup", "sys/fs/cgroup/unified"
GROUPS = "proc/self/cgroup"
QUOTAS = {
    "no control groups": ({}, math.inf),
    "version 2": ({GROUPS: "0::/a\n", f"{V2}/a/cpu.max": "150000 100000\n"}, 1.5),
    "version 2, no limit": ({GROUPS: "0::/a\n", f"{V2}/a/cpu.max": "max 100000\n"}, math.inf),
    "version 2, a parent's is less": (
        {GROUPS: "0::/a/b/c\n", f"{V2}/a/b/c/cpu.max": "400000 100000", f"{V2}/a/cpu.max": "100000 50000"},
        2,
    ),
    "version 2, a parent's is more": ({GROUPS: "0::/a/b\n", f"{V2}/a/b/cpu.max": "5000 10000", f"{V2}/a/cpu.max": "9 1"}, 0.5),
    "version 2, a container's own group is the mount": ({GROUPS: "0::/\n", f"{V2}/cpu.max": "300000 100000\n"}, 3),
    "version 2, a path from outside": ({GROUPS: "0::/../other\n", f"{V2}/cpu.max": "300000 100000\n"}, 3),
    "version 1": ({GROUPS: "3:cpu:/a\n", f"{V1}/a/cpu.cfs_quota_us": "25000\n", f"{V1}/a/cpu.cfs_period_us": "50000\n"}, 0.5),
    "version 1, no limit": (
        {GROUPS: "3:cpu:/a\n", f"{V1}/a/cpu.cfs_quota_us": "-1", f"{V1}/a/cpu.cfs_period_us": "1"},
        math.inf,
    ),
    "version 1, with cpuacct, of a container": (
        {
            GROUPS: "12:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "both versions": (
        {
            GROUPS: "1:cpuset:/b\n2:cpuacct,cpu:/a\n0::/u\n",
            f"{V1}/a/cpu.cfs_quota_us": "300000",
            f"{V1}/a/cpu.cfs_period_us": "100000",
            f"{HYBRID}/u/cpu.max": "200000 100000",
        },
        2,
    ),
    "another controller's group": (
        {GROUPS: "3:cpuset:/a\n", f"{V1}/a/cpu.cfs_quota_us": "1000", f"{V1}/a/cpu.cfs_period_us": "100000"},
        math.inf,
    ),
    "what makes no sense": (
        {
            GROUPS: "\n:\n0:\nno colons\n0::\n0::relative\n0::/a/\n0::/" + "x/" * 500 + "\n",
            f"{V2}/a/cpu.max": "much 100000",
            f"{V2}/cpu.max": "100000 0",
            f"{V2}/relative/cpu.max": "",
        },
        math.inf,
    ),
    "numbers beyond all bounds": ({GROUPS: "0::/a\n", f"{V2}/a/cpu.max": "1" * 400 + " 100000"}, math.inf),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_quotas_are_read(case, tmp_path):
    files, expected = QUOTAS[case]
    assert cpu.runtime_module().cpu_quota(put(tmp_path, files)) == expected


def test_quota_of_no_path():
    with pytest.raises(TypeError):
        cpu.runtime_module().cpu_quota(None)


# A program that plays calls of a team: a line in says its threads, how many of them came, how many were away, its milliseconds
# and how many of them were lost, or how long nothing happens. With 0 threads it says for how long other CPUs are seen idle (1)
# or busy (0). A line out says how many of 4 threads to use then.
PLAY = """
#include "team_size.h"
#include <cstdio>
int main() {
  fastrnn::TeamSize size;
  long long time = 1'000'000'000'000, threads, came, away;
  double total, lost;
  while (std::scanf("%lld %lld %lld %lf %lf", &threads, &came, &away, &total, &lost) == 5) {
    for (double passed = 0; threads == 0 && passed < total; ++passed)
      if (const long long then = time + 1e6 * passed; size.look_due(then)) size.looked(came == 1, then);
    time += static_cast<long long>(1e6 * total);
    if (threads > 1) size.note(threads, came, away, 1e6 * total, 1e6 * lost, time);
    std::printf("%lld\\n", static_cast<long long>(size.of(4, time)));
  }
}
"""


def compiled(folder: Path, text: str, *sources: str) -> Path:
    """A program of this text and of files of csrc/. Skips the test where no compiler is: who has a wheel needs none."""
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    (folder / "main.cpp").write_text(text)
    files = [folder / "main.cpp", *(ROOT / "csrc" / source for source in sources)]
    subprocess.run([*compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", "-o", folder / "program", *files], check=True)
    return folder / "program"


@pytest.fixture(scope="module")
def play(tmp_path_factory):
    """Plays calls, each (threads, came, away, milliseconds, of them lost): the threads to use after each."""
    program = compiled(tmp_path_factory.mktemp("play"), PLAY)

    def played(calls):
        lines = "\n".join(" ".join(map(str, call)) for call in calls)
        done = subprocess.run([program], input=lines, capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    return played


def quiet(count, threads=4):
    return [(threads, threads, 0, 1, 0)] * count


def nothing(milliseconds):
    return [(1, 1, 0, milliseconds, 0)]


def idle(milliseconds, is_idle=1):
    return [(0, is_idle, 0, milliseconds, 0)]


BAD = (4, 4, 1, 50, 49)  # one of four threads was not there for most of it


def test_a_team_that_loses_nothing_stays(play):
    assert set(play(quiet(1000))) == {4}
    assert set(play([(4, 1, 3, 9, 0)] * 1000)) == {4}  # nested: one came, and nobody waited


def test_a_loss_now_and_then_is_borne(play):
    """A scheduler's turn of ten milliseconds, once in each second."""
    assert set(play((quiet(1000) + [(4, 4, 1, 11, 10)]) * 5)) == {4}


def test_two_threads_that_are_worth_it_in_spite_of_losses_stay(play):
    """A quota of 1.5: both stand still for 25 of each 100 milliseconds."""
    two = quiet(74, threads=2) + [(2, 2, 1, 26, 25)]
    assert set(play(two * 50)) == {4}


def test_the_next_calls_use_those_that_were_there(play):
    assert play([BAD])[-1] == 3
    assert play([(4, 4, 3, 50, 49)])[-1] == 1
    assert play([(4, 2, 2, 50, 49)])[-1] == 2


def test_fewer_where_fewer_lose_too(play):
    assert play([BAD, (3, 3, 1, 9, 8)])[-1] == 1


def longest(sizes, step):
    runs = "".join("." if size == 4 else "x" for size in sizes).split(".")
    return step * max(map(len, runs))


def test_for_longer_while_it_goes_on_and_no_longer_than_a_second(play):
    """A neighbour for ten seconds: each time that a team of all is back it loses again."""
    calls, lengths = [BAD], []
    for _ in range(12):
        sizes = play([*calls, *nothing(5) * 200])[len(calls) - 1 :]
        lengths.append(5 * sizes.index(4))
        calls += [*nothing(lengths[-1]), BAD]
    assert lengths[0] <= 20
    assert all(later >= earlier for earlier, later in itertools.pairwise(lengths))
    assert 500 < lengths[-1] < 1000 and lengths[-1] == lengths[-2]
    after = play([*calls, *nothing(1000), *quiet(1500), BAD, *nothing(20)])
    assert after[-1] == 4  # and short again after a time without losses


def test_idle_cpus_end_the_time_of_a_smaller_team(play):
    """Seen twice in a row, soon after the neighbour has gone. One that pauses half of the time has not gone."""
    calls, sizes = [BAD], []
    for _ in range(8):  # up to the longest time
        calls += [*nothing(5 * play([*calls, *nothing(5) * 200])[len(calls) - 1 :].index(4)), BAD]
    assert play([*calls, *idle(400, 0)])[-1] < 4
    assert play([*calls, *idle(150)])[-1] < 4  # it has been seen once
    assert play([*calls, *idle(250)])[-1] == 4
    for _ in range(3):
        calls += [*idle(101, 0), *idle(100)]
        sizes.append(play(calls)[-1])
    assert max(sizes) < 4


def test_looks_that_do_not_see_a_neighbour_become_rare(play):
    """One on the same cores of a large machine, or beside a virtual one: all seems idle, and the losses come back at once."""

    def lengths(seen, later):
        """Of smaller teams, where losses come back `later` milliseconds after each; from the 9th on looks say `seen`."""
        calls, found = [BAD], []
        for index in range(16):
            waiting = idle(5, 0 if index < 8 else seen) * 200
            found.append(5 * play([*calls, *waiting])[len(calls) - 1 :].index(4))
            calls += [*waiting[: found[-1] // 5], *idle(5) * ((0 if index < 8 else later) // 5), BAD]
        return found[8:]

    assert max(lengths(1, 0)[:2]) < 500 < 700 < lengths(1, 0)[-1] == lengths(0, 0)[-1] < 1000
    assert max(lengths(1, 300)) < 300  # a neighbour that comes back later was not there when the looks said so


IDLE = """
#include "cpus.h"
#include <cstdio>
#include <cstdlib>
int main(int, char** words) {
  const fastrnn::Cpus cpus{std::atoll(words[3]), std::atof(words[4])};
  std::printf("%d", fastrnn::are_idle(std::atoll(words[2]), cpus, words[1]));
}
"""


def test_which_cpus_are_idle(tmp_path):
    """By what the kernel counts; not where the process has a part of the machine, or a sandbox does not say."""
    program, here = compiled(tmp_path, IDLE, "cpus.cpp"), os.sysconf("SC_NPROCESSORS_ONLN")

    def found(text, count=here, allowed=here, quota=math.inf):
        root = put(tmp_path / "root", {"proc/loadavg": text} if text is not None else {})
        done = subprocess.run([program, root, str(count), str(allowed), str(quota)], capture_output=True, text=True, check=True)
        return bool(int(done.stdout))

    assert not found(None)
    assert found("0.21 0.33 0.40 1/135 25803\n")
    assert not found("0.21 0.33 0.40 2/135 25803\n")
    assert found(f"9.21 9.33 9.40 {here}/135 25803\n", count=1)
    assert not found(f"0.21 0.33 0.40 {here + 1}/135 25803\n", count=1)
    assert not found("0.21 0.33 0.40 1/135 25803\n", allowed=here - 1)
    assert not found("0.21 0.33 0.40 1/135 25803\n", quota=here - 0.5)
    for nothing_said in ("0.00 0.00 0.00 0/0 0\n", "", "no numbers at all\n"):
        assert not found(nothing_said)


def test_explain_says_which_limit_holds():
    """In words, for each: torch's number, affinity, a quota, other calls, and losses."""
    runtime, words = cpu.runtime_module(), []

    class Told:
        def __getattr__(self, name):
            return getattr(runtime, name)

    cases = {
        "2, as torch is set to": (2, 2, 4, 4, math.inf, 0, 2),
        "2 of the 8 that torch is set to: the process may use 2 CPUs": (2, 8, 2, 2, math.inf, 0, 8),
        "1 of the 8 that torch is set to: the process may use 1 CPU": (1, 8, 1, 1, math.inf, 0, 8),
        "2 of the 8 that torch is set to: a quota of the process's control group allows 1.5 CPUs": (2, 8, 2, 4, 1.5, 0, 8),
        "3 of the 4 that torch is set to: fewer for now, because calls lost time waiting for threads that were not there": (
            (3, 4, 8, 8, math.inf, 0, 3)
        ),
        "1 of the 2 that torch is set to: other calls are running in this process (3)": (1, 2, 2, 2, math.inf, 3, 2),
    }
    for expected, limits in cases.items():
        told = Told()
        told.threads = lambda limits=limits: limits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "runtime_module", lambda told=told: told)
            words.append(cpu.team())
        assert words[-1] == (limits[0], expected)
    explained = fastrnn.explain(fastrnn.GRU(4, 5), torch.zeros(3, 2, 4))
    assert f"\n  threads: {explained.threads}\n" in str(explained) and explained.threads[0].isdigit()


CHANGING = """
import os, time, torch, fastrnn
from contract import Case, run, same_bits, twins
from fastrnn.kernels import cpu

torch.set_num_threads(4)
CPUS = sorted(os.sched_getaffinity(0))
CASES = [Case("lstm", 33, 130, layers=2, bidirectional=True, batch=5, steps=9), Case("gru", 64, 128, batch=17, steps=20),
         Case("rnn_tanh", 32, 256, batch=2, steps=9)]
MODULES = [twins(case, 0)[1] for case in CASES]
SAMPLES = [case.sample(0) for case in CASES]
STACK = fastrnn.GRU(33, 33, 3).requires_grad_(False)  # its layers run at the same time where there are threads

def step():
    found = {"stack": STACK(torch.ones(100, 1, 33).cumsum(0) / 100)[0]}
    for index, case in enumerate(CASES):
        found |= {f"{index} {name}": value for name, value in run(MODULES[index], case, SAMPLES[index]).items()}
    return found
"""


@SEVERAL
def test_affinity_limits_the_team_and_bits_stay():
    """Looked up again each second: the team follows, and no bit changes."""
    output = python(
        CHANGING
        + """
expected = step()
for count in (len(CPUS), 1, len(CPUS)):
    os.sched_setaffinity(0, CPUS[:count])
    deadline = time.monotonic() + 30
    while cpu.runtime_module().threads()[2] != count:
        same_bits(step(), expected, f"on {count} CPUs:")
        assert time.monotonic() < deadline, cpu.runtime_module().threads()
    assert cpu.team()[0] <= count
    same_bits(step(), expected, f"on {count} CPUs:")
    text = str(fastrnn.explain(STACK, torch.zeros(100, 1, 33)))
    assert count > 1 or ("the process may use 1 CPU" in text and "at the same time" not in text), text
print("done")
"""
    )
    assert output.endswith("done\n")


@SEVERAL
def test_threads_that_openmp_binds_are_counted_by_the_process():
    """Each has an affinity of one CPU then."""
    code = "import torch, fastrnn; from fastrnn.kernels import cpu; print(cpu.runtime_module().threads()[3])"
    assert int(python(code, OMP_PROC_BIND="true", OMP_NUM_THREADS="2")) == len(os.sched_getaffinity(0))


@SEVERAL
def test_bits_stay_beside_a_busy_neighbour():
    """Processes for every CPU, which end with this one; the team becomes as small as it must."""
    output = python(
        CHANGING
        + """
import subprocess, sys
expected = step()
BUSY = "import os\\nparent = os.getppid()\\nwhile os.getppid() == parent: sum(range(100_000))"
busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in CPUS]
try:
    end = time.monotonic() + 3
    while time.monotonic() < end:
        same_bits(step(), expected, f"{cpu.team()}:")
finally:
    for process in busy:
        process.kill()
        process.wait()
print("done")
"""
    )
    assert output.endswith("done\n")


def test_a_fork_forgets_the_calls_of_other_threads():
    """A child is alone: calls that run in the parent's other threads take nothing of its CPUs."""
    output = python("""
import os, threading, torch, fastrnn
from fastrnn.kernels import cpu

torch.set_num_threads(2)
module, x, stop = fastrnn.LSTM(256, 256).requires_grad_(False), torch.zeros(200, 8, 256), threading.Event()

def work():
    torch.set_num_threads(1)
    while not stop.is_set():
        module(x)

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
while cpu.runtime_module().threads()[5] == 0:
    pass
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(cpu.runtime_module().threads()[5])
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
assert cpu.runtime_module().threads()[5] == 0
print("done")
""")
    assert output.endswith("done\n")
