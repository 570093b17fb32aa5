"""What is known of modules, by their class: which class of pyops.nn they can become, and when.

torch.nn's layers are known by being exactly torch's. Of other libraries' blocks, whose forward a kernel replaces as a whole, the code that
was read when the rule was written is known by its `digest`: another version of the library is left alone, but for what `rewrite` finds.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from pyops._fusion._cached import cached
from pyops.nn._derived import ALIASES


class Change(NamedTuple):
    """What a module becomes."""

    kind: type[nn.Module] | None  # None: its own class, methods rewritten
    attributes: Mapping[str, Any] = MappingProxyType({})  # what kind needs beside what the module has
    parts: Iterable[tuple[nn.Module, Change]] = ()  # modules in it that change with it; the others in it stay as they are
    whole: bool = True  # nothing in it is fused on its own
    is_root: bool = False  # it lays out images


Rule = Callable[[Any], "Change | str"]  # a change, or why there is none

_RULES: dict[str, tuple[Rule, frozenset[str]]] = {}


def rule(name: str, *digests: str):
    """Of a function: it knows the class of that full name, whose code has one of the digests; without any, whatever its code is."""

    def add(function: Rule) -> Rule:
        _RULES[name] = function, frozenset(digests)
        return function

    return add


def find(cls: type) -> Rule | str | None:
    """The rule for exactly that class, why it does not hold, or None."""
    found = _RULES.get(f"{cls.__module__}.{cls.__qualname__}")
    if found is None:
        return None
    function, digests = found
    if digests and digest(cls) not in digests:
        return f"another version of {cls.__module__} than pyops knows"
    return function


def alias(name: str, kind: type[nn.Module], *digests: str) -> None:
    """Layers of the class of that full name, whose code has one of the digests, do what `kind` does: kernels know them as such."""
    ALIASES.named[name] = lambda cls: kind if digest(cls) in digests else None


@cached
def digest(cls: type) -> str:
    """Of the code of a class' own methods, whatever its comments, annotations and layout."""
    parts = []
    for name, method in sorted(vars(cls).items()):
        method = inspect.unwrap(method) if callable(method) else getattr(method, "__func__", None)
        if isinstance(method, types.FunctionType):
            parts.append((name, _source(method)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@cached
def digest_of_function(function: types.FunctionType) -> str:
    """The same of a function outside of classes."""
    return hashlib.sha256(repr(_source(function)).encode()).hexdigest()[:16]


def _source(function: types.FunctionType) -> Any:
    try:
        return _plain(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, SyntaxError):
        return ""


def _plain(node: Any) -> Any:
    """The tree as text that is the same in every Python: without what newer ones add, docstrings and annotations."""
    if isinstance(node, list):
        return [_plain(child) for child in node if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant))]
    if not isinstance(node, ast.AST):
        return repr(node)
    ignored = ("annotation", "returns", "type_params", "type_comment", "kind", "ctx")
    return type(node).__name__, [(name, _plain(value)) for name, value in ast.iter_fields(node) if name not in ignored]
