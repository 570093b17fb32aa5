"""One recurrent layer as a Problem: its tensors, the kernels' answer through ctypes, and the eager loop as the truth.

Works on the host build of csrc/rnn with CPU tensors and on a CUDA build of the same sources with CUDA tensors.
"""

import ctypes

import torch

from .harness import checked

CELLS = {"lstm": 0, "gru": 1, "gru_reset_before": 2, "rnn_tanh": 3, "rnn_relu": 4, "rnn_sigmoid": 5}
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
PATHS = {"one_cta": 0, "grid": 1, "step": 2}

SHAPES = {
    # H crosses 16-unit slices, rows fill more than one slice of 8, one row never takes part, one is cut by the clamp
    "ragged": dict(T=6, B=11, H=37, lengths=[6, 0, 3, 1, 6, 2, 5, 4, 6, 1, 2], batch_first=True),
    "reverse": dict(T=5, B=9, H=33, lengths=[5, 2, 0, 4, 1, 5, 3, 2, 5], reverse=True),
    "bare": dict(T=4, B=3, H=48, optional=False, batch_first=True, reverse=True),
    "tiny": dict(T=1, B=1, H=1),
}

LARGER = [
    ("one_cta", "lstm", torch.bfloat16, 133, 2, 3),  # weights in registers and shared memory
    ("one_cta", "gru", torch.float16, 181, 2, 3),
    ("one_cta", "rnn_tanh", torch.bfloat16, 250, 2, 3),
    ("one_cta", "lstm", torch.float32, 85, 2, 3),
    ("grid", "lstm", torch.bfloat16, 1050, 2, 3),  # more blocks of K per warp than registers hold
    ("grid", "gru", torch.float32, 100, 2, 20),
    ("step", "lstm", torch.float16, 64, 2, 70),  # W_hh read in place; two row blocks
    ("step", "gru_reset_before", torch.float32, 64, 2, 70),
]


def gates(cell):
    return {"lstm": 4, "gru": 3, "gru_reset_before": 3}.get(cell, 1)


def saved(cell):
    return {"lstm": 5, "gru": 4, "gru_reset_before": 4}.get(cell, 0)


# ------------------------------------------------------------------------------------------- csrc/rnn/rnn.h, for ctypes

P, I32, I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Rows(ctypes.Structure):
    _fields_ = [("data", P), ("t", I64), ("b", I64)]


HEAD = [("cell", I32), ("dtype", I32), ("T", I32), ("B", I32), ("H", I32), ("reverse", ctypes.c_bool), ("lengths", P)]


class ScanForward(ctypes.Structure):
    _fields_ = [*HEAD, ("gates_x", Rows), ("h0", P), ("c0", P), ("weight_hh", P), ("bias_hh", P), ("output", Rows)]
    _fields_ += [("h_n", P), ("c_n", P), ("reserve", P), ("workspace", P)]


