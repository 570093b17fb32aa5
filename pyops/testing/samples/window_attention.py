"""Samples of window_attention."""

from __future__ import annotations

import torch

from pyops.ops.window_attention import window_attention
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register
from pyops.testing.samples.attention_peers import WINDOW_PEERS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def window_arguments(
    B, H, W, heads, D, window, dtype, device, seed=0, *, shift=0, table=True, bias=True, cosine=False, drop=None, **options
):
    pair = (window, window) if isinstance(window, int) else window
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * H + 100 * W + 10 * heads + D)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    C = heads * D
    qkv, biases = rand(B, H, W, 3 * C), rand(3 * C)
    values = rand((2 * pair[0] - 1) * (2 * pair[1] - 1), heads)
    kwargs: dict = dict(options)
    if drop is not None:
        kwargs |= {"dropout_p": drop[0], "seed": drop[1]}
    if table:
        kwargs["relative_position_bias_table"] = values.to(device, dtype)
    if bias:
        kwargs["qkv_bias"] = biases.to(device, dtype)
    if cosine:
        kwargs["logit_scale"] = (rand(heads, 1, 1) * 0.5 + 2.3).to(device, dtype)
    return (qkv.to(device, dtype), heads, window, shift), kwargs


def _windows(id: str, B: int, H: int, W: int, heads: int, D: int, window, *, bench: bool = False, **options) -> Sample:
    make = lambda dtype, device, seed=0: window_arguments(B, H, W, heads, D, window, dtype, device, seed, **options)  # noqa: E731
    return Sample(id, make, bench, not bench)


# Swin-T at 224: heads, size
STAGES = ((3, 56), (6, 28), (12, 14), (24, 7))
SAMPLES = (
    _windows("plain", 2, 8, 12, 2, 16, 4),
    _windows("odd", 1, 13, 9, 3, 8, (5, 4), shift=(2, 1)),
    _windows("wide", 2, 14, 14, 3, 32, 7, shift=3),
    _windows("no_bias", 2, 9, 10, 2, 16, 4, shift=2, bias=False),
    _windows("no_table", 1, 8, 8, 2, 16, 4, shift=2, table=False, bias=False),
    _windows("one_window", 2, 5, 6, 2, 16, 7, shift=3),  # no shift: the window covers the map
    _windows("one_row", 1, 3, 20, 2, 16, (4, 6), shift=(2, 3)),  # shifted along one side
    _windows("cosine", 2, 8, 12, 2, 16, 4, cosine=True),
    _windows("cosine_shift_pad", 1, 13, 11, 3, 32, 8, shift=4, cosine=True),
    _windows("cosine_no_bias", 1, 9, 10, 2, 16, 4, shift=2, bias=False, cosine=True),  # tokens beyond the map of norm zero
    _windows("scale", 1, 8, 8, 1, 24, 4, scale=0.5),
    _windows("dropout", 2, 8, 8, 2, 16, 4, shift=2, drop=(0.25, 77)),
    _windows("one_token", 1, 3, 3, 2, 8, 1),
    _windows("large_window", 1, 20, 16, 2, 32, 16, shift=8),
    _windows("head_40", 1, 8, 8, 2, 40, 4, shift=1),
    _windows("no_images", 0, 8, 8, 2, 16, 4),
    *(_windows(f"swin_s{n}", 8, size, size, heads, 32, 7, bench=True, shift=3) for n, (heads, size) in enumerate(STAGES, 1)),
    _windows("swin_s1_b1", 1, 56, 56, 3, 32, 7, bench=True, shift=3),
    _windows("swin_v2_s1", 8, 64, 64, 3, 32, 8, bench=True, shift=4, cosine=True),
    _windows("swin_padded", 2, 100, 76, 3, 32, 7, bench=True, shift=3),
)


def _case(id: str, error: type[Exception], match: str, position: int | None = None, value=None, **change) -> ErrorCase:
    def make():
        args, kwargs = SAMPLES[0].make(torch.float32, "cpu")
        if position is not None:
            args = (*args[:position], value, *args[position + 1 :])
        return args, kwargs | change

    return ErrorCase(id, make, error, match)


_z = torch.zeros
ERRORS = (
    _case("qkv_kind", TypeError, "qkv: expected a Tensor, got list", 0, [1.0]),
    _case("qkv_dim", ValueError, r"qkv: expected \[B, H, W, 3 \* C\], got shape", 0, _z(8, 12, 96)),
    _case("qkv_dtype", ValueError, "qkv: expected a floating tensor, got torch.int64", 0, _z(2, 8, 12, 96).long()),
    _case("heads_kind", TypeError, "num_heads: expected an int, got 2.0", 1, 2.0),
    _case("heads", ValueError, "num_heads: expected a number with qkv's 96 channels a multiple of 3 \\* num_heads, got 5", 1, 5),
    _case("window_kind", TypeError, "window_size: expected an int or two, got 'a'", 2, "a"),
    _case("window_value", ValueError, "window_size: expected 1 or more, got 0", 2, 0),
    _case("shift_value", ValueError, r"shift_size: expected less than the window \(4, 4\), got 4", 3, 4),
    _case("shift_negative", ValueError, "shift_size: expected 0 or more, got -1", 3, -1),
    _case("table_shape", ValueError, r"relative_position_bias_table: expected shape \(49, 2\), got \(49, 3\)",
          relative_position_bias_table=_z(49, 3)),
    _case("bias_shape", ValueError, r"qkv_bias: expected shape \(96,\), got \(32,\)", qkv_bias=_z(32)),
    _case("logit_shape", ValueError, r"logit_scale: expected shape \(2,\), got \(3,\)", logit_scale=_z(3)),
    _case("scale_both", ValueError, "scale: expected None beside logit_scale, got 1.0", logit_scale=_z(2), scale=1.0),
    _case("dropout", ValueError, "dropout_p: expected 0 to 1, got 2", dropout_p=2),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)  # fmt: skip


def _flops(qkv, num_heads, window_size, *_, **__) -> int:
    tokens = window_size**2 if isinstance(window_size, int) else window_size[0] * window_size[1]
    return 4 * qkv.numel() // 3 * tokens


register(
    OpSpec(
        name="window_attention",
        public=window_attention,
        family="attention",
        ops=("window_attention_into", "window_attention_grad_into", "window_attention_fwd", "window_attention_bwd"),
        samples=SAMPLES,
        errors=ERRORS,
        flops=_flops,
        bytes=lambda qkv, *_, **__: 4 * qkv.numel() // 3 * qkv.element_size(),
        baselines=WINDOW_PEERS,
        dtypes=DTYPES,
        learned=("relative_position_bias_table", "qkv_bias", "logit_scale"),
    )
)
