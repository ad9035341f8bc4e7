"""What resets and lengths cost: `python -m bench.resets --help`.

A rollout of reinforcement learning, from the states that were recorded before it, in which 5 % of the steps are resets: with
resets, without them, and as it is done on torch.nn's layers, which are called anew at each step at which a row is reset (as
sb3-contrib does). A padded batch, 57 % full:
by its lengths, and packed, the packing not counted. Rivals of one case are timed in turns, as in bench.run, after a check that
the gradients of the first and of torch.nn's agree.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from bench import record, timing
from fastrnn.timing import Runner

CELLS = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM"}
STEPS, ROWS, INPUTS, UNITS = 128, 64, 64, 256
RESETS, FILL = 0.05, 0.57
TOLERANCE = 1e-3
DEFAULT_OUTPUT = record.result_file("resets")
Call = Callable[[], Tensor]


def split(module: nn.Module, x: Tensor, state: Any, resets: Tensor) -> Tensor:
    """Run torch.nn's module on each stretch of steps at which no row is reset, from states in which the reset rows are zero."""
    cuts = [0, *(t for t in range(1, len(x)) if resets[t].any()), len(x)]
    outputs = []
    for begin, end in pairwise(cuts):
        keep = (~resets[begin]).to(x.dtype).unsqueeze(-1)
        state = tuple(each * keep for each in state) if isinstance(state, tuple) else state * keep
        y, state = module(x[begin:end], state)
        outputs.append(y)
    return torch.cat(outputs)


def calls(cell: str, kind: str, sizes: tuple[int, int, int, int]) -> tuple[nn.Module, nn.Module, dict[str, Call], Tensor]:
    """fastrnn's module and torch.nn's of the same weights, rivals by name, and x."""
    T, B, I, H = sizes
    torch.manual_seed(0)
    ours, stock = (getattr(library, CELLS[cell])(I, H) for library in (fastrnn, nn))
    stock.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, I, requires_grad=True)
    if kind == "resets":
        resets, (h, c) = torch.rand(T, B) < RESETS, torch.randn(2, 1, B, H).tanh()
        hx = (h, c) if cell == "lstm" else h
        return ours, stock, {
            "resets": lambda: ours(x, hx, resets=resets)[0],
            "without": lambda: ours(x, hx)[0],
            "split on torch.nn": lambda: split(stock, x, hx, resets),
        }, x  # fmt: skip
    lengths = torch.linspace(2 * FILL - 1, 1, B).clamp(0).mul(T).round().long()[torch.randperm(B)]
    packed = pack_padded_sequence(x.detach(), lengths.clamp(min=1), enforce_sorted=False)
    packed = packed._replace(data=packed.data.requires_grad_())
    return ours, stock, {"lengths": lambda: ours(x, lengths=lengths)[0], "packed": lambda: ours(packed)[0].data}, x  # fmt: skip


def measure(cell: str, kind: str, train: bool, seconds: float, most: int, sizes=(STEPS, ROWS, INPUTS, UNITS)) -> dict[str, Any]:
    """Record one case: the times of its rivals, and those over the first one's."""
    ours, stock, rivals, x = calls(cell, kind, sizes)
    result: dict[str, Any] = {"cell": cell, "kind": kind, "train": train, "faults": []}
    if kind == "resets":
        one, other = (torch.autograd.grad(rivals[name]().sin().sum(), x)[0] for name in ("resets", "split on torch.nn"))
        if not (error := float((one - other).norm() / other.norm())) <= TOLERANCE:
            return result | {"faults": [f"dx differs by {error:.2g}"]}

    def runner(call: Call) -> Runner:
        outer = torch.randn_like(call())

        def run(loops: int) -> None:
            for _ in range(loops):
                if train:
                    for parameter in (*ours.parameters(), *stock.parameters()):
                        parameter.grad = None
                    call().backward(outer)
                else:
                    with torch.no_grad():
                        call()

        return run

    times = timing.interleave({name: runner(call) for name, call in rivals.items()}, seconds, most)
    first = next(iter(times))
    ratios = {name: times[name]["median"] / times[first]["median"] for name in times if name != first}
    return result | {"ratios": ratios, "times": times}


def main(argv: list[str] | None = None) -> int:
    options = timing.parser("bench.resets", __doc__ or "", DEFAULT_OUTPUT).parse_args(argv)
    record.one_tree()
    console, results = Console(highlight=False, soft_wrap=True), []
    for kind in ("resets", "lengths"):
        for train in (True, False):
            for cell in CELLS:
                results.append(measure(cell, kind, train, options.seconds, options.repeats))
                ratios = results[-1].get("ratios", {})
                told = ", ".join(f"{name} {ratio:.3f}x" for name, ratio in ratios.items()) or f"[red]{results[-1]['faults']}"
                console.print(f"{kind} {'training' if train else 'inference'} {cell:6} takes 1, {told}")
    record.write_cases(options, results)
    return any(result["faults"] for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
