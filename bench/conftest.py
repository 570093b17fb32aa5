"""Timing: every round runs each peer once, in random order, and then ours, so that the machine's noise hits all alike.

pytest-benchmark times ours; peers are timed in its untimed set-up of the same round, and ratios are formed round by round.
Options: --bench-rounds N, --bench-peers a,b (torch.compile is off unless named: minutes to build), --bench-seconds S per benchmark,
--bench-models a,b.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    group = parser.getgroup("pyops bench")
    group.addoption("--bench-rounds", type=int, default=0, help="rounds per benchmark; 0: as many as --bench-seconds allows, 11 to 101")
    group.addoption("--bench-seconds", type=float, default=4.0, help="time for one benchmark, all peers together")
    group.addoption(
        "--bench-peers", default="torch.nn,torch naive,torch sdpa,onnxruntime,openvino", help="comma-separated baselines; all for every one"
    )
    group.addoption("--bench-models", default="", help="comma-separated networks for bench_models.py and bench_fuse.py")
    group.addoption("--bench-threads", type=int, default=0, help="torch threads; 0 leaves torch's choice")


def pytest_configure(config):
    if config.getoption("--bench-threads"):
        torch.set_num_threads(config.getoption("--bench-threads"))


def cuda_timer() -> float:
    """Seconds on the GPU's own clock: the difference of two calls is the device time between them."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    event.synchronize()
    return cuda_timer.start.elapsed_time(event) / 1e3  # type: ignore[attr-defined]


if torch.cuda.is_available():
    cuda_timer.start = torch.cuda.Event(enable_timing=True)  # type: ignore[attr-defined]
    cuda_timer.start.record()  # type: ignore[attr-defined]


def timer_for(device: str):
    return cuda_timer if device == "cuda" else time.perf_counter


def _best(call, timer, repeats: int = 5) -> float:
    call()
    found = []
    for _ in range(repeats):
        start = timer()
        call()
        found.append(timer() - start)
    return min(found)


