"""Samples of flash_attention."""

from __future__ import annotations

import math

import torch

from pyops.ops.flash_attention import flash_attention
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register
from pyops.testing.samples.attention_peers import PEERS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _laid_out(t: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, H, N, D] as a view of what callers have."""
    if layout == "token_major":  # [B, N, H, D] in memory
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # a slice of wider rows, every other one
        wide = torch.zeros(*t.shape[:2], 2 * t.shape[2], t.shape[3] + 5, dtype=t.dtype, device=t.device)
        wide[:, :, ::2, 3:-2] = t
        return wide[:, :, ::2, 3:-2]
    if layout == "column_major":  # no two neighbours of a row are neighbours in memory
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":  # one batch for all
        return t[:1].expand_as(t)
    return t


def attention_arguments(
    B, H, N, D, dtype, device, seed=0, *, M=None, G=None, bias=None, bias_dtype=None, mask=None, layout="", lengths=None, ragged=None,
    packed=False, spread=1.0, nan_beyond=False, alibi=False, bias_mean=0.0, drop=None, **options,
):  # fmt: skip
    """Positional and keyword arguments of one call. lengths: (query's, key's); ragged: (query's, key's) of each sequence; bias, mask:
    their shapes; spread: of the scores; drop: dropout's share and seed."""
    M, G = M or N, G or H
    generator = torch.Generator().manual_seed(10**6 * seed + 10_000 * N + 100 * M + 10 * D + H)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = [rand(B, H, N, D) * spread, rand(B, G, M, D) + 0.25, rand(B, G, M, D) + 0.5]
    kwargs: dict = dict(options)
    if bias is not None:
        kwargs["attn_bias"] = (rand(*bias) + bias_mean).to(device, bias_dtype or dtype)
    if mask is not None:
        seen = torch.rand(*mask, generator=generator) < 0.7
        seen[..., 1, :] = False  # a row that sees nothing
        kwargs["attn_bias"] = seen.to(device)
    if drop is not None:
        kwargs |= {"dropout_p": drop[0], "seed": drop[1]}
    if alibi:
        kwargs["alibi_slopes"] = (2.0 ** -(1 + torch.arange(H) / H * 4)).float().to(device)
    if lengths is not None:
        for name, size, index, given in (("query_lengths", N, 0, lengths[0]), ("key_lengths", M, 1, lengths[1])):
            if given is None:
                continue
            kwargs[name] = torch.tensor(given, device=device)
            if nan_beyond:
                for t in tensors[index : index + 1] if index == 0 else tensors[1:]:
                    t.masked_fill_((torch.arange(size) >= torch.tensor(given)[:, None])[:, None, :, None], math.nan)
    tensors = [_laid_out(t.to(device, dtype), layout) for t in tensors]
    if ragged is not None:
        for name, each in zip(("cu_seqlens_q", "cu_seqlens_k"), ragged, strict=True):
            if each is not None:
                kwargs[name] = torch.tensor([0, *torch.tensor(each).cumsum(0).tolist()], dtype=torch.int32, device=device)
        tensors = [t[0].transpose(0, 1) for t in tensors]
    if packed:
        tensors = [torch.stack([t if ragged else t.transpose(1, 2) for t in tensors], -3)]
    return tuple(tensors), kwargs


def _attend(id: str, B: int, H: int, N: int, D: int, *, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: attention_arguments(B, H, N, D, dtype, device, seed, **options), bench, not bench)


