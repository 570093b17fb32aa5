"""The Triton kernels without a GPU: Triton's interpreter runs them on CPU tensors, in a child process, since the choice is made at import.

Run as a script this file is the child: it prints one line of JSON a case, {"id": ..., "missed": null or the reason}.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh", "rnn_relu", "rnn_sigmoid")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# T, B, H, then what differs from a forward-running, time-major scan with states and bias. A program owns 16 rows (fp32: one).
SCANS = {
    "one": (1, 1, 1, {}),
    "one_step": (1, 3, 20, {"reverse": True}),
    "plain": (5, 3, 20, {}),
    "bare": (5, 3, 5, {"state": False, "bias": False, "batch_first": True}),
    "two_slices": (5, 17, 16, {"reverse": True}),
    "lengths": (5, 4, 5, {"lengths": (3, 0, 5, 1)}),
    "lengths_reverse": (5, 4, 20, {"lengths": (0, 5, 2, 4), "reverse": True, "batch_first": True}),
    "lengths_bare": (5, 4, 16, {"lengths": (0, 5, 2, 4), "reverse": True, "state": False, "bias": False}),
    "lengths_slices": (5, 17, 20, {"lengths": (4, 0, 1, 3) * 4 + (0,)}),
}
CHECKS = ("lengths_are_clamped", "save_changes_nothing", "absent_gradients_are_zero", "strides", "nothing_to_do", "integers_are_exact")
PUBLIC = ("fused_lstm", "fused_gru", "fused_rnn", "lstm_cell", "gru_cell", "rnn_cell", "depthwise_conv_bn_act")
SOME = {  # of their samples those whose names begin so: what the tests of their kernels do not compose
    "conv_bn_act": ("pool_", "nearest", "bilinear"),
    "local_response_norm": ("",),
    "layer_norm_2d": ("",),
    "gaussian_sample": ("",),
    "linear_cross_entropy": ("odd", "everything", "none"),
}
BOTH = {  # likewise, in f32 and bf16: each way through attention's kernels
    "flash_attention": (
        "lengths_reverse", "lengths_bias", "causal_more", "window_left", "bias_columns", "mask", "softcap", "alibi", "dropout",
        "ragged_cross", "ragged_bias", "column_major", "head_72", "one_key",
    ),
    "capsule_routing": ("odd", "many_outputs", "by_input_odd", "strided", "six_iterations", "constant_couplings", "one_"),
    "window_attention": ("odd", "no_table", "cosine", "dropout", "one_token"),
}  # fmt: skip

IDS = (
    *(
        f"scan-{cell}-{dtype}-{name}"
        for cell in CELLS
        for dtype in DTYPES
        for name in SCANS
        if dtype != "f32" or "slices" not in name  # fp32 has a program per row: nothing new, and slow here
    ),
    *(f"check-{cell}-{name}" for cell in CELLS for name in CHECKS),
    *(f"public-{public}-{dtype}" for public in PUBLIC for dtype in ("f32", "bf16")),
    *(f"public-{public}-f32" for public in SOME),
    *(f"public-{public}-{dtype}" for public in BOTH for dtype in ("f32", "bf16")),
)


pytestmark = pytest.mark.timeout(2400)  # the fixture does the work of all tests; a busy machine takes long


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT / "tests", capture_output=True, text=True)
    lines = child.stdout.splitlines()
    if lines and lines[0].startswith("skip"):
        pytest.skip(lines[0])
    assert child.returncode == 0, child.stderr[-3000:]
    return {verdict["id"]: verdict["missed"] for verdict in map(json.loads, lines)}


@pytest.mark.parametrize("id", IDS)
def test_interpreted(verdicts, id):
    assert verdicts[id] is None, verdicts[id]


# ---------------------------------------------------------------------------------------------------------------- the child


def inputs(cell: str, dtype: torch.dtype, T: int, B: int, H: int, seed: int = 0, state: bool = True, bias: bool = True) -> dict:
    """A scan's tensors, time-major, and its gradients'."""
    from pyops.triton_kernels.recurrent_limits import GATES

    generator = torch.Generator().manual_seed(seed)

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    G, k = GATES[cell], H**-0.5
    found = {"gates_x": rand(T, B, G * H), "weight_hh": rand(G * H, H, scale=k), "bias_hh": rand(G * H, scale=k) if bias else None}
    found |= {"h0": rand(B, H, scale=0.5) if state else None, "c0": rand(B, H) if state and cell == "lstm" else None}
    return found | {"grad_output": rand(T, B, H), "grad_h_n": rand(B, H), "grad_c_n": rand(B, H) if cell == "lstm" else None}


def reference(cell: str, tensors: dict, lengths, reverse: bool) -> tuple[list, list]:
    """Results and gradients by autograd through the step-by-step loop, in the tensors' dtype. Absent states take part as zeros."""
    from pyops.ops import _rnn_reference as R

    number = R.CELL_NAMES.index(cell)
    x, w, b = tensors["gates_x"].detach().requires_grad_(), tensors["weight_hh"], tensors["bias_hh"]
    zeros = torch.zeros_like(tensors["grad_h_n"])
    h0, c0 = (zeros.clone() if tensors[key] is None else tensors[key].clone() for key in ("h0", "c0"))
    output, h_n, c_n, reserve = R.scan_forward(number, x, h0.requires_grad_(), c0.requires_grad_(), w, b, lengths, reverse, True)
    grads = (tensors["grad_output"], tensors["grad_h_n"], tensors["grad_c_n"])
    results = [y for y in (output, h_n, c_n) if y is not None]
    d_x, d_h0, d_c0 = torch.autograd.grad(results, (x, h0, c0), [g for g in grads if g is not None], allow_unused=True)
    kept = (output.detach(), h0.detach(), c0.detach(), w, reserve.detach())
    _, d_gates_h, *_ = R.scan_backward(number, *grads, *kept, lengths, reverse)
    saved = reserve if R.SAVED[number] else None
    return [output, h_n, c_n, saved], [d_x, d_gates_h, d_h0, d_c0 if cell == "lstm" else None]


