"""The 1x1 convolution's kernels, executed on the host and held to the numerics gate against their reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how work is cut into blocks, change from run to run.
"""

import pytest
import torch

from pyops.ops import _channel_ops
from pyops.ops import _pointwise_ops as ops
from pyops.ops._activations import NAMES

from ..conftest import assert_gate
from .depthwise import DTYPES
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .pointwise import Kernels
from .test_faults import run_sanitized

NONE, SILU, HARDSWISH = (NAMES.index(name) for name in ("none", "silu", "hardswish"))
ALL = ("rows", "affine", "gate", "bias", "keep", "residual")
SHAPES = {  # N, C, O, H, W: whole tiles, ragged ones, one of everything, several steps and blocks of channels
    "tiles": (1, 64, 64, 8, 16),
    "ragged": (2, 24, 40, 7, 5),
    "odd": (2, 13, 9, 5, 7),
    "one": (1, 1, 1, 1, 1),
    "deep": (1, 264, 16, 3, 3),
    "wide": (3, 16, 136, 3, 3),
}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def problem(shape, dtype, options=ALL, activations=(SILU, HARDSWISH), weight_dtype=None, seed=0, slope=0.1):
    """Arguments of pointwise_run."""
    N, C, O, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    x, weight = draw(N, C, H, W).to(dtype), (draw(O, C) / C**0.5).to(weight_dtype or dtype)
    v = {"rows": draw(2, N * H * W), "affine": draw(3, C), "gate": draw(N, C), "bias": draw(O), "keep": draw(N)}
    v["residual"] = draw(N, O, H, W).to(dtype)
    v = {name: value if name in options else None for name, value in v.items()}
    before = (v["rows"], v["affine"], v["gate"], activations[0], slope)
    return x, weight, *before, v["bias"], v["keep"], v["residual"], activations[1], slope


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def eager(args):
    """The reference as it runs in the images' own type: operands of the product rounded to it."""
    x, weight = args[:2]
    if x.dtype == torch.float32:
        return ops._output(*args)
    identity = torch.eye(x.shape[1], dtype=x.dtype)
    operand = ops._output(x, identity, *args[2:7], None, None, None, NONE, 0.0)
    return ops._output(operand, weight.to(x.dtype), None, None, None, NONE, 0.0, *args[7:])


def held_to_the_gate(library, kernels, make, dtype, sms=(1, 9), **how):
    def draw(seed):
        library.host_machine(seed, sms[seed % 2], 163 * 1024)
        args = make(seed)
        output, _ = kernels.run(*args, False, **how)
        return [output], [ops._output(*double(args))], [eager(args)]

    assert_gate(draw, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sms", [1, 9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_option(library, kernels, shape, sms, dtype):
    """One multiprocessor takes large tiles, nine take small ones."""
    held_to_the_gate(library, kernels, lambda seed: problem(shape, dtype, seed=seed), dtype, (sms, sms))


@pytest.mark.parametrize("options", [(), *((name,) for name in ALL)], ids="".join)
def test_one_option_alone(library, kernels, options):
    for activations in ((NONE, NONE), (HARDSWISH, NONE)):
        held_to_the_gate(
            library, kernels, lambda seed, a=activations: problem((2, 24, 16, 3, 5), torch.bfloat16, options, a, seed=seed), torch.bfloat16
        )


@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
def test_every_activation(library, kernels, activation):
    for dtype in (torch.float32, torch.float16):
        held_to_the_gate(
            library, kernels, lambda seed, d=dtype: problem((1, 8, 8, 3, 3), d, ALL, (activation, activation), seed=seed), dtype
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_float_weights(library, kernels, dtype):
    held_to_the_gate(library, kernels, lambda seed: problem((2, 24, 40, 3, 5), dtype, weight_dtype=torch.float32, seed=seed), dtype)


@pytest.mark.parametrize("around", [(8, 8), (3, 2), (0, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_slices_of_wider_buffers(library, kernels, dtype, around):
    library.host_machine(1, 2, 163 * 1024)
    args = problem((2, 16, 24, 5, 3), dtype)
    dense, sliced = (kernels.run(*args, True, around=each) for each in ((0, 0), around))
    assert all(torch.equal(a, b) for a, b in zip(dense, sliced, strict=True))


@pytest.mark.parametrize("sms", [1, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_moments_of_the_stored_output(library, kernels, dtype, sms):
    """Several tiles a block, or one; a mean far above the deviation."""
    library.host_machine(1, sms, 163 * 1024)
    args = list(problem((3, 8, 72, 16, 15), dtype, ("bias",), (NONE, NONE)))
    args[7] = args[7] + 100
    output, moments = kernels.run(*args, True)
    truth = _channel_ops._moments(output.double())
    torch.testing.assert_close(moments[0].double(), truth[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(moments[1].double(), truth[1], rtol=1e-5, atol=1e-6)


def test_tf32_rounds_operands_alone(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    for shape in ((2, 24, 40, 7, 5), (2, 13, 9, 5, 7)):
        args = problem(shape, torch.float32)
        exact, rough = (kernels.run(*args, False, tf32=tf32)[0] for tf32 in (False, True))
        error = (rough.double() - exact.double()).norm() / exact.double().norm()
        assert 1e-5 < error < 1e-3
        x, weight, *_ = args
        plain = (x.bfloat16().float(), weight.bfloat16().float(), None, None, None, NONE, 0.0, None, None, None, NONE, 0.0)
        truth = ops._output(*double(plain))
        torch.testing.assert_close(kernels.run(*plain, False, tf32=True)[0].double(), truth, rtol=1e-5, atol=1e-5)


def test_a_long_sum_keeps_its_digits(library, kernels):
    """Products of one sign, thousands of them: short slices lose less than one long sum."""
    library.host_machine(1, 2, 163 * 1024)
    x, weight, *rest = problem((1, 4096, 8, 3, 3), torch.float32, (), (NONE, NONE))
    args = (x.abs(), weight.abs(), *rest)
    error = (kernels.run(*args, False)[0].double() / ops._output(*double(args)) - 1).abs().max()
    assert error < 8e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_order_of_threads_changes_a_bit(library, kernels, dtype):
    runs = []
    for seed in range(3):
        library.host_machine(seed, 2, 163 * 1024)
        runs.append(kernels.run(*problem((2, 72, 70, 7, 11), dtype), True, tf32=True))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_integers_are_exact(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    for dtype in DTYPES:
        for tf32 in (False, True):
            x, weight, *v = problem((2, 40, 24, 5, 7), dtype, activations=(NONE, NONE))
            args = (x.sign(), weight.sign(), *(t.sign() if isinstance(t, torch.Tensor) else t for t in v))
            output, _ = kernels.run(*args, False, tf32=tf32)
            assert torch.equal(output.double(), ops._output(*double(args)))


def test_no_positions(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    for N, H in ((0, 3), (2, 0)):
        output, moments = kernels.run(*problem((N, 8, 16, H, 3), torch.bfloat16), True)
        assert output.numel() == 0 and torch.equal(moments, torch.zeros(2, 16))


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    names = ("pointwise", "channel_moments")  # where moments are merged
    sources = [*(source for source in kernel_sources() if source.name.startswith(names)), DRIVER / "pointwise_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "pointwise_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "20 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
