"""One step of one row, as a control loop or a stream takes it: `python -m bench.stream --help`.

fastrnn's module, frozen or not, called with x and state; `step` into tensors that are there (`out`); and its cell, beside
torch.nn's module and cell and, from zero states that it need not read, onnxruntime. Checked first, then timed in turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import fastrnn
from bench import record, timing
from bench.grid import CELLS, Case, Point
from bench.subjects import Subject, onnxruntime
from fastrnn.timing import Runner, difference

HIDDEN = (64, 128, 256)
TOLERANCE = 1e-5  # relative L2, float32
DEFAULT_OUTPUT = record.result_file("stream")


def repeated(call: Callable[[], Any]) -> Runner:
    """`call` without gradients, so many times."""

    def run(loops: int) -> None:
        with torch.inference_mode():
            for _ in range(loops):
                call()

    return run


def _output(result: Any) -> Tensor:
    """The first tensor of what a module, a step or a cell returns, as [H]."""
    while not isinstance(result, Tensor):
        result = result[0]
    return result.flatten()


def measure(cell: str, hidden: int, threads: int, seconds: float, most: int, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The record of one cell and size."""
    case = Case(Point("apart", 1, hidden, 1), cell, "infer")
    truth: Any = Subject(case, torch.nn).module
    own: Any = Subject(case, fastrnn).module
    frozen = fastrnn.freeze(copy.deepcopy(own))
    cells: list[Any] = []
    for library in (torch.nn, fastrnn):
        made = getattr(library, f"{cell.upper()}Cell")(hidden, hidden)
        made.load_state_dict({name.removesuffix("_l0"): value for name, value in own.state_dict().items()})
        cells.append(made)
    x, h, c = torch.randn(1, hidden), torch.randn(1, 1, hidden), torch.randn(1, 1, hidden)
    state, cell_state = ((h, c), (h[0], c[0])) if cell == "lstm" else (h, h[0])
    sequence, places = x[None], [torch.empty(1, 1, hidden), torch.empty(1, 1, hidden)]
    out = torch.empty(1, hidden), tuple(places) if cell == "lstm" else places[0]
    calls: dict[str, Callable[[], Any]] = {
        "torch": lambda: truth(sequence, state),
        "torch cell": lambda: cells[0](x, cell_state),
        "fastrnn": lambda: own(sequence, state),
        "fastrnn frozen": lambda: frozen(sequence, state),
        "fastrnn step": lambda: own.step(x, state, out=out),
        "fastrnn frozen step": lambda: frozen.step(x, state, out=out),
        "fastrnn cell": lambda: cells[1](x, cell_state),
    }
    with torch.inference_mode():
        y = _output(calls["torch"]())
        errors = {name: difference(_output(call()), y) for name, call in calls.items()}
    result: dict[str, Any] = {"cell": cell, "hidden": hidden, "errors": errors}
    if max(errors.values()) <= tolerance:
        runners = {name: repeated(call) for name, call in calls.items()}
        runners["onnxruntime"], _ = onnxruntime(Subject(case, torch.nn), threads)
        result["times"] = timing.interleave(runners, seconds, most)
    return result


def main(argv: list[str] | None = None) -> int:
    options = timing.parser("bench.stream", __doc__, DEFAULT_OUTPUT).parse_args(argv)
    record.one_tree()
    console, results, threads = Console(highlight=False, soft_wrap=True), [], torch.get_num_threads()
    for cell in CELLS:
        for hidden in HIDDEN:
            results.append(measure(cell, hidden, threads, options.seconds, options.repeats))
            times = results[-1].get("times")
            told = "  ".join(f"{name} {taken['median'] * 1e6:.1f}" for name, taken in times.items()) if times else "[red]wrong"
            console.print(f"{cell} H{hidden}, us: {told}")
    record.write_cases(options, results)
    return any("times" not in result for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