def launch(cell: str, tensors: dict, lengths, reverse: bool, batch_first: bool) -> tuple[list, list]:
    """The kernels on the same tensors; everything comes back time-major."""
    from pyops.triton_kernels import recurrent

    def turn(t):
        return t.transpose(0, 1).contiguous() if batch_first else t

    keys = ("h0", "c0", "weight_hh")
    output, h_n, c_n, reserve = recurrent.scan_forward(
        cell, turn(tensors["gates_x"]), *(tensors[key] for key in (*keys, "bias_hh")), lengths, batch_first, reverse, True
    )
    grads = (turn(tensors["grad_output"]), tensors["grad_h_n"], tensors["grad_c_n"])
    d_x, d_gates_h, d_h0, d_c0 = recurrent.scan_backward(
        cell, *grads, output, *(tensors[key] for key in keys), reserve, lengths, batch_first, reverse
    )
    return [turn(output), h_n, c_n, reserve], [turn(d_x), d_gates_h, d_h0, d_c0]


def scan(cell: str, dtype: torch.dtype, name: str) -> str | None:
    """The numerics gate on one scan. One draw settles most; one that misses may be unlucky, and then more are taken together."""
    from pyops.testing import within_gate

    T, B, H, options = SCANS[name]
    options = dict(options)
    lengths = torch.tensor(options.pop("lengths")) if "lengths" in options else None
    batch_first, reverse = options.pop("batch_first", False), options.pop("reverse", False)

    def draw(seed):
        tensors = inputs(cell, dtype, T, B, H, seed, **options)
        double = {key: None if t is None else t.double() for key, t in tensors.items()}
        return launch(cell, tensors, lengths, reverse, batch_first), *(reference(cell, t, lengths, reverse) for t in (double, tensors))

    def smooth(draw):  # relu's gradient jumps at zero: where rounding carries an input across, the gradients of a draw say nothing
        found, truth, eager = (side[0][0] > 0 for side in draw)
        return cell != "rnn_relu" or (torch.equal(found, truth) and torch.equal(eager, truth))

    draws, missed = [], {}
    for first, last in ((0, 1), (1, 4), (4, 16), (16, 48)):
        draws += [draw(seed) for seed in range(first, last)]
        chosen = draws, [each for each in draws if smooth(each)]
        missed = {} if chosen[1] else {"draws": "relu's inputs have other signs than the truth's in each"}
        for kind, index in itertools.product((0, 1), range(4)):
            triples = [tuple(side[kind][index] for side in each) for each in chosen[kind]]
            present = {value is not None for triple in triples for value in triple}
            if present == {True, False}:
                return f"tensor {index} is there on one side only"
            reason = within_gate(triples, dtype, gradient=kind == 1) if True in present else None
            if reason is not None:
                missed[f"{('result', 'gradient')[kind]} {index}"] = reason
        if not missed:
            return None
    return str(missed)


