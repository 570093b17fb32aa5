"""One of two processes that train fused networks together, on DistributedDataParallel and on FSDP2; a script: rank and a folder, into which
it writes what it found. `alone` is the same training in one process, on the whole batch and PyTorch's layers."""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import pyops

STEPS, ROWS = 3, 8  # of the whole batch


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + x)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(Residual(8), pyops.nn.MBConv(8, 8, 3, 1, 4), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([nn.LSTM(6, 8, bidirectional=True, batch_first=True), nn.LSTM(16, 8, 2, batch_first=True)])
        self.head = nn.Linear(8, 5)

    def forward(self, tokens):
        x = self.embed(tokens)
        for rnn in self.blocks:
            x, _ = rnn(x)
        return self.head(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        layers = [nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True, norm_first=first) for first in (False, True)]
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 5), nn.ReLU())

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.blocks:
            x = layer(x)
        return self.head(x)


NETWORKS = {"convolutions": Convolutions, "tagger": Tagger, "encoder": Encoder}


def batch(name):
    """Inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    if name == "convolutions":
        return torch.randn(ROWS, 3, 8, 8, generator=generator), torch.randint(5, (ROWS,), generator=generator)
    return torch.randint(11, (ROWS, 6), generator=generator), torch.randint(5, (ROWS * 6,), generator=generator)


def build(name):
    torch.manual_seed(0)
    return NETWORKS[name]()


def optimizer_of(name, model):
    """Adam would divide the encoder's gradients that are zero but for rounding, those of the keys' biases, by their size."""
    return torch.optim.Adam(model.parameters(), 0.01) if name == "tagger" else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def whole(t):
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def train(name, model, x, target, eval_input):
    """Losses, and after every step the outputs in eval mode; the last step's gradients; the parameters and buffers after it."""
    optimizer, losses, outputs = optimizer_of(name, model), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x).flatten(0, -2), target)
        loss.backward()
        gradients = {key.removeprefix("module."): whole(p.grad) for key, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.detach())
        with torch.no_grad():
            outputs.append(model.eval()(eval_input))
    state = {key.removeprefix("module."): whole(t) for key, t in model.state_dict().items()}
    return {"losses": torch.stack(losses), "outputs": outputs, "gradients": gradients, "state": state}


def alone(name):
    x, target = batch(name)
    with pyops.backend("eager"):
        return train(name, build(name), x, target, x)


def share(t, rank):
    return t.chunk(2)[rank]


def synchronised(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def classes_of(model):
    return [type(part).__name__ for part in model.modules()]


def trained(name, model, rank, eval_input):
    x, target = (share(t, rank) for t in batch(name))
    found = train(name, model, x, target, eval_input)
    torch.distributed.all_reduce(found["losses"], torch.distributed.ReduceOp.SUM)
    found["losses"] /= 2
    return found


def data_parallel(name, rank, convert_first):
    model = build(name)
    parallel = nn.parallel.DistributedDataParallel(model)  # first: it refuses SyncBatchNorm on CPUs, where PyTorch has no kernel of it
    for change in (synchronised, pyops.fuse) if convert_first else (pyops.fuse, synchronised):
        assert change(model) is model
    x, _ = batch(name)
    found = trained(name, parallel, rank, x)
    with torch.no_grad():
        found["unfused"] = pyops.unfuse(model).eval()(x)
    return found | {"classes": classes_of(model)}


def fully_sharded(name, rank, fuse_first):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model = synchronised(build(name))
    before = classes_of(model)
    model = pyops.fuse(model) if fuse_first else model
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    model = model if fuse_first else pyops.fuse(model)
    x, _ = batch(name)
    found = trained(name, model, rank, x)
    full = StateDictOptions(full_state_dict=True)
    model.reshard()
    state = {key: t.clone() for key, t in get_model_state_dict(model, options=full).items()}
    with torch.no_grad():  # no mode, no optimizer's step tells kept weights that they changed
        set_model_state_dict(model, {key: t * 1.5 if t.is_floating_point() else t for key, t in state.items()}, options=full)
        found["scaled"] = model(x)
        model.reshard()  # which a root does not after its forward
        set_model_state_dict(model, dict(state), options=full)  # which it shards in place
        found["again"] = model(x)
        sharded = [isinstance(part, FSDPModule) for part in (model, *model.blocks)]
        pyops.unfuse(model)
        sharded += [isinstance(part, FSDPModule) for part in (model, *model.blocks)]
        found["unfused"] = model(x)
    classes = [name.removeprefix("FSDP") for name in classes_of(model)]
    return found | {"gathered": state, "sharded": sharded, "classes": classes, "before": before}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    found = {}
    for name in NETWORKS:
        for first in (False, True):
            found["ddp", name, first] = data_parallel(name, rank, first)
            found["fsdp", name, first] = fully_sharded(name, rank, first)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
