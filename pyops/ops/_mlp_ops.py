"""The torch ops of the fused MLP on a CPU: two linear layers whose hidden rows never reach memory.

pyops::mlp_pack   weights [H, C] and [O, H] in float32 or bfloat16 and float32 biases, into one opaque tensor for this machine
pyops::mlp_infer  second @ activation(first @ x + first_bias) + second_bias + residual for rows [M, C], where with `norm` x is the row
                  less its mean over its deviation (a LayerNorm whose affine is in the first layer); not differentiable
"""

from __future__ import annotations

import torch

from pyops import _library

_library.define(
    "mlp_pack",
    "(Tensor first, Tensor first_bias, Tensor second, Tensor second_bias) -> Tensor",
    fake=lambda first, first_bias, *_: first_bias.new_empty(torch.library.get_ctx().new_dynamic_size()),
)
_library.define(
    "mlp_infer",
    "(Tensor input, Tensor packed, Tensor? residual, int hidden, int outputs, bool norm, float eps, int activation, float slope) -> Tensor",
    fake=lambda input, packed, residual, hidden, outputs, *_: input.new_empty(input.shape[0], outputs),
)
