"""flash_attention through PyTorch's own `scaled_dot_product_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyops.ops import _attention_reference


def unsupported(call) -> str | None:
    """None when PyTorch's op can express the call, else why not."""
    if call.options.softcap:
        return "it has no soft cap"
    if call.options.dropout_p and call.seed is not None:
        return "its dropout takes no seed"
    if call.spans is not None and call.query.shape[0] == 1 and call.spans.shape[0] != 1:
        return "it takes no ragged batches"
    return None


def run(call) -> Tensor:
    query, key, value = call.heads()
    (_, H, N, _), M, o = query.shape, key.shape[2], call.options
    gqa = False  # not the comparison itself: under torch.jit.trace sizes are tensors, under the compiler symbols
    if key.shape[1] != H:
        gqa = True
    if call.spans is None and call.bias is None and call.slopes is None and o.left < 0 and (o.right < 0 or (o.right == 0 and N == M)):
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=o.dropout_p, is_causal=o.right == 0, scale=o.scale, enable_gqa=gqa
        )
    mask, lengths = call.bias, None
    if call.spans is not None:
        lengths = call.spans[:, 1], call.spans[:, 3]
        query, key, value = (
            _attention_reference._real(t, n) for t, n in zip((query, key, value), (lengths[0], *lengths[1:] * 2), strict=True)
        )
    n, m = (N, M) if lengths is None else (t[:, None, None, None] for t in lengths)
    if call.slopes is not None:
        i, j = torch.arange(N, device=query.device)[:, None], torch.arange(M, device=query.device)
        distance = -(call.slopes.view(-1, H, 1, 1) * (i + (m - n) - j).abs()).to(query.dtype)
        mask = distance if mask is None else distance.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask + distance
    if lengths is not None or o.left >= 0 or o.right >= 0:
        seen = _attention_reference.visible(query.device, n, m, N, M, o.left, o.right)
        mask = seen if mask is None else mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, -torch.inf)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=o.dropout_p, scale=o.scale, enable_gqa=gqa)
    return output if lengths is None else _attention_reference._real(output, lengths[0])
