"""The benchmark of `speed.py` on a narrow VGG: what it computes and writes, not how fast it is."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from nets import images, narrow_vgg, relative_error, seeded

import contenders
import fcvgg
import measurements as benchmarking
import results
import speed
import workers
from contenders import ContenderError
from fcvgg.errors import ArgumentError, FcvggError
from fcvgg.optimization import timing

FIVE = [0.2, 0.3, 0.4, 0.5, 0.6]
NARROW = ["fcvgg", "fcvgg optimised", "usual recipe", "FC model", "FC sliding window"]


class Here(workers.Runner):
    """Stands for a worker: in this process, so that what is patched counts."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        pass


@pytest.fixture
def narrow(monkeypatch):
    """Stands for torchvision's vgg16, in this process: full depth, 1/64 of the channels."""
    model = seeded(narrow_vgg, "vgg16", width=64, dtype=torch.float32)
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights: model)
    monkeypatch.setattr(benchmarking, "Worker", Here)
    monkeypatch.setattr(benchmarking, "measured_peak", lambda clock: 100.0)
    monkeypatch.setattr(benchmarking, "_PAUSE", 0.0)
    monkeypatch.setattr(timing, "_TURN", 0.0)
    return model


@pytest.mark.parametrize("name", ["fcvgg", "fcvgg optimised", "usual recipe"])
def test_contenders_give_the_same_score_map(narrow, name):
    image = images(1, 3, 300, 260, dtype=torch.float32)
    with torch.no_grad():
        expected = fcvgg.convert(narrow, input_size=224)(image)
        assert relative_error(expected, contenders.made(name, narrow, 224, 256)(image)) < 1e-4


@pytest.mark.parametrize("name", ["fcvgg optimised int8", "OpenVINO int8"])
def test_contenders_in_int8_give_about_the_same_score_map(narrow, name):
    for package in ("nncf", "openvino", "onnxscript"):
        pytest.importorskip(package)
    image = images(1, 3, 256, 256, dtype=torch.float32)
    with torch.no_grad():
        expected = fcvgg.convert(narrow, input_size=224)(image)
        found = contenders.made(name, narrow, 224, 256)(image)
    assert 1e-4 < relative_error(expected, found) < 0.2


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


def test_optimised_networks_are_made_for_the_size_of_the_images(narrow, monkeypatch):
    sizes = []
    real = contenders.optimize
    monkeypatch.setattr(
        contenders,
        "optimize",
        lambda net, size, **o: sizes.append(size) or real(net, size=size, **o),
    )
    fcvgg_benchmark(sizes=[224, 256], contenders=["fcvgg", "fcvgg optimised"])
    assert sizes == [224, 256]


@pytest.mark.parametrize(("short", "calls"), [(100.0, 2 + 2 * 2 + 1), (0.0, 2 + 2 + 1)])
def test_turns_begin_with_a_call_that_is_not_counted(narrow, monkeypatch, short, calls):
    monkeypatch.setattr(timing, "_SHORT", short)
    shapes = []
    monkeypatch.setattr(
        workers,
        "made",
        lambda *args: lambda x: shapes.append(x.shape) or torch.zeros(1, 10, 1, 1),
    )
    (row,) = fcvgg_benchmark(contenders=["usual recipe"]).rows
    assert row.calls == 2
    assert len(shapes) == calls  # the first one, one that tells how many, the turns', the error's


@pytest.mark.parametrize(
    ("seconds", "turns"),
    [
        (
            [0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, *[0.3] * 5],
            [[0.2, 0.3, 0.4, 0.5, 0.6], [0.3] * 5],
        ),
        ([2.0, 3.0, 4.0], [[3.0], [4.0]]),
    ],
)
def test_short_calls_are_made_several_times_in_a_turn(narrow, monkeypatch, seconds, turns):
    monkeypatch.setattr(timing, "_TURN", 0.5)
    runner = Here("FC model", workers.Case("vgg16", 224, 1, threads=1))
    times = iter(seconds)
    monkeypatch.setattr(runner, "call", lambda: next(times))
    assert [runner.turn(), runner.turn()] == turns
    assert next(times, None) is None


