"""Samples of routing between capsules."""

from __future__ import annotations

import torch

from pyops.ops.capsule_routing import capsule_routing
from pyops.testing.registry import ErrorCase, OpSpec, Sample, register


def arguments(size: tuple[int, ...], dtype, device, seed=0, *, layout="contiguous", length=1.5, **options):
    """Predictions that agree about some outputs: the same values in every dtype, but for rounding. length: about how long a sum is."""
    N, I, J, D = size
    generator = torch.Generator().manual_seed(10**6 * seed + 1000 * I + 10 * J + D)
    noise, agreed = (torch.randn(N, n, J, D, generator=generator, dtype=torch.float64) for n in (I, 1))
    agreed *= torch.rand(N, 1, J, 1, generator=generator, dtype=torch.float64)
    x = ((0.3 * noise + agreed) * (length * J / (I * D**0.5))).to(device, dtype)
    if layout == "by_input":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "strided":  # every other element of a wider tensor
        x = x.repeat_interleave(2, -1)[..., ::2]
    elif layout == "expanded":
        x = x[:, :, :, :1].expand(size)
    return (x,), dict(options)


def _sample(id: str, *size: int, bench: bool = False, **options) -> Sample:
    return Sample(id, lambda dtype, device, seed=0: arguments(size, dtype, device, seed, **options), bench, not bench)


SAMPLES = (
    _sample("plain", 3, 21, 4, 16),
    _sample("odd", 2, 37, 5, 7),
    _sample("wide", 2, 33, 3, 40),
    _sample("capsnet", 1, 300, 10, 16),
    _sample("many_outputs", 2, 9, 70, 3),
    _sample("by_input", 3, 21, 4, 16, layout="by_input"),
    _sample("by_input_odd", 4, 37, 5, 7, layout="by_input"),
    _sample("strided", 2, 18, 3, 8, layout="strided"),
    _sample("expanded", 2, 18, 3, 8, layout="expanded"),
    _sample("strong", 3, 21, 4, 8, length=30.0),
    _sample("one_iteration", 3, 21, 4, 8, num_iterations=1),
    _sample("two_iterations", 3, 21, 4, 8, num_iterations=2),
    _sample("six_iterations", 3, 40, 4, 8, num_iterations=6),
    _sample("constant_couplings", 3, 21, 4, 8, stop_gradient=True),
    _sample("constant_couplings_once", 3, 21, 4, 8, stop_gradient=True, num_iterations=1),
    _sample("one_output", 3, 21, 1, 8),
    _sample("one_input", 3, 1, 4, 8),
    _sample("one_element", 3, 21, 4, 1),
    _sample("one_sample", 1, 130, 4, 8),
    _sample("no_samples", 0, 21, 4, 8),
    *(
        _sample(f"{N}x1152x10x16{'_by_input' if layout == 'by_input' else ''}", N, 1152, 10, 16, bench=True, layout=layout)
        for N in (1, 8, 128)
        for layout in ("contiguous", "by_input")
    ),
)


def _case(id: str, error: type[Exception], match: str, predictions=None, **change):
    """The first sample's call with something replaced."""

    def make():
        args, kwargs = SAMPLES[0].make(torch.float32, "cpu")
        return args if predictions is None else (predictions,), kwargs | change

    return ErrorCase(id, make, error, match)


_z = torch.zeros
ERRORS = (
    _case("kind", TypeError, "predictions: expected a Tensor, got list", [1.0]),
    _case("dim", ValueError, r"predictions: expected \[N, I, J, D\], got shape \(2, 3, 4\)", _z(2, 3, 4)),
    _case("dtype", ValueError, "predictions: expected a floating tensor, got torch.int64", _z(2, 3, 4, 5).long()),
    _case("float8", ValueError, "predictions: expected float32, bfloat16, float16 or float64", _z(2, 3, 4, 5).to(torch.float8_e5m2)),
    _case("no_inputs", ValueError, r"predictions: expected capsules on either side.*\(2, 0, 4, 5\)", _z(2, 0, 4, 5)),
    _case("no_outputs", ValueError, r"predictions: expected capsules on either side.*\(2, 3, 0, 5\)", _z(2, 3, 0, 5)),
    _case("no_elements", ValueError, r"predictions: expected capsules on either side.*\(2, 3, 4, 0\)", _z(2, 3, 4, 0)),
    _case("iterations_kind", TypeError, "num_iterations: expected an int, got 3.0", num_iterations=3.0),
    _case("iterations_bool", TypeError, "num_iterations: expected an int, got True", num_iterations=True),
    _case("iterations_value", ValueError, "num_iterations: expected 1 or more, got 0", num_iterations=0),
    _case("stop_gradient", TypeError, "stop_gradient: expected a bool, got 1", stop_gradient=1),
    _case("backend_device", ValueError, "backend 'cuda' cannot run this call: it needs CUDA tensors", backend="cuda"),
)


def _torch(compiled: bool):
    """PyTorch's own ops for the call, as they are or through the compiler."""

    def factory(args, kwargs):
        call = lambda *a: capsule_routing(*a, **kwargs, backend="eager")  # noqa: E731
        call = torch.compile(call) if compiled else call
        return lambda: call(*args)

    return factory


register(
    OpSpec(
        name="capsule_routing",
        public=capsule_routing,
        family="capsule",
        ops=("capsule_run", "capsule_grad", "capsule_fwd", "capsule_bwd"),
        samples=SAMPLES,
        errors=ERRORS,
        flops=lambda predictions, num_iterations=3, **_: (4 * num_iterations - 2) * predictions.numel(),
        bytes=lambda predictions, *_, **__: predictions.numel() * predictions.element_size(),
        baselines={"torch": _torch(False), "torch.compile": _torch(True)},
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
    )
)
