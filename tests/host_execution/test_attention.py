"""Attention's GPU kernels, executed on the host and held to the numerics gate against the reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; results are poisoned, the schedule of threads and the number of
SMs, which decides how the heads are spread over blocks, change from run to run. The samples are those of the public functions.
"""

import math

import pytest
import torch

from pyops.ops import _attention_limits as limits
from pyops.testing.samples.attention import attention_arguments
from pyops.testing.samples.window_attention import window_arguments

from .attention import DTYPES, SAMPLES, WINDOW_SAMPLES, Kernels, gate, prepared, reference, window_call, window_gate
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_attention(kernels, sample, dtype):
    gate(kernels, sample.make, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("sample", WINDOW_SAMPLES.values(), ids=WINDOW_SAMPLES)
def test_window_attention(kernels, sample, dtype):
    window_gate(kernels, sample.make, dtype)


@pytest.mark.parametrize("N, D", [(1, 64), (17, 40), (49, 32), (64, 59), (257, 80), (320, 72)])
def test_lengths(kernels, N, D):
    gate(kernels, lambda dtype, device, seed: attention_arguments(1, 2, N, D, dtype, device, seed), BF16)


OPTIONS = {
    "plain": {},
    "everything": dict(bias=(1, 2, 90, 130), alibi=True, softcap=4.0, window=(40, 20), drop=(0.2, 3), spread=2.0),
    "a_bias_of_strides": dict(bias=(1, 1, 90, 1), is_causal=True),
    "negative_scale": dict(scale=-0.3),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(kernels, options):
    gate(kernels, lambda dtype, device, seed: attention_arguments(1, 2, 90, 24, dtype, device, seed, M=130, **options), BF16)


def test_a_bias_of_any_strides(library, kernels):
    """Transposed, every other column, of each dtype: as if it were contiguous."""
    library.host_machine(1, 3, 163 * 1024)
    tensors, _ = attention_arguments(2, 2, 35, 16, BF16, "cpu", M=41)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(41, 2, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
        bias = wide.permute(1, 2, 0)[None, :, ::2]
        dense = prepared(*tensors, attn_bias=bias.contiguous())
        strided = dense._replace(bias=bias.contiguous().transpose(2, 3).contiguous().transpose(2, 3)[..., :41])
        strided = strided._replace(bias=torch.cat([strided.bias, strided.bias], 2)[:, :, :35])
        assert torch.equal(kernels.attention(dense)[0], kernels.attention(strided)[0])


@pytest.mark.parametrize("make", [SAMPLES["dropout_bias"].make, SAMPLES["lengths_bias"].make], ids=["dropout", "lengths"])
def test_any_order_of_threads_and_blocks(library, kernels, make):
    args, kwargs = make(BF16, "cpu")
    call, runs = prepared(*args, **kwargs), []
    for seed, count in ((0, 1), (1, 1), (2, 5), (3, 500)):
        library.host_machine(seed, count, 163 * 1024)
        runs.append(kernels.attention(call))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_outputs_of_any_layout(library, kernels):
    """Token-major, and rows that are not aligned: the same bits."""
    library.host_machine(1, 3, 163 * 1024)
    args, _ = attention_arguments(2, 3, 33, 24, BF16, "cpu")
    call = prepared(*args)
    plain, _ = kernels.attention(call)
    for output in (torch.empty(2, 33, 3, 24, dtype=BF16).transpose(1, 2), torch.empty(2, 3, 33, 27, dtype=BF16)[..., 1:25]):
        assert torch.equal(kernels.attention(call, output.fill_(math.nan))[0], plain)


def test_no_key_and_no_sequence(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    args, _ = attention_arguments(1, 2, 12, 16, BF16, "cpu")
    call = prepared(*args)
    for spans in (torch.zeros(0, 4, dtype=torch.int32), torch.tensor([[3, 4, 0, 0], [9, 90, 5, 0]], dtype=torch.int32)):
        output, lse = kernels.attention(call._replace(spans=spans))
        assert not output.any() and (lse == -math.inf).all()


def test_spans_are_clamped(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    args, _ = attention_arguments(1, 2, 12, 16, BF16, "cpu")
    call = prepared(*args)
    of = lambda *spans: call._replace(spans=torch.tensor(spans, dtype=torch.int32))  # noqa: E731
    wild, within = kernels.attention(of([-3, 5, -1, 99], [7, 99, 4, 99])), of([0, 5, 0, 12], [7, 5, 4, 8])
    assert all(torch.equal(a, b) for a, b in zip(wild, kernels.attention(within), strict=True))
    torch.testing.assert_close(wild[0].double(), reference(within)[0].double(), rtol=0.02, atol=0.02)


def test_what_does_not_fit_is_refused(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    rows, head = limits.MOST_CUDA_ROWS, limits.MOST_CUDA_HEAD_SIZE
    for N, M, D in ((rows + 1, 8, 8), (8, rows + 1, 8), (8, 8, head + 1)):
        with pytest.raises(RuntimeError, match=f"up to {rows} rows, {rows} keys and heads of {head}"):
            kernels.attention(prepared(*attention_arguments(1, 1, N, D, BF16, "cpu", M=M)[0]))
    make = lambda *_: window_arguments(1, 18, 18, 1, 8, 18, BF16, "cpu")  # noqa: E731
    with pytest.raises(RuntimeError, match=f"windows of up to {limits.MOST_CUDA_TOKENS} tokens"):
        kernels.window_attention(window_call(make, BF16))
    library.host_machine(1, 3, 99 * 1024)
    with pytest.raises(RuntimeError, match="keys and values need 163840 bytes of shared memory, this GPU has 101376"):
        kernels.attention(prepared(*attention_arguments(1, 1, 320, 128, BF16, "cpu")[0]))


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*(source for source in kernel_sources() if source.parent.name == "attention"), DRIVER / "attention_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "attention_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "22 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
