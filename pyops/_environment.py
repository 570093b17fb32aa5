"""What there is on this machine: versions, GPUs, the build, and which backends can run here. Nothing missing makes it fail.

`collect()` gives plain JSON-ready facts; `pyops env` prints them, benchmark reports and bug reports quote them.
"""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import pyops
from pyops import _backends, _library
from pyops.ops import _rnn

VARIABLES = ("PYOPS_BACKEND", "PYOPS_CPU_ISA", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
HOME = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "vendor": "cpu", "eager": "cpu"}  # the device a backend is chiefly for


def collect() -> dict[str, Any]:
    """Everything `pyops env` tells."""
    cuda, build = cuda_facts(), build_facts()
    return {
        "pyops": pyops.__version__,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_facts(),
        "cuda": cuda,
        "build": build,
        "backends": {name: backend_facts(name, cuda["available"]) for name in _backends.NAMES},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "warnings": warn(build, cuda),
    }


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def cpu_facts() -> dict[str, Any]:
    model, cores = None, set()
    try:
        for processor in Path("/proc/cpuinfo").read_text().split("\n\n"):
            fields = dict(line.split(":", 1) for line in processor.splitlines() if ":" in line)
            fields = {key.strip(): value.strip() for key, value in fields.items()}
            model = model or fields.get("model name")
            cores.add((fields.get("physical id"), fields.get("core id")))
    except OSError:
        pass
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": len(cores - {(None, None)}) or None,
        "logical": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def cuda_facts() -> dict[str, Any]:
    with warnings.catch_warnings():  # a driver too old or a GPU too new is told below, not by a stray warning
        warnings.simplefilter("ignore")
        available = torch.cuda.is_available()
        gpus = []
        for index in range(torch.cuda.device_count() if available else 0):
            found = torch.cuda.get_device_properties(index)
            gpus.append({"name": found.name, "capability": [found.major, found.minor], "memory_gib": round(found.total_memory / 2**30, 1)})
    return {"available": available, "runtime": torch.version.cuda, "driver": driver_version(), "gpus": gpus}


def driver_version() -> str | None:
    try:  # read, not asked of nvidia-smi: no process is started, and a broken driver still has its version
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)", text)
    return match.group(1) if match else None


def build_facts() -> dict[str, Any]:
    """What setup.py built, from the compiled kernels themselves or, where they are not loaded, from the file it left."""
    if _library.extension is not None:
        return {"loaded": True, **_library.extension.build_info()}
    try:
        info = json.loads((Path(__file__).parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        info = {"mode": "unknown", "why": "pyops was not built by its setup.py"}
    return {"loaded": False, "not_loaded": _library.not_loaded_reason(), **info}


def backend_facts(name: str, has_gpu: bool) -> dict[str, Any]:
    """{"devices": where a plain float32 LSTM can run on it, "reason": why nowhere, or None}."""
    reasons = {device: plain_call_unsupported(name, device) for device in ("cpu", "cuda")}
    if not has_gpu:
        reasons["cuda"] = "; ".join(filter(None, (reasons["cuda"], "PyTorch sees no CUDA GPU")))
    devices = [device for device, reason in reasons.items() if not reason]
    return {"what": _backends.NAMES[name], "devices": devices, "reason": None if devices else reasons[HOME[name]]}


def plain_call_unsupported(name: str, device: str) -> str | None:
    facts = _rnn.Facts(_rnn.Cell.lstm, device, torch.float32, 16, 4, 32, 32, False, False, False, False, False, False)
    try:
        return _rnn.unsupported(facts, name)
    except Exception as error:  # whatever is broken here is what someone who runs `pyops env` needs to read
        return f"{type(error).__name__}: {error}"


def warn(build: dict[str, Any], cuda: dict[str, Any]) -> list[str]:
    found = []
    archs = build.get("archs") or []
    for name, capability in sorted({(gpu["name"], tuple(gpu["capability"])) for gpu in cuda["gpus"]}):
        if archs and not serves(archs, capability):
            number = "{}.{}".format(*capability)
            found.append(
                f"pyops' CUDA kernels were compiled for {', '.join(archs)}, and none of that runs on this machine's {name} "
                f'(compute capability {number}). Rebuild with TORCH_CUDA_ARCH_LIST="{number}" pip install -e .'
            )
    if cuda["gpus"] and build["mode"] != "cuda":
        found.append(f"there is a GPU, but pyops was built without CUDA kernels: {build['why']}")
    if build["mode"] in ("cpu", "cuda") and not build["loaded"]:
        found.append(f"{build['mode']} kernels were built, but {build['not_loaded']}")
    return found


def serves(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for `archs` ("8.0", "9.0a", "8.0+PTX") run on a GPU of this compute capability.

    Machine code runs on its own and later minors of the same major, "a" code on its very architecture only, PTX on anything later.
    """
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        built, suffix, ptx = (int(match[1]), int(match[2])), match[3], match[4]
        if suffix == "a":
            runs = built == capability
        else:
            runs = built <= capability and (built[0] == capability[0] or (ptx is not None and not suffix))
        if runs:
            return True
    return False
