"""Samples of the cross entropy of a linear layer's logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pyops.ops.linear_cross_entropy import linear_cross_entropy
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register


def arguments(rows, C, V, dtype, device, seed=0, *, bias=False, ignored=0, layout="contiguous", scale=1.0, **options):
    """(input, weight, target, bias) and keyword arguments, rounded to dtype from the same float64 values. rows: the leading dimensions;
    ignored: how many of the first targets are none."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * V + C)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

    x, weight, b = rand(*rows, C, scale=scale), rand(V, C, scale=2 * C**-0.5), rand(V)
    target = torch.randint(V, rows, generator=generator)
    target.view(-1)[:ignored] = options.get("ignore_index", -100)
    if layout == "transposed":
        x, weight = x.transpose(-1, 0).contiguous().transpose(-1, 0), weight.t().contiguous().t()
        target = target.t().contiguous().t()
    return (x, weight, target.to(device), b if bias else None), dict(options)


def _sample(id: str, rows: tuple[int, ...], C: int, V: int, *, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: arguments(rows, C, V, dtype, device, seed, **options), bench, not bench)


# rows, width, vocabulary: characters, a small recurrent model's words, GPT-2's
MODELS = ((2048, 256, 256), (1024, 512, 10000), (512, 768, 50257))
EVERYTHING: dict = dict(bias=True, ignored=3, ignore_index=2, label_smoothing=0.2, softcap=3.0)
SAMPLES = (
    _sample("plain", (6,), 20, 17),
    _sample("odd", (3, 5), 37, 131, bias=True, ignored=4),
    _sample("wide", (2, 9), 24, 1030, label_smoothing=0.1),
    _sample("everything", (4, 7), 19, 65, **EVERYTHING),
    *(_sample(f"everything_{reduction}", (4, 7), 19, 65, reduction=reduction, **EVERYTHING) for reduction in ("none", "sum")),
    _sample("none", (3, 4), 20, 33, reduction="none"),
    _sample("none_bias", (9,), 20, 64, reduction="none", bias=True, ignored=2),
    _sample("sum", (7,), 20, 48, reduction="sum"),
    _sample("softcap", (8,), 16, 40, softcap=1.5),
    _sample("smoothing_only", (8,), 16, 40, label_smoothing=1.0),
    _sample("large_logits", (8,), 16, 40, scale=40.0),
    _sample("transposed", (6, 5), 20, 17, layout="transposed", bias=True),
    _sample("one_row", (), 20, 37),
    _sample("one_class", (5,), 8, 1),
    _sample("one_input", (7,), 1, 20),
    _sample("all_ignored", (5,), 8, 12, ignored=5, reduction="sum"),
    _sample("mean_of_none", (5,), 8, 12, ignored=5),
    _sample("no_rows", (0,), 20, 17, reduction="sum"),
    *(_sample(f"{M}x{C}x{V}", (M,), C, V, bench=True) for M, C, V in MODELS),
)


def _errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, **change):
        def make():
            (x, weight, target, bias), kwargs = SAMPLES[0].make(torch.float32, "cpu")
            kwargs |= dict(weight=weight, target=target, bias=bias) | change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_dim", ValueError, r"input: expected \[..., C\]", input=z(())),
        case("input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", input=z(6, 20, dtype=torch.int64)),
        case("weight_shape", ValueError, r"weight: expected \[V, 20\] for input \(6, 20\), got shape \(17, 19\)", weight=z(17, 19)),
        case("weight_empty", ValueError, r"weight: expected \[V, 20\] .* got shape \(0, 20\)", weight=z(0, 20)),
        case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32, got torch.float64", weight=z(17, 20).double()),
        case("bias_shape", ValueError, r"bias: expected shape \(17,\)", bias=z(16)),
        case("bias_dtype", ValueError, "bias: expected input's dtype", bias=z(17).double()),
        case("target_kind", TypeError, "target: expected a Tensor, got list", target=[1]),
        case("target_dtype", ValueError, "target: expected torch.int64, got torch.float32", target=z(6)),
        case("target_shape", ValueError, r"target: expected shape \(6,\), got \(5,\)", target=z(5).long()),
        case("target_device", ValueError, "target: expected input's device cpu, got meta", target=z(6, device="meta").long()),
        case("ignore_index", TypeError, "ignore_index: expected an int, got None", ignore_index=None),
        case("label_smoothing", ValueError, "label_smoothing: expected a number from 0 to 1, got 1.5", label_smoothing=1.5),
        case("reduction", ValueError, "reduction: expected one of none, mean, sum, got 'max'", reduction="max"),
        case("softcap", ValueError, "softcap: expected a number above 0 or None, got 0", softcap=0),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    )  # fmt: skip


def _torch(compiled: bool = False):
    """Logits, then PyTorch's cross entropy."""

    def factory(args, kwargs):
        call = lambda *a: linear_cross_entropy(*a, **kwargs, backend="eager")  # noqa: E731
        call = torch.compile(call) if compiled else call
        return lambda: call(*args)

    return factory


def _torch_chunked(args, kwargs):
    """PyTorch's own chunked function, from 2.15 on."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError("this torch has no linear_cross_entropy")
    if kwargs.get("softcap"):
        raise ValueError("PyTorch's function has no softcap")
    x, weight, target, bias = args
    rows, classes = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    options = dict(kwargs, linear_bias=bias, options=torch.nn.LinearCrossEntropyOptions())
    return lambda: F.linear_cross_entropy(rows, weight, classes, **options)


register(
    OpSpec(
        name="linear_cross_entropy",
        public=linear_cross_entropy,
        family="linear",
        ops=("cross_entropy_rows_", "linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
        samples=SAMPLES,
        errors=_errors(),
        flops=lambda input, weight, target, *_, **__: 2 * target.numel() * weight.numel(),
        bytes=lambda input, weight, target, *_, **__: input.element_size() * (input.numel() + weight.numel()) + 8 * target.numel(),
        baselines={"torch.nn": _torch(), "torch.compile": _torch(compiled=True), "torch.linear_cross_entropy": _torch_chunked},
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
)
