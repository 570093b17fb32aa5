"""Torch ops of sampling from a normal distribution with a diagonal covariance: mean, log_var [N, D], z = mean + exp(log_var / 2) * eps.

    pyops::gaussian_run    (z; [N]: each row's sum of (mean^2 + exp(log_var) - 1 - log_var) / 2, its divergence from the standard normal)
    pyops::gaussian_grad   the gradients of mean and of log_var; grad [N, D] of z or None, grad_kl [N] or None

eps are `_philox`'s normal numbers of the seed, int64 [1] on mean's device, drawn anew in backward. Rows may be apart in memory; results are
contiguous. kl and its gradient are float32 (float64 for float64), as is all arithmetic. Neither is differentiable.

Source: Kingma and Welling, 2014.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops, _philox


def sample(mean: Tensor, log_var: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """As pyops::gaussian_run; of PyTorch's ops, which have gradients."""
    kind = _channel_ops.vector_dtype(mean.dtype)
    m, v = mean.to(kind), log_var.to(kind)
    z = m + (v / 2).exp() * _philox.normal(seed, m.shape[0], m.shape[1], kind)
    return z.to(mean.dtype), (m.square() + (v.expm1() - v)).sum(1) / 2


def _run(mean, log_var, seed):
    z, kl = sample(mean, log_var, seed)
    return z.contiguous(), kl


def _grad(mean, log_var, seed, grad, grad_kl):
    kind = _channel_ops.vector_dtype(mean.dtype)
    m, v = mean.to(kind), log_var.to(kind)
    grads = torch.zeros_like(m), torch.zeros_like(m)
    if grad is not None:
        g = grad.to(kind)
        grads = g, g * (v / 2).exp() * _philox.normal(seed, m.shape[0], m.shape[1], kind) / 2
    if grad_kl is not None:
        share = grad_kl[:, None].to(kind)
        grads = grads[0] + share * m, grads[1] + share * v.expm1() / 2
    return tuple(g.to(mean.dtype, copy=True, memory_format=torch.contiguous_format) for g in grads)


def _fake(mean, *_):
    return torch.empty_like(mean, memory_format=torch.contiguous_format), _channel_ops.vector(mean, mean.shape[0])


def _fake_grad(mean, *_):
    return tuple(torch.empty_like(mean, memory_format=torch.contiguous_format) for _ in range(2))


_library.define(
    "gaussian_run",
    "(Tensor mean, Tensor log_var, Tensor seed) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_run,
    overloads=("", "triton"),
)
_library.define(
    "gaussian_grad",
    "(Tensor mean, Tensor log_var, Tensor seed, Tensor? grad, Tensor? grad_kl) -> (Tensor, Tensor)",
    fake=_fake_grad,
    reference=_grad,
    overloads=("", "triton"),
)


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import gaussian  # imports triton, so only at first use

        return getattr(gaussian, name)(*args)

    return call


for _name in ("gaussian_run", "gaussian_grad"):
    _library.implement(f"{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