def test_what_is_absent_is_left_out_by_name(narrow, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    result = fcvgg_benchmark(sizes=[224], contenders=["fcvgg", "timm"])
    assert "pip install 'fcvgg[bench]'" in result.skipped["timm"]
    assert "- timm: " in result.markdown()


def test_slow_contenders_are_called_once_more_and_ended(narrow, monkeypatch):
    calls, open_workers = [], []

    class Watched(Here):
        def __init__(self, contender, case):
            super().__init__(contender, case)
            self.contender = contender
            open_workers.append(contender)

        def call(self):
            calls.append((self.contender, tuple(open_workers)))
            return 11.0 if self.contender == "usual recipe" else super().call()

        def close(self):
            if self.contender in open_workers:
                open_workers.remove(self.contender)

    monkeypatch.setattr(benchmarking, "Worker", Watched)
    result = fcvgg_benchmark(contenders=["usual recipe", "fcvgg"])
    own, slow = result.rows
    assert (slow.contender, slow.calls, slow.seconds) == ("usual recipe", 1, 11.0)
    assert own.calls == 2
    assert [name for name, _ in calls[:3]] == ["usual recipe", "usual recipe", "fcvgg"]
    assert all(running == ("fcvgg",) for _, running in calls[2:])
    assert open_workers == []


def test_a_contender_that_fails_in_one_case_is_left_out_of_it(narrow, monkeypatch):
    class Failing(Here):
        def turn(self):
            if self._images.shape[-1] == 224 and not isinstance(self._run, torch.nn.Module):
                raise ContenderError("its process ended with 1")
            return super().turn()

    monkeypatch.setattr(benchmarking, "Worker", Failing)
    lines = []
    options = {"contenders": ["fcvgg", "FC sliding window"], "report": lines.append}
    result = fcvgg_benchmark(sizes=[224, 256], **options)
    assert [(r.contender, r.size) for r in result.rows] == [
        ("fcvgg", 224),
        ("fcvgg", 256),
        ("FC sliding window", 256),
    ]
    assert result.skipped == {
        "FC sliding window at 224x224, batch 1": "its process ended with 1",
    }
    assert lines.count("left out FC sliding window: its process ended with 1") == 1


def test_a_contender_whose_first_call_fails_is_ended(narrow, monkeypatch):
    closed = []

    class Failing(Here):
        def call(self):
            if not isinstance(self._run, torch.nn.Module):
                raise ContenderError("RuntimeError: can't allocate memory")
            return super().call()

        def close(self):
            closed.append(type(self._run))

    monkeypatch.setattr(benchmarking, "Worker", Failing)
    lines = []

    def report(line):
        lines.append(line)
        if line == "turn 1 of 2":
            assert len(closed) == 1

    result = fcvgg_benchmark(contenders=["fcvgg", "FC sliding window"], report=report)
    assert [r.contender for r in result.rows] == ["fcvgg"]
    assert "turn 1 of 2" in lines


def test_scores_that_fail_cost_the_error_only(narrow, monkeypatch):
    class Failing(Here):
        def scores(self):
            raise ContenderError("its process ended with 1")

    monkeypatch.setattr(benchmarking, "Worker", Failing)
    (row,) = fcvgg_benchmark(contenders=["fcvgg"]).rows
    assert (row.error, row.calls) == (None, 2)


def test_processes_of_their_own():
    names = ["fcvgg", "usual recipe", "timm"]
    lines = []
    result = benchmarking.benchmark(
        "alexnet", sizes=[256], repeats=1, contenders=names, threads=1, report=lines.append
    )
    own, recipe = result.rows
    assert (own.contender, recipe.contender) == ("fcvgg", "usual recipe")
    assert own.error < 1e-5
    assert recipe.error < 1e-5
    assert 2.4e8 < own.memory < recipe.memory  # 61 million weights, most of them copied for peers
    assert result.skipped["timm"].startswith(("not for this model: it is not one", "this source"))
    assert lines[0] == "256x256, batch 1"


def test_what_happens_in_a_process_is_told(capfd):
    case = workers.Case("alexnet", 224, 1, threads=1)
    with pytest.raises(FcvggError, match="not for this model: ") as raised:
        workers.Worker("no such contender", case)
    assert type(raised.value) is FcvggError  # so it is left out of every case
    with pytest.raises(ContenderError, match="ValueError: Unknown model alexnets"):
        workers.Worker("fcvgg", replace(case, model="alexnets"))
    assert "Traceback" in capfd.readouterr().err
    small = workers.Worker("FC model", replace(case, size=40))
    with small, pytest.raises(ContenderError, match=r"RuntimeError: .*utput size is too"):
        small.call()
    with workers.Worker("FC model", case) as worker:
        assert worker.call() > 0
        worker._process.kill()
        killed = "its process was killed, most likely for want of memory"
        with pytest.raises(ContenderError, match=killed):
            worker.turn()
    assert worker._process.exitcode == -9


def test_an_interrupted_benchmark_ends_its_processes(monkeypatch):
    """The interruption of a terminal reaches the processes too, which leave it to the parent."""
    monkeypatch.setattr(workers, "_PATIENCE", 0.1)
    worker = workers.Worker("FC model", workers.Case("alexnet", 512, 64, threads=1))
    os.kill(worker._process.pid, signal.SIGINT)
    worker._pipe.send("call")  # of seconds
    time.sleep(0.5)
    assert worker._process.is_alive()
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    assert worker._process.exitcode == -9


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
    assert result.skipped == {"256x256, batch 1": "not measured when this was written"}
    complete = fcvgg_benchmark(sizes=[224, 256], contenders=["fcvgg"])
    assert complete.skipped == result.joined(complete).skipped == {}


def test_contenders_that_cannot_run(narrow, monkeypatch):
    with pytest.raises(ArgumentError, match="none of FC model can run at these sizes"):
        fcvgg_benchmark(sizes=[256], contenders=["FC model"])
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ArgumentError, match="none of timm can run at these sizes; timm: "):
        fcvgg_benchmark(sizes=[224], contenders=["timm"])


