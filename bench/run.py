"""The grid, fastrnn against torch.nn and, in inference, onnxruntime and openvino: `python -m bench.run --help`.

Each case is checked first (outputs, states, gradients); no time is taken of one that is wrong, and the run ends red.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import fastrnn
from bench import record
from bench.grid import Case, cases
from bench.subjects import PEERS, Subject
from bench.timing import Runner, interleave
from fastrnn.timing import TOLERANCES, difference, differences

TOLERANCE = TOLERANCES[torch.float32]
DEFAULT_OUTPUT = record.result_file("grid")


def wrong(subject: Subject, truth: Subject) -> list[str]:
    """What the subject computes otherwise than the truth."""
    return [f"{name} differs by {value:.2g}" for name, value in differences(subject, truth).items() if not value <= TOLERANCE]


def padded(case: Case) -> Case:
    """The case without its packing."""
    return replace(case, point=replace(case.point, fill=1.0))


def rivals(case: Case, peers: list[str], threads: int) -> tuple[Subject, dict[str, Runner], list[str]]:
    """fastrnn's subject, the runners of all who take part, and what is wrong with their results."""
    subject, truth = Subject(case, fastrnn), Subject(case, torch.nn)
    faults = wrong(subject, truth)
    runners: dict[str, Runner] = {"fastrnn": subject.run, "torch": truth.run}
    if case.point.packed:
        runners["fastrnn padded"] = Subject(padded(case), fastrnn).run
        runners["torch padded"] = Subject(padded(case), torch.nn).run
    elif case.mode == "infer" and case.point.simple:
        y = truth.results()["y"]
        frozen = Subject(case, fastrnn)
        fastrnn.freeze(frozen.module)
        faults += [f"frozen: {fault}" for fault in wrong(frozen, truth)]
        runners["fastrnn frozen"] = frozen.run
        for name in peers:
            runners[name], peer_y = PEERS[name](truth, threads)
            if not difference(peer_y, y) <= TOLERANCE:
                faults.append(f"y of {name} differs by {difference(peer_y, y):.2g}")
    return subject, runners, faults


def measure(case: Case, peers: list[str], threads: int, seconds: float, most: int) -> dict[str, Any]:
    """The record of one case."""
    subject, runners, faults = rivals(case, peers, threads)
    with torch.set_grad_enabled(case.mode == "train"):
        explanation = fastrnn.explain(subject.module, subject.input)
    result: dict[str, Any] = {
        "name": case.name,
        "point": asdict(case.point),
        "cell": case.cell,
        "mode": case.mode,
        "engine": explanation.engine,
        "schedule": list(explanation.schedule),
        "faults": faults,
    }
    if not faults:
        times = interleave(runners, seconds, most)
        own = times["fastrnn"]["median"]
        result["ratios"] = {name: taken["median"] / own for name, taken in times.items() if name != "fastrnn"}
        result["times"] = times
    return result


def line(result: dict[str, Any]) -> str:
    """One case for the terminal."""
    if result["faults"]:
        return f"[red]{result['name']}: wrong: {', '.join(result['faults'])}"
    ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in result["ratios"].items())
    colour = "red" if result["ratios"]["torch"] < 0.85 else "yellow" if result["ratios"]["torch"] < 1 else "green"
    return f"{result['name']:36} {result['times']['fastrnn']['median'] * 1e3:9.3f} ms  [{colour}]{ratios}"


def counts(text: str) -> list[int]:
    """Numbers of threads, such as "1,2,4"."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, such as 1,2,4, got {text!r}")
    return found


def scaling(results: list[dict[str, Any]]) -> list[str]:
    """How a case gains from threads, a line for each: times of the first count over those of each other."""
    by_case: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if not result["faults"]:
            by_case.setdefault(result["name"], []).append(result)
    lines = []
    for name, found in by_case.items():
        words = [
            f"{rival} " + " ".join(f"{each['threads']}: {first / each['times'][rival]['median']:.2f}x" for each in found)
            for rival in ("fastrnn", "torch")
            if (first := found[0]["times"][rival]["median"])
        ]
        lines.append(f"{name:36} {'   '.join(words)}")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="cases such as 'few lstm train B1 T100 H64'")
    parser.add_argument("--repeats", type=int, default=50, help="at most so many of each rival (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.5, help="of timing per case (default %(default)s)")
    count = torch.get_num_threads()
    parser.add_argument("--threads", type=counts, default=[count], metavar="N[,N...]", help=f"each in turn (default {count})")
    parser.add_argument("--peers", default="torch,onnxruntime,openvino", help="(default %(default)s)")
    parser.add_argument("--output", type=Path, help=f"(default {DEFAULT_OUTPUT} for the whole grid, else none)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    record.one_tree()
    peers = [name for name in options.peers.split(",") if name != "torch"]  # which is the truth, and takes part
    chosen = [(threads, case) for threads in options.threads for case in cases(options.only)]
    several = len(options.threads) > 1
    console = Console(highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"[yellow]other work is running here (load {load:.1f}): do not trust these times")
    results = []
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for threads, case in chosen:
            torch.set_num_threads(threads)
            progress.update(task, description=case.name)
            results.append(measure(case, peers, threads, options.seconds, options.repeats))
            if several:
                results[-1]["threads"] = threads
            console.print(f"{threads:2} threads  " * several + line(results[-1]))
            progress.advance(task)
    for words in scaling(results) if several else ():
        console.print(words)
    output = options.output or (DEFAULT_OUTPUT if not (options.only or several) else None)
    if output:
        settings = {name: getattr(options, name) for name in ("seconds", "repeats")}
        settings["threads"] = options.threads if several else options.threads[0]
        record.write(output, record.header(dtype="float32", **settings) | {"cases": results})
        console.print(f"written: {output}")
    return any(result["faults"] for result in results)


if __name__ == "__main__":
    sys.exit(main())
