"""Attention's kernels through ctypes, with the arguments and results of the torch ops they are behind.

Works on the host build of csrc/attention with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops import _attention_checks, _attention_limits, _attention_reference, _philox, _window_attention_ops, window_attention
from pyops.ops.flash_attention import Call
from pyops.testing.samples.attention import SAMPLES as ALL_SAMPLES
from pyops.testing.samples.window_attention import SAMPLES as ALL_WINDOW_SAMPLES
from pyops.testing.samples.window_attention import window_arguments

from ..conftest import assert_gate
from .depthwise import I32, I64, P, pointer
from .harness import checked

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
BIAS_TYPES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.bool: 4}
F32, U32 = ctypes.c_float, ctypes.c_uint32

# ---------------------------------------------------------------------------------------- csrc/attention's headers, for ctypes


class Heads(ctypes.Structure):
    _fields_ = [("data", P), *((name, I64) for name in ("batch", "head", "row"))]


class Bias(ctypes.Structure):
    _fields_ = [("data", P), ("dtype", I32), ("sizes", I64 * 4), ("strides", I64 * 4)]


class Attention(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("B", "H", "G", "N", "M", "D", "S", "left", "right")]
    _fields_ += [("dtype", I32), ("scale", F32), ("softcap", F32), *((name, Heads) for name in ("query", "key", "value", "output"))]
    _fields_ += [("lse", P), ("bias", Bias), ("slopes", P), ("slopes_sequence", I64), ("spans", P), ("seed", P)]
    _fields_ += [("threshold", U32), ("dropout_factor", F32)]


class WindowAttention(ctypes.Structure):
    _fields_ = [(name, I64) for name in ("B", "H", "W", "heads", "D", "wh", "ww", "shift_h", "shift_w", "rows", "columns")]
    _fields_ += [("dtype", I32), ("scale", F32), ("keep_scale", F32), ("threshold", U32)]
    _fields_ += [(name, P) for name in ("seed", "qkv", "grad", "qkv_bias", "table", "logit_scale", "output", "lse", "grad_qkv")]
    _fields_ += [(name, P) for name in ("grad_qkv_bias", "grad_table", "grad_logit_scale")]


def neighbours(t):
    """Itself where a row's elements are neighbours, else a copy in which they are: what the torch glue does."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()


def heads(t):
    return Heads(t.data_ptr(), *t.stride()[:3])


def bias_of(bias):
    if bias is None:
        return Bias()
    strides = [0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True)]
    return Bias(bias.data_ptr(), BIAS_TYPES[bias.dtype], (I64 * 4)(*bias.shape), (I64 * 4)(*strides))


def block(query, key, value, bias, slopes, spans, seed, options, output, lse):
    """Attention's parameter block. The tensors must outlive it."""
    B, H, N, D = query.shape
    p = Attention(B, H, key.shape[1], N, key.shape[2], D, B if spans is None else spans.shape[0], options.left, options.right)
    p.dtype, p.scale, p.softcap = DTYPES[query.dtype], options.scale, options.softcap
    p.query, p.key, p.value, p.output = map(heads, (query, key, value, output))
    p.lse, p.bias, p.slopes, p.spans = lse.data_ptr(), bias_of(bias), pointer(slopes), pointer(spans)
    p.slopes_sequence = 0 if slopes is None or slopes.shape[0] == 1 else H
    if options.dropout_p:
        p.seed, p.threshold, p.dropout_factor = seed.data_ptr(), _philox.threshold(options.dropout_p), 1 / (1 - options.dropout_p)
    return p


