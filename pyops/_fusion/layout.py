"""Images in channels_last inside a fused network, whatever its caller's layout: what its kernels read, and PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from pyops.ops import _conv_call

LAST, FIRST = torch.channels_last, torch.contiguous_format


def _is_image(value: Any, layout: torch.memory_format) -> bool:
    return type(value) is Tensor and value.dim() == 4 and value.is_floating_point() and value.is_contiguous(memory_format=layout)


class ImageRoot(nn.Module):
    """Of the module that was fused: images that come in are laid out channels_last, those that go out as the first image came in.

    Code that cannot read such images makes itself known by an error, as `Tensor.view` does where `rewrite` has not seen it: the network
    then goes back to the layout it was given. A call keeps what it needs to begin anew: the buffers, which batch norm moves, and the random
    numbers' state.
    """

    def _run_laid_out(self, plain: Callable, /, *args: Any, **kwargs: Any) -> Any:
        leaves: Any = [*args, *kwargs.values()]
        given = any(_is_image(value, FIRST) and not _is_image(value, LAST) for value in leaves)
        if not given or not self.__dict__.get("_lays_out", True) or torch.compiler.is_compiling() or _conv_call.is_followed():
            return plain(*args, **kwargs)
        before = self._snapshot()
        try:
            output = plain(*(_lay_out(value) for value in args), **{name: _lay_out(value) for name, value in kwargs.items()})
        except RuntimeError as error:
            if "stride" not in str(error):
                raise
            self.__dict__["_lays_out"] = False
            self._go_back(*before)
            return plain(*args, **kwargs)
        return tree_map(lambda value: value.contiguous() if _is_image(value, LAST) else value, output)

    def _snapshot(self) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()] if self.training else []
        return buffers, torch.get_rng_state()

    def _go_back(self, buffers: list[tuple[Tensor, Tensor]], generator: Tensor) -> None:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(generator)


def rooted(forward: Callable) -> Callable:
    """The forward of an `ImageRoot`, with the signature of its own."""

    @wraps(forward)
    def run(self, *args, **kwargs):
        return self._run_laid_out(partial(forward, self), *args, **kwargs)

    return run


def _lay_out(value: Any) -> Any:
    return value.contiguous(memory_format=LAST) if _is_image(value, FIRST) else value
