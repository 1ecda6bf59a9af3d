"""``fcvgg bench``: what it times, prints and writes, not how fast anything is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from command_line import run

import fcvgg
from fcvgg.cli import bench
from fcvgg.demo import demo_model
from fcvgg.errors import FcvggError
from fcvgg.optimization import timing
from fcvgg.optimization.timing import Timer, network_for, time_in_turns


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TURN", 0.0)
    monkeypatch.setattr(timing, "_PAUSE", 0.0)


THREE = [part for name in ("source", "plain", "optimized") for part in ("--only", name)]


def test_a_table_for_every_size_and_batch() -> None:
    ran = run(
        "bench", "demo", "--size", "32,64", "--batch", "1,2", "--repeat", "2", *THREE, columns=80
    )
    assert ran.exit_code == 0, ran.output
    lines = ran.stdout.splitlines()
    assert [line for line in lines if line.startswith("demo, ")] == [
        f"demo, {count} of {size}x{size} per call"
        for size in (32, 64)
        for count in ("1 image", "2 images")
    ]
    rows = [line.split() for line in lines if line.strip().startswith(("source", "plain", "optim"))]
    assert [row[:3] for row in rows[:3]] == [
        [name, "32x32", "1"] for name in ("source", "plain", "optimized")
    ]
    assert [row[:3] for row in rows[6:9]] == [
        ["source", "32x32", "1"],
        ["plain", "64x64", "25"],
        ["optimized", "64x64", "25"],
    ]
    assert all(row[-2 if row[0] == "source" else -1] == "1.00x" for row in rows[:2])
    assert lines[-2].startswith(f"milliseconds per call, wall time; torch {torch.__version__}, ")
    assert max(map(len, lines)) <= 80
    assert not list(Path().glob("bench.*"))


def test_json_in_place_of_the_table_and_in_a_folder(tmp_path: Path) -> None:
    options = ["--size", "64", "--repeat", "3", "--clock", "cpu", "--threads", "1", *THREE]
    ran = run("bench", "demo", *options, "--json")
    data = json.loads(ran.stdout)
    assert (data["model"], data["clock"], data["left_out"]) == ("demo", "cpu", {})
    assert data["machine"].endswith(", 1 thread")
    source, plain, _ = data["timings"]
    assert (source["network"], source["size"], source["windows"]) == ("source", [32, 32], 1)
    assert (plain["size"], plain["batch"], plain["windows"], plain["calls"]) == ([64, 64], 1, 25, 3)
    assert plain["windows_per_second"] == pytest.approx(25 / plain["seconds"])
    assert plain["quartiles"][0] <= plain["seconds"] <= plain["quartiles"][1]
    ran = run("bench", "demo", *options, "-o", tmp_path / "made")
    assert ran.stdout.splitlines()[-1] == f"wrote {tmp_path / 'made' / 'bench.json'}"
    written = json.loads((tmp_path / "made" / "bench.json").read_text())
    assert [row["network"] for row in written["timings"]] == ["source", "plain", "optimized"]


def test_earlier_spellings_of_options_and_names() -> None:
    options = ["--sizes", "32", "--batches", "1", "--repeats", "1", "--only", "FC model"]
    ran = run("bench", "demo", *options, "--only", "fcvgg", "--only", "fcvgg optimised", "--json")
    names = [row["network"] for row in json.loads(ran.stdout)["timings"]]
    assert names == ["source", "plain", "optimized"]


def test_what_is_absent_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr(timing, "has_bfloat16", lambda: False)
    names = ("source", "plain", "optimized-bf16", "onnxruntime")
    bundle = fcvgg.load("demo").save(tmp_path / "demo-fcn")
    only = [part for name in names for part in ("--only", name)]
    ran = run("bench", bundle, "--size", "32,64", "--repeat", "1", "--json", *only)
    data = json.loads(ran.stdout)
    assert [row["network"] for row in data["timings"]] == ["plain", "plain"]
    assert data["left_out"]["source"] == "a bundle holds the converted network only"
    assert data["left_out"]["optimized-bf16"] == "the processor has no bfloat16"
    assert "pip install 'fcvgg[onnx]'" in data["left_out"]["onnxruntime"]
    assert [line.split(":")[1] for line in ran.stderr.splitlines()] == [  # once, not for each size
        " left out source",
        " left out optimized-bf16",
        " left out onnxruntime",
    ]
    ran = run("bench", bundle, "--only", "source")
    assert ran.exit_code == 2
    assert "--only must name a network that can run here, got source" in ran.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "timm"], "--only must be 'source', 'plain', .*, got 'timm'"),
        (["--size", "16"], "--size must be at least the network's window of 32, got 16"),
    ],
)
def test_arguments_are_checked(options: list[str], message: str) -> None:
    ran = run("bench", "demo", *options)
    assert ran.exit_code == 2
    assert re.search(message, ran.stderr)


@pytest.mark.parametrize("name", ["optimized", "onnxruntime", "openvino"])
def test_all_networks_give_the_plain_map(name: str) -> None:
    pytest.importorskip(name if name != "optimized" else "torch")
    pytest.importorskip("onnxscript")
    model = demo_model()
    net = fcvgg.convert(model, input_size=32)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            network_for(name, model, net, 64)(image), net(image), atol=1e-3, rtol=1e-3
        )
    assert network_for("source", model, net, 64) is model
    with pytest.raises(FcvggError, match="a bundle holds the converted network only"):
        network_for("source", None, net, 64)


def test_networks_take_turns() -> None:
    net = fcvgg.convert(demo_model(), input_size=32)
    order = []

    class Named(torch.nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.name = name

        def forward(self, images: torch.Tensor) -> None:
            order.append((self.name, tuple(images.shape)))

    networks = {"source": Named("source"), "plain": Named("plain")}
    advanced = []
    found = time_in_turns(networks, net, 40, batch=2, repeat=2, advance=advanced.append)
    assert [name for name, _ in order] == ["source"] * 3 + ["plain"] * 3 + ["source"] * 2 + [
        "plain"
    ] * 2
    assert {shape for _, shape in order} == {(2, 3, 32, 32), (2, 3, 40, 40)}
    assert [(t.network, t.size, t.windows, t.calls) for t in found] == [
        ("source", (32, 32), 1, 2),
        ("plain", (40, 40), 4, 2),
    ]
    assert advanced == [1] * 4


def test_short_calls_are_made_several_times_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_TURN", 0.5)
    timer = Timer(lambda: None)
    times = iter([0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(timer, "call", lambda: next(times))
    assert timer.turn() == [0.2, 0.3, 0.4, 0.5, 0.6]  # after one that tells how many, and one more


def test_int8_is_timed_where_it_is_named() -> None:
    for package in ("nncf", "openvino", "onnxscript"):
        pytest.importorskip(package)
    options = ["--size", "64", "--repeat", "1", "--json"]
    ran = run("bench", "demo", *options, "--only", "plain", "--only", "optimized-int8")
    data = json.loads(ran.stdout)
    assert [t["network"] for t in data["timings"]] == ["plain", "optimized-int8"]
    assert data["left_out"] == {}
    assert "optimized-int8" not in bench._checked_names(None)
    net = network_for("optimized-int8", None, fcvgg.load("demo"), 64)
    assert str(net.optimization) == "openvino, int8, 0 of 9 layers in float32"