def check(cell: str, name: str) -> str | None:
    """Properties that need no tolerance."""
    from pyops.triton_kernels import recurrent

    def forward(t, gates_x=None, lengths=None, save=True):
        x = t["gates_x"] if gates_x is None else gates_x
        return recurrent.scan_forward(cell, x, t["h0"], t["c0"], t["weight_hh"], t["bias_hh"], lengths, False, False, save)

    def backward(t, grads, output, reserve):
        return recurrent.scan_backward(cell, *grads, output, t["h0"], t["c0"], t["weight_hh"], reserve, None, False, False)

    def same(first, second):
        return None if all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True)) else "the bits differ"

    t = inputs(cell, torch.float32, 4, 3, 5)
    if name == "lengths_are_clamped":
        return same(forward(t, lengths=torch.tensor([9, -4, 2])), forward(t, lengths=torch.tensor([4, 0, 2])))
    if name == "save_changes_nothing":
        first, second = forward(t), forward(t, save=False)
        return "a reserve that nobody wants" if second[3] is not None else same(first[:3], second[:3])
    output, _, _, reserve = forward(t)
    if name == "absent_gradients_are_zero":
        zeros = torch.zeros_like
        absent = backward(t, (None, t["grad_h_n"], None), output, reserve)
        explicit = backward(t, (zeros(output), t["grad_h_n"], zeros(t["h0"])), output, reserve)
        only_output = backward(t, (t["grad_output"], None, None), output, reserve)
        explicit_output = backward(t, (t["grad_output"], zeros(t["h0"]), zeros(t["h0"])), output, reserve)
        return same(absent, explicit) or same(only_output, explicit_output)
    if name == "strides":  # rows inside wider ones, every other step; an expanded gradient
        wide = torch.full((8, 3, t["gates_x"].shape[2] + 3), float("nan"))
        wide[::2, :, 3:] = t["gates_x"]
        expanded = torch.ones(()).expand(4, 3, 5)
        grads = (t["grad_h_n"], t["grad_c_n"])
        return same(forward(t), forward(t, wide[::2, :, 3:])) or same(
            backward(t, (expanded, *grads), output, reserve), backward(t, (expanded.contiguous(), *grads), output, reserve)
        )
    if name == "nothing_to_do":
        for steps, rows in ((0, 3), (4, 0)):
            t = inputs(cell, torch.float32, steps, rows, 5)
            output, h_n, c_n, reserve = forward(t)
            _, _, grad_h0, _ = backward(t, (t["grad_output"], t["grad_h_n"], t["grad_c_n"]), output, reserve)
            if output.shape != (steps, rows, 5) or same([h_n, c_n, grad_h0], [t["h0"], t["c0"], t["grad_h_n"]]):
                return f"wrong with {steps} steps of {rows} rows"
        return None
    # sums of small integers are exact in every dtype; only relu keeps them integers
    if cell != "rnn_relu":
        return None
    for dtype in DTYPES.values():
        t = {key: None if each is None else each.double().round() for key, each in inputs(cell, dtype, 4, 17, 20).items()}
        t["weight_hh"] = torch.eye(20, dtype=torch.float64).roll(1, 0)  # each unit reads its neighbour: sums cannot grow
        found = launch(cell, {key: None if each is None else each.to(dtype) for key, each in t.items()}, None, False, False)
        truth = reference(cell, t, None, False)
        for a, b in zip([*found[0], *found[1]], [*truth[0], *truth[1]], strict=True):
            if a is not None and not torch.equal(a.double(), b):
                return f"integers are not exact in {dtype}"
    return None


