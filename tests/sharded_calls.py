"""One of two processes that split pyops' ops between them as DTensors; a script: rank and a folder, into which it writes what it found."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pyops

WHOLE = None


class Case(NamedTuple):
    """A call, where its tensors are split (WHOLE: nowhere), and where its results are."""

    function: Callable[..., Any]
    tensors: list[torch.Tensor]
    splits: list[int | None]
    results: list[int | None]
    fixed: tuple[int, ...] = ()  # tensors without gradients
    gathers: tuple[bool, bool] = (False, False)  # whether the call, and its backward, have to gather: no rule allows the split


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def r(*sizes):
        return torch.randn(sizes, generator=generator)

    q, k, v, few = r(4, 6, 5, 8), r(4, 6, 7, 8), r(4, 6, 7, 8), r(4, 2, 7, 8)
    lengths = torch.tensor([5, 0, 7, 3])
    slopes = torch.rand(6, generator=generator)
    found = {}

    def attend(name, tensors, splits, result, names, gathers=(False, False), **options):
        def call(*given):
            return pyops.flash_attention(**dict(zip(names, given, strict=True)), return_lse=True, **options)

        fixed = tuple(i for i, name in enumerate(names) if name in ("key_lengths", "alibi_slopes"))
        found[name] = Case(call, tensors, splits, [result, result], fixed, gathers)

    plain = ["query", "key", "value"]
    biased = [*plain, "attn_bias"]
    attend("attention_batch", [q, k, v], [0, 0, 0], 0, plain, is_causal=True)
    attend("attention_heads", [q, k, v], [1, 1, 1], 1, plain, window=(2, 1))
    attend("attention_fewer_key_heads", [q, few, few], [1, 1, 1], 1, plain, enable_gqa=True)
    attend("attention_one_key_head", [q, few[:, :1], few[:, :1]], [1, WHOLE, WHOLE], 1, plain, enable_gqa=True)
    attend("attention_bias_of_heads", [q, k, v, r(6, 5, 7)], [1, 1, 1, 0], 1, biased)
    attend("attention_bias_of_all", [q, k, v, r(1, 1, 5, 7)], [1, 1, 1, WHOLE], 1, biased)
    attend("attention_bias_of_batch", [q, k, v, r(1, 6, 5, 7)], [0, 0, 0, WHOLE], 0, biased)
    attend("attention_lengths", [q, k, v, lengths], [0, 0, 0, 0], 0, [*plain, "key_lengths"])
    attend("attention_slopes", [q, k, v, slopes], [1, 1, 1, 0], 1, [*plain, "alibi_slopes"])
    attend("attention_rows", [q, k, v], [2, 2, 2], WHOLE, plain, (True, True))
    odd = [q, k[:, :3], v[:, :3]]
    attend("attention_uneven_key_heads", odd, [1, 1, 1], WHOLE, plain, (True, True), enable_gqa=True)
    packed = r(4, 5, 3, 6, 8)
    found["attention_packed_batch"] = Case(pyops.flash_attention, [packed], [0], [0])
    found["attention_packed_heads"] = Case(pyops.flash_attention, [packed], [3], [2])

    qkv, bias, table = r(4, 6, 5, 36), r(36), r(25, 3)
    windows = lambda qkv, bias, table: pyops.window_attention(qkv, 3, 3, 1, table, bias)  # noqa: E731
    found["windows"] = Case(windows, [qkv, bias, table], [0, WHOLE, WHOLE], [0])
    found["windows_uneven"] = Case(windows, [qkv[:3], bias, table], [0, WHOLE, WHOLE], [WHOLE], gathers=(True, True))

    def recurrent(function, gates, batch_first, lengths=None):
        H, I = 5, 4
        states = [r(4, H) for _ in range(2 if gates == 4 else 1)]
        x = r(4, 3, I) if batch_first else r(3, 4, I)
        weights = [r(gates * H, I), r(gates * H, H), r(gates * H), r(gates * H)]

        def call(x, *given):
            *states, w_ih, w_hh, b_ih, b_hh = given[: len(given) - (lengths is not None)]
            rest = given[-1] if lengths is not None else None
            hx = tuple(states) if gates == 4 else states[0]
            output, last = function(x, hx, w_ih, w_hh, b_ih, b_hh, batch_first=batch_first, lengths=rest)
            return output, *(last if gates == 4 else [last])

        at = 0 if batch_first else 1
        extra = [] if lengths is None else [lengths]
        splits = [at, *[0] * len(states), *[WHOLE] * 4, *[0] * len(extra)]
        return Case(call, [x, *states, *weights, *extra], splits, [at, *[0] * len(states)], (len(splits) - 1,) if extra else ())

    found["lstm"] = recurrent(pyops.fused_lstm, 4, True)
    found["lstm_lengths"] = recurrent(pyops.fused_lstm, 4, False, torch.tensor([3, 1, 0, 2]))
    found["gru"] = recurrent(pyops.fused_gru, 3, False)
    cell = lambda x, h, c, *weights: pyops.lstm_cell(x, (h, c), *weights)  # noqa: E731
    found["lstm_cell"] = Case(cell, [r(4, 3), r(4, 5), r(4, 5), r(20, 3), r(20, 5)], [0, 0, 0, WHOLE, WHOLE], [0, 0])
    found["rnn"] = recurrent(pyops.fused_rnn, 1, True)

    image, scale, shift = r(4, 6, 4, 8), r(6), r(6)
    # first without the image's gradient: what PyTorch remembers of that call must not serve the next
    found["layer_norm_vectors"] = Case(pyops.layer_norm_2d, [image, scale, shift], [0, WHOLE, WHOLE], [0], (0,))
    for name, at in (("batch", 0), ("rows", 2)):
        found[f"layer_norm_{name}"] = Case(pyops.layer_norm_2d, [image, scale, shift], [at, WHOLE, WHOLE], [at])
    found["layer_norm_channels"] = Case(pyops.layer_norm_2d, [image, scale, shift], [1, WHOLE, WHOLE], [WHOLE], gathers=(True, True))
    found["local_response_norm"] = Case(lambda x: pyops.local_response_norm(x, 3, activation="relu"), [image], [0], [0])
    found["depthwise_batch"] = Case(depthwise, [r(5, 6, 4, 4), r(6, 1, 3, 3), shift], [0, WHOLE, WHOLE], [0, 0])
    found["depthwise_channels"] = Case(depthwise, [image, r(6, 1, 3, 3), shift], [1, 0, 0], [1, 1])
    squeeze = [image, r(3, 6), r(3), r(6, 3), r(6)]
    found["squeeze_excite"] = Case(pyops.squeeze_excite, squeeze, [0, *[WHOLE] * 4], [0])
    rows, weight, out = r(8, 6), r(4, 6), r(4)
    linear = lambda *t: pyops.linear_act(*t, activation="relu")  # noqa: E731
    found["linear_rows"] = Case(linear, [rows, weight, out], [0, WHOLE, WHOLE], [0])
    found["linear_columns"] = Case(linear, [rows, weight, out], [WHOLE, 0, 0], [1])
    norm = lambda x, *t: pyops.batch_norm_act(x, *t, activation="relu", backend="cpu")  # noqa: E731
    statistics = [r(6), torch.rand(6, generator=generator) + 0.5, scale, shift]
    found["batch_norm"] = Case(norm, [image, *statistics], [0, *[WHOLE] * 4], [0], (1, 2), (False, True))
    of_batch = lambda x, *t: pyops.batch_norm_act(x, None, None, *t, training=True)  # noqa: E731
    found["batch_statistics"] = Case(of_batch, [image, scale, shift], [0, WHOLE, WHOLE], [WHOLE], gathers=(True, True))
    capsules = lambda x: pyops.capsule_routing(x, backend="cpu")  # noqa: E731
    found["capsules"] = Case(capsules, [r(4, 3, 5, 6)], [0], [WHOLE], gathers=(True, True))
    found["pointwise"] = Case(pyops.pointwise_conv, [image, r(4, 6), r(4)], [0, WHOLE, WHOLE], [0])
    return found


def depthwise(x, weight, bias):
    return pyops.depthwise_conv_bn_act(x, weight, bias, padding=1, activation="silu", return_means=True)


def run(case: Case, live: bool, mesh=None):
    """Results, gradients, and the collectives of the call and of its backward."""

    def place(t, split):
        return t if mesh is None else distribute_tensor(t, mesh, [Replicate() if split is WHOLE else Shard(split)])

    tensors = [place(t.clone(), split) for t, split in zip(case.tensors, case.splits, strict=True)]
    wanted = [t.requires_grad_() for i, t in enumerate(tensors) if live and i not in case.fixed]
    gradients: Any = []
    forward, backward = CommDebugMode(), CommDebugMode()
    with forward, torch.set_grad_enabled(live):
        results = case.function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    if live:
        seeds = (torch.Generator().manual_seed(i) for i in range(len(results)))
        cotangents = [torch.randn(y.shape, generator=seed) for y, seed in zip(results, seeds, strict=True)]
        cotangents = [place(*pair) for pair in zip(cotangents, case.results, strict=True)]
        with backward:
            gradients = torch.autograd.grad(results, wanted, cotangents)
    return [y.detach() for y in results], gradients, [forward.get_total_counts(), backward.get_total_counts()]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    found = {}
    for name, case in cases().items():
        for live in (True, False):
            found[name, live] = compare(run(case, live, mesh), run(case, live), mesh)
    found["tensor_parallel"] = tensor_parallel(mesh)
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(ours, expected, mesh):
    """Each result's local part and the part expected of it, each gradient and the one expected, the results' splits, collectives."""
    results, gradients, counts = ours
    parts = [(y.to_local(), distribute_tensor(t, mesh, y.placements).to_local()) for y, t in zip(results, expected[0], strict=True)]
    pairs = [(g.full_tensor(), t) for g, t in zip(gradients, expected[1], strict=True)]
    return parts, pairs, [y.placements[0].dim if y.placements[0].is_shard() else WHOLE for y in results], counts


class SelfAttention(torch.nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (torch.nn.Linear(size, size) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.out(pyops.flash_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def tensor_parallel(mesh):
    """Outputs and weights' gradients with each process computing its heads, those of one process, and the collectives of the call."""
    torch.manual_seed(0)
    attention, x = SelfAttention(16, 4), torch.randn(2, 5, 16)
    y = attention(x)
    expected = [y.detach(), *torch.autograd.grad(y.square().sum(), list(attention.parameters()))]
    columns = ColwiseParallel(use_local_output=False)
    attention = parallelize_module(attention, mesh, {"query": columns, "key": columns, "value": columns, "out": RowwiseParallel()})
    with CommDebugMode() as counter:
        y = attention(x)
    gradients = torch.autograd.grad(y.square().sum(), list(attention.parameters()))
    return [y.detach() + 0, *(g.full_tensor() for g in gradients)], expected, counter.get_total_counts()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
