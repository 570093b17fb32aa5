"""Dynamic routing between capsules: agreement, softmax and weighted sum of an iteration in one pass over the predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _backends
from pyops.ops import _capsule_ops, _capsule_train, _conv_call, _fused_ops  # noqa: F401  (registers the op with gradients)

OP = "capsule_routing"
MOST_TRITON = 4096  # elements of an input's predictions in a tile, J and D as powers of two
MOST_OUTPUTS, MOST_ELEMENTS, MOST_TERMS = 256, 32, 16384  # csrc/capsule/routing.cu's threads, registers and shared memory


def capsule_routing(predictions: Tensor, num_iterations: int = 3, *, stop_gradient: bool = False, backend: str | None = None) -> Tensor:
    r"""The output capsules that the predictions of I input capsules agree on.

    With logits ``b = 0`` at first, an iteration is ``c = softmax(b)`` over the outputs, ``s_j = sum_i c_ij u_ij``,
    ``v_j = |s_j|^2 / (1 + |s_j|^2) * s_j / |s_j|`` (zero for zero), ``b_ij += u_ij . v_j``.

    Args:
        predictions: u, ``[N, I, J, D]``: what each of I input capsules predicts of J output capsules of D elements; float32, bfloat16,
            float16 or float64 (the last on "eager" only). Contiguous tensors and views of a contiguous ``[I, N, J, D]`` (what a product
            batched over the inputs gives) are read as they are, others copied.
        num_iterations: how many, 1 or more.
        stop_gradient: couplings c are constants of the gradient, as in the usual implementations of the paper: cheaper, and not what
            finite differences give. By default gradients flow through all iterations.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        v of the last iteration, ``[N, J, D]``, of predictions' dtype (autocast changes nothing). Saved for backward are the predictions
        and each iteration's s. The same call gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype or value, or a named backend that cannot run the call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", 2017.
    """
    _check(predictions, num_iterations, stop_gradient)
    device = predictions.device.type
    reasons = lambda name: _unsupported(predictions, num_iterations, name)  # noqa: E731
    name = _backends.select(OP, _backends.requested(backend), _conv_call.order(device, _conv_call.is_recorded()), reasons)
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, device, name)
    if name == "eager":
        if not _conv_call.is_autocast(device):
            return _eager(predictions, num_iterations, stop_gradient)
        with torch.autocast(device, enabled=False):
            return _eager(predictions, num_iterations, stop_gradient)
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if _conv_call.needs_grad(predictions):
        return kernels.capsule_fwd(predictions, num_iterations, stop_gradient)[0]
    return kernels.capsule_run(*_capsule_ops.laid_out(predictions), num_iterations)[0]


def _eager(u: Tensor, num_iterations: int, stop_gradient: bool) -> Tensor:
    votes = u.detach() if stop_gradient else u
    logits = u.new_zeros(u.shape[:3])
    for step in range(num_iterations):
        last = step == num_iterations - 1
        v = _capsule_ops.squash(torch.einsum("nij,nijd->njd", logits.softmax(2), u if last else votes))
        if not last:
            logits = logits + torch.einsum("nijd,njd->nij", votes, v)
    return v


def _unsupported(predictions: Tensor, num_iterations: int, backend: str) -> str | None:
    J, D = predictions.shape[2:]
    reason = _conv_call.unsupported(predictions.device.type, predictions.dtype, backend)
    if reason is None and backend == "triton" and _capsule_ops.padded(J) * _capsule_ops.padded(D) > MOST_TRITON:
        return f"J and D as powers of two multiply to {MOST_TRITON} at most, these {J} and {D} to more"
    if reason is None and backend == "cuda" and (J > MOST_OUTPUTS or D > MOST_ELEMENTS or J * (D + 1) * num_iterations > MOST_TERMS):
        most = f"J is {MOST_OUTPUTS} at most, D {MOST_ELEMENTS}, J * (D + 1) * num_iterations {MOST_TERMS}"
        return f"{most}, got {J}, {D} and {num_iterations} iterations"
    return reason


def _check(predictions, num_iterations, stop_gradient) -> None:
    _conv_call.check_tensor(OP, "predictions", predictions, optional=False)
    if predictions.dim() != 4:
        raise ValueError(f"{OP}: predictions: expected [N, I, J, D], got shape {tuple(predictions.shape)}")
    if 0 in predictions.shape[1:]:
        raise ValueError(f"{OP}: predictions: expected capsules on either side, of 1 element or more, got shape {tuple(predictions.shape)}")
    if predictions.dtype not in _conv_call.DTYPES:
        raise ValueError(f"{OP}: predictions: expected float32, bfloat16, float16 or float64, got {predictions.dtype}")
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int):
        raise TypeError(f"{OP}: num_iterations: expected an int, got {num_iterations!r}")
    if num_iterations < 1:
        raise ValueError(f"{OP}: num_iterations: expected 1 or more, got {num_iterations}")
    if not isinstance(stop_gradient, bool):
        raise TypeError(f"{OP}: stop_gradient: expected a bool, got {stop_gradient!r}")


def _explain(predictions, num_iterations=3, *, stop_gradient=False, backend=None):
    _check(predictions, num_iterations, stop_gradient)
    device = predictions.device.type
    facts = f"{device}, {str(predictions.dtype)[6:]}, shape {tuple(predictions.shape)}, {num_iterations} iterations"
    reasons = lambda name: _unsupported(predictions, num_iterations, name)  # noqa: E731
    return _backends.build_explanation(OP, facts, _backends.requested(backend), _conv_call.order(device), reasons)


_backends.EXPLAINERS[OP] = _explain
