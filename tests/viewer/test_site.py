"""The static site, on which the network runs in the browser."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from command_line import run
from nets import seeded
from PIL import Image
from playwright.sync_api import Page
from torch import nn
from web_browser import Open, check_cell, hover, rows, shown, text

import fcvgg
from fcvgg.demo import demo_photograph
from fcvgg.images.preprocessing import INTERPOLATIONS, Preprocess
from fcvgg.viewer import site as viewer_site
from fcvgg.viewer.site import fetched_runtime


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module", autouse=True)
def npm() -> Iterator[None]:
    """The runtime is fetched once."""
    if shutil.which("npm") is None:  # a skip would hide that the site is not tested
        pytest.fail("the site's runtime comes from npm: apt-get install npm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(viewer_site, "fetched_runtime", cache(fetched_runtime))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site of an exported file, in a folder that held another file."""
    place = tmp_path_factory.mktemp("demo")
    fcvgg.load("demo").export(place / "demo.onnx")
    (place / "site").mkdir()
    (place / "site" / "CNAME").write_text("kept")
    result = run("page", place / "demo.onnx", "-o", place / "site")
    assert result.exit_code == 0, result.output
    assert "model.onnx: checked at" in result.output
    return place / "site"


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[str]:
    with serving(folder) as url:
        yield url


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def open_image(page: Page, data: bytes, name: str = "photo.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


COMPUTE = """async ([data, side]) => {
  const file = new Blob([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))]);
  const network = JSON.parse(document.getElementById("data").textContent);
  const worker = (window.worker ??= new Worker("worker.js", { type: "module" }));
  const { port1, port2 } = new MessageChannel();
  const found = await new Promise((resolve) => {
    port1.onmessage = ({ data }) => data.progress || resolve(data);
    worker.postMessage({ file, side, network }, [port2]);
  });
  return { ...found, scores: found.scores && [...found.scores] };
}"""


def computed(page: Page, data: bytes, side: int | None) -> dict[str, Any]:
    """What the worker gives for a file."""
    return page.evaluate(COMPUTE, [base64.b64encode(data).decode(), side])


def scores_of(found: dict[str, Any]) -> torch.Tensor:
    assert "error" not in found, found
    return torch.tensor(found["scores"]).reshape(found["classes"], *found["cells"])


# -- scores ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return demo_photograph().crop((150, 40, 310, 161))


def test_logits_are_those_of_python_at_every_scale(
    photograph: Image.Image, site: str, open_page: Open
) -> None:
    page = open_page(site)
    net = fcvgg.load("demo")
    tall = photograph.crop((40, 0, 75, 121))
    for image, sides in (
        (photograph, (20, 32, 77, 121, 200)),
        (tall, (32, 40)),
        (tall.rotate(90), (33,)),
    ):
        for side in sides:
            found = computed(page, file_of(image), side)
            expected = net.score_map(image, scale=side).scores
            torch.testing.assert_close(scores_of(found), expected, rtol=1e-5, atol=1e-5)


KINDS = {
    "grey": lambda image: file_of(image.convert("L")),
    "grey with alpha": lambda image: file_of(_faded(image).convert("LA")),
    "alpha": lambda image: file_of(_faded(image)),
    "palette": lambda image: file_of(image.quantize(64)),
    "one bit": lambda image: file_of(image.convert("1")),
    "lying on its side": lambda image: file_of(image, exif=_turned()),
    "jpeg": lambda image: file_of(image, "JPEG", quality=95),
    "webp": lambda image: file_of(image, "WEBP", lossless=True),
}


def _faded(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    alpha = np.full((image.height, image.width), 255, np.uint8)
    alpha[:, :60], alpha[:, 60:90] = 0, 140
    image.putalpha(Image.fromarray(alpha))
    return image


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_files_of_every_kind_are_read_as_in_python(
    photograph: Image.Image, site: str, open_page: Open, tmp_path: Path
) -> None:
    page = open_page(site)
    net = fcvgg.load("demo")
    for kind, write in KINDS.items():
        data = write(photograph)
        found = computed(page, data, 64)
        (tmp_path / "image").write_bytes(data)
        expected = net.score_map(tmp_path / "image", scale=64)
        assert tuple(found["image_size"]) == expected.image_size, kind
        # partly transparent pixels are rounded otherwise, and decoders of JPEG differ by one level
        exact = kind in ("grey", "palette", "one bit", "lying on its side", "webp")
        tolerance = 1e-5 if exact else 0.1
        torch.testing.assert_close(
            scores_of(found), expected.scores, rtol=tolerance, atol=tolerance, msg=kind
        )


def grey_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(64, 3)
    )


@pytest.mark.parametrize(
    ("model", "preprocess"),
    [
        (grey_classifier, Preprocess((0.4,), (0.3,), interpolation="bicubic")),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 3), nn.LogSoftmax(1)
            ),
            Preprocess((103.9, 116.8, 123.7), (1, 2, 3), 1.0, "BGR", interpolation="lanczos"),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(784, 3), nn.Sigmoid()
            ),
            Preprocess((0.5,) * 4, (0.5,) * 4, interpolation="nearest"),
        ),
    ],
    ids=["grey", "BGR", "four channels"],
)
def test_other_channels_and_preprocessing(
    model: Any, preprocess: Preprocess, tmp_path: Path, open_page: Open
) -> None:
    net = fcvgg.convert(
        seeded(model, dtype=torch.float32), input_size=16, preprocess=preprocess, categories="abc"
    )
    net.save(tmp_path / "net")
    assert run("page", tmp_path / "net", "-o", tmp_path / "site").exit_code == 0
    image = demo_photograph().crop((200, 60, 260, 100))
    with serving(tmp_path / "site") as url:
        page = open_page(url)
        found = computed(page, file_of(image), 25)
        expected = net.score_map(image, scale=25)
        torch.testing.assert_close(scores_of(found), expected.scores, rtol=2e-5, atol=2e-5)
        open_image(page, file_of(image))
        shown(page)
        usual = net.score_map(image, scale=40)
        averages = {name: f"{p:.3f}" for name, p in usual.top(3)}
        assert rows(page, "classes") == averages


