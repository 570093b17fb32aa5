"""Convolutions, then recurrent layers, in plain torch.nn."""

from torch import nn

from pyops.testing.twins import twin_of


@twin_of("digits_hybrid")
class DigitsHybrid(nn.Module):
    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(),
        )  # fmt: skip
        self.rnn = nn.RNN(14 * 32, 128, batch_first=True)
        self.gru = nn.GRU(128, 64, batch_first=True)
        self.lstm = nn.LSTM(64, 32, batch_first=True)
        self.classifier = nn.Linear(32, num_classes)

    def forward(self, x):
        x = self.features(x).permute(0, 2, 3, 1).flatten(2)
        x, _ = self.rnn(x)
        x, _ = self.gru(x)
        _, (h, _) = self.lstm(x)
        return self.classifier(h[0])