def test_images_below_the_window_are_refused(narrow):
    message = "size 100 is below the network's window of 224, to which it would be padded; give"
    with pytest.raises(ArgumentError, match=message):
        fcvgg_benchmark(sizes=[224, 100])


def test_errors_of_a_network_that_is_more_than_layers():
    model = seeded(lambda: torchvision.models.resnet18(num_classes=3), dtype=torch.float32).eval()
    net = fcvgg.convert(model, input_size=64)
    batch = images(1, 3, 64, 96, dtype=torch.float32)
    with torch.no_grad():
        exact = benchmarking._exact(net, batch)
        assert exact.dtype == torch.float64
        assert 0 < benchmarking._error(net(batch).numpy(), exact) < 1e-5


def test_no_ratio_without_plain_fcvgg(narrow):
    (row,) = fcvgg_benchmark(sizes=[224], contenders=["usual recipe"]).rows
    assert row.ratio is None


def test_pieces_of_a_table_are_joined(narrow, tmp_path):
    first = fcvgg_benchmark(sizes=[224], contenders=["fcvgg", "usual recipe"])
    path = first.write(tmp_path)[1]
    second = fcvgg_benchmark(sizes=[256, 224], contenders=["fcvgg optimised", "fcvgg"])
    joined = results.Benchmark.read(path).joined(second)
    assert [(r.size, r.contender) for r in joined.rows] == [
        *((224, name) for name in ("fcvgg", "fcvgg optimised", "usual recipe")),
        *((256, name) for name in ("fcvgg", "fcvgg optimised")),
    ]
    assert joined.rows[0] in second.rows
    assert joined.rows[2] in first.rows
    own = replace(first.rows[0], error=7.0)
    again = replace(first, rows=(own,), skipped={"fcvgg optimised": "absent", "timm": "absent"})
    unknown = replace(second, rows=tuple(replace(row, error=None) for row in second.rows))
    joined = again.joined(unknown)
    assert (joined.rows[0].error, joined.rows[0].seconds) == (7.0, second.rows[2].seconds)
    assert set(joined.skipped) == {"timm"}
    with pytest.raises(ArgumentError, match="the runs differ in model: 'vgg16' and 'vgg11'"):
        first.joined(fcvgg_benchmark("vgg11", contenders=["fcvgg"]))
    path.write_text("{}")
    with pytest.raises(FcvggError, match=r"speed.json is no speed.json of this benchmark: "):
        results.Benchmark.read(path)


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


def test_the_script_writes_a_table_and_a_plot(narrow, tmp_path, monkeypatch, capsys):
    options = ["--batches", "1", "--repeats", "1", "--output", str(tmp_path)]
    for size in ("224", "256"):  # the second is added to the first
        arguments = ["speed.py", "--sizes", size, *options, "--add", "--only", *NARROW[:2]]
        monkeypatch.setattr("sys.argv", arguments)
        speed.main()
    printed = capsys.readouterr().out
    assert "## 224x224, batch 1" in printed
    assert printed.endswith("".join(f"wrote {tmp_path}/speed.{e}\n" for e in ("md", "json", "png")))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["speed.json", "speed.md", "speed.png"]
    assert len(results.Benchmark.read(tmp_path / "speed.json").rows) == 4


def fcvgg_benchmark(model="vgg16", **options):
    settings = {"sizes": [224], "repeats": 2, "contenders": NARROW, "threads": 1}
    return benchmarking.benchmark(model, **{**settings, **options})


def test_as_avx2_hides_what_goes_beyond_it(tmp_path):
    compiler, source = shutil.which("gcc"), Path(speed.__file__).with_name("as_avx2.c")
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("there is no gcc for x86-64 here")
    library = tmp_path / "as_avx2.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", library, source]
    subprocess.run(command, check=True)
    result = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability())"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.stderr == "as_avx2: this system cannot let CPUID fault\n":
        pytest.skip(result.stderr)
    assert (result.returncode, result.stdout) == (0, "AVX2\n"), result.stderr