SIZES = (
    ((37, 53), (16, 23)),
    ((37, 53), (37, 20)),
    ((20, 30), (61, 91)),
    ((97, 101), (96, 100)),
    ((90, 31), (40, 14)),  # Pillow 13 takes the columns of tall images first
    ((155, 31), (155, 20)),
    ((155, 31), (60, 40)),
    ((300, 11), (27, 1)),
    ((40, 300), (3, 25)),
)


RESAMPLE = """async (cases) => {
  const { resized } = await import("./resampling.js");
  return cases.map(([pixels, ...rest]) => {
    const found = resized(Uint8ClampedArray.from(atob(pixels), (c) => c.charCodeAt(0)), ...rest);
    return btoa(Array.from(found, (value) => String.fromCharCode(value)).join(""));
  });
}"""


def test_resampling_is_pillows_to_the_last_bit(site: str, open_page: Open) -> None:
    page = open_page(f"{site}resampling.js", ready=False)  # without the page's policy
    generator = np.random.default_rng(0)
    release = int(PIL.__version__.split(".")[0])
    cases, expected = [], []
    for interpolation, filtered in INTERPOLATIONS.items():
        for (height, width), (h, w) in SIZES:
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            pixels[: height // 2] = np.where(pixels[: height // 2] > 127, 255, 0)  # overshoots
            data = base64.b64encode(pixels.tobytes()).decode()
            cases.append([data, [height, width], [h, w], 3, interpolation, release])
            expected.append(Image.fromarray(pixels).resize((w, h), filtered).tobytes())
    for case, found, wanted in zip(cases, page.evaluate(RESAMPLE, cases), expected):
        assert base64.b64decode(found) == wanted, case[1:]


# -- the page -------------------------------------------------------------------------------------


def test_an_image_is_computed_and_explored(
    photograph: Image.Image, site: str, open_page: Open
) -> None:
    net = fcvgg.load("demo")
    page = open_page(site)
    open_image(page, file_of(photograph))
    shown(page)
    expected = net.score_map(photograph, scale=121)
    assert rows(page, "classes") == {name: f"{p:.3f}" for name, p in expected.top(2)}
    geometry = expected.geometry
    for cell in ((0, 0), (6, 9)):
        hover(page, *geometry.centre_of(*cell), photograph.size[::-1])
        check_cell(page, geometry, cell, photograph.size[::-1])
        found = rows(page, "cell-classes")
        for i, name in enumerate(net.categories or ()):
            assert found[name] == f"{float(expected.probabilities()[i][cell]):.3f}"
    page.locator("#layer").fill("0")
    assert text(page, "cell-layer") == "features.0: field 3, stride 1"


def test_another_scale_is_computed(photograph: Image.Image, site: str, open_page: Open) -> None:
    page = open_page(site)
    open_image(page, file_of(photograph))
    shown(page)
    for side in ("90", "64"):  # the second is asked for while the first is computed
        page.locator("#side").fill(side)
        page.locator("#side").dispatch_event("change")
    expected = fcvgg.load("demo").score_map(photograph, scale=64)
    h, w = expected.scores.shape[1:]
    page.get_by_text(f"{h} by {w} cells on").wait_for()
    assert rows(page, "classes") == {name: f"{p:.3f}" for name, p in expected.top(2)}


def test_a_broken_file_is_one_clear_line(
    photograph: Image.Image, site: str, open_page: Open
) -> None:
    page = open_page(site)
    open_image(page, file_of(photograph)[:300], "broken.png")
    page.wait_for_selector("#error:not([hidden])")
    assert (
        text(page, "error")
        == "broken.png is not an image that this browser can read; convert it to PNG or JPEG"
    )
    open_image(page, file_of(photograph))  # and the page goes on
    shown(page)
    assert not page.locator("#error").is_visible()


def test_a_network_that_the_browser_cannot_run_is_one_clear_line(
    photograph: Image.Image, site: str, open_page: Open
) -> None:
    page = open_page(site)
    page.context.route("**/model.onnx", lambda route: route.fulfill(body=b"no network"))
    open_image(page, file_of(photograph))
    page.wait_for_selector("#error:not([hidden])")
    assert text(page, "error").startswith("the browser cannot run this network of 1 MB, perhaps")
    assert "use fcvgg serve" in text(page, "error")


# -- the command ----------------------------------------------------------------------------------


def test_a_folder_becomes_a_site_and_keeps_its_other_files(folder: Path) -> None:
    assert (folder / "CNAME").read_text() == "kept"
    assert {path.name for path in folder.iterdir()} == {"CNAME", *viewer_site.FILES}
    page = (folder / "index.html").read_text()
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0])
    assert data["names"] == ["background", "face"]


