"""The local server, with a network of Python behind the page."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import uvicorn
from command_line import run
from PIL import Image
from starlette.testclient import TestClient
from web_browser import Open, check_cell, hover, numbers, rows, shown, text

import fcvgg
from fcvgg.cli import page_data
from fcvgg.cli.page_data import Maps, faster
from fcvgg.demo import demo_photograph
from fcvgg.errors import ArgumentError, ImageError
from fcvgg.viewer import server
from fcvgg.viewer.server import application, listening_socket

UPLOAD = {"content-type": "application/octet-stream"}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return demo_photograph().crop((150, 40, 310, 161))


@pytest.fixture(scope="module")
def maps() -> Maps:
    return Maps(lambda stride: fcvgg.load("demo", output_stride=stride), "demo")


@pytest.fixture(scope="module")
def served(maps: Maps) -> Any:
    return application(maps.network, maps.answer, "demo", "127.0.0.1", limit=200_000)


@pytest.fixture(scope="module")
def address(served: Any) -> Iterator[str]:
    listener = listening_socket("127.0.0.1", 0)
    settings = uvicorn.Config(served, log_level="warning", lifespan="off", ws="none")
    running = uvicorn.Server(settings)
    thread = Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    running.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def client(served: Any) -> TestClient:
    return TestClient(served, base_url="http://127.0.0.1")


def open_image(page: Any, data: bytes, name: str = "photo.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": data})


def test_an_image_is_explored_at_two_scales_and_strides(
    photograph: Image.Image, address: str, open_page: Open
) -> None:
    net = fcvgg.load("demo")
    page = open_page(address)
    open_image(page, png(photograph))
    shown(page)
    expected = net.score_map(photograph, scale=121)
    assert rows(page, "classes") == {name: f"{p:.3f}" for name, p in expected.top(2)}
    hover(page, *expected.geometry.centre_of(6, 9), (121, 160))
    check_cell(page, expected.geometry, (6, 9), (121, 160))
    page.locator("#layer").fill("0")
    assert text(page, "cell-layer") == "features.0: field 3, stride 1"

    page.select_option("#stride", "4")
    dense = fcvgg.load("demo", output_stride=4).score_map(photograph, scale=121)
    page.get_by_text("23 by 33 cells on").wait_for()
    assert rows(page, "classes") == {name: f"{p:.3f}" for name, p in dense.top(2)}

    page.locator("#side").fill("60")
    page.locator("#side").dispatch_event("change")
    page.get_by_text("8 by 12 cells on").wait_for()
    hover(page, 60, 80, (121, 160))
    top, left, bottom, right = numbers(page, "cell-window")
    assert (bottom - top, right - left) == pytest.approx((32 * 121 / 60, 32 * 160 / 79), abs=0.2)


def test_a_broken_or_large_file_is_one_clear_line(
    photograph: Image.Image, address: str, open_page: Open
) -> None:
    page = open_page(address)
    open_image(page, png(photograph)[:300])
    page.wait_for_selector("#error:not([hidden])")
    assert "is a broken image" in text(page, "error")
    assert "\n" not in text(page, "error")
    open_image(page, bytes(300_000))
    page.get_by_text("the file must have at most 0.190735 MB").wait_for()
    open_image(page, png(photograph))
    shown(page)
    assert not page.locator("#error").is_visible()


def test_uploads_are_bounded_and_of_one_kind(client: TestClient, photograph: Image.Image) -> None:
    data = png(photograph)
    assert client.post("/map?side=64", content=data, headers=UPLOAD).status_code == 200
    plain = client.post("/map", content=data, headers={"content-type": "text/plain"})
    assert plain.status_code == 415  # what other sites could send without being asked about
    assert client.post("/map", content=bytes(200_001), headers=UPLOAD).status_code == 413
    for query, message in (
        ("side=0", "side must be a positive integer, got '0'"),
        ("side=99999", "side must be at most 4096 pixels, got 99999"),
        ("stride=3", "stride must be one of 8, 4, 2, 1, got 3"),
    ):
        answer = client.post(f"/map?{query}", content=data, headers=UPLOAD)
        assert answer.status_code == 422
        assert answer.json()["error"] == message


def test_other_names_of_the_loopback_are_not_answered(served: Any) -> None:
    assert TestClient(served, base_url="http://127.0.0.1").get("/").status_code == 200
    assert TestClient(served, base_url="http://elsewhere.example").get("/").status_code == 400


def test_a_stride_that_the_model_cannot_have_is_one_error(photograph: Image.Image) -> None:
    def load(stride: int | None) -> Any:
        if stride is not None:
            raise ArgumentError("no other stride")
        return fcvgg.load("demo")

    maps = Maps(load, "demo")
    assert maps.strides == [8, 4, 2, 1]
    with pytest.raises(ArgumentError, match="no other stride"):
        maps.answer(png(photograph), None, 4)
    assert maps.answer(png(photograph), None, None)["side"] == 121
    with pytest.raises(ImageError):
        maps.answer(b"nothing", None, None)


def test_the_network_that_is_faster_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = fcvgg.load("demo")
    chosen = faster(net)
    used = capsys.readouterr().out
    assert ("the plain network is used" in used) == (chosen is net)


def test_a_taken_port_and_the_end_by_ctrl_c_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run("serve", "demo", "--no-open", "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "--port must be an address that is free" in result.stderr
    assert result.stderr.count("\n") == 1

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "run_server", interrupted)
    monkeypatch.setattr(page_data, "faster", lambda net: net)
    result = run("serve", "demo", "--no-open", "--port", 0)
    assert result.exit_code == 0
    assert "serving demo at http://127.0.0.1:" in result.stdout
    assert "ended" in result.stdout


def test_an_unknown_address_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"--host and --port must be an address that is free"):
        listening_socket("203.0.113.1", 8000)
