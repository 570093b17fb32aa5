"""The demo: it agrees with torch.nn, says so in the terminal and on its page, and notices a kernel that is wrong."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch
from typer.testing import CliRunner

from pyops import demo
from pyops.cli import app
from pyops.demo import training
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
    assert min(result.torch.accuracy, result.pyops.accuracy) > 0.95
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


def test_sparkline():
    assert demo.presentation.sparkline([1.0, 0.1, 0.01]) == "█▅▁"
    assert demo.presentation.sparkline([0.5, 0.5]) == "▁▁"
