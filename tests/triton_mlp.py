"""The fused MLP's Triton kernel: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import TORCH, compile_kernel, gate

FAMILY = "mlp"
DTYPES = {"bf16": (96, 192, 37, 193, 16), "f16": (96, 192), "f32": (96, 192, 37, 193)}  # inputs, and outputs


def configurations() -> list[tuple[int, str]]:
    """(channels, dtype). A launch is fixed by the tile, which follows from padded channels; all options are given: less is less code."""
    return [(C, dtype) for dtype, sizes in DTYPES.items() for C in sizes]


def title(C: int, dtype: str) -> str:
    return f"mlp<{dtype}, C={C}>"


def aligned(C: int, dtype: str) -> bool:
    return C % 8 == 0


def compiled(C: int, dtype: str, arch: int):
    import torch
    from pyops.triton_kernels import mlp

    config = mlp.launch_config(C, 4 * C, C, getattr(torch, TORCH[dtype])) | {"NORM": True, "ACTIVATION": 5}
    return compile_kernel(mlp.mlp_kernel, config, ("input_ptr", "first_ptr", "second_ptr", "residual_ptr", "output_ptr"), dtype, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

SHAPES = {  # M, C, H, O
    "convnext": (100, 96, 384, 96), "odd": (7, 5, 13, 3), "one": (1, 1, 1, 1), "wide": (40, 136, 72, 24), "long": (70, 24, 300, 150),
    "empty": (0, 8, 16, 8),
}  # fmt: skip
CHECKS = ("activations", "layouts", "same_bits", "refusals", "convnext_block")
IDS = (
    *(f"mlp-{dtype}-{shape}" for dtype in TORCH for shape in SHAPES if dtype != "f16" or shape == "odd"),
    *(f"mlp-{name}" for name in CHECKS),
)
EPS = 1e-6


def draw(shape, seed: int, dtype, residual: bool = True) -> list:
    import torch

    M, C, H, O = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    weights = (rand(H, C) * C**-0.5).to(dtype), rand(H).to(dtype).float(), (rand(O, H) * H**-0.5).to(dtype), rand(O).to(dtype).float()
    return [(rand(M, C) * 1.5 + 0.3).to(dtype), *weights, rand(M, O).to(dtype) if residual else None]


def run(tensors: list, norm: bool, activation: int):
    import torch

    from pyops.ops import _mlp_ops  # noqa: F401  defines the op

    return torch.ops.pyops.mlp_run.triton(*tensors, norm, EPS, activation, 0.2)


def layers(tensors: list, norm: bool, activation: int):
    """One by one, each in the tensors' dtype."""
    import torch.nn.functional as F

    from pyops.ops import _activations

    x, first, first_bias, second, second_bias, residual = (None if t is None else t.to(tensors[0].dtype) for t in tensors)
    x = F.layer_norm(x, x.shape[1:], None, None, EPS) if norm else x
    y = F.linear(_activations.apply(F.linear(x, first, first_bias), activation, 0.2), second, second_bias)
    return y if residual is None else y + residual


def compare(shape: str, dtype, norm: bool, residual: bool, activation: int = 5) -> str | None:
    def each(seed):
        tensors = draw(shape, seed, dtype, residual)
        wide = [None if t is None else t.double() for t in tensors]
        return [(run(tensors, norm, activation), layers(wide, norm, activation), layers(tensors, norm, activation))]

    return gate(each)


def convnext_block() -> str | None:
    import copy

    import torch

    from pyops.nn import ConvNeXtBlock

    for dim, dtype, fused in (
        (24, torch.float32, True),
        (37, torch.bfloat16, True),
        (24, torch.float16, False),
        (264, torch.float32, False),
    ):
        torch.manual_seed(dim)
        block = ConvNeXtBlock(dim, layer_scale=0.5, backend="triton").eval().to(dtype)
        x = torch.randn(2, dim, 4, 3).to(dtype).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            block.block[2].weight.add_(0.3), block.block[2].bias.sub_(0.2)
            truth, eager = (each.layer_scale * each.block(t) + t for each, t in ((copy.deepcopy(block).double(), x.double()), (block, x)))
            found = block(x)
        missed = gate(lambda seed, triple=(found, truth, eager): [triple])
        if missed or block._has_kernel(x) != fused:
            return f"{dim} channels of {dtype}, fused {block._has_kernel(x)}: {missed}"
    return None


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch

    from pyops.ops import _activations

    _, name, *rest = id.split("-")
    if rest:
        dtype, cases = getattr(torch, TORCH[name]), ((True, True), (False, False))
        return next(filter(None, (compare(rest[0], dtype, *case) for case in cases)), None)
    if name == "convnext_block":
        return convnext_block()
    if name == "activations":
        numbers = range(len(_activations.NAMES))
        return next(filter(None, (compare("odd", torch.float32, True, True, number) for number in numbers)), None)
    if name == "refusals":
        x, first, first_bias, second, second_bias, residual = draw("odd", 0, torch.float32)
        for change, reason in (
            ([x, first, first_bias, second[:, 1:], second_bias, residual], "mlp_run: second: expected (3, 13)"),
            ([x.bfloat16(), first, first_bias, second, second_bias, residual], "mlp_run: first: expected (13, 5) of torch.bfloat16"),
            ([x[0], first, first_bias, second, second_bias, residual], "mlp_run: input, first, second: expected [M, C]"),
            ([x.new_zeros(2, 257), x.new_zeros(9, 257), x.new_zeros(9), x.new_zeros(4, 9), x.new_zeros(4), None], "got 257 and 4"),
        ):
            try:
                run(change, True, 5)
                return f"no error: {reason}"
            except ValueError as error:
                if reason not in str(error):
                    return f"{error} for {reason}"
        return None
    tensors = draw("wide", 0, torch.bfloat16)
    other = [t.t().contiguous().t() if t.dim() == 2 else torch.stack([t, t], 1)[:, 0] for t in tensors] if name == "layouts" else tensors
    return None if torch.equal(run(tensors, True, 5), run(other, True, 5)) else "the bits differ"
