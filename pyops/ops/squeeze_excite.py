"""Squeeze-and-excitation: channels scaled by gates that come from their means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyops import _backends
from pyops.ops import _activations, _channel_ops, _conv_call, _fused_ops

OP = "squeeze_excite"


def squeeze_excite(
    input: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    *,
    means: Tensor | None = None,
    activation: str = "relu",
    gate_activation: str = "sigmoid",
    backend: str | None = None,
) -> Tensor:
    r"""``input * gate_activation(fc2(activation(fc1(mean over positions of input))))``.

    Args:
        input: ``[N, C, H, W]``; float32, bfloat16, float16 or float64 (the last on "eager" only). channels_last is the fast layout;
            any other is copied to it, and the output comes back in input's.
        fc1_weight, fc1_bias: ``[S, C]`` or ``[S, C, 1, 1]``, and ``[S]``; any floating dtype.
        fc2_weight, fc2_bias: ``[C, S]`` or ``[C, S, 1, 1]``, and ``[C]``.
        means: ``[N, C]``, the means of input where a producer has taken them already (`depthwise_conv_bn_act` with
            return_means); saves a pass over input. Gradients flow into them.
        activation, gate_activation: names as in `batch_norm_act`.
        backend: "cpu", "cuda", "triton" or "eager"; None lets pyops choose.

    Returns:
        output of input's shape and dtype: two passes over input, three in backward. Means and gates are computed in float32.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run it.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Hu et al., 2018.
    """
    _check(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, means)
    numbers = _activations.number(OP, activation), _activations.number(OP, gate_activation, "gate_activation")
    name = _conv_call.choose(OP, backend, input, _eager_first(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, means))
    layers: list[Any] = [
        _conv_call.as_vector(t.flatten(1) if t.dim() == 4 else t, input) for t in (fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    ]
    means = _conv_call.as_vector(means, input)
    if name == "eager":
        found = input.mean((2, 3), dtype=_channel_ops.vector_dtype(input.dtype)) if means is None else means
        gate = _fused_ops.Squeeze._make([*layers, *numbers]).run(found)[2]
        return input * gate.to(input.dtype)[:, :, None, None]
    output, _ = _fused_ops.KERNELS[_conv_call.overload(name)].squeeze_excite_fwd(input, *layers, means, *numbers)
    return _conv_call.in_layout_of(output, input)


def _eager_first(input: Tensor, *others: Tensor | None) -> bool:
    """0.65 to 0.95 of PyTorch's speed in inference; 0.9 in training of 6*10^4 values, 1.1 to 3.8 above (2 cores of Zen 4)."""
    return not _conv_call.needs_grad(input, *others) or input.numel() < 10**5


def _check(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, means) -> None:
    _conv_call.check_input(OP, input)
    N, C = input.shape[:2]
    S = fc1_weight.shape[0] if isinstance(fc1_weight, Tensor) and fc1_weight.dim() else 0
    for name, t, shape in (("fc1_weight", fc1_weight, (S, C)), ("fc2_weight", fc2_weight, (C, S))):
        _conv_call.check_tensor(OP, name, t, input, shape if isinstance(t, Tensor) and t.dim() == 2 else (*shape, 1, 1), optional=False)
    _conv_call.check_tensor(OP, "fc1_bias", fc1_bias, input, (S,), optional=False)
    _conv_call.check_tensor(OP, "fc2_bias", fc2_bias, input, (C,), optional=False)
    _conv_call.check_tensor(OP, "means", means, input, (N, C))


def _means(k, input) -> Tensor:
    return k.channel_sums(input, None, None, None, None, 0, 0.0) / _fused_ops.positions(input)


def _forward(k, input, fc1, bias1, fc2, bias2, means, activation, gate_activation):
    means = means.clone() if means is not None else _means(k, input)
    gate = _fused_ops.Squeeze(fc1, bias1, fc2, bias2, activation, gate_activation).run(means)[2]
    return k.channel_apply(input, None, None, None, gate, None, 0, 0.0), means


def _backward(k, grad, input, fc1, bias1, fc2, bias2, means, activation, gate_activation, means_given):
    squeeze = _fused_ops.Squeeze(fc1, bias1, fc2, bias2, activation, gate_activation)
    gate = squeeze.run(means)[2]
    grad_means, *layers = squeeze.backward(k.channel_sums(input, grad, None, None, None, 0, 0.0), means)
    offset = None if means_given else grad_means / _fused_ops.positions(input)
    return k.channel_apply(grad, None, None, None, gate, offset, 0, 0.0), *layers, grad_means


def _fake(input, *_):
    return _channel_ops.image_like(input), _channel_ops.vector(input, *input.shape[:2])


def _fake_backward(grad, input, fc1, bias1, fc2, bias2, means, *_):
    return _channel_ops.image_like(input), *(torch.empty_like(t) for t in (fc1, bias1, fc2, bias2, means))


def _setup_context(ctx, inputs, output):
    ctx.options = (*inputs[6:], inputs[5] is not None)
    ctx.save_for_backward(*inputs[:5], output[1])


def _autograd(ctx, op, grad, _):
    _fused_ops.refuse_second_order()
    return *_fused_ops.wanted(ctx, op(grad, *ctx.saved_tensors, *ctx.options)), None, None


_LAYERS = "Tensor input, Tensor fc1, Tensor bias1, Tensor fc2, Tensor bias2"
_fused_ops.define(
    "squeeze_excite", f"({_LAYERS}, Tensor? means, int activation, int gate_activation)", "(Tensor, Tensor)",
    _fake, _forward, _setup_context, _autograd,
    (
        f"(Tensor grad, {_LAYERS}, Tensor means, int activation, int gate_activation, bool means_given) -> ({', '.join(['Tensor'] * 6)})",
        _fake_backward, _backward,
    ),
)  # fmt: skip


def _explain(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, *, backend=None, **_):
    _check(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias, None)
    facts = f"{input.device.type}, {str(input.dtype)[6:]}, shape {tuple(input.shape)}, S={fc1_weight.shape[0]}"
    eager_first = _eager_first(input, fc1_weight, fc1_bias, fc2_weight, fc2_bias)
    return _conv_call.explain(OP, facts, backend, input, eager_first)


_backends.EXPLAINERS[OP] = _explain
