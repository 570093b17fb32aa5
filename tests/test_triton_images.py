"""The Triton kernels of images, of the MLP, of sampling and of cross entropy without a GPU, by Triton's interpreter, as
test_triton_interpreter does it.

Run as a script this file is the child: it prints one line of JSON a case, {"id": ..., "missed": null or the reason}.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))  # this file runs as a script too
import triton_channel  # noqa: E402
import triton_channel_norms  # noqa: E402
import triton_cross_entropy  # noqa: E402
import triton_dense  # noqa: E402
import triton_gaussian  # noqa: E402
import triton_mlp  # noqa: E402
import triton_pointwise  # noqa: E402
import triton_pool  # noqa: E402

FAMILIES = {"channel": triton_channel, "dense": triton_dense, "pointwise": triton_pointwise}
FAMILIES |= {family.FAMILY: family for family in (triton_pool, triton_channel_norms, triton_gaussian, triton_cross_entropy, triton_mlp)}
IDS = [id for family in FAMILIES.values() for id in family.IDS]


pytestmark = pytest.mark.timeout(2400)  # the fixture does the work of all tests; a busy machine takes long


@pytest.fixture(scope="module")
def verdicts() -> dict[str, str | None]:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT / "tests", capture_output=True, text=True)
    lines = child.stdout.splitlines()
    if lines and lines[0].startswith("skip"):
        pytest.skip(lines[0])
    assert child.returncode == 0, child.stderr[-3000:]
    return {verdict["id"]: verdict["missed"] for verdict in map(json.loads, lines)}


@pytest.mark.parametrize("id", IDS)
def test_interpreted(verdicts, id):
    assert verdicts[id] is None, verdicts[id]


def main(ids: list[str]) -> None:
    from test_triton_interpreter import poisoned, unable

    if reason := unable():
        print(reason)
        return
    torch.set_num_threads(1)
    torch.empty, torch.empty_like, torch.Tensor.new_empty = (
        poisoned(each) for each in (torch.empty, torch.empty_like, torch.Tensor.new_empty)
    )
    for id in ids:
        print(json.dumps({"id": id, "missed": FAMILIES[id.split("-")[0]].interpreted(id)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or IDS)
