"""The channelwise Triton kernels: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

import itertools

KERNELS = ("moments", "apply", "totals", "reduce", "grad")
DTYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}  # Triton's names
TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
OTHER_POINTERS = {"index_ptr": "*u8", "seed_ptr": "*i64", "target_ptr": "*i64"}
FLOATS = ("alpha", "beta", "k", "eps", "smoothing", "softcap")  # arguments, beside slopes
CHANNELS = {"f32": (64, 37), "bf16": (64, 37, 24, 5), "f16": (64,)}


def configurations() -> list[tuple[str, str, int]]:
    """(kernel, dtype, channels). A launch is fixed by the tile, which follows from the channels; sizes are not specialized, an activation
    changes a few instructions, and all optional tensors are given: less is less code. Moments are merged in fp32 whatever the image."""
    found = [(kernel, dtype, C) for kernel in KERNELS for dtype, sizes in CHANNELS.items() for C in sizes]
    return [*found, ("merge", "f32", 64)]


def compiled(kernel: str, dtype: str, C: int, arch: int):
    import torch
    from pyops.triton_kernels import channel, moments

    function = getattr(moments if kernel == "merge" else channel, f"{kernel}_kernel")
    config = moments.merge_config() if kernel == "merge" else channel.launch_config(C, getattr(torch, TORCH[dtype]))
    images = ("input_ptr", "grad_ptr", "residual_ptr", "output_ptr", "grad_residual_ptr")
    return compile_kernel(function, config | {"ACTIVATION": 3}, images, dtype, arch)


def compile_kernel(function, config: dict, images: tuple[str, ...], dtype: str, arch: int):
    """Ahead of time: pointers aligned to 16 bytes, those named in `images` of dtype, those of OTHER_POINTERS of theirs and the rest fp32;
    integers not specialized."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {key: config[key] for key in ("num_warps", "num_stages")}
    constants = {name: value for name, value in config.items() if name in function.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + DTYPES[dtype] if name in images else OTHER_POINTERS.get(name, "*fp32")
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS or name.endswith("slope") else "i32"
    return triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options)


# ------------------------------------------------------------------------------------------------------------ interpreted


def gate(each, gradient: bool = False) -> str | None:
    """What misses the numerics gate of `each(seed)`'s results, [(ours, float64's, eager's)]. One draw settles most; one that misses may be
    unlucky, and then more are taken together."""
    from pyops.testing import within_gate

    draws, reasons = [], []
    for first, last in ((0, 1), (1, 12)):
        draws += [each(seed) for seed in range(first, last)]
        results = [list(result) for result in zip(*draws, strict=True)]
        for found, truth, eager in draws[0]:
            if found.shape != truth.shape or found.dtype != eager.dtype:
                return f"{tuple(found.shape)} {found.dtype} for {tuple(truth.shape)} {eager.dtype}"
        reasons = [within_gate(result, result[0][0].dtype, gradient) for result in results if result[0][0].numel()]
        if not any(reasons):
            return None
    return str(reasons)


OPS = ("moments", "apply", "sums", "reduce", "grad", "grad_")
SIZES = {"ragged": (2, 20, 5, 3), "odd": (2, 37, 4, 5), "wide": (1, 72, 5, 8), "pixels": (5, 8, 1, 1), "empty": (0, 20, 5, 3)}
CHECKS = ("walks_and_merges", "large_means", "integers_are_exact", "layouts", "same_bits")
IDS = (
    *(f"channel-{op}-{dtype}-{size}" for op in OPS for dtype in DTYPES for size in SIZES if dtype != "f16" or size == "odd"),
    *(f"channel-{name}" for name in CHECKS),
)
OPTIONS = ("affine", "keep", "residual", "gate", "offset", "terms")
# Which of the options are given, then the activation: each option alone at least once, each activation once.
CALLS = (
    ("", 0), ("affine", 1), ("keep", 3), ("residual", 7), ("gate", 5), ("offset", 8), ("affine keep residual terms", 9),
    ("affine terms gate offset", 4), ("affine keep residual gate offset terms", 6), ("affine residual terms", 2), ("affine terms", 0),
)  # fmt: skip


