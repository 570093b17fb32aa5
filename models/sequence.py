"""Recurrent networks over sequences: a language model over words or characters, and a predictor of time series."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyops import linear_cross_entropy
from pyops.nn import GRU, LSTM, RNN

from ._registry import register, tokens

CELLS: dict[str, Any] = {"lstm": LSTM, "gru": GRU, "rnn": RNN}


def _recurrent(owner: str, cell: str, input_size: int, hidden_size: int, num_layers: int, dropout: float) -> nn.Module:
    if cell not in CELLS:
        raise ValueError(f"{owner}: cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    return CELLS[cell](input_size, hidden_size, num_layers, batch_first=True, dropout=dropout if num_layers > 1 else 0.0)


class LanguageModel(nn.Module):
    """Logits of the next token: ``embedding``, dropout, ``rnn``, dropout, ``head``.

    ``forward(tokens [N, T] int64, state=None) -> logits [N, T, vocab_size], state``, the state being the recurrent layers' own: ``(h, c)``
    of an LSTM, else ``h``, each [num_layers, N, hidden_size].

    Source: Zaremba, Sutskever and Vinyals, 2014; Press and Wolf, 2017 (one matrix embeds tokens and scores them).
    """

    def __init__(self, embedding: nn.Embedding, rnn: nn.Module, head: nn.Linear, dropout: float):
        super().__init__()
        self.embedding = embedding
        self.rnn = rnn
        self.head = head
        self.dropout = nn.Dropout(dropout)

    def hidden(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """What the head takes, ``[N, T, hidden_size]``, and the state."""
        output, state = self.rnn(self.dropout(self.embedding(tokens)), state)
        return self.dropout(output), state

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.hidden(tokens, state)
        return self.head(output), state

    def loss(self, tokens: Tensor, targets: Tensor, state: Any = None, **options: Any) -> Tensor:
        """The mean cross entropy of ``targets [N, T]``, without the logits of all positions. options: `pyops.linear_cross_entropy`'s."""
        output, _ = self.hidden(tokens, state)
        return linear_cross_entropy(output, self.head.weight, targets, self.head.bias, **options)

    @torch.no_grad()
    def generate(self, tokens: Tensor, count: int, *, temperature: float = 1.0, seed: int | None = None) -> Tensor:
        """``tokens [N, T]`` and `count` more, ``[N, T + count]``, each drawn from what came before it; dropout is off.

        Args:
            temperature: divides the logits: below 1 the likely tokens gain; 0 takes the likeliest.
            seed: of the draws; None draws from PyTorch's own generator.

        Raises ValueError for no tokens to begin with, a negative count or temperature.
        """
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"generate: tokens: expected [N, T] of one token or more, got shape {tuple(tokens.shape)}")
        if count < 0:
            raise ValueError(f"generate: count: expected 0 or more, got {count}")
        if not temperature >= 0:
            raise ValueError(f"generate: temperature: expected 0 or more, got {temperature}")
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        training = self.training
        self.eval()
        try:
            found, state, last = [tokens], None, tokens
            for _ in range(count):
                output, state = self.hidden(last, state)
                last = self._draw(self.head(output[:, -1]), temperature, generator)
                found.append(last)
        finally:
            self.train(training)
        return torch.cat(found, 1)

    @staticmethod
    def _draw(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
        if temperature == 0:
            return logits.argmax(1, keepdim=True)
        return torch.multinomial((logits.float() / temperature).softmax(1), 1, generator=generator)


@register(tokens(10000, 35), "Zaremba et al., 2014")
def language_model(
    vocab_size: int = 10000,
    hidden_size: int = 650,
    num_layers: int = 2,
    cell: str = "lstm",
    dropout: float = 0.5,
    tied: bool = True,
    embedding_dim: int | None = None,
) -> LanguageModel:
    """The paper's medium model of words, 650 wide, with one matrix for embedding and output.

    Args:
        vocab_size: how many different tokens there are.
        hidden_size, num_layers: of the recurrent layers.
        cell: "lstm", "gru" or "rnn".
        dropout: of embeddings, between layers and before the output.
        tied: the output layer's matrix is the embedding's.
        embedding_dim: an embedding's length; None: hidden_size, as it has to be where tied.

    Raises ValueError for an unknown cell, and for another embedding_dim where tied.
    """
    embedding_dim = hidden_size if embedding_dim is None else embedding_dim
    if tied and embedding_dim != hidden_size:
        raise ValueError(f"language_model: embedding_dim: expected hidden_size {hidden_size} where tied, got {embedding_dim}")
    rnn = _recurrent("language_model", cell, embedding_dim, hidden_size, num_layers, dropout)
    embedding, head = nn.Embedding(vocab_size, embedding_dim), nn.Linear(hidden_size, vocab_size)
    if tied:
        head.weight = embedding.weight
    for weight in (embedding.weight, head.weight, *rnn.parameters()):
        nn.init.uniform_(weight, -0.05, 0.05)
    nn.init.zeros_(head.bias)
    return LanguageModel(embedding, rnn, head, dropout)


class TimeSeries(nn.Module):
    """A prediction for each step from the steps up to it: ``rnn``, then ``head``.

    ``forward(series [N, T, input_size], state=None) -> predictions [N, T, output_size], state``, the state as `LanguageModel`'s.

    Source: Elman, 1990; Hochreiter and Schmidhuber, 1997; Cho et al., 2014.
    """

    def __init__(self, rnn: nn.Module, head: nn.Linear):
        super().__init__()
        self.rnn = rnn
        self.head = head

    def forward(self, series: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        output, state = self.rnn(series, state)
        return self.head(output), state


@register(lambda batch: (torch.randn(batch, 100, 1),), "Elman, 1990")
def time_series(
    input_size: int = 1,
    hidden_size: int = 64,
    num_layers: int = 2,
    cell: str = "lstm",
    output_size: int | None = None,
    dropout: float = 0.0,
) -> TimeSeries:
    """Recurrent layers and a linear layer on each step's output, with PyTorch's initialisation.

    Args:
        input_size: values of a step.
        hidden_size, num_layers: of the recurrent layers.
        cell: "lstm", "gru" or "rnn".
        output_size: values predicted at a step; None: input_size.
        dropout: between layers.

    Raises ValueError for an unknown cell.
    """
    rnn = _recurrent("time_series", cell, input_size, hidden_size, num_layers, dropout)
    return TimeSeries(rnn, nn.Linear(hidden_size, input_size if output_size is None else output_size))
