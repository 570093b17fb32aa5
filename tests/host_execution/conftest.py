"""The kernels built for the host, once a session."""

import subprocess
from pathlib import Path

import pytest

from .harness import CXX, DRIVER, PLAIN_FLAGS, SANITIZE, Builder, kernel_sources, load


@pytest.fixture(scope="session")
def builder(request, tmp_path_factory):
    if CXX is None:
        pytest.skip("no C++ compiler on this host: set CXX or install g++")
    cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
    return Builder(Path(cache.mkdir("host_execution")) if cache else tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="session")
def library(builder, tmp_path_factory):
    sources = [*kernel_sources(), DRIVER / "driver.cpp", DRIVER / "primitives.cu"]
    return load(builder.link(tmp_path_factory.mktemp("host") / "kernels.so", sources, PLAIN_FLAGS, ["-shared"]))


@pytest.fixture(scope="session")
def sanitizers(builder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitizers")
    (folder / "empty.cpp").write_text("int main() {}")
    command = [CXX, *SANITIZE, str(folder / "empty.cpp"), "-o", str(folder / "empty")]
    works = subprocess.run(command, capture_output=True).returncode == 0
    if not works or subprocess.run([str(folder / "empty")], capture_output=True).returncode != 0:
        pytest.skip("the host compiler has no AddressSanitizer")
