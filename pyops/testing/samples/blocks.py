"""Samples of what blocks are made of beside the depthwise convolution: batch norm with activation, squeeze-excitation, 1x1 convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.ops._activations import NAMES
from pyops.ops.batch_norm_act import batch_norm_act
from pyops.ops.pointwise_conv import pointwise_conv
from pyops.ops.squeeze_excite import squeeze_excite
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Values:
    """Draws of one call: the same values in every dtype, but for rounding."""

    def __init__(self, seed: int, size: tuple[int, ...], dtype: torch.dtype, device: str, layout: str):
        self.generator = torch.Generator().manual_seed(10**6 * seed + 1000 * size[-1] + 10 * size[1] + size[0])
        self.dtype, self.device, self.layout = dtype, device, layout

    def __call__(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        value = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * scale + shift
        value = value.to(self.device, self.dtype)
        if len(shape) == 4 and self.layout == "channels_last":
            return value.contiguous(memory_format=torch.channels_last)
        if len(shape) == 4 and self.layout == "strided":  # every other column of a wider tensor
            return value.repeat_interleave(2, 3)[..., ::2]
        if len(shape) == 4 and self.layout == "expanded":
            return value[:, :1].expand_as(value)
        return value


def _sample(make: Callable, id: str, size: tuple[int, ...], *, bench: bool = False, layout: str = "channels_last", **options) -> Sample:
    def arguments(dtype, device, seed=0):
        return make(Values(seed, size, dtype, device, layout), size, **options)

    return Sample(id, arguments, bench, not bench)


def _torch(public: Callable, compiled: bool = False):
    """PyTorch's own ops for the call, as they are or through the compiler."""

    def factory(args, kwargs):
        call = lambda *a: public(*a, **kwargs, backend="eager")  # noqa: E731
        call = torch.compile(call) if compiled else call
        return lambda: call(*args)

    return factory


def _baselines(public: Callable) -> dict[str, Callable]:
    return {"torch.nn": _torch(public), "torch.compile": _torch(public, compiled=True)}


# --------------------------------------------------------------------------------------------------------- batch norm + activation


def _norm_arguments(rand, size, *, affine=True, running=True, residual=False, keep=False, **options):
    N, C = size[:2]
    kwargs = dict(running_mean=None, running_var=None) | options
    if running:
        kwargs |= dict(running_mean=rand(C, scale=0.3), running_var=rand(C).abs() + 0.5)
    x = rand(*size, scale=1.5, shift=0.5)
    if affine:
        kwargs |= dict(weight=rand(C, shift=1.0), bias=rand(C))
    if residual:
        kwargs["residual"] = rand(*size)
    if keep:
        kwargs["keep"] = (torch.arange(N, device=x.device) % 3).to(x.dtype) * 0.75
    return (x,), kwargs


def _norm(id: str, *size: int, **options) -> Sample:
    return _sample(_norm_arguments, id, size, **options)


# EfficientNet-B0's widest maps by stage: C, size
MAPS = ((96, 112), (144, 56), (240, 28), (672, 14), (1152, 7))
NORM_SAMPLES = (
    _norm("plain", 4, 20, 9, 7, training=True),
    _norm("odd", 3, 37, 7, 5, training=True, activation="silu"),
    _norm("wide", 2, 600, 3, 5, training=True, activation="relu6"),
    _norm("residual", 4, 20, 8, 7, training=True, residual=True, activation="relu"),
    _norm("residual_silu", 4, 20, 8, 7, training=True, residual=True, keep=True, activation="silu"),
    _norm("residual_none", 4, 20, 8, 7, training=True, residual=True, keep=True),
    _norm("running", 4, 20, 8, 7, activation="silu"),
    _norm("running_residual", 4, 20, 8, 7, residual=True, keep=True, activation="hardswish"),
    _norm("no_affine", 4, 20, 8, 7, affine=False, training=True, activation="silu"),
    _norm("no_running", 4, 20, 8, 7, running=False, activation="silu"),
    _norm("slope", 4, 20, 8, 7, training=True, activation="leaky_relu", negative_slope=0.2),
    _norm("two_dimensions", 33, 20, training=True, activation="silu"),
    _norm("three_dimensions", 4, 20, 13, training=True, activation="silu"),
    _norm("five_dimensions", 2, 20, 3, 4, 5, training=True, activation="silu"),
    _norm("nchw", 4, 20, 8, 7, training=True, activation="silu", layout="contiguous"),
    _norm("strided", 4, 20, 8, 7, training=True, activation="silu", layout="strided"),
    _norm("one_channel", 3, 1, 6, 5, training=True, activation="silu"),
    _norm("one_pixel", 9, 20, 1, 1, training=True, activation="silu"),
    *(_norm(f"act_{name}", 4, 16, 6, 6, training=True, activation=name) for name in NAMES),
    *(_norm(f"{N}x{C}x{size}", N, C, size, size, bench=True, training=True, activation="silu") for N in (1, 8) for C, size in MAPS),
)  # fmt: skip


