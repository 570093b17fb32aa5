"""The demo's whole networks: they race as their twins do, stop and go on without a trace, and read files or say what is wrong."""

from __future__ import annotations

import gzip
import itertools
import struct
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import pyops
from pyops import demo
from pyops.cli import app
from pyops.demo import mnist, networks, presentation, text, training, zoo

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unjudged(recipe: training.Recipe) -> training.Recipe:
    """What is required is of the full training, which takes a while."""
    return replace(recipe, goal=replace(recipe.goal, required=float("inf") if recipe.goal.lower else 0.0))


@pytest.fixture
def few(monkeypatch):
    """An eighth of scikit-learn's digits, a few of the pieces and numbers, and no accuracy required of them."""
    whole = mnist.load_digits
    monkeypatch.setattr(mnist, "load_digits", lambda *args: training.Data(*(part[: len(part) // 8] for part in whole(*args))))
    monkeypatch.setattr(networks, "TASKS", {name: t._replace(recipe=unjudged(t.recipe)) for name, t in networks.TASKS.items()})

    def small(build):
        def built(device, seed):
            task = build(device, seed)
            networks = {name: (replace(unjudged(recipe), batch=20), sizes) for name, (recipe, sizes) in task.networks.items()}
            return task._replace(data=training.Data(*(part[:40] for part in task.data)), networks=networks)

        return built

    monkeypatch.setattr(text, "TASKS", {name: small(build) for name, build in text.TASKS.items()})


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200"})


def weights(result: training.Result) -> list[torch.Tensor]:
    return [t for part in (result.torch, result.pyops) for t in part.model.state_dict().values()]


# ------------------------------------------------------------------------------------------------------------------------ the races


@pytest.mark.parametrize("name", list(networks.TASKS))
def test_networks(few, name):
    (result,) = networks.run(name, epochs=1)
    assert result.failures == []
    assert result.part == networks.TASKS[name].network and result.part in result.lead
    assert len(result.torch.losses) == len(result.pyops.seconds) == 1
    assert {cost.what for cost in result.costs} == {"training step", "inference", "peak memory"}


@pytest.mark.parametrize("name", list(text.TASKS))
def test_text(few, name):
    results = text.run(name, epochs=1)
    assert len(results) == demo.RACES.get(name, 1)
    for result in results:
        assert result.failures == []
        assert result.examples is not None and len(result.examples.rows) == text.EXAMPLES


def test_networks_on_the_command_line(few, tmp_path):
    page = tmp_path / "index.html"
    result = invoke("--task", "vae", "--out", page, "--epochs", 2)
    assert result.exit_code == 0, result.output
    for expected in ("torch.nn, variational_autoencoder", "negative ELBO", "gradients of the linear layers", "The two agree"):
        assert expected in result.output
    html = page.read_text()
    HTMLParser().feed(html)
    assert "A variational autoencoder reads" in html and html.count("<svg") == 3


def test_networks_that_do_not_learn_fail(tmp_path):
    result = invoke("--task", "lenet", "--out", tmp_path / "index.html", "--epochs", 1)
    assert result.exit_code == 1 and "is below 95%" in result.output


def test_a_broken_network_fails(few, monkeypatch):
    right = pyops.models.LeNet.forward
    monkeypatch.setattr(pyops.models.LeNet, "forward", lambda self, input: right(self, input) * (1 + 1e-4))
    (result,) = networks.run("lenet", epochs=1)
    assert any(failure.startswith("scores in training of pyops' lenet") for failure in result.failures)


def test_a_goal_may_be_low():
    goal = training.Goal("bits", lambda *_: 0.0, 2.0, "{:.1f}".format, lower=True)
    assert goal.missed(2.0) is None
    assert goal.missed(2.5) == "bits 2.5 is above 2.0"
    assert goal.missed(float("nan")) is not None


# ----------------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_training_goes_on_without_a_trace(few, tmp_path, stop):
    """Stopped before the first epoch is over, in the second and behind it: the same bits in the end."""
    file = tmp_path / "deep" / "state.pt"
    (whole,) = networks.run("lenet", epochs=3)
    count = itertools.count(1)

    def interrupt():
        if next(count) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        networks.run("lenet", epochs=3, progress=interrupt, checkpoint=file)
    calls = []
    (found,) = networks.run("lenet", epochs=3, progress=lambda: calls.append(1), checkpoint=file)
    assert len(calls) == 6
    assert found.torch.losses == whole.torch.losses and found.pyops.losses == whole.pyops.losses
    assert found.yardstick == whole.yardstick and found.pyops.score == whole.pyops.score
    assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(whole), strict=True))
    assert [path.name for path in file.parent.iterdir()] == ["state.pt"]
    (again,) = networks.run("lenet", epochs=3, checkpoint=file)  # there is nothing left to train
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    assert again.pyops.seconds == found.pyops.seconds


def test_each_network_of_a_task_goes_on(few, tmp_path):
    """Stopped in the second network's training; the first's is not repeated."""
    file = tmp_path / "state.pt"
    whole = text.run("translation", epochs=2)
    count = itertools.count(1)

    def interrupt():
        if next(count) == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text.run("translation", epochs=2, progress=interrupt, checkpoint=file)
    for found, wanted in zip(text.run("translation", epochs=2, checkpoint=file), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(weights(found), weights(wanted), strict=True))


def test_ctrl_c(few, tmp_path, monkeypatch):
    def interrupted(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "epoch", interrupted)
    file = tmp_path / "state.pt"
    result = invoke("--task", "lenet", "--checkpoint", file, "--out", tmp_path / "index.html")
    assert result.exit_code == 130 and f"stopped; {file} has all finished epochs" in result.output
    result = invoke("--task", "lenet", "--out", tmp_path / "index.html")
    assert result.exit_code == 130 and "nothing is kept without --checkpoint" in result.output
    assert not (tmp_path / "index.html").exists()


def test_a_checkpoint_of_something_else_is_refused(few, tmp_path, monkeypatch):
    file = tmp_path / "state.pt"
    networks.run("lenet", epochs=1, checkpoint=file)
    before = file.read_bytes()
    for options, message in (
        (dict(epochs=2), "epochs: was saved with 1, this run has 2"),
        (dict(epochs=1, seed=1), "seed: was saved with 0, this run has 1"),
        (dict(epochs=1, backend="eager"), "backend: was saved with None, this run has 'eager'"),
    ):
        with pytest.raises(ValueError, match=message):
            networks.run("lenet", **options, checkpoint=file)
    with pytest.raises(ValueError, match="task: was saved with 'lenet', this run has 'characters'"):
        text.run("characters", epochs=1, checkpoint=file)
    wide = networks.TASKS["lenet"]._replace(options=dict(num_classes=11))
    monkeypatch.setitem(networks.TASKS, "lenet", wide)
    with pytest.raises(ValueError, match=r"classifier.4.bias: was saved with the sizes \[10\], this network's are \[11\]"):
        networks.run("lenet", epochs=1, checkpoint=file)
    assert file.read_bytes() == before
    for content in (b"", b"PK", before[:1000]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no checkpoint of this demo"):
            networks.run("lenet", epochs=1, checkpoint=file)
    torch.save({"model": {}}, file)
    result = invoke("--task", "lenet", "--checkpoint", file)
    assert result.exit_code == 2 and "is no checkpoint of this demo" in result.output


def test_a_checkpoint_that_cannot_be_written(few, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        networks.run("lenet", epochs=1, checkpoint=tmp_path / "file" / "state.pt")


# -------------------------------------------------------------------------------------------------------------------------- MNIST


def idx(tensor: torch.Tensor) -> bytes:
    return struct.pack(f">{1 + tensor.dim()}I", 0x0800 + tensor.dim(), *tensor.shape) + bytes(tensor.flatten().tolist())


@pytest.fixture
def folder(tmp_path):
    """MNIST's four files, the test part's gzipped."""
    torch.manual_seed(0)
    for part, count in zip(mnist.PARTS, (40, 20), strict=True):
        files = {"images-idx3": torch.randint(256, (count, 28, 28)), "labels-idx1": torch.arange(count) % 10}
        for name, tensor in files.items():
            content, path = idx(tensor), tmp_path / f"{part}-{name}-ubyte"
            if part == "t10k":
                content, path = gzip.compress(content), path.with_name(f"{path.name}.gz")
            path.write_bytes(content)
    return tmp_path


def test_mnist(folder):
    torch.manual_seed(0)
    pixels = torch.randint(256, (40, 28, 28))
    data, shown = mnist.load(32, 0, "cpu", folder)
    assert data.train_x.shape == (40, 1, 32, 32) and data.test_x.shape == (20, 1, 32, 32) and shown.shape == (20, 28, 28)
    torch.testing.assert_close(data.train_x[:, 0, 2:-2, 2:-2], pixels / 255)
    assert data.train_x.count_nonzero() == pixels.count_nonzero()
    assert data.train_y.tolist() == [k % 10 for k in range(40)]


def test_mnist_on_the_command_line(few, folder, tmp_path):
    result = invoke("--task", "hybrid", "--data", folder, "--out", tmp_path / "index.html")
    assert result.exit_code == 0, result.output
    assert "of 20 are misread" in (tmp_path / "index.html").read_text()


def test_mnist_with_faults(folder):
    images, labels = folder / "train-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte.gz"
    right = images.read_bytes()
    for content, message in (
        (idx(torch.arange(40)), r"expected the magic number 00000803 \(3 dimensions of bytes\), got 00000801"),
        (right[:10], "ends within its header"),
        (right[:-1], r"expected 31360 bytes for \[40, 28, 28\], got 31359"),
        (idx(torch.zeros(39, 28, 28, dtype=torch.int64)), "39 images, but 40 labels"),
        (idx(torch.zeros(40, 8, 8, dtype=torch.int64)), r"expected images \[N, 28, 28\], got \[40, 8, 8\]"),
    ):
        images.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            mnist.load(32, 0, "cpu", folder)
    images.write_bytes(right)
    for content, message in (
        (gzip.compress(idx(torch.arange(20))), "expected labels 0 to 9, got 19"),
        (labels.read_bytes()[:-4], "is not a whole gzip file"),
        (b"plain", "is not a whole gzip file"),
    ):
        labels.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            mnist.load(32, 0, "cpu", folder)
    labels.unlink()
    with pytest.raises(ValueError, match="there is no t10k-labels-idx1-ubyte or "):
        mnist.load(32, 0, "cpu", folder)


def test_digits_are_enlarged():
    data, shown = mnist.load(28, 0, "cpu")
    small = training.load_digits(0, "cpu")
    assert data.train_x.shape == (1347, 1, 28, 28) and torch.equal(shown, small.test_x) and torch.equal(data.test_y, small.test_y)
    assert (data.test_x[:, 0].mean((1, 2)) - small.test_x.mean((1, 2))).abs().max() < 0.02


# --------------------------------------------------------------------------------------------------------------------------- text


def test_number_words():
    assert text.words(0) == ["zero"] and text.words(321) == ["three", "hundred", "twenty", "one"]
    assert text.words(900) == ["nine", "hundred"] and text.words(17) == ["seventeen"] and text.words(250) == ["two", "hundred", "fifty"]
    assert len({tuple(text.words(n)) for n in range(text.NUMBERS)}) == text.NUMBERS
    data = text.numbers(0, "cpu")
    assert len(data.test_x) == text.TESTED_NUMBERS and len(data.train_x) + len(data.test_x) == text.NUMBERS
    for source, target in zip(data.test_x.tolist(), data.test_y.tolist(), strict=True):
        words = [text.WORDS[token] for token in source if token != text.PAD]
        assert words == text.words(int(text.spelled(target)))


def test_exact_matches():
    """A network that says the right digits; then one more; then nothing."""
    data = text.numbers(0, "cpu")

    class Told(torch.nn.Module):
        answers = data.test_y

        def forward(self, source, target_in, source_lengths):
            return torch.nn.functional.one_hot(self.answers[:, 1 : 1 + target_in.shape[1]], 13).float()

    model = Told()
    assert text.exact(model, data.test_x, data.test_y) == 1.0
    model.answers = data.test_y.clone()
    model.answers[::2, 1] = text.EOS
    assert text.exact(model, data.test_x, data.test_y) == 0.5
    model.answers = data.test_y.masked_fill(data.test_y == text.EOS, text.DIGIT)
    assert text.exact(model, data.test_x, data.test_y) == 0.0


def test_pieces_and_pairs():
    data, alphabet = text.pieces("ab" * 1000, 0, "cpu")
    assert alphabet == ["a", "b"] and data.train_x.shape[1] == text.LENGTH
    assert len(data.train_x) + len(data.test_x) == 1999 // text.LENGTH
    assert torch.equal(data.train_x[:, 1:], data.train_y[:, :-1])
    assert text.bigram_bits(data, 2) < 0.01  # each tells the next
    torch.manual_seed(0)
    coins = "".join("ab"[k] for k in torch.randint(2, (64_000,)).tolist())
    assert text.bigram_bits(text.pieces(coins, 0, "cpu")[0], 2) == pytest.approx(1.0, abs=0.01)


def test_the_text_without_a_readme(monkeypatch):
    assert text.readme().startswith("# pyops")

    def absent(name):
        raise text.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(text.metadata, "metadata", absent)
    assert "Source:" in text.readme() and len(text.readme()) > 10_000


# ------------------------------------------------------------------------------------------------------------------- what is wrong


def test_mistakes_are_told(tmp_path):
    for arguments, message in (
        (("--task", "lenet", "--cell", "gru"), "--cell: belongs to --task sequence"),
        (("--task", "vit", "--data", tmp_path), "--data: belongs to --task lenet"),
        (("--task", "characters", "--data", tmp_path), "--data: belongs to --task lenet"),
        (("--task", "images", "--checkpoint", tmp_path / "c"), "--checkpoint: belongs to --task lenet"),
        (("--task", "lenet", "--data", tmp_path), "there is no train-images-idx3-ubyte"),
        (("--task", "lenet", "--checkpoint", tmp_path), "demo: checkpoint:"),
    ):
        result = invoke("--out", tmp_path / "index.html", *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    for task in (networks, text):
        with pytest.raises(ValueError, match="name: expected one of"):
            task.run("video")
        with pytest.raises(ValueError, match="epochs: expected 1 or more"):
            task.run(next(iter(task.TASKS)), epochs=0)


def test_images_of_any_size():
    for side in (8, 28):
        found = presentation.digits(torch.ones(2, side, side), torch.tensor([1, 2]), torch.tensor([1, 3]), count=2)
        assert found.count("<rect") == 2 * side * side and "3 (2)" in found
        assert f'width="{32 / side:.4g}"' in found


def test_kinds_of_weights():
    model = torch.nn.Sequential(torch.nn.ConvTranspose2d(1, 1, 1), torch.nn.BatchNorm2d(1), torch.nn.GRU(1, 1), torch.nn.Bilinear(1, 1, 1))
    assert [zoo.kind(model, f"{k}.weight") for k in range(4)] == ["convolutions", "norms", "recurrent layers", "other weights"]
