"""Scripts of this folder that run in two processes at once."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent


def results_of(script: str, folder: Path) -> list:
    """What each process wrote to `folder` as RANK.pt; they are started with their rank and the folder as arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / script)]
    workers = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [worker.wait(240) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]