F32 = torch.float32
SAMPLES = (
    _attend("plain", 2, 3, 17, 24),
    _attend("odd", 1, 4, 37, 40, M=53, G=2, enable_gqa=True, bias=(1, 4, 37, 53)),
    _attend("wide", 2, 2, 70, 64, bias=(2, 1, 70, 70), bias_dtype=F32, layout="token_major"),
    _attend("lengths_reverse", 3, 2, 20, 16, M=23, lengths=((20, 0, 7), (5, 23, 0)), nan_beyond=True, is_causal=True),
    _attend("key_lengths", 3, 2, 33, 32, lengths=(None, (33, 1, 20)), nan_beyond=True),
    _attend("lengths_bias", 2, 2, 19, 24, M=30, lengths=((12, 19), (30, 11)), bias=(1, 2, 19, 30), return_lse=True),
    _attend("causal", 2, 2, 65, 32, is_causal=True),
    _attend("causal_more_keys", 1, 2, 21, 16, M=50, is_causal=True),
    _attend("causal_more_queries", 1, 2, 50, 16, M=21, is_causal=True, return_lse=True),  # the first 29 rows see nothing
    _attend("window", 1, 3, 100, 16, window=(7, 3)),
    _attend("window_left", 1, 2, 90, 24, M=77, window=(20, None), is_causal=True),
    _attend("bias_rows", 2, 3, 18, 16, M=25, bias=(3, 1, 25)),
    _attend("bias_columns", 2, 3, 18, 16, M=25, bias=(2, 1, 18, 1), softcap=3.0),
    _attend("bias_two_dims", 2, 3, 31, 32, bias=(31, 31), bias_dtype=F32),
    _attend("bias_full", 2, 2, 33, 16, bias=(2, 2, 33, 33), is_causal=True),
    _attend("mask", 2, 2, 21, 16, M=35, mask=(2, 1, 21, 35), return_lse=True),
    _attend("softcap", 1, 2, 40, 32, softcap=5.0, spread=3.0, window=(30, 30)),
    _attend("alibi", 2, 4, 40, 16, M=44, alibi=True, is_causal=True),
    _attend("multi_query", 2, 6, 26, 16, G=1, enable_gqa=True, is_causal=True),
    _attend("dropout", 2, 2, 34, 16, M=45, drop=(0.3, 1234567890123)),
    _attend("dropout_bias", 1, 2, 70, 32, drop=(0.1, -5), bias=(1, 2, 70, 70), is_causal=True),
    _attend("ragged", 1, 3, 60, 24, ragged=((17, 0, 1, 42), None), is_causal=True),
    _attend("ragged_cross", 1, 2, 50, 16, M=80, G=1, enable_gqa=True, ragged=((30, 20, 0), (7, 70, 3)), return_lse=True),
    _attend("ragged_bias", 1, 2, 40, 16, ragged=((15, 25), None), bias=(2, 2, 25, 25), alibi=True),
    _attend("ragged_packed", 1, 2, 57, 32, ragged=((33, 24), None), packed=True),
    _attend("packed", 2, 3, 29, 32, packed=True),
    _attend("packed_causal", 2, 2, 66, 16, packed=True, is_causal=True, bias=(2, 66, 66), return_lse=True),
    _attend("far_below", 1, 2, 192, 32, bias=(1, 1, 192, 192), bias_mean=-300.0, bias_dtype=F32, return_lse=True),  # lse below -88.7
    _attend("large_scores", 1, 1, 33, 64, spread=30.0),
    _attend("strided", 2, 2, 22, 20, layout="strided", M=31),
    _attend("column_major", 2, 2, 22, 20, layout="column_major"),
    _attend("expanded", 3, 2, 22, 16, layout="expanded"),
    *(_attend(f"head_{D}", 1, 2, 35, D, M=41) for D in (1, 8, 59, 72, 80, 96, 111, 128, 192, 256)),
    _attend("one_row", 2, 3, 1, 32, M=45),
    _attend("one_key", 2, 2, 9, 16, M=1),
    _attend("one_each", 1, 1, 1, 8),
    _attend("long_keys", 1, 1, 9, 16, M=1500),
    _attend("long", 1, 1, 600, 16, is_causal=True),
    _attend("vit", 1, 2, 197, 64, layout="token_major"),
    _attend("many_heads", 5, 13, 3, 8),
    _attend("no_rows", 2, 2, 0, 16, M=5),
    _attend("no_batch", 0, 2, 6, 16),
    # cpu.md of the field: ViT-B, Swin-T's first stage, a causal language model; then the rest of what users run
    _attend("vit_b8", 8, 12, 197, 64, bench=True),
    _attend("vit_b8_packed", 8, 12, 197, 64, bench=True, packed=True),
    _attend("swin_s1", 512, 3, 49, 32, bench=True, bias=(1, 3, 49, 49)),
    _attend("causal_2048", 1, 8, 2048, 64, bench=True, is_causal=True),
    _attend("bert_128", 8, 12, 128, 64, bench=True),
    _attend("bert_512_lengths", 4, 12, 512, 64, bench=True, lengths=(None, (512, 300, 150, 100))),
    _attend("t5_512_bias", 2, 8, 512, 64, bench=True, bias=(1, 8, 512, 512)),
    _attend("cross_128_512", 4, 8, 128, 64, M=512, bench=True),
    _attend("siglip_729", 1, 16, 729, 72, bench=True),
    _attend("gqa_causal_1024", 1, 16, 1024, 128, G=4, enable_gqa=True, bench=True, is_causal=True),
    _attend("window_4096", 1, 4, 4096, 64, bench=True, is_causal=True, window=(256, None)),
    _attend("decode_1024", 8, 12, 1, 64, M=1024, bench=True),
)