def draw(size, seed: int, dtype) -> dict:
    """Every tensor that an op may take, the vectors float32."""
    import torch

    N, C, H, W = size
    generator = torch.Generator().manual_seed(seed)
    shapes = {"affine": (3, C), "keep": (N,), "gate": (N, C), "offset": (N, C), "terms": (2, C)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in ("input", "grad", "residual"):
        found[name] = torch.randn(N, H, W, C, generator=generator).to(dtype).permute(0, 3, 1, 2)
    return found


def arguments(op: str, t: dict, given: str, activation: int) -> list | None:
    """The op's arguments, with None for options that are not `given`; None where the op does not take such a call."""
    o = {name: t[name] if name in given.split() else None for name in OPTIONS}
    place, gates, last = [o["affine"], o["keep"], o["residual"]], [o["gate"], o["offset"]], [activation, 0.1]
    if op == "moments":
        return [t["input"]]
    if op == "apply":
        return [t["input"], *place, *gates, *last]
    if op == "sums":
        return [t["input"], t["grad"] if "keep" in given else None, *place, *last]
    if op == "reduce":
        return None if o["affine"] is None else [t["grad"], t["input"], *place, *gates, *last]
    return [t["grad"], t["input"], o["affine"], o["terms"], *place[1:], *gates, *last, *([] if op == "grad_" else ["residual" in given])]


def call(op: str, arguments: list, ours: bool) -> list:
    """Its results as a list; `grad_` writes over a copy."""
    import torch

    from pyops.ops import _channel_ops

    if op == "grad_":
        arguments = [arguments[0].clone(), *arguments[1:]]
    run = getattr(torch.ops.pyops, f"channel_{op}").triton if ours else getattr(_channel_ops, f"_{op}")
    result = run(*arguments)
    return [arguments[0]] if op == "grad_" else list(result) if isinstance(result, tuple) else [result]


def double(arguments: list) -> list:
    return [value.double() if hasattr(value, "double") else value for value in arguments]


def compare(op: str, dtype, size, given: str = "", activation: int = 0, change=lambda t: t) -> str | None:
    """The numerics gate. One draw settles most; one that misses may be unlucky, and then more are taken together."""
    from pyops.testing import within_gate

    triples, reasons = [], []
    for first, last in ((0, 1), (1, 12)):
        for seed in range(first, last):
            values = arguments(op, change(draw(size, seed, dtype)), given, activation)
            found, truth, eager = call(op, values, True), call(op, double(values), False), call(op, values, False)
            for a, b, c in zip(found, truth, eager, strict=True):
                if a.shape != b.shape or a.dtype != c.dtype:
                    return f"{given}: {tuple(a.shape)} {a.dtype} for {tuple(c.shape)} {c.dtype}"
            if op in ("moments", "reduce"):  # two results of different size
                found, truth, eager = ([*side[0]] for side in (found, truth, eager))
            triples.append(list(zip(found, truth, eager, strict=True)))
        results = [each for each in zip(*triples, strict=True) if each[0][0].numel()]
        reasons = [within_gate(list(each), each[0][0].dtype, gradient=op in ("reduce", "grad", "grad_")) for each in results]
        if not any(reasons):
            return None
    return f"{given or 'plain'}, activation {activation}: {reasons}"


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch
    from pyops.triton_kernels import channel, moments

    _, op, *rest = id.split("-")
    if rest:
        dtype, size = getattr(torch, TORCH[rest[0]]), SIZES[rest[1]]
        calls = [each for each in CALLS if arguments(op, draw(size, 0, dtype), *each) is not None]
        return next(filter(None, (compare(op, dtype, size, *each) for each in calls[: 1 if op == "moments" else None])), None)
    if op == "walks_and_merges":  # few programs, so that each walks tiles; then many moments to merge, in three levels
        kept = channel.PROGRAMS, moments.MERGED
        try:
            for channel.PROGRAMS, moments.MERGED in ((3, 128), (10**6, 8)):
                for name, size in (("moments", (3, 20, 23, 25)), ("sums", (2, 20, 13, 9)), ("reduce", (2, 20, 13, 9))):
                    missed = compare(name, torch.float32, size, "affine keep" if name == "reduce" else "", 3)
                    if missed:
                        return f"{name}, {channel.PROGRAMS} programs: {missed}"
        finally:
            channel.PROGRAMS, moments.MERGED = kept
        return None
    if op == "large_means":
        steps = (torch.arange(3 * 20 * 23 * 25) * 7919 % 97).reshape(3, 20, 23, 25)
        for mean, step, dtype in ((4096.0, 2.0**-6, torch.float32), (256.0, 2.0, torch.bfloat16)):  # exact in dtype
            input = (mean + steps * step).to(dtype)
            truth = call("moments", [input.double()], False)[0]
            error = (call("moments", [input], True)[0].double() - truth).abs().amax(1) / truth.abs().amax(1)
            if not (error < 2.0**-18).all():  # Welford's bound at a mean of 10^4 deviations is 2^-10, a sum of squares' 2^4
                return f"mean {mean}: relative errors {error.tolist()}"
        found = call("moments", [torch.full((3, 20, 23, 25), 1e36)], True)[0]  # the values' sum would overflow
        return None if torch.equal(found, torch.tensor([1e36, 0.0])[:, None].expand(2, 20)) else f"of 1e36: {found.tolist()}"
    if op == "integers_are_exact":
        for dtype, name in itertools.product((torch.float32, torch.bfloat16, torch.float16), OPS[1:]):
            t = {key: value.double().mul(2).round().clamp(-3, 3).to(value.dtype) for key, value in draw((3, 20, 6, 7), 0, dtype).items()}
            values = arguments(name, t, "affine keep residual gate offset terms", 1)
            for found, truth in zip(call(name, values, True), call(name, double(values), False), strict=True):
                if not torch.equal(found.double(), truth.to(dtype).double() if found.dtype == dtype else truth):
                    return f"{name}: integers are not exact in {dtype}"
        return None
    t = draw((3, 20, 6, 7), 0, torch.bfloat16)
    other = dict(t)
    if op == "layouts":  # images of other strides, and vectors that are not dense
        other |= {name: t[name].contiguous() for name in ("input", "residual")} | {"grad": t["grad"].contiguous()}
        other |= {name: t[name].t().contiguous().t() for name in ("affine", "gate", "offset", "terms")}
        other["input"] = torch.cat([other["input"], other["input"]], 3)[..., :7]
    for name in OPS:
        first, second = (call(name, arguments(name, each, " ".join(OPTIONS), 3), True) for each in (t, other))
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return f"{name}: the bits differ"
    return None
