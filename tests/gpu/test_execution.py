"""How ops run on a GPU, beyond their numbers (tests/test_ops.py has those): CUDA graphs, streams, a second GPU, no waiting, compile."""

import pytest
import torch

from ..conftest import arguments, cases, cotangents, leaves, with_grad

BACKENDS = ("cuda", "triton")
SOME = cases(BACKENDS, (torch.float32, torch.bfloat16), ("plain", "lengths_reverse", "many_rows"))


def on_gpu(spec, backend, dtype, sample, seed=0):
    """The sample's arguments; lengths too are on the GPU, since a copy from the host waits and cannot be captured."""
    args, kwargs = arguments(spec, backend, dtype, sample, seed)
    return args, {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


def forward(spec, args, kwargs, backend):
    with torch.no_grad():
        return leaves(spec.public(*args, **kwargs, backend=backend))


def training(spec, args, kwargs, backend):
    outputs = leaves(spec.public(*args, **kwargs, backend=backend))
    grads = torch.autograd.grad(outputs, leaves(args), [torch.ones_like(y) for y in outputs], allow_unused=True)
    return [*(y.detach() for y in outputs), *(g for g in grads if g is not None)]


def refill(args, others):
    with torch.no_grad():
        for mine, other in zip(leaves(args), leaves(others), strict=True):
            mine.copy_(other)


def equal(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("call", [forward, training])
@pytest.mark.parametrize("spec, backend, dtype, sample", SOME)
def test_cuda_graph(spec, backend, dtype, sample, call):
    """Captured once, replayed on other values: nothing of the first call is left in the graph but its addresses."""
    args, kwargs = on_gpu(spec, backend, dtype, sample)
    others, _ = on_gpu(spec, backend, dtype, sample, seed=1)
    expected = [y.clone() for y in call(spec, with_grad(others), kwargs, backend)]
    static = with_grad(args)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a first call compiles and allocates
        call(spec, static, kwargs, backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(spec, static, kwargs, backend)
    refill(static, others)
    for _ in range(2):
        for y in found:
            y.fill_(float("nan"))
        graph.replay()
        assert equal(found, expected)


@pytest.mark.parametrize("call", [forward, training])
@pytest.mark.parametrize("spec, backend, dtype, sample", SOME)
def test_side_stream(spec, backend, dtype, sample, call):
    """The inputs come into being late, on a stream of the user's own: work on any other stream would read NaN."""
    args, kwargs = on_gpu(spec, backend, dtype, sample)
    expected = [y.clone() for y in call(spec, with_grad(args), kwargs, backend)]
    late = with_grad(tuple(map(nan_like, args)))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        refill(late, args)
        found = call(spec, late, kwargs, backend)
    stream.synchronize()
    assert equal(found, expected)


def nan_like(value):
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, float("nan"))
    return tuple(map(nan_like, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize("call", [forward, training])
@pytest.mark.parametrize("spec, backend, dtype, sample", SOME)
def test_the_host_never_waits(spec, backend, dtype, sample, call):
    args, kwargs = on_gpu(spec, backend, dtype, sample)
    args = with_grad(args)
    call(spec, args, kwargs, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(spec, args, kwargs, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("call", [forward, training])
@pytest.mark.parametrize("spec, backend, dtype, sample", SOME)
def test_second_gpu(spec, backend, dtype, sample, call):
    """Tensors on cuda:1 while cuda:0 is current: the kernel follows the tensors, and cuda:0 stays current."""

    def moved(value):
        if isinstance(value, torch.Tensor):
            return value.to("cuda:1")
        return tuple(map(moved, value)) if isinstance(value, tuple) else value

    args, kwargs = on_gpu(spec, backend, dtype, sample)
    expected = call(spec, with_grad(args), kwargs, backend)
    with torch.cuda.device(0):
        found = call(spec, with_grad(moved(args)), {name: moved(value) for name, value in kwargs.items()}, backend)
        assert torch.cuda.current_device() == 0
    assert all(y.device == torch.device("cuda:1") for y in found)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert equal([y.to("cuda:0") for y in found], expected)


@pytest.mark.parametrize("spec, backend, dtype, sample", cases(BACKENDS, (torch.float32,), ("plain", "lengths_reverse")))
def test_fullgraph_compile(spec, backend, dtype, sample):
    """One graph by Inductor, forward and backward, with the bits of the plain call."""
    args, kwargs = on_gpu(spec, backend, dtype, sample)
    args = with_grad(args)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: spec.public(*a, **kwargs, backend=backend), fullgraph=True)
    results = []
    for function in (lambda *a: spec.public(*a, **kwargs, backend=backend), compiled):
        outputs = leaves(function(*args))
        results.append([*outputs, *torch.autograd.grad(outputs, leaves(args), cotangents(outputs))])
    for plain, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, plain, rtol=1e-5, atol=1e-6)  # the dense product beside the kernel may be another
