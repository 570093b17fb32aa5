"""The depthwise convolution's kernels, executed on the host and held to the numerics gate on the registry's samples.

The same .cu files as on a GPU, compiled with the host's C++ compiler; outputs and workspace are poisoned, the schedule of threads and
the number of SMs, which decides how work is cut into blocks, change from run to run.
"""

from functools import cache

import pytest
import torch

from pyops.ops import _depthwise_ops as ops
from pyops.ops._activations import NAMES
from pyops.ops.depthwise_conv import _prepare, fold
from pyops.testing import SPECS

from ..conftest import assert_gate, cotangents, double
from .depthwise import DTYPES, Kernels
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized

SAMPLES = {s.id: s for s in SPECS["depthwise_conv_bn_act"].samples if s.test}
NONE, SILU = NAMES.index("none"), NAMES.index("silu")


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def op_arguments(sample, dtype, seed=0):
    """What the public function hands to the op: running statistics folded into a float32 filter, batch statistics left to PyTorch."""
    (x, weight, bias), kwargs = sample.make(dtype, "cpu", seed)
    options = {key: kwargs.get(key, default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))}
    residual, training = kwargs.get("residual"), kwargs.get("training", False)
    call = _prepare("test", x, weight, bias, *options.values(), residual, kwargs.get("activation", "none"))
    if kwargs.get("running_mean") is not None and not training:
        statistics = (kwargs[key] for key in ("running_mean", "running_var", "bn_weight", "bn_bias"))
        weight, bias = fold(weight, bias, *statistics, 1e-5)
    activation, slope = (NONE, 0.0) if training else (call.activation, kwargs.get("negative_slope", 0.01))
    geometry = [list(each) for each in (call.stride, call.padding, call.dilation)]
    return x, weight, bias, residual, *geometry, activation, slope, kwargs.get("return_means", False)


def present(tensors):
    return [t for t in tensors if t is not None and t.numel() > 0]


