"""Figures of a score map: what is drawn where."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import fcvgg
from fcvgg.results.figures import save_figure, side_by_side


@pytest.fixture(scope="module")
def net():
    return fcvgg.load("demo")


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def cells_of(figure):
    """The drawn cells: the second picture of the second panel, over the faded image."""
    return figure.axes[1].images[1]


@pytest.mark.parametrize("scale", [None, 40, 120])
def test_cells_are_drawn_around_their_centres(net, image, scale):
    score_map = net.score_map(image, scale=scale)
    cells = cells_of(side_by_side(score_map, "face"))
    rows, cols = score_map.scores.shape[1:]
    assert np.array_equal(cells.get_array(), score_map.scores[1].numpy())
    left, right, bottom, top = cells.get_extent()
    factor = image.height / score_map.input_size[0]
    for row, col in ((0, 0), (rows - 1, cols - 1)):
        y, x = score_map.geometry.centre_of(row, col)
        drawn = (
            top + (row + 0.5) * (bottom - top) / rows,
            left + (col + 0.5) * (right - left) / cols,
        )
        assert drawn[0] == pytest.approx((y + 0.5) * factor - 0.5)
        assert drawn[1] == pytest.approx((x + 0.5) * image.width / score_map.input_size[1] - 0.5)


def test_panels_show_the_whole_image(net, image):
    figure = side_by_side(net.score_map(image))
    for ax in figure.axes[:3]:
        assert ax.get_xlim() == (-0.5, 89.5)
        assert ax.get_ylim() == (59.5, -0.5)


def test_titles_say_what_is_shown(net, image):
    figure = side_by_side(net.score_map(image, scale=40), "face")
    assert [ax.get_title() for ax in figure.axes[:3]] == [
        "photograph: 60 x 90 pixels",
        "score map: 2 x 4 cells at 40 x 60 pixels",
        "heatmap: probability of 'face'",
    ]


def test_the_top_class_is_shown_by_default(net, image):
    score_map = net.score_map(image)
    drawn = cells_of(side_by_side(score_map)).get_array()
    assert np.array_equal(drawn, score_map.scores[int(score_map.predict().argmax())].numpy())


def test_a_score_map_without_an_image_is_refused(net):
    with pytest.raises(
        fcvgg.ImageError, match="must have an image to show, got one made from a tensor"
    ):
        side_by_side(net.score_map(torch.zeros(3, 40, 40)))


def test_a_figure_is_written_as_its_name_says(net, image, tmp_path):
    figure = side_by_side(replace(net.score_map(image), categories=None))
    for name in ("figure.png", "figure.svg"):
        assert save_figure(figure, tmp_path / name) == tmp_path / name
    with Image.open(tmp_path / "figure.png") as written:
        assert written.width > written.height
    with pytest.raises(fcvgg.FcvggError, match="there is no folder"):
        save_figure(figure, tmp_path / "absent" / "figure.png")