def _case(id: str, error: type[Exception], match: str, **change) -> ErrorCase:
    """The first sample's call with arguments replaced; query, key, value by their names."""

    def make():
        (query, key, value), kwargs = SAMPLES[0].make(torch.float32, "cpu")
        given = {"query": query, "key": key, "value": value} | kwargs | change
        return (given.pop("query"), given.pop("key"), given.pop("value")), given

    return ErrorCase(id, make, error, match)


_z = torch.zeros
_Q, _K, _RAGGED = _z(2, 3, 17, 24), _z(2, 1, 17, 24), dict.fromkeys(("query", "key", "value"), _z(17, 3, 24))
_i = torch.tensor
ERRORS = (
    _case("query_kind", TypeError, "query: expected a Tensor, got list", query=[1.0]),
    _case("query_dim", ValueError, r"query: expected \[B, H, N, D\], got shape", query=_z(2, 17, 24)),
    _case("query_dtype", ValueError, "query: expected a floating tensor, got torch.int64", query=_Q.long()),
    _case("packed_dim", ValueError, r"query: expected \[B, N, 3, H, D\] without key and value", key=None, value=None),
    _case("key_alone", ValueError, "value: expected a Tensor beside key", value=None),
    _case("key_dtype", ValueError, "key: expected query's dtype torch.float32, got torch.float64", key=_Q.double()),
    _case("key_head_size", ValueError, r"key: expected batch and head size \(2, 24\)", key=_z(2, 3, 17, 16)),
    _case("key_heads", ValueError, "key: expected query's 3 heads, got 1; fewer need enable_gqa=True", key=_K, value=_K),
    _case("gqa", ValueError, "divides query's 3, got 2", key=_z(2, 2, 17, 24), value=_z(2, 2, 17, 24), enable_gqa=True),
    _case("value_length", ValueError, r"value: expected batch, heads and length \(2, 3, 17\)", value=_z(2, 3, 16, 24)),
    _case("value_device", ValueError, "value: expected input's device cpu, got meta", value=_Q.to("meta")),
    _case("bias_kind", TypeError, "attn_bias: expected a Tensor or None, got float", attn_bias=1.0),
    _case("bias_dtype", ValueError, "attn_bias: expected float32, .* or bool, got torch.int64", attn_bias=_z(17, 17).long()),
    _case("bias_shape", ValueError, r"broadcasts to \(2, 3, 17, 17\), got \(17, 16\)", attn_bias=_z(17, 16)),
    _case("bias_dims", ValueError, "attn_bias: expected 2 to 4 dimensions", attn_bias=_z(17)),
    _case("causal_kind", TypeError, "is_causal: expected a bool, got 1", is_causal=1),
    _case("scale_kind", TypeError, "scale: expected a number, got '1'", scale="1"),
    _case("window_kind", TypeError, r"window: expected \(left, right\) or None, got 5", window=5),
    _case("window_value", ValueError, "window: expected ints of 0 or more, or None, got -1", window=(-1, 0)),
    _case("softcap", ValueError, "softcap: expected 0 to inf, got -1", softcap=-1.0),
    _case("dropout", ValueError, "dropout_p: expected less than 1, got 1.0", dropout_p=1.0),
    _case("dropout_kind", TypeError, "dropout_p: expected a number, got None", dropout_p=None),
    _case("seed_kind", TypeError, "seed: expected an int, an int64 Tensor or None, got 1.5", dropout_p=0.5, seed=1.5),
    _case("seed_dtype", ValueError, "seed: expected one int64, got torch.float32", dropout_p=0.5, seed=_z(1)),
    _case("slopes_shape", ValueError, r"alibi_slopes: expected shape \(3,\) or \(2, 3\), got \(2,\)", alibi_slopes=_z(2)),
    _case("slopes_grad", ValueError, "alibi_slopes: expected a tensor without gradient", alibi_slopes=_z(3, requires_grad=True)),
    _case("lengths_kind", TypeError, "key_lengths: expected a Tensor or None, got list", key_lengths=[1, 2]),
    _case("lengths_dtype", ValueError, "key_lengths: expected int32 or int64, got torch.float32", key_lengths=_z(2)),
    _case("lengths_shape", ValueError, r"query_lengths: expected shape \(2,\), got \(3,\)", query_lengths=_i([1, 2, 3])),
    _case("lengths_value", ValueError, "key_lengths: expected values from 0 to 17, got 3 to 18", key_lengths=_i([3, 18])),
    _case("starts_alone", ValueError, "cu_seqlens_k: expected cu_seqlens_q with it", cu_seqlens_k=_i([0, 17])),
    _case("ragged_dim", ValueError, r"query: expected \[total, H, D\], got shape", cu_seqlens_q=_i([0, 17])),
    _case("starts_value", ValueError, "cu_seqlens_q: expected values that rise from 0 to the total 17", cu_seqlens_q=_i([0, 18]),
          **_RAGGED),
    _case("starts_lengths", ValueError, "key_lengths: expected None beside cu_seqlens_q", cu_seqlens_q=_i([0, 17]),
          **_RAGGED, key_lengths=_i([17])),
    _case("ragged_bias", ValueError, r"attn_bias: expected 9 x 9 or larger for the longest sequences, got shape \(1, 1, 8, 9\)",
          cu_seqlens_q=_i([0, 8, 17]), attn_bias=_z(8, 9), **_RAGGED),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    _case("vendor_softcap", ValueError, "backend 'vendor' cannot run this call: it has no soft cap", softcap=1.0, backend="vendor"),
)  # fmt: skip


def _flops(query, key=None, *_, is_causal=False, **__) -> int:
    B, H, N, D = query.shape if key is not None else (query.shape[0], query.shape[3], query.shape[1], query.shape[4])
    return 4 * B * H * N * (N if key is None else key.shape[2]) * D // (2 if is_causal else 1)


def _bytes(query, key=None, value=None, **_) -> int:
    elements = 2 * query.numel() + 2 * key.numel() if key is not None else query.numel() * 4 // 3
    return elements * query.element_size()


register(
    OpSpec(
        name="flash_attention",
        public=flash_attention,
        family="attention",
        ops=("attention_into", "attention_grad_into", "attention_fwd", "attention_bwd"),
        samples=SAMPLES,
        errors=ERRORS,
        flops=_flops,
        bytes=_bytes,
        baselines=PEERS,
        dtypes=DTYPES,
        learned=("attn_bias",),
    )
)
