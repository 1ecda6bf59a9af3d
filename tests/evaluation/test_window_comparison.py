"""The dense map against crops: equal without padding; with it, by how many sides are inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import (
    GlobalPooled,
    Headed,
    SmallVGG,
    Unpadded,
    images,
    relative_error,
    seeded,
    sliding_window,
)
from torch import nn

import fcvgg
from fcvgg.evaluation.window_comparison import _rank_correlation, _ranks


@pytest.mark.parametrize("size", [(61, 50), (34, 34), (90, 35)])
def test_an_unpadded_net_has_no_error_anywhere(size: tuple[int, int]) -> None:
    model = seeded(Unpadded)
    net = fcvgg.convert(model)
    result = fcvgg.compare_windows(model, net, images(3, *size))
    assert result.error.shape == net.output_size(size)
    assert result.error.max() <= 1e-12
    assert result.top1_agreement.all()
    np.testing.assert_allclose(result.rank_agreement, 1, atol=1e-12)


def test_an_unpadded_net_with_a_native_size_beyond_its_window_has_no_error() -> None:
    model = seeded(Unpadded)
    net = fcvgg.convert(model, input_size=35)
    assert net.geometry.window == (28, 28)
    result = fcvgg.compare_windows(model, net, images(3, 60, 60))
    assert result.error.max() <= 1e-12
    # windows of 28 start at 0, 8, ..., 32, crops of 35 leave the image from 25 on
    assert result.outside[-1].all()
    assert result.outside[:, -1].all()
    assert not result.outside[:-1, :-1].any()
    assert [row.label for row in result.by_sides()] == ["2", "3", "4", "outside"]


def test_finer_strides_of_an_unpadded_net_have_no_error() -> None:
    model = seeded(Unpadded)
    net = fcvgg.convert(model, output_stride=2)
    assert fcvgg.compare_windows(model, net, images(3, 47, 42)).error.max() <= 1e-12


@torch.no_grad()
def test_crops_and_errors_equal_the_sliding_window() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model)
    image = images(1, 3, 48, 57)
    result = fcvgg.compare_windows(model, net, image)
    expected = sliding_window(model, net, image)[0]
    assert relative_error(expected, result.crops.scores) <= 1e-12
    difference = (expected - net(image)[0]).abs().amax(0) / expected.abs().max()
    np.testing.assert_allclose(result.error, difference.numpy(), atol=1e-12)
    same = expected.argmax(0) == net(image)[0].argmax(0)
    np.testing.assert_array_equal(result.top1_agreement, same.numpy())


def test_the_sides_that_lie_inside_are_counted() -> None:
    model = seeded(SmallVGG)
    result = fcvgg.compare_windows(model, fcvgg.convert(model), images(3, 40, 42))
    # windows start at 0, 4, 8; they end at 40 of 40 rows and 40 of 42 columns
    np.testing.assert_array_equal(result.sides_inside, [[2, 3, 3], [3, 4, 4], [2, 3, 3]])
    rows = result.by_sides()
    assert [(row.label, row.cells) for row in rows] == [("2", 2), ("3", 5), ("4", 2)]
    assert not result.outside.any()
    for row in rows:
        chosen = result.error[result.sides_inside == int(row.label)]
        assert row.max_error == chosen.max()
        assert row.mean_error == pytest.approx(chosen.mean(), rel=1e-12)
    assert result.overall().cells == 9
    assert result.overall().max_error == result.error.max()


@pytest.mark.parametrize("build", [SmallVGG, GlobalPooled])
def test_padding_makes_errors_only_where_sides_are_inside(build: type[nn.Module]) -> None:
    model = seeded(build)
    net = fcvgg.convert(model, input_size=32)
    alone = fcvgg.compare_windows(model, net, images(3, 32, 32))
    assert alone.sides_inside.max() == 0
    assert alone.error.max() <= 1e-12
    result = fcvgg.compare_windows(model, net, images(3, 72, 72))
    assert {"2", "3", "4"} <= {row.label for row in result.by_sides()}
    assert all(row.max_error > 1e-3 for row in result.by_sides())


def test_same_padding_is_proved_at_the_middle_only() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model, padding="same")
    result = fcvgg.compare_windows(model, net, images(3, 32, 32))
    assert result.error.shape == (8, 8)
    assert result.error[net.native_cell] <= 1e-12
    assert result.error.max() > 1e-3
    assert result.outside.sum() == 63
    assert [row.cells for row in result.by_sides()] == [1, 63]


def test_an_image_below_the_window_is_padded_alike() -> None:
    model = seeded(SmallVGG)
    result = fcvgg.compare_windows(model, fcvgg.convert(model), images(3, 20, 45))
    assert result.error.shape == (1, 4)
    # rows: the crop's zeros are the image's own padding; columns differ
    alone = fcvgg.compare_windows(model, fcvgg.convert(model), images(3, 20, 25))
    assert alone.error.max() <= 1e-12
    assert alone.sides_inside.max() == 0
    assert not alone.outside.any()


def test_several_outputs() -> None:
    from nets import Lambda

    model = seeded(
        Headed,
        Lambda(
            lambda x, a, b: (a(x.flatten(1)), b(x.flatten(1))),
            *(nn.Linear(288, 5), nn.Linear(288, 3)),
        ),
    )
    net = fcvgg.convert(model)
    result = fcvgg.compare_windows(model, net, images(3, 24, 24), output=1)
    assert result.crops.scores.shape == (3, 1, 1)
    assert result.error.max() <= 1e-12


def test_one_class_has_no_ranks() -> None:
    model = seeded(Headed, nn.Sequential(nn.Flatten(), nn.Linear(288, 1)))
    result = fcvgg.compare_windows(model, fcvgg.convert(model), images(3, 24, 24))
    assert np.isnan(result.rank_agreement).all()
    assert result.top1_agreement.all()
    assert "nan" in str(result)


def test_ranks_share_ties_and_correlate_as_spearman() -> None:
    values = np.array([[3.0, 1], [1, 1], [2, 1], [3, 0]])
    np.testing.assert_array_equal(_ranks(values), [[3.5, 3], [1, 3], [2, 3], [3.5, 1]])
    rng = np.random.default_rng(0)
    a, b = rng.permutation(7.0 * np.arange(9)), rng.permutation(np.arange(9.0) ** 3)
    places = [np.array([(x > y) for y in v for x in v]).reshape(9, 9).sum(0) for v in (a, b)]
    expected = 1 - 6 * ((places[0] - places[1]) ** 2).sum() / (9 * (81 - 1))
    got = _rank_correlation(a[:, None, None], b[:, None, None])
    np.testing.assert_allclose(got, expected, atol=1e-12)
    np.testing.assert_allclose(_rank_correlation(a[:, None], -a[:, None]), -1, atol=1e-12)


def test_the_modes_are_kept_and_it_prints() -> None:
    model = seeded(SmallVGG).train()
    net = fcvgg.convert(model)
    result = fcvgg.compare_windows(model, net, images(3, 40, 40), progress=True)
    assert model.training
    assert net.training
    lines = str(result).splitlines()
    assert lines[0].startswith("sides inside  cells  max error")
    assert [line.split()[0] for line in lines[1:-1]] == ["2", "3", "4", "all"]


def test_the_figure_shows_both_maps_the_errors_and_the_sides() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model, preprocess=fcvgg.Preprocess((0.5,) * 3, (0.2,) * 3))
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    for image in (picture, images(3, 32, 32)):
        figure = fcvgg.compare_windows(model, net, image).plot(1)
        figure.draw_without_rendering()
        titles = [ax.get_title() for ax in figure.axes[:4]]
        assert titles[:2] == ["model on every window: class 1", "dense map: class 1"]
    with pytest.raises(fcvgg.CategoryError, match=r"class must be an index .*, got 7"):
        fcvgg.compare_windows(model, net, images(3, 32, 32)).plot(7)


def test_cells_without_data_are_not_compared() -> None:
    model = seeded(Unpadded)
    image = images(3, 61, 50)
    image[..., 5, 7] = torch.nan
    with pytest.raises(fcvgg.ImageError, match=r"^image must have finite pixels .* 1 of 15 cells"):
        fcvgg.compare_windows(model, fcvgg.convert(model), image)
