"""Layers of cells of one's own, beside built-in ones and the xlstm package's loop: `python -m bench.cells --help`.

How long the kernels of sLSTM take to compile; what heads spare; what a cell of LSTM's arithmetic costs beside LSTM itself; and
sLSTM beside the package, where that is installed: pip install --no-deps xlstm.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastrnn
from bench import record, timing
from fastrnn import cells
from fastrnn.kernels import cpu
from fastrnn.kernels.cpu import fallback
from fastrnn.timing import Runner, Subject

DEFAULT_OUTPUT = record.result_file("cells")


def seconds_to_compile(cell: str) -> float:
    """Of both passes of a cell that comes with fastrnn, into an empty cache; each pass is a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FASTRNN_CACHE_DIR"], before = cache, os.environ.get("FASTRNN_CACHE_DIR", "")
        begin = time.perf_counter()
        fallback.compile_units(getattr(cells, cell).definition.name, "f32", ("forward", "backward"), cpu.load()[1])
        seconds = time.perf_counter() - begin
        os.environ["FASTRNN_CACHE_DIR"] = before
    return seconds


def xlstms_loop() -> Callable[..., Any] | None:
    """The package's loop over steps in torch, without what the rest of it needs; None where it is not installed."""
    spec = importlib.util.find_spec("xlstm")
    if spec is None or spec.submodule_search_locations is None:
        return None
    path = Path(spec.submodule_search_locations[0]) / "blocks" / "slstm" / "src" / "vanilla" / "__init__.py"
    own = importlib.util.spec_from_file_location("xlstm_vanilla", path, submodule_search_locations=[str(path.parent)])
    assert own is not None and own.loader is not None
    sys.modules["xlstm_vanilla"] = module = importlib.util.module_from_spec(own)
    own.loader.exec_module(module)
    return lambda x, states, w, b: module.slstm_forward(x, states, w, b, module.slstm_pointwise_function_registry["slstm"])


class Loop(nn.Module):
    """sLSTM by the package's loop, with the parameters of one of fastrnn's layers."""

    def __init__(self, loop: Callable[..., Any], layer: Any) -> None:
        super().__init__()
        self.loop, self.layer = loop, layer

    def forward(self, x: Tensor) -> Tensor:
        own, heads = self.layer, self.layer.num_heads
        size = own.hidden_size // heads
        w = own.weight_hh_l0.view(4, heads, size, size).transpose(0, 1).reshape(heads, 4 * size, size)
        raw = nn.functional.linear(x, own.weight_ih_l0, own.bias_ih_l0)
        states, _, _ = self.loop(raw, x.new_zeros(4, x.shape[1], own.hidden_size), w, own.bias_hh_l0)
        return states[0, 1:]


def stepping(layer: Any, x: Tensor) -> Runner:
    """`layer.step`, from the state that it left."""

    def run(loops: int) -> None:
        state = None
        for _ in range(loops):
            _, state = layer.step(x, state)

    return run


def cases(hidden: int) -> dict[str, dict[str, Runner]]:
    """Rivals of each case, by name."""
    slstm, loop = fastrnn.recurrent(cells.slstm), xlstms_loop()
    found: dict[str, dict[str, Runner]] = {}
    heads = slstm(hidden, hidden, num_heads=4)

    def runner(module: nn.Module, size: int, steps: int, batch: int, mode: str) -> Runner:
        return Subject(module, torch.randn(steps, batch, size), mode, torch.randn(steps, batch, size)).run

    for mode in ("infer", "train"):
        found[f"sLSTM, {mode}"] = {
            "4 heads": runner(heads, hidden, 100, 32, mode),
            "1 head": runner(slstm(hidden, hidden), hidden, 100, 32, mode),
        } | ({"xlstm": runner(Loop(loop, heads), hidden, 100, 32, mode)} if loop else {})
        for name, size, steps, batch in (("LSTM", hidden, 100, 32), ("small LSTM", 16, 5, 1)):
            own, built_in = fastrnn.recurrent(cells.lstm)(size, size), fastrnn.LSTM(size, size)
            own.load_state_dict(built_in.state_dict())
            found[f"{name}, {mode}"] = {
                "own cell": runner(own, size, steps, batch, mode),
                "built in": runner(built_in, size, steps, batch, mode),
            }
    row = torch.randn(1, hidden)
    one_step = {
        "4 heads": stepping(heads, row),
        "frozen": stepping(fastrnn.freeze(slstm(hidden, hidden, num_heads=4).eval()), row),
    }
    found["sLSTM, step of a row"] = one_step | ({"xlstm": runner(Loop(loop, heads), hidden, 1, 1, "infer")} if loop else {})
    found["LSTM, step of a row"] = {
        "own cell": stepping(fastrnn.recurrent(cells.lstm)(hidden, hidden), row),
        "built in": stepping(fastrnn.LSTM(hidden, hidden), row),
    }
    return found


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser("bench.cells", __doc__ or "", DEFAULT_OUTPUT)
    parser.add_argument("--hidden", type=int, default=256, help="units (default %(default)s)")
    options = parser.parse_args(argv)
    record.one_tree()
    compiled = seconds_to_compile("slstm")
    content: dict[str, Any] = {"compile seconds": compiled, "cases": []}
    table = Table("", "median us", "times the first")
    for name, rivals in cases(options.hidden).items():
        time.sleep(0.1)
        times = timing.interleave(rivals, options.seconds, options.repeats)
        content["cases"].append({"case": name, "times": times})
        first = next(iter(times.values()))["median"]
        for rival, own in times.items():
            table.add_row(f"{name}: {rival}", f"{own['median'] * 1e6:.1f}", f"{own['median'] / first:.2f}")
    record.write(options.output, record.header(hidden=options.hidden) | content)
    Console(highlight=False).print(table, f"sLSTM compiles in {compiled:.1f} s", f"written: {options.output}")


if __name__ == "__main__":
    main()
