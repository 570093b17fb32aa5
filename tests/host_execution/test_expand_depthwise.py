"""The fused expansion and depthwise convolution, executed on the host and held to the numerics gate against its reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides the tile, change from run to run. float32 operands of the expansion are numbers that tf32 has, so that
products are exact and the rest is held to float32's gate.
"""

import pytest
import torch

from pyops.ops import _expand_depthwise_ops as ops
from pyops.ops._activations import NAMES

from ..conftest import assert_gate
from .depthwise import DTYPES
from .expand_depthwise import Kernels
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized

NONE, SILU = NAMES.index("none"), NAMES.index("silu")
SMALL, LARGE = 200, 1  # SMs: blocks of small tiles fill many, large tiles are best for one
SHAPES = {  # N, C, E, H, W: parities of both sizes, ragged channels, steps of C, slices of E, rows beyond one block of the product
    "even": (1, 32, 64, 8, 6),
    "odd": (2, 13, 9, 7, 5),
    "mixed": (3, 40, 72, 5, 10),
    "row": (1, 8, 12, 1, 33),
    "column": (2, 24, 4, 19, 1),
    "one": (1, 1, 1, 1, 1),
    "plane": (1, 16, 70, 14, 14),
    "wide": (1, 3, 17, 31, 30),
}


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def problem(shape, dtype, K=3, stride=1, activation=SILU, biases=True, weight_dtype=torch.float32, seed=0):
    """Arguments of expand_depthwise."""
    N, C, E, H, W = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    fine = torch.bfloat16 if dtype == torch.float32 else dtype  # what tensor cores take as it is
    x, expand = draw(N, C, H, W).to(fine).to(dtype), (draw(E, C) / C**0.5).to(fine).to(weight_dtype)
    depthwise = (draw(E, 1, K, K) / K).to(weight_dtype)
    first, second = (draw(E) if biases else None for _ in range(2))
    return x, expand, first, depthwise, second, stride, activation, 0.1, True


def double(args):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in args]


def reference(args):
    return ops._reference(*args, False)


