"""The wheel and the sdist: what they hold, and that they work where they are installed."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def call(*command, cwd=ROOT, **environment):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=cwd)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """An sdist of the checkout, and a plain-Python wheel built from that sdist (the extension's own build is tested by installing it)."""
    out = tmp_path_factory.mktemp("dist")
    call(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(out), str(ROOT), PYOPS_BUILD="none")
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "source", filter="data")
    (source,) = (out / "source").iterdir()
    call(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(source), PYOPS_BUILD="none")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def test_sdist_holds_every_source(built):
    with tarfile.open(built[0]) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    tracked = call("git", "ls-files", "csrc", "pyops", "models", "triton_kernels").split() if (ROOT / ".git").exists() else []
    missing = [name for name in [*tracked, "setup.py", "pyproject.toml", "README.md", "LICENSE"] if name not in names]
    assert not missing


def test_wheel_leaks_no_top_level_names(built):
    names = zipfile.ZipFile(built[1]).namelist()
    assert {name.split("/")[0] for name in names} == {"pyops", f"pyops_kernels-{built[1].name.split('-')[1]}.dist-info"}
    for wanted in ("pyops/py.typed", "pyops/models/__init__.py", "pyops/triton_kernels/__init__.py", "pyops/_build_info.json"):
        assert wanted in names


def test_wheel_works_where_it_is_installed(built, tmp_path):
    """In a virtual environment of its own, away from the checkout, on this interpreter's torch."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    call(str(python), "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(built[1]))
    site = Path(torch.__file__).parent.parent
    code = (
        f"import sys; sys.path.append({str(site)!r}); import torch, pyops;"
        "import pyops.models, pyops.triton_kernels;"
        f"assert pyops.__file__.startswith({str(tmp_path)!r}), pyops.__file__;"
        "y, (h, c) = pyops.nn.LSTM(4, 8)(torch.randn(3, 2, 4)); y.sum().backward(); print(tuple(y.shape))"
    )
    assert call(str(python), "-c", code, cwd=tmp_path).strip() == "(3, 2, 8)"


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({"PYOPS_BUILD": "none"}, "-> none: PYOPS_BUILD=none"),
        ({"PYOPS_BUILD": "cpu"}, "-> cpu: PYOPS_BUILD=cpu"),
        ({"PYOPS_BUILD": "fast"}, "is not one of auto, cuda, cpu, none"),
        ({"PYOPS_BUILD": "auto", "CUDA_HOME": "/nowhere"}, "no CUDA toolkit found"),
        ({"PYOPS_BUILD": "cuda", "CUDA_HOME": "/nowhere"}, "PYOPS_BUILD=cuda needs a CUDA toolkit"),
        ({"PYOPS_BUILD": "auto", "PATH": "/nowhere", "CXX": "", "CUDA_HOME": ""}, "no C\\+\\+ compiler found"),
    ],
    ids=["none", "cpu", "unknown", "auto_no_nvcc", "cuda_no_nvcc", "no_compiler"],
)
def test_build_says_what_it_will_do(environment, expected):
    """One clear line for each path, without building anything."""
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    assert re.search(expected, result.stdout + result.stderr), result.stdout + result.stderr


def test_toolkit_behind_a_wrapper_is_found(tmp_path):
    """nvcc on PATH may be a script that calls the real one elsewhere: the toolkit is where the headers are."""
    real = tmp_path / "toolkit"
    (real / "bin").mkdir(parents=True)
    (real / "include").mkdir()
    (real / "include" / "cuda_runtime.h").touch()
    nvcc = real / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={real}/bin/.." >&2\n')
    nvcc.chmod(0o755)
    wrapper = tmp_path / "elsewhere" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    wrapper.chmod(0o755)
    code = "import setuptools; setuptools.setup = lambda **k: None; import setup; print('HOME', setup.find_toolkit()[1])"
    path = f"{wrapper.parent}:{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_HOME"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**environment, "PATH": path})
    assert f"HOME {real}" in result.stdout, result.stdout + result.stderr