def window_block(qkv, qkv_bias, table, logit_scale, seed, heads, window, shift, scale, dropout_p, lse):
    w = _window_attention_ops.Windows.of(qkv.shape[1:3], window, shift)
    counts = (whole // side for whole, side in zip(w.padded, window, strict=True))
    p = WindowAttention(*qkv.shape[:3], heads, qkv.shape[3] // 3 // heads, *window, *shift, *counts)
    p.dtype, p.scale, p.keep_scale = DTYPES[qkv.dtype], scale, 1 / (1 - dropout_p)
    p.threshold = _philox.threshold(dropout_p) if dropout_p else 0
    p.seed, p.qkv, p.qkv_bias, p.table, p.logit_scale, p.lse = map(pointer, (seed, qkv, qkv_bias, table, logit_scale, lse))
    return p


class Kernels:
    """attention, window_attention: pyops::attention_into and window_attention_into, their results poisoned before."""

    def __init__(self, library):
        self.library = library

    def attention(self, call, output=None):
        query, key, value = map(neighbours, call.heads())
        poison = lambda *size, **k: torch.full(size, float("nan"), device=query.device, **k)  # noqa: E731
        if output is None:
            output = poison(*query.shape, dtype=query.dtype)
        lse = poison(*query.shape[:3], dtype=torch.float32)
        p = block(query, key, value, *call[3:], output, lse)
        if output.numel():
            checked(self.library.host_attention, ctypes.byref(p))
        return output, lse

    def window_attention(self, call):
        w = _window_attention_ops.Windows.of(call.qkv.shape[1:3], call.window, call.shift)
        poison = lambda *size, **k: torch.full(size, float("nan"), device=call.qkv.device, **k)  # noqa: E731
        output = poison(*call.qkv.shape[:3], call.qkv.shape[3] // 3, dtype=call.qkv.dtype)
        lse = poison(call.qkv.shape[0] * w.total, call.heads, w.tokens, dtype=torch.float32)
        p = window_block(*call, lse)
        p.output = output.data_ptr()
        checked(self.library.host_window_attention, ctypes.byref(p))
        return output, lse


# ------------------------------------------------------------------------------------------------------- held to the numerics gate


def prepared(
    query, key=None, value=None, attn_bias=None, is_causal=False, scale=None, window=None, softcap=None, alibi_slopes=None, dropout_p=0.0,
    enable_gqa=False, query_lengths=None, key_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, seed=None, return_lse=False,
):  # fmt: skip
    """The `Call` of flash_attention's arguments."""
    arguments = (attn_bias, is_causal, scale, window, softcap, alibi_slopes, dropout_p, enable_gqa)
    lengths = (query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k)
    return _attention_checks.prepare("flash_attention", Call, query, key, value, *arguments, *lengths, seed)


def fits(sample):
    args, kwargs = sample.make(torch.bfloat16, "cpu")
    return _attention_limits.unsupported(prepared(*args, **kwargs), "cuda") is None


SAMPLES = {sample.id: sample for sample in ALL_SAMPLES if sample.test and fits(sample)}
WINDOW_SAMPLES = {sample.id: sample for sample in ALL_WINDOW_SAMPLES if sample.test}


def double(call):
    """The same call in float64 on the CPU."""
    wide = lambda t: t.cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t  # noqa: E731
    return type(call)(*(wide(t.cpu() if isinstance(t, torch.Tensor) else t) for t in call))


def reference(call):
    return _attention_reference.forward(*call.heads(), *call[3:])


def gate(kernels, make, dtype, device="cpu"):
    """make(dtype, device, seed): flash_attention's arguments."""

    def results(seed):
        kernels.library.host_machine(seed, (1, 3, 200)[seed % 3], 163 * 1024)
        args, kwargs = make(dtype, device, seed)
        call = prepared(*args, **kwargs)
        return kernels.attention(call), reference(double(call)), reference(call)

    assert_gate(results, dtype)


def window_gate(kernels, make, dtype, device="cpu"):
    def results(seed):
        kernels.library.host_machine(seed, (1, 3, 200)[seed % 3], 163 * 1024)
        call = window_call(make, dtype, device, seed)
        return kernels.window_attention(call), _window_attention_ops.forward(*double(call)), _window_attention_ops.forward(*call)

    assert_gate(results, dtype)


def window_call(make, dtype, device="cpu", seed=0):
    args, kwargs = make(dtype, device, seed)
    names = ("relative_position_bias_table", "qkv_bias", "logit_scale", "scale")
    given = (kwargs.get(name) for name in names)
    return window_attention.prepare(*args, *given, kwargs.get("dropout_p", 0.0), kwargs.get("seed"))


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 1, 163 * 1024)
    for dtype in DTYPES:
        for D in (32, 64, 128):
            query = torch.zeros(1, 1, 113, D, dtype=dtype)
            lengths = torch.tensor([100])
            kernels.attention(prepared(query, query, query, query_lengths=lengths))
            make = lambda *_, D=D, dtype=dtype: window_arguments(1, 8, 16, 1, D, (8, 16), dtype, "cpu")  # noqa: E731
            kernels.window_attention(window_call(make, dtype))
