"""What every result file says about where it came from."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fastrnn import machine as host

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
CPUINFO = Path("/proc/cpuinfo")
PACKAGES = ("torch", "triton", "numba", "numpy", "onnx", "onnxruntime", "openvino", "keras", "tensorflow-cpu", "jax")

# Virtual machines hide a processor's name, but not its family and model: (vendor, family, first and last model).
PROCESSORS = {
    ("AuthenticAMD", 23, 0x30, 0x3F): "Zen 2",
    ("AuthenticAMD", 25, 0x00, 0x0F): "Zen 3",
    ("AuthenticAMD", 25, 0x10, 0x1F): "Zen 4",
    ("AuthenticAMD", 25, 0xA0, 0xAF): "Zen 4c",
    ("AuthenticAMD", 26, 0x00, 0x1F): "Zen 5",
    ("GenuineIntel", 6, 85, 85): "Skylake SP or Cascade Lake",
    ("GenuineIntel", 6, 106, 108): "Ice Lake SP",
    ("GenuineIntel", 6, 143, 143): "Sapphire Rapids",
    ("GenuineIntel", 6, 173, 174): "Granite Rapids",
    ("GenuineIntel", 6, 207, 207): "Emerald Rapids",
}


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


def _cpuinfo() -> str:
    return CPUINFO.read_text() if CPUINFO.is_file() else ""


def processor_name(cpuinfo: str) -> str:
    """Name the microarchitecture of the first processor in /proc/cpuinfo; one that has no name here by its numbers."""
    fields = dict(re.findall(r"^([\w ]+?)\s*: *(.*)$", cpuinfo.split("\n\n")[0], re.MULTILINE))
    try:
        vendor, family, model = fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
    except (KeyError, ValueError):
        return platform.processor() or platform.machine()
    for (its_vendor, its_family, first, last), name in PROCESSORS.items():
        if (vendor, family) == (its_vendor, its_family) and first <= model <= last:
            return name
    return f"{vendor} family {family} model {model}"


def slug(name: str) -> str:
    """Write a processor's name as part of a file's name: "Zen 4" as "zen-4"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result_file(benchmark: str) -> Path:
    """Name the file of a benchmark's results for this processor, such as bench/results/grid-zen-4.json."""
    return RESULTS / f"{benchmark}-{slug(processor_name(_cpuinfo()))}.json"


def machine() -> dict[str, Any]:
    """Describe the processor, its caches, how many CPUs may be used, and the system."""
    return {
        "name": processor_name(_cpuinfo()),
        "processor": host.processor(),
        "cores": host.cpus(),
        "caches": host.caches(),
        "system": platform.platform(),
    }


def header(**settings: Any) -> dict[str, Any]:
    """Origin of a result: date, commit, machine, versions and the settings of the run."""
    import torch

    from fastrnn.kernels import cpu

    _, tier = cpu.load()
    vectors = {"tier": tier.name, "vectors": 8 * tier.target.vector_bytes}  # bits
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD"),
        "modified": bool(_git("status", "--porcelain", "--", "fastrnn", "kernels", "csrc", "setup.py")),
        "machine": machine() | vectors | {"torch": torch.backends.cpu.get_cpu_capability(), "load": os.getloadavg()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "settings": settings,
    }


def write_cases(options: argparse.Namespace, cases: list[dict[str, Any]], dtype: str = "float32") -> None:
    """Write what a benchmark with the options of `timing.parser` has measured."""
    import torch

    settings = {"threads": torch.get_num_threads(), "seconds": options.seconds, "repeats": options.repeats}
    write(options.output, header(dtype=dtype, **settings) | {"cases": cases})


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
