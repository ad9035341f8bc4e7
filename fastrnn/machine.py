"""Find out what a machine is: its processor, its caches and the CPUs that this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def processor() -> str:
    """Name the processor as Linux names it; elsewhere as Python does."""
    lines = _read(Path("/proc/cpuinfo")).splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def caches() -> dict[str, str]:
    """Find the sizes of the first CPU's caches, such as {"L1d": "32K", "L2": "1024K"}; empty where Linux does not say."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = _read(index / "type")
        found[f"L{_read(index / 'level')}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = _read(index / "size")
    return found


def cpus() -> int:
    """Count the CPUs that this process may use: its affinity on Linux, else all of the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""
