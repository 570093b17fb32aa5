"""Samples of the depthwise convolution."""

from __future__ import annotations

import math

import torch

from pyops.ops._activations import NAMES
from pyops.ops._depthwise_ops import output_size
from pyops.ops.depthwise_conv import _prepare, depthwise_conv_bn_act
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register
from pyops.testing.samples import conv_peers


def arguments(N, C, H, W, K, dtype, device, seed=0, *, bias=True, bn=False, residual=False, layout="channels_last", **options):
    """(input, weight, bias) and keyword arguments, rounded to dtype from the same float64 values. K: kernel size or pair."""
    KH, KW = (K, K) if isinstance(K, int) else K
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * H + 100 * W + 10 * C + KH)

    def rand(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(device, dtype)

    x, weight, b = rand(N, C, H, W), rand(C, 1, KH, KW, scale=(KH * KW) ** -0.5), rand(C)
    kwargs = dict(options)
    if bn:
        kwargs |= dict(running_mean=rand(C, scale=0.3), running_var=rand(C).abs() + 0.5, bn_weight=rand(C, shift=1.0), bn_bias=rand(C))
    if residual:
        size = output_sizes(x, weight, **options)
        kwargs["residual"] = rand(N, C, *size).contiguous(memory_format=torch.channels_last)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "strided":  # every other column of a wider tensor, a transposed weight
        x, weight = x.repeat_interleave(2, 3)[..., ::2], weight.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded":
        x, b = x[:, :1].expand_as(x), b[:1].expand_as(b)
    return (x, weight, b if bias else None), kwargs


def output_sizes(input, weight, *_, stride=1, padding=0, dilation=1, **__) -> list[int]:
    call = _prepare("sample", input, weight, None, stride, padding, dilation, None, "none")
    return output_size(input.shape[2:], weight.shape[2:], call.stride, call.padding, call.dilation)


def sample(id: str, N: int, C: int, H: int, W: int, K, bench: bool = False, test: bool = True, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: arguments(N, C, H, W, K, dtype, device, seed, **options), bench, test)


# EfficientNet-B0's depthwise layers and ConvNeXt-T's first: C, input size, kernel, stride
LAYERS = (
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 3, 1),
    (144, 56, 5, 2),
    (240, 28, 5, 1),
    (480, 14, 3, 1),
    (672, 14, 5, 1),
    (1152, 7, 5, 1),
    (96, 56, 7, 1),
)
BLOCK = dict(bias=False, bn=True, activation="silu")
SIZES = ((6, 7), (7, 6))
SAMPLES = (
    sample("plain", 2, 20, 9, 11, 3, padding=1),
    sample("odd", 3, 37, 7, 5, 5, padding=2, bn=True, activation="silu", return_means=True),
    sample("wide", 1, 130, 8, 8, 3, padding=1, bn=True, activation="relu6"),
    sample("k7", 2, 33, 10, 9, 7, padding=3),
    sample("k9", 1, 17, 12, 10, 9, padding=4, activation="gelu"),
    sample("asymmetric", 2, 16, 8, 9, (1, 7), padding=(0, 3), activation="relu"),
    sample("even_kernel", 2, 16, 8, 9, (2, 4), padding=1, activation="tanh"),
    sample("stride2", 2, 24, 12, 13, 3, padding=1, stride=2, bn=True, activation="silu", return_means=True),
    sample("stride2_k5", 2, 24, 13, 12, 5, padding=2, stride=2, activation="hardswish", return_means=True),
    sample("stride_1_3", 2, 16, 9, 14, 3, padding=1, stride=(1, 3)),
    sample("dilation", 2, 16, 14, 13, 3, padding=2, dilation=2, activation="silu"),
    sample("dilation_2_3", 2, 16, 14, 17, 3, padding="same", dilation=(2, 3)),
    sample("valid", 2, 16, 9, 9, 3, padding="valid", activation="sigmoid"),
    sample("wide_padding", 1, 16, 3, 4, 3, padding=4, activation="hardsigmoid", return_means=True),
    sample("residual", 2, 20, 8, 7, 3, padding=1, residual=True, bn=True, activation="relu"),
    sample("residual_silu", 2, 20, 8, 7, 3, padding=1, residual=True, activation="silu", return_means=True),
    sample("no_bias", 2, 20, 8, 7, 3, padding=1, bias=False, activation="leaky_relu", negative_slope=0.2),
    sample("training", 4, 20, 8, 7, 3, padding=1, bias=False, bn=True, training=True, activation="silu", return_means=True),
    sample("nchw", 2, 20, 8, 7, 3, padding=1, bn=True, activation="silu", layout="contiguous"),
    sample("strided", 2, 20, 8, 7, 3, padding=1, activation="silu", layout="strided"),
    sample("expanded", 2, 20, 8, 7, 3, padding=1, activation="silu", layout="expanded"),
    sample("one_channel", 3, 1, 6, 5, 3, padding=1, activation="silu"),
    sample("one_pixel", 3, 20, 1, 1, 3, padding=1, activation="silu", return_means=True),
    sample("one_column", 2, 20, 9, 1, 5, padding=2),
    sample("no_images", 0, 20, 6, 5, 3, padding=1, return_means=True),
    *(sample(f"act_{name}", 2, 16, 6, 6, 3, padding=1, activation=name) for name in NAMES),
    # a sample for every parity of size and stride: the corners of halo and padding
    *(
        sample(f"corner_k{K}_s{S}_{H}x{W}", 1, 16, H, W, K, padding=K // 2, stride=S)
        for K in (3, 5, 7)
        for S in (1, 2)
        for H, W in SIZES
    ),
    *(
        sample(f"{N}x{C}x{size}_k{K}s{S}", N, C, size, size, K, True, False, padding=K // 2, stride=S, **BLOCK)
        for N in (1, 8)
        for C, size, K, S in LAYERS
    ),
)  # fmt: skip


def _errors() -> tuple[ErrorCase, ...]:
    def case(id, error, match, **change):
        def make():
            (x, weight, bias), kwargs = arguments(2, 4, 6, 6, 3, torch.float32, "cpu", padding=1)
            kwargs |= dict(weight=weight, bias=bias) | change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    z = torch.zeros
    return (
        case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
        case("input_dim", ValueError, r"input: expected \[N, C, H, W\], got shape \(4, 6, 6\)", input=z(4, 6, 6)),
        case("input_dtype", ValueError, "input: expected float32, bfloat16", input=z(2, 4, 6, 6, dtype=torch.int64)),
        case("input_small", ValueError, r"input: \(1, 1\) is too small for kernel \(3, 3\)", input=z(2, 4, 1, 1), padding=0),
        case("weight_shape", ValueError, r"weight: expected \[C, 1, KH, KW\] with C = 4, got shape \(4, 4, 3, 3\)", weight=z(4, 4, 3, 3)),
        case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32, got torch.float64", weight=z(4, 1, 3, 3).double()),
        case("weight_device", ValueError, "weight: expected input's device cpu, got meta", weight=z(4, 1, 3, 3, device="meta")),
        case("bias_shape", ValueError, r"bias: expected shape \(4,\)", bias=z(3)),
        case("bias_kind", TypeError, "bias: expected a Tensor or None, got float", bias=0.5),
        case("stride_value", ValueError, "stride: expected 1 or more, got 0", stride=0),
        case("stride_kind", TypeError, "stride: expected an int or a pair of ints, got 1.5", stride=1.5),
        case("dilation_value", ValueError, "dilation: expected 1 or more", dilation=(1, 0)),
        case("padding_value", ValueError, "padding: expected 0 or more, got -1", padding=-1),
        case("padding_name", ValueError, 'padding: expected "same", "valid" or numbers, got \'full\'', padding="full"),
        case("padding_same_stride", ValueError, '"same" needs stride 1', padding="same", stride=2),
        case("residual_shape", ValueError, r"residual: expected shape \(2, 4, 6, 6\)", residual=z(2, 4, 5, 6)),
        case("activation", ValueError, "activation: expected one of none, relu.*got 'swish'", activation="swish"),
        case("running_mean_alone", ValueError, "running_mean, running_var: expected both or neither", running_mean=z(4)),
        case("running_var_shape", ValueError, r"running_var: expected a floating tensor", running_mean=z(4), running_var=z(5)),
        case("bn_weight_alone", ValueError, "bn_weight: batch norm needs running_mean", bn_weight=z(4)),
        case("backend_name", ValueError, "backend: expected one of auto, cpu, cuda", backend="gpu"),
        case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    )  # fmt: skip


def _output_elements(input, weight, *_, **options) -> int:
    return input.shape[0] * input.shape[1] * math.prod(output_sizes(input, weight, **options))


def flops(input, weight, bias=None, **options) -> int:
    return 2 * weight.shape[2] * weight.shape[3] * _output_elements(input, weight, bias, **options)


def minimal_bytes(input, weight, bias=None, *, residual=None, **options) -> int:
    """Input, weight and residual read once, output written once."""
    output = _output_elements(input, weight, bias, **options)
    return input.element_size() * (input.numel() + weight.numel() + output * (1 if residual is None else 2))


register(
    OpSpec(
        name="depthwise_conv_bn_act",
        public=depthwise_conv_bn_act,
        family="conv",
        ops=("depthwise_infer", "depthwise_fwd", "depthwise_bwd"),
        samples=SAMPLES,
        errors=_errors(),
        flops=flops,
        bytes=minimal_bytes,
        baselines=conv_peers.PEERS,
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        backends=("cpu", "cuda", "triton"),
    )
)
