"""The report on made-up results: every part of the page, valid HTML, both colour schemes, and gaps where data is missing."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from pyops import report
from pyops.report import charts, tables
from pyops.report.results import geometric_mean

VOID = {"meta"}
SAMPLES = {  # flops, bytes
    "1x64x128x128": (2 * 64 * 512 * 256, 600_000),
    "16x64x256x256": (2 * 1024 * 1024 * 512, 4_000_000),
    "64x128x512x512": (2 * 8192 * 2048 * 1024, 25_000_000),
}


class Checker(HTMLParser):
    """Every element that is opened is closed, in order; collects tags and attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def results(change=None) -> dict:
    benchmarks = []
    for op in ("fused_lstm", "fused_gru"):
        for sample, (flops, moved) in SAMPLES.items():
            for direction in ("forward", "training"):
                for dtype in ("float32", "bfloat16"):
                    median = flops / 40e9 + 2e-5
                    extra = {
                        "op": op, "sample": sample, "pass": direction, "dtype": dtype, "device": "cpu", "backend": "cpu",
                        "bytes": moved, "flops": flops, "gbps": moved / median / 1e9, "gflops": flops / median / 1e9,
                        "percent_of_peak_bandwidth": 100 * moved / median / 20e9, "percent_of_peak_flops": 100 * flops / median / 120e9,
                        "baselines": {
                            "torch.nn": {"median": 2 * median, "min": 1.9 * median, "max": 2.1 * median, "ratio": 2.0},
                            "onnxruntime": {"median": 0.8 * median, "min": 0.7 * median, "max": 0.9 * median, "ratio": 0.8},
                        },
                        "skipped": {"openvino": "not installed"},
                    }  # fmt: skip
                    stats = {"median": median, "min": 0.9 * median, "max": 1.2 * median, "rounds": 21}
                    benchmarks.append({"name": f"bench_op[{op}-{sample}]", "extra_info": extra, "stats": stats})
    machine = {
        "device": "Some <CPU>", "threads": 2, "torch": "2.11.0", "triton": None, "commit": "abc1234", "peak_gflops": 120.0,
        "peak_gbps": 20.0, "cpu_isa": "avx2",
    }  # fmt: skip
    data = {"machine_info": {"python_version": "3.12.1", "pyops": machine}, "datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks}
    if change is not None:
        change(data)
    return data


def write(folder, change=None, name="results.json"):
    path = folder / name
    path.write_text(json.dumps(results(change)))
    return path


def test_page(tmp_path):
    paths = report.write([write(tmp_path)], tmp_path / "new" / "out")
    assert [path.name for path in paths] == ["report.md", "report.html"]
    text = paths[1].read_text()
    checked = Checker(text)
    tags = [tag for tag, _ in checked.tags]
    assert tags.count("svg") == 2 + 2 * (4 + 4)  # a roofline a dtype; a speed-up and a scaling chart an op, pass and dtype
    assert "script" not in tags and "link" not in tags and "img" not in tags
    assert "Some &lt;CPU&gt;" in text and "avx2" in text and "abc1234" in text
    assert "Not run: openvino: not installed" in text


def test_page_is_self_contained_and_has_both_colour_schemes(tmp_path):
    text = report.write([write(tmp_path)], tmp_path)[1].read_text()
    assert not re.search(r"https?://|url\(|@import|src=|href=", text)
    assert "@media (prefers-color-scheme:dark)" in text and "color-scheme:light dark" in text
    for _, attributes in Checker(text).tags:  # charts take their colours from the style sheet alone
        assert not {"fill", "stroke", "style", "color"} & set(attributes)
    light, dark = text.split("@media (prefers-color-scheme:dark)")[0], text.split("@media (prefers-color-scheme:dark)")[1]
    for name in ("background", "ink", "muted", "s0", "s7"):
        of = [re.search(rf"--{name}:(#\w+)", part).group(1) for part in (light, dark)]
        assert of[0] != of[1]


def test_markdown(tmp_path):
    text = report.write([write(tmp_path)], tmp_path)[0].read_text()
    assert "| fused_lstm | forward | float32 | 3 | 2.00x | 0.80x | 0 of 3 |" in text
    assert "| all |  |  | 24 | 2.00x | 0.80x | 0 of 24 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1x64x128x128 | float32"))
    assert row.endswith("| 2.00x | 0.80x | onnxruntime, 0.80x |")
    assert "% flops" in text
    widths = {line.count("|") for line in text.split("### fused_lstm forward\n\n")[1].split("\n\n")[0].splitlines()}
    assert len(widths) == 1


def test_short_calls_are_timed_many_at_a_time(tmp_path):
    def change(data):
        data["benchmarks"][0]["extra_info"]["calls_per_round"] = 100

    entry = report.load(write(tmp_path, change)).entries[0]
    plain = report.load(write(tmp_path)).entries[0]
    assert math.isclose(entry.median * 100, plain.median) and math.isclose(entry.low * 100, plain.low)


def test_memory(tmp_path):
    """Where it was measured: ours in MiB, others' as a multiple of ours."""

    def change(data):
        data["benchmarks"][0]["extra_info"]["peak_bytes"] = {"ours": 3 * 2**20, "torch.nn": 4.5 * 2**20}

    text = report.write([write(tmp_path, change)], tmp_path)[0].read_text()
    assert text.count("peak MiB | memory of torch.nn |") == 1
    rows = text.split("### fused_lstm forward\n\n")[1].split("\n\n")[0].splitlines()
    assert rows[2].endswith("| 3 | 1.50x |") and all(row.endswith("| - | - |") for row in rows[3:])
    assert "torch.nn: 4.5 MiB" in (tmp_path / "report.html").read_text()


