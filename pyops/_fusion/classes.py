"""Classes of fused modules: each derives from the module's own, so that `isinstance` holds, and knows the way back."""

from __future__ import annotations

import types
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pyops._fusion import rewrite
from pyops._fusion._cached import cached
from pyops._fusion.layout import ImageRoot, rooted
from pyops.nn._derived import is_wrapper, own_class
from pyops.nn.chain import Chains

KEPT = "_fused_attributes"  # in a fused module's __dict__: the names of what was added to it


class Fused:
    """Of modules whose class `become` made."""

    _original: type[nn.Module]  # the module's own class
    _kind: type[nn.Module] | None  # the class of pyops.nn that it behaves as; None: its own methods, rewritten
    _is_root: bool

    def __init_subclass__(cls, **kwargs):
        """Nothing: the classes made here are no subclasses that the module's author means to hear of."""

    def __reduce_ex__(self, protocol):
        """The class is made again where a copy is loaded: it has no name to be found by."""
        own = self._original
        if own.__reduce_ex__ is not object.__reduce_ex__ or own.__reduce__ is not object.__reduce__:
            return super().__reduce_ex__(protocol)
        found: Any = object.__reduce_ex__(self, max(int(protocol), 2))
        rest = list(found[2:])
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != "_kept"}
        return (_restore, (own, self._kind, self._is_root), *rest)

    def __prepare_scriptable__(self):
        """What torch.jit.script reads: the module as it was, of the same tensors."""
        return _unfused(self)  # type: ignore[arg-type]


class Rewritten:
    """Of modules whose own methods run layers of theirs as one (`runs`)."""

    @cached_property
    def _kept(self) -> Chains:
        return Chains()

    def train(self, *args, **kwargs):
        self._kept.clear()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _apply(self, *args, **kwargs):
        self._kept.clear()
        return super()._apply(*args, **kwargs)  # type: ignore[misc]


TAKEN = frozenset(  # names that a module to be fused has no use of its own for
    name for base in (Fused, Rewritten, ImageRoot) for name in vars(base) if not name.startswith("__") and not hasattr(nn.Module, name)
) | {KEPT, "_lays_out", *Fused.__annotations__}


def _restore(original: type[nn.Module], kind: type[nn.Module] | None, is_root: bool) -> nn.Module:
    cls = class_of(original, kind, is_root)
    return cls.__new__(cls)


@cached
def class_of(original: type[nn.Module], kind: type[nn.Module] | None, is_root: bool) -> type[nn.Module]:
    """The class of a fused module: `original` with the methods of `kind`, or with its own rewritten ones; is_root: it lays out images.

    Raises TypeError, or what the metaclass of `original` raises, where it cannot be derived from.
    """
    derives = kind is not None and issubclass(kind, original)
    body: dict[str, Any] = {}
    bases: tuple[type, ...]
    if is_root:
        inner = class_of(original, kind, False)
        bases = (ImageRoot, inner) if issubclass(inner, Fused) else (ImageRoot, Fused, inner)
        body["forward"] = rooted(inner.forward)
    elif kind is not None:
        if derives:
            return kind
        bases = Fused, kind, original
    else:
        bases = Fused, Rewritten, original
        body |= rewrite.methods_of(original)
    body |= {"_original": original, "_kind": kind, "_is_root": is_root}
    body |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(original.__name__, bases, {}, lambda namespace: namespace.update(body))


def become(module: nn.Module, kind: type[nn.Module] | None = None, is_root: bool = False, **attributes: Any) -> None:
    """Changes the module's class in place. attributes: what `kind` needs beside what the module has.

    Raises TypeError where its class cannot be derived from, or instances of it cannot change class.
    """
    own = original_of(module)
    cls = class_of(own, kind, is_root)
    module.__class__ = _wrapped(type(module), cls)
    if not issubclass(cls, Fused):
        attributes["__module__"] = own.__module__  # by which torch.fx knows torch's layers, none of which it looks into
    added = tuple(name for name in attributes if name not in module.__dict__)
    module.__dict__.update({name: attributes[name] for name in added})
    module.__dict__[KEPT] = module.__dict__.get(KEPT, ()) + added


def taken(module: nn.Module) -> str | None:
    """A name of a torch.nn or user's module that fused ones use otherwise."""
    cls = type(module)
    if cls.__module__.startswith("pyops."):
        return None
    ours = {name for base in cls.__mro__ if base.__module__.startswith("pyops.") for name in vars(base)}  # of a class built on pyops.nn
    own = (module.__dict__, module._parameters, module._buffers, module._modules)
    return next((name for name in sorted(TAKEN - ours) if hasattr(cls, name) or any(name in found for found in own)), None)


@cached
def refused(cls: type[nn.Module], kind: type[nn.Module] | None = None, is_root: bool = False) -> str | None:
    """Why no class can be derived from `cls` whose modules behave as its own do; None where one can."""
    if rewrite.asks_for_class(cls):
        return "its methods look for the class behind its own"
    try:
        class_of(cls, kind, is_root)
    except Exception as error:  # whatever its metaclass raises
        return f"its class cannot be derived from: {error}"
    return None


@cached
def _wrapped(before: type, cls: type[nn.Module]) -> type[nn.Module]:
    """`cls`, and around it what PyTorch's fully_shard or replicate put around the module's class `before`."""
    if not is_wrapper(before):
        return cls
    theirs, inner = before.__bases__
    body = {name: value for name, value in vars(before).items() if name not in ("__dict__", "__weakref__")}
    return type(before)(before.__name__.removesuffix(inner.__name__) + cls.__name__, (theirs, cls), body)


def is_fused(module: nn.Module) -> bool:
    return KEPT in module.__dict__ or isinstance(module, Fused)  # the second alone: one that made itself anew, as a slice of a Sequential


def is_changed(module: nn.Module) -> bool:
    """Whether a fused module's class was changed once more, by what `restore` cannot see through: parametrisations, for one."""
    cls = own_class(module)
    return "_original" not in vars(cls) and not cls.__module__.startswith("pyops.")


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was fused, without what fully_shard put around it."""
    cls = own_class(module)
    if issubclass(cls, Fused):
        return cls._original
    return next(base for base in cls.__mro__ if not base.__module__.startswith("pyops.")) if is_fused(module) else cls


def restore(module: nn.Module) -> None:
    """Undoes `become`."""
    module.__class__ = _wrapped(type(module), original_of(module))
    for name in (*module.__dict__.pop(KEPT, ()), "_kept", "_structure", "_lays_out"):
        module.__dict__.pop(name, None)


def _unfused(module: nn.Module) -> nn.Module:
    """A module of other objects and the same tensors, nothing in which is fused."""
    if isinstance(module, torch.jit.ScriptModule):
        return module
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    if is_fused(module):
        restore(twin)
    twin._modules = {name: None if child is None else _unfused(child) for name, child in module._modules.items()}
    return twin
