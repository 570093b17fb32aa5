"""Classes of fused modules: each derives from the module's own, so that `isinstance` holds, and knows the way back."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

from torch import nn

from pyops._fusion import rewrite
from pyops._fusion.layout import ImageRoot
from pyops.nn.chain import Chained

KEPT = "_fused_attributes"  # in a fused module's __dict__: the names of what was added to it


class Fused:
    """Of modules whose class `become` made."""

    _original: type[nn.Module]  # the module's own class
    _kind: type[nn.Module] | None  # the class of pyops.nn that it behaves as; None: its own methods, rewritten
    _is_root: bool

    def __reduce_ex__(self, protocol):
        """The class is made again where a copy is loaded: it has no name to be found by."""
        _, _, *rest = object.__reduce_ex__(self, max(int(protocol), 2))
        return (_restore, (self._original, self._kind, self._is_root), *rest)


def _restore(original: type[nn.Module], kind: type[nn.Module] | None, is_root: bool) -> nn.Module:
    cls = class_of(original, kind, is_root)
    return cls.__new__(cls)


@cache
def class_of(original: type[nn.Module], kind: type[nn.Module] | None, is_root: bool) -> type[nn.Module]:
    """The class of a fused module: `original` with the methods of `kind`, or with its own rewritten ones; is_root: it lays out images.

    Raises TypeError where `original` cannot be derived from.
    """
    body: dict[str, Any] = {}
    bases: tuple[type, ...]
    if is_root:  # above a rewritten forward, which would hide its own
        inner = class_of(original, kind, False)
        bases = (ImageRoot, inner) if issubclass(inner, Fused) else (ImageRoot, Fused, inner)
    elif kind is None:
        bases, body = (Fused, Chained, original), rewrite.methods_of(original)
    elif issubclass(kind, original):
        return kind
    else:
        bases = (Fused, kind, original)
    body |= {"_original": original, "_kind": kind, "_is_root": is_root}
    body |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return types.new_class(original.__name__, bases, {}, lambda namespace: namespace.update(body))


def become(module: nn.Module, kind: type[nn.Module] | None = None, is_root: bool = False, **attributes: Any) -> None:
    """Changes the module's class in place. attributes: what `kind` needs beside what the module has.

    Raises TypeError where its class cannot be derived from, or instances of it cannot change class.
    """
    cls = class_of(original_of(module), kind, is_root)
    module.__class__ = cls
    added = tuple(name for name in attributes if name not in module.__dict__)
    module.__dict__.update({name: attributes[name] for name in added})
    module.__dict__[KEPT] = module.__dict__.get(KEPT, ()) + added


def is_fused(module: nn.Module) -> bool:
    return KEPT in module.__dict__


def original_of(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before it was fused."""
    cls = type(module)
    if issubclass(cls, Fused):
        return cls._original
    return next(base for base in cls.__mro__ if not base.__module__.startswith("pyops.")) if is_fused(module) else cls


def restore(module: nn.Module) -> None:
    """Undoes `become`."""
    module.__class__ = original_of(module)
    for name in (*module.__dict__.pop(KEPT), "_kept", "_image_layout"):
        module.__dict__.pop(name, None)
