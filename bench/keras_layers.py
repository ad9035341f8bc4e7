"""fastrnn.keras against keras.layers on each of Keras' backends: `python -m bench.keras_layers --help`.

A call of a layer, forward alone or with all gradients, and an epoch of `fit` of the textbook model. The rivals are keras.layers
on torch, TensorFlow and JAX, as far as these are installed, each in a process of its own and compiled as its users compile it;
and fastrnn's torch module of the same weights. Results are checked first, then all are timed in turns.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench import keras_calls, record, timing
from bench.grid import CELLS, Case, Point
from fastrnn.timing import TOLERANCES, Runner, difference

POINTS = (
    Point("few", 1, 64, 100),
    Point("few", 1, 256, 100),
    Point("middle", 32, 64, 100),
    Point("middle", 32, 128, 100),
    Point("middle", 32, 256, 100),
    Point("large", 128, 512, 50),
)
FIT = Point("apart", 64, 128, 28, input=28, layers=2)  # an image's rows, one after the other
EPOCH = 1024  # sequences
CASES = (
    *(Case(point, cell, mode) for point in POINTS for mode in ("infer", "train") for cell in CELLS),
    *(Case(FIT, cell, "fit") for cell in CELLS),
)
DEFAULT_OUTPUT = record.result_file("keras")
TOLERANCE = TOLERANCES[torch.float32]


class Backend:
    """A process that runs keras.layers on one backend, see bench/keras_calls.py."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        environment = os.environ | {"KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(record.ROOT)}
        command = [sys.executable, "-m", "bench.keras_calls", name, str(threads)]
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )

    def ask(self, **job: Any) -> None:
        """Have a job done, and wait until it is."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        if not self.process.stdout.readline():
            self.errors.seek(0)
            raise RuntimeError(f"keras.layers on {self.name} failed:\n{self.errors.read()}")

    def run(self, loops: int) -> None:
        self.ask(loops=loops)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def repeated(call: Callable[[], Any]) -> Runner:
    """Make a runner of a call."""

    def run(loops: int) -> None:
        for _ in range(loops):
            call()

    return run


def measure(case: Case, seconds: float, most: int, backends: list[Backend], tolerance: float = TOLERANCE) -> dict[str, Any]:
    """Record one case."""
    import fastrnn.keras

    point, generator = case.point, np.random.default_rng(0)
    batch = EPOCH if case.mode == "fit" else point.batch
    arrays: dict[str, Any] = {"x": generator.standard_normal((batch, point.steps, point.input_size), "float32")}
    runners: dict[str, Runner] = {}
    if case.mode == "fit":
        arrays["labels"] = generator.integers(keras_calls.CLASSES, size=EPOCH)
        epoch = keras_calls.make_epoch(fastrnn.keras, case.cell, point.hidden, arrays["x"], arrays["labels"], point.batch)
        results = {"fastrnn": [torch.tensor(epoch())]}
        runners["fastrnn"] = repeated(epoch)
    else:
        arrays["dy"] = generator.standard_normal((batch, point.steps, point.hidden), "float32")
        torch.manual_seed(0)
        layer = keras_calls.make_layer(fastrnn.keras, case.cell, point.hidden, point.input_size)
        arrays |= {f"weight{k}": weight for k, weight in enumerate(layer.get_weights())}
        data, train = (arrays["x"], arrays["dy"]), case.mode == "train"
        module = fastrnn.keras.to_torch(layer).train(train)
        of_module = keras_calls.torch_call(lambda x: module(x)[0], list(module.parameters()), *data, train)
        calls = {"fastrnn": keras_calls.on_torch(layer, *data, train), "module": of_module}
        results = {name: call() for name, call in calls.items()}
        del results["module"][2:]  # the gradients of weights in another layout
        runners |= {name: repeated(call) for name, call in calls.items()}
    with tempfile.TemporaryDirectory() as folder:
        files = {"data": f"{folder}/data.npz", "result": f"{folder}/result.npz"}
        np.savez(files["data"], **arrays)
        for backend in backends:
            backend.ask(cell=case.cell, mode=case.mode, hidden=point.hidden, batch=point.batch, **files)
            with np.load(files["result"]) as found:
                results[backend.name] = [torch.from_numpy(found[name]) for name in found.files]
            runners[backend.name] = backend.run
    faults = []
    for name, values in results.items():
        # Each backend draws weights of its own for `fit`, but keras.layers on torch draws ours.
        if name != "fastrnn" and (case.mode != "fit" or name == "torch"):
            apart = max(difference(a, b) for a, b in zip(values, results["fastrnn"], strict=name != "module"))
            faults += [f"{name} differs by {apart:.2g}"] * (not apart <= tolerance)
    result = {"name": case.name, "point": asdict(point), "cell": case.cell, "mode": case.mode, "faults": faults}
    if not faults:
        times = timing.interleave(runners, seconds, most)
        ratios = {name: taken["median"] / times["fastrnn"]["median"] for name, taken in times.items() if name != "fastrnn"}
        result |= {"ratios": ratios, "times": times}
    return result


def main(argv: list[str] | None = None) -> int:
    parser = timing.parser("bench.keras_layers", __doc__, DEFAULT_OUTPUT)
    options = parser.parse_args(argv)
    record.one_tree()
    os.environ["KERAS_BACKEND"] = "torch"
    console, results, backends = Console(highlight=False, soft_wrap=True), [], []
    with contextlib.ExitStack() as stack:
        for name in keras_calls.BACKENDS:
            if importlib.util.find_spec(name) is None:
                console.print(f"[yellow]{name} is not installed, and is left out")
                continue
            backends.append(Backend(name, torch.get_num_threads()))
            stack.callback(backends[-1].close)
        for case in CASES:
            results.append(measure(case, options.seconds, options.repeats, backends))
            told = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in results[-1].get("ratios", {}).items())
            console.print(f"{case.name:36} {told}", *(f"[red]{fault}" for fault in results[-1]["faults"]))
    record.write_cases(options, results)
    return any(result["faults"] for result in results)


if __name__ == "__main__":
    raise SystemExit(main())
