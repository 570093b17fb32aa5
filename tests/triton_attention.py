"""The attention Triton kernels: compiled ahead of time (a share of `triton_configurations`), and interpreted on CPU tensors."""

from triton_channel import DTYPES as TYPES
from triton_channel import TORCH

FAMILY = "attention"
VECTORS = ("lse_ptr", "delta_ptr", "partial_ptr", "qkv_bias_ptr", "table_ptr", "beyond_ptr", "tables_ptr")
# Head size, dtype, what is given beside query, key and value. Sizes are not specialized.
CASES = {"d64": (64, "bf16", ""), "d128": (128, "bf16", "causal"), "f32": (64, "f32", ""), "bias": (64, "bf16", "bias")}
WINDOW = (7, 32, "bf16")  # side, head size, dtype: Swin's
SIDE = 1024  # of the scores: more than a tile


def configurations() -> list[tuple[str, str, str]]:
    """(kernel, case, dtype): the kernels of each case, but of those with a bias what differs most."""
    kernels = {case: ("forward", "grad_query", "grad_key") for case in CASES} | {"bias": ("forward", "grad_bias")}
    found = [(kernel, case, CASES[case][1]) for case in CASES for kernel in kernels[case]]
    return [*found, ("forward", "window", WINDOW[2]), ("rows", "window", WINDOW[2])]


def title(kernel: str, case: str, dtype: str) -> str:
    return f"attention_{kernel}<{dtype}, {case}>"


def aligned(kernel: str, case: str, dtype: str) -> bool:
    return True


def compiled(kernel: str, case: str, dtype: str, arch: int):
    """As a call of plain strides launches it."""
    import torch
    import triton
    from pyops.triton_kernels import attention, attention_backward, attention_tile, window_attention, window_backward
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kind = getattr(torch, TORCH[dtype])
    given = {"seed_ptr": None}
    if case == "window":
        side, D, _ = WINDOW
        function = getattr(window_attention if kernel == "forward" else window_backward, f"{kernel}_kernel")
        config = window_attention.launch_config(side * side, D, kind)
        given |= {"WH": side, "WW": side, "PADS": False, "SHIFTED": True, "D": D}
        given |= dict.fromkeys(("logit_ptr", "logits_ptr", "beyond_ptr"))
    else:
        D, _, options = CASES[case]
        function = getattr(attention if kernel == "forward" else attention_backward, f"{kernel}_kernel")
        which = (attention,) if kernel == "forward" else (attention_backward, function)
        config = which[0].launch_config(*which[1:], SIDE, SIDE, D, kind)
        BLOCK_D, BLOCK_E = attention_tile.head_pieces(D)
        given |= dict.fromkeys(("slopes_ptr", "spans_ptr", "grad_lse_ptr"))
        given |= {"SINGLE": False, "CAPPED": False, "LEFT": False, "RIGHT": options == "causal", "RAGGED": False, "D": D, "UNIT": 8}
        given |= {"BLOCK_D": BLOCK_D, "BLOCK_E": BLOCK_E, "bias_m": 1}
        given |= {"ALL_SEQUENCES": True, "ALL_HEADS": False, "ALL_ROWS": False, "ALL_COLUMNS": False}
        given |= {} if options == "bias" else {"bias_ptr": None}
    constants = {name: value for name, value in (given | config).items() if name in function.arg_names}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in VECTORS else "*" + TYPES[dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in ("scale", "softcap", "rescale") else "i32"
            if name == "bias_n":
                attributes[(position,)] = [["tt.divisibility", 16]]
    launch = {key: config[key] for key in ("num_warps", "num_stages")}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=launch)
