"""The gradients of attention's GPU kernels, executed on the host and held to the numerics gate against the reference in float64.

The same .cu files as on a GPU, compiled with the host's C++ compiler; results and workspace are poisoned, the schedule of threads and the
number of SMs, which decides how the sums are shared among blocks, change from run to run.
"""

import pytest
import torch

from pyops.testing.samples.attention import attention_arguments
from pyops.testing.samples.window_attention import window_arguments

from .attention import DTYPES, prepared
from .attention_backward import Kernels, attention_problem, attention_run, gate, window_gate, window_problem
from .harness import DRIVER, SANITIZE, SANITIZED_FLAGS, kernel_sources
from .test_faults import run_sanitized

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def kernels(library):
    return Kernels(library)


def attend(*sizes, **options):
    return lambda dtype, device, seed: attention_arguments(*sizes, dtype, device, seed, **options)


def windows(*sizes, **options):
    return lambda dtype, device, seed: window_arguments(*sizes, dtype, device, seed, **options)


ATTENTION = {  # B, H, N, D
    "one": attend(2, 3, 1, 32, M=45),
    "plain": attend(2, 3, 17, 24),
    "n49": attend(3, 2, 49, 32, bias=(1, 2, 49, 49), bias_dtype=torch.float32),
    "causal": attend(1, 2, 64, 64, is_causal=True, layout="token_major"),
    "vit": attend(1, 1, 197, 64, packed=True),
    "odd": attend(1, 2, 37, 41, M=53, layout="strided"),
    "wide": attend(1, 1, 40, 128, M=130),
    "passes": attend(2, 2, 40, 64, M=300, is_causal=True, bias=(1, 2, 40, 300)),
    "gqa": attend(2, 4, 37, 40, M=53, G=2, enable_gqa=True, bias=(1, 4, 37, 53)),
    "bias_of_each_batch": attend(3, 2, 33, 32, bias=(3, 1, 33, 33)),
    "bias_of_keys": attend(3, 2, 33, 72, bias=(1, 2, 1, 33)),
    "bias_of_one": attend(2, 2, 20, 16, bias=(1, 1, 1, 1)),
    "mask": attend(2, 2, 33, 32, mask=(2, 1, 33, 33)),
    "window": attend(1, 2, 70, 16, window=(9, 3)),
    "softcap": attend(1, 2, 40, 32, softcap=2.0, spread=3.0),
    "alibi": attend(2, 4, 33, 32, alibi=True),
    "dropout": attend(2, 3, 40, 64, M=45, drop=(0.3, 77)),
    "lengths": attend(3, 2, 40, 32, lengths=((40, 0, 17), (33, 20, 5)), nan_beyond=True, bias=(1, 2, 40, 40)),
    "ragged": attend(1, 2, 60, 32, ragged=((20, 1, 39), (9, 11, 40))),
}
WINDOWS = {  # B, H, W, heads, D, window
    "plain": windows(2, 8, 12, 2, 16, 4),
    "odd": windows(1, 13, 9, 3, 8, (5, 4), shift=(2, 1)),
    "swin": windows(2, 14, 14, 2, 32, 7, shift=3),
    "no_bias": windows(2, 9, 10, 2, 16, 4, shift=2, bias=False),
    "no_table": windows(1, 8, 8, 2, 16, 4, shift=2, table=False),
    "cosine": windows(2, 8, 12, 2, 16, 4, cosine=True),
    "cosine_shift_pad": windows(1, 13, 11, 2, 32, 8, shift=4, cosine=True),
    "dropout": windows(2, 8, 8, 2, 16, 4, shift=2, drop=(0.25, 77)),
    "one_token": windows(1, 3, 3, 2, 8, 1),
    "large": windows(1, 20, 16, 1, 32, (16, 12), shift=8),
    "head_59": windows(1, 8, 8, 1, 59, 4, shift=1),
    "head_80": windows(1, 7, 8, 1, 80, 4, cosine=True),
}


