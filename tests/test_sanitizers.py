"""The runtime in csrc/ under AddressSanitizer and UndefinedBehaviorSanitizer; the kernels it calls are as they always are."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contract import ROOT, TESTS
from test_packaging import source_tree

COMPILER = os.environ.get("CXX", "g++").split()
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
CORE = [f"tests/test_{name}.py" for name in ("dispatch", "engine", "frozen", "native", "ops", "robustness", "stacks")]
# AddressSanitizer would write the shadow of 16 GiB; fills memory itself; holds back what is freed, which looks like a leak;
# takes minutes over 100,000 steps.
NOT = "not 2_31 and not by_the_allocator and not leak and not 100_000"


def preloaded() -> str:
    """Libraries that must be there before Python: the sanitizer, and the C++ library whose exceptions it watches."""
    found = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [*COMPILER, f"-print-file-name={name}"]
        found.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return " ".join(found)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """An extension built with the sanitizers, of the same kernels."""
    if shutil.which(COMPILER[0]) is None or not preloaded().startswith("/"):
        pytest.skip("no compiler with AddressSanitizer")
    directory = str(tmp_path_factory.mktemp("sanitized"))
    command = ["setup.py", "-q", "build_ext", "--build-lib", directory, "--build-temp", directory]
    environment = {**os.environ, "CXXFLAGS": FLAGS}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (extension,) = Path(directory).glob("fastrnn/kernels/cpu/*.so")
    return extension


@pytest.mark.slow
@source_tree
def test_core(sanitized, copied, tmp_path):
    for path in copied.glob("fastrnn/**/*.so"):
        path.unlink()
    shutil.copy(sanitized, copied / "fastrnn/kernels/cpu")
    symbols = subprocess.run(["nm", "-D", str(sanitized)], capture_output=True, text=True, check=True).stdout
    assert "__asan_report_load8" in symbols and "__ubsan_handle" in symbols
    shutil.copytree(TESTS, tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {
        **os.environ,
        "PYTHONPATH": str(copied),
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",  # the leaks would be Python's
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", NOT, *CORE]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
