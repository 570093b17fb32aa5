"""Cross entropy's Triton kernel: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import TORCH, compile_kernel, gate

FAMILY = "cross_entropy"
DTYPES = {"bf16": (256, 50257, 32000), "f16": (32000,), "f32": (256, 1003, 32000)}  # classes


def configurations() -> list[tuple[int, str]]:
    """(classes, dtype). A launch is fixed by the tile, which follows from the classes; scale is given and logits are capped: less is less
    code."""
    return [(V, dtype) for dtype, sizes in DTYPES.items() for V in sizes]


def title(V: int, dtype: str) -> str:
    return f"cross_entropy_rows<{dtype}, V={V}>"


def aligned(V: int, dtype: str) -> bool:
    return V % 8 == 0


def compiled(V: int, dtype: str, arch: int):
    from pyops.triton_kernels import cross_entropy

    config = cross_entropy.launch_config(V) | {"CAPPED": True}
    return compile_kernel(cross_entropy.rows_kernel, config, ("logits_ptr",), dtype, arch)


# ------------------------------------------------------------------------------------------------------------ interpreted

SHAPES = {"words": (5, 5000), "odd": (7, 131), "aligned": (6, 256), "one": (3, 1), "few": (4, 3), "empty": (0, 8)}  # M, V
CHECKS = ("without_scale", "targets", "infinities", "same_bits", "refusals")
IDS = (
    *(f"cross_entropy-{dtype}-{shape}" for dtype in TORCH for shape in SHAPES if dtype != "f16" or shape == "odd"),
    *(f"cross_entropy-{name}" for name in CHECKS),
)
CALLS = ((0.0, 0.0), (0.2, 0.0), (0.0, 3.0), (0.1, 2.0), (1.0, 0.0))  # smoothing, softcap


def draw(shape: str, seed: int, dtype) -> list:
    """logits, target, scale"""
    import torch

    M, V = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(M, V, generator=generator) * 3).to(dtype)
    return [logits, torch.randint(V, (M,), generator=generator), torch.rand(M, generator=generator)]


def results(tensors: list, options: tuple, ours: bool) -> list:
    """Losses, and what became of a copy of the logits."""
    import torch

    from pyops.ops import _cross_entropy_ops

    logits, target, scale = tensors
    logits = logits.clone()
    run = torch.ops.pyops.cross_entropy_rows_.triton if ours else _cross_entropy_ops._reference
    return [run(logits, target, scale, -100, *options), logits]


def compare(shape: str, dtype, options: tuple) -> str | None:
    import torch

    def each(seed, index):
        tensors = draw(shape, seed, dtype)
        wide = [t.double() if t.is_floating_point() else t for t in tensors]
        return [(results(tensors, options, True)[index], results(wide, options, False)[index], results(tensors, options, False)[index])]

    if shape == "one":  # the gradient is zero but for rounding
        gradient = results(draw(shape, 0, dtype), options, True)[1]
        return gate(lambda seed: each(seed, 0)) or (None if torch.all(gradient.abs() < 1e-6) else f"gradient {gradient}")
    return gate(lambda seed: each(seed, 0)) or gate(lambda seed: each(seed, 1), gradient=True)


def interpreted(id: str) -> str | None:
    """What misses in one of IDS, or None."""
    import torch

    _, name, *rest = id.split("-")
    if rest:
        dtype = getattr(torch, TORCH[name])
        return next((f"{call}: {missed}" for call in CALLS if (missed := compare(rest[0], dtype, call))), None)
    tensors = draw("odd", 0, torch.bfloat16)
    logits, target, _ = tensors
    if name == "without_scale":
        losses, same = results([logits, target, None], (0.1, 2.0), True)
        kept = torch.equal(same, logits) and torch.equal(losses, results(tensors, (0.1, 2.0), True)[0])
        return None if kept else "logits or losses changed"
    if name == "targets":
        target[1], target[2], target[3] = -100, 131, -1
        losses, grads = results([logits.half(), *tensors[1:]], (0.1, 0.0), True)  # the interpreter's bfloat16 has no zero
        fine = losses[1] == 0 and not grads[1].any() and losses[2:4].isnan().all() and grads[2:4].isnan().all()
        return None if fine and losses[4:].isfinite().all() else f"{losses}"
    if name == "infinities":
        logits[1, 5:], logits[2, 0], target[1] = float("-inf"), float("nan"), 2
        for found, wanted in zip(results(tensors, (0.0, 0.0), True), results(tensors, (0.0, 0.0), False), strict=True):
            if not torch.allclose(found.float(), wanted.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
                return f"{found} for {wanted}"
        return None
    if name == "refusals":
        try:
            torch.ops.pyops.cross_entropy_rows_.triton(logits.t(), target, None, -100, 0.0, 0.0)
        except ValueError as error:
            return None if "logits: expected a contiguous [M, V]" in str(error) else str(error)
        return "no error"
    pairs = zip(results(tensors, (0.1, 2.0), True), results(tensors, (0.1, 2.0), True), strict=True)
    return None if all(torch.equal(a, b) for a, b in pairs) else "the bits differ"
