"""Attention's gradients through ctypes, with the arguments and results of the torch ops they are behind.

Works on the host build of csrc/attention with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from pyops.ops import _attention_reference, _window_attention_ops
from pyops.testing.samples.attention import attention_arguments
from pyops.testing.samples.window_attention import window_arguments

from ..conftest import assert_gate
from .attention import DTYPES, Attention, Heads, block, double, heads, neighbours, prepared, window_block, window_call
from .depthwise import P, pointer, poisoned
from .harness import checked


class AttentionGradient(ctypes.Structure):  # csrc/attention/attention.h
    _fields_ = [("forward", Attention), ("grad", Heads), ("grad_lse", P)]
    _fields_ += [(name, Heads) for name in ("grad_query", "grad_key", "grad_value")] + [("grad_bias", P)]


class Kernels:
    """attention_grad, window_attention_grad: pyops::attention_grad_into and window_attention_grad_into, their results poisoned before."""

    def __init__(self, library):
        self.library = library

    def call(self, name, p, like):
        size = ctypes.c_int64()
        checked(getattr(self.library, f"host_{name}_gradient_workspace"), ctypes.byref(p), ctypes.byref(size))
        space = torch.full((size.value + 256,), 255, dtype=torch.uint8, device=like.device)
        checked(getattr(self.library, f"host_{name}_gradient"), ctypes.byref(p), P((space.data_ptr() + 255) // 256 * 256))

    def attention_grad(self, grad, grad_lse, call, output, lse, needs_bias):
        tensors = [neighbours(t) for t in call.heads()]
        given = [neighbours(t) for t in (grad, output)]
        found = [t.masked_fill(torch.ones_like(t, dtype=torch.bool), float("nan")) for t in tensors]  # in the layout of each
        grad_bias = poisoned(lse, *call.bias.shape) if needs_bias else None
        p = AttentionGradient(block(*tensors, *call[3:], given[1], lse), heads(given[0]), pointer(grad_lse), *map(heads, found))
        p.grad_bias = pointer(grad_bias)
        self.call("attention", p, lse)
        return found if grad_bias is None else [*found, grad_bias]

    def window_attention_grad(self, grad, call, lse):
        p = window_block(*call, lse)
        found = [poisoned(call.qkv, *call.qkv.shape)]
        vectors = [None if t is None else poisoned(lse, *t.shape) for t in (call.qkv_bias, call.table, call.logit_scale)]
        p.grad, p.grad_qkv = grad.data_ptr(), found[0].data_ptr()
        p.grad_qkv_bias, p.grad_table, p.grad_logit_scale = map(pointer, vectors)
        self.call("window_attention", p, lse)
        return found + [t for t in vectors if t is not None]


# ------------------------------------------------------------------------------------------------------- held to the numerics gate


def drawn(like, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device, dtype or like.dtype)


def needs_bias(call):
    return call.bias is not None and call.bias.is_floating_point()


def attention_problem(make, dtype, device, seed, with_lse=True):
    """(call, grad, grad_lse, output, lse); zeros where nothing is seen, whose lse has no gradient."""
    args, kwargs = make(dtype, device, seed)
    call = prepared(*args, **kwargs)
    output, lse = _attention_reference.forward(*call.heads(), *call[3:])
    grad_lse = drawn(lse, seed + 100) if with_lse else None
    return call, drawn(output, seed), grad_lse, output, lse


def attention_run(kernels, problem):
    """The kernel's results, from the output and lse of float64."""
    call, grad, grad_lse, *_ = problem
    output, lse = _attention_reference.forward(*double(call).heads(), *double(call)[3:])
    device = grad.device
    return kernels.attention_grad(grad, grad_lse, call, output.to(device, grad.dtype), lse.to(device, torch.float32), needs_bias(call))


def attention_reference(call, grad, grad_lse):
    found = _attention_reference.backward(grad, grad_lse, *call.heads(), *call[3:], needs_bias(call))
    return [t for t in found if t is not None]


def gate(kernels, make, dtype, device="cpu", with_lse=True):
    """make(dtype, device, seed): flash_attention's arguments."""

    def results(seed):
        kernels.library.host_machine(seed, (1, 3, 200)[seed % 3], 163 * 1024)
        problem = call, grad, grad_lse, *_ = attention_problem(make, dtype, device, seed, with_lse)
        wide = [None if t is None else t.cpu().double() for t in (grad, grad_lse)]
        ours, truth = attention_run(kernels, problem), attention_reference(double(call), *wide)
        return ours, truth, attention_reference(call, grad, grad_lse)

    assert_gate(results, dtype, gradient=True)


def window_problem(make, dtype, device="cpu", seed=0):
    """(call, grad, lse)"""
    call = window_call(make, dtype, device, seed)
    output, lse = _window_attention_ops.forward(*double(call))
    return call, drawn(output, seed).to(device, dtype), lse.to(device, torch.float32)


def window_reference(call, grad):
    found = _window_attention_ops.backward(grad, *call)
    return [t for t, given in zip(found, (call.qkv, call.qkv_bias, call.table, call.logit_scale), strict=True) if given is not None]


def window_gate(kernels, make, dtype, device="cpu"):
    def results(seed):
        kernels.library.host_machine(seed, (1, 3, 200)[seed % 3], 163 * 1024)
        call, grad, lse = window_problem(make, dtype, device, seed)
        ours = kernels.window_attention_grad(grad, call, lse)
        return ours, window_reference(double(call), grad.cpu().double()), window_reference(call, grad)

    assert_gate(results, dtype, gradient=True)


def every_kernel(library):
    """Launches each instance of each kernel of the family, at its largest number of threads, on an A100-sized machine."""
    kernels = Kernels(library)
    library.host_machine(1, 1, 163 * 1024)
    for dtype in DTYPES:
        for D, M, window in ((32, 384, (16, 24)), (64, 256, (16, 16)), (128, 128, (8, 16))):
            make = lambda *_, D=D, M=M, dtype=dtype: attention_arguments(3, 1, 1, D, dtype, "cpu", M=M, bias=(1, 1, 1, M))  # noqa: E731
            attention_run(kernels, attention_problem(make, dtype, "cpu", 0))
            make = lambda *_, D=D, w=window, dtype=dtype: window_arguments(1, *w, 1, D, w, dtype, "cpu")  # noqa: E731
            call, grad, lse = window_problem(make, dtype)
            kernels.window_attention_grad(grad, call, lse)
