"""How a heatmap is shown and written."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib import pyplot as plt
from PIL import Image

import fcvgg
from fcvgg.results.colours import ALPHA, COLOUR_MAP, HELD, OPAQUE_FROM, colour_table, evidence
from fcvgg.results.heatmap import Heatmap

mpl.use("Agg")


@pytest.fixture(autouse=True)
def _close_figures() -> Any:
    yield
    plt.close("all")


def heatmap(image: Image.Image | None = None, *, top: float = 1.0, label: str = "cat") -> Heatmap:
    """Probabilities that rise from left to right, 30 x 51, all but a border covered."""
    values = np.tile(np.linspace(0, top, 51, dtype=np.float32), (30, 1))
    coverage = np.zeros((30, 51), bool)
    coverage[5:25, 10:41] = True
    return Heatmap(values, coverage, label, image)


def photo(colour: Any = (200, 100, 50)) -> Image.Image:
    return Image.new("RGB", (51, 30), colour)


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 51, 3), dtype=np.uint8))


# -- what is drawn --------------------------------------------------------------------------------


def test_the_peak_is_the_highest_covered_pixel() -> None:
    assert heatmap().peak == (5, 40)
    assert repr(heatmap()) == "Heatmap('cat', 30x51, peak 0.800 at (5, 40))"


def test_the_overlay_leaves_the_photograph_where_there_is_nothing() -> None:
    overlay = np.asarray(heatmap(noise(), top=0).overlay())
    grey = np.asarray(noise().convert("L"))
    assert np.array_equal(overlay, np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(overlay, heatmap(noise()).overlay(alpha=0))


def test_the_overlay_grows_opaque_with_the_evidence() -> None:
    white, black = (
        np.asarray(heatmap(photo(colour)).overlay(alpha=0.6), np.float64)[10, 10:41, 0]
        for colour in ("white", "black")
    )
    opacity = 1 - (white - black) / 255  # how much of the photograph is hidden
    rising = evidence(np.linspace(0, 1, 51)[10:41], 0.5) / OPAQUE_FROM
    np.testing.assert_allclose(opacity, 0.6 * np.minimum(rising, 1), atol=0.01)


def test_chance_and_less_show_the_photograph() -> None:
    shown = replace(heatmap(noise()), coverage=np.ones((30, 51), bool))
    overlay, grey = np.asarray(shown.overlay()), np.asarray(noise().convert("L"))
    assert np.array_equal(overlay[:, :26], np.repeat(grey[:, :26, None], 3, 2))  # up to 0.5
    assert (overlay[:, 27:] != grey[:, 27:, None]).any(-1).mean() > 0.99
    many = replace(shown, chance=0.001, values=np.full((30, 51), 0.001, np.float32))
    assert np.array_equal(many.overlay(), overlay[:, :1] * 0 + np.repeat(grey[..., None], 3, 2))


def test_held_values_are_hatched_and_fainter() -> None:
    """Outside the hull most pixels are the photograph's, none has more than half the opacity."""
    certain = replace(heatmap(photo("black"), top=1), values=np.ones((30, 51), np.float32))
    overlay = np.asarray(certain.overlay(), np.float64)[..., 0]
    inside = overlay[certain.coverage]
    assert inside.min() == inside.max() > 100
    outside = overlay[~certain.coverage]
    assert outside.max() <= inside[0] * HELD + 1
    assert 0.3 < (outside > 0).mean() < 0.36


def test_the_photographs_own_colours() -> None:
    shown = heatmap(noise(), top=0)
    assert np.array_equal(shown.overlay(grey=False), noise())
    one, other = (np.asarray(heatmap(photo()).overlay(grey=grey)) for grey in (False, True))
    assert (one[10, 30] != other[10, 30]).any()


def test_the_overlay_at_full_opacity_shows_the_colours() -> None:
    certain = replace(heatmap(noise()), values=np.ones((30, 51), np.float32))
    overlay = np.asarray(certain.overlay(alpha=1, cmap="viridis"))
    assert np.array_equal(overlay[10, 20], np.round(colour_table("viridis")[-1] * 255))


def test_without_an_image_the_colours_stand_alone() -> None:
    overlay = np.asarray(heatmap().overlay())[10, 10:41]
    levels = np.rint(evidence(np.linspace(0, 1, 51)[10:41], 0.5) * 255).astype(int)
    np.testing.assert_allclose(overlay, colour_table()[levels] * 255, atol=1)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK"])
def test_the_overlay_of_any_mode_has_the_images_size(mode: str) -> None:
    overlay = heatmap(photo().convert(mode)).overlay()
    assert (overlay.mode, overlay.size) == ("RGB", (51, 30))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_what_is_no_opacity_is_refused(alpha: float) -> None:
    with pytest.raises(fcvgg.FcvggError, match=r"^alpha must be in \[0, 1\], got "):
        heatmap(photo()).overlay(alpha)


def test_an_unknown_colour_map_is_refused() -> None:
    with pytest.raises(fcvgg.FcvggError, match=r"^cmap must be the name of .*, got .rainbows.$"):
        heatmap(photo()).overlay(cmap="rainbows")


