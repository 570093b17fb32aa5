"""Static budgets of the Triton kernels: compiled ahead of time for each architecture, no GPU, and read back from the binary.

A program holds W_hh on chip for the whole sequence, so a spill or a shared memory overrun is what limits `supports`.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from pyops.triton_kernels.recurrent_limits import (  # noqa: E402
    GATES,
    MAX_HIDDEN_16BIT,
    MAX_HIDDEN_32BIT,
    SHARED_MEMORY_SM80,
    launch_config,
    shared_memory,
    supports,
)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 leaves nothing to compile")

CELLS = ("lstm", "gru", "gru_reset_before", "rnn_tanh")
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# Bytes a thread may spill: none when H is a multiple of 16 (rows are then read 16 bytes at a time), but for the fp32 gru at 128, whose
# weights alone take 192 of a thread's 255 registers. Other sizes need an address per element and may give up a few registers.
SPILLS = {("gru", torch.float32, 128): 16, ("gru_reset_before", torch.float32, 128): 16}
SPILLS_UNALIGNED = 96


def kernels(cell: str):
    """The cell's forward and backward kernel, and the compile-time argument that makes them this cell's."""
    from pyops.triton_kernels import gru, lstm, rnn

    if cell == "lstm":
        return lstm.lstm_forward_kernel, lstm.lstm_backward_kernel, {}
    if cell.startswith("gru"):
        return gru.gru_forward_kernel, gru.gru_backward_kernel, {"RESET_BEFORE": cell == "gru_reset_before"}
    return rnn.rnn_forward_kernel, rnn.rnn_backward_kernel, {"ACTIVATION": cell.removeprefix("rnn_")}


def compiled(cell: str, backward: bool, dtype: torch.dtype, hidden_size: int, arch: int):
    """The kernel as a training step with lengths launches it."""
    *both, constants = kernels(cell)
    kernel = both[backward]
    _, config = launch_config(cell, dtype, 1, hidden_size)
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
            signature[name] = pointers.get(name, "*" + TYPES[dtype])
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") and hidden_size % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def spilled(binary, folder: Path) -> int:
    """Bytes of stack a thread uses: these kernels have no arrays of their own, so all of it is spilled registers."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1])


CASES = [
    *((cell, dtype, H) for cell in CELLS for dtype in (torch.float32, torch.bfloat16) for H in (16, 32, 64)),
    *((cell, dtype, 128) for cell in CELLS for dtype in (torch.float32, torch.bfloat16) if supports(cell, dtype, 128) is None),
    *((cell, torch.bfloat16, 256) for cell in CELLS if supports(cell, torch.bfloat16, 256) is None),
    *(("lstm", dtype, H) for dtype in TYPES for H in (1, 33)),
    *((cell, torch.float16, 100) for cell in ("lstm", "gru")),
    *((cell, dtype, 20) for cell in ("rnn_relu", "rnn_sigmoid") for dtype in TYPES),
]


@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("cell, dtype, hidden_size", CASES, ids=lambda v: TYPES.get(v, str(v)) if isinstance(v, torch.dtype) else str(v))
def test_budget(cell, dtype, hidden_size, arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    assert supports(cell, dtype, hidden_size) is None
    allowed = SPILLS.get((cell, dtype, hidden_size), 0 if hidden_size % 16 == 0 else SPILLS_UNALIGNED)
    for backward in (False, True):
        binary = compiled(cell, backward, dtype, hidden_size, arch)
        assert binary.metadata.shared <= shared_memory(cell, dtype, hidden_size) <= SHARED_MEMORY_SM80
        assert spilled(binary, tmp_path) <= allowed, "backward" if backward else "forward"
        tensor_cores = "mma.sync" in binary.asm["ptx"]
        assert tensor_cores == (dtype != torch.float32)


@pytest.mark.parametrize("cell", list(GATES))
def test_every_supported_size_has_a_configuration(cell):
    for dtype in TYPES:
        largest = (MAX_HIDDEN_32BIT if dtype == torch.float32 else MAX_HIDDEN_16BIT)[GATES[cell]]
        for hidden_size in range(1, largest + 1):
            assert supports(cell, dtype, hidden_size) is None
            (programs,), config = launch_config(cell, dtype, 17, hidden_size)
            assert programs * config["BLOCK_B"] >= 17 and config["BLOCK_H"] >= hidden_size
        assert f"up to {largest}" in supports(cell, dtype, largest + 1)


def test_refusals_say_why():
    assert "no such cell" in supports("mgu", torch.float32, 8)
    assert "torch.float64" in supports("lstm", torch.float64, 8)
    assert "hidden size 0" in supports("lstm", torch.float32, 0)
    assert "bytes of shared memory, the device has 101376" in supports("lstm", torch.bfloat16, 128, shared_limit=99 * 1024)