def held_to_the_gate(library, kernels, make, dtype, sms):
    def draw(seed):
        library.host_machine(seed, sms, 163 * 1024)
        args = make(seed)
        return kernels.run(*args), reference(double(args)), reference(args)

    assert_gate(draw, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("K", [3, 5, 7])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_size(library, kernels, shape, K, stride, dtype):
    for sms in (SMALL, LARGE) if shape[3] * shape[4] > 100 else (SMALL,):
        held_to_the_gate(library, kernels, lambda seed: problem(shape, dtype, K, stride, seed=seed), dtype, sms)


@pytest.mark.parametrize("activation", range(len(NAMES)), ids=NAMES)
def test_every_activation(library, kernels, activation):
    """Positions outside the image are zeros after the activation, not the activation of zero."""
    for dtype in (torch.float32, torch.float16):
        held_to_the_gate(library, kernels, lambda seed, d=dtype: problem((1, 8, 8, 4, 5), d, 5, 1, activation, seed=seed), dtype, LARGE)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_weights_of_the_images_type_and_no_biases(library, kernels, dtype):
    for C in (16, 13):  # a weight that is read as it is, and one that is packed
        held_to_the_gate(
            library, kernels, lambda seed, C=C: problem((2, C, 24, 6, 7), dtype, biases=False, weight_dtype=dtype, seed=seed), dtype, SMALL
        )


@pytest.mark.parametrize("sms", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_integers_are_exact(library, kernels, dtype, sms):
    library.host_machine(1, sms, 163 * 1024)
    for K in (3, 5, 7):
        for stride in (1, 2):
            for shape in ((1, 12, 70, 13, 11), (2, 9, 5, 6, 20)):
                args = problem(shape, dtype, K, stride, NONE)
                args = [a.sign() if isinstance(a, torch.Tensor) else a for a in args]
                output, means = kernels.run(*args)
                truth, mean = reference(double(args))
                assert truth.abs().max() <= 256, "more than bfloat16 counts to"
                assert torch.equal(output.double(), truth)
                torch.testing.assert_close(means.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_halo_is_the_neighbours(library, kernels):
    """Each output names the positions it saw: an impulse anywhere comes out as the filter around it, across every tile's edge."""
    H, W = 33, 30
    for sms in (SMALL, LARGE):
        library.host_machine(1, sms, 163 * 1024)
        for K, stride in ((3, 1), (5, 2)):
            x = torch.arange(H * W).remainder(251).reshape(1, 1, H, W).half()
            filter = torch.zeros(K * K, 1, K, K)
            filter.view(K * K, -1).fill_diagonal_(1)  # channel i is the image, shifted by tap i
            args = (x, torch.ones(K * K, 1), None, filter, None, stride, NONE, 0.0, False)
            output, means = kernels.run(*args)
            assert means is None and torch.equal(output.double(), reference(double(args))[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_no_order_of_threads_changes_a_bit(library, kernels, dtype):
    for sms in (SMALL, LARGE):
        runs = []
        for seed in range(3):
            library.host_machine(seed, sms, 163 * 1024)
            runs.append(kernels.run(*problem((2, 72, 70, 17, 15), dtype, 5)))
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("around", [(8, 8), (3, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_slices_of_wider_buffers(library, kernels, dtype, around):
    library.host_machine(1, 2, 163 * 1024)
    args = problem((2, 16, 24, 5, 3), dtype)
    dense, sliced = (kernels.run(*args, around=each) for each in ((0, 0), around))
    assert all(torch.equal(a, b) for a, b in zip(dense, sliced, strict=True))


def test_tf32_rounds_operands_alone(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    x, expand, *rest = problem((2, 40, 24, 7, 5), torch.float32)
    generator = torch.Generator().manual_seed(1)
    x, expand = (t + 2.0**-12 * torch.rand(t.shape, generator=generator) * t for t in (x, expand))
    args = (x, expand, *rest)
    error = (kernels.run(*args)[0].double() - reference(double(args))[0]).norm() / reference(double(args))[0].norm()
    assert 1e-6 < error < 3e-4


def test_no_images(library, kernels):
    library.host_machine(1, 2, 163 * 1024)
    output, means = kernels.run(*problem((0, 8, 16, 3, 5), torch.bfloat16))
    assert output.shape == (0, 16, 3, 5) and means.shape == (0, 16)


def test_what_has_no_instance_is_refused(library, kernels):
    with pytest.raises(RuntimeError, match="kernels of 3, 5 or 7, strides of 1 or 2"):
        kernels.run(*problem((1, 8, 8, 12, 12), torch.bfloat16, 9))
    with pytest.raises(RuntimeError, match="kernels of 3, 5 or 7, strides of 1 or 2"):
        kernels.run(*problem((1, 8, 8, 12, 12), torch.bfloat16, 3, 3))


BLOCKS = (  # C, E, H, K, stride: EfficientNet-B0's blocks with an expansion
    (16, 96, 112, 3, 2), (24, 144, 56, 3, 1), (24, 144, 56, 5, 2), (40, 240, 28, 5, 1), (40, 240, 28, 3, 2), (80, 480, 14, 3, 1),
    (80, 480, 14, 5, 1), (112, 672, 14, 5, 1), (112, 672, 14, 5, 2), (192, 1152, 7, 5, 1), (192, 1152, 7, 3, 1),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "x".join(map(str, block)))
def test_tiles_of_an_h100(library, kernels, block, dtype):
    """One image is cut as fine as many are, or finer. Of many little is expanded twice, no more than `unsuited` reckons with."""
    C, E, H, K, stride = block
    library.host_machine(1, 132, 227 * 1024)
    height, width, _ = kernels.tile(1, C, E, H, H, K, stride, dtype)
    most_height, most_width, recompute = kernels.tile(256, C, E, H, H, K, stride, dtype)
    assert height * width <= most_height * most_width
    assert recompute < 1.1 * ops.overlap(dtype, H, K, stride) ** 2
    assert ops.unsuited(dtype, (256, C, H, H), K, stride, True) is None


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    names = ("expand_depthwise", "pointwise", "channel_moments", "depthwise_forward")  # where weights are packed and means merged
    sources = [*(source for source in kernel_sources() if source.name.startswith(names)), DRIVER / "expand_depthwise_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "expand_depthwise_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "36 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