@pytest.mark.parametrize("shown", [None, photo((128, 128, 128))], ids=["alone", "on grey"])
def test_the_colour_bar_shows_the_colours_of_the_plot(shown: Image.Image | None) -> None:
    axes = heatmap(shown).plot()
    bar = axes.figure.axes[1]
    assert bar.get_ylim() == (0, 1)
    assert bar.get_ylabel() == "probability"
    labels = {t.get_text(): t.get_position()[1] for t in bar.get_yticklabels()}
    assert labels == {
        "≤ 0.5": 0,
        "0.75": pytest.approx(np.log2(1.5)),
        "0.9": pytest.approx(np.log2(1.8)),
        "1": 1,
    }
    (mesh,) = (c for c in bar.collections if c.get_array() is not None)
    of_bar = mesh.to_rgba(evidence(np.linspace(0, 1, 51), 0.5))[10:41, :3] * 255
    drawn = np.asarray(axes.images[0].get_array())
    times = drawn.shape[1] // 51
    of_plot = drawn[10 * times, ::times][10:41]
    np.testing.assert_allclose(of_plot, of_bar, atol=3)  # neighbouring levels


def test_the_scale_is_the_same_for_every_heatmap() -> None:
    faint, strong = (replace(heatmap(photo(), top=top), chance=0.01) for top in (0.1, 1))
    assert faint.plot().figure.axes[1].get_ylim() == strong.plot().figure.axes[1].get_ylim()
    faint.values[15, 20], strong.values[15, 20] = 0.05, 0.05
    of_faint, of_strong = (np.asarray(shown.overlay())[15, 20] for shown in (faint, strong))
    assert np.array_equal(of_faint, of_strong)


def test_a_plot_says_what_it_shows_and_marks_hull_and_peak() -> None:
    axes = heatmap(photo()).plot()
    assert axes.get_title() == "cat: 0.80 at (5, 40)"
    assert heatmap(label="").plot().get_title() == "0.80 at (5, 40)"
    (mark,) = axes.lines
    assert mark.get_xydata().tolist() == [[40, 5]]
    (frame,) = axes.patches
    assert frame.get_bbox().bounds == (9.5, 4.5, 31, 20)


def test_a_plot_goes_into_given_axes() -> None:
    _, (left, right) = plt.subplots(1, 2)
    assert heatmap(photo()).plot(right) is right
    assert not left.images


# -- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.tif", "a.webp", "a.bmp"])
def test_save_writes_the_overlay(tmp_path: Path, name: str) -> None:
    shown = heatmap(noise())
    assert shown.save(tmp_path / name) == tmp_path / name
    with Image.open(tmp_path / name) as written:
        assert (written.size, written.mode) == ((51, 30), "RGB")
        if name != "a.webp":  # which loses a little
            assert np.array_equal(written, shown.overlay())


def test_save_writes_a_jpeg_close_to_the_overlay(tmp_path: Path) -> None:
    shown = heatmap(photo())
    shown.save(str(tmp_path / "a.jpg"))
    with Image.open(tmp_path / "a.jpg") as written:
        difference = np.asarray(written, np.float64) - np.asarray(shown.overlay())
    assert np.abs(difference).mean() < 5


@pytest.mark.parametrize("name", ["a.npy", "a.NPY"])
def test_save_writes_the_values(tmp_path: Path, name: str) -> None:
    heatmap().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    values = np.load(tmp_path / name)
    assert values.dtype == np.float32
    assert np.array_equal(values, heatmap().values)


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.py", "a.psd"])
def test_an_ending_that_is_no_image_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(fcvgg.ImageError, match=f"path must be a name in .png.* got '{name}'"):
        heatmap().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(fcvgg.FcvggError, match=r"cannot write .*a\.png: there is no folder"):
        heatmap().save(tmp_path / "absent" / "a.png")


def test_a_folder_of_that_name_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(fcvgg.FcvggError, match=r"cannot write .*a\.png: Is a directory"):
        heatmap().save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(b"old")

    def full_disk(file: Any, *_: Any) -> None:
        file.write(b"half of i")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    monkeypatch.setattr(Image.Image, "save", lambda _, file, kind: full_disk(file, kind))
    with pytest.raises(fcvgg.FcvggError, match=f"cannot write .*{name}: No space left on device"):
        heatmap().save(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


def test_who_reads_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"old")
    with (tmp_path / "a.png").open("rb") as reader:
        heatmap().save(tmp_path / "a.png")
        assert reader.read() == b"old"
    assert (tmp_path / "a.png").stat().st_size > 100


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    written = heatmap().save(tmp_path / "a.png")
    assert written.stat().st_mode == usual.stat().st_mode


def test_a_notebook_shows_the_overlay() -> None:
    shown = heatmap(noise())
    with Image.open(io.BytesIO(shown._repr_png_())) as picture:
        assert picture.format == "PNG"
        assert np.array_equal(picture, shown.overlay())


def test_the_default_colours_rise_in_lightness() -> None:
    """Perceptually uniform: more probability never looks like less."""
    red, green, blue = colormaps[COLOUR_MAP](np.linspace(0, 1, 64))[:, :3].T
    lightness = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    assert (np.diff(lightness) > 0).all()
    assert 0.5 < ALPHA < 1
