"""The dense convolution's Triton kernels: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import TORCH, compile_kernel, double

SHAPES = {  # M, C, O of a group: the tiles that sizes can lead to
    "deep": (10**6, 256, 256), "plain": (10**6, 32, 128), "thin": (10**6, 32, 24), "small": (49, 256, 256), "grouped": (10**6, 8, 8),
    "stem": (10**6, 3, 64), "head": (10**6, 64, 3), "odd": (10**6, 37, 37),
}  # fmt: skip
KERNELS = ("run", "transpose_run", "wgrad")
POOLED = {"bf16": ("deep", "stem", "odd"), "f16": ("deep",), "f32": ("deep", "stem")}
DTYPES = {"bf16": tuple(SHAPES), "f16": ("deep",), "f32": ("deep", "thin", "stem", "odd"), "tf32": ("deep", "odd")}


def configurations() -> list[tuple[str, str, str]]:
    """(kernel, shape, dtype; "tf32" is fp32 multiplied so). A launch is fixed by the tile, which follows from the shape, wgrad's from
    channels alone; all options are given: less is less code. What is pooled has neither residual nor moments."""
    found = [(kernel, shape, dtype) for kernel in KERNELS for dtype, shapes in DTYPES.items() for shape in shapes]
    found += [("run_pooled", shape, dtype) for dtype, shapes in POOLED.items() for shape in shapes]
    return [each for each in found if each[:2] != ("wgrad", "small")]


def title(kernel: str, shape: str, dtype: str) -> str:
    return f"dense_conv_{kernel}<{dtype}, {shape}>"


def aligned(shape: str) -> bool:
    return all(size % 8 == 0 for size in SHAPES[shape][1:])


def compiled(kernel: str, shape: str, dtype: str, arch: int):
    import torch
    from pyops.triton_kernels import dense_conv, dense_wgrad

    M, C, O = SHAPES[shape]
    kind = dtype.removeprefix("t")
    precision = getattr(torch, TORCH[kind]), dtype == "tf32"
    if kernel == "wgrad":
        config = dense_wgrad.launch_config(C, O, *precision)
        return compile_kernel(dense_wgrad.wgrad_kernel, config, ("grad_ptr", "input_ptr"), kind, arch)
    config = dense_conv.launch_config(M, C, O, 1, *precision)
    config |= {"TRANSPOSED": kernel == "transpose_run", "ACTIVATION": 3, "RESIDUAL_LAST": False, "POOL": int(kernel == "run_pooled")}
    if config["POOL"]:
        config |= {"residual_ptr": None, "moments_ptr": None}
    return compile_kernel(dense_conv.dense_kernel, config, ("input_ptr", "weight_ptr", "residual_ptr", "output_ptr"), kind, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

GEOMETRIES = {  # of a convolution: N, C, H, W, O, kernel size, stride, padding, dilation, groups; the transpose takes it backwards
    "plain": (2, 40, 6, 7, 24, (3, 3), (1, 1), (1, 1), (1, 1), 1), "strided": (2, 40, 7, 6, 72, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "stem": (1, 3, 13, 11, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1), "odd": (2, 37, 5, 6, 5, (1, 7), (1, 1), (0, 3), (1, 1), 1),
    "even": (1, 16, 9, 10, 8, (2, 4), (3, 2), (1, 2), (2, 1), 1), "grouped": (2, 12, 5, 9, 20, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "tapless": (1, 16, 9, 13, 16, (3, 2), (4, 3), (0, 1), (2, 3), 2), "overhang": (1, 8, 3, 2, 8, (5, 7), (1, 2), (2, 3), (1, 1), 1),
    "pixels": (70, 8, 1, 1, 8, (1, 1), (1, 1), (0, 0), (1, 1), 1), "deep": (1, 136, 3, 4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "long": (2, 8, 19, 17, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1), "empty": (0, 8, 5, 3, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
}  # fmt: skip
KINDS = ("f32", "bf16", "f16")
CHECKS = (
    "activations",
    "every_parity",
    "integers_are_exact",
    "moments_are_of_what_is_stored",
    "pools",
    "pools_nan",
    "layouts",
    "same_bits",
)
IDS = (
    *(
        f"dense-{kernel}-{dtype}-{name}"
        for kernel in KERNELS
        for dtype in KINDS
        for name in GEOMETRIES
        if (dtype != "f16" or name == "even") and (name != "long" or kernel == "wgrad")  # whose programs share positions; else only slow
    ),
    *(f"dense-{name}" for name in CHECKS),
)
CALLS = (("bias residual", 3), ("residual last", 1))  # options given, then the activation


def draw(name, seed: int, dtype) -> dict:
    """Every tensor of the three ops on a geometry; "grad" is of the convolution's output."""
    import torch

    N, C, H, W, O, kernel_size, stride, padding, dilation, groups = geometry = GEOMETRIES[name] if isinstance(name, str) else name
    generator = torch.Generator().manual_seed(seed)
    axes = zip((H, W), kernel_size, stride, padding, dilation, strict=True)
    size = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]

    def image(channels, h, w):
        return torch.randn(N, h, w, channels, generator=generator).to(dtype).permute(0, 3, 1, 2)

    fan = C // groups * kernel_size[0] * kernel_size[1]
    found = {"input": image(C, H, W), "grad": image(O, *size), "residual": image(O, *size), "residual_back": image(C, H, W)}
    found["weight"] = (torch.randn(O, C // groups, *kernel_size, generator=generator) * fan**-0.5).to(dtype)
    found |= {"bias": torch.randn(O, generator=generator), "bias_back": torch.randn(C, generator=generator)}
    return found | {"geometry": geometry}


def arguments(kernel: str, t: dict, given: str = "", activation: int = 0, moments: bool = False, pool: int = 0) -> list:
    _, _, H, W, _, kernel_size, stride, padding, dilation, groups = t["geometry"]
    places = [list(stride), list(padding)]
    if kernel == "wgrad":
        return [t["grad"], t["input"], list(kernel_size), *places, list(dilation), groups]
    back = "_back" if kernel == "transpose_run" else ""
    options = [t[option + back] if option in given.split() else None for option in ("bias", "residual")]
    places += [[H, W]] if back else []
    before = [t["grad" if back else "input"], t["weight"], *options, *places, list(dilation), groups]
    return [*before, activation, 0.2, "last" in given, moments, *([False, pool] if pool else [])]


def run(kernel: str, values: list) -> list:
    import torch

    from pyops.ops import _dense_ops  # noqa: F401  defines the ops

    found = getattr(torch.ops.pyops, f"conv_{kernel}").triton(*values)
    return [found] if kernel == "wgrad" else list(found)


def reference(kernel: str, values: list) -> list:
    from pyops.ops import _dense_ops

    found = getattr(_dense_ops, f"_{kernel}")(*values)
    return [found] if kernel == "wgrad" else list(found)


def compare(kernel: str, dtype, name, *call) -> str | None:
    """The numerics gate on the output. One draw settles most; one that misses may be unlucky, and then more are taken together."""
    from pyops.testing import within_gate

    draws, reason = [], None
    for first, last in ((0, 1), (1, 12)):
        for seed in range(first, last):
            values = arguments(kernel, draw(name, seed, dtype), *call)
            found, truth, eager = run(kernel, values)[0], reference(kernel, double(values))[0], reference(kernel, values)[0]
            if found.shape != truth.shape or found.dtype != dtype:
                return f"{call}: {tuple(found.shape)} {found.dtype}"
            draws.append((found, truth, eager))
        reason = within_gate(draws, dtype, gradient=kernel == "wgrad")
        if reason is None:
            return None
    return f"{call}: {reason}"


def inexact(name, dtype, kernels=KERNELS) -> str | None:
    """Where sums of small integers are not what they are in float64."""
    import torch

    t = draw(name, 0, torch.float32)
    t |= {key: value.round().clamp(-1, 1) for key, value in t.items() if key != "geometry"} | {"weight": t["weight"].sign()}
    t |= {key: value.to(dtype) for key, value in t.items() if key != "geometry" and not key.startswith("bias")}
    for kernel in kernels:
        values = arguments(kernel, t, "bias residual", 1)
        if not torch.equal(run(kernel, values)[0].double(), reference(kernel, double(values))[0].to(dtype).double()):
            return f"{kernel} in {dtype}: integers are not exact with {t['geometry']}"
    return None


def parities() -> list[tuple]:
    """Kernel sizes, strides, paddings, dilations and sizes, even and odd, each pair of them together on one of the axes at least."""
    import itertools

    found = []
    for k, s, p, d, n in itertools.product((1, 2, 3), (1, 2, 3), (0, 1), (1, 2), (6, 7)):
        found.append((1, 8, n, 13 - n, 8, (k, 4 - k), (s, 4 - s), (p, 1 - p), (d, 3 - d), 1))
    return found


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import itertools

    import torch

    from pyops.ops import _activations, _channel_ops
    from pyops.testing import within_gate

    _, name, *rest = id.split("-")
    if rest:
        calls = CALLS[:1] if name == "wgrad" else CALLS
        return next(filter(None, (compare(name, getattr(torch, TORCH[rest[0]]), rest[1], *call) for call in calls)), None)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    if name == "activations":
        numbers = range(len(_activations.NAMES))
        return next(filter(None, (compare("run", torch.float32, "overhang", "bias", number) for number in numbers)), None)
    if name == "every_parity":
        back, others = KERNELS[1:2], KERNELS[::2]  # the transpose's phases depend on them; one in five will do for the others
        calls = [*((each, back) for each in parities()), *((each, others) for each in parities()[::5])]
        return next(filter(None, (inexact(geometry, torch.float32, kernels) for geometry, kernels in calls)), None)
    if name == "integers_are_exact":
        calls = (("grouped", dtypes[0]), ("even", dtypes[1]), ("plain", dtypes[2]), ("odd", dtypes[1]), ("tapless", dtypes[2]))
        return next(filter(None, (inexact(*call) for call in calls)), None)
    if name == "moments_are_of_what_is_stored":
        for kernel, dtype, each in ((a, b, c) for a in KERNELS[:2] for b in dtypes[:2] for c in ("odd", "strided", "empty")):
            output, found = run(kernel, arguments(kernel, draw(each, 0, dtype), "bias residual last", 3, True))
            truth, eager = _channel_ops._moments(output.double()), _channel_ops._moments(output)
            missed = [within_gate([triple], torch.float32) for triple in zip(found, truth, eager, strict=True)]
            if any(missed) or found.dtype != torch.float32:
                return f"{kernel}, {each}: {missed}"
        return None
    if name == "pools":
        cases = itertools.product(dtypes[:2], ("plain", "strided", "stem", "odd", "grouped", "tapless"), (1, 2))
        calls = ((dtype, each, *CALLS[pool - 1], False, pool) for dtype, each, pool in cases)
        return next(filter(None, (compare("run", *call) for call in calls)), None)
    if name == "pools_nan":
        t = draw("plain", 0, torch.float32)
        t["input"][0, 0, 0, 0] = float("nan")
        for pool in (1, 2):
            values = arguments("run", t, "bias", 0, False, pool)
            found, truth = run("run", values)[0].isnan(), reference("run", values)[0].isnan()
            if not truth.any() or not torch.equal(found, truth):
                return f"pool {pool}: other windows are NaN"
        return None
    for kernel in KERNELS:
        t = draw("even", 0, torch.bfloat16)
        other = dict(t)
        if name == "layouts":  # images that need a copy, and filters that do not
            other |= {key: t[key].contiguous() for key in ("input", "grad", "residual", "residual_back")}
            other["input"] = torch.cat([other["input"], other["input"]], 3)[..., : t["input"].shape[3]]
            other["weight"] = t["weight"].contiguous(memory_format=torch.channels_last)
            other["bias"] = torch.stack([t["bias"], t["bias"]], 1)[:, 0]
        first, second = (run(kernel, arguments(kernel, each, "bias residual", 3, True)) for each in (t, other))
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            return f"{kernel}: the bits differ"
        if kernel != "wgrad" and not first[0].is_contiguous(memory_format=torch.channels_last):
            return f"{kernel}: the output is not channels_last"
    return None
