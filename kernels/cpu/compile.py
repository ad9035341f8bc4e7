"""From the kernels' Numba source to machine code: object files for a tier of processors, each with one C entry point.

Entry points, for every cell, scalar type ("f32", "f64") and pass ("forward", "backward"), C linkage, plain int64 arguments,
named by `Tier.entry`:
    <entry>          void (records, rank)
    <entry>_arrange  int64 (records, threads)
records is the address of one record of plan.FIELDS a direction, or a layer of those that run at once. Beside these the
conversions of convert.py.

    python -m kernels.cpu.compile BASE TIER CELL TYPE PASS DEFINITION

writes one unit to BASE/kernels-*/. CELL is a name of cells.CELLS, or of the cell that DEFINITION defines. In a process of its
own: Numba is made to do half its work here (see `Lowered`).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm
from numba import types
from numba.core import codegen
from numba.core.registry import cpu_target


class Lowered(codegen.AOTCodeLibrary):
    """A function as Numba lowers it. Numba would link, optimise and compile it with all that it calls, again for every
    caller: that is most of the time it takes, and `emit` does it once, over the whole of an entry point."""

    def _optimize_functions(self, module) -> None:
        pass

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # nothing is called here

    def modules(self, seen: set) -> Iterator[llvm.ModuleRef]:
        """Of this function and all that it calls."""
        if self not in seen:
            seen.add(self)
            yield self._final_module
            for library in self._linking_libraries:
                yield from library.modules(seen)


class Codegen(codegen.AOTCPUCodegen):
    _library_class = Lowered

    def set_env(self, name, environment) -> None:
        pass


cpu_target.target_context._internal_codegen = Codegen("fastrnn")
sys.setrecursionlimit(10_000)  # Numba compiles what a function calls within its own compilation, and a cell may be a long chain

# After that, as some of the kernels' functions compile where they are defined.
from ..cells import CELLS, read  # noqa: E402
from .arrange import make_arrange  # noqa: E402
from .backward import make_backward  # noqa: E402
from .convert import make_conversion, make_turn  # noqa: E402
from .forward import make_forward  # noqa: E402
from .processor import Tier, tiers  # noqa: E402
from .source import object_directory  # noqa: E402
from .vector import vector_library  # noqa: E402

if llvm.get_process_triple().startswith("x86_64"):  # a tile's loop that begins amid a cache line takes 9 % longer on Zen 3
    llvm.set_option("fastrnn", "-x86-experimental-pref-innermost-loop-alignment=6")

SCALARS = {"f32": types.float32, "f64": types.float64}
PASSES = ("forward", "backward")
UNITS = tuple((cell, scalar, which) for scalar in SCALARS for cell in CELLS for which in PASSES)
CONVERSIONS = (("numbers", "bf16", "widen"), ("numbers", "bf16", "round"), ("numbers", "f32", "turn"))
INT64 = types.int64


def units_of(tier: Tier) -> list[tuple[str, str, str]]:
    """What is compiled for a tier, and not for the one whose code it shares."""
    return [unit for unit in (*UNITS, *CONVERSIONS) if tier.owner(*unit[1:]) == tier]


def emit(name: str, function, returns: types.Type, tier: Tier) -> bytes:
    """Object code of a C function `name` of two int64 that calls `function`: only `name` leaves the object."""
    function.compile(returns(INT64, INT64))
    compiled = function.overloads[INT64, INT64]
    # Numba's functions return a status, and their result through a pointer. Kernels raise nothing: setup.py sees to it.
    native = f'@"{compiled.fndesc.mangled_name}"'
    c_type, result = ("void", "void") if returns == types.void else ("i64", "i64 %result")
    module = llvm.parse_assembly(f"""
        declare i32 {native}(ptr, ptr, i64, i64)
        define {c_type} @{name}(i64 %a, i64 %b) {{
          %value = alloca i64
          %error = alloca ptr
          call i32 {native}(ptr %value, ptr %error, i64 %a, i64 %b)
          %result = load i64, ptr %value
          ret {result}
        }}""")
    for part in compiled.library.modules(set()):
        module.link_in(part, preserve=True)
    for index, value in enumerate((*module.functions, *module.global_variables)):
        if not value.is_declaration and value.name != name:
            value.linkage, value.name = "internal", f"{name}.{index}"
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = ",".join(f"+{feature}" for feature in tier.features)
    machine = target.create_target_machine(cpu=tier.processor, features=features, opt=3, reloc="pic", codemodel="small")
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    module.verify()
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(3))
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def write_unit(directory: Path, tier: Tier, unit: tuple[str, str, str]) -> None:
    """Compile a unit's functions and write them, each whole or not at all, whoever else does the same."""
    gc.disable()  # it would look at all that Numba knows again and again, a fifth of the time
    cell, scalar, which = unit
    name = tier.entry(*unit)
    if unit in CONVERSIONS:
        v = vector_library(types.float32, tier.target)
        points = [(name, make_turn(v) if which == "turn" else make_conversion(v, which), types.void)]
    else:
        v = vector_library(SCALARS[scalar], tier.target)
        make = make_forward if which == "forward" else make_backward
        arrange = make_arrange(CELLS[cell], v, tier.target, which == "forward")
        points = [(name, make(CELLS[cell], v, tier.target), types.void), (f"{name}_arrange", arrange, INT64)]
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for point, function, returns in points:
        partial = directory / f"{point}.{os.getpid()}"
        partial.write_bytes(emit(point, function, returns, tier))
        partial.replace(directory / f"{point}.o")
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    base, name, cell, scalar, which, definition = sys.argv[1:]
    (tier,) = (tier for tier in tiers() if tier.name == name)
    if cell not in CELLS:
        CELLS[cell] = read(definition)
    write_unit(object_directory(Path(base), name), tier, (cell, scalar, which))