def _norm_errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, **change):
        def make():
            (x,), kwargs = NORM_SAMPLES[0].make(torch.float32, "cpu")
            kwargs |= change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_dim", ValueError, r"input: expected \[N, C\]", input=z(4)),
        case("input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", input=z(2, 20, 6, 6, dtype=torch.int64)),
        case("weight_shape", ValueError, r"weight: expected shape \(20,\), got \(3,\)", weight=z(3)),
        case("bias_device", ValueError, "bias: expected input's device cpu, got meta", bias=z(20, device="meta")),
        case("running_mean_alone", ValueError, "running_mean, running_var: expected both or neither", running_var=None),
        case("residual_shape", ValueError, r"residual: expected shape \(4, 20, 9, 7\)", residual=z(4, 20, 9, 6)),
        case("residual_dtype", ValueError, "residual: expected input's dtype torch.float32", residual=z(4, 20, 9, 7).double()),
        case("keep_shape", ValueError, r"keep: expected shape \(4,\)", keep=z(5)),
        case("momentum", ValueError, "momentum: None averages over all batches and needs num_batches_tracked", momentum=None),
        case("activation", ValueError, "activation: expected one of none, relu.*got 'swish'", activation="swish"),
        case("group", TypeError, "process_group: expected a torch.distributed.ProcessGroup", process_group=3),
        case("one_value", ValueError, "input: expected more than 1 value per channel", input=z(1, 20, 1, 1)),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    )  # fmt: skip


def _norm_bytes(input, *_, residual=None, training=False, running_mean=None, **__) -> int:
    """Input read once, and once more for its own statistics; residual read and output written once."""
    passes = 2 + (residual is not None) + (training or running_mean is None)
    return passes * input.numel() * input.element_size()


register(
    OpSpec(
        name="batch_norm_act",
        public=batch_norm_act,
        family="conv",
        ops=(
            "batch_norm_act_fwd", "batch_norm_act_bwd", "channel_moments", "channel_apply", "channel_sums", "channel_reduce",
            "channel_grad", "channel_grad_", "channel_norm", "channel_affine", "channel_terms",
            "depthwise_train_fwd", "depthwise_train_bwd", "depthwise_after", "depthwise_after_bwd",
        ),
        samples=NORM_SAMPLES,
        errors=_norm_errors(),
        flops=lambda input, *_, **__: 10 * input.numel(),
        bytes=_norm_bytes,
        baselines=_baselines(batch_norm_act),
        dtypes=DTYPES,
    )
)  # fmt: skip

# ------------------------------------------------------------------------------------------------------------- squeeze-excitation


def _squeeze_arguments(rand, size, *, squeezed, means=False, convolutions=False, **options):
    N, C = size[:2]
    ones = (1, 1) if convolutions else ()
    x = rand(*size)
    layers = (rand(squeezed, C, *ones, scale=C**-0.5), rand(squeezed), rand(C, squeezed, *ones, scale=squeezed**-0.5), rand(C))
    if convolutions:
        layers = tuple(t.contiguous() for t in layers)
    return (x, *layers), options | (dict(means=rand(N, C, scale=0.3)) if means else {})


def _squeeze(id: str, *size: int, squeezed: int = 6, **options) -> Sample:
    return _sample(_squeeze_arguments, id, size, squeezed=squeezed, **options)


