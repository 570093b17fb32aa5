"""The Triton kernels of the norms over channels: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU
tensors."""

from triton_channel import TORCH, compile_kernel, double, gate

FAMILY = "channel_norms"
KERNELS = ("lrn_run", "lrn_grad", "layer_norm_run", "layer_norm_grad")
SHAPES = {"rows": (3136, 96), "long rows": (49, 768), "odd rows": (3136, 37), "planes": (3136, 192), "odd planes": (3025, 64)}  # P, C
DTYPES = {"bf16": tuple(SHAPES), "f16": ("rows", "planes"), "f32": ("rows", "odd rows", "planes")}


def configurations() -> list[tuple[str, str, str]]:
    """(kernel, shape, dtype). A launch is fixed by the tile, which follows from channels, positions' alignment and layout; all optional
    tensors are given: less is less code."""
    return [(kernel, shape, dtype) for kernel in KERNELS for dtype, shapes in DTYPES.items() for shape in shapes]


def title(kernel: str, shape: str, dtype: str) -> str:
    return f"channel_norms_{kernel}<{dtype}, {shape}>"


def aligned(kernel: str, shape: str, dtype: str) -> bool:
    return "odd" not in shape


def compiled(kernel: str, shape: str, dtype: str, arch: int):
    from pyops.triton_kernels import channel_norms

    config = channel_norms.launch_config(*SHAPES[shape], "rows" in shape) | {"RELU": True}
    return compile_kernel(getattr(channel_norms, f"{kernel}_kernel"), config, ("input_ptr", "grad_ptr", "output_ptr"), dtype, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

SIZES = {  # N, C, P
    "ragged": (2, 20, 35),
    "odd": (1, 37, 70), "aligned": (3, 64, 8), "few": (2, 5, 16), "many": (1, 300, 9), "one": (2, 1, 3), "empty": (0, 8, 4),
}  # fmt: skip
CHECKS = ("walks", "large_means", "contiguous", "same_bits")
IDS = (
    *(f"channel_norms-{op}-{dtype}-{size}" for op in KERNELS for dtype in TORCH for size in SIZES if dtype != "f16" or size == "odd"),
    *(f"channel_norms-{name}" for name in CHECKS),
)
LRN = ((5, 0.5, 0.75, 1.5, True), (4, 1e-4, 0.75, 1.0, False), (11, 0.1, 0.5, 2.0, True))  # size, alpha, beta, k, relu


def calls(op: str, size, seed: int, dtype, rows: bool) -> list[list]:
    import torch

    N, C, P = size
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    shape = (N, P, C) if rows else (N, C, P)
    input, grad, weight, bias = rand(*shape).to(dtype), rand(*shape).to(dtype), rand(C), rand(C)
    before = [grad, input, rows] if op.endswith("grad") else [input, rows]
    if op.startswith("lrn"):
        return [[*before, *options] for options in LRN]
    if op == "layer_norm_run":
        return [[*before, weight, bias, 1e-6], [*before, None, None, 1e-3]]
    return [[*before, weight, 1e-6, True], [*before, None, 1e-3, True], [*before, weight, 1e-6 if C == 1 else 0.0, False]]


def results(op: str, arguments: list, ours: bool) -> list:
    """Sums apart, since weight's and bias's are of different size."""
    import torch

    from pyops.ops import _norm_ops

    found = getattr(torch.ops.pyops, op).triton(*arguments) if ours else getattr(_norm_ops, "_" + op.removesuffix("_run"))(*arguments)
    return [found[0], *found[1]] if op == "layer_norm_grad" else [found]


def compare(op: str, dtype, size) -> str | None:
    def each(seed, rows, number):
        values = calls(op, size, seed, dtype, rows)[number]
        return [*zip(results(op, values, True), results(op, double(values), False), results(op, values, False), strict=True)]

    for rows in (True, False):
        for number in range(len(calls(op, size, 0, dtype, rows))):
            if missed := gate(lambda seed, rows=rows, number=number: each(seed, rows, number), op.endswith("grad")):
                return f"{op}, {'rows' if rows else 'planes'}, call {number}: {missed}"
    return None


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch
    from pyops.triton_kernels import channel

    _, name, *rest = id.split("-")
    if rest:
        return compare(name, getattr(torch, TORCH[rest[0]]), SIZES[rest[1]])
    if name == "walks":  # few programs, so that each walks tiles
        kept = channel.PROGRAMS
        try:
            channel.PROGRAMS = 1
            return next(filter(None, (compare(op, torch.float32, (2, 36, 70)) for op in ("lrn_grad", "layer_norm_grad"))), None)
        finally:
            channel.PROGRAMS = kept
    if name == "large_means":
        input = 4096 + (torch.arange(2 * 20 * 35) * 7919 % 97).reshape(2, 35, 20) * 2.0**-6  # exact in fp32
        found, truth = (
            results("layer_norm_run", [t, True, None, None, 0.0], ours)[0] for t, ours in ((input, True), (input.double(), False))
        )
        error = (found.double() - truth).norm() / truth.norm()
        return None if error < 2.0**-10 else f"relative error {error}"  # the mean's own rounding, at 10^4 deviations
    for op in KERNELS:
        values = calls(op, SIZES["ragged"], 0, torch.bfloat16, True)[0]
        other = list(values)
        if name == "contiguous":
            other = [t.transpose(0, 1).contiguous().transpose(0, 1) if hasattr(t, "dim") and t.dim() == 3 else t for t in values]
        for first, second in zip(results(op, values, True), results(op, other, True), strict=True):
            if not torch.equal(first, second) or not first.is_contiguous():
                return f"{op}: the bits differ"
    return None
