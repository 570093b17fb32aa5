"""The demo: it agrees with torch.nn, says so in the terminal and on its page, and notices a kernel that is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

import pyops
from pyops import demo
from pyops.cli import app
from pyops.demo import images, measure, training, vit
from pyops.ops import _rnn

pytest.importorskip("sklearn")


@pytest.fixture(autouse=True)
def one_thread():
    """Layers this small gain nothing from threads, and lose much on a busy machine; `pyops demo` itself changes the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def invoke(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "200"})


def test_demo(tmp_path):
    page = tmp_path / "deep" / "index.html"
    result = invoke("--out", page, "--epochs", 12)
    assert result.exit_code == 0, result.output
    for text in ("torch.nn.LSTM", "pyops.nn.LSTM", "test accuracy", "speed-up", "gradient of weight_hh_l0", "The two agree", str(page)):
        assert text in result.output
    assert "failed" not in result.output and "too large" not in result.output
    html = page.read_text()
    HTMLParser().feed(html)
    assert "prefers-color-scheme:dark" in html and html.count("<svg") == 3
    assert not re.search(r"https?://|url\(|@import|src=|href=", html)


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_cells(cell):
    result = demo.run(cell, epochs=12)
    assert result.failures == []
    assert min(result.torch.score, result.pyops.score) > 0.95
    assert len(result.torch.losses) == len(result.pyops.seconds) == 12
    assert result.torch.losses[-1] < 0.1 * result.torch.losses[0]


def test_same_weights_and_batches():
    """On the very same op there is no difference at all, and a seed gives the same training again."""
    first, again = (demo.run("gru", epochs=2, backend="vendor") for _ in range(2))
    assert first.drift == first.output_difference == first.parameter_difference == 0
    assert first.torch.losses == first.pyops.losses == again.torch.losses
    assert demo.run("gru", epochs=1, backend="vendor", seed=1).torch.losses[0] != first.torch.losses[0]
    assert first.runs_on == "vendor" and first.yardstick > 0


@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_broken_kernel_fails(tmp_path, monkeypatch, size):
    right = _rnn.run

    def wrong(*args, **kwargs):
        output, *states = right(*args, **kwargs)
        return output * (1 + size), *states

    monkeypatch.setattr(_rnn, "run", wrong)
    result = invoke("--out", tmp_path / "index.html", "--epochs", 2)
    assert result.exit_code == 1, result.output
    assert "failed: outputs of pyops' layer: relative error" in result.output
    assert "The two agree" not in result.output
    assert "outputs of pyops&#x27; layer" in (tmp_path / "index.html").read_text()


def test_a_broken_gradient_fails(monkeypatch):
    right = _rnn.run

    def wrong(*args, **kwargs):
        output, *states = right(*args, **kwargs)
        return output.detach() + (output - output.detach()) * 1.001, *states

    monkeypatch.setattr(_rnn, "run", wrong)
    result = demo.run("rnn", epochs=1)
    assert any(failure.startswith("gradient of weight_hh_l0") for failure in result.failures)
    assert not any(failure.startswith("outputs") for failure in result.failures)


def test_too_little_training_fails(tmp_path):
    result = invoke("--out", tmp_path / "index.html", "--epochs", 1)
    assert result.exit_code == 1
    assert "is below 95%" in result.output


def test_drift_is_judged():
    result = demo.run("gru", epochs=1, backend="vendor")
    result.drift = 11 * result.yardstick
    assert "rounding alone" in training.judge(result)[-1]
    result.drift = float("nan")
    assert "rounding alone" in training.judge(result)[-1]


