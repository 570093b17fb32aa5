"""Torch ops that work on each channel of an image apart: what batch norm, squeeze-excitation and drop path are made of.

Names: input ``[N, C, H, W]`` in channels_last memory, P = H*W positions; every vector is float32 (float64 for float64).

    z = (input - mean) * scale + bias       affine [3, C]: mean, scale, bias; without it z = input
    u = z * keep + residual                 keep [N]: drop path's multipliers; residual like input
    a = activation(u)
    output = a * gate + offset              gate, offset [N, C]

    pyops::channel_moments  [2, C]: mean and sum of squared deviations from it, by Chan's merge
    pyops::channel_apply    output
    pyops::channel_sums     [N, C]: sum of a, or of a * grad, over positions
    pyops::channel_reduce   [2, C]: sums of dz and of dz * (input - mean), where dz is the gradient of z for an incoming
                            gradient of ``grad * gate + offset`` for a
    pyops::channel_grad     dz * scale - terms[0] - (input - mean) * terms[1], and the gradient of u (residual's) if asked for
    pyops::channel_grad_    the same, written over `grad`

And what lies between them, vectors alone, each one small call:

    pyops::channel_norm     moments -> norm [3, C]: mean, 1/std, 1/count; running statistics move towards the batch's by `factor`
    pyops::channel_affine   norm, weight, bias -> affine
    pyops::channel_terms    channel_reduce's sums -> (terms, weight's gradient, bias's gradient)

None is differentiable: `_fused_ops` composes differentiable ops of them. Sums are merged in a fixed order.
Source of the merge: Chan, Golub and LeVeque, 1979.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _activations


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the vectors that go with images of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def image_like(t: Tensor, *shape: int) -> Tensor:
    """An empty channels_last image of t's shape, or of another."""
    return torch.empty(shape or t.shape, dtype=t.dtype, device=t.device, memory_format=torch.channels_last)


def vector(like: Tensor, *shape: int) -> Tensor:
    """Empty, of the dtype that goes with images like `like`."""
    return like.new_empty(shape, dtype=vector_dtype(like.dtype))


def identity(like: Tensor) -> Tensor:
    """An affine that changes nothing; as `_fused_ops`' norm, constants of mean 0 and deviation 1."""
    zeros = torch.zeros(like.shape[1], dtype=vector_dtype(like.dtype), device=like.device)
    return torch.stack([zeros, torch.ones_like(zeros), zeros])


def _wide(image: Tensor) -> Tensor:
    return image.to(vector_dtype(image.dtype))


def _image(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.dtype).contiguous(memory_format=torch.channels_last)


def _by_channel(vector: Tensor) -> Tensor:
    return vector[None, :, None, None]


def _summed(input, affine, keep, residual) -> Tensor:
    """u"""
    u = _wide(input)
    if affine is not None:
        mean, scale, bias = (_by_channel(v) for v in affine)
        u = (u - mean) * scale + bias
    if keep is not None:
        u = u * keep[:, None, None, None]
    return u if residual is None else u + _wide(residual)


def _gated(value, gate, offset) -> Tensor:
    if gate is not None:
        value = value * gate[:, :, None, None]
    return value if offset is None else value + offset[:, :, None, None]


def _moments(input):
    wide = _wide(input)
    mean = wide.mean((0, 2, 3)) if input.numel() else wide.new_zeros(input.shape[1])
    return torch.stack([mean, (wide - _by_channel(mean)).square().sum((0, 2, 3))])


def _apply(input, affine, keep, residual, gate, offset, activation, slope):
    u = _summed(input, affine, keep, residual)
    return _image(_gated(_activations.apply(u, activation, slope), gate, offset), input).clone(memory_format=torch.channels_last)


def _sums(input, grad, affine, keep, residual, activation, slope):
    a = _activations.apply(_summed(input, affine, keep, residual), activation, slope)
    return (a if grad is None else a * _wide(grad)).sum((2, 3))


def _du(grad, input, affine, keep, residual, gate, offset, activation, slope) -> Tensor:
    u = _summed(input, affine, keep, residual)
    return _activations.apply_backward(_gated(_wide(grad), gate, offset), u, activation, slope)


def _kept(du, keep) -> Tensor:
    return du if keep is None else du * keep[:, None, None, None]


def _reduce(grad, input, affine, keep, residual, gate, offset, activation, slope):
    dz = _kept(_du(grad, input, affine, keep, residual, gate, offset, activation, slope), keep)
    return torch.stack([dz.sum((0, 2, 3)), (dz * (_wide(input) - _by_channel(affine[0]))).sum((0, 2, 3))])


