"""The depthwise convolution's Triton kernels, compiled ahead of time: a share of `triton_configurations`."""

KERNELS = ("conv_forward", "conv_gradient", "grad_input", "grad_weight")
DTYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}  # Triton's names
TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
CHANNELS = {"f32": (64, 37), "bf16": (64, 37, 32, 24, 16, 5), "f16": (64,)}


def configurations() -> list[tuple[str, str, int]]:
    """(kernel, dtype, channels). A launch is fixed by the tile, which follows from the channels, and whether rows are 16-byte aligned;
    size, stride, dilation and activation only change constants in it, and all optional tensors are given: less is less code."""
    return [(kernel, dtype, C) for kernel in KERNELS for dtype, sizes in CHANNELS.items() for C in sizes]


def compiled(kernel: str, dtype: str, C: int, arch: int):
    import torch
    import triton
    from pyops.triton_kernels import depthwise_conv
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(depthwise_conv, "conv_kernel" if kernel.startswith("conv") else f"{kernel}_kernel")
    config = depthwise_conv.launch_config(C, getattr(torch, TORCH[dtype]))
    options = {key: config.pop(key) for key in ("num_warps", "num_stages")}
    constants = config | {"KH": 5, "KW": 5, "STRIDE_H": 2, "STRIDE_W": 2, "PAD_H": 2, "PAD_W": 2, "DILATION_H": 1, "DILATION_W": 1}
    constants |= {"ACTIVATION": 3, "GRADIENT": kernel == "conv_gradient", "BLOCK_T": depthwise_conv.BLOCK_TAPS}
    unused = ("sums_ptr",) if kernel == "conv_gradient" else ("grad_output_ptr", "grad_means_ptr")
    constants |= {name: None for name in unused}
    floats = ("sums_ptr", "grad_means_ptr", "partials_ptr")
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32" if name in floats else "*" + DTYPES[dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name == "slope" else "i32"
            if name == "C" and C % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    return triton.compile(ASTSource(function, signature, constants, attributes), target=GPUTarget("cuda", arch, 32), options=options)
