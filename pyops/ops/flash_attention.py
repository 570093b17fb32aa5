"""Scaled dot-product attention: any lengths and head sizes, masks, learnable bias, packed and ragged batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyops import _backends
from pyops.ops import (
    _attention_checks,
    _attention_limits,
    _attention_reference,
    _attention_train,
    _attention_vendor,
    _conv_call,
    _fused_ops,
)
from pyops.ops._sharding import is_sharded

OP = "flash_attention"


class Call(NamedTuple):
    """A call as `_attention_ops` takes it: query [B, H, N, D], or packed [B, N, 3, H, D] without key and value."""

    query: Tensor
    key: Tensor | None
    value: Tensor | None
    bias: Tensor | None
    slopes: Tensor | None
    spans: Tensor | None
    seed: Tensor | None  # None with dropout: to be drawn
    options: _attention_reference.Options

    def tensors(self) -> tuple:
        return self[:7]

    def heads(self) -> tuple[Tensor, ...]:
        return _attention_train.heads(self.query, self.key, self.value)


def flash_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    attn_bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    enable_gqa: bool = False,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""``softmax(scale * query @ key.T + attn_bias) @ value``, without the matrix of scores in memory.

    Args:
        query, key, value: ``[B, H, N, D]``, ``[B, H_k, M, D]``, ``[B, H_k, M, D_v]`` of one dtype: float32, bfloat16, float16 or float64
            (the last on "eager" only), any strides. Or `query` alone, packed: ``[B, N, 3, H, D]``, read where it lies, its gradient
            written as one tensor. With `cu_seqlens_q` the ragged forms ``[total, H, D]`` and ``[total, 3, H, D]``. The kernels take
            D = D_v up to 256, in any number; PyTorch's op serves the others.
        attn_bias: added to the scores, of 2 to 4 dimensions that broadcast to ``[B, H, N, M]`` (ragged: ``[sequences, H, longest n,
            longest m]`` or larger, indexed within a sequence), of any floating dtype; its gradient has its own shape and is
            deterministic. Or bool: True where a query sees a key.
        is_causal: query i sees keys j <= i + m - n: the last query sees all, as with `torch.nn.attention.bias.causal_lower_right`.
            (``F.scaled_dot_product_attention(is_causal=True)`` differs when n != m: there the first query sees one key.)
        scale: of the products; None: ``1 / sqrt(D)``.
        window: (left, right): query i sees keys from i + m - n - left to i + m - n + right; None in it: all on that side.
        softcap: scores become ``softcap * tanh(scores / softcap)`` before any bias.
        alibi_slopes: ``[H]`` or ``[B, H]`` float32, without gradient: ``slope * |i + m - n - j|`` is taken from the scores.
        dropout_p: the share of softmax's results set to zero, the others divided by ``1 - dropout_p``.
        enable_gqa: allow H to be a multiple of H_k: query head h reads key head ``h * H_k // H``.
        query_lengths, key_lengths: ``[B]`` integers, the real rows of each batch and the real keys; those beyond are not computed with
            and may hold anything, outputs beyond are zeros. On a GPU values outside of 0..N are clamped; on a CPU they are errors.
        cu_seqlens_q, cu_seqlens_k: ``[sequences + 1]`` integers from 0 to the total, where each sequence begins in a ragged batch; None
            for keys: as for queries.
        seed: of dropout's random numbers, an int or an int64 tensor ``[1]``; None draws one from PyTorch's generator. The same seed
            drops the same scores on every backend (Philox4x32-7; `pyops.ops._philox`), in forward and in backward.
        return_lse: return the logarithm of the sums of exponentials as well; it is differentiable.
        backend: "cpu", "cuda", "triton", "vendor" (``F.scaled_dot_product_attention``) or "eager"; None lets pyops choose.

    Returns:
        output: ``[B, H, N, D_v]``, packed ``[B, N, H, D]``, ragged ``[total, H, D_v]``; rows that see no key are zeros, and so are their
        gradients. With `return_lse` also ``[B, H, N]`` (ragged ``[H, total]``) float32, -inf for such rows. The same call gives the
        same bits. Under autocast query, key and value are cast as `F.scaled_dot_product_attention`'s are.

    Raises:
        TypeError, ValueError: for an argument of the wrong kind, shape, dtype, device or value, or a named backend that cannot run the
            call.
        NotImplementedError: for gradients of gradients, but on "eager".

    Source: Vaswani et al., 2017; Dao, 2023; Shazeer, 2019 and Ainslie et al., 2023 (fewer key heads); Press et al., 2022 (ALiBi).
    """
    arguments = (attn_bias, is_causal, scale, window, softcap, alibi_slopes, dropout_p, enable_gqa)
    lengths = (query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k)
    call = _attention_checks.prepare(OP, Call, query, key, value, *arguments, *lengths, seed)
    name = _choose(call, backend, return_lse)
    output, lse = _run(call, name)  # lse None from PyTorch's op, which is not asked for it
    ragged, packed = cu_seqlens_q is not None, key is None
    if packed or ragged:
        output = output.transpose(1, 2)
    if ragged:
        output = output[0]
        lse = None if lse is None else lse[0]
    return output if lse is None or not return_lse else (output, lse)


