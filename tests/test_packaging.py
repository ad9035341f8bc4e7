"""What is installed: one tree, nothing beside it, no stale kernels, light to import."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from contract import IGNORED, ROOT, python, tiers

import fastrnn
import fastrnn.kernels
from fastrnn.kernels.cpu import processor, source

PACKAGE, KERNELS = (Path(module.__file__).resolve().parent for module in (fastrnn, fastrnn.kernels))
source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="builds from the source tree, which is not here")
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


def test_one_tree():
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
    code = "import sys, fastrnn.kernels.cpu.compile; print(*(n for n in sys.modules if 'fastrnn.kernels' in n))"
    modules = {name.removeprefix("fastrnn.kernels.") for name in python(code).split()}
    hashed = {*source.DERIVED, *(f"cpu.{name}" for name in source.COMPILED)}
    runtime = {
        "fastrnn.kernels",
        "cpu",
        "cpu._runtime",
        "cpu.source",
        "cpu.fallback",
        "reference",
        "gradients",
        "layer",
        "gpu",
        "gpu.plan",
        "gpu.precision",
        "gpu.selftest",
        "user_cache",
    }
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
    assert python(code, PYTHONPATH=str(copied), FASTRNN_CACHE_DIR=str(copied / "cache"), timeout=300) == "cpu\n"


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs setup.py, which a source tree has")
@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_the_build_goes_on_without_kernels_on_other_systems(tmp_path, system):
    """setup.py says so, and makes nothing. A module that stands for sys is all that it sees of the system."""
    code = f"""
import runpy, sys, types, setuptools, warnings
elsewhere = types.ModuleType("sys")
elsewhere.__dict__.update(vars(sys), platform="{system}")
sys.argv = ["setup.py", "--quiet", "build_ext", "--inplace", "--build-lib", {str(tmp_path)!r}]
warnings.simplefilter("always")
import concurrent.futures.process, setuptools.command.build_ext
sys.modules["sys"] = elsewhere
runpy.run_path("setup.py", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"built without compiled kernels: the C++ runtime is for Linux, and this is {system}" in done.stderr
    assert not [*tmp_path.iterdir()]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from a clean copy of the tree: (its path, the tree)."""
    tree = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    for tier in processor.tiers():
        if (objects := source.object_directory(ROOT / "build", tier.name)).is_dir():  # compiled already, of the same sources
            shutil.copytree(objects, tree / "build" / objects.name)
    environment = {**os.environ, "FASTRNN_TIERS": "all"}
    # As `make wheel`, but for the tag.
    command = [sys.executable, *"-m pip wheel . --no-deps --no-build-isolation -w dist".split()]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return path, tree


@pytest.mark.slow
@source_tree
def test_wheel(wheel, tmp_path):
    """fastrnn/ with its extension, metadata, and nothing else; for every Python."""
    path, tree = wheel
    assert path.name.startswith(f"fastrnn-{fastrnn.__version__}-cp310-abi3-linux_")
    names = zipfile.ZipFile(path).namelist()
    assert {Path(name).parts[0] for name in names} == {"fastrnn", f"fastrnn-{fastrnn.__version__}.dist-info"}
    assert any(name.startswith("fastrnn/kernels/cpu/") and name.endswith(".so") for name in names)
    for file in (*tree.glob("fastrnn/**/*.py"), *tree.glob("kernels/**/*.py")):
        name = file.relative_to(tree).as_posix()
        assert name.replace("kernels/", "fastrnn/kernels/", 1) in names if name.startswith("kernels") else name in names
    assert {Path(name).suffix for name in names if name.startswith("fastrnn/")} <= {".py", ".so", ".typed", ".pyi"}
    installed = tmp_path / "installed"
    zipfile.ZipFile(path).extractall(installed)
    found, ran = python(USE, PYTHONPATH=str(installed), cwd=tmp_path).splitlines()
    assert Path(found).is_relative_to(installed) and ran == "ran"


@pytest.fixture(scope="session")
def empty_environment(wheel, tmp_path_factory):
    """Interpreter of an environment that holds the wheel, torch and pytest, and nothing to compile with."""
    directory = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    interpreter, constraints = str(directory / "bin" / "python"), str(ROOT / "constraints.txt")
    command = [interpreter, "-m", "pip", "install", "-c", constraints, "torch", "pytest", str(wheel[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return interpreter


@pytest.fixture
def in_empty_environment(empty_environment, tmp_path):
    """run(arguments of pytest, environment): tests of the wheel, with no numba, no numpy and no compiler in sight."""
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("nm", "objdump"):  # test_tiers.py reads symbols and machine code
        if found := shutil.which(name):
            (tmp_path / "tools" / name).symlink_to(found)

    def run(*arguments: str, **environment: str) -> None:
        env = {**os.environ, "PATH": str(tmp_path / "tools"), "PYTHONPATH": "", **environment}
        options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True, "check": False}
        code = "import importlib.util as u; print([n for n in ('numba', 'llvmlite', 'numpy') if u.find_spec(n)])"
        assert subprocess.run([empty_environment, "-c", code], **options).stdout == "[]\n"
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *(f"-Wignore:{message}" for message in IGNORED), *arguments]
        done = subprocess.run([empty_environment, *command], **options)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


@pytest.mark.slow
@source_tree
@pytest.mark.parametrize("tier", tiers())
def test_the_engine_of_the_wheel(in_empty_environment, tier):
    """For each tier of this processor. The large table in float32 is left to the tiers' own contract, in the next test."""
    in_empty_environment("tests/test_engine.py", "tests/test_contract.py", "-k", "not test_float32", FASTRNN_ISA=tier)


@pytest.mark.slow
@source_tree
def test_the_tiers_of_the_wheel(in_empty_environment):
    """Symbols, machine code, the choice of a tier, the contract of each."""
    in_empty_environment("tests/test_tiers.py")


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="reads the versions of glibc's symbols")
def test_the_extension_asks_for_no_newer_glibc_than_torch_does():
    """2.28, as torch's wheels are manylinux_2_28. Where the compiler is of a newer system this takes care."""
    (extension,) = (KERNELS / "cpu").glob("_runtime*.so")
    command = ["nm", "--dynamic", "--undefined-only", "--with-symbol-versions", str(extension)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    wanted = [tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", listed)]
    assert wanted and max(wanted) <= (2, 28), listed


def test_versions_agree():
    from importlib.metadata import version

    assert version("fastrnn") == fastrnn.__version__
