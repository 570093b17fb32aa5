"""What scripts/gpu_check.sh needs of Python: facts of the machine, ceilings by PyTorch's own ops, and the summary of a run."""

from __future__ import annotations

import csv
import json
import platform
import statistics
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPU_ONLY = {"onnxruntime", "openvino"}  # baselines that run on the CPU alone
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "flash-attn", "xformers", "apex", "transformer-engine")


def facts() -> dict[str, Any]:
    """Versions and GPUs; ends the program where PyTorch sees none."""
    try:
        import torch
    except ImportError as error:
        sys.exit(f"gpu_check: PyTorch cannot be imported by {sys.executable}: {error}")
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        sys.exit(f"gpu_check: PyTorch {torch.__version__} ({built}) sees no CUDA GPU here; there is nothing to check")
    gpus = []
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        capability = f"{found.major}.{found.minor}"
        gpus.append({"name": found.name, "capability": capability, "sms": found.multi_processor_count, "memory": found.total_memory})
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return {"gpus": gpus, "versions": versions | {name: installed(name) for name in PACKAGES}}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def ceilings() -> None:
    """One line of JSON each: the largest matrix products and copies PyTorch's own libraries reach on random data."""
    import torch

    def seconds(call) -> float:
        times = []
        for _ in range(12):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        return statistics.median(times[2:])

    N = 8192
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(N, N, device="cuda", dtype=dtype) for _ in range(2))
        line("matmul_" + str(dtype)[6:], 2 * N**3 / seconds(lambda a=a, b=b: a @ b) / 1e12, "TFLOP/s", f"torch.matmul, {N}^3, random data")
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    line("torch_copy", 2 * source.numel() / seconds(lambda: target.copy_(source)) / 1e9, "GB/s", "Tensor.copy_, read and written, 1 GiB")


def line(name: str, value: float, unit: str, how: str) -> None:
    print(json.dumps({"name": name, "value": value, "unit": unit, "how": how}), flush=True)


def stages(out: Path) -> list[dict[str, Any]]:
    with (out / "stages.tsv").open(newline="") as file:
        return [row | {"seconds": int(row["seconds"]), "limit": int(row["limit"])} for row in csv.DictReader(file, delimiter="\t")]


def microbench(out: Path) -> list[dict[str, Any]]:
    path = out / "microbench.jsonl"
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:  # a line cut short by the end of its stage
            continue
    return found


def benches(out: Path) -> tuple[dict[str, Any], list[str]]:
    """({file: its benchmarks' facts}, the speed-up tables in Markdown)."""
    found: dict[str, Any] = {}
    texts = []
    for path in sorted((out / "bench").glob("*.json")):
        try:
            from pyops.report import load, tables

            run = load(path)
            found[path.stem] = [row["extra_info"] for row in json.loads(path.read_text())["benchmarks"]]
        except (ImportError, ValueError, KeyError) as error:  # cut short, or pyops was not built: the rest of the summary stands
            texts.append(f"{path.name}: {error}")
            continue
        if run.entries:
            texts.append(f"**{path.stem}**\n\n{tables.summary(run).markdown()}")
    return found, texts


def summary(out: Path) -> None:
    """summary.md for people and results.json for programs, from whatever the stages have left in `out`."""
    machine, rows, ceilings_found = json.loads((out / "facts.json").read_text()), stages(out), microbench(out)
    bench_facts, bench_texts = benches(out)
    results = {"machine": machine, "stages": rows, "microbench": ceilings_found, "benches": bench_facts}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    names = ", ".join(dict.fromkeys(f"{gpu['name']} (compute capability {gpu['capability']})" for gpu in machine["gpus"]))
    present = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    parts = ["# GPU check", f"{len(machine['gpus'])} x {names}; {present}"]
    parts.append(markdown(["stage", "status", "seconds"], [[row["stage"], row["status"], str(row["seconds"])] for row in rows]))
    if ceilings_found:
        values = [[row["name"], f"{row['value']:.4g} {row['unit']}", row["how"]] for row in ceilings_found]
        parts.append("## Ceilings\n\n" + markdown(["what", "measured", "how"], values))
    if bench_texts:
        parts.append("## Benches\n\n" + "\n\n".join(bench_texts))
    (out / "summary.md").write_text("\n\n".join(parts) + "\n")


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def baselines() -> list[str]:
    """Every baseline of every op that can run on a GPU, torch.compile excepted: it has a stage of its own."""
    from pyops.testing import SPECS

    return [
        name
        for name in dict.fromkeys(n for spec in SPECS.values() for n in spec.baselines)
        if name not in CPU_ONLY and not name.startswith("torch.compile")
    ]


def main(command: str, *arguments: str) -> None:
    if command == "facts":
        print(json.dumps(facts(), indent=1))
    elif command == "capability":
        print(json.loads(Path(arguments[0]).read_text())["gpus"][0]["capability"])
    elif command == "ceilings":
        ceilings()
    elif command == "ops":
        from pyops.testing import SPECS

        print(*SPECS)
    elif command == "baselines":
        print(",".join(baselines()))
    elif command == "summary":
        summary(Path(arguments[0]))
    else:
        sys.exit(f"gpu_report: unknown command {command!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
