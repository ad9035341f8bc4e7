"""The classes that `convert` and `revert` give to modules, those of classes derived from torch.nn's among them.

A class derived from torch.nn's, `class Own(nn.GRU)`, looks up methods in Own, nn.GRU, RNNBase, Module. A module of it gets
a class made here, of the bases Own and fastrnn.GRU. Python then looks in Own, fastrnn.GRU, nn.GRU, RNNBase, Module: the module
is still an Own, everything that Own defines still comes first, and `super().forward(x)` in Own's code finds ours.

Own itself is not changed, so modules of it that nobody converted stay torch.nn's. Replacing Own's base would have reached all
of them, and copying Own would have made a module that is no Own.
"""

from __future__ import annotations

import abc
import threading
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from fastrnn.modules import DROP_INS

_making = threading.RLock()


def converted_class(cls: type) -> type:
    """Return the class that `convert` gives to a module of class `cls`: `cls` itself where there is nothing to convert."""
    if cls in DROP_INS:
        return DROP_INS[cls]
    for torch_class, drop_in in DROP_INS.items():
        if issubclass(cls, torch_class) and not issubclass(cls, drop_in):
            if _is_parametrized(cls):
                return _with_base(cls, converted_class(cls.__bases__[0]))
            names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
            return made_class(cls.__name__, (cls, drop_in), _Converted, names | {"_fastrnn_original": cls})
    return cls


def original_class(cls: type) -> type:
    """Return the class that `revert` gives to a module of class `cls`: `cls` itself where `convert` does not lead to it."""
    if _is_parametrized(cls):
        base = original_class(cls.__bases__[0])
        return cls if base is cls.__bases__[0] else _with_base(cls, base)
    return vars(cls).get("_fastrnn_original", cls)


def set_class(module: nn.Module, cls: type) -> None:
    """Change the class of a module that has another one."""
    if type(module) is not cls:
        object.__setattr__(module, "__class__", cls)  # past a __setattr__ of the module's own


def made_class(name: str, bases: tuple[type, ...], mixin: type, attributes: dict[str, Any]) -> Any:
    """Return the class of these bases and of a mixin that comes before them, made where no object has it yet.

    The interpreter keeps it as a subclass of the first base for as long as it is in use.
    """
    with _making:
        made: type
        for made in type.__subclasses__(bases[0]):
            if vars(made).get("_fastrnn_mixin") is mixin:
                return made
        metaclass = type(bases[0])
        if not issubclass(metaclass, _MixinFirst):
            metaclass = _MixinFirst if metaclass is type else type(metaclass.__name__, (_MixinFirst, metaclass), {})
        return _make(metaclass, name, bases, attributes | {"_fastrnn_mixin": mixin})


class _MixinFirst(type):
    """The metaclass of a made class: methods are looked up in the class, in its mixin, and then in its bases.

    A mixin before the bases would be the first base itself. The first base decides about the layout of objects, and Python
    changes the class of an object only to one of the same layout. A class that begins with abc.ABC has another than nn.Module.
    """

    def mro(cls) -> list[type]:
        order = super().mro()
        return [cls, vars(cls)["_fastrnn_mixin"], *order[1:]] if "_fastrnn_mixin" in vars(cls) else order


def _make(metaclass: Any, name: str, bases: tuple[type, ...], attributes: dict[str, Any]) -> type:
    """Make a class without the code of its metaclass, which often keeps a register of the classes that its author wrote."""
    new = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    return new(metaclass, name, bases, attributes)


class _Converted(nn.Module):
    """The mixin of a class made for a derived one."""

    _fastrnn_original: type  # the derived class

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Call fastrnn's hook and not the derived class's, which is meant for classes that somebody wrote."""
        drop_in = next(drop_in for drop_in in DROP_INS.values() if issubclass(cls, drop_in))
        super(drop_in, cls).__init_subclass__(**kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a module of the derived class, converted anew: a made class cannot be found by its name."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, str):
            return reduced
        build, arguments, *rest = reduced
        call = [self._fastrnn_original if value is type(self) else value for value in (build, *arguments)]
        return _build, tuple(call), *rest


def _build(build: Any, *arguments: Any) -> Any:
    module = build(*arguments)
    set_class(module, converted_class(type(module)))
    return module


def _is_parametrized(cls: type) -> bool:
    """Is it a class that torch.nn.utils.parametrize made for one module? The module goes back to the first base later."""
    return getattr(vars(cls).get("__getstate__"), "__module__", None) == parametrize.__name__


def _with_base(cls: type, base: type) -> type:
    """A copy of a parametrized class over another base."""
    return _make(type(base), cls.__name__, (base,), dict(vars(cls)))
