"""Samples of the norms over the channels of images: local response normalisation and LayerNorm."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyops.ops.layer_norm_2d import layer_norm_2d
from pyops.ops.local_response_norm import local_response_norm
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _rand(size, dtype, device, seed, count: int = 1, scale: float = 1.0, shift: float = 0.0) -> list[torch.Tensor]:
    """An image, and vectors of its channels: the same values in every dtype, but for rounding."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * size[-1] + 10 * size[1] + size[0])
    image = torch.randn(*size, generator=generator, dtype=torch.float64) * scale + shift
    vectors = [torch.randn(size[1], generator=generator, dtype=torch.float64) + 1.0 for _ in range(count - 1)]
    return [t.to(device, dtype) for t in (image, *vectors)]


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":  # every other column of a wider tensor
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":
        return x[:, :, :1].expand_as(x)
    return x


def _torch(public: Callable, compiled: bool = False):
    """PyTorch's own ops for the call, as they are or through the compiler."""

    def factory(args, kwargs):
        call = lambda *a: public(*a, **kwargs, backend="eager")  # noqa: E731
        call = torch.compile(call) if compiled else call
        return lambda: call(*args)

    return factory


def _case(samples: tuple[Sample, ...], id: str, error: type[Exception], match: str, position: int | None = None, value=None, **change):
    """The first sample's call with an argument replaced."""

    def make():
        args, kwargs = samples[0].make(torch.float32, "cpu")
        if position is not None:
            args = (*args[:position], value, *args[position + 1 :])
        return args, kwargs | change

    return ErrorCase(id, make, error, match)


# ---------------------------------------------------------------------------------------------------- local response normalisation


def lrn_arguments(size, window, dtype, device, seed=0, *, layout="contiguous", **options):
    x = _rand(size, dtype, device, seed, scale=2.0, shift=0.25)[0]
    return (_laid_out(x, layout), window), dict(options)


def _lrn(id: str, size: tuple[int, ...], window: int, *, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: lrn_arguments(size, window, dtype, device, seed, **options), bench, not bench)