def test_without_npm_or_network_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer_site, "fetched_runtime", fetched_runtime)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run("page", "demo", "-o", tmp_path / "site")
    assert result.exit_code == 2
    assert "npm must be installed to fetch onnxruntime-web@" in result.stderr
    assert result.stderr.count("\n") == 1

    def offline(command: Any, **_: Any) -> None:
        lines = "npm error code ENOTFOUND\nnpm error syscall getaddrinfo\n"
        raise subprocess.CalledProcessError(1, command, stderr=lines)

    monkeypatch.setattr(subprocess, "run", offline)
    result = run("page", "demo", "-o", tmp_path / "site")
    assert result.exit_code == 2
    assert "got: error code ENOTFOUND; connect to the network" in result.stderr
    assert not (tmp_path / "site").exists()


def test_networks_that_cannot_be_shown_are_refused(tmp_path: Path) -> None:
    model = seeded(grey_classifier, dtype=torch.float32)
    fcvgg.convert(model, input_size=16).save(tmp_path / "bare")
    result = run("page", tmp_path / "bare", "-o", tmp_path / "site")
    assert result.exit_code == 2
    assert "the network's preprocessing is unknown" in result.stderr
    fcvgg.convert(model, input_size=16, activation="values", preprocess="unit").save(
        tmp_path / "values"
    )
    result = run("page", tmp_path / "values", "-o", tmp_path / "site")
    assert result.exit_code == 2
    assert "the network's scores are values" in result.stderr
