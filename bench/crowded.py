"""Calls on a crowded machine: too many threads, busy neighbours, quotas: `python -m bench.crowded --help`.

Each situation has processes of its own, in turns with those of another build (`--before`, that build's Python) and, where many
threads are the matter, of torch.nn. bench/crowded_calls.py is what they run. Figures are medians over the processes, beside the
share of a CPU that anything else on the machine took meanwhile. Busy neighbours are the processes' own children. A quota needs
root and a control group of version 1 or 2 with the CPU controller; without one its situations are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench import record
from fastrnn.machine import cpus

CALLS = Path(__file__).with_name("crowded_calls.py")
DEFAULT_OUTPUT = record.result_file("crowded")
CPUS = cpus()
POINTS = (
    ("GRU", 96, 1, 120),
    ("LSTM", 256, 1, 1),
    ("RNN", 320, 1, 60),
    ("LSTM", 320, 1, 60),
    ("LSTM", 256, 24, 50),
    ("GRU", 96, 48, 80),
)
OTHERS = 0.15  # of a CPU: where the rest of the machine takes more, a process is started again, RETRIES times at most
RETRIES = 2


@dataclass(frozen=True)
class Situation:
    """What is around the calls of a process, see bench/crowded_calls.py; `quota`: CPUs' worth of time, 0 for no limit."""

    name: str
    kind: str = "quiet"
    threads: int = CPUS
    modes: tuple[str, ...] = ("infer", "train")
    who: tuple[str, ...] = ("now", "before")  # also "torch.nn"
    cpus: int = 0
    others: int = 0
    quota: float = 0
    longer: float = 1  # than the usual time
    runs: int = 1  # processes for each of the usual number


ALL = ("now", "before", "torch.nn")
MANY, TOO_MANY = 2 * CPUS, 16 * CPUS
SITUATIONS = (
    Situation("quiet", who=ALL),
    Situation("one thread", threads=1),
    Situation(f"{MANY} threads", threads=MANY, who=ALL),
    Situation(f"{TOO_MANY} threads", threads=TOO_MANY, who=ALL),
    Situation("neighbour", "neighbour", who=ALL),
    Situation("neighbour, one thread for layers", "neighbour", 1, ("train",), ("now",), others=CPUS),
    Situation("after a neighbour", "after", who=("now",)),
    Situation("bursts", "bursts", longer=4),
    Situation("four Python threads", "python threads", modes=("infer",), longer=2),
    Situation("one CPU", cpus=1),
    Situation("one CPU, one thread", threads=1, cpus=1),
    Situation("one CPU, one thread for layers", threads=1, modes=("train",), who=("now",), cpus=1, others=CPUS),
    Situation("quota of 1", quota=1),
    Situation(f"quota of 1, {4 * CPUS} threads", threads=4 * CPUS, quota=1),
    Situation("quota of 1, one thread", threads=1, who=("now",), quota=1),
    Situation("quota of 1.5", quota=1.5, longer=2),
    Situation("smaller team", "smaller team", who=("now",), runs=4),
)


@dataclass(frozen=True)
class Goal:
    """A figure of a situation is at most `times` another's, plus `plus` where the other is below 5 ms; at least, for rates."""

    situation: str
    figure: str
    times: float
    other: str
    other_figure: str = ""  # or the same
    who: str = "now"
    plus: float = 0
    modes: tuple[str, ...] = ("infer", "train")


