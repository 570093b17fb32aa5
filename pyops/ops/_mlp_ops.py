"""The torch ops of the fused MLP: two linear layers whose hidden rows never reach memory.

pyops::mlp_pack   weights [H, C] and [O, H] and float32 biases, into one opaque tensor for this machine; on a CPU float32 or bfloat16
                  weights, on a GPU weights of the rows' dtype
pyops::mlp_infer  second @ activation(first @ x + first_bias) + second_bias + residual for rows [M, C], where with `norm` x is the row
                  less its mean over its deviation (a LayerNorm whose affine is in the first layer); not differentiable

On a GPU a row of inputs and one of outputs stay in registers, so that there are at most `MOST` of either; float32 is multiplied as TF32.
"""

from __future__ import annotations

import torch

from pyops import _library

MOST = 192  # inputs and outputs on a GPU: kMlpMost of csrc/linear/mlp_cuda.h

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


def cuda_takes(inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether the GPU's kernel computes such an MLP, in the precision that torch's switch asks of linear layers."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return False
    return dtype in (torch.float32, torch.bfloat16, torch.float16) and 1 <= inputs <= MOST and 1 <= outputs <= MOST
