"""What networks that translate share: the checks of their arguments, and the search for a translation, greedy or with beams."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]  # the last tokens [rows] -> logits [rows, V] of the next


def check_tokens(name: str, argument: str, tokens: Tensor, batch: int | None = None) -> None:
    """Raises TypeError or ValueError unless they are token numbers ``[N, length]``, of `batch` rows where that is given."""
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name}: {argument}: expected a Tensor, got {type(tokens).__name__}")
    fits = tokens.dim() == 2 and tokens.shape[1] > 0 and batch in (None, tokens.shape[0])
    if not fits or tokens.dtype not in (torch.int64, torch.int32):
        shape = f"[{'N' if batch is None else batch}, 1 or more]"
        raise ValueError(f"{name}: {argument}: expected int64 of shape {shape}, got {tokens.dtype} of shape {tuple(tokens.shape)}")


def padding_of(name: str, source: Tensor, source_lengths: Tensor | None) -> Tensor | None:
    """``[N, S]``, True where a row has ended; None where all rows are full. Raises TypeError or ValueError for lengths of no such rows."""
    if source_lengths is None:
        return None
    if not isinstance(source_lengths, Tensor):
        raise TypeError(f"{name}: source_lengths: expected a Tensor or None, got {type(source_lengths).__name__}")
    N, S = source.shape
    if source_lengths.dtype != torch.int64 or tuple(source_lengths.shape) != (N,):
        found = f"{source_lengths.dtype} of shape {tuple(source_lengths.shape)}"
        raise ValueError(f"{name}: source_lengths: expected int64 of shape ({N},), got {found}")
    if source_lengths.is_cpu and not torch.compiler.is_compiling():  # elsewhere a look at the values would synchronise
        outside = source_lengths[(source_lengths < 1) | (source_lengths > S)]
        if outside.numel():
            raise ValueError(f"{name}: source_lengths: expected values in 1..{S}, got {int(outside[0])}")
    return torch.arange(S, device=source.device) >= source_lengths.to(source.device)[:, None]


def check_search(name: str, vocabulary: int, max_length: int, bos: int, eos: int, beam_size: int = 1, length_penalty: float = 0.0) -> None:
    """Raises TypeError or ValueError for what no search can be made with."""
    numbers = dict(max_length=(max_length, 1, None), beam_size=(beam_size, 1, None), bos=(bos, 0, vocabulary), eos=(eos, 0, vocabulary))
    for argument, (value, least, end) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {argument}: expected an int, got {value!r}")
        if value < least or (end is not None and value >= end):
            raise ValueError(f"{name}: {argument}: expected {f'{least} or more' if end is None else f'{least}..{end - 1}'}, got {value}")
    if not isinstance(length_penalty, (int, float)) or not math.isfinite(length_penalty):
        raise ValueError(f"{name}: length_penalty: expected a finite number, got {length_penalty!r}")


def greedy(step: Step, batch: int, device: torch.device, max_length: int, bos: int, eos: int) -> Tensor:
    """The likeliest token, again and again: ``[N, up to max_length]``, without bos; behind a row's eos there are more of them."""
    current = torch.full((batch,), bos, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    found = []
    for _ in range(max_length):
        current = step(current).argmax(-1).masked_fill(ended, eos)
        found.append(current)
        ended = ended | (current == eos)
        if ended.all():
            break
    return torch.stack(found, 1)


def beam_search(
    step: Step,
    reorder: Callable[[Tensor], None],
    batch: int,
    device: torch.device,
    beam_size: int,
    length_penalty: float,
    max_length: int,
    bos: int,
    eos: int,
) -> tuple[Tensor, Tensor]:
    """The best hypotheses ``[N, beam_size, up to max_length]`` that end with eos or at max_length, and their scores ``[N, beam_size]``.

    ``reorder(rows)``: row i of the next step goes on with what row ``rows[i]`` of this one has seen. A score is the sum of the tokens'
    log-probabilities over ``((5 + length) / 6) ** length_penalty`` (Wu et al., 2016); -inf: there are not as many hypotheses. A sentence's
    search is over once beam_size hypotheses have ended, each of which was then among the beam_size best: with one beam, greedy's.
    """
    live = torch.zeros(batch, 1, device=device)  # the hypotheses' log-probabilities: one at first, of bos alone
    tokens = torch.empty(batch, 1, 0, dtype=torch.int64, device=device)
    current = torch.full((batch,), bos, device=device)
    ended = torch.full((batch, beam_size, max_length), eos, device=device)
    scores = torch.full((batch, beam_size), -math.inf, device=device)
    over = torch.zeros(batch, 1, dtype=torch.bool, device=device)
    length = 0
    while True:
        length += 1
        logits = step(current)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        width, vocabulary = live.shape[1], logits.shape[1]
        # Twice as many as beams: as many remain if all those of one beam each end.
        best, token = logits.topk(min(2 * beam_size, vocabulary), 1)
        total = live[..., None] + (best - logits.logsumexp(1, keepdim=True)).unflatten(0, (batch, width))
        values, index = total.flatten(1).topk(min(2 * beam_size, width * best.shape[1]), 1)
        beam, token = index // best.shape[1], token.view(batch, -1).gather(1, index)
        grown = torch.cat([tokens.gather(1, beam[..., None].expand(-1, -1, length - 1)), token[..., None]], 2)

        ends = (token == eos) | (length == max_length)
        new = values.masked_fill(~ends | over, -math.inf)[:, :beam_size] / ((5 + length) / 6) ** length_penalty
        scores, pick = torch.cat([scores.to(new.dtype), new], 1).topk(beam_size, 1)
        candidates = torch.cat([ended[..., :length], grown[:, :beam_size]], 1)
        ended[..., :length] = candidates.gather(1, pick[..., None].expand(-1, -1, length))
        over = over | (scores > -math.inf).all(1, keepdim=True)
        if length == max_length or over.all():
            return ended[..., :length], scores

        live, pick = values.masked_fill(ends, -math.inf).topk(min(beam_size, values.shape[1]), 1)
        tokens = grown.gather(1, pick[..., None].expand(-1, -1, length))
        current = tokens[..., -1].flatten()
        reorder((torch.arange(batch, device=device)[:, None] * width + beam.gather(1, pick)).flatten())
