"""Torch ops of routing between capsules: N samples, I input capsules that predict J output capsules of D elements, T iterations.

    pyops::capsule_run   predictions -> (v [N, J, D], sums [N, T, J, D]: s of each iteration)
    pyops::capsule_grad  the predictions' gradient, from v's, from them and from the sums

    iteration t: c_ij = softmax over j of u_ij . V_j,  V = v_0 + .. + v_(t-1),  s_j = sum over i of c_ij u_ij,  v_j = squash(s_j)

The logits are the predictions' products with all earlier v together, so none are kept. Predictions are contiguous, ``[N, I, J, D]`` or
with `by_input` ``[I, N, J, D]``, and so is their gradient; sums are float32 (float64 for float64). Neither is differentiable;
pyops::capsule_fwd, of predictions ``[N, I, J, D]`` in any layout, is.

Source: Sabour et al., 2017.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _library
from pyops.ops import _channel_ops


def squash(s: Tensor) -> Tensor:
    """``|s|^2 / (1 + |s|^2) * s / |s|`` of the vectors along the last dimension: length below 1; zero for zero, and so its gradient."""
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    return s * (length / (1 + length.square()))


def padded(size: int) -> int:
    """The power of two that holds it."""
    return 1 << (size - 1).bit_length()


def laid_out(predictions: Tensor) -> tuple[Tensor, bool]:
    """(contiguous predictions, by_input): a view, but for other strides than the kernels'."""
    by_input = not predictions.is_contiguous() and predictions.transpose(0, 1).is_contiguous()
    return (predictions.transpose(0, 1) if by_input else predictions.contiguous()), by_input


def _votes(predictions: Tensor, by_input: bool) -> Tensor:
    """Wide, samples first."""
    wide = _channel_ops._wide(predictions)
    return wide.transpose(0, 1) if by_input else wide


def _couplings(u: Tensor, earlier: Tensor) -> Tensor:
    """Of the sum of earlier v [N, J, D].  # [N, I, J]"""
    return torch.einsum("nijd,njd->nij", u, earlier).softmax(2)


def _run(predictions, by_input, num_iterations):
    u = _votes(predictions, by_input)
    earlier, sums = u.new_zeros(u.shape[0], *u.shape[2:]), []
    for _ in range(num_iterations):
        sums.append(torch.einsum("nij,nijd->njd", _couplings(u, earlier), u))
        v = squash(sums[-1])
        earlier = earlier + v
    return v.to(predictions.dtype), torch.stack(sums, 1)


def _squash_grad(s: Tensor, grad: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    below = 1 + length.square()
    unit = torch.where(length > 0, s / length, 0)
    return length / below * grad + (1 - length.square()) / below.square() * (s * grad).sum(-1, keepdim=True) * unit


def _grad(grad, predictions, by_input, sums, stop_gradient):
    u, T = _votes(predictions, by_input), sums.shape[1]
    v = squash(sums)
    earlier = v.cumsum(1) - v
    grad_v, found = _channel_ops._wide(grad), torch.zeros_like(u)
    for t in reversed(range(T)):
        c, grad_s = _couplings(u, earlier[:, t]), _squash_grad(sums[:, t], grad_v)
        found += c[..., None] * grad_s[:, None]
        if stop_gradient or t == 0:
            break
        share = torch.einsum("nijd,njd->nij", u, grad_s)
        grad_logits = c * (share - (c * share).sum(2, keepdim=True))
        found += grad_logits[..., None] * earlier[:, t, None]
        change = torch.einsum("nij,nijd->njd", grad_logits, u)
        grad_v = change if t == T - 1 else grad_v + change  # the same of all earlier v: each is in every later V
    return (found.transpose(0, 1) if by_input else found).to(predictions.dtype).contiguous()


def fake_run(predictions, by_input, num_iterations):
    first, second, *capsule = predictions.shape
    N = second if by_input else first
    return predictions.new_empty(N, *capsule), _channel_ops.vector(predictions, N, num_iterations, *capsule)


_OVERLOADS = ("", "triton")
_library.define(
    "capsule_run",
    "(Tensor predictions, bool by_input, int num_iterations) -> (Tensor, Tensor)",
    fake=fake_run, reference=_run, overloads=_OVERLOADS,
)  # fmt: skip
_library.define(
    "capsule_grad",
    "(Tensor grad, Tensor predictions, bool by_input, Tensor sums, bool stop_gradient) -> Tensor",
    fake=lambda grad, predictions, *_: torch.empty_like(predictions),
    reference=_grad, overloads=_OVERLOADS,
)  # fmt: skip


def _triton(name: str):
    def call(*args):
        from pyops.triton_kernels import capsule_routing  # imports triton, so only at first use

        return getattr(capsule_routing, name)(*args)

    return call


for _name in ("capsule_run", "capsule_grad"):
    _library.implement(f"{_name}.triton", _triton(_name), "CUDA", "CPU")  # on the CPU under TRITON_INTERPRET=1
