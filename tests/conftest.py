"""Fixtures for all tests, and a check that the tests see one tree."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrnn
import fastrnn.kernels
from fastrnn import autograd
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.layer import Inputs, Layer, Weights

os.environ.setdefault("KERAS_BACKEND", "torch")  # read when keras is imported


def pytest_sessionstart(session: pytest.Session) -> None:
    """An editable install maps fastrnn.kernels on its own: it must be the one beside, or inside, this fastrnn."""
    package, kernels = (Path(module.__file__).resolve().parent for module in (fastrnn, fastrnn.kernels))
    assert kernels in (package / "kernels", package.parent / "kernels"), f"two trees: {package} and {kernels}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def copied(tmp_path):
    """A directory with a copy of the package, which an interpreter finds first that has it in PYTHONPATH."""
    directory, skip = tmp_path / "copied", shutil.ignore_patterns("__pycache__")
    for package, found in (("fastrnn", fastrnn), ("fastrnn/kernels", fastrnn.kernels)):
        shutil.copytree(found.__path__[0], directory / package, ignore=skip, dirs_exist_ok=True)
    return directory


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable]:
    """Calls a function in a process where Triton's kernels are interpreted: one for all tests, as it takes seconds to start."""
    import triton_layers  # which takes its layers from here

    with ProcessPoolExecutor(1, get_context("spawn"), initializer=triton_layers.interpret) as worker:
        yield lambda function, *args: worker.submit(function, *args).result(timeout=300)


@pytest.fixture
def poison():
    """Fill memory that torch.empty hands out in Python with NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture
def make_layer():
    """Random float64 arguments of `run_layer`, as a dict."""
    return _make_layer


@pytest.fixture
def plain_layer():
    """`run_layer` written out from torch.nn's documentation, row by row: the truth for what torch.nn cannot do."""
    return _plain_layer


def _make_layer(
    cell: str,
    directions: int = 1,
    bias: bool = True,
    project: int = 0,
    packed: bool = False,
    batch_first: bool = False,
    reverse: bool = False,
    sizes: tuple[int, int, int, int] = (3, 2, 3, 2),
    dtype: torch.dtype = torch.float64,
    heads: int = 1,
) -> dict:
    """sizes: T, B, I, H; project: R, or 0; a packed batch loses a row on its way."""
    T, B, I, H = sizes
    kind = CELLS[cell]
    R, rows = int(project) or H, kind.gates * H
    steps = torch.tensor([B] * (T - 1) + [max(B - 1, 1)])
    layer = Layer(cell, directions, bias, bool(project), reverse, batch_first, heads=heads)
    shapes = {
        "w_ih": (rows, I),
        "w_hh": (rows, R // heads),
        "b_ih": (rows + kind.weights * H,),
        "b_hh": (rows,),
        "w_hr": (R, H),
    }
    shape = (int(steps.sum()), I) if packed else (B, T, I) if batch_first else (T, B, I)
    return {
        "x": torch.randn(shape, dtype=dtype),
        "batch_sizes": steps if packed else None,
        "h0": torch.randn(directions, B, R, dtype=dtype),
        "c0": torch.randn(directions, B, kind.states * H, dtype=dtype) if kind.states else None,
        "weights": [torch.randn(shapes[kind], dtype=dtype) for kind in layer.kinds() * directions],
        "layer": layer,
    }


def run_layer(x, batch_sizes, h0, c0, weights, layer: Layer):
    """Call the differentiable entry of all layers: y, h_n, c_n or None."""
    return autograd.run_layer(Inputs(x, batch_sizes, h0, c0), weights, layer)


def of_operator(arguments: dict) -> tuple:
    """Arguments of `run_layer` as the first six of the operators."""
    *tensors, layer = arguments.values()
    return *tensors, layer.text()


def by_kind(arguments: dict) -> dict:
    """Arguments of `run_layer` as `fastrnn.functional.layer` takes them."""
    *tensors, weights, layer = arguments.values()
    kinds = dict(zip(Weights._fields, map(list, zip(*layer.by_direction(weights)))))
    given = {name: kind for name, kind in kinds.items() if kind[0] is not None}
    options = {"cell": layer.cell, "reverse": layer.reverse, "batch_first": layer.batch_first}
    return dict(zip(Inputs._fields, tensors)) | given | options


def weight_names(layer: Layer) -> list[str]:
    """A name for each weight, as the operators list them."""
    return [f"{kind}{d}" for d in range(layer.directions) for kind in layer.kinds()]


def _plain_layer(x, batch_sizes, h0, c0, weights, layer):
    rows = x.unbind(1 if layer.batch_first else 0) if batch_sizes is None else x.split(batch_sizes.tolist())
    outputs, h_n, c_n = {}, [], []
    for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(layer.by_direction(weights)):
        for b in range(h0.shape[1]):
            times = [t for t in range(len(rows)) if b < len(rows[t])]
            h, c = h0[d, b], None if c0 is None else c0[d, b]
            for t in reversed(times) if layer.reverse != bool(d) else times:
                gi, gh = w_ih @ rows[t][b], w_hh @ h
                if b_ih is not None:
                    gi, gh = gi + b_ih, gh + b_hh
                h, c = _plain_step(layer.cell, gi, gh, h, c)
                h = h if w_hr is None else w_hr @ h
                outputs[t, b, d] = h
            h_n.append(h)
            c_n.append(c)

    def output(t: int, b: int) -> Tensor:
        return torch.cat([outputs[t, b, d] for d in range(layer.directions)])

    ys = [torch.stack([output(t, b) for b in range(len(rows[t]))]) for t in range(len(rows))]
    y = torch.cat(ys) if batch_sizes is not None else torch.stack(ys, 1 if layer.batch_first else 0)
    shape = h0.shape[:2]
    return y, torch.stack(h_n).unflatten(0, shape), None if c0 is None else torch.stack(c_n).unflatten(0, shape)


def _plain_step(cell: str, gi: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if cell == "lstm":
        i, f, g, o = (gi + gh).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c
    if cell == "gru":
        (ir, iz, in_), (hr, hz, hn) = gi.chunk(3), gh.chunk(3)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        n = torch.tanh(in_ + r * hn)
        return (1 - z) * n + z * h, None
    return (torch.tanh if cell == "rnn_tanh" else torch.relu)(gi + gh), None
