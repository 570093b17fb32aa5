"""A sample of a normal distribution by its mean and log-variance, and its divergence from the standard normal: what a VAE does between
its encoder and its decoder, in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from pyops import _backends
from pyops.ops import _conv_call, _fused_ops, _philox, _sampling_ops

OP = "gaussian_sample"


def gaussian_sample(
    mean: Tensor,
    log_var: Tensor,
    *,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""``z = mean + exp(log_var / 2) * eps`` with normal eps, and that distribution's divergence (Kullback-Leibler) from the standard one.

    Args:
        mean, log_var: ``[N, *]`` of one shape and dtype: float32, bfloat16, float16 or float64 (the last on "eager" only). Rows that are
            apart in memory, as those of ``t.chunk(2, dim=1)``, are read as they are; other strides are copied.
        generator: what the seed is drawn from, on any device; None: PyTorch's own for mean's device. Not together with `seed`, and not
            under `torch.compile`.
        seed: of eps, an int or an int64 tensor ``[1]``. The same seed gives the same eps on every backend, in forward and in backward
            (Philox4x32-7 by position, and Box-Muller's transform; `pyops.ops._philox`).
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        z: of mean's shape and dtype, contiguous.
        kl: ``[N]`` float32 (float64 for float64), ``-1/2 * sum(1 + log_var - mean^2 - exp(log_var))`` over all but the first dimension.
        Both are differentiable in mean and log_var, which are saved for backward together with the seed: eps is drawn anew. The same call
        with the same seed gives the same bits.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run the
            call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014.
    """
    _check(mean, log_var, generator, seed)
    name = _choose(backend, mean)
    given = _philox.as_seed(OP, seed, mean)
    number = _philox.drawn(mean, generator) if given is None else given
    m, v = (t.flatten(1) if t.dim() > 1 else t[:, None] for t in (mean, log_var))
    if name == "eager":
        z, kl = _sampling_ops.sample(m, v, number)
    else:
        kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
        live = torch.compiler.is_compiling() or _conv_call.needs_grad(mean, log_var)
        z, kl = (kernels.gaussian_fwd if live else kernels.gaussian_run)(m, v, number)
    return z.view(mean.shape), kl


def _forward(k, mean, log_var, seed):
    return k.gaussian_run(mean, log_var, seed)


def _backward(k, mean, log_var, seed, grad, grad_kl):
    return k.gaussian_grad(mean, log_var, seed, grad, grad_kl)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _autograd(ctx, op, grad, grad_kl):
    _fused_ops.refuse_second_order()
    if grad is None and grad_kl is None:
        return None, None, None
    grads = op(*ctx.saved_tensors, grad, grad_kl)
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[:2], strict=True)), None


_fused_ops.define(
    "gaussian", "(Tensor mean, Tensor log_var, Tensor seed)", "(Tensor, Tensor)", _sampling_ops._fake, _forward, _save, _autograd,
    (
        "(Tensor mean, Tensor log_var, Tensor seed, Tensor? grad, Tensor? grad_kl) -> (Tensor, Tensor)",
        _sampling_ops._fake_grad, _backward,
    ),
    differentiable=2,
)  # fmt: skip

# Nothing of ours has been measured on a GPU yet; PyTorch's ops need some two hundred launches to draw these numbers, a kernel one.
ORDER = {"cpu": ("cpu", "eager"), "cuda": ("cuda", "triton", "eager")}


def _order(device: str) -> tuple[str, ...]:
    return ("eager",) if _conv_call.is_recorded() else ORDER.get(device, ("eager",))


def _choose(backend: str | None, mean: Tensor) -> str:
    device = mean.device.type
    reasons = lambda name: _conv_call.unsupported(device, mean.dtype, name)  # noqa: E731
    name = _backends.select(OP, _backends.requested(backend), _order(device), reasons)
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, device, name)
    return name


def _check(mean, log_var, generator, seed) -> None:
    _conv_call.check_tensor(OP, "mean", mean, optional=False)
    if mean.dim() < 1 or mean.dtype not in _conv_call.DTYPES:
        wanted = "[N, ...] of float32, bfloat16, float16 or float64"
        raise ValueError(f"{OP}: mean: expected {wanted}, got {mean.dtype} of shape {tuple(mean.shape)}")
    _conv_call.check_tensor(OP, "log_var", log_var, shape=tuple(mean.shape), optional=False)
    for what, expected, found in (("dtype", mean.dtype, log_var.dtype), ("device", mean.device, log_var.device)):
        if found != expected:
            raise ValueError(f"{OP}: log_var: expected mean's {what} {expected}, got {found}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{OP}: generator: expected a torch.Generator or None, got {type(generator).__name__}")
    if generator is not None and seed is not None:
        raise ValueError(f"{OP}: generator: expected None together with a seed, got both")
    _philox.check_seed(OP, seed, mean)


def _explain(mean, log_var, *, generator=None, seed=None, backend=None):
    _check(mean, log_var, generator, seed)
    device = mean.device.type
    facts = f"{device}, {str(mean.dtype)[6:]}, shape {tuple(mean.shape)}"
    reasons = lambda name: _conv_call.unsupported(device, mean.dtype, name)  # noqa: E731
    return _backends.build_explanation(OP, facts, _backends.requested(backend), _order(device), reasons)


_backends.EXPLAINERS[OP] = _explain
