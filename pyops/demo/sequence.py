"""The demo's task `sequence`: a recurrent layer reads each image row by row, so a sequence of 8 steps of 8 inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import pyops
from pyops.demo.training import Check, Recipe, Result, judge, load_digits, race, read, start
from pyops.testing import relative_error, within_gate

CELLS = {"lstm": (nn.LSTM, pyops.nn.LSTM), "gru": (nn.GRU, pyops.nn.GRU), "rnn": (nn.RNN, pyops.nn.RNN)}
# With 20 epochs these reach 96.7 % to 98.2 % on the test images, with each cell and seeds 0 to 2.
HIDDEN = 64
RECIPE = Recipe(batch=32, learning_rate=1e-2, optimizer=torch.optim.Adam)


class Classifier(nn.Module):
    """A recurrent layer over an image's rows and a linear layer on its last state: [B, 8, 8] -> [B, 10]."""

    def __init__(self, recurrent: nn.RNNBase):
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.hidden_size, 10)

    def forward(self, images: Tensor) -> Tensor:
        output, _ = self.recurrent(images)
        return self.head(output[:, -1])


def run(
    cell: str = "lstm",
    device: str = "cpu",
    epochs: int = 20,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """The whole demo. `progress` is called after each epoch of each of the two models.

    Raises ValueError for an unknown cell, no epochs, or a backend that cannot run it here.
    """
    if cell not in CELLS:
        raise ValueError(f"demo: cell: expected one of {', '.join(CELLS)}, got {cell!r}")
    digits = load_digits(seed, device)
    torch.manual_seed(seed)
    theirs, ours = CELLS[cell]
    reference = Classifier(theirs(8, HIDDEN, batch_first=True)).to(device)
    candidate = Classifier(ours(8, HIDDEN, batch_first=True, backend=backend)).to(device)
    candidate.load_state_dict(reference.state_dict())
    models = {f"torch.nn.{theirs.__name__}": reference, f"pyops.nn.{ours.__name__}": candidate}
    pair = start(RECIPE, digits, epochs, **models)
    layer = candidate.recurrent
    arguments = (digits.test_x, None, *layer.all_weights[0])
    chosen = str(pyops.explain(f"fused_{cell}", *arguments, batch_first=True, backend=backend).chosen)
    lead = (
        f"A recurrent layer ({cell}) of {HIDDEN} units reads handwritten digits row by row. It is trained twice on {device}: "
        f"with torch.nn, and with pyops, which runs on its {chosen!r} backend."
    )
    result = race(pair, digits, epochs, seed, progress, lead=lead, part="layer", runs_on=chosen)
    result.checks = compare(reference.recurrent, layer, digits.test_x)
    result.failures = judge(result)
    read(result, digits.test_x, digits)
    return result


def compare(theirs: nn.RNNBase, ours: nn.RNNBase, images: Tensor) -> list[Check]:
    """Both layers with `theirs`' trained weights against the same layer in float64: outputs, and gradients for a fixed random cotangent.

    pyops' numerics gate: relative L2 error at most 1.25 times torch's for outputs and 3 times for gradients, or one unit in the last place.
    """
    ours = copy.deepcopy(ours)
    ours.load_state_dict(theirs.state_dict())
    cotangent = torch.randn(len(images), 8, HIDDEN, generator=torch.Generator().manual_seed(0)).to(images.device)

    def evaluate(layer: nn.RNNBase) -> list[tuple[str, Tensor]]:
        weight = next(layer.parameters())
        x = images.to(weight.dtype).requires_grad_()
        output, _ = layer(x)
        names, leaves = zip(("input", x), *layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(output, leaves, cotangent.to(weight.dtype))
        return [("outputs", output), *((f"gradient of {name}", grad) for name, grad in zip(names, grads, strict=True))]

    truth, eager, found = evaluate(copy.deepcopy(theirs).double()), evaluate(theirs), evaluate(ours)
    checks = []
    for (name, t), (_, e), (_, f) in zip(truth, eager, found, strict=True):
        wrong = within_gate([(f, t, e)], torch.float32, gradient=name != "outputs")
        checks.append((name, relative_error([(e, t)]), relative_error([(f, t)]), wrong))
    return checks
