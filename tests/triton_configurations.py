"""Every Triton kernel that the dispatcher can pick, compiled ahead of time without a GPU, and what each costs.

Run as a script this file is a worker: `triton_configurations.py FIRST STEP CUOBJDUMP` compiles every STEP-th kernel from
FIRST on, one line of JSON each.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # this file runs as a script too
import triton_attention
import triton_capsule_routing
import triton_channel
import triton_channel_norms
import triton_cross_entropy
import triton_dense
import triton_depthwise
import triton_gaussian
import triton_mlp
import triton_pointwise
import triton_pool

OTHERS = (
    triton_pool, triton_channel_norms, triton_gaussian, triton_cross_entropy, triton_capsule_routing, triton_mlp, triton_attention,
)  # fmt: skip
ARCHITECTURES = {"sm_80": 80, "sm_90a": 90}
DTYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}  # Triton's names
TORCH = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
SAME_BUT_ACTIVATION = {"rnn_relu": "rnn_tanh", "rnn_sigmoid": "rnn_tanh"}


def stand_in(cell: str, dtype: str) -> tuple[str, str]:
    """Whose kernels are compiled for every size in place of these, which differ in an activation or in the 16-bit format alone."""
    return SAME_BUT_ACTIVATION.get(cell, cell), "bf16" if dtype == "f16" else dtype


def configurations() -> list[tuple[str, str, int]]:
    """(cell, dtype, hidden size). A launch is fixed by cell, dtype and padded hidden size, and whether rows are 16-byte aligned: of each
    padded size the aligned one and the odd one below it, and of what has a `stand_in` the largest. Lengths, states, bias and gradients
    are all given: less is less code."""
    import torch
    from pyops.triton_kernels.recurrent_limits import GATES, launch_config, supports

    found: dict[tuple, tuple[str, str, int]] = {}
    for cell in GATES:
        for dtype in DTYPES:
            for H in range(1, 1025):
                if supports(cell, getattr(torch, TORCH[dtype]), H) is None:
                    _, config = launch_config(cell, getattr(torch, TORCH[dtype]), 1, H)
                    launch = (config["BLOCK_H"], H % 16 == 0) if stand_in(cell, dtype) == (cell, dtype) else ()
                    found[(cell, dtype, *launch)] = (cell, dtype, H)  # the last is the largest
    return list(found.values())


def kernels(cell: str):
    """The cell's forward and backward kernel, and the compile-time argument that makes them this cell's."""
    from pyops.triton_kernels import gru, lstm, rnn

    if cell == "lstm":
        return lstm.lstm_forward_kernel, lstm.lstm_backward_kernel, {}
    if cell.startswith("gru"):
        return gru.gru_forward_kernel, gru.gru_backward_kernel, {"RESET_BEFORE": cell == "gru_reset_before"}
    return rnn.rnn_forward_kernel, rnn.rnn_backward_kernel, {"ACTIVATION": cell.removeprefix("rnn_")}


def compiled(cell: str, backward: bool, dtype: str, hidden_size: int, arch: int):
    """The kernel as a training step with lengths launches it."""
    import torch
    import triton
    from pyops.triton_kernels.recurrent_limits import launch_config
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    *both, constants = kernels(cell)
    kernel = both[backward]
    _, config = launch_config(cell, getattr(torch, TORCH[dtype]), 1, hidden_size)
    options = {key: config.pop(key) for key in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants = {**constants, **config, "REVERSE": True}
    if cell == "gru_reset_before":
        constants["grad_gates_h_ptr"] = None
    pointers = {"lengths_ptr": "*i64", "reserve_ptr": "*fp32"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = pointers.get(name, "*" + DTYPES[dtype])
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") and hidden_size % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def costs(binary, folder: Path, cuobjdump: str) -> dict[str, int]:
    """The columns of pyops/kernel_budgets.json. These kernels have no arrays of their own: all their stack is spilled registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    usage = subprocess.run([cuobjdump, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    threads = 32 * binary.metadata.num_warps
    return {"threads": threads, "registers": registers, "spill_bytes": stack, "stack_bytes": stack, "shared_bytes": binary.metadata.shared}


def instructions(ptx: str) -> dict[str, bool]:
    """What the kernel does in the terms of the design."""
    return {
        "tensor_cores": "mma.sync" in ptx or "wgmma.mma_async" in ptx,
        "loads_128": re.search(r"ld\.global\S*\.v4\.b32", ptx) is not None,
        "copies_128": re.search(r"cp\.async\.cg\S* [^;]*, 0x10", ptx) is not None,
    }


def every_kernel():
    """(its name, how to compile it for a compute capability, what the tests want to know of it) of each kernel to compile."""
    for cell, dtype, hidden_size in configurations():
        facts = {"cell": cell, "dtype": dtype, "hidden_size": hidden_size}
        for backward in (False, True):
            name = f"{cell}_{'backward' if backward else 'forward'}<{dtype}, H={hidden_size}>"
            yield name, partial(compiled, cell, backward, dtype, hidden_size), facts
    for kernel, dtype, C in triton_depthwise.configurations():
        facts = {"channels": C, "dtype": dtype}
        yield f"depthwise_{kernel}<{dtype}, C={C}>", partial(triton_depthwise.compiled, kernel, dtype, C), facts
    for kernel, dtype, C in triton_channel.configurations():
        facts = {"channelwise": kernel, "dtype": dtype, "aligned": C % 8 == 0}
        yield f"channel_{kernel}<{dtype}, C={C}>", partial(triton_channel.compiled, kernel, dtype, C), facts
    for shape, dtype in triton_pointwise.configurations():
        facts = {"pointwise": shape, "dtype": dtype, "aligned": triton_pointwise.SHAPES[shape][-1] == 8}
        yield f"pointwise_conv<{dtype}, {shape}>", partial(triton_pointwise.compiled, shape, dtype), facts
    for kernel, shape, dtype in triton_dense.configurations():
        facts = {"dense": kernel, "dtype": dtype, "aligned": triton_dense.aligned(shape)}
        yield triton_dense.title(kernel, shape, dtype), partial(triton_dense.compiled, kernel, shape, dtype), facts
    for family in OTHERS:
        for found in family.configurations():
            facts = {family.FAMILY: found[0], "dtype": found[-1], "aligned": family.aligned(*found)}
            yield family.title(*found), partial(family.compiled, *found), facts


def jobs() -> list[tuple]:
    """`every_kernel` for each architecture, which comes first."""
    return [(arch, *kernel) for kernel in every_kernel() for arch in ARCHITECTURES]


def main(first: int, step: int, cuobjdump: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TRITON_CACHE_DIR"] = str(Path(scratch) / "cache")
        for arch, name, compile_for, facts in jobs()[first::step]:
            binary = compile_for(ARCHITECTURES[arch])
            row = {"arch": arch, "kernel": name, "costs": costs(binary, Path(scratch), cuobjdump)}
            print(json.dumps({**row, **facts, **instructions(binary.asm["ptx"])}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
