"""Two networks of the same parameters, torch's and pyops': trained, then compared on the same weights, in time and in memory."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pyops.demo import measure
from pyops.demo.training import Check, Cost, Data, Recipe, Result, Training, evaluate, judge, race, start
from pyops.testing import relative_error, within_gate

if TYPE_CHECKING:
    from pyops.demo.checkpoint import Checkpoint

DRAWS = 12  # batches in the comparison on the same weights
SCORES, TRAINING_SCORES = "scores in inference", "scores in training"
Kind = Callable[[nn.Module, str], str]  # in a few words, which kind of parameter one of this name is


def run(
    models: dict[str, nn.Module], recipe: Recipe, data: Data, epochs: int, seed: int, progress: Callable[[], None], lead: str,
    chosen: str, kind: Kind, part: str = "network", checkpoint: Checkpoint | None = None,
) -> Result:  # fmt: skip
    """The judged result of torch's and pyops' model, in this order, by name. Both start from the weights of pyops'.

    Raises ValueError for no epochs, a backend that cannot run a model here, or a checkpoint of other sizes.
    """
    reference, candidate = models.values()
    reference.load_state_dict(candidate.state_dict(), strict=True)
    pair = start(recipe, data, epochs, **models)
    result = race(pair, data, epochs, seed, progress, lead=lead, part=part, runs_on=chosen, checkpoint=checkpoint)
    same = with_weights(candidate, reference)
    # without the faster products that round more (Winograd's, TF32's, oneDNN's long sums): the gate does not hold these
    with torch.backends.flags(fp32_precision="ieee"):
        result.checks, result.differences = compare(reference, same, data, recipe, kind)
    result.costs = costs(pair, data)
    result.failures = judge(result)
    return result


def with_weights(model: nn.Module, source: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(source.state_dict())
    return model


def costs(pair: list[Training], data: Data) -> list[Cost]:
    """Of a training step, an inference, and a step's memory."""
    recipe = pair[0].recipe
    x, y = data.train_x[: recipe.batch], data.train_y[: recipe.batch]
    steps = [statistics.median(t.seconds) / -(-len(data.train_x) // recipe.batch) for t in pair]
    memory = []
    for training in pair:
        scratch = Training(training.name, copy.deepcopy(training.model), recipe, 3)
        scratch.step(x, y)  # the optimizer's state is there to stay, and so does not count
        scratch.optimizer.zero_grad()
        memory.append(measure.peak_bytes(lambda scratch=scratch: scratch.step(x, y), x))  # type: ignore[misc]
    models = [training.model.eval() for training in pair]
    with torch.no_grad():
        calls: list[Callable[[], object]] = [lambda model=model: recipe.scores(model, x, y) for model in models]  # type: ignore[misc]
        inference = measure.times(calls, x)
    for model in models:
        model.train()
    size = f"{len(x)} {'images' if x.is_floating_point() else 'sequences'}, median"
    return [
        Cost("training step", size, "ms", steps[0] * 1e3, steps[1] * 1e3),
        Cost("inference", size, "ms", inference[0] * 1e3, inference[1] * 1e3),
        Cost("peak memory", "training step, above the weights", "MiB", memory[0] / 2**20, memory[1] / 2**20),
    ]


def compare(theirs: nn.Module, ours: nn.Module, data: Data, recipe: Recipe, kind: Kind) -> tuple[list[Check], list[tuple[str, float]]]:
    """Both networks on the same weights against the same network in float64, in inference and in training: (checks, differences).

    The gate is the one of pyops' tests: relative L2 error at most 1.25 times torch's for outputs and 3 times for gradients, or one unit in
    the last place. Several batches make one vector, and so do the parameters of one kind: for a single bias the ratio of two rounding
    errors is luck, and a bias before another batch norm has no gradient but rounding.
    """
    truth = copy.deepcopy(theirs).double()
    draws: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    batches = zip(data.train_x.split(recipe.batch)[:DRAWS], data.train_y.split(recipe.batch), strict=False)
    for seed, (x, y) in enumerate(batches):
        results = [observe(model, x, y, recipe, seed, kind) for model in (ours, truth, theirs)]
        for name in results[0]:
            draws.setdefault(name, []).extend(zip(*(found[name] for found in results), strict=True))
    checks: list[Check] = []
    for name, found in draws.items():
        wrong = within_gate(found, torch.float32, gradient=name.startswith("gradients"))
        errors = [relative_error((draw[k], draw[1]) for draw in found) for k in (2, 0)]
        checks.append((name, *errors, wrong))  # type: ignore[arg-type]
    largest = [(name, max((f - e).abs().max().item() for f, _, e in draws[name])) for name in (SCORES, TRAINING_SCORES)]
    return checks, [(f"largest in the {name}, same weights", value) for name, value in largest]


def observe(model: nn.Module, x: Tensor, y: Tensor, recipe: Recipe, seed: int, kind: Kind) -> dict[str, list[Tensor]]:
    """The network's scores in both modes and, from a training pass, its running statistics and gradients for a fixed random cotangent."""
    model = copy.deepcopy(model)  # the training pass moves the running statistics
    images = x.is_floating_point()
    if images:
        x = x.to(next(model.parameters()).dtype).requires_grad_()
    found = {SCORES: [evaluate(model, x, y, recipe.scores)]}
    torch.manual_seed(seed)
    scores = recipe.scores(model.train(), x, y)
    found[TRAINING_SCORES] = [scores]
    running = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2].startswith("running_")]
    if running:
        found["running statistics"] = running
    cotangent = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores)
    parameters = dict(model.named_parameters())
    gradients = list(torch.autograd.grad(scores, (*((x,) if images else ()), *parameters.values()), cotangent))
    if images:
        found["gradients of the images"] = [gradients.pop(0)]
    for name, gradient in zip(parameters, gradients, strict=True):
        found.setdefault(f"gradients of the {kind(model, name)}", []).append(gradient)
    return found
