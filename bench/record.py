"""What every result file says about where it came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastrnn import machine as host

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "triton", "numba", "numpy", "onnx", "onnxruntime", "openvino")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def one_tree() -> None:
    """Fail unless fastrnn and its kernels are of one tree: an editable install may join the halves of two."""
    import fastrnn
    import fastrnn.kernels

    package, kernels = Path(fastrnn.__file__).resolve().parent, Path(fastrnn.kernels.__path__[0]).resolve()
    if kernels not in (package / "kernels", package.parent / "kernels"):
        raise RuntimeError(f"fastrnn is {package}, but its kernels are {kernels}")


def machine() -> dict[str, Any]:
    """Describe the processor, its caches, how many CPUs may be used, and the system."""
    return {
        "processor": host.processor(),
        "cores": host.cpus(),
        "caches": host.caches(),
        "system": platform.platform(),
    }


def header(**settings: Any) -> dict[str, Any]:
    """Origin of a result: date, commit, machine, versions and the settings of the run."""
    import torch

    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "fastrnn", "kernels", "csrc", "setup.py")),
        "machine": machine() | {"torch": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "settings": settings,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write as JSON, a list of numbers on one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def render(value: Any, indent: str) -> str:
        inner = indent + " "
        if isinstance(value, dict) and value:
            rows = [f"{inner}{json.dumps(str(key))}: {render(item, inner)}" for key, item in value.items()]
            return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            return "[\n" + ",\n".join(inner + render(item, inner) for item in value) + f"\n{indent}]"
        if isinstance(value, float):
            return f"{value:.6g}"
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(render(item, inner) for item in value) + "]"
        return json.dumps(value)

    path.write_text(render(content, "") + "\n")
