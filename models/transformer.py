"""The transformer that translates: encoder, decoder, and decoding with a cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pyops.nn import Transformer

from . import _translation
from ._registry import register, tokens


def sinusoids(length: int, size: int) -> Tensor:
    """``[length, size]`` float32: sines at even places and cosines at odd ones, of wavelengths from 2 pi to 20000 pi."""
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)[:, :size].float()


class TranslationTransformer(nn.Module):
    """``(source [N, S], target_in [N, T]) -> logits [N, T, target_vocabulary]``; tokens are int64 numbers.

    Embeddings, scaled by ``sqrt(d_model)``, plus sinusoidal positions; `pyops.nn.Transformer`; a linear layer without bias, whose weight
    is the target embedding's where they are tied.

    Source: Vaswani et al., 2017.
    """

    positions: Tensor

    def __init__(
        self, source_vocabulary: int, target_vocabulary: int, transformer: Transformer, dropout: float, tied: bool, max_length: int
    ):
        super().__init__()
        size = transformer.d_model
        self.source_embedding = nn.Embedding(source_vocabulary, size)
        self.target_embedding = nn.Embedding(target_vocabulary, size)
        self.transformer = transformer
        self.output = nn.Linear(size, target_vocabulary, bias=False)
        if tied:
            self.output.weight = self.target_embedding.weight
        for layer in (self.source_embedding, self.target_embedding, self.output):
            nn.init.normal_(layer.weight, 0, size**-0.5)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("positions", sinusoids(max_length, size), persistent=False)

    def forward(self, source: Tensor, target_in: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Teacher forcing: target_in are the tokens before those to predict, bos first. source_lengths: int64 ``[N]``, 1 to S.

        Raises TypeError or ValueError for tokens or lengths of another kind, shape or range, or longer than max_length.
        """
        _translation.check_tokens("TranslationTransformer", "target_in", target_in, len(source))
        memory, padding = self._encode(source, source_lengths)
        T = target_in.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool, device=source.device).triu(1)
        x = self._embed("target_in", self.target_embedding, target_in)
        y = self.transformer.decoder(x, memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True)
        return self.output(y)

    @torch.no_grad()
    def greedy(self, source: Tensor, source_lengths: Tensor | None = None, *, max_length: int, bos: int, eos: int) -> Tensor:
        """At each step the likeliest token, from bos on until all rows have an eos: ``[N, up to max_length]``, without bos and with more
        eos behind a row's first. Meant for eval mode. Errors are those of `forward`."""
        step = self._decoding(source, source_lengths, max_length, bos, eos)
        return _translation.greedy(step, len(source), source.device, max_length, bos, eos)

    @torch.no_grad()
    def beam_search(
        self,
        source: Tensor,
        beam_size: int = 4,
        length_penalty: float = 0.6,
        source_lengths: Tensor | None = None,
        *,
        max_length: int,
        bos: int,
        eos: int,
    ) -> tuple[Tensor, Tensor]:
        """The best of many hypotheses, of which beam_size go on at each step; beam_size 1 is `greedy`. Meant for eval mode.

        Returns:
            ``(tokens [N, beam_size, up to max_length], scores [N, beam_size])``, the best first; tokens as `greedy` has them. A hypothesis
            has ended with eos or at max_length, and a sentence's search once beam_size of them have. A score is the sum of the tokens'
            log-probabilities, eos' included, over ``((5 + length) / 6) ** length_penalty`` (Wu et al., 2016); -inf where there are not
            as many hypotheses.

        Errors are those of `forward`.
        """
        step = self._decoding(source, source_lengths, max_length, bos, eos, beam_size, length_penalty)
        sizes = (beam_size, length_penalty, max_length, bos, eos)
        return _translation.beam_search(step, step.reorder, len(source), source.device, *sizes)

    def _encode(self, source: Tensor, source_lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the decoder reads, ``[N, S, d_model]``, and where of it there is nothing to read."""
        _translation.check_tokens("TranslationTransformer", "source", source)
        padding = _translation.padding_of("TranslationTransformer", source, source_lengths)
        x = self._embed("source", self.source_embedding, source)
        return self.transformer.encoder(x, src_key_padding_mask=padding), padding

    def _embed(self, argument: str, embedding: nn.Embedding, numbers: Tensor, start: int = 0) -> Tensor:
        end, most = start + numbers.shape[1], self.positions.shape[0]
        if end > most:
            raise ValueError(f"TranslationTransformer: {argument}: expected at most max_length={most} tokens, got {end}")
        return self.dropout(torch.add(self.positions[start:end], embedding(numbers), alpha=math.sqrt(embedding.embedding_dim)))

    def _decoding(self, source: Tensor, source_lengths: Tensor | None, max_length: int, bos: int, eos: int, *beams) -> _Decoding:
        _translation.check_search("TranslationTransformer", self.target_embedding.num_embeddings, max_length, bos, eos, *beams)
        if max_length > self.positions.shape[0]:
            raise ValueError(f"TranslationTransformer: max_length: expected at most {self.positions.shape[0]}, got {max_length}")
        return _Decoding(self, *self._encode(source, source_lengths), max_length)


class _Decoding:
    """The state of a search: called with the last tokens ``[rows]`` it gives the logits ``[rows, V]`` of the next."""

    def __init__(self, model: TranslationTransformer, memory: Tensor, padding: Tensor | None, max_length: int):
        self.model, self.memory, self.padding = model, memory, padding
        self.cache = model.transformer.decoder.new_cache(len(memory), max_length)

    def __call__(self, current: Tensor) -> Tensor:
        model, first = self.model, self.cache.length == 0
        x = model._embed("target", model.target_embedding, current[:, None], self.cache.length)
        memory = self.memory if first else None  # the cache has its keys and values from then on
        y = model.transformer.decoder(x, memory, memory_key_padding_mask=self.padding, cache=self.cache)
        return model.output(y[:, 0])

    def reorder(self, rows: Tensor) -> None:
        """Row i goes on with what row ``rows[i]`` has seen, of the same source where there are as many rows as before."""
        widens = len(rows) != self.cache[0].key.shape[0]
        self.cache.reorder(rows, memory=widens)
        if widens and self.padding is not None:
            self.padding = self.padding[rows]


@register(tokens(37000, 50, 50), "Vaswani et al., 2017")
def transformer(
    source_vocabulary: int = 37000,
    target_vocabulary: int = 37000,
    d_model: int = 512,
    nhead: int = 8,
    num_encoder_layers: int = 6,
    num_decoder_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: float = 0.1,
    norm_first: bool = False,
    tied: bool = True,
    max_length: int = 1024,
) -> TranslationTransformer:
    """The base model, with torch.nn.Transformer's layer norm behind each stack as well: 82,028,544 parameters.

    Args:
        source_vocabulary, target_vocabulary: how many tokens each language has.
        d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, norm_first: `torch.nn.Transformer`'s.
        dropout: of embeddings, attention and layers.
        tied: whether the output layer's weight is the target embedding's.
        max_length: the most tokens of a sentence.
    """
    sizes = (d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout)
    stacks = Transformer(*sizes, batch_first=True, norm_first=norm_first)
    return TranslationTransformer(source_vocabulary, target_vocabulary, stacks, dropout, tied, max_length)