def _grad(grad, input, affine, terms, keep, residual, gate, offset, activation, slope, needs_residual):
    du = _du(grad, input, affine, keep, residual, gate, offset, activation, slope)
    dx = _kept(du, keep)
    if affine is not None:
        dx = dx * _by_channel(affine[1])
    if terms is not None:
        dx = dx - _by_channel(terms[0]) - (_wide(input) - _by_channel(affine[0])) * _by_channel(terms[1])
    dresidual = _image(du, input).clone(memory_format=torch.channels_last) if needs_residual else input.new_empty(0)
    return _image(dx, input).clone(memory_format=torch.channels_last), dresidual


def _grad_(grad, input, affine, terms, keep, residual, gate, offset, activation, slope):
    grad.copy_(_grad(grad, input, affine, terms, keep, residual, gate, offset, activation, slope, False)[0])


def _norm(moments, count, eps, running_mean, running_var, factor):
    mean, squares = moments
    if running_mean is not None:
        for kept, new in ((running_mean, mean), (running_var, squares / (count - 1))):
            kept.copy_(kept + (new - kept) * factor)
    inverse = torch.full_like(mean, 1.0 / count if count else 0.0)
    return torch.stack([mean, torch.rsqrt(squares * inverse + eps), inverse])


def _affine(norm, weight, bias):
    mean, scale, _ = norm
    scale = scale if weight is None else scale * weight
    return torch.stack([mean, scale, torch.zeros_like(mean) if bias is None else bias.to(mean.dtype)])


def _terms(sums, norm, affine):
    shares = sums * (affine[1] * norm[2])
    return torch.stack([shares[0], shares[1] * norm[1].square()]), sums[1] * norm[1], sums[0].clone()


_PLACE = "Tensor? affine, Tensor? keep, Tensor? residual"
_GRADIENT = "Tensor? keep, Tensor? residual, Tensor? gate, Tensor? offset, int activation, float slope"
_OVERLOADS = ("", "triton")
_library.define(
    "channel_moments", "(Tensor input) -> Tensor", fake=lambda x: vector(x, 2, x.shape[1]), reference=_moments, overloads=_OVERLOADS
)
_library.define(
    "channel_apply",
    f"(Tensor input, {_PLACE}, Tensor? gate, Tensor? offset, int activation, float slope) -> Tensor",
    fake=lambda input, *_: image_like(input),
    reference=_apply,
    overloads=_OVERLOADS,
)
_library.define(
    "channel_sums",
    f"(Tensor input, Tensor? grad, {_PLACE}, int activation, float slope) -> Tensor",
    fake=lambda input, *_: vector(input, *input.shape[:2]),
    reference=_sums,
    overloads=_OVERLOADS,
)
_library.define(
    "channel_reduce",
    f"(Tensor grad, Tensor input, Tensor affine, {_GRADIENT}) -> Tensor",
    fake=lambda grad, input, *_: vector(input, 2, input.shape[1]),
    reference=_reduce,
    overloads=_OVERLOADS,
)
_library.define(
    "channel_grad",
    f"(Tensor grad, Tensor input, Tensor? affine, Tensor? terms, {_GRADIENT}, bool needs_residual) -> (Tensor, Tensor)",
    fake=lambda grad, input, *options: (image_like(input), image_like(input) if options[-1] else input.new_empty(0)),
    reference=_grad,
    overloads=_OVERLOADS,
)
_library.define(
    "channel_grad_",
    f"(Tensor(a!) grad, Tensor input, Tensor? affine, Tensor? terms, {_GRADIENT}) -> ()",
    fake=lambda *_: None,
    reference=_grad_,
    overloads=_OVERLOADS,
)
_library.define(
    "channel_norm",
    "(Tensor moments, float count, float eps, Tensor(a!)? running_mean, Tensor(b!)? running_var, float factor) -> Tensor",
    fake=lambda moments, *_: moments.new_empty((3, moments.shape[1])),
    reference=_norm,
)
_library.define(
    "channel_affine",
    "(Tensor norm, Tensor? weight, Tensor? bias) -> Tensor",
    fake=lambda norm, *_: torch.empty_like(norm),
    reference=_affine,
)
_library.define(
    "channel_terms",
    "(Tensor sums, Tensor norm, Tensor affine) -> (Tensor, Tensor, Tensor)",
    fake=lambda sums, *_: (torch.empty_like(sums), torch.empty_like(sums[0]), torch.empty_like(sums[0])),
    reference=_terms,
)


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import channel  # imports triton, so only at first use

        return getattr(channel, name)(*args)

    return call


for _name, _function in (
    ("moments", "moments"),
    ("apply", "apply"),
    ("sums", "sums"),
    ("reduce", "reduce"),
    ("grad", "grad"),
    ("grad_", "grad_"),
):
    _library.implement(f"channel_{_name}.triton", _triton(_function), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
