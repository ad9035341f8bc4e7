"""What is installed: one tree, nothing beside it, no stale kernels, light to import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from contract import ROOT, python

import fastrnn
import fastrnn.kernels

PACKAGE, KERNELS = (Path(module.__file__).resolve().parent for module in (fastrnn, fastrnn.kernels))
USE = "import torch, fastrnn; print(fastrnn.__file__); fastrnn.LSTM(3, 4)(torch.zeros(2, 1, 3)); print('ran')"


def isolated(code: str, cwd: Path) -> str:
    """Standard output of `code` where only installed packages are to be found."""
    done = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path):
    """A copy of the installed package, which `python(..., PYTHONPATH=)` finds first."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastrnn", ignore=skip, dirs_exist_ok=True)
    shutil.copytree(KERNELS, tmp_path / "fastrnn" / "kernels", ignore=skip, dirs_exist_ok=True)
    return tmp_path


def test_one_tree():
    assert KERNELS in (PACKAGE / "kernels", PACKAGE.parent / "kernels")
    for name, module in sys.modules.items():
        if name.startswith("fastrnn.") and getattr(module, "__file__", None):
            assert {PACKAGE, KERNELS} & {*Path(module.__file__).resolve().parents}, name


def test_nothing_but_fastrnn_is_importable(tmp_path):
    """No top-level `kernels`, `csrc`, `tests` or `bench` in site-packages."""
    code = """
import importlib.util
names = "kernels", "csrc", "cpu", "cells", "bench", "examples", "tests"
found = [name for name in names if importlib.util.find_spec(name)]
assert not found, found
import fastrnn.kernels.cpu
print("done")
"""
    assert isolated(code, tmp_path) == "done\n"


def test_import_is_light(tmp_path):
    """Import and a first call need neither numba nor LLVM nor Dynamo."""
    code = """
import sys, torch
before = set(sys.modules)
import fastrnn
for name in ("LSTM", "GRU", "RNN"):
    fastrnn.__dict__[name](3, 4)(torch.zeros(2, 1, 3))[0].sum().backward()
heavy = {"numba", "llvmlite", "torch._dynamo", "torch._inductor", "onnx", "triton", "setuptools", "scipy"}
assert not heavy & (set(sys.modules) - before), heavy & (set(sys.modules) - before)
print("done")
"""
    assert isolated(code, tmp_path) == "done\n"


def test_start_up_time(tmp_path):
    """Import within 0.1 s over torch's, first call of a process within 50 ms; the best of three processes."""
    code = """
import time, torch
a = time.perf_counter()
import fastrnn
b = time.perf_counter()
module, x = fastrnn.LSTM(64, 64), torch.zeros(10, 4, 64)
torch.nn.LSTM(64, 64)(x)  # torch's own first call: its thread pool
c = time.perf_counter()
module(x)
print(b - a, time.perf_counter() - c)
"""
    runs = [tuple(map(float, isolated(code, tmp_path).split())) for _ in range(3)]
    (imports, calls) = map(min, zip(*runs, strict=True))
    assert imports < 0.1 and calls < 0.05, f"import {imports:.3f} s, first call {calls:.3f} s"


def test_a_copy_runs(copied):
    """The control of the next test: the copy is what is imported, and its kernels are accepted."""
    found, ran = python(USE, PYTHONPATH=str(copied)).splitlines()
    assert Path(found).is_relative_to(copied) and ran == "ran"


@pytest.mark.parametrize("edited", ["cells.py", "cpu/forward.py", "cpu/plan.py", "cpu/vector.py"])
def test_stale_kernels_do_not_run(copied, edited):
    path = copied / "fastrnn" / "kernels" / edited
    path.write_text(path.read_text() + "\n# edited, not rebuilt\n")
    with pytest.raises(AssertionError, match=r"(?is)(RuntimeError|ImportError):.*stale.*rebuild"):
        python(USE, PYTHONPATH=str(copied))


def test_every_source_counts_as_one():
    """No file of the engine escapes the hash: a new helper that the kernels use, say."""
    from fastrnn.kernels.cpu import source

    code = "import sys, fastrnn.kernels.cpu.compile; print(*(n for n in sys.modules if 'fastrnn.kernels' in n))"
    modules = {name.removeprefix("fastrnn.kernels.") for name in python(code).split()}
    hashed = {"cells", *(f"cpu.{name}" for name in source.COMPILED)}
    runtime = {"fastrnn.kernels", "cpu", "cpu.source", "cpu.fallback", "reference"}
    assert modules - runtime <= hashed, modules - runtime - hashed


def test_without_the_extension(copied):
    """One warning that says what is missing; calls run all the same."""
    for path in copied.glob("fastrnn/**/*.so"):
        path.unlink()
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, fastrnn
    module = fastrnn.RNN(3, 4)
    with torch.no_grad():  # each pass costs a compilation; gradients are the narrower processors' test's
        output = [module(torch.ones(2, 1, 3))[0] for _ in range(2)]
    torch.testing.assert_close(output[0], torch.nn.RNN.forward(module, torch.ones(2, 1, 3))[0].detach())
    print(fastrnn.explain(module, torch.zeros(2, 1, 3)).engine)
(warning,) = caught
assert warning.category is RuntimeWarning and "missing" in str(warning.message) and "compiler" in str(warning.message)
"""
    assert python(code, PYTHONPATH=str(copied), timeout=300) == "cpu\n"


@pytest.mark.slow
def test_wheel(tmp_path):
    """Built from a clean copy of the tree: fastrnn/ with its extension, metadata, and nothing else."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    tree = tmp_path / "tree"
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    command = ["pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).parts[0] for name in names} == {"fastrnn", f"fastrnn-{fastrnn.__version__}.dist-info"}
    assert any(name.startswith("fastrnn/kernels/cpu/") and name.endswith(".so") for name in names)
    for source in (*tree.glob("fastrnn/**/*.py"), *tree.glob("kernels/**/*.py")):
        name = source.relative_to(tree).as_posix()
        assert name.replace("kernels/", "fastrnn/kernels/", 1) in names if name.startswith("kernels") else name in names
    assert {Path(name).suffix for name in names if name.startswith("fastrnn/")} <= {".py", ".so", ".typed", ".pyi"}
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    found, ran = python(USE, PYTHONPATH=str(installed), cwd=tmp_path).splitlines()
    assert Path(found).is_relative_to(installed) and ran == "ran"


def test_versions_agree():
    from importlib.metadata import version

    assert version("fastrnn") == fastrnn.__version__
    assert torch.__version__ >= "2.10"