ALEXNET: dict = dict(alpha=1e-4, beta=0.75, k=2.0, activation="relu")
STRONG: dict = dict(alpha=0.5, k=1.5)  # where the norm is much of the result
# channels, size: AlexNet's two norms, GoogLeNet's two
LRN_LAYERS = ((96, 55), (256, 27), (64, 56), (192, 56))
LRN_SAMPLES = (
    _lrn("plain", (2, 9, 5, 6), 5, **STRONG),
    _lrn("odd", (3, 37, 7, 5), 3, layout="channels_last", activation="relu", **STRONG),
    _lrn("wide", (2, 130, 9, 17), 5, layout="channels_last", **STRONG),
    _lrn("wide_planes", (2, 67, 23, 17), 5, activation="relu", **STRONG),
    _lrn("alexnet", (2, 48, 11, 11), 5, **ALEXNET),
    _lrn("alexnet_last", (2, 48, 11, 11), 5, layout="channels_last", **ALEXNET),
    *(
        _lrn(f"size{window}_{layout}", (2, 19, 4, 5), window, layout=layout, **STRONG)
        for window in (1, 2, 4, 7, 50)
        for layout in ("contiguous", "channels_last")
    ),
    *(
        _lrn(f"beta_{beta}_{layout}", (2, 21, 6, 3), 5, beta=beta, layout=layout, activation="relu", **STRONG)
        for beta in (0.5, 1.0, 0.6, 2.25)
        for layout in ("contiguous", "channels_last")
    ),
    _lrn("strided", (2, 18, 5, 6), 5, layout="strided", **STRONG),
    _lrn("expanded", (2, 18, 5, 6), 5, layout="expanded", **STRONG),
    _lrn("one_dimension", (2, 18, 13), 5, activation="relu", **STRONG),
    _lrn("one_dimension_last", (2, 18, 13), 5, layout="channels_last", **STRONG),
    _lrn("three_dimensions", (2, 6, 3, 4, 5), 3, **STRONG),
    _lrn("three_dimensions_last", (2, 6, 3, 4, 5), 4, layout="channels_last", **STRONG),
    _lrn("one_channel", (3, 1, 6, 5), 5, activation="relu", **STRONG),
    _lrn("one_position", (9, 20, 1, 1), 5, **STRONG),
    _lrn("no_images", (0, 6, 6, 5), 5, **STRONG),
    *(
        _lrn(f"{N}x{C}x{size}{'_last' if layout == 'channels_last' else ''}", (N, C, size, size), 5, bench=True, layout=layout, **ALEXNET)
        for N in (1, 8)
        for C, size in LRN_LAYERS
        for layout in ("contiguous", "channels_last")
    ),
)
_z = torch.zeros
_X = _z(2, 9, 5, 6)
LRN_ERRORS = (
    _case(LRN_SAMPLES, "input_kind", TypeError, "input: expected a Tensor, got list", 0, [1.0]),
    _case(LRN_SAMPLES, "input_dim", ValueError, r"input: expected \[N, C\] and one more dimension", 0, _z(4, 6)),
    _case(LRN_SAMPLES, "input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", 0, _X.long()),
    _case(LRN_SAMPLES, "size_kind", TypeError, "size: expected an int, got 5.0", 1, 5.0),
    _case(LRN_SAMPLES, "size_value", ValueError, "size: expected 1 or more, got 0", 1, 0),
    _case(LRN_SAMPLES, "size_bool", TypeError, "size: expected an int, got True", 1, True),
    _case(LRN_SAMPLES, "alpha_kind", TypeError, "alpha: expected a number, got None", alpha=None),
    _case(LRN_SAMPLES, "beta_kind", TypeError, "beta: expected a number, got '1'", beta="1"),
    _case(LRN_SAMPLES, "activation", ValueError, "activation: expected one of none, relu, got 'silu'", activation="silu"),
    _case(LRN_SAMPLES, "backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)

register(
    OpSpec(
        name="local_response_norm",
        public=local_response_norm,
        family="norm",
        ops=("lrn_run", "lrn_grad", "lrn_fwd", "lrn_bwd"),
        samples=LRN_SAMPLES,
        errors=LRN_ERRORS,
        flops=lambda input, size, *_, **__: (size + 8) * input.numel(),
        bytes=lambda input, *_, **__: 2 * input.numel() * input.element_size(),
        baselines={"torch.nn": _torch(local_response_norm), "torch.compile": _torch(local_response_norm, compiled=True)},
        dtypes=DTYPES,
    )
)

# ------------------------------------------------------------------------------------------------------------------------ LayerNorm


def layer_norm_arguments(
    size, dtype, device, seed=0, *, layout="contiguous", weight=True, bias=True, vectors=None, scale=1.5, shift=0.5, **options
):
    x, w, b = _rand(size, dtype, device, seed, 3, scale=scale, shift=shift)
    w, b = (t if vectors is None else t.to(vectors) for t in (w, b))
    return (_laid_out(x, layout), w if weight else None, b if bias else None), dict(options)


def _layer(id: str, *size: int, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: layer_norm_arguments(size, dtype, device, seed, **options), bench, not bench)


# ConvNeXt-T's channels and sizes
LAYER_NORM_LAYERS = ((96, 56), (192, 28), (384, 14), (768, 7))
LAYER_NORM_SAMPLES = (
    _layer("plain", 2, 9, 5, 6),
    _layer("odd", 3, 37, 7, 5, layout="channels_last", eps=1e-6),
    _layer("wide", 2, 600, 3, 5, layout="channels_last"),
    _layer("wide_planes", 2, 300, 9, 17),
    _layer("large_planes", 2, 5, 67, 61),
    _layer("large_rows", 2, 5, 67, 61, layout="channels_last"),
    _layer("no_affine", 2, 20, 8, 7, weight=False, bias=False),
    _layer("no_affine_last", 2, 20, 8, 7, weight=False, bias=False, layout="channels_last"),
    _layer("no_bias", 2, 20, 8, 7, bias=False),
    _layer("no_weight", 2, 20, 8, 7, weight=False, layout="channels_last"),
    _layer("float32_affine", 2, 20, 8, 7, vectors=torch.float32, layout="channels_last"),
    _layer("far_mean", 2, 40, 8, 7, shift=30.0),
    _layer("far_mean_last", 2, 40, 8, 7, shift=30.0, layout="channels_last"),
    _layer("strided", 2, 20, 8, 7, layout="strided"),
    _layer("expanded", 2, 20, 8, 7, layout="expanded"),
    _layer("two_channels", 3, 2, 6, 5),
    _layer("one_channel", 3, 1, 6, 5),
    _layer("one_position", 9, 20, 1, 1),
    _layer("no_images", 0, 6, 6, 5),
    *(
        _layer(f"{N}x{C}x{size}{'_last' if layout == 'channels_last' else ''}", N, C, size, size, bench=True, layout=layout)
        for N in (1, 8)
        for C, size in LAYER_NORM_LAYERS
        for layout in ("contiguous", "channels_last")
    ),
)
LAYER_NORM_ERRORS = (
    _case(LAYER_NORM_SAMPLES, "input_kind", TypeError, "input: expected a Tensor, got list", 0, [1.0]),
    _case(LAYER_NORM_SAMPLES, "input_dim", ValueError, r"input: expected \[N, C, H, W\]", 0, _z(4, 9, 6)),
    _case(LAYER_NORM_SAMPLES, "input_dtype", ValueError, "input: expected a floating tensor, got torch.int64", 0, _X.long()),
    _case(LAYER_NORM_SAMPLES, "input_channels", ValueError, "input: expected 1 channel or more", 0, _z(2, 0, 3, 3)),
    _case(LAYER_NORM_SAMPLES, "weight_kind", TypeError, "weight: expected a Tensor or None, got float", 1, 1.0),
    _case(LAYER_NORM_SAMPLES, "weight_shape", ValueError, r"weight: expected shape \(9,\), got \(3,\)", 1, _z(3)),
    _case(LAYER_NORM_SAMPLES, "weight_dtype", ValueError, "weight: expected float32 or input's dtype", 1, _z(9).double()),
    _case(LAYER_NORM_SAMPLES, "bias_shape", ValueError, r"bias: expected shape \(9,\), got \(8,\)", 2, _z(8)),
    _case(LAYER_NORM_SAMPLES, "bias_device", ValueError, "bias: expected input's device cpu, got meta", 2, _z(9, device="meta")),
    _case(LAYER_NORM_SAMPLES, "backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)

register(
    OpSpec(
        name="layer_norm_2d",
        public=layer_norm_2d,
        family="norm",
        ops=("layer_norm_run", "layer_norm_grad", "layer_norm_fwd", "layer_norm_bwd"),
        samples=LAYER_NORM_SAMPLES,
        errors=LAYER_NORM_ERRORS,
        flops=lambda input, *_, **__: 8 * input.numel(),
        bytes=lambda input, *_, **__: 2 * input.numel() * input.element_size(),
        baselines={"torch.nn": _torch(layer_norm_2d), "torch.compile": _torch(layer_norm_2d, compiled=True)},
        dtypes=DTYPES,
    )
)
