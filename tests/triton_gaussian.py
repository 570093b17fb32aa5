"""The Triton kernels of gaussian_sample: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import TORCH, compile_kernel, gate

FAMILY = "gaussian"
KERNELS = ("run", "grad")
SHAPES = {"vectors": 128, "odd vectors": 37, "few": 8, "images": 16384}  # columns
DTYPES = {"f32": tuple(SHAPES), "bf16": tuple(SHAPES), "f16": ("vectors",)}


def configurations() -> list[tuple[str, str, str]]:
    """(kernel, shape, dtype). A launch is fixed by the tile, which follows from columns and alignment; both gradients are given."""
    return [(kernel, shape, dtype) for kernel in KERNELS for dtype, shapes in DTYPES.items() for shape in shapes]


def title(kernel: str, shape: str, dtype: str) -> str:
    return f"gaussian_{kernel}<{dtype}, {shape}>"


def aligned(kernel: str, shape: str, dtype: str) -> bool:
    return "odd" not in shape


def compiled(kernel: str, shape: str, dtype: str, arch: int):
    from pyops.triton_kernels import gaussian

    images = ("mean_ptr", "log_var_ptr", "z_ptr", "grad_ptr", "grad_mean_ptr", "grad_log_var_ptr")
    config = gaussian.launch_config(SHAPES[shape])
    return compile_kernel(getattr(gaussian, f"gaussian_{kernel}_kernel"), config, images, dtype, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

SIZES = {"vectors": (70, 16), "odd": (3, 37), "one": (2, 1), "image": (2, 1100), "no_rows": (0, 8), "no_columns": (3, 0)}  # N, D
CHECKS = ("numbers", "halves", "same_bits")
IDS = (
    *(f"gaussian-{op}-{dtype}-{size}" for op in KERNELS for dtype in TORCH for size in SIZES if dtype != "f16" or size == "odd"),
    *(f"gaussian-{name}" for name in CHECKS),
)


def calls(op: str, size, seed: int, dtype) -> list[list]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean, log_var, grad = (torch.randn(size, generator=generator).to(dtype) for _ in range(3))
    call = [mean, 3 * log_var, torch.tensor([7919 * seed + 5])]
    if op == "run":
        return [call]
    grad_kl = torch.randn(size[0], generator=generator)
    return [[*call, grad, grad_kl], [*call, grad, None], [*call, None, grad_kl]]


def results(op: str, arguments: list, ours: bool) -> list:
    import torch

    from pyops.ops import _sampling_ops

    return list((getattr(torch.ops.pyops, f"gaussian_{op}").triton if ours else getattr(_sampling_ops, f"_{op}"))(*arguments))


def compare(op: str, dtype, size) -> str | None:
    def each(seed, number):
        values = calls(op, size, seed, dtype)[number]
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in values]
        return [*zip(results(op, values, True), results(op, wide, False), results(op, values, False), strict=True)]

    for number in range(len(calls(op, size, 0, dtype))):
        if missed := gate(lambda seed, number=number: each(seed, number), op == "grad"):
            return f"{op}, call {number}: {missed}"
    return None


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch

    from pyops.ops import _philox

    _, name, *rest = id.split("-")
    if rest:
        return compare(name, getattr(torch, TORCH[rest[0]]), SIZES[rest[1]])
    if name == "numbers":
        seed, zeros = torch.tensor([-(2**62) + 12345]), torch.zeros(5, 530)
        found = torch.ops.pyops.gaussian_run.triton(zeros, zeros, seed)[0]
        missed = (found - _philox.normal(seed, 5, 530, torch.float64)).abs().max().item()
        return None if missed < 2e-6 else f"numbers differ by {missed}"
    for op in KERNELS:
        values = calls(op, (6, 24), 0, torch.bfloat16)[0]
        other = list(values)
        if name == "halves":
            other[:2] = torch.cat(values[:2], 1).chunk(2, 1)
        for first, second in zip(results(op, values, True), results(op, other, True), strict=True):
            if not torch.equal(first, second) or not first.is_contiguous():
                return f"{op}: the bits differ"
    return None