def as_double(arguments):
    return [double(a) if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("id", SAMPLES)
def test_registry_samples(library, kernels, id, dtype):
    if SAMPLES[id].make(dtype, "cpu", 0)[0][0].shape[0] == 0:
        pytest.skip("no images: no kernel is launched")

    @cache
    def draw(seed):
        """((results, their float64 truths, eager's), (gradients, their truths, eager's))"""
        library.host_machine(seed, 2 + seed % 3, 163 * 1024)
        args = op_arguments(SAMPLES[id], dtype, seed)
        exact = as_double(args)
        results = present(kernels.forward(*args)), present(ops.reference(*exact)), present(ops.reference(*args))
        output, *means = results[2]
        given = [*cotangents([output]), *(g.float() for g in cotangents(means)), *[None] * (1 - len(means))]
        grads = kernels.backward(*given, *args[:-1], True, True)
        truth = ops._kernel_reference_backward(*as_double(given), *exact[:-1], True, True)
        eager = ops._kernel_reference_backward(*given, *args[:-1], True, True)
        return results, (present(grads), present(truth), present(eager))

    assert_gate(lambda seed: draw(seed)[0], dtype)
    assert_gate(lambda seed: draw(seed)[1], dtype, gradient=True)


CASES = ("plain", "odd", "stride2", "dilation", "residual_silu", "wide_padding", "corner_k7_s2_6x7")


@pytest.mark.parametrize("id", CASES)
def test_no_order_of_threads_changes_a_bit(library, kernels, id):
    args = op_arguments(SAMPLES[id], torch.bfloat16)
    runs = []
    for seed in range(3):
        library.host_machine(seed, 3, 163 * 1024)
        results = kernels.forward(*args)
        runs.append(present([*results, *kernels.backward(results[0], None, *args[:-1], True, True)]))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("sm_count", [1, 2, 500])
@pytest.mark.parametrize("id", ["odd", "stride2_k5", "stride_1_3"])
def test_any_number_of_multiprocessors(library, kernels, id, sm_count):
    """Several passes and images a block, or one: the same sums, cut elsewhere."""
    args = op_arguments(SAMPLES[id], torch.float32)
    found = []
    for count in (7, sm_count):
        library.host_machine(1, count, 163 * 1024)
        results = kernels.forward(*args)
        found.append(present([*results, *kernels.backward(results[0], results[1], *args[:-1], True, True)]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("id", ["plain", "wide_padding", "stride2", "dilation", "corner_k5_s1_6x7", "corner_k7_s2_7x6"])
def test_integers_are_exact(library, kernels, id, dtype):
    x, weight, bias, _, *geometry, _, slope, _ = op_arguments(SAMPLES[id], dtype)
    x, weight, bias = x.sign(), weight.to(dtype).sign(), bias.to(dtype).sign()
    library.host_machine(1, 2, 163 * 1024)
    args = (x, weight, bias, None, *geometry, NONE, slope, False)
    output, _ = kernels.forward(*args)
    assert torch.equal(output.double(), ops.reference(*as_double(args))[0])
    g = cotangents([output])[0].sign()
    found = present(kernels.backward(g, None, *args[:-1], True, True))
    truth = present(ops._kernel_reference_backward(g.double(), None, *as_double(args[:-1]), True, True))
    assert all(torch.equal(a.double(), b.to(a.dtype).double()) for a, b in zip(found, truth, strict=True))


@pytest.mark.parametrize("K", [3, 4])
def test_only_the_gradients_that_are_wanted(library, kernels, K):
    library.host_machine(1, 2, 163 * 1024)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 8, 7, 6), (8, 1, K, K), (8,)))
    args = (x, weight, bias, None, [1, 1], [1, 1], [1, 1], SILU, 0.0)
    g = kernels.forward(*args, False)[0]
    whole = kernels.backward(g, None, *args, True, True)
    assert kernels.backward(g, None, *args, True, False)[1:] == (None, None, None)
    assert torch.equal(kernels.backward(g, None, *args, True, False)[0], whole[0])
    assert torch.equal(kernels.backward(g, None, *args, False, True)[1], whole[1])
    residual = torch.zeros_like(g)
    *_, alone = kernels.backward(g, None, *args[:3], residual, *args[4:], False, False)
    assert torch.equal(alone.sum((0, 2, 3)), kernels.backward(g, None, *args[:3], residual, *args[4:], False, True)[3].sum((0, 2, 3)))
    zeros = present(kernels.backward(None, None, *args, True, True))
    assert not any(t.any() for t in zeros)


def test_a_filter_larger_than_shared_memory(library, kernels):
    """31x31 taps pass through in chunks, forward and backward."""
    library.host_machine(1, 2, 163 * 1024)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 9, 8, generator=generator)
    weight, bias = torch.randn(8, 1, 31, 31, generator=generator) / 31, torch.randn(8, generator=generator)
    args = (x, weight, bias, None, [1, 1], [15, 15], [1, 1], NONE, 0.0)
    output, means = kernels.forward(*args, True)
    truth = ops.reference(*as_double(args), True)
    torch.testing.assert_close(output.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(means.double(), truth[1], rtol=1e-5, atol=1e-5)
    found = present(kernels.backward(output, means, *args, True, True))
    expected = present(ops._kernel_reference_backward(output.double(), means.double(), *as_double(args), True, True))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


class TooLarge(Kernels):
    def head(self, *args):
        shape, head = super().head(*args)
        shape.H, shape.W = 2**20, 2**11
        return shape, (shape, *head[1:])


def test_what_does_not_fit_an_index_is_refused(library):
    x = torch.zeros(1, 8, 4, 4)
    with pytest.raises(RuntimeError, match=r"up to 2\^30 positions"):
        TooLarge(library).forward(x, torch.zeros(8, 1, 3, 3), None, None, [1, 1], [1, 1], [1, 1], NONE, 0.0, True)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*(source for source in kernel_sources() if source.parent.name == "conv"), DRIVER / "depthwise_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "depthwise_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "cases clean" in done.stdout, done.stdout + done.stderr[:4000]
