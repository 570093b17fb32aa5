"""Builds the extension, nothing else. What is built is decided here, said in one block, and kept in pyops/_build_info.json.

PYOPS_BUILD=auto|cuda|cpu|none  auto: CUDA where a toolkit is found, C++ where a compiler is, else plain Python
TORCH_CUDA_ARCH_LIST            as in PyTorch, for example "8.0;9.0a+PTX"; default "8.0+PTX;9.0a"
MAX_JOBS                        parallel compiler processes; default from cores and free memory
CUDA_HOME, CXX                  the toolkit and the host compiler, where the ones found are not the ones meant
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # 2.11, the oldest torch the binary must run under
DEFAULT_ARCHS = "8.0+PTX;9.0a"
GIB_PER_JOB = 2.0

# One source, three instruction sets, chosen at load by CPUID. Elsewhere than on x86-64 the baseline alone is built.
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"],
}


def find_toolkit() -> tuple[str, str] | None:
    """(nvcc, toolkit root), where the root really holds the headers: nvcc on PATH may be a wrapper script outside its toolkit."""
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if not nvcc or not os.access(nvcc, os.X_OK):
        return None
    roots = [home] if home else [str(Path(nvcc).resolve().parent.parent)]
    dryrun = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", "/dev/null"], capture_output=True, text=True)
    roots += [os.path.normpath(top) for top in re.findall(r"^#\$ TOP=(\S+)", dryrun.stderr, re.MULTILINE)]
    for root in roots:
        if root and os.path.exists(f"{root}/include/cuda_runtime.h"):
            return nvcc, root
    return None


def decide() -> dict:
    """What will be built and why, as plain facts."""
    wish = os.environ.get("PYOPS_BUILD", "auto").lower()
    if wish not in ("auto", "cuda", "cpu", "none"):
        sys.exit(f"pyops: PYOPS_BUILD={wish!r} is not one of auto, cuda, cpu, none")
    info: dict = {"requested": wish, "mode": "none", "why": "", "cxx": None, "nvcc": None, "cuda_home": None, "archs": []}
    if wish == "none":
        info["why"] = "PYOPS_BUILD=none: no extension; ops run as plain PyTorch, vendor ops or Triton"
        return info
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not cxx:
        info["why"] = "no C++ compiler found: install g++ (or set CXX) and reinstall for the compiled kernels"
        if wish != "auto":
            sys.exit(f"pyops: PYOPS_BUILD={wish} needs a compiler, but {info['why']}")
        return info
    info.update(mode="cpu", cxx=cxx, why="PYOPS_BUILD=cpu: C++ kernels only")
    if wish == "cpu":
        return info
    toolkit = find_toolkit()
    if toolkit is None:
        info["why"] = "no CUDA toolkit found (no nvcc on PATH, or none whose folder holds include/cuda_runtime.h): C++ kernels only"
        if wish == "cuda":
            sys.exit(
                "pyops: PYOPS_BUILD=cuda needs a CUDA toolkit: put nvcc on PATH, or set CUDA_HOME to a folder with bin/nvcc and include/"
            )
        return info
    nvcc, home = toolkit
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHS).replace(" ", ";").split(";")
    info.update(mode="cuda", nvcc=nvcc, cuda_home=home, archs=[a for a in archs if a], why="C++ and CUDA kernels")
    return info


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            sys.exit(f"pyops: TORCH_CUDA_ARCH_LIST entry {arch!r} is not of the form 8.0, 9.0a or 9.0+PTX")
        number = "".join(match.group(1, 2, 3))
        code = f"[sm_{number},compute_{number}]" if match.group(4) else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def job_count() -> int:
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    with contextlib.suppress(OSError, AttributeError):  # counts reclaimable cache as free, where the kernel tells
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text()).group(1)) / 2**20  # type: ignore[union-attr]
    return max(1, min(len(os.sched_getaffinity(0)), int(free / GIB_PER_JOB)))


def package_dir(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        sys.exit(f"pyops: the build needs {name!r}: run plain `pip install -e .`, or `pip install {name}` before --no-build-isolation")
    return Path(spec.origin).parent


def escape(text: str | Path) -> str:
    return str(text).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(info: dict, build: Path, target: Path) -> Path:
    """One build.ninja: plain C++ files, per-instruction-set kernel files, CUDA files, one shared library."""
    torch = package_dir("torch")
    version = (torch / "version.py").read_text()
    info["built_with_torch"] = re.search(r"__version__ = '([^']+)'", version).group(1)  # type: ignore[union-attr]
    includes = [ROOT / "csrc", build, torch / "include", package_dir("pybind11") / "include", sysconfig.get_paths()["include"]]
    common = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-I{escape(path)}" for path in includes)]
    cxxflags = [*common, "-fPIC", "-Wall", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=fast"]
    link = ["-shared", f"-L{escape(torch / 'lib')}", "-ltorch_cpu"]
    if info["mode"] == "cuda":
        cxxflags += ["-DPYOPS_CUDA", f"-I{escape(Path(info['cuda_home']) / 'include')}"]
        libraries = [
            lib for lib in ("lib64", "lib", "targets/x86_64-linux/lib") if (Path(info["cuda_home"]) / lib / "libcudart_static.a").exists()
        ]
        if not libraries:
            sys.exit(f"pyops: {info['cuda_home']} holds no libcudart_static.a: install the toolkit's runtime files, or set PYOPS_BUILD=cpu")
        link += [f"-L{escape(Path(info['cuda_home']) / libraries[0])}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    nvccflags = [
        *common,
        *gencode(info["archs"]),
        "--expt-relaxed-constexpr",
        "-ccbin",
        info["cxx"],
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden,-Wall",
        "-DPYOPS_CUDA",
    ]
    lines = [
        "ninja_required_version = 1.5",
        f"builddir = {escape(build)}",
        f"cxx = {escape(info['cxx'])}",
        f"nvcc = {escape(info['nvcc'] or 'nvcc')}",
        f"cxxflags = {' '.join(cxxflags)}",
        f"nvccflags = {' '.join(nvccflags)}",
        f"ldflags = {' '.join(link)}",
        "rule cxx\n  command = $cxx -MMD -MF $out.d $cxxflags $isaflags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule nvcc\n  command = $nvcc -MD -MF $out.d $nvccflags -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $cxx $in -o $out $ldflags",
    ]
    isas = ISA_FLAGS if platform.machine() in ("x86_64", "AMD64") else {"baseline": []}
    info["cpu_isas"] = list(isas)
    objects = []

    def compile_one(rule: str, source: Path, tag: str = "", flags: list[str] | None = None) -> None:
        out = build / source.relative_to(ROOT / "csrc").with_suffix(f"{tag}.o")
        objects.append(out)
        lines.append(f"build {escape(out)}: {rule} {escape(source)}")
        if flags:
            lines.append(f"  isaflags = {' '.join(flags)}")

    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if source.name.endswith("_cpu_kernel.cpp"):
            for isa, flags in isas.items():
                compile_one("cxx", source, f".{isa}", [*flags, f"-DPYOPS_ISA={isa}", f"-DPYOPS_ISA_{isa.upper()}=1"])
        else:
            compile_one("cxx", source)
    if info["mode"] == "cuda":
        for source in sorted((ROOT / "csrc").rglob("*.cu")):
            compile_one("nvcc", source, ".cu")
    lines.append(f"build {escape(target)}: link {' '.join(escape(obj) for obj in objects)}")
    lines.append(f"default {escape(target)}\n")
    ninja_file = build / "build.ninja"
    ninja_file.write_text("\n".join(lines))
    return ninja_file


class BuildExtension(build_ext):
    def run(self) -> None:
        info = BUILD
        # an editable install keeps its objects, so that the next one compiles only what changed
        keep = getattr(self, "editable_mode", False) or self.inplace
        build = (ROOT / "build" if keep else Path(self.build_temp).resolve()) / info["mode"]
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath("pyops._C")).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        ninja_file = write_ninja(info, build, target)
        quoted = json.dumps(json.dumps(info, sort_keys=True))
        header = build / "pyops_build_info.h"
        text = f"#pragma once\n#define PYOPS_BUILD_INFO {quoted}\n"
        if not header.exists() or header.read_text() != text:
            header.write_text(text)
        jobs = job_count()
        print(f"pyops: building {info['mode']} ({info['why']}), archs {info['archs'] or '-'}, {jobs} jobs", flush=True)
        ninja = shutil.which("ninja") or str(Path(sysconfig.get_path("scripts")) / "ninja")
        result = subprocess.run([ninja, "-j", str(jobs), "-f", str(ninja_file)])
        if result.returncode:
            less = "cpu" if info["mode"] == "cuda" else "none"
            sys.exit(f"pyops: the compiler failed (above). PYOPS_BUILD={less} installs without these kernels.")


class BuildPython(build_py):
    def run(self) -> None:
        (ROOT / "pyops" / "_build_info.json").write_text(json.dumps(BUILD, indent=1, sort_keys=True) + "\n")
        if getattr(self, "editable_mode", False) and BUILD["mode"] == "none":
            for stale in (ROOT / "pyops").glob("_C*.so"):  # an earlier build must not outlive a wish for none
                stale.unlink()
        super().run()


def mapped(folder: str) -> list[str]:
    """A top-level folder that installs under pyops."""
    return [f"pyops.{folder}", *(f"pyops.{folder}.{name}" for name in find_packages(folder))]


BUILD = decide()
print(f"pyops: PYOPS_BUILD={BUILD['requested']} -> {BUILD['mode']}: {BUILD['why']}", flush=True)

setup(
    packages=[*find_packages(include=["pyops", "pyops.*"]), *mapped("models"), *mapped("triton_kernels")],
    package_dir={"pyops": "pyops", "pyops.models": "models", "pyops.triton_kernels": "triton_kernels"},
    package_data={"pyops": ["py.typed", "_build_info.json", "_C.pyi", "kernel_budgets.json"]},
    ext_modules=[] if BUILD["mode"] == "none" else [Extension("pyops._C", sources=[])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPython},
)