def public(name: str, dtype: torch.dtype) -> str | None:
    """Every sample of the registry that the kernels take, through the public function, forward and backward, under the gate of gradients.

    The tighter gate of results is held by the scans above.
    """
    from pyops import _backends
    from pyops.testing import SPECS, within_gate

    floats = lambda v: isinstance(v, torch.Tensor) and v.is_floating_point()  # noqa: E731  (classes are not)

    def leaves(value):
        return [value] if floats(value) else [leaf for item in (value if isinstance(value, tuple) else ()) for leaf in leaves(item)]

    def run(args, kwargs, backend, wanted):
        map_ = lambda v: wanted(v) if floats(v) else tuple(map(map_, v)) if isinstance(v, tuple) else v  # noqa: E731
        floating = {key: t for key, t in kwargs.items() if floats(t)}
        args, floating = map_(args), {key: map_(t) for key, t in floating.items()}
        buffers = {key: t.detach() for key, t in floating.items() if key.startswith(("running_", "alibi_"))}  # these have no gradient
        outputs = leaves(SPECS[name].public(*args, **kwargs | floating | buffers, backend=backend))
        inputs = leaves(args) + [t for key, t in floating.items() if key not in buffers]
        grads = torch.autograd.grad([y.sum() for y in outputs], inputs, allow_unused=True)
        return outputs + [torch.zeros_like(a) if g is None else g for g, a in zip(grads, inputs, strict=True)]

    def draw(sample, seed):
        args, kwargs = sample.make(dtype, "cpu", seed)
        found = run(args, kwargs, "triton", lambda t: t.detach().requires_grad_())
        truth = run(args, kwargs, "eager", lambda t: t.detach().double().requires_grad_())
        return tuple(zip(found, truth, run(args, kwargs, "eager", lambda t: t.detach().requires_grad_()), strict=True))

    for sample in SPECS[name].samples:
        args, kwargs = sample.make(dtype, "cpu", 0)
        rows = dict(_backends.explain(name, *args, **kwargs, backend="triton").rows)
        if not sample.id.startswith((SOME | BOTH).get(name, ("",))) or not sample.test or rows["triton"].startswith("cannot"):
            continue
        draws = []
        for first, last in ((0, 1), (1, 12), (12, 48)):  # what misses may be unlucky: then more are taken together
            draws += [draw(sample, seed) for seed in range(first, last)]
            reasons = [within_gate(list(tensor), dtype, gradient=True) for tensor in zip(*draws, strict=True)]
            if not any(reasons):
                break
        else:
            return f"{sample.id}: {reasons}"
    return None


def poisoned(empty):
    """torch.empty and empty_like, with NaN where a kernel ought to write."""
    return lambda *args, **kwargs: t.fill_(float("nan")) if (t := empty(*args, **kwargs)).is_floating_point() else t


def unable() -> str | None:
    """Why this machine's interpreter cannot run the kernels."""
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def count(n):
        for _ in range(n):
            tl.static_assert(True)

    try:
        count[(1,)](2)
    except (InterpreterError, TypeError) as error:
        return f"skip: Triton {triton.__version__}'s interpreter does not run loops with this NumPy: {error}"
    return None


def main() -> None:
    if reason := unable():
        print(reason)
        return

    torch.set_num_threads(1)
    torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
    for id in IDS:
        kind, subject, *rest = id.split("-")
        if kind == "scan":
            missed = scan(subject, DTYPES[rest[0]], rest[1])
        elif kind == "check":
            missed = check(subject, rest[0])
        else:
            missed = public(subject, DTYPES[rest[0]])
        print(json.dumps({"id": id, "missed": missed}), flush=True)


if __name__ == "__main__":
    main()
