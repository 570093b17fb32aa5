"""Values computed from a module's tensors (folded, packed weights), kept until the module changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyops.ops import _conv_call

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Derived:
    """One value and the state of the module tree it was computed from. Never saved, never copied.

    What counts as a change: a parameter, buffer or submodule replaced, a tensor written in place (by its version), a hook added, a
    part's train or eval mode. Writing through ``parameter.data`` bumps no version; owners therefore call `clear` in ``train`` and
    ``_apply`` (``module.to(...)``) as well.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self._facts: Any = None
        self._entries: list[tuple[dict, str, Any]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._hooks: list[tuple[dict, bool]] = []
        self._value: Any = None

    def get(self, module: nn.Module, compute: Callable[[], Any], facts: Any = 0) -> Any:
        """``compute()``, or its last result if `module` and `facts` are what they were then."""
        if torch._C._len_torch_dispatch_stack():  # of fake tensors, perhaps: nothing to keep
            return compute()
        if self._facts != facts or not self._unchanged():
            self.clear()
            if not self._record(module):
                return compute()
            self._value, self._facts = compute(), facts
        return self._value

    def _unchanged(self) -> bool:
        for owner, name, value in self._entries:
            if owner.get(name) is not value:
                return False
        for tensor, version in self._versions:
            if tensor._version != version:
                return False
        return all(bool(hooks) == had for hooks, had in self._hooks)

    def _record(self, module: nn.Module) -> bool:
        """False when a tensor keeps no version (inference tensors), so that nothing can be kept."""
        for part in module.modules():
            self._entries.append((part.__dict__, "training", part.training))
            self._entries += [(part._modules, name, child) for name, child in part._modules.items()]
            self._hooks += [(getattr(part, name), bool(getattr(part, name))) for name in HOOKS]
            for owner in (part._parameters, part._buffers):
                for name, tensor in owner.items():
                    self._entries.append((owner, name, tensor))
                    if tensor is not None:
                        if tensor.is_inference():
                            self.clear()
                            return False
                        self._versions.append((tensor, tensor._version))
        return True

    def __deepcopy__(self, memo) -> Derived:
        return Derived()

    def __reduce__(self):
        return Derived, ()


def has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name) for name in HOOKS)


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether kernels may stand for the parts: every part is exactly one of `kinds`, no part but `module` itself has hooks, which only a
    call of the part would run, and nobody records the layers one by one."""
    if _conv_call.is_recorded():
        return False
    return all(type(part) in kinds and (part is module or not has_hooks(part)) for part in module.modules())