GOALS = (
    *(
        Goal(name, figure, times, name, who="before")
        for name in ("quiet", "one thread")
        for figure, times in (("p50", 1.03), ("p90", 1.1))
    ),
    *(
        Goal(f"{MANY} threads", "p50", *rest)
        for rest in ((1.3, "quiet", "", "now", 500), (1, f"{MANY} threads", "", "torch.nn"))
    ),
    *(
        Goal(f"{TOO_MANY} threads", "p50", *rest)
        for rest in ((1.2, "quiet", "", "now", 500), (1, f"{TOO_MANY} threads", "", "torch.nn"))
    ),
    Goal("neighbour", "p50", 1.1, "one thread", modes=("infer",)),
    Goal("neighbour", "p90", 1.3, "one thread", "p50", modes=("infer",)),
    Goal("neighbour", "p50", 1.15, "neighbour, one thread for layers", modes=("train",)),
    Goal("after a neighbour", "p50", 1.1, "quiet"),
    Goal("bursts", "mean", 1, "bursts", who="before"),
    Goal("four Python threads", "calls a second", 1, "four Python threads", who="before"),
    Goal("one CPU", "p50", 1.05, "one CPU, one thread", modes=("infer",)),
    Goal("one CPU", "p50", 1.05, "one CPU, one thread for layers", modes=("train",)),
    *(
        Goal(name, figure, times, "quota of 1, one thread", modes=("infer",))
        for name in ("quota of 1", f"quota of 1, {4 * CPUS} threads")
        for figure, times in (("p90", 1.15), ("p99", 1.3))
    ),
    Goal("quota of 1.5", "mean", 1.05, "quota of 1.5", who="before"),
)
LONGEST_SMALLER_TEAM = 100  # ms, on a quiet machine

Key = tuple[str, str, str, str]  # situation, who, point, mode


def point_name(point: tuple[Any, ...]) -> str:
    cell, hidden, batch, steps = point
    return f"{cell} H{hidden} B{batch} T{steps}"


class Quota:
    """A control group with a quota, inside the block; `enter` goes before a command that is to run in it."""

    def __init__(self, quota: float) -> None:
        second = Path("/sys/fs/cgroup/cgroup.controllers").exists()
        self.path = Path("/sys/fs/cgroup") / ("" if second else "cpu") / f"fastrnn-crowded-{os.getpid()}"
        period, allowed = 100_000, int(100_000 * quota)
        both = {"cpu.max": f"{allowed} {period}"}
        self.files = both if second else {"cpu.cfs_period_us": str(period), "cpu.cfs_quota_us": str(allowed)}
        self.enter = ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh"]

    def __enter__(self) -> Quota:
        self.path.mkdir()
        try:
            for name, value in self.files.items():
                (self.path / name).write_text(value)
        except OSError:
            self.path.rmdir()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.path.rmdir()


