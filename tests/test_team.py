"""How members of a CPU kernel's team share out work (csrc/common/parallel.h)."""

import subprocess
from pathlib import Path

import pytest
import torch

from pyops import _library

from .host_execution.harness import CXX, ROOT

TORCH = Path(torch.__file__).parent
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"


@pytest.mark.skipif(_library.extension is None or CXX is None, reason="no C++ compiler, or none was found when pyops was built")
def test_every_piece_is_done_once(tmp_path):
    program, library = tmp_path / "team_check", TORCH / "lib"
    sources = [Path(__file__).parent / "team_check.cpp", ROOT / "csrc/common/parallel.cpp"]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{TORCH / 'include'}", f"-L{library}", f"-Wl,-rpath,{library}"]
    link = ["-ltorch_cpu", "-lc10", "-lpthread", "-Wl,--allow-shlib-undefined"]
    command = [CXX, "-O2", "-std=c++17", TARGET, *paths, *map(str, sources), *link, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
