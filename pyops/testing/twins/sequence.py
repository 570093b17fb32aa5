"""The recurrent networks over sequences in plain torch.nn."""

from torch import nn

from pyops.testing.twins import twin_of

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@twin_of("language_model")
class LanguageModel(nn.Module):
    def __init__(self, vocab_size=10000, hidden_size=650, num_layers=2, cell="lstm", dropout=0.5, tied=True, embedding_dim=None):
        super().__init__()
        embedding_dim = embedding_dim or hidden_size
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        between = dropout if num_layers > 1 else 0.0
        self.rnn = CELLS[cell](embedding_dim, hidden_size, num_layers, batch_first=True, dropout=between)
        self.head = nn.Linear(hidden_size, vocab_size)
        if tied:
            self.head.weight = self.embedding.weight
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, state=None):
        output, state = self.rnn(self.dropout(self.embedding(tokens)), state)
        return self.head(self.dropout(output)), state


@twin_of("time_series")
class TimeSeries(nn.Module):
    def __init__(self, input_size=1, hidden_size=64, num_layers=2, cell="lstm", output_size=None, dropout=0.0):
        super().__init__()
        between = dropout if num_layers > 1 else 0.0
        self.rnn = CELLS[cell](input_size, hidden_size, num_layers, batch_first=True, dropout=between)
        self.head = nn.Linear(hidden_size, output_size or input_size)

    def forward(self, series, state=None):
        output, state = self.rnn(series, state)
        return self.head(output), state
