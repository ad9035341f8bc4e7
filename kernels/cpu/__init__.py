"""The CPU engine: Numba kernels behind the raw layer ops.

`load` registers the ops' CPU implementation: the compiled extension where it was built, else the same kernels compiled at run
time and called from Python (fallback.py).
"""

from __future__ import annotations

import ctypes
import os
import warnings
from functools import cache
from pathlib import Path

import torch

from ..cells import CELLS
from . import plan
from .processor import Processor, chosen_processor
from .source import source_hash

DTYPES = (torch.float32, torch.float64)
EXTENSION = next(iter(sorted(Path(__file__).parent.glob("_runtime*.so"))), None)


def _built() -> tuple[str, ctypes.CDLL]:
    """(what the extension was built for and from, its handle)."""
    library = ctypes.CDLL(str(EXTENSION))
    return (ctypes.c_char * 256).in_dll(library, "fastrnn_built_from").value.decode(), library


def _load_extension() -> str | None:
    """Register the extension's ops, or say why it cannot be.

    Raises:
        ImportError: the extension was built from other sources than those beside it.
    """
    if EXTENSION is None:
        return "the compiled extension is missing (no numba or no C++ compiler when fastrnn was installed)"
    built, library = _built()
    level, built_from = built.split(" ")
    kernels, runtime = built_from.split(":")
    here, runtime_here = source_hash().split(":")
    if kernels != here or (runtime_here and runtime != runtime_here):
        raise ImportError(
            f"fastrnn's compiled kernels ({EXTENSION}) are stale: sources in kernels/ or csrc/ have changed since they were "
            "built. Rebuild them with `make`, or install fastrnn again."
        )
    if not library.fastrnn_processor_fits():
        return f"the compiled extension was built for {level}, which this processor is not"
    torch.ops.load_library(str(EXTENSION))
    return None


@cache
def load() -> str:
    """Register the CPU implementation of the raw ops, once; "compiled" or "run time" says which.

    FASTRNN_CPU (a level of x86-64, as "x86-64-v3") asks for kernels compiled at run time for that level.

    Raises:
        ImportError: the extension is stale.
        RuntimeError: there is neither an extension nor numba to compile with.
    """
    if "FASTRNN_CPU" not in os.environ:
        missing = _load_extension()
        if missing is None:
            return "compiled"
        warnings.warn(
            f"fastrnn runs slower than it could: {missing}. Kernels are compiled when first used and run on one thread. "
            "Install numba and a C++ compiler, then fastrnn again.",
            RuntimeWarning,
            stacklevel=2,
        )
    try:
        import llvmlite.binding  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"fastrnn's CPU engine has neither its compiled extension nor numba: {error}") from error
    from . import fallback

    fallback.register()
    return "run time"


def describe(cell: str, T: int, B: int, I: int, H: int, R: int, D: int, threads: int, training: bool) -> str:
    """How the engine would share a dense layer's work out, in words.

    cell: a name of cells.CELLS; T steps, B rows, I inputs, H units, R outputs (projection, or H), D directions.
    """
    if load() == "compiled":
        target = Processor(_built()[0].split(" ")[0]).target
    else:
        target, threads = chosen_processor().target, 1
    gates, lanes = CELLS[cell].gates, target.vector_bytes // 4
    columns = plan.unit_vectors(gates, target.registers) * gates
    l2_bytes = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    words = []
    for name in ("forward", "backward")[: 1 + training]:
        forward = name == "forward"
        width = columns if forward else plan.wide_columns(target.registers)
        depth, units = (R, H) if forward else (gates * H, R)
        panels = plan.ceil_div(units, width // (gates if forward else 1) * lanes)
        crews, rows, parts = plan.schedule(
            T, T * B, B, I, H, R, D, threads, max(l2_bytes, 256 * 1024), gates, depth, panels, width, target.vector_bytes,
            1 if forward else 2,
        )  # fmt: skip
        shares = [f"{rows} x rows"] * (rows > 1) + [f"{parts} x units"] * (parts > 1)
        crew = " and ".join(shares) or "one thread"
        words.append(f"{name}: {'each direction on ' if crews > 1 else ''}{crew}")
    return f"{8 * target.vector_bytes}-bit vectors; " + "; ".join(words)
