"""What the convolution family is timed against: PyTorch's modules in either layout, torch.compile, ONNX Runtime and OpenVINO.

Inference peers get batch norm folded by their own compilers (ONNX Runtime, OpenVINO) or not at all (eager). The last two run on as many
threads as torch, with bound inputs and outputs; ONNX Runtime in float32 alone.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyops.ops._activations import REFERENCE

Peer = Callable[[], Tensor]


class Block(nn.Module):
    """Convolution, batch norm, activation as users write them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, options: dict):
        super().__init__()
        groups = options.get("groups", 1)
        names = ("stride", "padding", "dilation")
        given = {k: options[k] for k in names if k in options}
        O, C = weight.shape[0], weight.shape[1] * groups
        self.conv = nn.Conv2d(C, O, tuple(weight.shape[2:]), groups=groups, bias=bias is not None, **given)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm2d(O) if "running_mean" in options else nn.Identity()
        if "upsample" in options or "pool" in options or "residual" in options:
            raise ValueError("upsampling, pooling and residuals are timed as modules, in bench_around.py")
        self.activation, self.slope = REFERENCE[options.get("activation", "none")], options.get("negative_slope", 0.01)
        state = {"conv.weight": weight, "conv.bias": bias}
        pairs = (("running_mean", "running_mean"), ("running_var", "running_var"), ("weight", "bn_weight"), ("bias", "bn_bias"))
        state |= {f"norm.{own}": options.get(given) for own, given in pairs}
        self.load_state_dict({k: v.detach() for k, v in state.items() if v is not None}, strict=False)
        self.to(weight.device, weight.dtype).train(options.get("training", False)).requires_grad_(weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)), self.slope)


def _eager(memory_format, compiled: bool = False):
    def factory(args, kwargs) -> Peer:
        x, weight, bias = args
        block = Block(weight, bias, kwargs).to(memory_format=memory_format)
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_(x.requires_grad)
        call = block if not compiled else torch.compile(block) if weight.requires_grad else frozen(block, x)
        return lambda: call(x)

    return factory


def frozen(module: nn.Module, *inputs: Tensor, **options: Any) -> Callable:
    """The module compiled with its parameters as constants; options are torch.compile's. As one of them freezing is ignored (2.14, 2.15),
    and code that was compiled without it would be found again."""
    torch._dynamo.reset()
    call = torch.compile(module, **options)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        call(*inputs)
    return call


def _names(inputs: tuple[Tensor, ...]) -> list[str]:
    return [f"x{index}" for index in range(len(inputs))]


def onnx_bytes(module: nn.Module, *inputs: Tensor) -> bytes:
    if inputs[0].dtype != torch.float32:
        raise ValueError("float32 only")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that needs no further package
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # of sizes taken as constants, which they are here
        path = Path(folder) / "model.onnx"
        values = tuple(t.detach().contiguous() for t in inputs)
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # the exporter does not know its op
        try:
            torch.onnx.export(module, values, path, input_names=_names(inputs), output_names=["y"], dynamo=False)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        return path.read_bytes()


def onnxruntime_of(module: nn.Module, *inputs: Tensor) -> Peer:
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(onnx_bytes(module, *inputs), options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        result = torch.empty(module(*inputs).shape)
    values = [t.detach().contiguous() for t in inputs]
    binding = session.io_binding()
    for name, t in zip(_names(inputs), values, strict=True):
        binding.bind_input(name, "cpu", 0, numpy.float32, tuple(t.shape), t.data_ptr())
    binding.bind_output("y", "cpu", 0, numpy.float32, tuple(result.shape), result.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return result

    call.keep = values  # type: ignore[attr-defined]
    return call


def openvino_of(module: nn.Module, *inputs: Tensor) -> Peer:
    import openvino

    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(inputs[0].dtype)
    if precision is None:
        raise ValueError("float32 and bfloat16 only")
    module, inputs = copy.deepcopy(module).float(), tuple(t.float() for t in inputs)  # its inputs are float32; it computes in bfloat16
    hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    core = openvino.Core()
    request = core.compile_model(core.read_model(onnx_bytes(module, *inputs)), "CPU", hints).create_infer_request()
    values = [t.detach().contiguous().numpy() for t in inputs]
    for name, value in zip(_names(inputs), values, strict=True):
        request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def call() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    call.keep = values  # type: ignore[attr-defined]  # the request only borrows them
    return call


def _exported(run: Callable[[nn.Module, Tensor], Peer]):
    def factory(args, kwargs) -> Peer:
        x, weight, bias = args
        if x.device.type != "cpu" or weight.requires_grad:
            raise ValueError("inference on a CPU only")
        return run(Block(weight, bias, kwargs), x)

    return factory


PEERS: dict[str, Callable[[tuple, dict], Peer]] = {
    "torch.nn": _eager(torch.channels_last),
    "torch.nn NCHW": _eager(torch.contiguous_format),
    "torch.compile": _eager(torch.channels_last, compiled=True),
    "onnxruntime": _exported(onnxruntime_of),
    "openvino": _exported(openvino_of),
}
