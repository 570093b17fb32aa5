"""`functools.cache` with the function's own types: type checkers hold classes of modules for unhashable."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(function: Function) -> Function:
    return cast(Function, cache(function))
