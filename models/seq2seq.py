"""Recurrent encoder and decoder with additive attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops.nn import GRU, LSTM, GRUCell, LSTMCell

from . import _translation
from ._registry import register, tokens

KINDS: dict[str, tuple[Any, Any]] = {"gru": (GRU, GRUCell), "lstm": (LSTM, LSTMCell)}


class AdditiveAttention(nn.Module):
    """What a decoder in a state ``[N, hidden_size]`` reads of positions ``[N, S, width]``: their mean ``[N, width]``, weighted by
    ``softmax(energy(tanh(query(state) + key(position))))``.

    Source: Bahdanau et al., 2015.
    """

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(width, hidden_size)
        self.energy = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, state: Tensor, positions: Tensor, keys: Tensor, padding: Tensor | None) -> Tensor:
        """keys: ``self.key(positions)``, which no step changes. padding: ``[N, S]``, True where there is no position."""
        scores = self.energy((keys + self.query(state)[:, None]).tanh_()).squeeze(2)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        return (scores.softmax(1)[:, None] @ positions).squeeze(1)


class Seq2Seq(nn.Module):
    """``(source [N, S], target_in [N, T]) -> logits [N, T, target_vocabulary]``; tokens are int64 numbers.

    ``encoder`` reads the source; ``decoder`` starts from ``tanh(bridge(the encoder's last state))`` (an LSTM's cell from the encoder's) and
    takes, at each step, the embedding of the token before and what ``attention`` reads. ``readout``, a maxout layer, and ``output`` give
    the logits of all steps at once.

    Source: Bahdanau et al., 2015.
    """

    def __init__(
        self, source_vocabulary: int, target_vocabulary: int, embedding_size: int, hidden_size: int, rnn: str, bidirectional: bool,
        num_layers: int,
    ):  # fmt: skip
        super().__init__()
        if rnn not in KINDS:
            raise ValueError(f"seq2seq: rnn: expected {' or '.join(map(repr, KINDS))}, got {rnn!r}")
        encoder, cell = KINDS[rnn]
        width = hidden_size * (2 if bidirectional else 1)
        self.source_embedding = nn.Embedding(source_vocabulary, embedding_size)
        self.encoder = encoder(embedding_size, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional)
        self.bridge = nn.Linear(hidden_size, hidden_size)
        self.target_embedding = nn.Embedding(target_vocabulary, embedding_size)
        self.attention = AdditiveAttention(hidden_size, width)
        self.decoder = cell(embedding_size + width, hidden_size)
        self.readout = nn.Linear(hidden_size + width + embedding_size, 2 * (hidden_size // 2))
        self.output = nn.Linear(hidden_size // 2, target_vocabulary)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's: orthogonal between states, small normal numbers elsewhere, biases and ``energy`` zero."""
        for name, parameter in self.named_parameters():
            if "bias" in name or name == "attention.energy.weight":
                nn.init.zeros_(parameter)
            elif "weight_hh" in name:
                for gate in parameter.split(parameter.shape[1]):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.normal_(parameter, 0, 0.001 if name.startswith("attention") else 0.01)

    def forward(self, source: Tensor, target_in: Tensor, source_lengths: Tensor | None = None) -> Tensor:
        """Teacher forcing: target_in are the tokens before those to predict, bos first. source_lengths: int64 ``[N]``, 1 to S.

        Raises TypeError or ValueError for tokens or lengths of another kind, shape or range.
        """
        _translation.check_tokens("Seq2Seq", "source", source)
        _translation.check_tokens("Seq2Seq", "target_in", target_in, len(source))
        state, read = self._encode(source, source_lengths)
        embedded = self.target_embedding(target_in)
        states, contexts = [], []
        for x in embedded.unbind(1):
            state, context = self._step(x, state, read)
            states.append(state[0])
            contexts.append(context)
        return self._logits(torch.stack(states, 1), torch.stack(contexts, 1), embedded)

    @torch.no_grad()
    def decode(self, source: Tensor, source_lengths: Tensor | None = None, *, max_length: int, bos: int, eos: int) -> Tensor:
        """Greedy: at each step the likeliest token, from bos on until all rows have an eos: ``[N, up to max_length]``, without bos and
        with more eos behind a row's first. Errors are those of `forward`."""
        _translation.check_tokens("Seq2Seq", "source", source)
        _translation.check_search("Seq2Seq", self.target_embedding.num_embeddings, max_length, bos, eos)
        state, read = self._encode(source, source_lengths)

        def step(current: Tensor) -> Tensor:
            nonlocal state
            x = self.target_embedding(current)
            state, context = self._step(x, state, read)
            return self._logits(state[0], context, x)

        return _translation.greedy(step, len(source), source.device, max_length, bos, eos)

    def _encode(self, source: Tensor, source_lengths: Tensor | None):
        """The decoder's first state, (h,) or (h, c), and what attention reads."""
        padding = _translation.padding_of("Seq2Seq", source, source_lengths)
        positions, last = self.encoder(self.source_embedding(source), lengths=source_lengths)
        last = last if isinstance(last, tuple) else (last,)
        state = (torch.tanh(self.bridge(last[0][-1])), *(c[-1] for c in last[1:]))
        return state, (positions, self.attention.key(positions), padding)

    def _step(self, x: Tensor, state: tuple[Tensor, ...], read) -> tuple[tuple[Tensor, ...], Tensor]:
        context = self.attention(state[0], *read)
        found = self.decoder(torch.cat([x, context], 1), state if len(state) > 1 else state[0])
        return found if isinstance(found, tuple) else (found,), context

    def _logits(self, state: Tensor, context: Tensor, embedded: Tensor) -> Tensor:
        return self.output(self.readout(torch.cat([state, context, embedded], -1)).unflatten(-1, (-1, 2)).amax(-1))


@register(tokens(30000, 50, 50), "Bahdanau et al., 2015")
def seq2seq(
    source_vocabulary: int = 30000,
    target_vocabulary: int = 30000,
    embedding_size: int = 620,
    hidden_size: int = 1000,
    rnn: str = "gru",
    bidirectional: bool = True,
    num_layers: int = 1,
) -> Seq2Seq:
    """Encoder and decoder of GRUs with additive attention: 80,452,000 parameters.

    Args:
        source_vocabulary, target_vocabulary: how many tokens each language has.
        embedding_size: of a token.
        hidden_size: of the states in each direction, and of attention's hidden layer; even.
        rnn: "gru" or "lstm", of encoder and decoder.
        bidirectional: whether the encoder reads the source both ways.
        num_layers: of the encoder; the decoder has one.

    Raises ValueError for another rnn.
    """
    return Seq2Seq(source_vocabulary, target_vocabulary, embedding_size, hidden_size, rnn, bidirectional, num_layers)
