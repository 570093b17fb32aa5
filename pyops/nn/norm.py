"""Norms over the channels of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyops.ops.layer_norm_2d import layer_norm_2d
from pyops.ops.local_response_norm import check_options, local_response_norm


class LocalResponseNorm(nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm`, with the ReLU before it if asked for: ``[N, C, *] -> [N, C, *]``.

    Raises TypeError or ValueError for an option of the wrong kind or value.
    """

    def __init__(
        self, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, activation: str = "none", backend: str | None = None
    ):
        check_options("LocalResponseNorm", size, alpha, beta, k, activation)
        super().__init__(size, alpha, beta, k)
        self.activation, self.backend = activation, backend

    def forward(self, input: Tensor) -> Tensor:
        options: dict = dict(activation=self.activation, backend=self.backend)
        return local_response_norm(input, self.size, self.alpha, self.beta, self.k, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation}")


class LayerNorm2d(nn.Module):
    """LayerNorm over the channels at each position, without permuting the image: ``[N, C, H, W] -> [N, C, H, W]``.

    Parameters ``weight`` and ``bias`` are those of torchvision's LayerNorm2d, `torch.nn.LayerNorm`'s under two permutations.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, num_channels: int, eps: float = 1e-6, elementwise_affine: bool = True, backend: str | None = None, device=None, dtype=None
    ):
        super().__init__()
        if isinstance(num_channels, bool) or not isinstance(num_channels, int):
            raise TypeError(f"LayerNorm2d: num_channels: expected an int, got {num_channels!r}")
        if num_channels < 1:
            raise ValueError(f"LayerNorm2d: num_channels: expected 1 or more, got {num_channels}")
        self.num_channels, self.eps, self.elementwise_affine, self.backend = num_channels, eps, elementwise_affine, backend
        for name in ("weight", "bias"):
            self.register_parameter(
                name, nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if elementwise_affine else None
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        return layer_norm_2d(input, self.weight, self.bias, self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
