"""Fused networks in two processes, on DistributedDataParallel and on FSDP2: what one process gets of the whole batch."""

import pytest
import torch

import pyops
from pyops import _library

from .processes import results_of
from .two_ranks import NETWORKS, alone, batch, build

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
    pytest.mark.skipif(_library.extension is None, reason="PyTorch has no SyncBatchNorm on CPUs"),
]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each process: its results by engine, network and whether what the engine needs of the model was done first."""
    return results_of("two_ranks.py", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def expected(name):
    return alone(name)


def agree(ours, expected):
    for part in ("losses", "outputs", "state"):
        torch.testing.assert_close(ours[part], expected[part], **CLOSE)
    torch.testing.assert_close(ours["gradients"], expected["gradients"], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("first", [False, True], ids=["fused_first", "synchronised_first"])
def test_data_parallel(found, name, expected, first):
    for ours in (rank["ddp", name, first] for rank in found):
        agree(ours, expected)
        torch.testing.assert_close(ours["unfused"], expected["outputs"][-1], **CLOSE)


@pytest.mark.parametrize("first", [False, True], ids=["sharded_first", "fused_first"])
def test_fully_sharded(found, name, expected, first):
    x, _ = batch(name)
    for ours in (rank["fsdp", name, first] for rank in found):
        agree(ours, expected)
        assert list(ours["gathered"]) == list(expected["state"])
        torch.testing.assert_close(dict(ours["gathered"]), expected["state"], **CLOSE)
        twin = build(name).eval()
        with torch.no_grad(), pyops.backend("eager"):
            for parts, scale in (("scaled", 1.5), ("again", 1.0)):
                twin.load_state_dict({key: t * scale if t.is_floating_point() else t for key, t in expected["state"].items()})
                torch.testing.assert_close(ours[parts], twin(x), **CLOSE)
        torch.testing.assert_close(ours["unfused"], ours["again"], **CLOSE)
        assert all(ours["sharded"]) and ours["classes"] == ours["before"]
