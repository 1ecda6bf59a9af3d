"""The path through Lightning: resuming bit for bit, whole checkpoints, and what stops a run."""

from __future__ import annotations

import csv
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from fcvgg.errors import ArgumentError, LoadError, TrainingError
from fcvgg.training import Settings
from fcvgg.training.callbacks import epoch_line
from fcvgg.training.loop import TrainingModule, TrainingRun, _Loaders, fit
from fcvgg.training.sampling import EpochSampler, SeededItems, mixed_seed

SETTINGS = Settings(epochs=4, lr=0.1, batch_size=5, seed=3)


class Noisy:
    """Items that are another at every look, as augmented images are."""

    def __init__(self, count: int = 21):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        fixed = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return fixed + 0.1 * torch.randn(8), int(fixed.sum() > 0)


class Small(TrainingModule):
    """A network with batch norm and dropout; `at` is called before every step."""

    def __init__(self, at: Any = None, valid: Any = None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(
                *(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU()),
                *(nn.Dropout(0.3), nn.Linear(16, 2)),
            )
        self.at = at
        self.valid = valid

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = self.at(self.current_epoch, batch_idx) if self.at else None
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        loss = loss if factor is None else loss * factor
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        value = loss if self.valid is None else torch.tensor(self.valid(self.current_epoch))
        self.log("valid_loss", value, batch_size=len(batch[1]))


class Fixed(Noisy):
    """The same items without noise."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        fixed = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return fixed, int(fixed.sum() > 0)


def train(folder: Path, module: TrainingModule | None = None, **options: Any) -> TrainingRun:
    settings = options.pop("settings", SETTINGS)
    return fit(module or Small(), Noisy(), Fixed(10), settings, folder, **options)


def state(folder: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    return torch.load(folder / name, weights_only=True)["state_dict"]


def assert_same_run(one: Path, other: Path) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        a, b = state(one, name), state(other, name)
        assert list(a) == list(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (torch.load(f / "last.ckpt", weights_only=True) for f in (one, other))
    for p, q in zip(
        a["optimizer_states"][0]["state"].values(), b["optimizer_states"][0]["state"].values()
    ):
        assert all(torch.equal(torch.as_tensor(p[k]), torch.as_tensor(q[k])) for k in p)
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows(folder)]
        for folder in (one, other)
    ]
    assert histories[0] == histories[1]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "history.csv", newline="") as file:
        return list(csv.DictReader(file))


def interrupt_at(epoch: int, step: int) -> Any:
    def at(current: int, batch_idx: int) -> None:
        if (current, batch_idx) == (epoch, step):
            raise KeyboardInterrupt

    return at


# -- what it leaves ---------------------------------------------------------------------------


def test_a_run_leaves_best_last_and_history(tmp_path: Path) -> None:
    task = Small()
    before = torch.get_rng_state()
    run = train(tmp_path / "deep" / "run", task)
    assert torch.equal(before, torch.get_rng_state())
    assert sorted(p.name for p in run.folder.iterdir()) == ["best.ckpt", "history.csv", "last.ckpt"]
    assert [row["epoch"] for row in run.history] == [1, 2, 3, 4]
    assert run.best_value == min(row["valid_loss"] for row in run.history)
    assert run.history[run.best_epoch - 1]["valid_loss"] == run.best_value
    assert run.history[0]["lr"] == 0.1
    assert run.history[-1]["lr"] < 0.02  # cosine
    assert [float(row["train_loss"]) for row in rows(run.folder)] == [
        row["train_loss"] for row in run.history
    ]
    best = torch.load(run.best_path, weights_only=True)["state_dict"]
    assert all(torch.equal(best[k], v) for k, v in task.state_dict().items())
    assert not task.training
    assert "\n" not in str(run.last_path)


def test_nothing_of_lightning_reaches_the_user(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "quiet")
    assert capfd.readouterr() == ("", "")
    train(tmp_path / "told", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("epoch 1/4  train loss ")


CLASSIFICATION = ("train_accuracy", "train_loss", "valid_accuracy", "valid_loss")
SEGMENTATION = ("train_loss", "valid_loss", "valid_mean_iou", "valid_pixel_accuracy")


@pytest.mark.parametrize("names", [CLASSIFICATION, SEGMENTATION])
def test_the_lines_of_long_runs_stand_in_79_columns(names: tuple[str, ...]) -> None:
    values = {"epoch": 100, **dict.fromkeys(names, 1.23456), "lr": 1e-5, "seconds": 123.45}
    line = epoch_line(values, 100)
    assert len(line) <= 79, line
    assert line.startswith("epoch 100/100  train ")
    assert line.count("1.235") == len(names)
    assert line.endswith("  123.5 s")


@given(st.lists(st.from_regex(r"(train|valid)(_[a-z]{1,20}){0,3}", fullmatch=True), unique=True))
def test_lines_of_any_task_are_broken_between_values_only(names: list[str]) -> None:
    values = {"epoch": 7, **{n: i + 0.125 for i, n in enumerate(names)}, "seconds": 1.0}
    lines = epoch_line(values, 30).splitlines()
    assert max(map(len, lines)) <= 79
    numbers = [w for line in lines for w in line.split() if re.fullmatch(r"\d+\.\d{3}", w)]
    assert numbers == [f"{i + 0.125:.3f}" for i in range(len(names))]
    assert lines[-1].endswith(" 1.0 s")


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_precisions_and_optimisers(tmp_path: Path, precision: str, optimizer: str) -> None:
    settings = Settings(epochs=1, precision=precision, optimizer=optimizer, cosine=False, lr=0.01)
    run = train(tmp_path, settings=settings)
    assert run.history[0]["lr"] == 0.01
    assert all(v.dtype == torch.float32 for v in state(tmp_path).values() if v.is_floating_point())


def test_no_last_batch_of_one_image(tmp_path: Path) -> None:
    sizes = []

    class Watching(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            sizes.append(len(batch[1]))
            return super().training_step(batch, batch_idx)

    train(tmp_path, Watching(), settings=Settings(epochs=1, batch_size=5))
    assert sizes == [5, 5, 5, 5]


@pytest.mark.parametrize(("devices", "count"), [(1, 21), (2, 41), (2, 42), (3, 61)])
def test_no_device_gets_a_last_batch_of_one_image(devices: int, count: int) -> None:
    loaders = _Loaders(Noisy(count), Noisy(4), Settings(batch_size=5), None)
    loaders.trainer = SimpleNamespace(world_size=devices, current_epoch=0)
    loader = loaders.train_dataloader()
    sampler = DistributedSampler(range(count), devices, 0)  # what Lightning puts in its place
    share = len(sampler) if devices > 1 else count
    assert share % 5 == 1
    assert loader.drop_last


def test_every_epoch_has_an_order_of_its_own(tmp_path: Path) -> None:
    seen: dict[int, list[float]] = {}

    class Watching(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.setdefault(self.current_epoch, []).extend(batch[0][:, 0].tolist())
            return super().training_step(batch, batch_idx)

    fit(Watching(), Fixed(20), Fixed(4), SETTINGS, tmp_path)
    assert len({tuple(order) for order in seen.values()}) == 4
    assert len({tuple(sorted(order)) for order in seen.values()}) == 1


# -- resuming ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


@pytest.mark.parametrize(("epoch", "step"), [(1, 0), (3, 3)])
def test_interrupted_and_resumed_ends_with_the_same_weights(
    whole: Path, tmp_path: Path, epoch: int, step: int
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Small(interrupt_at(epoch, step)))
    assert signal.getsignal(signal.SIGINT) is handler
    assert len(rows(tmp_path)) == epoch
    torch.manual_seed(99)  # the state of the process that resumes does not matter
    run = train(tmp_path, resume=True)
    assert run.resumed_after == epoch
    assert len(run.history) == 4
    assert_same_run(whole, tmp_path)


def test_interrupted_twice_and_before_the_first_epoch(whole: Path, tmp_path: Path) -> None:
    for epoch in (0, 1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, Small(interrupt_at(epoch, 2)), resume=True)
    assert train(tmp_path, resume=True).resumed_after == 3
    assert_same_run(whole, tmp_path)


def test_a_finished_run_is_left_as_it_is(whole: Path) -> None:
    before = (whole / "last.ckpt").read_bytes()
    task = Small()
    run = train(whole, task, resume=True)
    assert run.resumed_after == 4
    assert len(run.history) == 4
    assert (whole / "last.ckpt").read_bytes() == before
    best = state(whole, "best.ckpt")
    assert all(torch.equal(best[k], v) for k, v in task.state_dict().items())


def test_a_run_goes_on_where_its_folder_has_moved(tmp_path: Path) -> None:
    values = [1.0, 3.0, 2.0]
    for epochs, name in ((2, "first"), (3, "moved")):
        settings = replace(SETTINGS, epochs=epochs, cosine=False)
        task = Small(valid=values.__getitem__)
        run = train(tmp_path / name, task, mode="max", resume=True, settings=settings)
        (tmp_path / name).rename(tmp_path / "moved")
    assert (run.resumed_after, run.best_epoch, run.best_value) == (2, 2, 3.0)
    assert not (tmp_path / "first").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    refused: list[str] = []

    def second() -> None:
        with pytest.raises(TrainingError) as caught:
            train(tmp_path, resume=True)
        refused.append(str(caught.value))

    def at(epoch: int, batch_idx: int) -> None:
        if (epoch, batch_idx) == (0, 0):
            other = Thread(target=second)
            other.start()
            other.join()

    train(tmp_path, Small(at))
    assert refused == [
        f"{tmp_path} is in use by another run; wait for it to end, or choose another folder"
    ]
    with (
        FileLock(tmp_path.with_name(f".{tmp_path.name}.lock")),
        pytest.raises(TrainingError, match="in use by another run"),
    ):
        train(tmp_path, resume=True)  # as another process
    assert train(tmp_path, resume=True).resumed_after == 4


def test_another_seed_gives_other_weights(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, settings=Settings(epochs=4, lr=0.1, batch_size=5, seed=4))
    assert not torch.equal(state(whole)["model.0.weight"], state(tmp_path)["model.0.weight"])


def test_early_stopping_and_resuming_after_it(tmp_path: Path) -> None:
    settings = Settings(epochs=9, lr=0.01, batch_size=5, patience=2)
    values = [3.0, 2.0, 2.5, 2.0, 1.0]
    task = Small(valid=lambda epoch: values[epoch])
    run = train(tmp_path, task, settings=settings)
    assert (run.stopped_early, len(run.history), run.best_epoch) == (True, 4, 2)
    again = train(tmp_path, task, settings=settings, resume=True)
    assert (again.stopped_early, len(again.history), again.best_epoch) == (True, 4, 2)


def test_a_last_epoch_that_brought_no_better_is_not_stopping_early(tmp_path: Path) -> None:
    settings = Settings(epochs=3, lr=0.01, batch_size=5, patience=2)
    task = Small(valid=lambda epoch: [1.0, 2.0, 3.0][epoch])
    for resume in (False, True):
        run = train(tmp_path, task, settings=settings, resume=resume)
        assert (run.stopped_early, len(run.history)) == (False, 3)


ONE_EPOCH = Settings(epochs=1, lr=0.1, batch_size=5)


def test_workers_change_nothing(tmp_path: Path) -> None:
    train(tmp_path / "0", settings=ONE_EPOCH)
    # in a process of its own: after Ray and the engines have run in this one, the signal of a
    # loader's worker that ends killed the process, in two runs of the whole suite of two
    code = (
        "import dataclasses, pathlib, sys; sys.path.insert(0, 'training');"
        "import conftest, test_training_loop as t;"  # with one thread
        "settings = dataclasses.replace(t.ONE_EPOCH, workers=2);"
        "t.train(pathlib.Path(sys.argv[1]), settings=settings)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "2")], cwd=Path(__file__).parents[1], check=True
    )
    assert_same_run(tmp_path / "0", tmp_path / "2")


def test_mode_max(tmp_path: Path) -> None:
    task = Small(valid=lambda epoch: [1.0, 5.0, 2.0, 2.0][epoch])
    run = train(tmp_path, task, mode="max")
    assert (run.best_epoch, run.best_value) == (2, 5.0)


def test_order_and_items_depend_on_seed_epoch_and_index_only() -> None:
    orders = [
        [i for _, i in EpochSampler(Noisy(), seed, epoch)] for seed in (0, 1) for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(21)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    items = SeededItems(Noisy(), 7)
    first = items[2, 5][0]
    state = torch.get_rng_state()
    items[2, 6]
    assert torch.equal(items[2, 5][0], first)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(items[3, 5][0], first)
    assert not torch.equal(SeededItems(Noisy(), 8)[2, 5][0], first)
    seeds = [(1, 2), (2, 1), (1, 2, 0), (1, 2, 0, 0), (1, 5, 7), (1 + (5 << 32), 7)]
    assert len({mixed_seed(*numbers) for numbers in seeds}) == len(seeds)
    assert 0 <= mixed_seed(1, 2, 3) < 2**63


# -- what stops a run -------------------------------------------------------------------------


def nan_at(epoch: int) -> Any:
    return lambda current, batch_idx: float("nan") if (current, batch_idx) == (epoch, 1) else None


def test_a_loss_that_is_not_finite_stops_with_one_line(tmp_path: Path) -> None:
    message = (
        r"^the loss is not finite at step 2 of epoch 1, with the learning rate 0\.0\d+; no epo"
    )
    with pytest.raises(TrainingError, match=message) as caught:
        train(tmp_path, Small(nan_at(0)))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_the_rate_told_is_that_of_the_step(tmp_path: Path) -> None:
    # in the last step of all the schedule ends at 0, which made nothing infinite
    settings = Settings(epochs=1, lr=0.1, batch_size=11, seed=3)
    with pytest.raises(TrainingError, match=r"at step 2 of epoch 1, with the learning rate 0\.05;"):
        train(tmp_path, Small(nan_at(0)), settings=settings)


def test_the_last_good_checkpoint_survives_it(whole: Path, tmp_path: Path) -> None:
    message = (
        r"at step 2 of epoch 3, .*; the last good checkpoint is kept, .*last.ckpt \(epoch 2\);"
    )
    with pytest.raises(TrainingError, match=message):
        train(tmp_path, Small(nan_at(2)))
    assert all(torch.isfinite(v).all() for v in state(tmp_path).values())
    train(tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_a_validation_loss_that_is_not_finite(tmp_path: Path) -> None:
    task = Small(valid=lambda epoch: [1.0, float("inf")][epoch])
    with pytest.raises(TrainingError, match=r"the loss is inf at the validation of epoch 2, with"):
        train(tmp_path, task)
    assert len(rows(tmp_path)) == 1


def test_an_interrupt_while_a_checkpoint_is_written_is_no_full_disk(
    whole: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    save, calls = torch.save, []

    def interrupted(content: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # best and last of the first epoch, best and last of the second
            try:
                file.write(b"half")
                raise KeyboardInterrupt
            finally:
                raise RuntimeError("unexpected pos")  # as torch's writer ends
        save(content, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, progress=True)
    told = capsys.readouterr().err
    assert "epoch 1/4" in told
    assert "epoch 2/4" not in told, "an epoch is told of once it is kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.ckpt", "history.csv", "last.ckpt"]
    assert train(tmp_path, resume=True).resumed_after == 1
    assert_same_run(whole, tmp_path)


def test_a_full_disk_keeps_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(epoch: int, batch_idx: int) -> None:
        if epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))

    message = (
        r"^cannot save the checkpoint .*\.ckpt: the disk is full \(File too large\); the one "
        r"before is kept, .*; make room and resume the run$"
    )
    try:
        with pytest.raises(TrainingError, match=message):
            train(tmp_path, Small(fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.ckpt", "history.csv", "last.ckpt"]
    assert train(tmp_path, resume=True).resumed_after == 2
    assert_same_run(whole, tmp_path)


def test_a_run_that_is_there_is_not_overwritten(whole: Path) -> None:
    with pytest.raises(TrainingError, match=r"already holds a run \(last.ckpt\); resume it, or"):
        train(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"identity": {"classes": ("a", "c")}}, r"its classes is \['a', 'b'\], not \['a', 'c'\]"),
        ({"identity": {"architecture": "vgg19"}}, "its architecture is 'vgg16', not 'vgg19'"),
        ({"settings": Settings(epochs=2, lr=0.2)}, "its lr is 0.1, not 0.2; resume with the same"),
        ({"settings": Settings(lr=0.1, seed=1)}, "its seed is 0, not 1"),
    ],
)
def test_a_checkpoint_of_another_run(tmp_path: Path, options: Any, message: str) -> None:
    identity = {"architecture": "vgg16", "classes": ("a", "b")}
    options = {"identity": {}, "settings": Settings(epochs=1, lr=0.1), **options}
    train(tmp_path, settings=Settings(epochs=1, lr=0.1), identity=identity)
    with pytest.raises(LoadError, match=f"last.ckpt belongs to another run: {message}"):
        train(tmp_path, resume=True, **{**options, "identity": {**identity, **options["identity"]}})


def test_a_checkpoint_of_another_network(tmp_path: Path) -> None:
    train(tmp_path, settings=Settings(epochs=1))
    other = Small()
    other.model[4] = nn.Linear(16, 3)
    message = (
        r"last.ckpt does not fit the network: model.4.weight is \(2, 16\) there and \(3, 16\) here"
        r"; resume with the same network"
    )
    with pytest.raises(LoadError, match=message):
        train(tmp_path, other, settings=Settings(epochs=1), resume=True)


def test_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"PK nonsense")
    with pytest.raises(LoadError, match=r"last\.ckpt is a broken checkpoint: "):
        train(tmp_path, resume=True)
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(LoadError, match=r"does not hold a training run of fcvgg"):
        train(tmp_path, resume=True)
    settings = Settings(epochs=1)
    train(tmp_path / "run", settings=settings)
    content = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    torch.save({k: content[k] for k in ("state_dict", "fcvgg_run")}, tmp_path / "last.ckpt")
    with pytest.raises(LoadError, match=r"last\.ckpt holds weights only, from which no run can go"):
        train(tmp_path, settings=settings, resume=True)
    torch.save([1], tmp_path / "last.ckpt")
    with pytest.raises(LoadError, match=r"must hold a checkpoint, got list"):
        train(tmp_path, resume=True)


def test_a_module_that_does_not_log_what_is_monitored(tmp_path: Path) -> None:
    message = "^monitor must be a value that the module logs, got 'accuracy'; it logs train_loss, v"
    for patience in (None, 2):
        with pytest.raises(TrainingError, match=message):
            train(tmp_path, monitor="accuracy", settings=replace(SETTINGS, patience=patience))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"cannot make the folder .* for the run: Not a dir"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer of at least 1, got 2.5"),
        ({"lr": -1}, "lr must be a finite number of at least 0, got -1"),
        ({"lr": float("nan")}, "lr must be a finite number of at least 0, got nan"),
        ({"patience": 0}, "patience must be an integer of at least 1, got 0"),
        ({"optimizer": "adam"}, "optimizer must be 'sgd' or 'adamw', got 'adam'"),
        ({"precision": "8"}, "precision must be 'auto', '32', 'bf16-mixed' or '16-mixed', got '8'"),
        ({"devices": 0}, "devices must be 'auto' or an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range(options: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Settings(**options)


def test_an_accelerator_that_is_not_there(tmp_path: Path) -> None:
    settings = Settings(accelerator="abacus")
    with pytest.raises(ArgumentError, match="cannot train with accelerator='abacus', devices=1"):
        train(tmp_path, settings=settings)
    with pytest.raises(ArgumentError, match="mode must be 'min' or 'max', got 'low'"):
        train(tmp_path, mode="low")
