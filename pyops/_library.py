"""Defines ops: schema, fake, reference and gradient in one call; loads the compiled kernels and keeps the error if they do not load.

C++ and Triton only add implementations, so fake tensors, `torch.compile`, export and the docs work with nothing built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

LIBRARY = torch.library.Library("pyops", "FRAGMENT")

extension: Any = None
load_error: ImportError | None = None
try:
    extension = import_module("pyops._C")
except ImportError as error:
    load_error = error


def has_cuda_kernels() -> bool:
    return extension is not None and extension.build_info()["mode"] == "cuda"


def not_loaded_reason() -> str | None:
    """None when the compiled kernels are loaded, else why not and what to do about it."""
    if load_error is None:
        return None
    return f"pyops' compiled kernels are not loaded ({load_error}); `pip install -e .` with a C++ compiler builds them; see `pyops env`"


def define(
    name: str,
    schema: str,
    *,
    fake: Callable,
    reference: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    overloads: tuple[str, ...] = ("",),
) -> None:
    """Defines `pyops::name` and its overloads, which share schema, fake and gradient and differ in who computes.

    `reference` computes the default overload wherever no kernel is registered for the device.
    """
    for overload in overloads:
        full = f"{name}.{overload}" if overload else name
        LIBRARY.define(full + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"pyops::{full}", fake, lib=LIBRARY)
        if backward is not None:
            torch.library.register_autograd(f"pyops::{full}", backward, setup_context=setup_context, lib=LIBRARY)
        if reference is not None and not overload:
            LIBRARY.impl(full, reference, "CompositeExplicitAutograd")


def implement(name: str, function: Callable, *keys: str) -> None:
    """Registers a Python function (a composition of kernels, a Triton launcher) as `pyops::name` for some dispatch keys."""
    for key in keys:
        LIBRARY.impl(name, function, key)