class ScanBackward(ctypes.Structure):
    _fields_ = [*HEAD, ("grad_output", Rows), ("grad_h_n", P), ("grad_c_n", P), ("output", Rows), ("h0", P), ("c0", P)]
    _fields_ += [("weight_hh", P), ("reserve", P), ("grad_gates_x", Rows), ("grad_gates_h", P), ("grad_h0", P), ("grad_c0", P)]
    _fields_ += [("workspace", P)]


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def rows(tensor):  # [T, B, width], possibly a transposed [B, T, width]
    return Rows(None, 0, 0) if tensor is None else Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class Problem:
    """One layer: its inputs, gradients of its outputs, and the kernels' answer."""

    def __init__(self, cell, dtype, T, B, H, *, reverse=False, lengths=None, optional=True, batch_first=False, seed=0, device="cpu"):
        self.cell, self.dtype, self.T, self.B, self.H = cell, dtype, T, B, H
        self.reverse, self.batch_first = reverse, batch_first
        self.device = device
        self.lengths = None if lengths is None else torch.tensor(lengths, device=device)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype)

        G, lstm = gates(cell), cell == "lstm"
        relu = cell == "rnn_relu"  # keep away from the kink, where one rounding flips a gradient in ours or in eager
        away = torch.where(torch.arange(H, device=device) % 3 > 0, 4.0, -4.0).to(dtype) if relu else 0
        self.gates_x = self.laid_out(normal(T, B, G * H, scale=0.3 if relu else 1.0) + away)
        self.weight_hh = normal(G * H, H, scale=H**-0.5 * (0.2 if relu else 1.0))
        self.h0 = normal(B, H) if optional else None
        self.c0 = normal(B, H) if optional and lstm else None
        self.bias_hh = normal(G * H, scale=0.3) if optional else None
        self.grad_output = self.laid_out(normal(T, B, H)) if optional else None
        self.grad_h_n = normal(B, H)
        self.grad_c_n = normal(B, H) if optional and lstm else None

    @classmethod
    def of(cls, **fields):
        """A problem of given tensors, time-major, instead of random ones."""
        problem = cls.__new__(cls)
        problem.__dict__.update(fields)
        return problem

    def laid_out(self, tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1) if self.batch_first else tensor

    def poisoned(self, *shape, dtype=None):
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=self.device)

    def head(self):
        return CELLS[self.cell], DTYPES[self.dtype], self.T, self.B, self.H, self.reverse, pointer(self.lengths)

    def workspace(self, library, backward, path):
        size = ctypes.c_int64()
        head = self.head()
        checked(library.host_scan_workspace, *head[:5], int(backward), path, ctypes.byref(size))
        return torch.full((size.value + 256,), 255, dtype=torch.uint8, device=self.device)

    def forward(self, library, path=-1, reserve=True):
        T, B, H, lstm = self.T, self.B, self.H, self.cell == "lstm"
        output = self.laid_out(self.poisoned(T, B, H))
        result = {"output": output, "h_n": self.poisoned(B, H)}
        if lstm:
            result["c_n"] = self.poisoned(B, H)
        if reserve and saved(self.cell):
            result["reserve"] = self.poisoned(T, B, saved(self.cell), H, dtype=torch.float32)
        space = self.workspace(library, False, path)
        params = ScanForward(
            *self.head(), rows(self.gates_x), pointer(self.h0), pointer(self.c0), pointer(self.weight_hh), pointer(self.bias_hh),
            rows(output), pointer(result["h_n"]), pointer(result.get("c_n")), pointer(result.get("reserve")), aligned(space),
        )  # fmt: skip
        checked(library.host_scan_forward, ctypes.byref(params), path)
        return result

    def backward(self, library, forward, path=-1):
        T, B, H = self.T, self.B, self.H
        result = {"grad_gates_x": self.laid_out(self.poisoned(T, B, gates(self.cell) * H)), "grad_h0": self.poisoned(B, H)}
        if self.cell == "lstm":
            result["grad_c0"] = self.poisoned(B, H)
        if self.cell == "gru":
            result["grad_gates_h"] = self.poisoned(T, B, H)
        space = self.workspace(library, True, path)
        params = ScanBackward(
            *self.head(), rows(self.grad_output), pointer(self.grad_h_n), pointer(self.grad_c_n), rows(forward["output"]),
            pointer(self.h0), pointer(self.c0), pointer(self.weight_hh), pointer(forward.get("reserve")),
            rows(result["grad_gates_x"]), pointer(result.get("grad_gates_h")), pointer(result["grad_h0"]),
            pointer(result.get("grad_c0")), aligned(space),
        )  # fmt: skip
        checked(library.host_scan_backward, ctypes.byref(params), path)
        return result

    def reference(self, dtype):
        """The eager loop in `dtype`: the same results by name, gradients by autograd."""

        def cast(tensor, *shape):
            return (torch.zeros(shape, dtype=dtype) if tensor is None else tensor.cpu().to(dtype)).detach().clone().requires_grad_()

        T, B, H, G, cell = self.T, self.B, self.H, gates(self.cell), self.cell
        gates_x, h0, c0 = cast(self.gates_x), cast(self.h0, B, H), cast(self.c0, B, H)
        extra = torch.zeros(T, B, H, dtype=dtype, requires_grad=True)  # its gradient is that of h W_hn^T + b_hn
        weight, bias = cast(self.weight_hh), cast(self.bias_hh, G * H)
        length = torch.full((B,), T) if self.lengths is None else self.lengths.cpu().clamp(0, T)
        output, reserve = torch.zeros(T, B, H, dtype=dtype), torch.zeros(T, B, saved(cell), H, dtype=dtype)
        h, c, row = h0, c0, torch.arange(B)
        for s in range(T):
            active = s < length
            t = torch.where(active, length - 1 - s if self.reverse else torch.tensor(s), s)
            x = gates_x[t, row]
            h_before, c_before, keep = h, c, ()
            if cell == "lstm":
                i, f, g, o = (x + h @ weight.T + bias).chunk(4, 1)
                i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
                c = f * c + i * g
                h = o * c.tanh()
                keep = (i, f, g, o, c)
            elif cell == "gru":
                (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, 1), (h @ weight.T + bias).chunk(3, 1)
                h_n = h_n + extra[t, row]
                r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
                n = (x_n + r * h_n).tanh()
                h = n + z * (h - n)
                keep = (r, z, n, h_n)
            elif cell == "gru_reset_before":
                x_r, x_z, x_n = x.chunk(3, 1)
                a_r, a_z = (h @ weight[: 2 * H].T + bias[: 2 * H]).chunk(2, 1)
                r, z = (x_r + a_r).sigmoid(), (x_z + a_z).sigmoid()
                rh = r * h
                n = (x_n + rh @ weight[2 * H :].T + bias[2 * H :]).tanh()
                h = n + z * (h - n)
                keep = (r, z, n, rh)
            else:
                h = getattr(torch, cell[4:])(x + h @ weight.T + bias)
            output = output.index_put((t[active], row[active]), h[active])
            if keep:
                reserve[t[active], row[active]] = torch.stack(keep, 1)[active].detach()
            h, c = torch.where(active[:, None], h, h_before), torch.where(active[:, None], c, c_before)
        pairs = [(output, self.grad_output), (h, self.grad_h_n), (c, self.grad_c_n)]
        loss = sum((value * grad.cpu().to(dtype)).sum() for value, grad in pairs if grad is not None)
        inputs = {"grad_gates_x": gates_x, "grad_h0": h0, "grad_c0": c0, "grad_gates_h": extra}
        grads = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
        results = {"output": output, "h_n": h, "c_n": c, "reserve": reserve}
        return {k: v.detach() for k, v in results.items()} | dict(zip(inputs, grads, strict=True))


