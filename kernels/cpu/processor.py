"""The tiers of processors that kernels are compiled for. Knows llvmlite at most, and not numba."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a kernel's shape depends on: bytes a vector register holds, how many such registers there are, and whose tiles.

    tiles: "amx", or "emulated" for tests; or there are none.
    """

    vector_bytes: int
    registers: int
    tiles: str = ""


@dataclass(frozen=True)
class Tier:
    """Processors that run the same machine code.

    name:      what FASTRNN_ISA takes.
    processor: LLVM's name of the least of them.
    features:  LLVM's names of what tells them from lesser ones.
    less:      the tier that has the same but for tiles, and whose code serves where these have no use.
    """

    name: str
    processor: str
    target: Target
    features: tuple[str, ...] = ()
    less: Tier | None = None

    def owner(self, scalar: str, which: str) -> Tier:
        """The tier that compiles a pass ("forward", "backward") of this one, or a conversion."""
        return self if self.less is None or (scalar, which) in (("f32", "forward"), ("f32", "backward")) else self.less

    def entry(self, cell: str, scalar: str, which: str) -> str:
        """Symbol of a pass of a cell, or of a conversion."""
        return f"fastrnn_{self.owner(scalar, which).name.replace('-', '_')}_{cell}_{scalar}_{which}"

    def entries(self, unit: tuple[str, str, str]) -> list[str]:
        """All symbols of a pass of a cell, the second is of what lays out its workspace; or the one of a conversion."""
        name = self.entry(*unit)
        return [name, f"{name}_arrange"] if unit[2] in ("forward", "backward") else [name]


# The levels of the x86-64 ABI, widest first; and the widest with tiles.
V4 = Tier("x86-64-v4", "x86-64-v4", Target(64, 32), ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"))
TILES = ("amx-tile", "amx-bf16")
X86_64 = (
    Tier("x86-64-v4-amx", V4.processor, Target(64, 32, "amx"), (*V4.features, *TILES), V4),
    V4,
    Tier("x86-64-v3", "x86-64-v3", Target(32, 16), ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")),
    Tier("x86-64-v2", "x86-64-v2", Target(16, 16), ("cx16", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")),
)
AARCH64 = (Tier("neon", "generic", Target(16, 32)),)
OTHER = (Tier("plain", "generic", Target(16, 16)),)  # LLVM splits what a processor's registers do not hold


def tiers() -> tuple[Tier, ...]:
    """Those of this machine's architecture, widest first."""
    return {"x86_64": X86_64, "AMD64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}.get(platform.machine(), OTHER)


def fitting() -> tuple[Tier, ...]:
    """Those whose instructions this processor has, as llvmlite knows it. A process has to ask the system for tiles besides."""
    import llvmlite.binding as llvm

    have = llvm.get_host_cpu_features() if tiers() is X86_64 else {}
    return tuple(tier for tier in tiers() if all(have.get(feature) for feature in tier.features))


def chosen(names: Sequence[str], remedy: str = "") -> Tier:
    """The tier that FASTRNN_ISA names, or else the first of `names`, of which it must be one.

    Raises:
        ImportError: it is none of them; remedy: what more to say then.
    """
    name = os.environ.get("FASTRNN_ISA") or names[0]
    if name not in names:
        raise ImportError(f"FASTRNN_ISA={name!r}: expected one of {', '.join(names)}, which this processor runs{remedy}")
    return next(tier for tier in tiers() if tier.name == name)
