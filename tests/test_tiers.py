"""The tiers of processors in the extension: what their machine code is made of, the contract of each, and who chooses."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import defaultdict

import pytest
import torch
from contract import ROOT, WARNINGS, python, tiers
from test_packaging import source_tree

import fastrnn
from fastrnn.kernels import cpu
from fastrnn.kernels.cells import CELLS
from fastrnn.kernels.cpu import processor

x86_64 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86-64's machine code")
disassembler = pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, which comes with a compiler")
USED = "import torch, fastrnn; print(fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(2, 1, 3)))"


@pytest.fixture(scope="module")
def code() -> dict[str, list[tuple[str, str]]]:
    """Function of the extension -> its instructions: (operation, operands)."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(cpu.EXTENSION)]
    functions: dict[str, list[tuple[str, str]]] = defaultdict(list)
    name = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if opening := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            name = opening[1]
        elif instruction := re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line):
            functions[name].append((instruction[1], instruction[2]))
    return functions


def kernels(code, tier: processor.Tier, scalar: str) -> list[tuple[str, str]]:
    """Instructions of one scalar type's kernels."""
    start = tier.entry("CELL", scalar, "forward").split("CELL")[0]
    own = [name for name in code if re.match(f"{start}({'|'.join(CELLS)})_{scalar}_", name)]
    return [instruction for name in own for instruction in code[name]]


@x86_64
@disassembler
@pytest.mark.parametrize("scalar", ["f32", "f64"])
@pytest.mark.parametrize("tier", processor.X86_64, ids=lambda tier: tier.name)
def test_machine_code(code, tier, scalar):
    """Arithmetic of the one type and in the tier's widest registers, and nothing that only a better processor has."""
    if tier.name not in names_in_extension(code):
        pytest.skip("not compiled into this build: FASTRNN_TIERS")
    instructions = kernels(code, tier, scalar)
    register = {64: "z", 32: "y", 16: "x"}[tier.target.vector_bytes]
    packed, single = {"f32": ("ps", "ss"), "f64": ("pd", "sd")}[scalar]
    arithmetic = r"v?(add|sub|mul|div|rcp14|max|min|sqrt|fn?m(?:add|sub)(?:132|213|231)|cvt\w*?)(ps|pd|ss|sd|dq|si)\w*"
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    for operation, operands in instructions:
        if found := re.fullmatch(arithmetic, operation):
            counts[found[1], found[2], "".join(sorted(set(re.findall(r"%([xyz])mm", operands))))] += 1
    assert {form for _, form, _ in counts} <= {packed, single}, f"another type's arithmetic, or a conversion: {dict(counts)}"
    assert not [kind for kind, _, _ in counts if kind.startswith("cvt")], dict(counts)
    # only the sum across a register's lanes, which single rows of one step need, gets narrower
    assert not [key for key in counts if key[0] != "add" and key[1:] != (packed, register)], dict(counts)
    assert counts["div", packed, register] + counts["rcp14", packed, register] > 5, "the gates' divisions, or their estimates"

    operations = {operation for operation, _ in instructions}
    registers = set(re.findall(r"%([xyzk])(?:mm)?\d", " ".join(operands for _, operands in instructions)))
    assert any("fmadd" in operation for operation in operations) == (tier.name != "x86-64-v2")
    assert register in registers
    if register != "z":
        assert not registers & {"z", "k"}, "AVX-512"
    assert any(operation.startswith("t") and "tmm" in operands for operation, operands in instructions) == bool(
        tier.target.tiles and scalar == "f32"
    )
    if tier.name == "x86-64-v2":
        assert "y" not in registers and not [operation for operation in operations if operation.startswith("v")], "AVX"


def names_in_extension(code) -> list[str]:
    """Tiers that the extension holds, for whatever processor."""
    return [tier.name for tier in processor.tiers() if tier.entry("gru", "f32", "forward") in code]


@x86_64
@disassembler
def test_the_runtime_is_for_the_least_processor(code):
    """What is not a tier's runs everywhere: the choice among them, above all."""
    wide = {
        name
        for name, instructions in code.items()
        if not name.startswith("fastrnn_x86_64_v")
        and any(operation.startswith("v") or re.search("%[yz]mm", operands) for operation, operands in instructions)
    }
    assert not wide


@x86_64
@disassembler
def test_tiers_share_no_code(code):
    """A kernel calls what belongs to its own entry point, and memset and memcpy: a wide helper is never run by a narrow one."""
    for name, instructions in code.items():
        if name.startswith("fastrnn_x86_64_v"):
            own = name.split(".")[0]
            for operation, operands in instructions:
                for target in re.findall(r"<([^+>@]+)(?:@plt)?[+>]", operands if operation.startswith(("call", "j")) else ""):
                    assert target.split(".")[0] == own or target in ("memset", "memcpy", "floorf", "floor"), f"{name}: {target}"


@disassembler
def test_one_function_leaves_the_extension():
    """And it needs no C++ function of torch, which differ between its versions; it may use one where there is one."""
    nm = subprocess.run(["nm", "-D", str(cpu.EXTENSION)], capture_output=True, text=True, check=True).stdout.split("\n")
    symbols = [line.split()[-2:] for line in nm if line]
    defined = {name for kind, name in symbols if kind not in "Uvw"}
    assert defined == {"PyInit__runtime"}
    needed = {name.split("@")[0] for kind, name in symbols if kind == "U"}
    assert "torch_parallel_for" in needed and not {name for name in needed if re.match(r"_ZNK?(2at|3c10|5torch)", name)}


