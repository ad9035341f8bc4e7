"""Hashes of everything that shapes the compiled engine, so that a stale one is found out."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

KERNELS = Path(__file__).resolve().parent.parent
RUNTIME = KERNELS.parent / "csrc"  # beside the kernels in a source tree; an installed package has none


def _hash(paths) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


DERIVED = "cells", "derive", "symbols"
COMPILED = (
    "arrange",
    "backward",
    "compile",
    "convert",
    "elementary",
    "forward",
    "plan",
    "processor",
    "product",
    "stages",
    "team",
    "tiles",
    "vector",
)


def kernel_hash() -> str:
    """Of the cells' and the CPU engine's Python sources that machine code is made from."""
    cells = [KERNELS / f"{name}.py" for name in DERIVED]
    return _hash([*cells, *(KERNELS / "cpu" / f"{name}.py" for name in COMPILED)])


def source_hash() -> str:
    """Of the kernels and the C++ runtime; the runtime's part is empty where its source is not at hand."""
    runtime = _hash(sorted(RUNTIME.glob("*.*"))) if RUNTIME.is_dir() else ""
    return f"{kernel_hash()}:{runtime}"


def object_directory(base: Path, tier: str) -> Path:
    """Where under `base` the objects of a tier lie: apart for whatever shapes them, so that none there is stale."""
    shaped_by = [kernel_hash(), version("numba"), version("llvmlite")]
    return base / f"kernels-{tier}-{hashlib.sha256(' '.join(shaped_by).encode()).hexdigest()[:16]}"


def shipped_directory(base: Path, tier: str) -> Path:
    """Where under `base` a package has objects for whoever has the same kernels: machine code needs no numba any more."""
    return base / f"kernels-{tier}-{kernel_hash()[:16]}"
