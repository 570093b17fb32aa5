"""Samples of the linear layer with residual and activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyops.nn.linear import LinearAct
from pyops.ops._activations import NAMES, REFERENCE
from pyops.ops.linear_act import linear_act
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register


def arguments(rows, K, N, dtype, device, seed=0, *, bias=True, residual=False, transposed=False, **options):
    """(input, weight, bias) and keyword arguments, rounded to dtype from the same float64 values. rows: the leading dimensions."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * N + K)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    x, weight, b = rand(*rows, K), rand(N, K, scale=K**-0.5), rand(N)
    if transposed:
        x, weight = x.transpose(-1, 0).contiguous().transpose(-1, 0), weight.t().contiguous().t()
    kwargs = dict(options) | (dict(residual=rand(*rows, N)) if residual else {})
    return (x, weight, b if bias else None), kwargs


def _sample(id: str, rows: tuple[int, ...], K: int, N: int, *, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: arguments(rows, K, N, dtype, device, seed, **options), bench, not bench)


# rows, inputs, outputs: single rows, a GRU's gates, ViT-B's attention and MLP, a square, ConvNeXt's MLP
LAYERS = (
    (1, 256, 1024),
    (1, 4096, 4096),
    (4, 768, 3072),
    (64, 512, 2048),
    (197, 768, 2304),
    (197, 768, 3072),
    (1024, 1024, 1024),
    (3136, 96, 384),
)
SAMPLES = (
    _sample("plain", (3,), 20, 17),
    _sample("odd", (3, 5), 37, 13, activation="silu"),
    _sample("wide", (2, 9), 120, 130, activation="gelu"),
    _sample("one_row", (1,), 130, 70, activation="relu"),
    _sample("two_rows", (2,), 61, 9, activation="gelu", residual=True),
    _sample("three_rows", (3, 1), 64, 16),
    _sample("four_rows", (2, 2), 33, 8, activation="tanh"),
    _sample("vector", (), 40, 20, activation="sigmoid"),
    _sample("no_bias", (6,), 20, 17, bias=False, activation="leaky_relu", negative_slope=0.2),
    _sample("residual", (6,), 20, 17, residual=True, activation="relu"),
    _sample("residual_none", (2, 3), 20, 17, residual=True),
    _sample("transposed", (6, 5), 20, 17, transposed=True),
    _sample("one_output", (7,), 20, 1),
    _sample("one_input", (7,), 1, 20),
    _sample("no_rows", (0,), 20, 17),
    *(_sample(f"act_{name}", (3, 4), 20, 16, activation=name) for name in NAMES),
    *(_sample(f"{M}x{K}x{N}", (M,), K, N, bench=True, activation="relu") for M, K, N in LAYERS),
)  # fmt: skip


def _errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, **change):
        def make():
            (x, weight, bias), kwargs = SAMPLES[0].make(torch.float32, "cpu")
            kwargs |= dict(weight=weight, bias=bias) | change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_dim", ValueError, r"input: expected \[..., K\]", input=z(())),
        case("input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", input=z(6, 20, dtype=torch.int64)),
        case("weight_shape", ValueError, r"weight: expected \[N, 20\] for input \(3, 20\), got shape \(17, 19\)", weight=z(17, 19)),
        case("weight_dim", ValueError, r"weight: expected \[N, 20\]", weight=z(20)),
        case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32, got torch.float64", weight=z(17, 20).double()),
        case("weight_device", ValueError, "weight: expected input's device cpu, got meta", weight=z(17, 20, device="meta")),
        case("bias_shape", ValueError, r"bias: expected shape \(17,\)", bias=z(16)),
        case("residual_shape", ValueError, r"residual: expected shape \(3, 17\)", residual=z(6, 20)),
        case("residual_dtype", ValueError, "residual: expected input's dtype", residual=z(3, 17).double()),
        case("activation", ValueError, "activation: expected one of none, relu.*got 'swish'", activation="swish"),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it has no cuda kernel", backend="cuda"),
    )  # fmt: skip


def _torch(compiled: bool = False):
    def factory(args, kwargs):
        act, slope = REFERENCE[kwargs.get("activation", "none")], kwargs.get("negative_slope", 0.01)
        call = lambda *a: act(F.linear(*a), slope)  # noqa: E731
        call = torch.compile(call) if compiled else call
        return lambda: call(*args)

    return factory


def module_of(args, kwargs):
    """`LinearAct` with the call's tensors, for inference."""
    x, weight, bias = args
    options = dict(bias=bias is not None, activation=kwargs.get("activation", "none"))
    layer = LinearAct(weight.shape[1], weight.shape[0], **options, device=weight.device, dtype=weight.dtype).requires_grad_(False)
    layer.load_state_dict(dict(weight=weight) | ({} if bias is None else dict(bias=bias)))
    return lambda: layer(x)


register(
    OpSpec(
        name="linear_act",
        public=linear_act,
        family="linear",
        ops=("linear_rows",),
        samples=SAMPLES,
        errors=_errors(),
        flops=lambda input, weight, *_, **__: 2 * input.numel() // max(1, weight.shape[1]) * weight.numel(),
        bytes=lambda input, weight, *_, **__: input.element_size() * (
            input.numel() + weight.numel() + input.numel() // max(1, weight.shape[1]) * weight.shape[0]
        ),
        baselines={"torch.nn": _torch(), "torch.compile": _torch(compiled=True), "LinearAct": module_of},
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        backends=("cpu",),
    )
)  # fmt: skip
