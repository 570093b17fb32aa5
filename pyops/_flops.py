"""How many FLOPs a network takes, and each of its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

import pyops


def _recurrent(input: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    """oneDNN's layer in a direction, by its arguments' shapes, which PyTorch's counter does not know."""
    T, B = input[:2]
    return 2 * T * B * (weight_ih[0] * weight_ih[1] + weight_hh[0] * weight_hh[1])


@contextmanager
def counting() -> Iterator[dict[nn.Module, int]]:
    """The FLOPs of every module that is called within, all its calls together, by PyTorch's counter. It knows PyTorch's ops, so those run:
    in place of pyops' kernels, and of the fused ones that PyTorch has for whole blocks."""
    found: dict[nn.Module, int] = {}
    started: list[int] = []
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent})

    def enter(*_: Any) -> None:
        started.append(counter.get_total_flops())

    def leave(module: nn.Module, *_: Any) -> None:
        found[module] = found.get(module, 0) + counter.get_total_flops() - started.pop()

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter, pyops.backend("eager"):
            yield found
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
