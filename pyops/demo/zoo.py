"""What the tasks that train networks of the zoo share: the pair of models, and what kinds of weights they have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import pyops.models
from pyops.testing.twins import twin

# Fused: for so many small weights the one-by-one update would take a good part of the time compared. The eps is for weights that have no
# gradient but rounding, such as attention's key biases, which Adam's own 1e-8 would blow up to full steps.
adam = partial(torch.optim.Adam, eps=1e-6, fused=True)
KINDS: tuple[tuple[Any, str], ...] = (
    (nn.modules.conv._ConvNd, "convolutions"),
    ((nn.BatchNorm2d, nn.LayerNorm), "norms"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers"),
    (nn.MultiheadAttention, "attention layers"),
    (nn.Embedding, "embeddings"),
    (nn.Linear, "linear layers"),
)


def pair(network: str, device: str, seed: int, adapt: Callable[[Any], nn.Module] | None = None, **options: Any) -> dict[str, nn.Module]:
    """The eager twin and pyops' network of that name, by the names that the demo shows. `adapt` changes either before it is used."""
    torch.manual_seed(seed)
    models: dict[str, nn.Module] = {
        f"torch.nn, {network}": twin(network, **options),
        f"pyops.models, {network}": pyops.models.create(network, **options),
    }
    # channels_last is the layout in which torch's own convolutions are fastest too
    return {name: (adapt(m) if adapt else m).to(device, memory_format=torch.channels_last) for name, m in models.items()}  # type: ignore[call-overload]


def kind(model: nn.Module, name: str) -> str:
    layer = model.get_submodule(name.rpartition(".")[0])
    return next((text for types, text in KINDS if isinstance(layer, types)), "other weights")