def busy_seconds() -> float:
    """Processor time that anything but this process's children has taken since the machine started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    own = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime


def process(python: str, job: dict[str, Any], quota: float) -> tuple[list[dict[str, float]], float]:
    """What bench/crowded_calls.py finds in a process of its own, and the share of a CPU that others took meanwhile."""
    command = [python, str(CALLS), json.dumps(job)]
    with tempfile.TemporaryDirectory() as elsewhere:  # where no package of this tree lies
        for _ in range(1 + RETRIES):
            before = busy_seconds(), os.times().elapsed
            if quota:
                with Quota(quota) as group:
                    done = subprocess.run([*group.enter, *command], cwd=elsewhere, capture_output=True, text=True, check=False)
            else:
                done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{job['situation']} failed:\n{done.stderr}")
            others = (busy_seconds() - before[0]) / (os.times().elapsed - before[1])
            if others <= OTHERS:
                break
    return json.loads(done.stdout), others


def measure(
    situation: Situation, pythons: dict[str, str], seconds: float, runs: int, points=POINTS, modes=None
) -> dict[Key, Any]:
    """The cases of one situation. pythons: the interpreter of each build."""
    found: dict[Key, Any] = {}
    jobs = [(point, mode) for mode in modes or situation.modes for point in points if mode == "infer" or point[-1] > 1]
    for _ in range(runs * situation.runs):
        for who in situation.who:
            build = "now" if who == "torch.nn" else who
            if build not in pythons:
                continue
            job = {
                "situation": situation.kind,
                "threads": situation.threads,
                "cpus": situation.cpus,
                "others": situation.others,
            }
            job |= {"library": "torch.nn" if who == "torch.nn" else "fastrnn", "busy": max(1, CPUS // 2)}
            job |= {"seconds": seconds * situation.longer, "jobs": jobs}
            results, others = process(pythons[build], job, situation.quota)
            for (point, mode), result in zip(jobs, results, strict=True):
                case = found.setdefault((situation.name, who, point_name(point), mode), {"runs": [], "others": []})
                case["runs"].append(result)
                case["others"].append(others)
    for case in found.values():
        case["median"] = {name: statistics.median(run[name] for run in case["runs"]) for name in case["runs"][0]}
    return found


def missed(cases: dict[Key, Any]) -> Iterator[str]:
    """The goals that these cases miss, in words; those whose figures are not there are left out."""
    for goal in GOALS:
        for (situation, who, point, mode), case in cases.items():
            other = cases.get((goal.other, goal.who, point, mode))
            if situation != goal.situation or who != "now" or mode not in goal.modes or other is None:
                continue
            found, bound = case["median"].get(goal.figure), other["median"].get(goal.other_figure or goal.figure)
            if found is None or bound is None:
                continue
            limit = goal.times * bound + goal.plus * (bound < 5000)
            if found < limit if goal.figure == "calls a second" else found > limit:
                words = f"{goal.times:g} x {goal.other}" + f", {goal.who}" * (goal.who != "now")
                yield f"{situation}, {point} {mode}: {goal.figure} {found:.0f}, the goal {limit:.0f} ({words})"
    for (situation, _, point, mode), case in cases.items():
        longest = max(run.get("longest ms", 0) for run in case["runs"])
        if longest > LONGEST_SMALLER_TEAM:
            yield f"{situation}, {point} {mode}: {longest:.0f} ms, the goal {LONGEST_SMALLER_TEAM}"


def line(key: Key, case: dict[str, Any]) -> str:
    situation, who, point, mode = key
    figures = "  ".join(f"{name} {value:.0f}" for name, value in case["median"].items())
    return f"{situation:34} {point:18} {mode:6} {who:9} {figures}  [dim]others {max(case['others']):.2f}"


def read(path: Path) -> dict[Key, Any]:
    """The cases of a result file."""
    if not path.exists():
        return {}
    cases = json.loads(path.read_text())["cases"]
    return {(case["situation"], case["who"], case["point"], case["mode"]): case for case in cases}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.crowded", description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="PYTHON", help="the Python of another build, to compare with")
    parser.add_argument("--before-commit", metavar="HASH", default="", help="what that build was made of")
    parser.add_argument("--only", default="", metavar="REGEX", help="situations and modes, such as '^quota.* infer'")
    parser.add_argument("--points", default="", metavar="REGEX", help="points such as 'LSTM H256 B24 T50'")
    parser.add_argument("--runs", type=int, default=5, help="processes of each kind (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of calls for each point (default %(default)s)")
    parser.add_argument("--check", action="store_true", help="fail where a goal is missed")
    parser.add_argument("--keep", action="store_true", help="leave what else the output holds in it")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="(default %(default)s)")
    options = parser.parse_args(argv)
    record.one_tree()
    console = Console(highlight=False, soft_wrap=True)
    pythons = {"now": sys.executable} | ({"before": options.before} if options.before else {})
    points = [point for point in POINTS if re.search(options.points, point_name(point))]
    cases = read(options.output) if options.keep else {}
    for situation in SITUATIONS:
        for mode in situation.modes:
            if not re.search(options.only, f"{situation.name} {mode}"):
                continue
            try:
                found = measure(situation, pythons, options.seconds, options.runs, points, (mode,))
            except OSError as error:
                console.print(f"[yellow]{situation.name}: left out: {error}")
                continue
            for key, case in found.items():
                console.print(line(key, case))
            cases |= found
            named = [dict(zip(("situation", "who", "point", "mode"), key, strict=True)) | case for key, case in cases.items()]
            settings = {"seconds": options.seconds, "before": options.before_commit}
            record.write(options.output, record.header(**settings) | {"cases": named})
    goals = list(missed(cases))
    console.print(f"{len(goals)} goals missed", *goals, sep="\n    ")
    return int(options.check and bool(goals))


if __name__ == "__main__":
    raise SystemExit(main())
