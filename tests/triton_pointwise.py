"""The 1x1 convolution's Triton kernel: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import TORCH, compile_kernel, double

SHAPES = {  # M, C, O, unit: the tiles that sizes and strides can lead to
    "large": (10**6, 256, 256, 8), "narrow": (10**6, 256, 64, 8), "thin": (10**6, 64, 24, 8), "small": (49, 256, 256, 8),
    "few": (10**6, 16, 16, 8), "unaligned": (10**6, 37, 37, 1),
}  # fmt: skip
DTYPES = {"bf16": tuple(SHAPES), "f16": ("large",), "f32": ("large", "thin", "few", "unaligned"), "tf32": ("large", "thin", "unaligned")}


def configurations() -> list[tuple[str, str]]:
    """(shape, dtype; "tf32" is fp32 multiplied so). A launch is fixed by the tile, which follows from the shape; all options are given."""
    return [(shape, dtype) for dtype, shapes in DTYPES.items() for shape in shapes]


def compiled(shape: str, dtype: str, arch: int):
    import torch
    from pyops.triton_kernels import pointwise_conv

    M, C, O, unit = SHAPES[shape]
    kind = dtype.removeprefix("t")
    config = pointwise_conv.launch_config(M, C, O, getattr(torch, TORCH[kind]), dtype == "tf32", unit)
    images = ("input_ptr", "weight_ptr", "residual_ptr", "output_ptr")
    return compile_kernel(pointwise_conv.pointwise_kernel, config | {"INPUT_ACTIVATION": 3, "ACTIVATION": 3}, images, kind, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

SIZES = {  # N, C, H, W, O
    "ragged": (2, 20, 5, 3, 37), "odd": (3, 37, 4, 7, 5), "deep": (1, 296, 3, 5, 72), "long": (2, 8, 19, 17, 72),
    "pixels": (5, 16, 1, 1, 16), "empty": (0, 20, 5, 3, 8),
}  # fmt: skip
KINDS = ("f32", "bf16", "f16")
CHECKS = (
    "slices",
    "layouts",
    "integers_are_exact",
    "moments_are_of_what_is_stored",
    "nothing_else_is_written",
    "same_bits",
    "padding",
)
IDS = (
    *(f"pointwise-{dtype}-{size}" for dtype in KINDS for size in SIZES if dtype != "f16" or size == "ragged"),
    *(f"pointwise-{name}" for name in CHECKS),
)
OPTIONS = ("rows", "affine", "gate", "bias", "keep", "residual")
# Which of the options are given, then both activations: each option alone at least once, each activation once on each side.
CALLS = (
    ("", 0, 0), ("rows", 1, 9), ("affine", 2, 8), ("gate", 3, 7), ("bias", 4, 6), ("keep", 5, 5), ("residual", 6, 4), ("affine gate", 7, 3),
    ("rows affine bias", 8, 2), ("affine keep residual bias", 9, 1), (" ".join(OPTIONS), 3, 5), ("weight bias", 0, 1),
)  # fmt: skip


def draw(size, seed: int, dtype) -> dict:
    """Every tensor of a call, in the order of its arguments; "weight_f32" is the weight of a call that gives it as float32."""
    import torch

    N, C, H, W, O = size
    generator = torch.Generator().manual_seed(seed)

    def image(channels):
        return torch.randn(N, H, W, channels, generator=generator).to(dtype).permute(0, 3, 1, 2)

    found = {"input": image(C), "residual": image(O), "weight_f32": (torch.randn(O, C, generator=generator) * C**-0.5).to(dtype).float()}
    shapes = {"rows": (2, N * H * W), "affine": (3, C), "gate": (N, C), "bias": (O,), "keep": (N,)}
    return found | {"weight": found["weight_f32"].to(dtype)} | {name: torch.randn(s, generator=generator) for name, s in shapes.items()}


def arguments(t: dict, given: str, input_activation: int, activation: int) -> list:
    o = {name: t[name] if name in given.split() else None for name in OPTIONS}
    weight = t["weight_f32" if "weight" in given.split() else "weight"]
    before = [t["input"], weight, o["rows"], o["affine"], o["gate"], input_activation, 0.1]
    return [*before, o["bias"], o["keep"], o["residual"], activation, 0.2]


def run(values: list, moments: bool = False):
    import torch

    from pyops.ops import _pointwise_ops  # noqa: F401  defines the op

    return torch.ops.pyops.pointwise_run.triton(*values, moments)


def compare(dtype, size, call, change=lambda t: t) -> str | None:
    """The numerics gate on the output. One draw settles most; one that misses may be unlucky, and then more are taken together."""
    from pyops.ops import _pointwise_ops
    from pyops.testing import within_gate

    draws, reason = [], None
    for first, last in ((0, 1), (1, 12)):
        for seed in range(first, last):
            values = arguments(change(draw(size, seed, dtype)), *call)
            found, (truth, _), (eager, _) = run(values)[0], _pointwise_ops._run(*double(values), False), _pointwise_ops._run(*values, False)
            if found.shape != truth.shape or found.dtype != dtype:
                return f"{call}: {tuple(found.shape)} {found.dtype}"
            draws.append((found, truth, eager))
        reason = within_gate(draws, dtype) if draws[0][0].numel() else None
        if reason is None:
            return None
    return f"{call}: {reason}"


def sliced(t: dict, margin: int) -> dict:
    """The same values, input and residual as channel slices of a wider image, whose other channels are NaN."""
    import torch

    def slice_(image):
        wide = torch.full((*image.permute(0, 2, 3, 1).shape[:3], image.shape[1] + 2 * margin), float("nan"), dtype=image.dtype)
        wide[..., margin:-margin] = image.permute(0, 2, 3, 1)
        return wide[..., margin:-margin].permute(0, 3, 1, 2)

    return t | {name: slice_(t[name]) for name in ("input", "residual")}


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch
    from pyops.triton_kernels import pointwise_conv

    from pyops.ops import _channel_ops, _pointwise_ops
    from pyops.testing import within_gate

    _, name, *rest = id.split("-")
    if rest:
        return next(filter(None, (compare(getattr(torch, TORCH[name]), SIZES[rest[0]], call) for call in CALLS)), None)
    if name == "padding":  # of C, normalized by rows: beyond float16, and times nothing

        def far(t):
            return t | {"input": t["input"] + 1000, "rows": torch.stack([torch.full_like(t["rows"][0], 1000), t["rows"][1] * 0 + 100])}

        return compare(torch.float16, SIZES["ragged"], ("rows", 0, 0), far)
    full, dtypes = (" ".join(OPTIONS), 3, 5), (torch.float32, torch.bfloat16, torch.float16)
    if name == "slices":
        return compare(torch.float32, SIZES["ragged"], full, lambda t: sliced(t, 3)) or compare(
            torch.bfloat16, SIZES["odd"], full, lambda t: sliced(t, 1)
        )
    if name == "integers_are_exact":
        for dtype in dtypes:
            t = {key: value.double().round().clamp(-1, 1).to(value.dtype) for key, value in draw((2, 37, 4, 5, 20), 0, dtype).items()}
            t["weight"] = draw((2, 37, 4, 5, 20), 1, torch.float32)["weight"].mul(8).round().clamp(-1, 1).to(dtype)
            values = arguments(t, " ".join(OPTIONS), 1, 1)
            truth = _pointwise_ops._run(*double(values), False)[0]
            if not torch.equal(run(values)[0].double(), truth):
                return f"integers are not exact in {dtype}"
        return None
    if name == "moments_are_of_what_is_stored":
        for dtype in dtypes[:2]:
            for size in ("ragged", "long", "empty"):
                output, found = run(arguments(draw(SIZES[size], 0, dtype), *full), True)
                if output.numel() == 0:
                    return None if torch.equal(found, torch.zeros(2, 8)) else "moments of nothing are not zero"
                truth, eager = _channel_ops._moments(output.double()), _channel_ops._moments(output)
                missed = [within_gate([each], torch.float32) for each in zip(found, truth, eager, strict=True)]
                if any(missed):
                    return f"{size}: {missed}"
        return None
    t = draw((2, 24, 5, 3, 40), 0, torch.bfloat16)
    values = arguments(t, *full)
    output, _ = run(values)
    if name == "nothing_else_is_written":
        for margin, dense in ((8, True), (3, False), (0, False)):  # a slice of wider rows; another tile; a layout that needs a copy
            wide = torch.full((2, 5, 3, 40 + 2 * margin), 7.0, dtype=torch.bfloat16)
            slice_ = wide[..., margin : margin + 40].permute(0, 3, 1, 2) if margin else torch.full((2, 40, 5, 3), 7.0, dtype=torch.bfloat16)
            torch.ops.pyops.pointwise_into.triton(slice_, *values)
            if not (torch.equal(slice_, output) if dense or not margin else torch.allclose(slice_, output, rtol=2**-6, atol=2**-6)):
                return f"margin {margin}: other values"
            if margin and not ((wide[..., :margin] == 7).all() and (wide[..., margin + 40 :] == 7).all()):
                return f"margin {margin}: channels beside the slice are written"
        return None
    if name == "layouts":
        t = sliced(t, 8)
        t |= {key: t[key].t().contiguous().t() for key in ("weight", "rows", "affine", "gate")} | {"residual": t["residual"].contiguous()}
        if pointwise_conv.position_stride(t["input"]) != 40 or pointwise_conv.position_stride(t["residual"]) is not None:
            return "these are not the layouts that were meant"
        values = arguments(t, *full)
    return None if torch.equal(run(values)[0], output) else "the bits differ"
