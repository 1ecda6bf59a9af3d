"""The benchmark on a narrow VGG: what it computes and writes, not how fast anything is."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
from nets import images, narrow_vgg, relative_error, seeded
from typer.testing import CliRunner

import fcvgg
from fcvgg.benchmarking import contenders
from fcvgg.benchmarking import measurements as benchmarking
from fcvgg.cli import app
from fcvgg.errors import ArgumentError, FcvggError

NARROW = ["fcvgg", "fcvgg optimised", "usual recipe", "FC model", "FC sliding window"]


@pytest.fixture
def narrow(monkeypatch):
    """Stands for torchvision's vgg16: full depth, 1/64 of the channels."""
    model = seeded(narrow_vgg, "vgg16", width=64, dtype=torch.float32)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: model)
    monkeypatch.setattr(benchmarking, "measured_peak", lambda clock: 100.0)
    monkeypatch.setattr(benchmarking, "_PAUSE", 0.0)
    return model


@pytest.mark.parametrize("name", ["fcvgg", "fcvgg optimised", "usual recipe"])
def test_contenders_give_the_same_score_map(narrow, name):
    image = images(1, 3, 300, 260, dtype=torch.float32)
    with torch.no_grad():
        expected = fcvgg.convert(narrow, input_size=224)(image)
        assert relative_error(expected, contenders.made(name, narrow, 224, 256)(image)) < 1e-4


def test_sliding_windows_give_the_map_of_an_unpadded_image(narrow):
    image = images(2, 3, 224, 256, dtype=torch.float32)
    with torch.no_grad():
        run = contenders.made("FC sliding window", narrow, 224, 256)
        scores = run(image)
        assert scores.shape == (2, 10, 1, 2)
        assert relative_error(narrow(image[..., 32:]), scores[..., 0, 1]) < 1e-5


def test_operations_count_every_layer(narrow):
    net = fcvgg.convert(narrow, input_size=224)
    one = benchmarking.operations(net, 224)
    first = 2 * 9 * 3 * 1 * 224 * 224
    assert one > first
    assert 4 < benchmarking.operations(net, 448) / one < 8


def test_a_benchmark_measures_and_writes(narrow, tmp_path):
    result = fcvgg_benchmark(sizes=[224, 256])
    assert [(r.contender, r.size) for r in result.rows] == [
        *((name, 224) for name in NARROW),
        *((name, 256) for name in NARROW if name != "FC model"),
    ]
    own = result.rows[0]
    assert own.ratio == 1.0
    assert own.share == pytest.approx(own.gflops / 100)
    assert all(r.error < 1e-4 for r in result.rows if r.error is not None)
    assert result.rows[-1].error is None
    markdown, data, plot = result.write(tmp_path)
    assert "| fcvgg optimised | " in markdown.read_text()
    assert json.loads(data.read_text())["peak_gflops"] == 100
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_optimised_networks_are_made_for_each_size(narrow, monkeypatch):
    sizes = []
    real = contenders.optimize
    monkeypatch.setattr(
        contenders,
        "optimize",
        lambda net, size, **o: sizes.append(size) or real(net, size=size, **o),
    )
    fcvgg_benchmark(sizes=[224, 256], batches=[1, 2], contenders=["fcvgg", "fcvgg optimised"])
    assert sizes == [224, 256]


@pytest.mark.parametrize(("short", "calls"), [(100.0, 1 + 2 * 2 + 1), (0.0, 1 + 2 + 1)])
def test_turns_begin_with_a_call_that_is_not_counted(narrow, monkeypatch, short, calls):
    monkeypatch.setattr(benchmarking, "_SHORT", short)
    shapes = []
    monkeypatch.setattr(
        benchmarking,
        "made",
        lambda *args: lambda x: shapes.append(x.shape) or torch.zeros(1, 10, 1, 1),
    )
    (row,) = fcvgg_benchmark(contenders=["usual recipe"]).rows
    assert row.calls == 2
    assert len(shapes) == calls  # the first one, the turns', and one whose error is measured


