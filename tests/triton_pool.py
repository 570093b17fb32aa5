"""The pooling Triton kernels: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import CHANNELS, TORCH, compile_kernel, double, gate

FAMILY = "pool"
KERNELS = ("run", "reduce", "grad")


def configurations() -> list[tuple[str, int, str]]:
    """(kernel, channels, dtype). A launch is fixed by the tile, which follows from the channels; sizes and windows are not specialized, and
    all optional tensors are given: less is less code."""
    return [(kernel, C, dtype) for kernel in KERNELS for dtype, sizes in CHANNELS.items() for C in sizes]


def title(kernel: str, C: int, dtype: str) -> str:
    return f"pool_{kernel}<{dtype}, C={C}>"


def aligned(kernel: str, C: int, dtype: str) -> bool:
    return C % 8 == 0


def compiled(kernel: str, C: int, dtype: str, arch: int):
    import torch
    from pyops.triton_kernels import channel, pool

    config = channel.launch_config(C, getattr(torch, TORCH[dtype])) | {"MAXIMUM": True, "ACTIVATION": 3}
    return compile_kernel(getattr(pool, f"{kernel}_kernel"), config, ("input_ptr", "grad_ptr", "output_ptr"), dtype, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

GEOMETRIES = {  # N, C, H, W, kernel size, stride, padding
    "stem": (2, 20, 7, 6, (3, 3), (2, 2), (1, 1)), "halves": (1, 37, 5, 9, (2, 2), (2, 2), (0, 0)),
    "overlapping": (1, 8, 6, 5, (3, 2), (1, 3), (1, 0)), "sparse": (2, 5, 9, 10, (2, 3), (3, 4), (0, 1)),
    "whole": (3, 72, 4, 4, (4, 4), (4, 4), (0, 0)), "wide": (1, 16, 11, 13, (5, 5), (3, 3), (2, 2)),
    "empty": (0, 8, 5, 5, (3, 3), (2, 2), (1, 1)),
}  # fmt: skip
CHECKS = ("nan_is_above_all", "integers_are_exact", "walks", "layouts", "same_bits")
IDS = (
    *(f"pool-{dtype}-{name}" for dtype in TORCH for name in GEOMETRIES if dtype != "f16" or name == "stem"),
    *(f"pool-{name}" for name in CHECKS),
)
CALLS = ((True, "affine terms", 1), (False, "affine terms", 3), (True, "", 0), (False, "", 7))  # maximum, options given, activation


def draw(name: str, seed: int, dtype) -> dict:
    """Every tensor that an op may take, "grad" of the output, and the window."""
    import torch

    from pyops.ops import _pool_ops

    N, C, H, W, *window = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(seed)
    found = {"affine": torch.randn(3, C, generator=generator), "terms": torch.randn(2, C, generator=generator)}
    for image, size in (("input", (H, W)), ("grad", _pool_ops.output_size((H, W), *window))):
        found[image] = torch.randn(N, *size, C, generator=generator).to(dtype).permute(0, 3, 1, 2)
    return found | {"window": [list(pair) for pair in window]}


def arguments(t: dict, call: tuple) -> dict[str, list]:
    """Of each op; the index is the reference's."""
    from pyops.ops import _pool_ops

    maximum, given, activation = call
    affine, terms = (t[name] if name in given.split() else None for name in ("affine", "terms"))
    last = [*t["window"], activation, 0.2]
    run = [t["input"], affine, maximum, *last, maximum]
    index = _pool_ops._run(*run)[1] if maximum else None
    found = {"run": run, "grad": [t["grad"], t["input"], affine, terms, index, *last]}
    return found if affine is None else found | {"reduce": [t["grad"], t["input"], affine, index, *last]}


def results(op: str, arguments: list, ours: bool) -> list:
    import torch

    from pyops.ops import _pool_ops

    found = getattr(torch.ops.pyops, f"pool_{op}").triton(*arguments) if ours else getattr(_pool_ops, f"_{op}")(*arguments)
    return [*found] if op in ("run", "reduce") else [found]  # of a reduction two sums of different size


def in_double(arguments: list) -> list:
    import torch

    return [t if isinstance(t, torch.Tensor) and t.dtype == torch.uint8 else double([t])[0] for t in arguments]


def compare(name: str, dtype, call: tuple) -> str | None:
    import torch

    for op in arguments(draw(name, 0, dtype), call):

        def each(seed, op=op):
            values = arguments(draw(name, seed, dtype), call)[op]
            triples = zip(results(op, values, True), results(op, in_double(values), False), results(op, values, False), strict=True)
            return [triple for triple in triples if triple[0].dtype != torch.uint8]

        if missed := gate(each, gradient=op != "run"):
            return f"{op}, {call}: {missed}"
    values = arguments(draw(name, 0, dtype), call)["run"]
    if not torch.equal(results("run", values, True)[1], results("run", values, False)[1]):
        return f"{call}: other maxima"
    return None


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch
    from pyops.triton_kernels import channel

    _, name, *rest = id.split("-")
    if rest:
        return next(filter(None, (compare(rest[0], getattr(torch, TORCH[name]), call) for call in CALLS)), None)
    if name == "nan_is_above_all":
        t = draw("stem", 0, torch.float32)
        t["input"][0, 0, 2:4, 1:4] = float("nan")
        t["input"][1, 1] = 2.0  # of equal values the first
        values = arguments(t, (True, "", 0))["run"]
        pairs = zip(results("run", values, True), results("run", values, False), strict=True)
        return None if all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in pairs) else "other maxima or places"
    if name == "integers_are_exact":
        for dtype, call in ((a, b) for a in (torch.float32, torch.bfloat16, torch.float16) for b in CALLS[::2]):
            t = draw("stem", 0, dtype)
            t |= {key: value.double().mul(2).round().clamp(-3, 3).to(value.dtype) for key, value in t.items() if key != "window"}
            for op, values in arguments(t, call).items():
                for found, truth in zip(results(op, values, True), results(op, in_double(values), False), strict=True):
                    if not torch.equal(found.double(), truth.to(found.dtype).double()):
                        return f"{op} in {dtype}: integers are not exact"
        return None
    if name == "walks":  # few programs, so that each walks tiles
        kept = channel.PROGRAMS
        try:
            channel.PROGRAMS = 1
            return compare("wide", torch.float32, CALLS[0]) or compare("stem", torch.bfloat16, CALLS[1])
        finally:
            channel.PROGRAMS = kept
    t = draw("stem", 0, torch.bfloat16)
    other = dict(t)
    if name == "layouts":  # images of other strides, and vectors that are not dense
        other |= {key: t[key].contiguous() for key in ("input", "grad")} | {key: t[key].t().contiguous().t() for key in ("affine", "terms")}
    for call in CALLS[:2]:
        for (op, a), b in zip(arguments(t, call).items(), arguments(other, call).values(), strict=True):
            first, second = results(op, a, True), results(op, b, True)
            if not all(torch.equal(x, y) for x, y in zip(first, second, strict=True)):
                return f"{op}: the bits differ"
            if op != "reduce" and not first[0].is_contiguous(memory_format=torch.channels_last):
                return f"{op}: the result is not channels_last"
    return None