@pytest.mark.parametrize("tier", tiers())
def test_fastrnn_isa_chooses(tier):
    assert f"layer 0: {tier}, " in python(USED, FASTRNN_ISA=tier)


def test_the_widest_tier_runs_by_itself():
    assert f"layer 0: {tiers()[0]}, " in python(USED, FASTRNN_ISA="")  # an empty variable is an unset one
    assert str(fastrnn.explain(fastrnn.LSTM(3, 4), torch.zeros(2, 1, 3))).count(f"layer 0: {tiers()[0]}, ")


@pytest.mark.parametrize("name", ["x86-64-v9", "neon" if platform.machine() == "x86_64" else "x86-64-v4"])
def test_an_impossible_fastrnn_isa_is_an_import_error(name):
    with pytest.raises(AssertionError) as failed:
        python(USED, FASTRNN_ISA=name)
    message = f"ImportError: FASTRNN_ISA={name!r}: expected one of {', '.join(tiers())}, which this processor runs; kernels"
    assert message in str(failed.value) and "install fastrnn again, here or with FASTRNN_TIERS=all" in str(failed.value)


def test_a_lesser_processor_is_told_how_to_get_its_kernels(copied):
    """The extension of another processor: kernels are compiled at run time, and the warning says what to do about it."""
    pytest.importorskip("numba")
    path = copied / "fastrnn" / "kernels" / "cpu" / "__init__.py"
    path.write_text(path.read_text().replace("runtime_module().tiers()", "[]"))
    with pytest.raises(AssertionError) as failed:
        python("import fastrnn", PYTHONPATH=str(copied))
    compiled = cpu.runtime_module().compiled_for.replace(",", ", ")
    assert f"holds kernels for {compiled}, and this processor runs none of these: install fastrnn again" in str(failed.value)


def compiled_for(listed: str) -> list[str]:
    """Names of the tiers that setup.py compiles for with this in FASTRNN_TIERS."""
    pytest.importorskip("numba")
    code = f"import runpy; print(*[tier.name for tier in runpy.run_path({str(ROOT / 'setup.py')!r})['chosen_tiers']()])"
    return python(code, FASTRNN_TIERS=listed).split()


@source_tree
def test_setup_compiles_for_this_processor_unless_told_otherwise():
    have = processor.fitting()
    assert compiled_for("") == [tier.name for tier in have if tier in (have[0], have[0].less)]
    assert compiled_for("all") == [tier.name for tier in processor.tiers()]


@x86_64
@source_tree
def test_setup_compiles_for_the_tiers_that_are_named():
    assert compiled_for("x86-64-v3,x86-64-v2") == ["x86-64-v3", "x86-64-v2"]
    assert compiled_for("x86-64-v4-amx") == ["x86-64-v4-amx", "x86-64-v4"], "with the tier whose code it shares"
    with pytest.raises(AssertionError, match=r"FASTRNN_TIERS='x86-64-v9': expected all, or some of x86-64-v4-amx,"):
        compiled_for("x86-64-v9")


# The widest is what every other test runs.
@pytest.mark.parametrize("cells", ["lstm gru", pytest.param("lstm gru rnn_tanh rnn_relu", marks=pytest.mark.slow)])
@pytest.mark.parametrize("tier", tiers()[1:])
def test_contract(tier, cells):
    """A small case has more seeds than four, `Case.seeds`: with few, torch's own error at hidden_size 1, and the bound with it,
    could by chance be tiny."""
    python(contract_over(cells.split(), "float32", "float64") if len(cells) > 8 else contract_over(cells.split()),
           FASTRNN_ISA=tier, timeout=900)  # fmt: skip


def contract_over(cells: list[str], *dtypes: str) -> str:
    """A script that holds cells to the contract over a table of sizes."""
    return f"""
import torch
from contract import assert_contract, cases
for cell in {cells}:
    for dtype in {dtypes or ("float32",)}:
        factors = dict(
            cell=(cell,), dtype=(getattr(torch, dtype),), input_size=(1, 17, 65), hidden_size=(1, 7, 33, 130),
            proj_size=(0, 5), bidirectional=(False, True), layout=("time", "batch", "packed"), batch=(1, 3, 17),
            steps=(1, 7), bias=(True, False),
        )
        for case in cases(factors):
            assert_contract(case)
"""


@pytest.fixture
def bare(copied):
    """The package without its extension, in a directory for PYTHONPATH."""
    for path in copied.glob("fastrnn/**/*.so"):
        path.unlink()
    return str(copied)


QUIET = f"{WARNINGS},ignore:fastrnn runs slower than it could:RuntimeWarning"


def test_contract_at_run_time(bare):
    """Kernels compiled at run time, of whichever tier was asked for; kept between runs of the suite, under build/."""
    pytest.importorskip("numba")
    tier = tiers()[-1]
    environment = {"PYTHONPATH": bare, "PYTHONWARNINGS": QUIET, "FASTRNN_CACHE_DIR": str(ROOT / "build")}
    assert f"layer 0: {tier}, " in python(USED, FASTRNN_ISA=tier, **environment)
    python(contract_over(["lstm", "gru"]), FASTRNN_ISA=tier, timeout=900, **environment)


def test_an_impossible_fastrnn_isa_is_an_import_error_at_run_time_too(bare):
    pytest.importorskip("numba")
    with pytest.raises(AssertionError, match=r"ImportError: FASTRNN_ISA='x86': expected one of .*, which this processor runs"):
        python(USED, FASTRNN_ISA="x86", PYTHONPATH=bare, PYTHONWARNINGS=QUIET)
