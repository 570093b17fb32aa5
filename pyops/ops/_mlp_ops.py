"""The torch ops of the fused MLP: two linear layers whose hidden rows never reach memory.

pyops::mlp_pack   weights [H, C] and [O, H] and float32 biases, into one opaque tensor for this machine; on a CPU float32 or bfloat16
                  weights, on a GPU weights of the rows' dtype
pyops::mlp_infer  second @ activation(first @ x + first_bias) + second_bias + residual for rows [M, C], where with `norm` x is the row
                  less its mean over its deviation (a LayerNorm whose affine is in the first layer); not differentiable
pyops::mlp_run    the same of the weights themselves, in input's dtype with float32 biases (float64 for float64); not differentiable

On a GPU a row of inputs and one of outputs stay in registers, so that there are at most `MOST` of either; float32 is multiplied as TF32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops import _library
from pyops.ops import _activations

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


def _run(input, first, first_bias, second, second_bias, residual, norm, eps, activation, slope):
    _check(input, first, first_bias, second, second_bias, residual)
    kind = torch.promote_types(input.dtype, torch.float32)
    x = input.to(kind)
    x = F.layer_norm(x, x.shape[1:], None, None, eps) if norm else x
    hidden = _activations.apply(F.linear(x, first.to(kind), first_bias), activation, slope)
    y = F.linear(hidden, second.to(kind), second_bias)
    return (y if residual is None else y + residual).to(input.dtype)


def _check(input: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor, residual: Tensor | None) -> None:
    if [t.dim() for t in (input, first, second)] != [2, 2, 2]:
        raise ValueError("mlp_run: input, first, second: expected [M, C], [H, C] and [O, H]")
    (M, C), H, O = input.shape, first.shape[0], second.shape[0]
    shapes = {"first": (first, (H, C)), "first_bias": (first_bias, (H,)), "second": (second, (O, H)), "second_bias": (second_bias, (O,))}
    for name, (given, shape) in (shapes | ({} if residual is None else {"residual": (residual, (M, O))})).items():
        dtype = torch.promote_types(input.dtype, torch.float32) if name.endswith("bias") else input.dtype
        if tuple(given.shape) != shape or given.dtype != dtype:
            raise ValueError(f"mlp_run: {name}: expected {shape} of {dtype}, got {tuple(given.shape)} of {given.dtype}")


_library.define(
    "mlp_run",
    "(Tensor input, Tensor first, Tensor first_bias, Tensor second, Tensor second_bias, Tensor? residual, bool norm, float eps, "
    "int activation, float slope) -> Tensor",
    fake=lambda input, first, first_bias, second, *_: input.new_empty(input.shape[0], second.shape[0]),
    reference=_run,
    overloads=("", "triton"),
)


def _triton_run(input, first, first_bias, second, second_bias, residual, *options):
    from pyops.triton_kernels import mlp  # imports triton, so only at first use

    _check(input, first, first_bias, second, second_bias, residual)
    return mlp.run(input, first, first_bias, second, second_bias, residual, *options)


_library.implement("mlp_run.triton", _triton_run, "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1


def unsupported_by_triton(C: int, O: int) -> str | None:
    """None when mlp_run.triton takes rows of C inputs and O outputs, else why not."""
    from pyops.triton_kernels import mlp

    return mlp.unsupported(C, O)