def test_what_is_absent_is_left_out_by_name(narrow, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    result = fcvgg_benchmark(sizes=[224], contenders=["fcvgg", "timm"])
    assert "pip install 'fcvgg[bench]'" in result.skipped["timm"]
    assert "- timm: " in result.markdown()


def test_the_memory_of_a_process(narrow, capsys):
    benchmarking._measure_memory(json.dumps(["fcvgg", "vgg16", 224, 224, 1]))
    assert int(capsys.readouterr().out) > 50e6


def test_sliding_windows_that_would_take_too_long_are_said_to(narrow, monkeypatch):
    monkeypatch.setattr(benchmarking, "_MOST_CROPS", 2)
    result = fcvgg_benchmark(sizes=[224, 288], contenders=["fcvgg", "FC sliding window"])
    assert [(r.contender, r.size) for r in result.rows] == [
        ("fcvgg", 224),
        ("FC sliding window", 224),
        ("fcvgg", 288),
    ]
    reason = result.skipped["FC sliding window at 288x288, batch 1"]
    assert reason.startswith("9 crops, about ")
    assert reason.endswith(" at the time per crop of 224x224, batch 1 (not run)")


def test_seconds_per_megapixel_of_the_sizes(narrow):
    result = fcvgg_benchmark(sizes=[224, 256], contenders=["fcvgg"])
    small, large = result.rows
    assert small.seconds / small.gflops != large.seconds / large.gflops
    cells = [f"{r.seconds / r.size**2 * 1e6:.2f} ({1000 / r.gflops:.2f})" for r in result.rows]
    assert f"| fcvgg     | {' | '.join(cells)} |" in result.markdown()
    assert "per megapixel" not in fcvgg_benchmark(sizes=[224], contenders=["fcvgg"]).markdown()


def test_an_interruption_loses_little(narrow):
    kept = []

    def report(line):
        if line == "256x256, batch 1":
            raise KeyboardInterrupt

    options = {"sizes": [224, 256], "contenders": ["fcvgg"], "report": report}
    with pytest.raises(KeyboardInterrupt):
        fcvgg_benchmark(**options, keep=kept.append)
    (result,) = kept
    assert [(r.contender, r.size, r.ratio) for r in result.rows] == [("fcvgg", 224, 1.0)]


def test_contenders_that_cannot_run(narrow, monkeypatch):
    with pytest.raises(ArgumentError, match="none of FC model can run at these sizes"):
        fcvgg_benchmark(sizes=[256], contenders=["FC model"])
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ArgumentError, match="none of timm can run at these sizes; timm: "):
        fcvgg_benchmark(sizes=[224], contenders=["timm"])


def test_images_below_the_window_are_padded(narrow):
    (row,) = fcvgg_benchmark(sizes=[100], contenders=["fcvgg"]).rows
    assert row.error < 1e-4


def test_no_ratio_without_plain_fcvgg(narrow):
    (row,) = fcvgg_benchmark(sizes=[224], contenders=["usual recipe"]).rows
    assert row.ratio is None


def test_pieces_of_a_table_are_joined(narrow, tmp_path):
    first = fcvgg_benchmark(sizes=[224], contenders=["fcvgg", "usual recipe"])
    path = first.write(tmp_path)[1]
    second = fcvgg_benchmark(sizes=[256, 224], contenders=["fcvgg optimised", "fcvgg"])
    joined = benchmarking.Benchmark.read(path).joined(second)
    assert [(r.size, r.contender) for r in joined.rows] == [
        *((224, name) for name in ("fcvgg", "fcvgg optimised", "usual recipe")),
        *((256, name) for name in ("fcvgg", "fcvgg optimised")),
    ]
    assert joined.rows[0] in second.rows
    assert joined.rows[2] in first.rows
    own = replace(first.rows[0], memory=7)
    again = replace(first, rows=(own,), skipped={"fcvgg optimised": "absent", "timm": "absent"})
    joined = again.joined(second)
    assert (joined.rows[0].memory, joined.rows[0].seconds) == (7, second.rows[-1].seconds)
    assert set(joined.skipped) == {"timm"}
    with pytest.raises(ArgumentError, match="the runs differ in model: 'vgg16' and 'vgg11'"):
        first.joined(fcvgg_benchmark("vgg11", contenders=["fcvgg"]))
    path.write_text("{}")
    with pytest.raises(FcvggError, match=r"speed.json is no speed.json of fcvgg bench: "):
        benchmarking.Benchmark.read(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contenders": ["caffe"]}, "there is no contender 'caffe'; expected some of 'fcvgg', "),
        ({"model": "vgg17"}, "there is no model 'vgg17'; expected a torchvision name"),
        ({"clock": "sun"}, "clock='sun' is unknown; expected 'wall' or 'cpu'"),
        ({"sizes": []}, "sizes, batches and repeats must be positive"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ArgumentError, match=message):
        fcvgg_benchmark(**options)


def test_the_command_writes_a_table_and_a_plot(narrow, tmp_path):
    only = [part for name in NARROW[:2] for part in ("--only", name)]
    options = ["--sizes", "224", "--repeats", "1", "--no-memory", "-o", str(tmp_path)]
    ran = CliRunner().invoke(app, ["bench", *options, *only])
    assert ran.exit_code == 0, ran.output
    assert "## 224x224, batch 1" in ran.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]


def fcvgg_benchmark(model="vgg16", **options):
    settings = {"sizes": [224], "repeats": 2, "contenders": NARROW, "memory": False}
    return benchmarking.benchmark(model, **{**settings, **options})
