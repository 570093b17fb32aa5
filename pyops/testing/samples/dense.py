"""Samples of the convolution with full or grouped filters, and of its transpose."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyops.ops import _conv_checks, _pool_ops
from pyops.ops._activations import NAMES
from pyops.ops.conv_bn_act import conv_bn_act, conv_transpose_bn_act
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register
from pyops.testing.samples import conv_peers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(size, outputs, kernel, dtype, device, seed=0, *, transposed=False, bias=True, bn=False, residual=False, **options):
    """(input, weight, bias) and keyword arguments, rounded to dtype from the same float64 values."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * size[-1] + 10 * size[1] + outputs)

    def rand(*shape, scale=1.0, shift=0.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + shift).to(device, dtype)

    rank, groups, layout = len(size) - 2, options.get("groups", 1), options.pop("layout", "channels_last")
    kernel = (kernel,) * rank if isinstance(kernel, int) else kernel
    channels = (size[1], outputs // groups) if transposed else (outputs, size[1] // groups)
    x, weight = rand(*size), rand(*channels, *kernel, scale=(size[1] // groups * math.prod(kernel)) ** -0.5)
    b, kwargs = rand(outputs), dict(options)
    if bn:
        kwargs |= dict(running_mean=rand(outputs, scale=0.3), running_var=rand(outputs).abs() + 0.5)
        kwargs |= dict(bn_weight=rand(outputs, shift=1.0), bn_bias=rand(outputs))
    if residual:
        kwargs["residual"] = rand(*output_size(x, weight, transposed=transposed, **options))
    if layout == "channels_last" and rank > 1:
        last = torch.channels_last if rank == 2 else torch.channels_last_3d
        x = x.contiguous(memory_format=last)
        kwargs |= {k: v.contiguous(memory_format=last) for k, v in kwargs.items() if k == "residual"}
    elif layout == "strided":  # every other column of a wider tensor
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        x = x[:, :1].expand_as(x)
    return (x, weight, b if bias else None), kwargs


def output_size(input: Tensor, weight: Tensor, *_, transposed=False, **options) -> tuple[int, ...]:
    """Of what the convolution gives."""
    names = ("stride", "padding", "dilation", "groups", *(("output_padding",) if transposed else ()))
    given = {name: options[name] for name in names if name in options}
    times = 2 if options.get("upsample") else 1
    with torch.device("meta"):
        x, w = torch.empty(*input.shape[:2], *(times * n for n in input.shape[2:])), torch.empty(weight.shape)
        kinds = nn.functional.conv_transpose1d, nn.functional.conv_transpose2d, nn.functional.conv_transpose3d
        plain = nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d
        return tuple((kinds if transposed else plain)[input.dim() - 3](x, w, **given).shape)


def _sample(id: str, size: tuple[int, ...], outputs: int, kernel, *, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: arguments(size, outputs, kernel, dtype, device, seed, **options), bench, not bench)


BLOCK: dict[str, Any] = dict(bias=False, bn=True, activation="relu")
IMAGE = (2, 6, 9, 8)
# ResNet's 3x3 layers, a bottleneck's 1x1, the stem, a stride, a DenseNet layer, AlexNet's groups, Inception's 1x7:
# channels, size, outputs, kernel
LAYERS: tuple[tuple[int, int, int, int | tuple[int, int], dict], ...] = (
    (64, 56, 64, 3, dict(padding=1)),
    (128, 28, 128, 3, dict(padding=1)),
    (256, 14, 256, 3, dict(padding=1)),
    (512, 7, 512, 3, dict(padding=1)),
    (64, 56, 256, 1, {}),
    (3, 224, 64, 7, dict(padding=3, stride=2)),
    (64, 56, 128, 3, dict(padding=1, stride=2)),
    (128, 28, 32, 3, dict(padding=1)),
    (96, 27, 256, 5, dict(padding=2, groups=2)),
    (128, 17, 192, (1, 7), dict(padding=(0, 3))),
)
SAMPLES = (
    _sample("plain", IMAGE, 10, 3, padding=1),
    _sample("odd", (3, 7, 7, 5), 13, 5, padding=2, bn=True, activation="silu"),
    _sample("wide", (2, 130, 16, 15), 70, 3, padding=2, bn=True, activation="relu6", dilation=2),
    _sample("stem", (2, 3, 15, 14), 12, 7, padding=3, stride=2, **BLOCK),
    _sample("pointwise", IMAGE, 17, 1, **BLOCK),
    _sample("row", IMAGE, 8, (1, 7), padding=(0, 3), **BLOCK),
    _sample("column", IMAGE, 8, (7, 1), padding=(3, 0), **BLOCK),
    _sample("even_kernel", IMAGE, 8, (2, 4), padding=1, activation="tanh"),
    _sample("same", IMAGE, 8, (4, 3), padding="same", dilation=(1, 2), activation="gelu"),
    _sample("valid", IMAGE, 8, 3, padding="valid", activation="sigmoid"),
    _sample("stride2", IMAGE, 8, 3, padding=1, stride=2, **BLOCK),
    _sample("stride_1_3", IMAGE, 8, 3, padding=1, stride=(1, 3)),
    _sample("groups", IMAGE, 10, 3, padding=1, groups=2, activation="relu"),
    _sample("groups_dilated", IMAGE, 9, 3, padding=2, groups=3, dilation=2, **BLOCK),
    _sample("depthwise", IMAGE, 12, 3, padding=1, groups=6, **BLOCK),
    _sample("kernel_larger", (2, 6, 3, 4), 8, 7, padding=4, activation="hardsigmoid"),
    _sample("residual", IMAGE, 10, 3, padding=1, residual=True, **BLOCK),
    _sample("residual_gelu", IMAGE, 10, 3, padding=1, residual=True, activation="gelu"),
    _sample("residual_last", IMAGE, 10, 3, padding=1, residual=True, residual_last=True, **BLOCK),
    _sample("no_bias", IMAGE, 10, 3, padding=1, bias=False, activation="leaky_relu", negative_slope=0.2),
    _sample("training", IMAGE, 10, 3, padding=1, training=True, **BLOCK),
    _sample("training_residual", IMAGE, 10, 3, padding=1, training=True, residual=True, **BLOCK),
    _sample("training_last", IMAGE, 10, 3, padding=1, training=True, residual=True, residual_last=True, **BLOCK),
    _sample("training_groups", IMAGE, 10, 3, padding=1, groups=2, training=True, **BLOCK),
    _sample("pool_max", IMAGE, 10, 3, padding=1, pool="max", **BLOCK),
    _sample("pool_average", IMAGE, 10, 3, padding=1, pool="average", **BLOCK),
    _sample("pool_stem", (2, 3, 15, 14), 12, 7, padding=3, stride=2, pool="max", pool_size=3, pool_stride=2, pool_padding=1, **BLOCK),
    _sample("pool_wide", (2, 20, 9, 10), 18, 3, padding=1, pool="max", residual=True, **BLOCK),
    _sample("pool_gelu", IMAGE, 10, 3, padding=1, pool="average", pool_size=(3, 2), pool_stride=(1, 2), activation="gelu"),
    _sample("pool_last", IMAGE, 10, 3, padding=1, pool="max", residual=True, residual_last=True, **BLOCK),
    _sample("pool_training", IMAGE, 10, 3, padding=1, pool="max", training=True, **BLOCK),
    _sample("pool_training_average", IMAGE, 10, 3, padding=1, pool="average", training=True, **BLOCK),
    _sample("pool_training_residual", IMAGE, 10, 3, padding=1, pool="max", training=True, residual=True, **BLOCK),
    _sample("nearest", IMAGE, 10, 3, padding=1, upsample="nearest", **BLOCK),
    _sample("nearest_wide", (2, 20, 9, 10), 18, 3, padding=1, upsample="nearest", pool="average", **BLOCK),
    _sample("nearest_groups", IMAGE, 10, 5, padding=1, groups=2, upsample="nearest", activation="silu"),
    _sample("nearest_stride", IMAGE, 10, 3, padding=3, stride=2, upsample="nearest", residual=True, **BLOCK),
    _sample("nearest_training", IMAGE, 10, 3, padding=1, upsample="nearest", training=True, **BLOCK),
    _sample("bilinear", IMAGE, 10, 3, padding=1, upsample="bilinear", pool="max", **BLOCK),
    _sample("bilinear_wide", (2, 20, 9, 10), 18, 3, padding=1, upsample="bilinear", **BLOCK),
    _sample("bilinear_training", IMAGE, 10, 3, padding=1, upsample="bilinear", training=True, **BLOCK),
    _sample("nchw", IMAGE, 10, 3, padding=1, layout="contiguous", **BLOCK),
    _sample("strided", IMAGE, 10, 3, padding=1, layout="strided", activation="silu"),
    _sample("expanded", IMAGE, 10, 3, padding=1, layout="expanded", activation="silu"),
    _sample("one_channel", (3, 1, 6, 5), 1, 3, padding=1, activation="silu"),
    _sample("one_pixel", (3, 10, 1, 1), 8, 3, padding=1, activation="silu"),
    _sample("no_images", (0, 6, 6, 5), 8, 3, padding=1, activation="silu"),
    _sample("one_dimension", (2, 6, 19), 8, 5, padding=2, stride=2, **BLOCK),
    _sample("one_dimension_residual", (2, 6, 19), 8, 5, padding=2, residual=True, **BLOCK),
    _sample("one_dimension_training", (2, 6, 19), 8, 5, padding=2, training=True, **BLOCK),
    _sample("three_dimensions", (2, 4, 5, 6, 7), 6, 3, padding=1, stride=(1, 2, 1), **BLOCK),
    _sample("three_dimensions_training", (2, 4, 5, 6, 7), 6, (1, 3, 2), training=True, **BLOCK),
    *(_sample(f"act_{name}", (2, 8, 6, 6), 8, 3, padding=1, activation=name) for name in NAMES),
    *(
        _sample(f"{N}x{C}x{size}_{O}k{K}".replace(" ", ""), (N, C, size, size), O, K, bench=True, **BLOCK, **rest)
        for N in (1, 8)
        for C, size, O, K, rest in LAYERS
    ),
)  # fmt: skip


def _cases(public: Callable, samples: tuple[Sample, ...]) -> Callable:
    def case(id, error, match, **change):
        def make():
            (x, weight, bias), kwargs = samples[0].make(torch.float32, "cpu")
            kwargs |= dict(weight=weight, bias=bias) | change
            return (kwargs.pop("input", x),), kwargs

        return ErrorCase(id, make, error, match)

    return case


z = torch.zeros
_case = _cases(conv_bn_act, SAMPLES)
ERRORS = (
    _case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
    _case("input_dim", ValueError, r"input: expected \[N, C\] and one to three spatial", input=z(4, 6)),
    _case("input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", input=z(2, 6, 9, 8, dtype=torch.int64)),
    _case("input_small", ValueError, r"input: \(1, 1\) is too small for kernel \(3, 3\)", input=z(2, 6, 1, 1), padding=0),
    _case("weight_shape", ValueError, r"weight: expected \[O, 6, \*kernel\]", weight=z(10, 5, 3, 3)),
    _case("weight_dim", ValueError, r"weight: expected \[O, 6, \*kernel\]", weight=z(10, 6, 3)),
    _case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32, got torch.float64", weight=z(10, 6, 3, 3).double()),
    _case("weight_device", ValueError, "weight: expected input's device cpu, got meta", weight=z(10, 6, 3, 3, device="meta")),
    _case("bias_shape", ValueError, r"bias: expected shape \(10,\)", bias=z(3)),
    _case("groups", ValueError, "groups: expected a divisor of input's 6 channels", groups=4),
    _case("groups_kind", TypeError, "groups: expected an int, got 1.5", groups=1.5),
    _case("stride_value", ValueError, "stride: expected 1 or more, got 0", stride=0),
    _case("stride_kind", TypeError, r"stride: expected an int or 2 ints, got \(1, 1, 1\)", stride=(1, 1, 1)),
    _case("dilation_value", ValueError, "dilation: expected 1 or more", dilation=(1, 0)),
    _case("padding_value", ValueError, "padding: expected 0 or more, got -1", padding=-1),
    _case("padding_name", ValueError, 'padding: expected "same", "valid" or numbers, got \'full\'', padding="full"),
    _case("padding_same_stride", ValueError, '"same" needs stride 1', padding="same", stride=2),
    _case("residual_shape", ValueError, r"residual: expected shape \(2, 10, 9, 8\)", residual=z(2, 10, 9, 7)),
    _case("activation", ValueError, "activation: expected one of none, relu.*got 'swish'", activation="swish"),
    _case("upsample", ValueError, 'upsample: expected None, "nearest" or "bilinear", got 2', upsample=2),
    _case("upsample_rank", ValueError, "upsample: enlarges images of two", input=z(2, 6, 9), weight=z(10, 6, 3), upsample="nearest"),
    _case("pool", ValueError, 'pool: expected None, "max" or "average", got \'avg\'', pool="avg"),
    _case("pool_rank", ValueError, "pool: pools images of two spatial", input=z(2, 6, 9), weight=z(10, 6, 3), pool="max"),
    _case("pool_size", ValueError, r"pool_size: windows of \(10, 10\) are larger", pool="max", pool_size=10),
    _case("pool_size_kind", TypeError, "pool_size: expected an int or 2 ints, got 1.5", pool="max", pool_size=1.5),
    _case("pool_stride", ValueError, "pool_stride: expected 1 or more, got 0", pool="max", pool_stride=0),
    _case("pool_padding", ValueError, r"pool_padding: expected at most half of pool_size \(2, 2\)", pool="max", pool_padding=2),
    _case("running_mean_alone", ValueError, "running_mean, running_var: expected both or neither", running_mean=z(10)),
    _case("bn_weight_alone", ValueError, "bn_weight: batch norm needs running_mean", bn_weight=z(10)),
    _case("one_value", ValueError, "expected more than 1 value per channel", input=z(1, 6, 1, 1), training=True),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)  # fmt: skip


def flops(input, weight, *_, transposed=False, **options) -> int:
    """Of the convolution; upsampling by repetition leaves 3x3 filters 4 products of 9."""
    size = input.shape if transposed else output_size(input, weight, **options)
    return 2 * size[0] * math.prod(size[2:]) * weight.numel()


def minimal_bytes(input, weight, *_, transposed=False, residual=None, **options) -> int:
    """Input, weight and residual read once, output written once."""
    N, O, *size = output_size(input, weight, transposed=transposed, **options)
    finished = math.prod(size)
    names = (name for name in ("size", "stride", "padding") if f"pool_{name}" in options)
    pool = _conv_checks.pooling("", options.get("pool"), len(size), **{name: options[f"pool_{name}"] for name in names})
    size = size if pool is None else list(_pool_ops.output_size(size, *pool[1:]))
    values = N * O * (math.prod(size) + (0 if residual is None else finished))
    return input.element_size() * (input.numel() + weight.numel() + values)


register(
    OpSpec(
        name="conv_bn_act",
        public=conv_bn_act,
        family="conv",
        ops=(
            "conv_run",
            "conv_wgrad",
            "conv_train_fwd",
            "conv_train_bwd",
            "winograd_pack",
            "winograd_infer",
            "winograd_into",
            "pool_run",
            "pool_reduce",
            "pool_grad",
            "batch_norm_act_pool_fwd",
            "batch_norm_act_pool_bwd",
        ),
        samples=SAMPLES,
        errors=ERRORS,
        flops=flops,
        bytes=minimal_bytes,
        baselines=conv_peers.PEERS,
        dtypes=DTYPES,
        backends=("cpu", "cuda", "triton", "vendor"),
    )
)

# ------------------------------------------------------------------------------------------------------------------- transposed


def _transposed(id: str, *args, **options) -> Sample:
    return _sample(id, *args, transposed=True, **options)


TRANSPOSED = (
    _transposed("plain", IMAGE, 10, 3, padding=1),
    _transposed("odd", (3, 7, 7, 5), 13, 5, padding=2, stride=2, bn=True, activation="silu"),
    _transposed("stride2", IMAGE, 8, 4, padding=1, stride=2, **BLOCK),
    _transposed("output_padding", IMAGE, 8, 3, padding=1, stride=2, output_padding=1, **BLOCK),
    _transposed("stride_1_3", IMAGE, 8, 3, stride=(1, 3), output_padding=(0, 2), activation="tanh"),
    _transposed("kernel_smaller", IMAGE, 8, 1, stride=2, **BLOCK),
    _transposed("dilated", IMAGE, 8, 3, stride=2, dilation=(2, 3), padding=(1, 2), **BLOCK),
    _transposed("groups", IMAGE, 10, 3, stride=2, groups=2, **BLOCK),
    _transposed("residual", IMAGE, 10, 3, padding=1, residual=True, **BLOCK),
    _transposed("residual_last", IMAGE, 10, 3, padding=1, residual=True, residual_last=True, **BLOCK),
    _transposed("training", IMAGE, 10, 4, padding=1, stride=2, training=True, **BLOCK),
    _transposed("nchw", IMAGE, 10, 3, padding=1, layout="contiguous", **BLOCK),
    _transposed("no_images", (0, 6, 6, 5), 8, 3, padding=1, activation="silu"),
    _transposed("one_dimension", (2, 6, 19), 8, 4, padding=1, stride=2, **BLOCK),
    _transposed("three_dimensions", (2, 4, 5, 3, 4), 6, 3, padding=1, stride=(1, 2, 1), **BLOCK),
    *(_transposed(f"{N}x{C}x{size}_{O}", (N, C, size, size), O, 4, bench=True, padding=1, stride=2, **BLOCK)
      for N in (1, 8) for C, size, O in ((64, 14, 32), (256, 16, 128))),
)  # fmt: skip
_case = _cases(conv_transpose_bn_act, TRANSPOSED)
TRANSPOSED_ERRORS = (
    _case("input_kind", TypeError, "input: expected a Tensor, got list", input=[1.0]),
    _case("input_dim", ValueError, r"input: expected \[N, C\] and one to three spatial", input=z(4, 6)),
    _case("weight_shape", ValueError, r"weight: expected \[6, O/groups, \*kernel\]", weight=z(5, 10, 3, 3)),
    _case("weight_dtype", ValueError, "weight: expected input's dtype torch.float32", weight=z(6, 10, 3, 3).double()),
    _case("bias_shape", ValueError, r"bias: expected shape \(10,\)", bias=z(6)),
    _case("groups", ValueError, "groups: expected a divisor of input's 6 channels", groups=4),
    _case("stride_value", ValueError, "stride: expected 1 or more, got 0", stride=0),
    _case("padding_name", TypeError, "padding: expected an int or 2 ints, got 'same'", padding="same"),
    _case("output_padding", ValueError, "output_padding: expected less than stride or dilation, got 1", output_padding=1),
    _case("residual_shape", ValueError, r"residual: expected shape \(2, 10, 9, 8\)", residual=z(2, 10, 9, 7)),
    _case("input_small", ValueError, r"input: \(1, 1\) is too small", input=z(2, 6, 1, 1), padding=2),
    _case("activation", ValueError, "activation: expected one of none, relu", activation="swish"),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)  # fmt: skip


def _eager(args, kwargs):
    return lambda: conv_transpose_bn_act(*args, **kwargs, backend="eager")


register(
    OpSpec(
        name="conv_transpose_bn_act",
        public=conv_transpose_bn_act,
        family="conv",
        ops=("conv_transpose_run", "conv_transpose_train_fwd", "conv_transpose_train_bwd"),
        samples=TRANSPOSED,
        errors=TRANSPOSED_ERRORS,
        flops=lambda *args, **kwargs: flops(*args, transposed=True, **kwargs),
        bytes=lambda *args, **kwargs: minimal_bytes(*args, transposed=True, **kwargs),
        baselines={"torch.nn": _eager},
        dtypes=DTYPES,
        backends=("cpu", "cuda", "triton", "vendor"),
    )
)