@pytest.mark.parametrize("make", ATTENTION.values(), ids=ATTENTION)
def test_attention(kernels, make):
    gate(kernels, make, BF16)


@pytest.mark.parametrize("name", ["n49", "passes", "dropout"])
def test_attention_in_float16(kernels, name):
    gate(kernels, ATTENTION[name], torch.float16, with_lse=False)


@pytest.mark.parametrize("make", WINDOWS.values(), ids=WINDOWS)
def test_window_attention(kernels, make):
    window_gate(kernels, make, BF16)


@pytest.mark.parametrize("name", ["odd", "cosine_shift_pad"])
def test_window_attention_in_float16(kernels, name):
    window_gate(kernels, WINDOWS[name], torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["n49", "gqa", "dropout"])
def test_any_order_of_threads(library, kernels, name, dtype):
    problem, runs = attention_problem(ATTENTION[name], dtype, "cpu", 0), []
    for seed in range(3):
        library.host_machine(seed, 3, 163 * 1024)
        runs.append(attention_run(kernels, problem))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


@pytest.mark.parametrize("name", ["odd", "cosine_shift_pad"])
def test_any_order_of_threads_on_windows(library, kernels, name):
    (call, grad, lse), runs = window_problem(WINDOWS[name], BF16), []
    for seed in range(3):
        library.host_machine(seed, 3, 163 * 1024)
        runs.append(kernels.window_attention_grad(grad, call, lse))
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_less_shared_memory_takes_more_passes(library, kernels):
    problem = attention_problem(attend(1, 2, 40, 64, M=200), BF16, "cpu", 0)
    library.host_machine(1, 3, 163 * 1024)
    once = attention_run(kernels, problem)
    library.host_machine(1, 3, 99 * 1024)
    for a, b in zip(once, attention_run(kernels, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_rows_that_see_nothing_have_no_gradient(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    grad_query, *_ = attention_run(kernels, attention_problem(ATTENTION["mask"], BF16, "cpu", 0, with_lse=False))
    assert not grad_query[:, :, 1].any() and grad_query[:, :, 0].any()


def test_no_key_and_no_sequence(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    call = prepared(*attention_arguments(1, 2, 12, 16, BF16, "cpu")[0])
    for spans in (torch.zeros(0, 4, dtype=torch.int32), torch.tensor([[3, 4, 0, 0], [9, 90, 5, 0]], dtype=torch.int32)):
        output, lse = torch.zeros(1, 2, 12, 16, dtype=BF16), torch.full((1, 2, 12), -torch.inf)
        found = kernels.attention_grad(torch.ones_like(output), None, call._replace(spans=spans), output, lse, False)
        assert not any(t.any() for t in found)


def test_what_does_not_fit_is_refused(library, kernels):
    library.host_machine(1, 3, 163 * 1024)
    with pytest.raises(RuntimeError, match="heads of up to 128, got 129"):
        attention_run(kernels, attention_problem(attend(1, 1, 8, 129), BF16, "cpu", 0))
    for D, window, most in ((8, 20, 384), (64, 17, 256), (72, 12, 128)):
        call, grad, lse = window_problem(windows(1, window, window, 1, D, window), BF16)
        with pytest.raises(RuntimeError, match=f"with {D} windows of up to {most} tokens, got {window * window}"):
            kernels.window_attention_grad(grad, call, lse)


def test_no_kernel_touches_memory_it_should_not(sanitizers, builder, tmp_path):
    sources = [*(source for source in kernel_sources() if source.parent.name == "attention"), DRIVER / "attention_backward_memory_check.cu"]
    done = run_sanitized(builder.link(tmp_path / "attention_backward_memory_check", sources, SANITIZED_FLAGS, SANITIZE))
    assert done.returncode == 0 and "20 cases clean" in done.stdout, done.stdout + done.stderr[:4000]