SQUEEZE_SAMPLES = (
    _squeeze("plain", 3, 20, 9, 7),
    _squeeze("odd", 2, 37, 7, 5, squeezed=5, activation="silu"),
    _squeeze("wide", 2, 600, 3, 5, squeezed=28, activation="silu", gate_activation="hardsigmoid"),
    _squeeze("means", 3, 20, 9, 7, means=True),
    _squeeze("convolutions", 3, 20, 9, 7, convolutions=True),
    _squeeze("nchw", 3, 20, 9, 7, layout="contiguous"),
    _squeeze("strided", 3, 20, 9, 7, layout="strided"),
    _squeeze("expanded", 3, 20, 9, 7, layout="expanded"),
    _squeeze("one_pixel", 3, 20, 1, 1),
    _squeeze("one_channel", 3, 1, 4, 5, squeezed=1),
    *(_squeeze(f"{N}x{C}x{size}", N, C, size, size, squeezed=C // 24, activation="silu", bench=True) for N in (1, 8) for C, size in MAPS),
)  # fmt: skip


def _squeeze_errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, index=None, value=None, **change):
        def make():
            given, kwargs = SQUEEZE_SAMPLES[0].make(torch.float32, "cpu")
            args = list(given)
            if index is not None:
                args[index] = value
            return tuple(args), kwargs | change

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", 0, [1.0]),
        case("input_dim", ValueError, r"input: expected \[N, C, H, W\]", 0, z(4, 20)),
        case("fc1_weight", ValueError, r"fc1_weight: expected shape \(6, 20\), got \(6, 19\)", 1, z(6, 19)),
        case("fc1_bias", ValueError, r"fc1_bias: expected shape \(6,\)", 2, z(5)),
        case("fc2_weight", ValueError, r"fc2_weight: expected shape \(20, 6\)", 3, z(6, 20)),
        case("fc2_bias", TypeError, "fc2_bias: expected a Tensor, got NoneType", 4, None),
        case("means", ValueError, r"means: expected shape \(3, 20\)", means=z(3, 19)),
        case("activation", ValueError, "activation: expected one of none, relu", activation="swish"),
        case("gate_activation", ValueError, "gate_activation: expected one of none, relu", gate_activation="softmax"),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    )  # fmt: skip


register(
    OpSpec(
        name="squeeze_excite",
        public=squeeze_excite,
        family="conv",
        ops=("squeeze_excite_fwd", "squeeze_excite_bwd"),
        samples=SQUEEZE_SAMPLES,
        errors=_squeeze_errors(),
        flops=lambda input, fc1_weight, *_, **__: 2 * input.numel() + 4 * input.shape[0] * fc1_weight.numel(),
        bytes=lambda input, *_, means=None, **__: (3 if means is None else 2) * input.numel() * input.element_size(),
        baselines=_baselines(squeeze_excite),
        dtypes=DTYPES,
    )
)

# ------------------------------------------------------------------------------------------------------------------ 1x1 convolution


def _pointwise_arguments(rand, size, *, outputs, parts=(), bias=True, kernel=False, **options):
    N, C, H, W = size
    x, weight = rand(*size), rand(outputs, C, scale=C**-0.5)
    made = dict(
        input_scale=lambda: rand(C, shift=1.0), input_shift=lambda: rand(C), gate=lambda: rand(N, C).sigmoid(),
        keep=lambda: (torch.arange(N, device=x.device) % 3).to(x.dtype) * 0.75, residual=lambda: rand(N, outputs, H, W),
        layer_norm=lambda: (rand(C, shift=1.0), rand(C), 1e-6),
    )  # fmt: skip
    weight = weight[:, :, None, None].contiguous() if kernel else weight
    return (x, weight, rand(outputs) if bias else None), options | {part: made[part]() for part in parts}


def _pointwise(id: str, *size: int, outputs: int = 17, **options) -> Sample:
    return _sample(_pointwise_arguments, id, size, outputs=outputs, **options)


