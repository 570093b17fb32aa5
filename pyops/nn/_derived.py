"""Values computed from a module's tensors (folded, packed weights), kept until the module changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pyops.ops import _conv_call

_version, _address = attrgetter("_version"), Tensor.data_ptr
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


OPTIONS = (  # of layers, which folded and packed values depend on
    "eps", "kernel_size", "stride", "padding", "padding_mode", "dilation", "groups", "mode", "scale_factor", "size", "align_corners",
    "ceil_mode", "count_include_pad", "divisor_override", "return_indices", "negative_slope", "approximate", "drop_rate",
)  # fmt: skip


_steps = itertools.count(1)
_last_step = 0  # of any optimizer


def _count_step(*_) -> None:
    """Fused optimizers write parameters without a word to their versions."""
    global _last_step
    _last_step = next(_steps)


register_optimizer_step_post_hook(_count_step)


class Kept(NamedTuple):
    """A value and the state of the module tree it was computed from."""

    value: Any
    facts: Any
    owners: list[dict]
    names: list[str]
    values: list[Any]  # what each owner has under its name
    tensors: list[Tensor]
    versions: list[int]
    placed: list[Tensor]  # those that have memory of their own
    addresses: list[int]
    unhooked: list[dict]
    hooked: list[dict]
    children: list[dict]
    counts: list[int]  # of each part's children: one may be added
    step: int | None

    def holds(self, facts: Any) -> bool:
        """Asked at every call of a layer, so by maps, which take half a loop's time."""
        return (
            self.facts == facts
            and self.step in (None, _last_step)
            and all(map(is_, map(dict.get, self.owners, self.names), self.values))
            and list(map(_version, self.tensors)) == self.versions
            and list(map(_address, self.placed)) == self.addresses
            and not any(self.unhooked)
            and all(self.hooked)
            and list(map(len, self.children)) == self.counts
        )


class Derived:
    """One value, kept until the module tree that it was computed from changes. Never saved, never copied.

    What counts as a change: a parameter, buffer or submodule replaced, a tensor written in place (by its version) or given other memory,
    a step of any optimizer, a hook added, a part's train or eval mode, one of a layer's OPTIONS. Writing through ``parameter.data`` in
    place bumps no version; `Keeps` therefore drops the value in ``train`` and ``_apply`` (``module.to(...)``) as well. Nothing is kept of
    parameters that FSDP gathers, who writes so at every call. Threads may call the module at once: what is kept is one object, which is
    replaced and never written. ``of_tensors=False``: the value depends on which layers, options, hooks and parameters there are, not on
    what is written in them.
    """

    def __init__(self, of_tensors: bool = True):
        self._kept: Kept | None = None
        self._of_tensors = of_tensors

    def clear(self) -> None:
        self._kept = None

    def get(self, module: nn.Module, compute: Callable[[], Any], facts: Any = 0) -> Any:
        """``compute()``, or its last result if `module` and `facts` are what they were then."""
        if torch._C._len_torch_dispatch_stack():  # of fake tensors, perhaps: nothing to keep
            return compute()
        kept = self._kept
        if kept is not None and kept.holds(facts):
            return kept.value
        state = _state_of(module, self._of_tensors)  # before what is computed of it: a change in between is seen at the next call
        value = compute()
        self._kept = None if state is None else Kept(value, facts, *state)
        return value

    def __deepcopy__(self, memo) -> Derived:
        return Derived(self._of_tensors)

    def __reduce__(self):
        return Derived, (self._of_tensors,)


class DerivedParts(dict[str, Derived]):
    """A `Derived` for each of several parts of a module, by name."""

    def __missing__(self, name: str) -> Derived:
        return self.setdefault(name, Derived())

    def __deepcopy__(self, memo) -> DerivedParts:
        return DerivedParts()

    def __reduce__(self):
        return DerivedParts, ()


class Keeps:
    """Of modules that keep a `Derived`, or something like it, as ``_kept``, made at its first use: drops what it holds where a change of
    tensors may have gone unseen."""

    @cached_property
    def _kept(self) -> Any:
        return Derived()

    def train(self, mode: bool = True):
        self._kept.clear()
        return super().train(mode)  # type: ignore[misc]

    def _apply(self, fn, recurse=True):
        self._kept.clear()
        return super()._apply(fn, recurse)  # type: ignore[misc]


def _state_of(module: nn.Module, of_tensors: bool) -> tuple | None:
    """As `Kept` holds it, without what is written in tensors unless `of_tensors`; None when a tensor keeps no version (inference tensors,
    FSDP's), so that nothing can be kept."""
    entries: list[tuple[dict, str, Any]] = []
    hooks: list[dict] = []
    children: list[dict] = []
    tensors, step = [], _last_step if of_tensors else None
    for part in module.modules():
        if "_is_fsdp_managed_module" in part.__dict__:
            return None
        entries += [(part.__dict__, "training", part.training), (part.__dict__, "forward", part.__dict__.get("forward"))]
        entries += [(part.__dict__, name, part.__dict__[name]) for name in OPTIONS if name in part.__dict__]
        entries += [(part._modules, name, child) for name, child in part._modules.items()]
        children.append(part._modules)
        hooks += [getattr(part, name) for name in HOOKS]
        for owner in (part._parameters, part._buffers):
            for name, tensor in owner.items():
                entries.append((owner, name, tensor))
                if tensor is not None and of_tensors:
                    if tensor.is_inference():
                        return None
                    tensors.append(tensor)
    owners, names, values = (list(column) for column in zip(*entries, strict=True))
    placed = [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter)]  # a subclass may have none
    unhooked, hooked = [found for found in hooks if not found], [found for found in hooks if found]
    state = (tensors, list(map(_version, tensors)), placed, list(map(_address, placed)), unhooked, hooked)
    return owners, names, values, *state, children, list(map(len, children)), step


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module runs more than its class' forward: hooks, or a forward of its own."""
    return any(getattr(module, name) for name in HOOKS) or "forward" in module.__dict__


class Aliases(dict[type, type]):
    """By class: the one that does the same, of torch or pyops, where kernels know that one; else the class itself. `pyops.fuse` adds them.

    Other libraries' classes stand in ``named``, by their full name, with a function that says what they do once a layer of theirs is met.
    """

    def __init__(self):
        self.named: dict[str, Callable[[type], type | None]] = {}

    def __missing__(self, cls: type) -> type:
        known = self.named.get(f"{cls.__module__}.{cls.__qualname__}")
        found = self[cls] = (None if known is None else known(cls)) or cls
        return found


ALIASES = Aliases()


def kind_of(module: nn.Module) -> type:
    """The class that says what kernels may stand for the module: its own, or the one that it was fused as."""
    own = type(module)
    return ALIASES[getattr(own, "_kind", None) or own]


def is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether kernels may stand for the parts: every part is of exactly one of `kinds`, no part but `module` itself has hooks, which only a
    call of the part would run, and nobody records the layers one by one."""
    if _conv_call.is_recorded():
        return False
    return all(
        (kind_of(part) in kinds or (part is module and own_class(module) in kinds)) and (part is module or not has_hooks(part))
        for part in module.modules()
    )


def is_wrapper(cls: type) -> bool:
    """Whether PyTorch's fully_shard or replicate made it: of a module's class, with a class of theirs before it."""
    return cls.__module__.startswith("torch.distributed.") and len(cls.__bases__) == 2 and issubclass(cls.__bases__[1], nn.Module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what `is_wrapper` knows around it."""
    cls = type(module)
    return cls.__bases__[1] if is_wrapper(cls) else cls
