"""The Triton kernels of routing between capsules, compiled ahead of time (a share of `triton_configurations`). `test_triton_interpreter`
runs the public function's samples through them."""

from triton_channel import compile_kernel

FAMILY = "capsule"
KERNELS = ("capsule_run", "capsule_grad")
SHAPES = {"10x16": (10, 16), "32x8": (32, 8), "odd 5x7": (5, 7)}  # J, D
DTYPES = {"f32": tuple(SHAPES), "bf16": tuple(SHAPES), "f16": ("10x16",)}


def configurations() -> list[tuple[str, str, str]]:
    """(kernel, shape, dtype). A launch is fixed by the output capsules; the memory's order of inputs and samples changes one product."""
    return [(kernel, shape, dtype) for kernel in KERNELS for dtype, shapes in DTYPES.items() for shape in shapes]


def title(kernel: str, shape: str, dtype: str) -> str:
    return f"{kernel}<{dtype}, {shape}>"


def aligned(kernel: str, shape: str, dtype: str) -> bool:
    return "odd" not in shape


def compiled(kernel: str, shape: str, dtype: str, arch: int):
    from pyops.triton_kernels import capsule_routing

    config = capsule_routing.launch_config(*SHAPES[shape]) | {"BY_INPUT": False, "STOP": False}
    return compile_kernel(getattr(capsule_routing, f"{kernel}_kernel"), config, ("input_ptr", "grad_ptr", "output_ptr"), dtype, arch)