AFFINE = ("input_scale", "input_shift")
# EfficientNet-B0's expansions and projections: input channels, size, output channels
LAYERS = ((16, 112, 96), (24, 56, 144), (240, 28, 40), (80, 14, 480), (672, 14, 112), (1152, 7, 192))
POINTWISE_SAMPLES = (
    _pointwise("plain", 3, 20, 9, 7),
    _pointwise("odd", 2, 37, 7, 5, outputs=130, activation="silu"),
    _pointwise("wide", 1, 600, 3, 5, outputs=70),
    _pointwise("no_bias", 3, 20, 9, 7, bias=False),
    _pointwise("kernel", 3, 20, 9, 7, kernel=True),
    _pointwise("affine", 3, 20, 9, 7, parts=AFFINE, input_activation="silu"),
    _pointwise("scale", 3, 20, 9, 7, parts=AFFINE[:1]),
    _pointwise("gate", 3, 20, 9, 7, parts=("gate",)),
    _pointwise("affine_gate", 3, 20, 9, 7, parts=(*AFFINE, "gate"), input_activation="relu"),
    _pointwise("layer_norm", 3, 20, 9, 7, parts=("layer_norm",)),
    _pointwise("residual", 3, 20, 9, 7, parts=("keep", "residual"), activation="relu"),
    _pointwise("residual_silu", 3, 20, 9, 7, parts=("keep", "residual"), activation="silu"),
    _pointwise("nchw", 3, 20, 9, 7, layout="contiguous"),
    _pointwise("strided", 3, 20, 9, 7, layout="strided"),
    _pointwise("expanded", 3, 20, 9, 7, layout="expanded"),
    _pointwise("one_pixel", 9, 20, 1, 1),
    _pointwise("one_channel", 3, 1, 4, 5, outputs=1),
    _pointwise("no_images", 0, 20, 6, 5),
    *(
        _pointwise(f"{N}x{C}x{size}_{O}", N, C, size, size, outputs=O, activation="silu", bench=True)
        for N in (1, 8)
        for C, size, O in LAYERS
    ),
)  # fmt: skip


def _pointwise_errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, **change):
        def make():
            (x, weight, bias), kwargs = POINTWISE_SAMPLES[0].make(torch.float32, "cpu")
            kwargs |= dict(weight=weight, bias=bias) | change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    image = z(3, 9, 7, 17).permute(0, 3, 1, 2)
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_dim", ValueError, r"input: expected \[N, C, H, W\]", input=z(3, 20)),
        case("weight_shape", ValueError, r"weight: expected \[O, C\] or \[O, C, 1, 1\] with C = 20", weight=z(17, 20, 3, 3)),
        case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32 or float32", weight=z(17, 20).double()),
        case("bias_shape", ValueError, r"bias: expected shape \(17,\)", bias=z(16)),
        case("input_scale", ValueError, r"input_scale: expected shape \(20,\)", input_scale=z(17)),
        case("gate_shape", ValueError, r"gate: expected shape \(3, 20\)", gate=z(3, 17)),
        case("keep_shape", ValueError, r"keep: expected shape \(3,\)", keep=z(4)),
        case("residual_shape", ValueError, r"residual: expected shape \(3, 17, 9, 7\)", residual=z(3, 20, 9, 7)),
        case("residual_dtype", ValueError, "residual: expected input's dtype", residual=z(3, 17, 9, 7).double()),
        case("layer_norm_kind", TypeError, r"layer_norm: expected \(weight, bias, eps\)", layer_norm=1e-6),
        case("layer_norm_and_scale", ValueError, "layer_norm: takes the place of", layer_norm=(None, None, 1e-6), input_scale=z(20)),
        case("out_shape", ValueError, r"out: expected shape \(3, 17, 9, 7\)", out=z(3, 20, 9, 7)),
        case("out_layout", ValueError, "out: expected channels_last memory", out=z(3, 17, 9, 7)),
        case("out_grad", ValueError, "out: writes are not diff", weight=z(17, 20, requires_grad=True), out=image),
        case("activation", ValueError, "activation: expected one of none, relu.*got 'swish'", activation="swish"),
        case("input_activation", ValueError, "input_activation: expected one of none", input_activation="swish"),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    )  # fmt: skip


def _pointwise_bytes(input, weight, bias=None, *, residual=None, **_) -> int:
    """Input, weight and residual read once, output written once."""
    output = input.numel() // input.shape[1] * weight.shape[0]
    return input.element_size() * (input.numel() + weight.numel() + output * (1 if residual is None else 2))


register(
    OpSpec(
        name="pointwise_conv",
        public=pointwise_conv,
        family="conv",
        ops=("pointwise_run", "pointwise_into", "pointwise_back", "pointwise_train_fwd", "pointwise_train_bwd"),
        samples=POINTWISE_SAMPLES,
        errors=_pointwise_errors(),
        flops=lambda input, weight, *_, **__: 2 * input.numel() * weight.shape[0],
        bytes=_pointwise_bytes,
        baselines=_baselines(pointwise_conv),
        dtypes=DTYPES,
    )
)
