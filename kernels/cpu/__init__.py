"""The CPU engine: Numba kernels behind the raw layer ops.

`load` registers the ops' CPU implementation: the compiled extension where it was built, else the same kernels compiled at run
time and called from Python (fallback.py).
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..cells import CELLS
from ..layer import Layer
from ..user_cache import cache_path
from . import plan, processor
from .processor import Tier
from .source import source_hash

DTYPES = (torch.float32, torch.float64)
OTHER_TIERS = "install fastrnn again, here or with FASTRNN_TIERS=all in the environment, or install the wheel of `make wheel`"
EXTENSION = next(iter(sorted(Path(__file__).parent.glob("_runtime*.so"))), None)


def _load_extension() -> Tier | str:
    """Register the extension's ops and choose the tier whose kernels they run, or say why it cannot be.

    Raises:
        ImportError: the extension was built from other sources than those beside it, or FASTRNN_ISA names no tier in it.
    """
    if EXTENSION is None:
        return (
            "the compiled extension is missing (no numba or no C++ compiler when fastrnn was installed): install these, then "
            "fastrnn again"
        )
    kernels, runtime = runtime_module().built_from.split(":")
    here, runtime_here = source_hash().split(":")
    if kernels != here or (runtime_here and runtime != runtime_here):
        raise ImportError(
            f"fastrnn's compiled kernels ({EXTENSION}) are stale: sources in kernels/ or csrc/ have changed since they were "
            "built. Rebuild them with `make`, or install fastrnn again."
        )
    names, held = runtime_module().tiers(), runtime_module().compiled_for.replace(",", ", ")
    if not names:
        return f"the compiled extension holds kernels for {held}, and this processor runs none of these: {OTHER_TIERS}"
    tier = processor.chosen(names, f"; kernels were compiled for {held}. For others, {OTHER_TIERS}")
    samples = torch.empty(1, device="cpu"), torch.nn.Parameter(torch.empty(1, device="cpu"))
    functions = torch.empty_like, torch.autograd.graph.increment_version
    runtime_module().prepare(tier.name, *samples, *functions)
    return tier


def runtime_module() -> Any:
    """The compiled extension, csrc/python.cpp."""
    return importlib.import_module(f"{__name__}._runtime")


@cache
def load() -> tuple[str, Tier]:
    """Register the CPU implementation of the raw ops, once: ("compiled" or "run time", the tier that runs).

    FASTRNN_ISA names the tier to run, in place of the widest: one that was compiled in, or any where none was.

    Raises:
        ImportError: the extension is stale, or FASTRNN_ISA names no tier that this processor runs.
        RuntimeError: there is neither an extension nor numba to compile with.
    """
    found = _load_extension()
    if isinstance(found, Tier):
        return "compiled", found
    try:
        import llvmlite.binding  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"{found}. There is no numba either, to compile kernels when they are used: {error}") from error
    from . import fallback

    tier = fallback.tier()
    fallback.register()
    warnings.warn(
        f"fastrnn runs slower than it could, its kernels are compiled when first used and run on one thread: {found}",
        RuntimeWarning,
        stacklevel=2,
    )
    return "run time", tier


def prepare_cell(cell: str, dtype: torch.dtype, training: bool) -> None:
    """Have the kernels of a cell that is not built in ready to run: from the user's cache, or compiled, which one line tells.

    cell: a name of cells.CELLS, which `why_not_cell` has nothing against. dtype: of what is computed with; half precision is
    float32. training: backward too.

    Raises:
        RuntimeError: the cell does not compile.
    """
    if CELLS[cell].mode or load()[0] != "compiled":  # built in; or each pass is compiled when it runs
        return
    _prepare_cell(cell, "f64" if dtype is torch.float64 else "f32", training)


# What torch.compiler.assume_constant_result would do, but without importing Dynamo: it does not look into this function.
prepare_cell._dynamo_marked_constant = True  # type: ignore[attr-defined]  # undeclared


@cache
def _prepare_cell(cell: str, scalar: str, training: bool) -> None:
    from . import fallback

    _, tier = load()
    passes = ("forward", "backward") if training else ("forward",)
    begin, name = time.monotonic(), CELLS[cell].derived.name
    if fallback.compile_units(cell, scalar, passes, tier):
        what, seconds = " and ".join(passes), time.monotonic() - begin
        print(f"fastrnn: compiled {name} ({scalar}, {what}) in {seconds:.0f} s, kept in {cache_path()}", file=sys.stderr)
    for which in passes:
        _ADDRESSES[cell, scalar, which] = fallback.addresses(cell, scalar, which, tier)
    found = [_ADDRESSES.get((cell, *unit), (0, 0)) for unit in itertools.product(("f32", "f64"), ("forward", "backward"))]
    kind = CELLS[cell]
    runtime_module().add_cell(
        cell, (kind.gates, kind.slots, kind.states, kind.weights, kind.noise), tuple(itertools.chain(*found))
    )


def why_not_cell(cell: str) -> str | None:
    """Say why the kernels of a cell cannot be had, or None."""
    return _why_not_cell(cell)


why_not_cell._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


@cache
def _why_not_cell(cell: str) -> str | None:
    missing = [name for name in ("numpy", "llvmlite", "numba") if importlib.util.find_spec(name) is None]
    if CELLS[cell].mode or not missing or (missing == ["numba"] and _is_shipped(cell)):
        return None
    return f"a cell that is not built in is compiled when it first runs, and {' and '.join(missing)} are not installed"


def _is_shipped(cell: str) -> bool:
    """Are there objects beside the module that defines a cell, for this processor?"""
    from . import fallback

    return load()[0] == "compiled" and any(fallback.objects(load()[1], (cell, scalar, "forward")) for scalar in ("f32", "f64"))


_ADDRESSES: dict[tuple[str, str, str], Sequence[int]] = {}


def team() -> tuple[int, str]:
    """(threads that a call of this thread would use at most now, that and why in words)."""
    if load()[0] != "compiled":
        return 1, "1: kernels that are compiled at run time use one"
    threads, set_to, cpus, allowed, quota, running, fewer = runtime_module().threads()
    if threads == set_to:
        return threads, f"{threads}, as torch is set to"
    if threads < min(set_to, cpus, fewer):
        why = f"other calls are running in this process ({running})"
    elif fewer < min(set_to, cpus):
        why = "fewer for now, because calls lost time waiting for threads that were not there"
    elif cpus < allowed:
        why = f"a quota of the process's control group allows {quota:g} CPU{'s' * (quota != 1)}"
    else:
        why = f"the process may use {allowed} CPU{'s' * (allowed > 1)}"
    return threads, f"{threads} of the {set_to} that torch is set to: {why}"


def describe(
    layer: Layer,
    T: int,
    B: int,
    I: int,
    H: int,
    R: int,
    training: bool,
    half: bool,
    layers: int = 1,
    lowest: int = 0,
    size: int = 4,
) -> str:
    """How the engine would share a dense layer's work out, in words.

    T steps, B rows, I inputs, H units, R outputs (projection, or H).
    half: matrices are in bfloat16. layers: of which this is one, on top of each other and called together; lowest: inputs of
    the lowest. size: bytes of a number that is computed with.
    """
    how, tier = load()
    target, threads = tier.target, team()[0]
    gates, D, heads, lanes = CELLS[layer.cell].gates, layer.directions, layer.heads, target.vector_bytes // size
    columns = plan.unit_vectors(gates, target.registers) * gates
    l2_bytes = runtime_module().l2_bytes if how == "compiled" else plan.L2_BYTES
    words = []
    for name in ("forward", "backward")[: 1 + training]:
        forward = name == "forward"
        width = columns if forward else plan.wide_columns(target.registers)
        depth, units = (R // heads, H) if forward else (gates * H // heads, R)
        panels = heads * plan.ceil_div(units // heads, width // (gates if forward else 1) * lanes)
        meetings, reduced = CELLS[layer.cell].meetings[not forward], CELLS[layer.cell].reduced[not forward] * H
        given = forward, half and R // heads % 2 == 0, bool(target.tiles), T, B, target.vector_bytes, heads, meetings, reduced
        _, tiles, way = plan.way_of_weights(*given)
        at_once = 1
        if layers > 1 and D == 1 and not (training or half):
            sizes = layers, T, B, lowest, H, R, threads, l2_bytes, gates, panels, width, way
            at_once = plan.crews_of_layers(*sizes)
        crews, rows, parts = plan.schedule(
            T, T * B, B, I, H, R, D, threads // at_once, l2_bytes, gates, depth, panels, width, way, 1 if forward else 2
        )
        shares = [f"{rows} x rows"] * (rows > 1) + [f"{parts} x units"] * (parts > 1)
        crew = " and ".join(shares) or "one thread"
        beside = "at the same time as other layers, on " if at_once > 1 else "each direction on " if crews > 1 else ""
        words.append(f"{name}: {beside}{crew}{', in tiles' if tiles else ''}")
    return f"{tier.name}, {8 * target.vector_bytes}-bit vectors; " + "; ".join(words)