def measure_peaks(device: str, dtype: torch.dtype) -> dict[str, float | None]:
    """The machine's ceilings as PyTorch's best ops reach them: GFLOP/s of a large GEMM in dtype, GB/s of a large copy."""
    timer, N = timer_for(device), 4096 if device == "cuda" else 1024
    a, b = torch.randn(N, N, device=device).to(dtype), torch.randn(N, N, device=device).to(dtype)
    gemms = [lambda: torch.mm(a, b)]
    if device == "cpu" and dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        # oneDNN with packed weights passes MKL's plain GEMM on some CPUs; private, so tried before it is believed
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(b, N)
            linear = torch.ops.mkldnn._linear_pointwise
            linear(a, packed, None, "none", [], "")
            gemms.append(lambda: linear(a, packed, None, "none", [], ""))
        except (RuntimeError, AttributeError, TypeError):
            pass
    source = torch.empty(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        gflops = 2 * N**3 / min(_best(gemm, timer) for gemm in gemms) / 1e9
    return {"peak_gflops": gflops, "peak_gbps": 2 * source.numel() / _best(lambda: target.copy_(source), timer) / 1e9}


_peaks: dict[tuple[str, torch.dtype], dict[str, float | None]] = {}


def peaks(device: str, dtype: torch.dtype) -> dict[str, float | None]:
    if (device, dtype) not in _peaks:
        _peaks[device, dtype] = measure_peaks(device, dtype)
    return _peaks[device, dtype]


def pytest_benchmark_update_machine_info(config, machine_info):
    from pyops import _library

    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else machine_info.get("cpu", {}).get("brand_raw", "CPU")
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info["pyops"] = {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit,
        "cpu_isa": _library.extension.build_info()["cpu_isa"] if _library.extension else None,
        **peaks("cuda" if torch.cuda.is_available() else "cpu", torch.float32),
    }


SLOT = 0.01  # seconds of calls in one timing


def rest(step: float = 0.01, most: float = 0.5) -> None:
    """Waits until this process's thread pools have gone to sleep.

    They spin after their last call (ONNX Runtime's for 50 ms) and would take the cores of whoever comes next: batch-1 layers then
    measure up to twice as slow.
    """
    end = time.perf_counter() + most
    while time.perf_counter() < end:
        busy = time.process_time()
        time.sleep(step)
        if time.process_time() - busy < 0.1 * step:
            return


class Race:
    """Times `ours` under pytest-benchmark and every peer beside it."""

    def __init__(self, benchmark, config, device: str):
        self.benchmark, self.config, self.device = benchmark, config, device
        self.timer = timer_for(device)
        self.random = random.Random(0)

    def _iterations(self, call) -> int:
        """Enough calls in one timing for the clock, the scheduler and the first calls after a rest not to matter."""
        if _best(call, self.timer, 1) > 10 * SLOT:  # a whole network
            return 1
        return max(1, min(2000, int(SLOT / max(_best(call, self.timer, 20), 1e-7))))

    def __call__(self, ours, peers: dict) -> dict[str, list[float]]:
        calls = {"ours": ours, **peers}
        iterations = {name: self._iterations(call) for name, call in calls.items()}
        one_round = sum(_best(call, self.timer, 2) * (iterations[name] + 1) + 0.05 for name, call in calls.items())
        wanted = self.config.getoption("--bench-rounds")
        rounds = wanted or max(11, min(101, int(self.config.getoption("--bench-seconds") / max(one_round, 1e-6))))
        times: dict[str, list[float]] = {name: [] for name in peers}

        def settle(call):
            if self.device == "cpu":
                rest()
            call()  # weights and code are in cache and the pool is awake, for each alike

        def run_peers():
            names = list(peers)
            self.random.shuffle(names)
            for name in names:
                call, count = peers[name], iterations[name]
                settle(call)
                start = self.timer()
                for _ in range(count):
                    call()
                times[name].append((self.timer() - start) / count)
            settle(ours)

        def timed():
            for _ in range(iterations["ours"]):
                ours()

        self.benchmark._timer = self.timer
        self.benchmark.pedantic(timed, setup=run_peers, rounds=rounds, iterations=1, warmup_rounds=0)
        times["ours"] = [t / iterations["ours"] for t in self.benchmark.stats.stats.data]
        self.benchmark.extra_info["calls_per_round"] = iterations["ours"]
        return times


@pytest.fixture
def race(benchmark, request):
    return lambda device: Race(benchmark, request.config, device)


def record(benchmark, times: dict[str, list[float]], flops: int, moved: int, device: str, dtype: torch.dtype, **facts) -> None:
    """Writes what the report needs into the benchmark's extra_info."""
    ours = statistics.median(times["ours"])
    ceiling = peaks(device, dtype)
    gflops, gbps = flops / ours / 1e9, moved / ours / 1e9
    baselines = {}
    for name, found in times.items():
        if name != "ours":
            ratios = [peer / own for peer, own in zip(found, times["ours"], strict=True)]
            baselines[name] = {"median": statistics.median(found), "min": min(found), "max": max(found), "ratio": statistics.median(ratios)}
    benchmark.extra_info.update(
        facts,
        device=device,
        dtype=str(dtype)[6:],
        median=ours,
        flops=flops,
        bytes=moved,
        gflops=gflops,
        gbps=gbps,
        percent_of_peak_flops=100 * gflops / ceiling["peak_gflops"] if ceiling["peak_gflops"] else None,
        percent_of_peak_bandwidth=100 * gbps / ceiling["peak_gbps"] if ceiling["peak_gbps"] else None,
        baselines=baselines,
        environment={name: os.environ[name] for name in ("PYOPS_BACKEND", "PYOPS_CPU_ISA") if name in os.environ},
    )


def collect(factories: dict, wanted: str) -> tuple[dict, dict]:
    """(the wanted peers that run, name -> call; why the others do not, name -> reason)"""
    peers, skipped = {}, {}
    for name, factory in factories.items():
        if wanted != "all" and name not in wanted.split(","):
            continue
        try:
            peers[name] = factory()
            peers[name]()
        except (ImportError, TypeError, ValueError) as reason:
            skipped[name] = str(reason)
    return peers, skipped
