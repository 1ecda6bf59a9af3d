"""The page of one map, opened from disk in a browser."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import seeded
from PIL import Image
from torch import nn
from web_browser import Open, check_cell, drawn, hover, numbers, rows, shown, text

import fcvgg
from fcvgg.demo import demo_photograph
from fcvgg.errors import ArgumentError, CategoryError, ImageError
from fcvgg.results.colours import colour_table, evidence, opacity_table
from fcvgg.results.score_map import ScoreMap
from fcvgg.results.web_page import map_data


@pytest.fixture(scope="module")
def score_map() -> ScoreMap:
    """64x80 pixels, 5x7 cells; the receptive field is larger than the window."""
    photograph = demo_photograph().crop((180, 60, 260, 124))
    return fcvgg.load("demo").score_map(photograph)


def classifier(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, classes),
    )


def many_classes(classes: int, size: tuple[int, int]) -> ScoreMap:
    model = seeded(classifier, classes, dtype=torch.float32)
    net = fcvgg.convert(model, input_size=16, preprocess="unit")
    generator = np.random.default_rng(0)
    return net.score_map(generator.integers(0, 255, (*size, 3), dtype=np.uint8))


def test_hovering_a_cell_shows_its_boxes_and_classes(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    probabilities = score_map.probabilities()
    for cell in ((0, 0), (2, 3), (4, 6)):
        y, x = score_map.geometry.centre_of(*cell)
        hover(page, y + 2, x - 3, score_map.image_size)  # the nearest centre decides
        check_cell(page, score_map.geometry, cell, score_map.image_size)
        found = rows(page, "cell-classes")
        for i, name in enumerate(score_map.categories or ()):
            assert float(found[name]) == pytest.approx(float(probabilities[i][cell]), abs=6e-4)


def test_classes_have_their_averages_and_are_chosen(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    expected = {name: f"{p:.3f}" for name, p in score_map.top(2)}
    assert rows(page, "classes") == expected
    assert text(page, "shown") == score_map.top(1)[0][0]
    other = score_map.top(2)[1][0]
    page.get_by_role("radio", name=other).check()
    assert text(page, "shown") == other


OVERLAY = """() => {
  const overlay = document.getElementById("overlay");
  const { width, height } = overlay;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(overlay, 0, 0); // a copy, as repeated reads of one canvas are warned of
  const { data } = context.getImageData(0, 0, width, height);
  const found = []; // the middle one of the seven by seven pixels that show one of the image
  for (let y = 3; y < height; y += 7)
    for (let x = 3; x < width; x += 7)
      found.push(...data.subarray(4 * (y * width + x), 4 * (y * width + x) + 4));
  return found;
}"""


def test_the_map_has_the_colours_of_figures(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    for name in ("face", "background"):
        page.get_by_role("radio", name=name).check()
        found = np.array(page.evaluate(OVERLAY), float).reshape(*score_map.image_size, 4)
        heatmap = score_map.heatmap(name)
        levels = np.round(evidence(heatmap.values, 0.5) * 255).astype(int)
        opacity = opacity_table()[levels] * 255
        inside = heatmap.coverage
        assert inside.any()
        assert not inside.all()
        np.testing.assert_allclose(found[inside][:, 3], opacity[inside], atol=2)
        # premultiplied by a small opacity, a colour is rounded away
        seen = inside & (opacity > 60)
        np.testing.assert_allclose(found[seen][:, :3], colour_table()[levels[seen]] * 255, atol=4)
        held = found[~inside][:, 3]
        assert (held <= opacity[~inside] * 0.5 + 1).all()  # hatched at half the opacity


def test_cells_can_be_drawn_as_squares(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    page.get_by_role("radio", name="face").check()
    page.select_option("#drawn", "cells")
    y, x = (int(n) for n in score_map.geometry.centre_of(1, 2))
    block = page.evaluate(
        "([y, x]) => [...document.getElementById('overlay').getContext('2d')"
        ".getImageData(7 * x - 20, 7 * y - 20, 41, 41).data]",  # seven to one pixel of the image
        [y, x],
    )
    assert len({*map(tuple, np.array(block).reshape(-1, 4).tolist())}) == 1


def test_the_keyboard_moves_pins_and_releases(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    page.locator("#stage").focus()
    page.keyboard.press("ArrowRight")  # the middle cell first
    check_cell(page, score_map.geometry, (2, 3), score_map.image_size)
    for key in ("ArrowUp", "End"):
        page.keyboard.press(key)
    check_cell(page, score_map.geometry, (1, 6), score_map.image_size)
    assert text(page, "spoken").startswith("Cell 1, 6: ")
    page.keyboard.press("Enter")
    assert text(page, "cell-name") == "Cell (1, 6), pinned"
    assert page.locator("#crop").is_visible()
    hover(page, 5, 5, score_map.image_size)
    check_cell(page, score_map.geometry, (1, 6), score_map.image_size)
    page.keyboard.press("Escape")
    assert not page.locator("#cell-facts").is_visible()


def test_a_pinned_cell_shows_the_pixels_of_its_window(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    flat = Image.new("RGB", (80, 64), (10, 20, 30))
    top, left, bottom, right = score_map.geometry.window_of(2, 3)
    flat.paste((200, 100, 50), (left, top, right, bottom))
    page = open_page(fcvgg.load("demo").score_map(flat).save(tmp_path / "map.html"))
    shown(page)
    y, x = score_map.geometry.centre_of(2, 3)
    hover(page, y, x, (64, 80))
    page.mouse.down()
    page.mouse.up()
    crop = page.evaluate(
        "() => { const c = document.getElementById('crop');"
        "return [...c.getContext('2d').getImageData(28, 28, 168, 168).data]; }"
    )
    inner = np.array(crop).reshape(-1, 4)[:, :3]
    np.testing.assert_allclose(inner, np.broadcast_to([200, 100, 50], inner.shape), atol=12)


def test_the_layer_slider_shows_receptive_fields(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    table = fcvgg.receptive_fields(fcvgg.load("demo"))
    y, x = score_map.geometry.centre_of(2, 3)
    hover(page, y, x, score_map.image_size)
    areas = []
    for i, row in enumerate(table[:9]):  # the convolutions and pools
        page.locator("#layer").fill(f"{i}")
        top, left, bottom, right = drawn(page, "layer")
        assert (bottom - top, right - left) == row.receptive_field
        assert (top - row.offset[0]) % row.output_stride[0] == 0
        assert abs((top + bottom - 1) / 2 - y) <= row.output_stride[0] / 2
        assert f"field {row.receptive_field[0]}, stride {row.output_stride[0]}" in text(
            page, "cell-layer"
        )
        areas.append(bottom - top)
    assert areas == sorted(areas)
    assert page.locator("#boxes .earlier").count() == 8


def test_a_search_finds_one_of_a_thousand(tmp_path: Path, open_page: Open) -> None:
    score_map = many_classes(1000, (40, 40))
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    assert len(rows(page, "classes")) == 60
    assert text(page, "more") == "940 more; search to find them."
    page.get_by_role("searchbox", name="Search the classes").fill("77")
    assert len(rows(page, "classes")) == 19  # 77, 177, 277, ..., 770 to 779
    page.get_by_role("searchbox").fill("nothing")
    assert text(page, "more") == "No class has such a name."


def test_a_rescaled_map_refers_to_pixels_of_the_image(tmp_path: Path, open_page: Open) -> None:
    photograph = demo_photograph().crop((180, 60, 340, 188))
    score_map = fcvgg.load("demo").score_map(photograph, scale=64)
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    hover(page, 2 * 15.5, 2 * 23.5, (128, 160))
    assert numbers(page, "cell-window") == (0, 16, 64, 80)


def test_an_image_below_the_window_is_padded(tmp_path: Path, open_page: Open) -> None:
    score_map = fcvgg.load("demo").score_map(demo_photograph().crop((180, 60, 200, 90)))
    page = open_page(score_map.save(tmp_path / "map.html"))
    shown(page)
    hover(page, 10, 10, (30, 20))
    assert numbers(page, "cell-window") == score_map.geometry.window_of(0, 0) == (-1, -6, 31, 26)


def test_a_map_without_image_or_with_gaps_is_shown(tmp_path: Path, open_page: Open) -> None:
    pixels = torch.zeros(3, 64, 80)
    pixels[:, 0, 0] = torch.nan
    page = open_page(fcvgg.load("demo").score_map(pixels).save(tmp_path / "map.html"))
    shown(page)
    hover(page, 15, 15, (64, 80))
    assert set(rows(page, "cell-classes").values()) == {"no data"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_leaves_a_small_screen(
    scheme: str, score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    screen = {"width": 390, "height": 844}
    saved = score_map.save(tmp_path / "map.html")
    page = open_page(saved, viewport=screen, color_scheme=scheme, has_touch=True)
    shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    box = page.locator("#stage").bounding_box()
    assert box is not None
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert text(page, "cell-name").endswith(", pinned")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")


def test_names_cannot_break_the_page(score_map: ScoreMap, tmp_path: Path, open_page: Open) -> None:
    net = fcvgg.load("demo", categories=["</script><script>alert(1)</script>", "<b>&amp;"])
    page = open_page(net.score_map(demo_photograph(), scale=64).save(tmp_path / "map.html"))
    shown(page)
    assert {*rows(page, "classes")} == {"</script><script>alert(1)</script>", "<b>&amp;"}


def test_a_notebook_shows_the_page_in_a_frame(
    score_map: ScoreMap, tmp_path: Path, open_page: Open
) -> None:
    cell = score_map.show(height=500)._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<html data-ready='yes'>{cell}</html>", "utf-8")
    page = open_page(tmp_path / "notebook.html")
    frame = page.frame_locator("iframe")
    frame.locator("#explorer").wait_for()
    assert frame.locator("#shown").inner_text() == score_map.top(1)[0][0]
    assert page.locator("iframe").bounding_box()["height"] == 500  # type: ignore[index]


# -- without a browser ----------------------------------------------------------------------------


def test_probabilities_survive_packing(score_map: ScoreMap) -> None:
    data = map_data(score_map)
    codes = zlib.decompress(base64.b64decode(data["packed"]["codes"]))
    high, low = np.frombuffer(codes, np.uint8).reshape(2, -1).astype(int)
    restored = np.exp(((high * 256 + low - 1) / 16382 - 1) * data["packed"]["span"])
    expected = score_map.probabilities().numpy().reshape(-1)
    np.testing.assert_allclose(restored, expected, rtol=5e-4, atol=1e-3)


def test_a_photograph_of_512_pixels_takes_less_than_a_megabyte(tmp_path: Path) -> None:
    score_map = many_classes(1000, (512, 512))  # noise, the worst that there is: 125x125 cells
    path = score_map.save(tmp_path / "map.html")
    assert path.stat().st_size < 1_000_000
    data = map_data(score_map)
    assert 1 <= len(data["classes"]) < data["total"] == 1000
    peaks = score_map.probabilities().amax((1, 2))
    assert set(data["classes"]) == set(peaks.topk(len(data["classes"])).indices.tolist())


def test_chosen_classes_are_held(score_map: ScoreMap, tmp_path: Path) -> None:
    assert map_data(score_map, ["face"])["names"] == ["face"]
    with pytest.raises(CategoryError):
        score_map.save(tmp_path / "map.html", classes=["dog"])
    with pytest.raises(ArgumentError, match=r"classes must be one or more whose .*, got 0 of 35"):
        score_map.save(tmp_path / "map.html", classes=[])


def test_other_endings_and_empty_maps_are_refused(score_map: ScoreMap, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"path must be a name in .html, .*, got 'map'"):
        score_map.save(tmp_path / "map")
    nothing = fcvgg.load("demo").score_map(torch.full((3, 40, 40), torch.nan))
    with pytest.raises(ImageError, match="must have a cell with data"):
        nothing.save(tmp_path / "map.html")
