"""Autoencoders: stacked, denoising, variational, convolutional."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pyops import gaussian_sample
from pyops.nn import ConvBNAct, Sequential, UpsampleConvBNAct

from ._registry import images, register, rows


def _layers(sizes: Sequence[int], activation: type[nn.Module]) -> list[nn.Module]:
    """Linear layers, each with its activation."""
    return [layer for inputs, outputs in pairwise(sizes) for layer in (nn.Linear(inputs, outputs), activation())]


def _sizes(owner: str, first: int, others: Sequence[int], option: str = "hidden") -> tuple[int, ...]:
    if not others:
        raise ValueError(f"{owner}: {option}: expected one size or more, got none")
    return first, *others


class Autoencoder(nn.Module):
    """``[N, in_features]`` to the same: ``encoder`` to the last of `hidden`, ``decoder`` back, a sigmoid after every layer.

    noise: the deviation of normal noise that is added to the input while training.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], noise: float = 0.0):
        super().__init__()
        sizes = _sizes("Autoencoder", in_features, hidden)
        self.encoder = Sequential(*_layers(sizes, nn.Sigmoid))
        self.decoder = Sequential(*_layers(sizes[::-1], nn.Sigmoid))
        self.noise = noise

    def forward(self, input: Tensor) -> Tensor:
        if self.training and self.noise:
            input = input + self.noise * torch.randn_like(input)
        return self.decoder(self.encoder(input))


@register(rows(768), "Bengio et al., 2007")
def stacked_autoencoder(in_features: int = 768, hidden: Sequence[int] = (512, 256)) -> Autoencoder:
    """768-512-256-512-768 with sigmoids, of values from 0 to 1: 1,050,624 parameters. hidden: the encoder's sizes, the last the code's."""
    return Autoencoder(in_features, hidden)


@register(rows(768), "Vincent et al., 2008")
def denoising_autoencoder(in_features: int = 768, hidden: Sequence[int] = (512, 256), noise: float = 0.5) -> Autoencoder:
    """The stacked one, which adds ``noise * randn`` to its input while training and is to give back what it was without."""
    return Autoencoder(in_features, hidden, noise)


class VariationalAutoencoder(nn.Module):
    """``[N, in_features]`` to (the same; each sample's divergence ``[N]``): ``encoder`` to mean and log-variance, side by side, of a normal
    distribution over ``latent`` variables, ``decoder`` from a draw of it, or from its mean in eval mode. ReLU within, none at either end.

    Source: Kingma and Welling, "Auto-encoding variational Bayes", 2014.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], latent: int):
        super().__init__()
        sizes = _sizes("VariationalAutoencoder", in_features, hidden)
        self.encoder = Sequential(*_layers(sizes, nn.ReLU), nn.Linear(sizes[-1], 2 * latent))
        self.decoder = Sequential(*_layers((latent, *sizes[:0:-1]), nn.ReLU), nn.Linear(sizes[1], in_features))
        self.latent = latent

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = self.encoder(input).chunk(2, dim=1)
        z, kl = gaussian_sample(mean, log_var, seed=None if self.training else 0)  # in eval mode nothing is drawn from the generator
        return self.decoder(z if self.training else mean), kl

    def loss(self, input: Tensor) -> Tensor:
        """The negative evidence lower bound but for a constant, a sample's mean: half the squared distance of what is decoded (a normal
        distribution of variance one) and the divergence."""
        output, kl = self(input)
        return (0.5 * (output - input).square().flatten(1).sum(1) + kl).mean()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``[n, in_features]`` decoded from standard normal latent variables."""
        weight = next(self.decoder.parameters())
        return self.decoder(torch.randn(n, self.latent, generator=generator, dtype=weight.dtype, device=weight.device))


@register(rows(768), "Kingma and Welling, 2014")
def variational_autoencoder(in_features: int = 768, hidden: Sequence[int] = (512, 256), latent: int = 128) -> VariationalAutoencoder:
    """768-512-256 to 128 latent variables and back, with ReLU: 1,149,440 parameters. ``loss`` trains it; ``sample(n)`` makes new ones."""
    return VariationalAutoencoder(in_features, hidden, latent)


class ConvolutionalAutoencoder(nn.Module):
    """``[N, in_channels, H, W]`` to the same, H and W multiples of ``2 ** len(channels)``: ``encoder`` of 3x3 convolutions with batch norm,
    ReLU and 2x2 max pooling, ``decoder`` of 3x3 convolutions on the enlarged image with batch norm and ReLU, after the last tanh.
    """

    def __init__(self, in_channels: int, channels: Sequence[int]):
        super().__init__()
        sizes = _sizes("ConvolutionalAutoencoder", in_channels, channels, "channels")
        back = sizes[::-1]
        self.encoder = nn.Sequential(*(ConvBNAct(a, b, pool=nn.MaxPool2d(2)) for a, b in pairwise(sizes)))
        self.decoder = nn.Sequential(
            *(UpsampleConvBNAct(a, b) for a, b in pairwise(back[:-1])),
            UpsampleConvBNAct(back[-2], back[-1], activation="tanh"),
        )

    def forward(self, input: Tensor) -> Tensor:
        return self.decoder(self.encoder(input.contiguous(memory_format=torch.channels_last)))


@register(images(256), "Masci et al., 2011")
def convolutional_autoencoder(in_channels: int = 3, channels: Sequence[int] = (16, 32, 32)) -> ConvolutionalAutoencoder:
    """3-16-32-32 channels and back, of images with values from -1 to 1, 256 x 256 to 32 x 32: 28,774 parameters.

    channels: of the encoder's layers.
    """
    return ConvolutionalAutoencoder(in_channels, channels)
