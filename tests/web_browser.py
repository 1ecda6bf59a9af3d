"""A real browser, and what its pages show, read as their user reads it.

Pages may talk to their own host alone and must raise no error.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from fcvgg.geometry import Box, Geometry

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

Open = Callable[..., Page]
"""Opens a URL in a new window; keywords are options of playwright's ``new_page``."""


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, NAMES)), playwright.chromium.executable_path)
        if not os.path.exists(found):  # a skip would hide that the page is not tested
            pytest.fail("the page is tested in Chromium: apt-get install chromium")
        browser = playwright.chromium.launch(executable_path=found, args=[*FLAGS])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    pages, problems, hosts = [], [], set()

    def opened(url: str | Path, ready: bool = True, **options: Any) -> Page:
        page = browser.new_page(**options)
        pages.append(page)
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(url.as_uri() if isinstance(url, Path) else url)
        if ready:
            page.wait_for_selector("html[data-ready]")
        return page

    yield opened
    own = {urlsplit(page.url).netloc for page in pages}
    for page in pages:
        page.context.close()
    # a refused upload is an error status, which Chromium writes to the console
    assert [text for text in problems if "Failed to load resource" not in text] == []
    assert {host for host in hosts if host} <= own


# -- what a page shows -----------------------------------------------------------------------------


def shown(page: Page) -> None:
    """Wait for a map."""
    page.wait_for_selector("#explorer:not([hidden])", timeout=60_000)


def hover(page: Page, y: float, x: float, size: tuple[int, int]) -> None:
    """Move the mouse to a point of the image, a pixel index."""
    stage = page.locator("#stage")
    stage.scroll_into_view_if_needed()
    box = stage.bounding_box()
    assert box is not None
    page.mouse.move(
        box["x"] + (x + 0.5) / size[1] * box["width"],
        box["y"] + (y + 0.5) / size[0] * box["height"],
    )


def text(page: Page, name: str) -> str:
    return page.locator(f"#{name}").inner_text()


def numbers(page: Page, name: str) -> Box:
    top, left, bottom, right = (float(n) for n in text(page, name).split(","))
    return top, left, bottom, right  # type: ignore[return-value]


def drawn(page: Page, kind: str) -> tuple[float, ...]:
    """A drawn box ``(top, left, bottom, right)`` in pixels of the image."""
    rect = page.locator(f"#boxes .{kind}").last
    x, y, width, height = (
        float(rect.get_attribute(n) or "nan") for n in ("x", "y", "width", "height")
    )
    return y, x, y + height, x + width


def rows(page: Page, name: str) -> dict[str, str]:
    """The classes of a list, with their probabilities as they are written."""
    found: list[Any] = page.locator(f"#{name} .class").all()
    return {row.locator("span").inner_text(): row.locator("b").inner_text() for row in found}


def check_cell(page: Page, geometry: Geometry, cell: tuple[int, int], size: Any) -> None:
    """The cell that is looked at has the boxes of the geometry, in text and as drawn."""
    assert text(page, "cell-name").startswith(f"Cell ({cell[0]}, {cell[1]})")
    assert numbers(page, "cell-window") == geometry.window_of(*cell) == drawn(page, "window")
    assert numbers(page, "cell-field") == geometry.receptive_field_of(*cell) == drawn(page, "field")
    touches = bool(geometry.touches_padding(size)[cell])
    expected = "touches padding" if touches else "sees no padding"
    assert text(page, "cell-padding") == expected
