"""Which processor kernels are compiled for. Knows llvmlite at most, and not numba."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """What a kernel's shape depends on: bytes a vector register holds, and how many such registers there are."""

    vector_bytes: int
    registers: int


# The levels of the x86-64 ABI, widest first, with features (LLVM's names) that tell them apart.
LEVELS = {
    "x86-64-v4": (Target(64, 32), ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")),
    "x86-64-v3": (Target(32, 16), ("avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe")),
    "x86-64-v2": (Target(16, 16), ("cx16", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3")),
    "x86-64": (Target(16, 16), ()),
}
OTHER = {"aarch64": Target(16, 32), "arm64": Target(16, 32)}
PLAIN = Target(16, 16)  # LLVM splits what a processor's registers do not hold


@dataclass(frozen=True)
class Processor:
    """A processor by LLVM's name for it: a level of x86-64, or another architecture's model."""

    name: str

    @property
    def target(self) -> Target:
        return LEVELS[self.name][0] if self.name in LEVELS else OTHER.get(platform.machine(), PLAIN)


def chosen_processor() -> Processor:
    """The processor that FASTRNN_CPU names, or else this machine's.

    Raises:
        RuntimeError: FASTRNN_CPU is no level of x86-64, or one above this machine's.
    """
    import llvmlite.binding as llvm

    if platform.machine() not in ("x86_64", "AMD64"):
        return Processor(llvm.get_host_cpu_name())
    have = llvm.get_host_cpu_features()
    fitting = [name for name, (_, features) in LEVELS.items() if all(have.get(feature) for feature in features)]
    named = os.environ.get("FASTRNN_CPU", fitting[0])
    if named not in fitting:
        raise RuntimeError(f"FASTRNN_CPU={named!r}: expected one of {', '.join(fitting)} on this machine")
    return Processor(named)
