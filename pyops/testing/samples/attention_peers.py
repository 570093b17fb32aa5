"""What attention is timed against: plain PyTorch, its scaled_dot_product_attention, torch.compile of both, ONNX Runtime and OpenVINO.

A peer gets query, key and value [B, H, N, D] contiguous, the layout it likes best, and only calls that its users could write: no lengths,
windows or grouped heads but through PyTorch's op and the mask it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyops.ops import _window_attention_ops
from pyops.ops.flash_attention import flash_attention
from pyops.ops.window_attention import prepare
from pyops.testing.samples.conv_peers import frozen, onnxruntime_of, openvino_of


class Naive(nn.Module):
    """As users write it."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1), -math.inf)
        return (scores if bias is None else scores + bias).softmax(-1) @ value


class Sdpa(nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=self.causal)


def _inputs(args, kwargs, kind: type[nn.Module]) -> list[Tensor]:
    """query, key, value and the bias if there is one. Raises ValueError for what only a mask could express."""
    other = set(kwargs) - {"attn_bias", "is_causal"}
    if other:
        raise ValueError(f"has no {', '.join(sorted(other))}")
    if kind is Sdpa and {"attn_bias", "is_causal"} <= set(kwargs):
        raise ValueError("takes a bias or is_causal")
    heads = args if len(args) == 3 else args[0].permute(2, 0, 3, 1, 4)
    return [*heads, *([kwargs["attn_bias"]] if "attn_bias" in kwargs else [])]


def _eager(kind: type[nn.Module], compiled: bool = False) -> Callable:
    def factory(args, kwargs):
        inputs = _inputs(args, kwargs, kind)
        live = any(t.requires_grad for t in inputs)
        if not live:
            inputs = [t.contiguous() for t in inputs]
        module = kind(kwargs.get("is_causal", False))
        call = module if not compiled else torch.compile(module) if live else frozen(module, *inputs)
        return lambda: call(*inputs)

    return factory


def _vendor(args, kwargs):
    """PyTorch's op, with a mask where the call needs one."""
    try:
        return _eager(Sdpa)(args, kwargs)
    except ValueError:
        return lambda: flash_attention(*args, **kwargs, backend="vendor")


def _exported(run: Callable) -> Callable:
    def factory(args, kwargs):
        inputs = _inputs(args, kwargs, Naive)
        if inputs[0].device.type != "cpu" or any(t.requires_grad for t in inputs):
            raise ValueError("inference on a CPU only")
        return run(Naive(kwargs.get("is_causal", False)), *inputs)

    return factory


PEERS: dict[str, Callable] = {
    "torch naive": _eager(Naive),
    "torch sdpa": _vendor,
    "torch.compile": _eager(Naive, compiled=True),
    "torch.compile sdpa": _eager(Sdpa, compiled=True),
    "onnxruntime": _exported(onnxruntime_of),
    "openvino": _exported(openvino_of),
}


class SwinAttention(nn.Module):
    """What torchvision does between its qkv and proj layers: pad, roll, partition, attend, and back."""

    def __init__(self, args, kwargs, sdpa: bool):
        super().__init__()
        if "dropout_p" in kwargs:
            raise ValueError("has no dropout by seed")
        qkv, self.heads, window, shift = args
        self.table, self.qkv_bias = kwargs.get("relative_position_bias_table"), kwargs.get("qkv_bias")
        self.logit_scale = kwargs.get("logit_scale")
        call = prepare(qkv, self.heads, window, shift, self.table, self.qkv_bias, None, kwargs.get("scale"), 0.0, None)
        self.w = _window_attention_ops.Windows.of(qkv.shape[1:3], call.window, call.shift)
        self.kind = Sdpa(False) if sdpa else Naive(False)
        self.images = qkv.shape[0]
        self.index = _window_attention_ops.relative_index(self.w.window, qkv.device)
        apart = _window_attention_ops.regions(self.w, qkv.device)
        mask = None if apart is None else (apart.to(qkv.dtype) * _window_attention_ops.MASKED)[:, None]
        self.mask = None if mask is None else mask.repeat(qkv.shape[0], 1, 1, 1)

    def forward(self, qkv: Tensor) -> Tensor:
        w = self.w
        tokens = _window_attention_ops.partition(_window_attention_ops.pad(qkv, self.qkv_bias, w), w)
        query, key, value = tokens.view(*tokens.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.logit_scale is not None:
            logits = self.logit_scale.clamp(max=math.log(100.0)).exp() * query.shape[-1] ** 0.5  # the call below takes that root away
            query, key = F.normalize(query, dim=-1) * logits, F.normalize(key, dim=-1)
        bias = None if self.table is None else self.table[self.index].permute(2, 0, 1).to(qkv.dtype)[None]
        if self.mask is not None:
            bias = self.mask if bias is None else bias + self.mask
        whole = _window_attention_ops.reverse(self.kind(query, key, value, bias).transpose(1, 2).flatten(2), w, self.images)
        return whole[:, : w.size[0], : w.size[1]].contiguous()


def _windows(sdpa: bool, compiled: bool = False) -> Callable:
    def factory(args, kwargs):
        module, qkv = SwinAttention(args, kwargs, sdpa), args[0]
        call = module if not compiled else torch.compile(module) if qkv.requires_grad else frozen(module, qkv)
        return lambda: call(qkv)

    return factory


def _exported_windows(run: Callable) -> Callable:
    def factory(args, kwargs):
        qkv = args[0]
        if qkv.device.type != "cpu" or qkv.requires_grad:
            raise ValueError("inference on a CPU only")
        return run(SwinAttention(args, kwargs, sdpa=False), qkv)

    return factory


WINDOW_PEERS: dict[str, Callable] = {
    "torch naive": _windows(False),
    "torch sdpa": _windows(True),
    "torch.compile": _windows(False, compiled=True),
    "onnxruntime": _exported_windows(onnxruntime_of),
    "openvino": _exported_windows(openvino_of),
}
