"""pyops' ops on DTensors in two processes: each has its part of what one process computes, and nothing is sent that need not be."""

import pytest
import torch

from pyops import _library

from .processes import results_of

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed"),
    pytest.mark.skipif(_library.extension is None, reason="without kernels there are no ops to split"),
]
if torch.distributed.is_available():
    from .sharded_calls import cases

    NAMES = list(cases())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results_of("sharded_calls.py", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("live", [True, False], ids=["gradients", "inference"])
@pytest.mark.parametrize("name", NAMES)
def test_parts(found, name, live):
    case = cases()[name]
    for parts, gradients, splits, collectives in (rank[name, live] for rank in found):
        for ours, expected in [*parts, *gradients]:
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert len(gradients) == (len(case.tensors) - len(case.fixed) if live else 0)
        assert splits == case.results
        assert [count > 0 for count in collectives] == [case.gathers[0], case.gathers[1] and live]


def test_tensor_parallel_attention(found):
    """Linear layers split by heads, as PyTorch splits them, around flash_attention: the one collective is the last layer's sum."""
    for ours, expected, collectives in (rank["tensor_parallel"] for rank in found):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert collectives == 1
