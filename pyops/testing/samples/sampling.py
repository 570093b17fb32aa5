"""Samples of `gaussian_sample`."""

from __future__ import annotations

import torch

from pyops.ops.gaussian_sample import gaussian_sample
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gaussian_arguments(size, dtype, device, seed=0, *, layout="contiguous", spread=1.0, number=None):
    """mean and log_var; layout "halves": of one tensor, as an encoder leaves them. number: the seed of eps."""
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * size[-1] + size[0])
    mean, log_var = (torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2))
    log_var = log_var * spread
    if layout == "halves":
        mean, log_var = torch.cat([mean, log_var], 1).chunk(2, 1)
    elif layout == "channels_last":
        mean, log_var = (t.contiguous(memory_format=torch.channels_last) for t in (mean, log_var))
    elif layout == "expanded":
        log_var = log_var[:1].expand_as(mean)
    return (mean, log_var), {"seed": 7919 * seed + 17 if number is None else number}


def _sample(id: str, *size: int, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: gaussian_arguments(size, dtype, device, seed, **options), bench, not bench)


SAMPLES = (
    _sample("plain", 3, 8),
    _sample("odd", 5, 37),
    _sample("wide", 2, 10_007),
    _sample("many_rows", 130, 20),
    _sample("image", 2, 4, 6, 5),
    _sample("channels_last", 2, 4, 6, 5, layout="channels_last"),
    _sample("halves", 6, 24, layout="halves"),
    _sample("halves_odd", 6, 27, layout="halves"),
    _sample("image_halves", 2, 3, 5, 7, layout="halves"),
    _sample("expanded", 4, 12, layout="expanded"),
    _sample("far", 4, 60, spread=8.0),  # deviations from a fiftieth of a thousandth to tens of thousands
    _sample("near", 4, 60, spread=1e-3),  # where exp(log_var) - 1 - log_var cancels
    _sample("one_dimension", 19),
    _sample("one_element", 2, 1),
    _sample("three_elements", 2, 3),
    _sample("negative_seed", 3, 8, number=-(2**62) + 12345),
    _sample("no_rows", 0, 8),
    _sample("no_elements", 3, 0),
    # a VAE on digits, the autoencoder's latent images of latent diffusion, at batches of training and serving
    _sample("128x20", 128, 20, bench=True),
    _sample("128x128", 128, 128, bench=True),
    _sample("1x4x64x64", 1, 4, 64, 64, bench=True),
    _sample("8x4x64x64", 8, 4, 64, 64, bench=True),
    _sample("64x4096", 64, 4096, bench=True),
)
_z = torch.zeros
_generator = torch.Generator()


def _case(id: str, error: type[Exception], match: str, mean=None, log_var=None, **change) -> ErrorCase:
    """The first sample's call with arguments replaced."""

    def make():
        args, kwargs = SAMPLES[0].make(torch.float32, "cpu")
        given = tuple(a if b is None else b for a, b in zip(args, (mean, log_var), strict=True))
        return given, kwargs | change

    return ErrorCase(id, make, error, match)


ERRORS = (
    _case("mean_kind", TypeError, "mean: expected a Tensor, got list", mean=[1.0]),
    _case("mean_dim", ValueError, r"mean: expected \[N, ...\] of float32", mean=_z(())),
    _case("mean_dtype", ValueError, "mean: expected a floating tensor, got torch.int64", mean=_z(3, 8).long()),
    _case("log_var_kind", TypeError, "log_var: expected a Tensor, got float", log_var=1.0),
    _case("log_var_shape", ValueError, r"log_var: expected shape \(3, 8\), got \(3, 4\)", log_var=_z(3, 4)),
    _case("log_var_dtype", ValueError, "log_var: expected mean's dtype torch.float32, got torch.bfloat16", log_var=_z(3, 8).bfloat16()),
    _case("log_var_device", ValueError, "log_var: expected mean's device cpu, got meta", log_var=_z(3, 8, device="meta")),
    _case("generator_kind", TypeError, "generator: expected a torch.Generator or None, got int", generator=3, seed=None),
    _case("generator_and_seed", ValueError, "generator: expected None together with a seed", generator=_generator),
    _case("seed_kind", TypeError, "seed: expected an int, an int64 Tensor or None, got 1.5", seed=1.5),
    _case("seed_dtype", ValueError, "seed: expected one int64, got torch.float32", seed=_z(1)),
    _case("seed_shape", ValueError, r"seed: expected one int64, got torch.int64 of shape \(2,\)", seed=_z(2).long()),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
    _case("backend_vendor", ValueError, "backend 'vendor' cannot run this call: PyTorch has no such op", backend="vendor"),
)


def _torch(compiled: bool = False):
    """What a model without the op writes: PyTorch's own random numbers."""

    def call(mean, log_var):
        z = mean + (0.5 * log_var).exp() * torch.randn_like(mean)
        return z, -0.5 * (1 + log_var - mean.square() - log_var.exp()).flatten(1).sum(1)

    def factory(args, kwargs):
        run = torch.compile(call) if compiled else call
        return lambda: run(*args)

    return factory


register(
    OpSpec(
        name="gaussian_sample",
        public=gaussian_sample,
        family="sampling",
        ops=("gaussian_run", "gaussian_grad", "gaussian_fwd", "gaussian_bwd"),
        samples=SAMPLES,
        errors=ERRORS,
        # 7 rounds of 14 operations for four numbers; a logarithm, a root, a sine or cosine and an exponential: some 40 an element
        flops=lambda mean, *_, **__: (7 * 14 // 4 + 40) * mean.numel(),
        bytes=lambda mean, *_, **__: 3 * mean.numel() * mean.element_size(),
        baselines={"torch": _torch(), "torch.compile": _torch(compiled=True)},
        dtypes=DTYPES,
    )
)
