"""From the kernels' Numba source to machine code: object files for a processor, each with one C entry point.

Entry points, for every cell and scalar type ("f32", "f64"), C linkage, plain int64 arguments:
    fastrnn_<cell>_<type>_<pass>          void (records, rank)
    fastrnn_<cell>_<type>_<pass>_arrange  int64 (records, threads)
with pass "forward" or "backward"; records is the address of one record of plan.FIELDS a direction.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import llvmlite.binding as llvm
from numba import cfunc, types
from numba.core import config

from ..cells import CELLS
from .arrange import make_arrange
from .backward import make_backward
from .forward import make_forward
from .processor import Processor, Target
from .vector import vector_library

SCALARS = {"f32": types.float32, "f64": types.float64}
PASSES = ("forward", "backward")
UNITS = tuple((cell, scalar, which) for cell in CELLS for scalar in SCALARS for which in PASSES)


def machine_for(processor: Processor) -> llvm.TargetMachine:
    triple = llvm.get_default_triple()
    return llvm.Target.from_triple(triple).create_target_machine(
        cpu=processor.name, features="", opt=3, reloc="pic", codemodel="small"
    )


def entry_points(cell: str, scalar: str, which: str, target: Target) -> dict:
    """Name -> Numba function of one unit."""
    v = vector_library(SCALARS[scalar], target)
    make = make_forward if which == "forward" else make_backward
    name = f"fastrnn_{cell}_{scalar}_{which}"
    kernel = make(CELLS[cell], v, target)
    arrange = make_arrange(CELLS[cell], v, target, which == "forward")
    int64 = types.int64
    return {
        name: cfunc(types.void(int64, int64), nopython=True, error_model="numpy")(kernel.py_func),
        f"{name}_arrange": cfunc(int64(int64, int64), nopython=True, error_model="numpy")(arrange.py_func),
    }


def emit(name: str, function, processor: Processor) -> bytes:
    """Object code of one entry point: everything else in its module internal, so that only `name` leaves it."""
    module = llvm.parse_assembly(function.inspect_llvm())
    for f in module.functions:
        if f.name == function._wrapper_name:
            f.name = name
        elif not f.is_declaration:
            f.linkage = "internal"
    for g in module.global_variables:
        if not g.is_declaration:
            g.linkage = "internal"
    machine = machine_for(processor)
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def compile_unit(cell: str, scalar: str, which: str, processor: Processor) -> dict[str, bytes]:
    """Name -> object code of one unit. Numba must have been started for this processor (see `configure`)."""
    points = entry_points(cell, scalar, which, processor.target)
    return {name: emit(name, function, processor) for name, function in points.items()}


def configure(processor: Processor) -> None:
    """Make Numba optimise for `processor`; before the first compilation of a process."""
    os.environ["NUMBA_CPU_NAME"] = config.CPU_NAME = processor.name
    os.environ["NUMBA_CPU_FEATURES"] = config.CPU_FEATURES = ""  # those of the name


def write_unit(directory: Path, processor: Processor, unit: tuple[str, str, str]) -> None:
    """Compile one unit into `directory`, in a process of its own or the first to be configured."""
    configure(processor)
    for name, code in compile_unit(*unit, processor).items():
        partial = directory / f"{name}.{os.getpid()}"
        partial.write_bytes(code)
        partial.replace(directory / f"{name}.o")
    print(f"fastrnn: compiled {' '.join(unit)} for {processor.name}", flush=True)


def main(directory: Path, processor: Processor) -> None:
    """Compile every unit that `directory` does not hold yet, on all processors."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [unit for unit in UNITS if not (directory / f"fastrnn_{'_'.join(unit)}_arrange.o").exists()]
    missing.sort(key=lambda unit: unit[2])  # the slower backward units first
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(write_unit, directory, processor, unit) for unit in missing]:
            done.result()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Processor(sys.argv[2]))
