"""Make the parts of torch that go by a module's class, or by an operator's name, know fastrnn's.

These are Dynamo (torch.compile), inductor, the FLOP counter, torch.ao's pruner, torch.fx and TorchScript. What a part needs
that torch has not imported yet is done when it does: Dynamo alone takes half a second or more to import, and most programs
never need it.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.jit import _recursive

from fastrnn import features, flops, functional, modules, ops, transforms  # noqa: F401  # transforms, for its rules
from fastrnn.derived import original_class, set_class


def _prepare_dynamo(dynamo: ModuleType) -> None:
    """Have Dynamo trace our layers, and leave the graph for the calls that no engine takes.

    Dynamo stops at every instance of nn.RNN, nn.LSTM and nn.GRU unless `torch._dynamo.config.allow_rnn` is set. That is global
    and would change torch.nn's own layers too, so it is on only while Dynamo wraps one of ours. A class that hides its base
    from Dynamo will not do: in a compiled forward `isinstance(m, (nn.LSTM, nn.GRU))` would be False, without a word.
    """
    builder = dynamo.variables.builder
    wrap_module = builder.VariableBuilder.wrap_module

    def wrap_module_or_ours(self: object, value: nn.Module) -> object:
        if not isinstance(value, (modules.RNN, modules.LSTM, modules.GRU)):
            return wrap_module(self, value)
        with dynamo.config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_module_or_ours
    functional.call_outside_of_the_graph = torch.compiler.disable(
        functional.call_outside_of_the_graph, reason="no engine of fastrnn takes the call (fastrnn.explain says why)"
    )


def _prepare_inductor(lowering: ModuleType) -> None:
    """Have inductor call our operators as they are, as it does where `implicit_fallbacks` is on."""
    for op in ops.OPERATORS:
        lowering.make_fallback(op)


def _prepare_pruner(match_utils: Any) -> None:
    """Have torch.ao's structured pruner match our layers where its patterns name torch.nn's, which it compares by class."""
    match = match_utils._match
    match_utils._match = lambda found, node, current: (
        match(found, node, current) or match(found, node, modules.DROP_INS.get(current))
    )


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module as usual, and calls `prepare` with it."""

    prepare: Callable[[ModuleType], None]

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        self.prepare(module)


class _Finder:
    """Waits in sys.meta_path for the import of one module, has `prepare` called with it, and steps aside."""

    def __init__(self, name: str, prepare: Callable[[ModuleType], None]) -> None:
        self.name, self.prepare = name, prepare

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.origin is not None:
            found.loader = loader = _Loader(name, found.origin)
            loader.prepare = self.prepare
        return found


for _name, _prepare in (
    ("torch._dynamo", _prepare_dynamo),
    ("torch._inductor.lowering", _prepare_inductor),
    ("torch.utils.flop_counter", flops.count_operations),
    ("torch.ao.pruning._experimental.pruner.match_utils", _prepare_pruner),
):
    if _name in sys.modules:
        _prepare(sys.modules[_name])
    else:
        sys.meta_path.insert(0, _Finder(_name, _prepare))


def _keep_whole(tracer: type[torch.fx.Tracer]) -> None:
    """Have torch.fx make a node of each call of ours, as of torch.nn's modules, which it knows by the name of their package."""
    is_leaf_module = tracer.is_leaf_module

    def is_leaf_module_or_ours(self: torch.fx.Tracer, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m).__module__ == modules.__name__ or is_leaf_module(self, m, module_qualified_name)

    # torch.fx asks its tracers alone, and whoever traces brings one of his own, most of which ask this one
    tracer.is_leaf_module = functools.wraps(is_leaf_module)(is_leaf_module_or_ours)  # type: ignore[method-assign]


_keep_whole(torch.fx.Tracer)


@contextmanager
def _of_torchs_classes(model: nn.Module) -> Iterator[None]:
    """Give every module of ours in `model` the class that it stands for, and the attributes of that class alone, for a while.

    Raises:
        RuntimeError: for a subclass of ours, whose own code TorchScript would have to compile around ours.
    """
    before = [(m, type(m), m.__dict__.copy()) for m in model.modules() if isinstance(m, modules.DropIn)]
    classes = [original_class(getattr(own_class, "_fastrnn_own_class", own_class)) for _, own_class, _ in before]
    for torch_class in classes:
        if issubclass(torch_class, modules.DropIn):
            raise RuntimeError(
                f"torch.jit.script cannot compile {torch_class.__qualname__}, a subclass of a fastrnn module. "
                "Use torch.jit.trace, or derive the class from torch.nn for scripting."
            )
    for module, own_class, _ in before:
        if getattr(module, "_fastrnn_features", False):
            raise RuntimeError(
                f"torch.jit.script cannot compile a {own_class.__name__} with {features.described(module)[2:]}. "
                "Use torch.compile."
            )
    try:
        for (module, _, _), torch_class in zip(before, classes, strict=True):
            module.__dict__.pop("_fastrnn_panels", None)  # of a frozen layer
            set_class(module, torch_class)
        yield
    finally:
        for module, own_class, attributes in before:
            set_class(module, own_class)
            for name in module.__dict__.keys() - attributes.keys():  # TorchScript leaves its own
                del module.__dict__[name]
            module.__dict__.update(attributes)


def _compile_as_torchs(create_script_module: Callable[..., Any]) -> Callable[..., Any]:
    """Have TorchScript compile torch.nn's code for our modules: it wants a method's overloads in the file of the class."""

    @functools.wraps(create_script_module)
    def create(nn_module: nn.Module, stubs_fn: Any, share_types: bool = True, is_tracing: bool = False) -> Any:
        if is_tracing:  # which runs the modules
            return create_script_module(nn_module, stubs_fn, share_types, is_tracing)
        with _of_torchs_classes(nn_module):
            return create_script_module(nn_module, stubs_fn, share_types, is_tracing)

    return create


# Not by the method `__prepare_scriptable__`: torch.jit.script leaves what it returns in the model that was compiled, so that
# this would run torch.nn's layers from then on, and ScriptModule does not call it.
_recursive.create_script_module = _compile_as_torchs(_recursive.create_script_module)