def test_fused_networks(tmp_path):
    """Against eager in the better of its layouts, with the seconds to a first result; whether or not its median was kept twice."""

    def change(data):
        baselines = {
            "torch.nn": {"median": 0.03, "ratio": 3.0}, "torch.nn NCHW": {"median": 0.02, "ratio": 2.0},
            "openvino": {"median": 0.015, "ratio": 1.5},
        }  # fmt: skip
        first = {"ours": 0.25, "torch.nn": 0.1, "openvino": 4.0}
        extra = {"sample": "batch 1", "pass": "forward", "dtype": "float32", "median": 0.01, "baselines": baselines, "first_call": first}
        other = baselines | {"torch.nn NCHW": {"median": 0.08, "ratio": 8.0}, "torch.compile": {"median": 0.02, "ratio": 2.0}}
        memory = {"ours": 2**20, "torch.nn": 2**22, "torch.nn NCHW": 2**24}
        data["benchmarks"] = [
            {"name": "a", "extra_info": extra | {"op": "vgg16"}},
            {"name": "b", "extra_info": extra | {"op": "swin_t", "baselines": other, "peak_bytes": memory}, "stats": {"median": 0.01}},
        ]

    paths = report.write([write(tmp_path, change)], tmp_path)
    text = paths[0].read_text()
    Checker(paths[1].read_text())
    table = text.split("### Fused networks: forward, batch 1, float32\n\n")[1].split("\n\n")[0].splitlines()
    assert table[0] == (
        "| network | eager ms | fused ms | over eager | over openvino | over torch.compile | memory, of eager's "
        "| first call, s: fused / openvino |"
    )
    assert table[2:] == [
        "| vgg16 | 20 | 10 | 2.00x | 1.50x | - | - | 0.25 / 4 |",
        "| swin_t | 30 | 10 | 3.00x | 1.50x | 2.00x | 0.25 | 0.25 / 4 |",
        "| geometric mean |  |  | 2.45x | 1.50x | 2.00x | 0.25 |  |",
    ]


def no_extra(data):
    for benchmark in data["benchmarks"]:
        benchmark["extra_info"] = {}


def no_machine(data):
    del data["machine_info"]


def nulls(data):
    data["machine_info"]["pyops"] = dict.fromkeys(data["machine_info"]["pyops"])
    for benchmark in data["benchmarks"]:
        benchmark["stats"] = {}
        for key in ("gbps", "gflops", "bytes", "flops", "percent_of_peak_flops", "percent_of_peak_bandwidth"):
            benchmark["extra_info"][key] = None
        benchmark["extra_info"]["baselines"]["torch.nn"] = {"median": None, "ratio": None}
        del benchmark["extra_info"]["baselines"]["onnxruntime"]


def one_peer_once(data):
    for benchmark in data["benchmarks"][1:]:
        del benchmark["extra_info"]["baselines"]["onnxruntime"]


def not_numbers(data):
    for benchmark in data["benchmarks"]:
        benchmark["extra_info"]["gflops"] = math.nan
        benchmark["extra_info"]["baselines"]["torch.nn"]["ratio"] = math.inf


def nothing(data):
    data["benchmarks"] = []


def no_peaks(data):
    data["machine_info"]["pyops"].update(peak_gflops=None, peak_gbps=None)
    for benchmark in data["benchmarks"]:
        benchmark["extra_info"].update(percent_of_peak_flops=None, percent_of_peak_bandwidth=None)


@pytest.mark.parametrize("change", [no_extra, no_machine, nulls, one_peer_once, not_numbers, nothing, no_peaks])
def test_missing_data(tmp_path, change):
    markdown, html = (path.read_text() for path in report.write([write(tmp_path, change)], tmp_path))
    Checker(html)
    for text in (markdown, html):
        assert not re.search(r"\bnan\b|\binf\b|\bNone\b", text)


def test_several_files(tmp_path):
    files = [write(tmp_path, name=name) for name in ("before.json", "after.json")]
    markdown, html = (path.read_text() for path in report.write(files, tmp_path))
    assert "## Some <CPU> (before)" in markdown and "## Some <CPU> (after)" in markdown
    Checker(html)


def test_what_is_no_benchmark_file(tmp_path):
    for content in ("not json", "[]", '{"benchmarks": 3}', '{"other": []}', '{"benchmarks": [3]}'):
        path = tmp_path / "bad.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=r"bad\.json: not a pytest-benchmark JSON file"):
            report.write([path], tmp_path)
    with pytest.raises(FileNotFoundError):
        report.write([tmp_path / "absent.json"], tmp_path)
    with pytest.raises(ValueError, match="at least one"):
        report.write([], tmp_path)


def test_numbers():
    assert geometric_mean([2.0, 0.5, None]) == pytest.approx(1.0)
    assert geometric_mean([]) is None
    assert [tables.significant(x) for x in (0.01234, 1.234, 12345.6, 0, None)] == ["0.0123", "1.23", "12300", "0", "-"]
    assert [tables.ratio(x).tone for x in (1.5, 1.0, 0.5, None)] == ["good", "", "bad", ""]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.001, 1000.0], [1e-6, 2e-6], [0.97, 1.0], [1.0, 1e12]])
def test_axes(values, log):
    found = charts.axis(values, 0.0, 100.0, log)
    assert all(0 <= found(value) <= 100 for value in values)
    assert all(-1e-6 <= found(tick) <= 100 + 1e-6 for tick in found.ticks())
    assert len(found.ticks()) <= 9
    assert found.ticks() == sorted(set(found.ticks()))


def test_a_chart_of_nothing_says_so():
    assert "nothing to plot" in charts.xy([charts.Series("a", [(0.0, 1.0, "")])], "t", "x", "y", log_x=True)
    bars = charts.speedup_bars([("s", [("a", 1, None)])], "t")
    assert "not measured" in bars