def _run(call: Call, name: str) -> tuple[Tensor, Tensor | None]:
    if name == "vendor":
        return _attention_vendor.run(call), None
    call = call._replace(seed=_attention_checks.drawn(call.seed, call.options.dropout_p, call.query))
    if name == "eager":
        query, key, value = call.heads()
        return _attention_reference.forward(query, key, value, *call[3:])
    kernels = _fused_ops.KERNELS[_conv_call.overload(name)]
    if torch.compiler.is_compiling() or _conv_call.needs_grad(*call[:4]) or is_sharded(call.query):
        return kernels.attention_fwd(*call.tensors(), *call.options)
    return _attention_train.forward(kernels, *call.tensors(), *call.options)


# Nothing of ours has been measured on a GPU yet, so there PyTorch's op comes first.
ORDER = {"cpu": ("cpu", "vendor", "eager"), "cuda": ("vendor", "eager", "cuda", "triton")}


def _order(call: Call) -> tuple[str, ...]:
    if torch.jit.is_tracing():
        return ("vendor", "eager")
    if _conv_call.is_recorded():  # forward-mode gradients, which PyTorch's op has none of
        return ("eager",)
    if is_sharded(call.query):  # ours have rules for every argument
        return ("cpu", "cuda", "triton", "vendor", "eager")
    return ORDER.get(call.query.device.type, ("vendor", "eager"))


def _unsupported(call: Call, return_lse: bool, backend: str) -> str | None:
    if backend == "vendor":
        return "it returns no lse" if return_lse else _attention_vendor.unsupported(call)
    reason = _conv_call.unsupported(call.query.device.type, call.query.dtype, backend)
    return reason if reason is not None or backend == "eager" else _attention_limits.unsupported(call, backend)


def _choose(call: Call, backend: str | None, return_lse: bool) -> str:
    wish = _backends.requested(backend)
    name = _backends.select(OP, wish, _order(call), lambda name: _unsupported(call, return_lse, name))
    if not torch.compiler.is_compiling():
        _backends.log_choice(OP, call.query.device.type, name)
    return name


def _explain(
    query, key=None, value=None, *, attn_bias=None, is_causal=False, scale=None, window=None, softcap=None, alibi_slopes=None,
    dropout_p=0.0, enable_gqa=False, query_lengths=None, key_lengths=None, cu_seqlens_q=None, cu_seqlens_k=None, seed=None,
    return_lse=False, backend=None,
):  # fmt: skip
    arguments = (attn_bias, is_causal, scale, window, softcap, alibi_slopes, dropout_p, enable_gqa)
    lengths = (query_lengths, key_lengths, cu_seqlens_q, cu_seqlens_k)
    call = _attention_checks.prepare(OP, Call, query, key, value, *arguments, *lengths, seed)
    q, k, _ = call.heads()
    facts = f"{q.device.type}, {str(q.dtype)[6:]}, query {tuple(q.shape)}, key {tuple(k.shape)}"
    reasons = lambda name: _unsupported(call, return_lse, name)  # noqa: E731
    return _backends.build_explanation(OP, facts, _backends.requested(backend), _order(call), reasons)


_backends.EXPLAINERS[OP] = _explain
