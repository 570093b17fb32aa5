"""Tests that need a GPU: skipped where there is none. Everywhere else the same kernels are proven by host execution."""

from pathlib import Path

import pytest
import torch

from ..host_execution.harness import DRIVER, GPU_FLAGS, Builder, kernel_sources, load, nvcc


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="PyTorch sees no CUDA GPU"))


@pytest.fixture(scope="session")
def library(request, tmp_path_factory):
    """The kernels and their C driver, built by nvcc for the GPU at hand: any path of any kernel can be asked for by name."""
    if nvcc() is None:
        pytest.skip("no nvcc: set CUDA_HOME or put nvcc on PATH")
    cache = getattr(request.config, "cache", None)
    builder = Builder(Path(cache.mkdir("gpu_kernels")) if cache else tmp_path_factory.mktemp("objects"), nvcc())
    major, minor = torch.cuda.get_device_capability()
    arch = f"-arch=sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"
    sources = [*kernel_sources(), DRIVER / "driver.cpp", DRIVER / "primitives.cu"]
    return load(builder.link(tmp_path_factory.mktemp("gpu") / "kernels.so", sources, [*GPU_FLAGS, arch], ["-shared", arch]))
