"""Two local workers give what one process gives, also when one of them is killed."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from nets import SmallVGG, seeded
from PIL import Image

import fcvgg
from fcvgg import distributed
from fcvgg.distributed import _write_folder
from fcvgg.errors import FcvggError, ImageError
from fcvgg.streaming.job import StreamJob, plan_in_memory
from fcvgg.streaming.score_store import ScoreStore

ray = pytest.importorskip("ray")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("zarr")
pytest.importorskip("tifffile")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def net() -> Any:
    preprocess = fcvgg.Preprocess.imagenet()
    return fcvgg.convert(seeded(SmallVGG), preprocess=preprocess, categories=list("abcde"))


def photograph(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3)).astype(np.uint8)


def test_bands_on_two_workers(net: Any, tmp_path: Path) -> None:
    image = photograph(220, 60)
    single = fcvgg.stream(net, image)
    torch.testing.assert_close(distributed.stream(net, image).scores, single.scores)
    path = tmp_path / "image.tif"
    __import__("tifffile").imwrite(path, image, photometric="rgb", tile=(64, 64))
    store = distributed.stream(net, path, out=tmp_path / "map.zarr", workers=3, rows=(1, 40))
    assert store.complete
    np.testing.assert_allclose(store.array[:], single.scores[:, 1:40].numpy(), rtol=1e-5, atol=1e-6)
    labels = distributed.stream(net, image, classes="argmax")
    assert torch.equal(labels, single.label_map())


def test_levels_and_bands_reach_the_workers(net: Any, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    planes = np.moveaxis(np.concatenate([photograph(220, 60)] * 2, 2), -1, 0)
    options = {"photometric": "minisblack", "metadata": {"axes": "CYX"}, "tile": (32, 32)}
    tifffile.imwrite(tmp_path / "scene.tif", planes, **options)
    source = fcvgg.open_image(tmp_path / "scene.tif", bands=(2, 0, 1))
    expected = fcvgg.stream(net, source)
    torch.testing.assert_close(distributed.stream(net, source, workers=2).scores, expected.scores)


def test_the_level_of_an_open_slide_reaches_the_workers(net: Any, tmp_path: Path) -> None:
    openslide, tifffile = (pytest.importorskip(name) for name in ("openslide", "tifffile"))
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        options: dict[str, Any] = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
        size = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
        file.write(photograph(440, 128), **options, **size)
        file.write(photograph(220, 64), subfiletype=1, **options)
    expected = fcvgg.stream(net, photograph(220, 64)).scores
    with openslide.OpenSlide(tmp_path / "slide.tif") as slide:
        for source in (slide, tmp_path / "slide.tif"):
            got = distributed.stream(net, source, mpp=1, workers=2).scores
            torch.testing.assert_close(got, expected)


def test_nodata_reaches_the_workers(net: Any, tmp_path: Path) -> None:
    image = photograph(220, 60)
    image[100:120, :20] = 0
    __import__("tifffile").imwrite(tmp_path / "image.tif", image, photometric="rgb")
    expected = fcvgg.stream(net, image, nodata=0).scores
    assert expected.isnan().any()
    assert not expected.isnan().all()
    for source in (image, tmp_path / "image.tif"):
        got = distributed.stream(net, source, nodata=0, workers=2).scores
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_region_on_two_workers(net: Any, tmp_path: Path) -> None:
    image, mask = photograph(300, 120), np.zeros((10, 4), bool)
    mask[2:4, 1] = mask[6:9, 2] = True
    single = fcvgg.stream(net, image, where=mask).scores
    got = distributed.stream(net, image, where=mask, workers=2, progress=True).scores
    known = ~single.isnan().any(0)
    assert 0 < known.double().mean() < 0.5
    torch.testing.assert_close(got, single, equal_nan=True)
    store = distributed.stream(net, image, where=mask, fill=0, out=tmp_path / "m.zarr", workers=2)
    np.testing.assert_allclose(store.array[:], single.nan_to_num(0).numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(FcvggError, match="its where= or fill= is different"):
        fcvgg.stream(net, image, out=tmp_path / "m.zarr")
    with pytest.raises(FcvggError, match="aspect ratio"):
        distributed.stream(net, image, where=mask.T)


class TwoOutputs(SmallVGG):
    """Scores, and their negatives."""

    def forward(self, x: torch.Tensor) -> Any:
        scores = super().forward(x)
        return scores, -scores


def test_another_output_on_two_workers() -> None:
    net = fcvgg.convert(seeded(TwoOutputs), preprocess=fcvgg.Preprocess.imagenet())
    image = photograph(100, 60)
    got = distributed.stream(net, image, output=1, workers=2).scores
    torch.testing.assert_close(got, fcvgg.stream(net, image, output=1).scores)
    torch.testing.assert_close(got, -fcvgg.stream(net, image).scores)


@pytest.mark.parametrize(
    ("found", "workers", "share"),
    [
        ((0, 8, None, 2), 4, 0.0),
        ((0, 1, None, 2), 1, 0.0),
        ((2, 8, None, 1), 2, 1.0),
        ((2, 8, 4, 1), 4, 0.5),
        ((1, 8, 3, 1), 3, 0.3333),
        ((4, 8, 2, 1), 2, 1.0),
    ],
)
def test_every_worker_takes_its_share_of_gpus(found: Any, workers: int, share: float) -> None:
    assert distributed._share(*found) == (workers, share)


def test_a_source_that_cannot_be_sent(net: Any) -> None:
    class Bound:
        shape, dtype = (220, 60, 3), np.dtype(np.uint8)

        def __reduce__(self) -> Any:
            raise TypeError("it is bound to this process")

        def __getitem__(self, key: Any) -> Any:
            raise AssertionError

    message = "can be sent to workers, got Bound: it is bound to this process; pass a path"
    with pytest.raises(FcvggError, match=message):
        distributed.stream(net, Bound())


def test_a_killed_worker_is_replaced(net: Any, tmp_path: Path) -> None:
    class Killing:
        """An array whose reader dies in the middle, once."""

        def __init__(self, array: np.ndarray[Any, Any], marker: str, parent: int):
            self.array, self.marker, self.parent = array, marker, parent
            self.shape, self.dtype = array.shape, array.dtype

        def __getitem__(self, key: Any) -> Any:
            first_time = not os.path.exists(self.marker)
            if os.getpid() != self.parent and key[0].stop > 110 and first_time:
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.array[key]

    image = photograph(220, 60)
    marker = tmp_path / "killed"
    got = distributed.stream(net, Killing(image, str(marker), os.getpid()), workers=2)
    assert marker.exists()
    torch.testing.assert_close(got.scores, fcvgg.stream(net, image).scores)


def test_an_error_of_a_worker_is_the_users_error(net: Any, tmp_path: Path) -> None:
    class Failing:
        def __init__(self, parent: int):
            self.parent, self.shape, self.dtype = parent, (220, 60, 3), np.dtype(np.uint8)

        def __getitem__(self, key: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(FcvggError, match=r"cannot be read: the disk is gone"):
        distributed.stream(net, Failing(os.getpid()))


def test_a_folder_of_images(net: Any, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(photograph(40 + i, 50)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image")
    out = distributed.classify(net, str(folder), out=tmp_path / "classes", top=2)
    rows = {Path(row["path"]).name: row for row in pq.read_table(out).to_pylist()}
    assert len(rows) == 6
    assert rows["broken.png"]["error"]
    assert list(rows["broken.png"]["classes"]) == []
    for i in range(5):
        expected = net.classify(folder / f"{i}.png")[0]
        values, indices = expected.topk(2)
        assert list(rows[f"{i}.png"]["classes"]) == ["abcde"[k] for k in indices]
        assert np.allclose(rows[f"{i}.png"]["probabilities"], values, atol=1e-6)
        assert rows[f"{i}.png"]["error"] == ""


COLUMNS = {
    "path": pa.string(),
    "classes": pa.list_(pa.string()),
    "probabilities": pa.list_(pa.float32()),
    "error": pa.string(),
}


def check_table(out: str, count: int) -> list[dict[str, Any]]:
    """Every file of a table has the stated types, and all readers read it; its rows, by path."""
    for file in Path(out).iterdir():
        assert {f.name: f.type for f in pq.read_schema(file)} == COLUMNS
    pandas = pytest.importorskip("pandas").read_parquet(out)
    dataset = pytest.importorskip("pyarrow.dataset").dataset(out).to_table()
    assert len(pandas) == dataset.num_rows == pq.read_table(out).num_rows == count
    assert sorted(pandas.path) == sorted(dataset["path"].to_pylist())
    return sorted(dataset.to_pylist(), key=lambda row: row["path"])


def test_every_file_has_a_row_of_stated_types(net: Any, tmp_path: Path) -> None:
    """Annotations come first, so the first files of the table hold failures only."""
    folder = tmp_path / "data"
    names = ["_DSC1.JPG", "_rejected/2.png", "day/_3.jfif", "images/no-ending", "images/4.avif"]
    kinds = ["JPEG", "PNG", "JPEG", "PNG", "AVIF"]
    for name, kind in zip(names, kinds):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(40, 50)).save(folder / name, kind)
    os.rename(folder / "_DSC1.JPG", os.fsencode(folder) + b"/h\xe4user.JPG")
    names[0] = "h\\xe4user.JPG"
    (folder / "annotations").mkdir()
    notes = [f"annotations/{i:02}.xml" for i in range(20)]
    for name in notes:
        (folder / name).write_text("<a/>")
    (folder / "images" / "broken.png").write_bytes(b"no image")
    (folder / "images" / "Thumbs.db").write_bytes(b"left by the system")
    (folder / "images" / "loop").symlink_to(folder)
    out = distributed.classify(net, folder, out=tmp_path / "classes", top=1)
    assert out == str(tmp_path / "classes")
    rows = {os.path.relpath(row["path"], folder): row for row in check_table(out, 27)}
    assert set(rows) == {*names, *notes, "images/broken.png", "images/loop"}
    for name in names:
        assert rows[name]["error"] == ""
        assert len(rows[name]["classes"]) == len(rows[name]["probabilities"]) == 1
    assert {rows[name]["error"] for name in notes} == {"not a readable image"}
    assert rows["images/loop"]["error"] == "a link to a folder that it lies in"
    assert rows["images/broken.png"]["error"] == (
        f"{folder}/images/broken.png is not an image that Pillow can read; convert it to PNG or "
        "JPEG"
    )
    assert rows["images/broken.png"]["classes"] == rows["images/broken.png"]["probabilities"] == []
    assert out.rows == 27
    assert [one.name for one in out.skipped][:2] == [f"{folder}/{name}" for name in notes[:2]]
    assert len(out.skipped) == 22


def test_files_of_stores_are_listed_and_read_alike(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    (folder / "_sub").mkdir(parents=True)
    Image.fromarray(photograph(40, 50)).save(folder / "_sub" / "1.png")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    (folder / "._1.png").write_text("left by the system")
    absent = tmp_path / "2.png"
    Image.fromarray(photograph(41, 50)).save(absent)
    uri, out = folder.as_uri(), (tmp_path / "classes").as_uri()
    written = distributed.classify(net, [uri, absent.as_uri()], out=out, workers=1)
    assert written == out
    rows = check_table(str(tmp_path / "classes"), 4)
    assert [(row["path"], row["error"]) for row in rows] == [
        (absent.as_uri(), ""),
        (f"{uri}/.hidden.png", "a hidden file"),
        (f"{uri}/_sub/1.png", ""),
        (
            f"{uri}/notes.txt",
            f"{uri}/notes.txt is not an image that Pillow can read; convert it to PNG or JPEG",
        ),
    ]
    os.mkfifo(tmp_path / "pipe.png")
    monkeypatch.chdir(tmp_path)  # where workers are not
    given = ["2.png", "pipe.png", "data/notes.txt"]
    near = check_table(distributed.classify(net, given, out="near", workers=1), 3)
    assert [row["path"] for row in near] == sorted(given)
    assert near[0]["error"] == ""
    assert near[2]["error"] == "a pipe, socket or device"
    expected = net.classify(folder / "_sub" / "1.png")[0].topk(5).values
    assert np.allclose(rows[2]["probabilities"], expected, atol=1e-6)
    assert written.rows == 4
    assert len(written.skipped) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", "there is no file or folder absent$"),
        ("texts", r"texts must hold at least one image, got none \(1 of 1 files left out"),
        ("file:///absent/x", "there is no file or folder file:///absent/x$"),
        ("nosuch://bucket/x", "nosuch://bucket/x cannot be opened: "),
    ],
)
def test_places_without_images(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    with pytest.raises(ImageError, match=message):
        distributed.classify(net, name, out=tmp_path / "classes")
    assert not (tmp_path / "classes").exists()


def test_a_band_comes_in_chunks(net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcvgg.streaming.resumption._CHUNK_ROWS", 4)
    written = []
    write = ScoreStore.write

    def writing(self: ScoreStore, block: int, row: int, cells: Any) -> None:
        written.append((row, cells.shape[-2]))
        write(self, block, row, cells)

    monkeypatch.setattr(ScoreStore, "write", writing)
    image = photograph(900, 60)
    job = StreamJob.prepared(net, image, None, None)
    plan = replace(plan_in_memory(job, 1 << 30), strip_bytes=10_000)
    monkeypatch.setattr(StreamJob, "plan", lambda *arguments: plan)
    store = distributed.stream(net, image, out=tmp_path / "map.zarr", workers=2)
    single = fcvgg.stream(net, image)
    assert store.complete
    assert np.abs(store.array[:] - single.scores.numpy()).max() <= 1e-12
    assert [row for row, _ in written] == sorted(row for row, _ in written)
    assert len(written) > 4
    assert max(rows for _, rows in written) < store.array.shape[-2] // 2


def test_a_folder_that_another_run_writes_is_refused(net: Any, tmp_path: Path) -> None:
    out = tmp_path / "map.zarr"
    with (
        FileLock(out.with_name(".map.zarr.lock")),
        pytest.raises(FcvggError, match="in use by another run"),
    ):
        distributed.stream(net, photograph(60, 60), out=out)
    assert not out.exists()


def test_an_image_beyond_pillows_limit_is_its_own_error(
    net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    Image.fromarray(photograph(40, 50)).save(file, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    worker = distributed._Classifier(distributed.pack(net), 1, 1, {})
    (tmp_path / "bomb.png").write_bytes(file.getvalue())
    place = os.fsencode(tmp_path / "bomb.png")
    rows = worker(pa.table({"path": [place], "error": [""]})).to_pylist()
    assert "exceeds limit of 1000 pixels" in rows[0]["error"]
    assert rows[0]["path"] == os.fsdecode(place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "workers must be at least 1, got -1"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"threads": 64}, "threads must be at most 2, the cores that Ray has on a machine, got 64"),
    ],
)
def test_workers_that_cannot_be(net: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(FcvggError, match=message):
        distributed.stream(net, photograph(60, 60), **options)
    with pytest.raises(FcvggError, match=message):
        distributed.classify(net, "x", out=tmp_path / "classes", **options)


def test_bad_input(net: Any, tmp_path: Path) -> None:
    with pytest.raises(
        FcvggError, match="average must be 'scores' or 'probabilities', got 'bogus'"
    ):
        distributed.classify(net, "x", out=tmp_path / "classes", average="bogus")
    with pytest.raises(FcvggError, match="paths must name at least one file or folder"):
        distributed.classify(net, [], out=tmp_path / "classes")
    with pytest.raises(FcvggError, match=r"top must be at least 1, got 0"):
        distributed.classify(net, "x", out=tmp_path / "classes", top=0)
    (tmp_path / "classes").mkdir()
    (tmp_path / "classes" / "a.parquet").touch()
    with pytest.raises(FcvggError, match="classes, which holds files; choose another name"):
        distributed.classify(net, "x", out=tmp_path / "classes")


def test_an_interrupted_folder_of_images_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with _write_folder(tmp_path / "classes") as folder:
            (Path(folder) / "part.parquet").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    with _write_folder("s3://bucket/classes") as place:
        assert place == "s3://bucket/classes"


def test_a_folder_without_images(net: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ImageError, match="none"):
        distributed.classify(net, str(tmp_path / "none"), out=tmp_path / "classes")
