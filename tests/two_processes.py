"""One of two processes that share batch statistics; a script: rank and a folder, into which it writes what it found."""

import sys
from pathlib import Path

import torch


def image(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).contiguous(memory_format=torch.channels_last)


def step(block, x):
    """Output, gradients and running statistics of one step."""
    x = x.clone(memory_format=torch.channels_last).requires_grad_()
    torch.manual_seed(3)  # drop path
    y = block(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    running = [b for name, b in block.named_buffers() if "running" in name]
    grads = [x.grad, *(p.grad for p in block.parameters())]
    for p in block.parameters():
        p.grad = None
    return [y.detach(), *grads, *running]


def main(rank: int, folder: Path) -> None:
    import pyops
    from pyops.nn import MBConv

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.manual_seed(0)
    block = torch.nn.SyncBatchNorm.convert_sync_batchnorm(MBConv(8, 8, 3, 1, 4))
    x = image((5, 8, 6, 6))[:2] if rank == 0 else image((5, 8, 6, 6))[2:]
    reduced = []
    plain = torch.distributed.all_reduce

    def counted(t, *args, **kwargs):
        reduced.append(t.numel())
        return plain(t, *args, **kwargs)

    torch.distributed.all_reduce = counted
    found = step(block, x)
    y = pyops.batch_norm_act(x, None, None, training=True, activation="silu", process_group=torch.distributed.group.WORLD)
    torch.save(([*found, y], reduced), folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