def aligned(space):
    return (space.data_ptr() + 255) // 256 * 256


def error(value, truth):
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_as_good_as_eager(ours, problem):
    truth, eager = problem.reference(torch.float64), problem.reference(problem.dtype)
    for name, value in ours.items():
        value = value.cpu()
        assert torch.isfinite(value).all(), f"{name} is not finite"
        factor = 3.0 if name.startswith("grad") else 1.25 if problem.dtype == torch.float32 else 2.0
        # The ratio of two errors means something over many values only; a few may be off by two units in the last place.
        floor = torch.finfo(problem.dtype).eps * (0.25 if value.numel() >= 500 else 2)
        allowed = factor * max(error(eager[name], truth[name]), floor)
        mine = error(value, truth[name])
        assert mine <= allowed, f"{name}: relative L2 error {mine:.2e}, allowed {allowed:.2e}"
        beyond = beyond_lengths(problem, value)
        assert beyond is None or not beyond.any(), f"{name}: padding is not zero"


def beyond_lengths(problem, value):
    if problem.lengths is None or value.dim() < 3:
        return None
    return value[torch.arange(problem.T)[:, None] >= problem.lengths.cpu()]


def scans(library, path):
    """The kernels as the forward and backward scan that pyops.ops._rnn_reference composes a layer of."""
    names = list(CELLS)

    def dense(tensor):
        return None if tensor is None else tensor.contiguous()

    def turned(tensor, batch_first):  # [T, B, .] whichever way it came; its rows contiguous
        tensor = tensor if tensor is None or tensor.stride(2) == 1 else tensor.contiguous()
        return tensor.transpose(0, 1) if tensor is not None and batch_first else tensor

    def problem(cell, sequence, weight_hh, lengths, reverse, batch_first, **fields):
        T, B, _ = sequence.shape
        sizes = {"T": T, "B": B, "H": weight_hh.shape[1], "reverse": reverse, "batch_first": batch_first}
        common = {"cell": names[cell], "dtype": weight_hh.dtype, "device": weight_hh.device, "weight_hh": dense(weight_hh)}
        return Problem.of(**sizes, **common, lengths=lengths, **fields)

    def forward(cell, gates_x, h0, c0, weight_hh, bias_hh, lengths, batch_first, reverse, save):
        x = turned(gates_x, batch_first)
        given = {"gates_x": x, "h0": dense(h0), "c0": dense(c0), "bias_hh": dense(bias_hh)}
        found = problem(cell, x, weight_hh, lengths, reverse, batch_first, **given).forward(library, path, save)
        output = turned(found["output"], batch_first)
        return output, found["h_n"], found.get("c_n"), found.get("reserve")

    def backward(cell, grad_output, grad_h_n, grad_c_n, output, h0, c0, weight_hh, reserve, lengths, batch_first, reverse):
        y = turned(output, batch_first)
        given = {"grad_output": turned(grad_output, batch_first), "grad_h_n": dense(grad_h_n), "grad_c_n": dense(grad_c_n)}
        layer = problem(cell, y, weight_hh, lengths, reverse, batch_first, h0=dense(h0), c0=dense(c0), **given)
        found = layer.backward(library, {"output": y, "reserve": reserve if saved(names[cell]) else None}, path)
        grad_x = turned(found["grad_gates_x"], batch_first)
        return grad_x, found.get("grad_gates_h"), found["grad_h0"], found.get("grad_c0")

    return forward, backward


def every_kernel(library):
    """Launches each instance of each kernel of the family, on an A100-sized machine."""
    for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh"):  # the other activations are the same kernel
        for dtype in DTYPES:
            largest = largest_one_cta(library, cell, dtype)
            for path, sizes in {"one_cta": {16, min(128, largest), largest}, "grid": {256}, "step": {33, 64}}.items():
                for H in sizes:
                    library.host_machine(1, 108, 163 * 1024)
                    problem = Problem(cell, dtype, T=2, B=3, H=H)
                    problem.backward(library, problem.forward(library, PATHS[path]), PATHS[path])


def largest_one_cta(library, cell, dtype):
    """The largest hidden size, a multiple of 16, that one block can hold forward and backward."""

    def chosen(H, backward):
        return library.host_choose_path(CELLS[cell], DTYPES[dtype], 1, H, backward, 108, 163 * 1024) == PATHS["one_cta"]

    return max(H for H in range(16, 257, 16) if chosen(H, 0) and chosen(H, 1))
