"""What the recurrent family is timed against: PyTorch's own modules, torch.compile, ONNX Runtime and OpenVINO.

The last two run a one-node ONNX graph with bound inputs and outputs, float32, on as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ONNX_OP = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}  # torch's gate blocks in ONNX's order: iofc, zrh


def baselines(cell: str, single: bool) -> dict[str, Callable]:
    found: dict[str, Callable] = {"torch.nn": lambda args, kwargs: _module(cell, single, args, kwargs)}
    found["torch.compile"] = lambda args, kwargs: torch.compile(_module(cell, single, args, kwargs))
    if not single:
        found["onnxruntime"] = lambda args, kwargs: _onnxruntime(cell, args, kwargs)
        found["openvino"] = lambda args, kwargs: _openvino(cell, args, kwargs)
    return found


def _module(cell: str, single: bool, args, kwargs):
    """torch.nn's module with the call's weights, as a function of no arguments that returns a flat tuple."""
    input, hx, weight_ih, weight_hh, bias_ih, bias_hh = args
    H, I = weight_hh.shape[1], weight_ih.shape[1]
    name = ONNX_OP[cell] + ("Cell" if single else "")
    options = {} if single else {"batch_first": kwargs.get("batch_first", False)}
    module = getattr(torch.nn, name)(I, H, bias=bias_ih is not None, dtype=input.dtype, device=input.device, **options)
    suffix = "" if single else "_l0"
    weights = {"weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh}
    with torch.no_grad():
        for key, value in weights.items():
            if value is not None:
                getattr(module, key + suffix).copy_(value)
    module.requires_grad_(weight_ih.requires_grad)
    if not single and hx is not None:
        hx = tuple(state.unsqueeze(0) for state in hx) if cell == "lstm" else hx.unsqueeze(0)

    def call():
        return flatten(module(input, hx))

    return call


def flatten(results) -> tuple[Tensor, ...]:
    """(output, h_n[, c_n]) of any of the public functions and modules as a flat tuple of tensors."""
    if isinstance(results, Tensor):
        return (results,)
    return tuple(t for item in results for t in flatten(item))


def _onnx_model(cell: str, args, kwargs) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    input, hx, weight_ih, weight_hh, bias_ih, bias_hh = args
    if input.dtype != torch.float32 or kwargs.get("batch_first") or kwargs.get("lengths") is not None:
        raise ValueError("float32, time-major and without lengths only")
    T, B, I = input.shape
    H = weight_hh.shape[1]

    def reorder(t: Tensor) -> Tensor:
        return torch.cat([t.chunk(len(ONNX_ORDER[cell]))[k] for k in ONNX_ORDER[cell]]).detach()

    initializers = [numpy_helper.from_array(reorder(w).unsqueeze(0).numpy(), name) for name, w in (("W", weight_ih), ("R", weight_hh))]
    if bias_ih is not None:
        initializers.append(numpy_helper.from_array(torch.cat([reorder(bias_ih), reorder(bias_hh)]).unsqueeze(0).numpy(), "b"))
    names = {"lstm": ["h0", "c0"]}.get(cell, ["h0"]) if hx is not None else []
    outputs = ["Y", "Y_h"] + (["Y_c"] if cell == "lstm" else [])
    attributes = {"hidden_size": H, **({"linear_before_reset": 1} if cell == "gru" else {})}
    node = helper.make_node(ONNX_OP[cell], ["X", "W", "R", "b" if bias_ih is not None else "", "", *names], outputs, **attributes)
    value = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    inputs = [value("X", [T, B, I]), *(value(name, [1, B, H]) for name in names)]
    shapes = [[T, 1, B, H], [1, B, H], [1, B, H]]
    graph = helper.make_graph([node], cell, inputs, [value(n, s) for n, s in zip(outputs, shapes, strict=False)], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()


def _inputs(cell: str, args) -> dict:
    input, hx = args[:2]
    found = {"X": input.detach().numpy()}
    if hx is not None:
        states = hx if cell == "lstm" else (hx,)
        found.update({name: state.detach().unsqueeze(0).numpy() for name, state in zip(("h0", "c0"), states, strict=False)})
    return found


def _onnxruntime(cell: str, args, kwargs):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(_onnx_model(cell, args, kwargs), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    kept = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in _inputs(cell, args).items()}
    for name, ortvalue in kept.items():
        binding.bind_ortvalue_input(name, ortvalue)
    results = [torch.empty(output.shape) for output in session.get_outputs()]
    for output, result in zip(session.get_outputs(), results, strict=True):
        binding.bind_output(output.name, "cpu", 0, "float32", result.shape, result.data_ptr())

    def call():
        session.run_with_iobinding(binding)
        return _as_torch(results)

    call.keep = kept  # type: ignore[attr-defined]
    return call


def _openvino(cell: str, args, kwargs):
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(core.read_model(_onnx_model(cell, args, kwargs), b""), "CPU", config)
    request = compiled.create_infer_request()
    for name, array in _inputs(cell, args).items():
        request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
    results = [torch.empty(list(output.shape)) for output in compiled.outputs]
    for index, result in enumerate(results):
        request.set_output_tensor(index, openvino.Tensor(result.numpy(), shared_memory=True))

    def call():
        request.infer()
        return _as_torch(results)

    return call


def _as_torch(results: list[Tensor]) -> tuple[Tensor, ...]:
    return (results[0].squeeze(1), *results[1:])
