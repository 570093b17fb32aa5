"""Autoencoders in plain torch.nn."""

import torch
from torch import nn

from pyops.testing.twins import twin_of


def dense(sizes, activation):
    layers = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
    return layers


@twin_of("stacked_autoencoder")
class StackedAutoencoder(nn.Module):
    def __init__(self, in_features: int = 768, hidden=(512, 256)):
        super().__init__()
        sizes = (in_features, *hidden)
        self.encoder = nn.Sequential(*dense(sizes, nn.Sigmoid))
        self.decoder = nn.Sequential(*dense(sizes[::-1], nn.Sigmoid))

    def forward(self, x):
        return self.decoder(self.encoder(x))


@twin_of("denoising_autoencoder")
class DenoisingAutoencoder(StackedAutoencoder):
    def __init__(self, in_features: int = 768, hidden=(512, 256), noise: float = 0.5):
        super().__init__(in_features, hidden)
        self.noise = noise

    def forward(self, x):
        return super().forward(x + self.noise * torch.randn_like(x) if self.training else x)


@twin_of("variational_autoencoder")
class VariationalAutoencoder(nn.Module):
    """``draw(like)``: the normal numbers of a training step; a test puts those of pyops in its place."""

    def __init__(self, in_features: int = 768, hidden=(512, 256), latent: int = 128):
        super().__init__()
        self.encoder = nn.Sequential(*dense((in_features, *hidden), nn.ReLU), nn.Linear(hidden[-1], 2 * latent))
        self.decoder = nn.Sequential(*dense((latent, *hidden[::-1]), nn.ReLU), nn.Linear(hidden[0], in_features))
        self.latent = latent
        self.draw = torch.randn_like

    def forward(self, x):
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        z = mean + (0.5 * log_var).exp() * self.draw(mean) if self.training else mean
        return self.decoder(z), -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1)

    def loss(self, x):
        output, kl = self(x)
        return (0.5 * ((output - x) ** 2).sum(1) + kl).mean()


def down(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def up(inputs, outputs, activation=nn.ReLU):
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs), activation())


@twin_of("convolutional_autoencoder")
class ConvolutionalAutoencoder(nn.Module):
    def __init__(self, in_channels: int = 3, channels=(16, 32, 32)):
        super().__init__()
        sizes = (in_channels, *channels)
        last = len(sizes) - 1
        self.encoder = nn.Sequential(*(down(sizes[i], sizes[i + 1]) for i in range(last)))
        self.decoder = nn.Sequential(*(up(sizes[i], sizes[i - 1], nn.ReLU if i > 1 else nn.Tanh) for i in range(last, 0, -1)))

    def forward(self, x):
        return self.decoder(self.encoder(x))
