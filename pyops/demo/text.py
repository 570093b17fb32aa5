"""The demo's tasks on text: `characters`, a language model of the project's README, and `translation`, number words to digits.

Number words are translated twice: by a transformer and by recurrent networks with additive attention.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyops
from pyops.demo import contest, zoo
from pyops.demo.checkpoint import Checkpoint, digest
from pyops.demo.training import Data, Goal, Recipe, Result, evaluate
from pyops.report.tables import Cell, Table

EPOCHS = {"characters": 32, "translation": 20}
RACES = {"translation": 2}
EXAMPLES = 8  # shown

# ---------------------------------------------------------------------------------------------------------------- the task characters

LENGTH = 64  # of the pieces that the text is cut into
TESTED = 8  # one piece in so many
BETTER = 0.85  # the model has to need at most this share of the bits that counted pairs need


def readme() -> str:
    """The project's README, which an installed package has in its metadata; else what pyops' public names say of themselves."""
    try:
        found: Any = metadata.metadata("pyops-kernels")
        text = found.get_payload()
    except metadata.PackageNotFoundError:
        text = None
    if isinstance(text, str) and len(text) > LENGTH * TESTED:
        return text
    return "\n\n".join(filter(None, (inspect.getdoc(getattr(pyops, name)) for name in sorted(pyops.__all__))))


def pieces(text: str, seed: int, device: str) -> tuple[Data, list[str]]:
    """Characters' numbers [N, LENGTH] and those one further on, in two parts, and the characters by number."""
    alphabet = sorted(set(text))
    numbers = {character: number for number, character in enumerate(alphabet)}
    found = torch.tensor([numbers[character] for character in text])
    N = (len(found) - 1) // LENGTH
    x, y = found[: N * LENGTH].view(N, LENGTH), found[1 : N * LENGTH + 1].view(N, LENGTH)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    test, train = order[: N // TESTED], order[N // TESTED :]
    return Data(*(part.to(device) for part in (x[train], y[train], x[test], y[test]))), alphabet


def bigram_bits(data: Data, characters: int) -> float:
    """Bits per character of the test part when each is foretold by counts, in the training part, of what followed the one before.

    A pair never seen falls back on how frequent its second character is: interpolated counts with the weight that suits the test part
    best, so that the model has the strongest of them to beat.
    """
    pairs = torch.zeros(characters, characters, dtype=torch.float64)
    train = (data.train_x.flatten().cpu(), data.train_y.flatten().cpu())
    pairs.index_put_(train, torch.ones(1, dtype=torch.float64), accumulate=True)
    single = pairs.sum(0) + 1
    single = single / single.sum()
    x, y = data.test_x.cpu(), data.test_y.cpu()
    weights = [2.0**k for k in range(-2, 8)]
    return min(-((pairs + w * single) / (pairs.sum(1, keepdim=True) + w))[x, y].log2().mean().item() for w in weights)


def characters_scores(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return model(x)[0]


def characters_loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
    """pyops' model has a loss that makes no logits; torch.nn's has not."""
    return model.loss(x, y) if hasattr(model, "loss") else F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())


def bits(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Per character."""
    return F.cross_entropy(evaluate(model, x, y, characters_scores).flatten(0, 1), y.flatten()).item() / math.log(2)


def continuations(model: Any, data: Data, alphabet: list[str]) -> Table:
    """What pyops' model makes of the first halves of test pieces."""
    table = Table("What the model goes on with", ["test text", "its own end", "the model's"], labels=3)
    half = LENGTH // 2
    x = data.test_x[:EXAMPLES]
    for row, found in zip(x.tolist(), model.generate(x[:, :half], half, temperature=0.5, seed=0).tolist(), strict=True):
        parts = (row[:half], row[half:], found[half:])
        table.rows.append([repr("".join(alphabet[number] for number in part)) for part in parts])
    return table


class Task(NamedTuple):
    """What a task made of a seed."""

    data: Data
    about: str  # what it is in
    networks: dict[str, tuple[Recipe, dict[str, Any]]]  # of the zoo, and their options
    examples: Callable[[Any], Table]  # of what a model makes of the test part


def characters(device: str, seed: int) -> Task:
    data, alphabet = pieces(readme(), seed, device)
    pairs = bigram_bits(data, len(alphabet))
    reached = "both foretell text in fewer bits than counted pairs"
    goal = Goal("bits per character", bits, BETTER * pairs, "{:.3f}".format, lower=True, reached=reached)
    recipe = Recipe(8, 1e-2, zoo.adam, goal, loss=characters_loss, scores=characters_scores)
    about = f"of the characters of the project's README, where counted pairs of characters need {pairs:.3f} bits for each"
    sizes = dict(vocab_size=len(alphabet), hidden_size=128, num_layers=1, dropout=0.0, tied=False)
    return Task(data, about, {"language_model": (recipe, sizes)}, lambda model: continuations(model, data, alphabet))


# --------------------------------------------------------------------------------------------------------------- the task translation

# fmt: off
ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
        "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
# fmt: on
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = ["", *ONES, *TENS, "hundred"]  # by token; token 0 is padding
PAD, BOS, EOS, DIGIT = 0, 1, 2, 3  # of the digits' tokens; DIGIT is 0's
NUMBERS, TESTED_NUMBERS = 1000, 300


def words(number: int) -> list[str]:
    """Of 0 to 999: 321 is three hundred twenty one."""
    if number < len(ONES):
        return [ONES[number]]
    if number < 100:
        return [TENS[number // 10 - 2], *(words(number % 10) if number % 10 else [])]
    return [ONES[number // 100], "hundred", *(words(number % 100) if number % 100 else [])]


def numbers(seed: int, device: str) -> Data:
    """Words' tokens [N, 4], padded, and digits' tokens [N, 5] between BOS and EOS, padded, in two parts."""
    order = torch.randperm(NUMBERS, generator=torch.Generator().manual_seed(seed)).tolist()
    sources = [[WORDS.index(word) for word in words(number)] for number in order]
    targets = [[BOS, *(DIGIT + int(digit) for digit in str(number)), EOS] for number in order]
    x, y = (nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device) for rows in (sources, targets))
    return Data(x[TESTED_NUMBERS:], y[TESTED_NUMBERS:], x[:TESTED_NUMBERS], y[:TESTED_NUMBERS])


def translation_scores(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x, y[:, :-1], (x != PAD).sum(1))


def translation_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(translation_scores(model, x, y).flatten(0, 1), y[:, 1:].flatten(), ignore_index=PAD)


@torch.no_grad()
def generate(model: Any, x: Tensor, length: int) -> Tensor:
    """Each step's likeliest token, [N, length], EOS behind the first EOS: by the network's own search, or for torch's by the whole network
    anew for each token."""
    lengths = (x != PAD).sum(1)
    search = getattr(model, "greedy", None) or getattr(model, "decode", None)
    if search is not None:
        found = search(x, lengths, max_length=length, bos=BOS, eos=EOS)
        return F.pad(found, (0, length - found.shape[1]), value=EOS)
    tokens = x.new_full((len(x), 1), BOS)
    for _ in range(length):
        following = model(x, tokens, lengths)[:, -1:].argmax(2)
        tokens = torch.cat([tokens, following.masked_fill((tokens == EOS).any(1, keepdim=True), EOS)], 1)
    return tokens[:, 1:]


def exact(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of numbers whose every digit is right, and none too many."""
    training = model.training
    found = generate(model.eval(), x, y.shape[1] - 1)
    model.train(training)
    wanted = y[:, 1:].masked_fill(y[:, 1:] == PAD, EOS)
    return (found == wanted).all(1).float().mean().item()


def translations(model: Any, data: Data) -> Table:
    """What pyops' model makes of test numbers, the wrong ones first."""
    table = Table("What the model translates", ["words", "wanted", "generated"], labels=3)
    found = generate(model.eval(), data.test_x, data.test_y.shape[1] - 1)
    rows = []
    for source, target, answer in zip(data.test_x.tolist(), data.test_y.tolist(), found.tolist(), strict=True):
        wanted, got = (spelled(tokens) for tokens in (target, answer))
        rows.append((wanted == got, " ".join(WORDS[token] for token in source if token), wanted, got))
    for right, source, wanted, got in sorted(rows, key=lambda row: row[0])[:EXAMPLES]:
        table.rows.append([source, wanted, Cell(got, "good" if right else "bad")])
    return table


def spelled(tokens: list[int]) -> str:
    """The digits before EOS; another token shows as a question mark."""
    end = tokens.index(EOS) if EOS in tokens else len(tokens)
    return "".join(str(token - DIGIT) if token >= DIGIT else "?" for token in tokens[tokens[0] == BOS : end])


def translation(device: str, seed: int) -> Task:
    data = numbers(seed, device)
    goal = Goal("exact matches of generated numbers", exact, 0.95, reached="both translate")
    options: dict[str, Any] = dict(goal=goal, loss=translation_loss, scores=translation_scores)
    vocabularies = dict(source_vocabulary=len(WORDS), target_vocabulary=DIGIT + 10)
    layers = dict(num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=128, dropout=0.0, max_length=16)
    networks = {
        "transformer": (Recipe(64, 3e-3, zoo.adam, **options), dict(d_model=64, nhead=4, **layers, **vocabularies)),
        "seq2seq": (Recipe(32, 1e-2, zoo.adam, **options), dict(embedding_size=32, hidden_size=64, **vocabularies)),
    }
    about = f"of number words to digits, learnt from {len(data.train_x)} of the first {NUMBERS} numbers"
    return Task(data, about, networks, lambda model: translations(model, data))


TASKS = {"characters": characters, "translation": translation}


def run(
    name: str,
    device: str = "cpu",
    epochs: int | None = None,
    backend: str | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
    *,
    checkpoint: Path | None = None,
) -> list[Result]:
    """The whole demo of one of TASKS, a result of each network. `progress` is called after each epoch of each model.

    Args:
        epochs: None: the task's.
        checkpoint: the file where the trainings' state is kept, and gone on from if it is there.

    Raises ValueError for an unknown name, no epochs, a backend that cannot run it here, or a `checkpoint` that is not what it should be.
    """
    if name not in TASKS:
        raise ValueError(f"demo: name: expected one of {', '.join(TASKS)}, got {name!r}")
    epochs = EPOCHS[name] if epochs is None else epochs
    data, about, networks, examples = TASKS[name](device, seed)
    facts: dict[str, Any] = dict(task=name, epochs=epochs, seed=seed, device=device, backend=backend, data=digest(data))
    store = None if checkpoint is None else Checkpoint(checkpoint, **facts)
    results = []
    with pyops.backend(backend or "auto"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")  # which torch.nn's encoder takes padded rows for
        for network, (recipe, options) in networks.items():
            lead = f"A small {network}, {about}. It is trained twice on {device}: as plain torch.nn, and as pyops.models has it."
            models = zoo.pair(network, device, seed, **options)
            result = contest.run(models, recipe, data, epochs, seed, progress, lead, backend or "auto", zoo.kind, network, store)
            result.examples = examples(result.pyops.model)
            results.append(result)
    return results