def test_mistakes_are_told(tmp_path, monkeypatch):
    for arguments, message in (
        (("--cell", "rru"), "--cell: expected one of lstm, gru, rnn, got 'rru'"),
        (("--device", "tpu"), "--device: expected one of cpu, cuda"),
        (("--backend", "cuda"), "backend 'cuda' cannot run this call"),
        (("--backend", "gpu"), "expected one of auto, cpu, cuda"),
        (("--task", "video"), "--task: expected one of sequence, images, vit, lenet"),
        (("--task", "images", "--cell", "lstm"), "--cell: belongs to --task sequence, got --task images"),
        (("--task", "images", "--backend", "cuda"), "backend 'cuda' cannot run this call"),
        (("--task", "vit", "--backend", "cuda"), "backend 'cuda' cannot run this call"),
    ):
        result = invoke("--out", tmp_path / "index.html", *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    if not torch.cuda.is_available():
        assert "PyTorch sees no CUDA GPU" in invoke("--device", "cuda").output
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    result = invoke("--out", tmp_path / "index.html")
    assert result.exit_code == 2 and "pip install scikit-learn" in result.output
    assert not list(tmp_path.iterdir())


def test_run_says_what_is_wrong():
    with pytest.raises(ValueError, match="cell: expected one of"):
        demo.run("transformer")
    with pytest.raises(ValueError, match="epochs: expected 1 or more"):
        demo.run("rnn", epochs=0)
    for task in (images, vit):
        with pytest.raises(ValueError, match="epochs: expected 1 or more"):
            task.run(epochs=0)


# ---------------------------------------------------------------------------------------------------------------- the task images


def test_images(tmp_path):
    page = tmp_path / "index.html"
    result = invoke("--task", "images", "--out", page, "--epochs", 3)
    assert result.exit_code == 0, result.output
    for text in ("training step (64 images", "inference (64 images", "peak memory", "same weights", "The two agree"):
        assert text in result.output
    for text in ("gradients of the depthwise filters", "gradients of the squeeze-excitations", "running statistics"):
        assert text in result.output
    html = page.read_text()
    HTMLParser().feed(html)
    assert html.count("<svg") == 4 and "EfficientNet blocks" in html


@pytest.fixture
def few_images(monkeypatch):
    """An eighth of the images: two batches and a part of one."""
    whole = images.load_digits

    def few(seed, device):
        return training.Data(*(part[: len(part) // 8] for part in whole(seed, device)))

    monkeypatch.setattr(images, "load_digits", few)
    monkeypatch.setattr(vit, "load_digits", few)


def test_images_twin_has_the_same_names_and_draws():
    torch.manual_seed(0)
    ours, theirs = images.network("eager"), images.twin()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = images.enlarge(torch.rand(32, 8, 8))
    assert x.shape == (32, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    scores = []
    for model in (ours, theirs, theirs):
        torch.manual_seed(len(scores) // 2)
        scores.append(model(x).detach())
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[1] - scores[2]).abs().max() > 1e-3  # another seed drops other samples


def test_images_that_do_not_learn_fail(few_images, tmp_path):
    result = invoke("--task", "images", "--out", tmp_path / "index.html", "--epochs", 1, "--backend", "eager")
    assert result.exit_code == 1
    assert "is below 95%" in result.output and "backend eager" in result.output and "too large" not in result.output


@pytest.mark.parametrize("training_only", [False, True])
def test_images_with_a_broken_block_fail(few_images, monkeypatch, training_only):
    right = pyops.nn.MBConv.forward

    def wrong(self, input):
        output = right(self, input)
        return output if training_only and not torch.is_grad_enabled() else output * (1 + 1e-4)

    monkeypatch.setattr(pyops.nn.MBConv, "forward", wrong)
    failures = images.run(epochs=1).failures
    assert any(failure.startswith("scores in training of pyops' network") for failure in failures)
    assert any(failure.startswith("scores in inference") for failure in failures) is not training_only


# ------------------------------------------------------------------------------------------------------------------- the task vit


def test_vit(few_images, monkeypatch, tmp_path):
    goal = replace(vit.RECIPE.goal, required=0.0)  # what is required is of the full training on all images, which takes a while
    monkeypatch.setattr(vit, "RECIPE", replace(vit.RECIPE, goal=goal))
    page = tmp_path / "index.html"
    result = invoke("--task", "vit", "--out", page, "--epochs", 2)
    assert result.exit_code == 0, result.output
    for text in ("torch.nn, ViT", "pyops.nn, ViT", "torch.nn, Swin", "pyops.nn, Swin", "gradients of the position biases", "The two agree"):
        assert text in result.output
    assert result.output.count("peak memory (") == result.output.count("gradients of the attention layers") == 2
    assert "running statistics" not in result.output
    html = page.read_text()
    HTMLParser().feed(html)
    assert html.count("<svg") == 8 and "A small ViT reads" in html and "A small Swin reads" in html


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_vit_twins_have_the_same_names(name):
    torch.manual_seed(0)
    ours, theirs = getattr(vit, name)("eager"), getattr(vit, f"{name}_twin")()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.rand(16, 8, 8)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert {vit.kind(ours, parameter) for parameter in ours.state_dict()} >= {"attention layers", "layer norms", "MLPs"}


@pytest.mark.parametrize("part, name", [(pyops.nn.Attention, "ViT"), (pyops.nn.WindowAttention, "Swin")], ids=["vit", "swin"])
def test_vit_with_broken_attention_fails(few_images, monkeypatch, part, name):
    right = part.forward
    monkeypatch.setattr(part, "forward", lambda self, input: right(self, input) * (1 + 1e-3))
    for result in vit.run(epochs=1):
        failures = [failure for failure in result.failures if f"of pyops' {result.part}" in failure]
        assert bool(failures) is (result.part == name)
        assert any("is below 95%" in failure for failure in result.failures)


def test_peak_memory():
    def call():
        first = torch.ones(1000, 250)  # 1 MB
        second = first * 2
        del first
        return second + 1  # again two at once

    assert measure.peak_bytes(call, torch.ones(1)) == pytest.approx(2_000_000, rel=0.01)
    kept = torch.ones(1000, 250, requires_grad=True)  # older memory does not count; what backward needs does
    assert measure.peak_bytes(lambda: kept.exp().sin().sum(), kept) == pytest.approx(2_000_000, rel=0.01)
    assert measure.peak_bytes(lambda: None, kept) == 0


def test_sparkline():
    assert demo.presentation.sparkline([1.0, 0.1, 0.01]) == "█▅▁"
    assert demo.presentation.sparkline([0.5, 0.5]) == "▁▁"
