"""Routing between capsules as a differentiable torch op, composed of `_capsule_ops`.

    pyops::capsule_fwd  predictions [N, I, J, D] in any layout -> (v [N, J, D], sums [N, T, J, D], which carry no gradient)

Saved are the predictions and the sums: backward computes couplings again.
"""

from __future__ import annotations

import torch

from pyops.ops import _capsule_ops, _fused_ops


def _forward(k, predictions, num_iterations, stop_gradient):
    return k.capsule_run(*_capsule_ops.laid_out(predictions), num_iterations)


def _backward(k, grad, predictions, sums, stop_gradient):
    votes, by_input = _capsule_ops.laid_out(predictions)
    found = k.capsule_grad(grad.contiguous(), votes, by_input, sums, stop_gradient)
    return found.transpose(0, 1) if by_input else found


def _fake(predictions, num_iterations, stop_gradient):
    return _capsule_ops.fake_run(*_capsule_ops.laid_out(predictions), num_iterations)


def _fake_backward(grad, predictions, sums, stop_gradient):
    votes, by_input = _capsule_ops.laid_out(predictions)
    found = torch.empty_like(votes)
    return found.transpose(0, 1) if by_input else found


def _save(ctx, inputs, output):
    ctx.stop_gradient = inputs[2]
    ctx.save_for_backward(inputs[0], output[1])


def _autograd(ctx, op, grad, _):
    _fused_ops.refuse_second_order()
    return op(grad, *ctx.saved_tensors, ctx.stop_gradient), None, None


_fused_ops.define(
    "capsule", "(Tensor predictions, int num_iterations, bool stop_gradient)", "(Tensor, Tensor)", _fake, _forward, _save, _autograd,
    ("(Tensor grad, Tensor predictions, Tensor sums, bool stop_gradient) -> Tensor", _fake_backward, _backward),
)  # fmt: skip
