"""Recurrent encoder and decoder with additive attention, in plain torch.nn."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pyops.testing.twins import twin_of

KINDS = {"gru": (nn.GRU, nn.GRUCell), "lstm": (nn.LSTM, nn.LSTMCell)}


class AdditiveAttention(nn.Module):
    def __init__(self, hidden_size, width):
        super().__init__()
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key = nn.Linear(width, hidden_size)
        self.energy = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, state, positions, keys, padding):
        scores = self.energy(torch.tanh(self.query(state).unsqueeze(1) + keys)).squeeze(2)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        return torch.bmm(scores.softmax(1).unsqueeze(1), positions).squeeze(1)


@twin_of("seq2seq")
class Seq2Seq(nn.Module):
    def __init__(
        self,
        source_vocabulary: int = 30000,
        target_vocabulary: int = 30000,
        embedding_size: int = 620,
        hidden_size: int = 1000,
        rnn: str = "gru",
        bidirectional: bool = True,
        num_layers: int = 1,
    ):
        super().__init__()
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

    def forward(self, source, target_in, source_lengths=None):
        embedded, padding = self.source_embedding(source), None
        if source_lengths is None:
            positions, last = self.encoder(embedded)
        else:
            packed, last = self.encoder(pack_padded_sequence(embedded, source_lengths, batch_first=True, enforce_sorted=False))
            positions, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.shape[1])
            padding = torch.arange(source.shape[1]) >= source_lengths[:, None]
        h, c = last if isinstance(last, tuple) else (last, None)
        h, c = torch.tanh(self.bridge(h[-1])), None if c is None else c[-1]
        keys = self.attention.key(positions)
        logits = []
        for x in self.target_embedding(target_in).unbind(1):
            context = self.attention(h, positions, keys, padding)
            step = torch.cat([x, context], 1)
            if c is None:
                h = self.decoder(step, h)
            else:
                h, c = self.decoder(step, (h, c))
            hidden = self.readout(torch.cat([h, context, x], 1))
            logits.append(self.output(hidden.unflatten(1, (-1, 2)).amax(2)))
        return torch.stack(logits, 1)
