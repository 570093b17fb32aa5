"""Which modules of a model change and to what, the change, and the way back: `pyops.fuse` and `pyops.unfuse`."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from pyops import nn as pyops_nn
from pyops._fusion import (
    classes,
    rewrite,
    rules,
    timm_blocks,  # noqa: F401  (registers rules, as the next three do)
    torch_layers,
    torchvision_blocks,  # noqa: F401
    transformers_blocks,  # noqa: F401
)
from pyops._fusion.rules import Change
from pyops._trace import evaluating
from pyops.nn._derived import kind_of, own_class

Model = TypeVar("Model", bound=nn.Module)


class Found(NamedTuple):
    """What becomes of one module, or why it is left alone (None: there is nothing to say)."""

    name: str
    module: nn.Module
    change: Change | None
    reason: str | None


def fuse(model: Model, *, example_inputs: Any = None, verbose: bool = False) -> Model:
    """Makes `model` run on pyops' kernels wherever they can stand for its layers, in place, and returns it.

    Results stay within the numerics gate of torch's own. A network of images then works in channels_last inside; its outputs have the
    layout of its inputs. `pyops.explain(model, x)` shows what runs together, what does not and why; `unfuse` undoes it exactly.

    Args:
        model: any module, in training or not; parameters and state_dict keys stay untouched.
        example_inputs: a tensor, or a tuple of the forward's arguments. The fused model is run on them once, in eval mode without
            gradients, so that its next call finds weights ready, and its outputs are compared with those of the model as it was.
        verbose: prints a line for every module that changes.

    Raises TypeError when `model` is no torch.nn.Module, RuntimeError where the outputs of `example_inputs` differ by more than rounding;
    the model is then as it was.
    """
    _check(model, "fuse")
    expected = None if example_inputs is None else _run(model, example_inputs)
    changes = {module: (name, change) for name, module, change, _ in survey(model) if change is not None}
    if changes and _lays_out(model):
        changes[model] = "", changes.get(model, ("", Change(None)))[1]._replace(is_root=True)
    for module, (name, change) in changes.items():
        try:
            _apply(module, change)
        except BaseException:  # half a fusion is none
            unfuse(model)
            raise
        if verbose:
            print(f"{name or 'the model'} ({type(module).__name__}): {_said(module, change)}")
    if example_inputs is not None:
        _compare(model, example_inputs, expected)
    return model


def _said(module: nn.Module, change: Change) -> str:
    if change.kind is None:
        return "its calls run together" if rewrite.methods_of(classes.original_of(module)) else "images in channels_last inside"
    own = change.kind.__module__.startswith("pyops.nn")
    return f"pyops.nn.{change.kind.__name__}" if own else f"pyops' kernels for {change.kind.__name__.lstrip('_')}"


def survey(model: nn.Module) -> list[Found]:
    """What `fuse` would do with every module, in the model's order."""
    found: list[Found] = []
    owned: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in owned:
            continue
        if classes.is_fused(module) or own_class(module).__module__.startswith("pyops.nn"):
            if kind_of(module) is not nn.Sequential and kind_of(module).__module__.startswith("pyops.nn"):
                owned |= set(module.modules())  # a block that runs its layers itself
            continue
        decision = _decide(module)
        if isinstance(decision, Change):
            found.append(Found(name, module, decision, None))
            if decision.whole:
                owned |= set(module.modules())
        else:
            found.append(Found(name, module, None, decision))
            if isinstance(module, torch.jit.ScriptModule):
                owned |= set(module.modules())
    return found


def _lays_out(model: nn.Module) -> bool:
    """Whether the model is one of images that may be laid out anew inside."""
    if classes.is_fused(model) or _apart(model) is not None or classes.refused(type(model), is_root=True) is not None:
        return False
    parts = list(model.modules())
    return any(isinstance(part, nn.Conv2d) for part in parts) and not any(rewrite.reads_memory(type(part)) for part in parts)


def _apart(module: nn.Module) -> str | None:
    """Why a module of whatever class is left alone."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return "scripted or traced"
    if "forward" in module.__dict__:
        return "its forward was set on the instance"
    if parametrize.is_parametrized(module):
        return "parametrised"
    taken = classes.taken(module)
    return None if taken is None else f"it has a {taken} of its own, a name that fused modules use"


def _decide(module: nn.Module) -> Change | str | None:
    cls = own_class(module)
    apart = _apart(module)
    if apart is not None:
        return apart
    known = rules.find(cls)
    decision = known(module) if callable(known) else known
    if isinstance(decision, Change):
        return decision
    if isinstance(module, nn.Sequential) and cls.forward is nn.Sequential.forward:
        return classes.refused(cls, pyops_nn.Sequential) or torch_layers.sequential(module)
    if kind_of(module) is type(module) and not cls.__module__.startswith(("torch.", "pyops.")) and rewrite.methods_of(cls):
        return classes.refused(cls) or Change(None, whole=False)
    return decision


def _run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """The tensors of a forward in eval mode without gradients, which leaves the model in its mode."""
    with evaluating(model), torch.no_grad():
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _compare(model: nn.Module, inputs: Any, expected: Any) -> None:
    """Undoes the fusion and raises RuntimeError where outputs are not `expected` but for rounding."""
    try:
        outputs = _run(model, inputs)
        same = len(outputs) == len(expected) and all(_agree(y, before) for y, before in zip(outputs, expected, strict=True))
    except BaseException:
        unfuse(model)
        raise
    if not same:
        unfuse(model)
        raise RuntimeError("fuse: example_inputs: the fused model's outputs differ from the model's by more than rounding; it is unfused")


def _agree(output: Tensor, expected: Tensor) -> bool:
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    if not output.is_floating_point():
        return True  # numbers of classes, kept boxes: a rounding apart they may jump
    allowed = 1e-3 if output.dtype in (torch.float32, torch.float64) else 5e-2
    difference = torch.linalg.vector_norm(output.double() - expected.double())
    return bool(difference <= allowed * torch.linalg.vector_norm(expected.double())) or torch.equal(output, expected)


def _apply(module: nn.Module, change: Change) -> None:
    classes.become(module, change.kind, change.is_root, **change.attributes)
    for part, own in change.parts:
        _apply(part, own)


def unfuse(model: Model) -> Model:
    """Undoes `fuse`, in place, and returns the model. What fully_shard put around a module's class stays.

    Raises TypeError when `model` is no torch.nn.Module, RuntimeError where a fused module's class was changed by something else since, as
    `torch.nn.utils.parametrize` changes it; the model is then as it was.
    """
    _check(model, "unfuse")
    fused = {name: module for name, module in model.named_modules() if classes.is_fused(module)}
    for name, module in fused.items():
        if classes.is_changed(module):
            place = f"model.{name}" if name else "model"
            raise RuntimeError(f"unfuse: {place}: expected the class that fuse gave it, got {type(module).__name__}; undo that first")
    for module in fused.values():
        classes.restore(module)
    return model


def _check(model: Any, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model: expected a torch.nn.Module, got {type(model).__name__}")
