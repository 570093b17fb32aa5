"""The transformer that translates, in plain torch.nn."""

import math

import torch
from torch import nn

from pyops.testing.twins import twin_of


@twin_of("transformer")
class Transformer(nn.Module):
    positions: torch.Tensor

    def __init__(
        self,
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
    ):
        super().__init__()
        self.source_embedding = nn.Embedding(source_vocabulary, d_model)
        self.target_embedding = nn.Embedding(target_vocabulary, d_model)
        sizes = (d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout)
        self.transformer = nn.Transformer(*sizes, batch_first=True, norm_first=norm_first)
        self.output = nn.Linear(d_model, target_vocabulary, bias=False)
        if tied:
            self.output.weight = self.target_embedding.weight
        for layer in (self.source_embedding, self.target_embedding, self.output):
            nn.init.normal_(layer.weight, 0, d_model**-0.5)
        self.dropout = nn.Dropout(dropout)
        rates = torch.exp(torch.arange(0, d_model, 2).double() * (-math.log(10000.0) / d_model))
        angles = torch.arange(max_length).unsqueeze(1) * rates
        positions = torch.zeros(max_length, d_model)
        positions[:, 0::2], positions[:, 1::2] = torch.sin(angles), torch.cos(angles)
        self.register_buffer("positions", positions, persistent=False)

    def embed(self, embedding, tokens):
        return self.dropout(embedding(tokens) * math.sqrt(embedding.embedding_dim) + self.positions[: tokens.shape[1]])

    def forward(self, source, target_in, source_lengths=None):
        padding = None if source_lengths is None else torch.arange(source.shape[1]) >= source_lengths.unsqueeze(1)
        y = self.transformer(
            self.embed(self.source_embedding, source),
            self.embed(self.target_embedding, target_in),
            tgt_mask=torch.ones(target_in.shape[1], target_in.shape[1], dtype=torch.bool).triu(1),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
            tgt_is_causal=True,
        )
        return self.output(y)
