"""Score maps: resampling against a slow oracle, and what the scores are taken for."""

from __future__ import annotations

from math import floor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fcvgg
from fcvgg.geometry import IMAGE, Axis, Geometry, KernelGeometry, Step
from fcvgg.results.score_map import ScoreMap


def axis(window: int = 32, stride: int = 8, padding: int = 0) -> Axis:
    return Axis((Step(KernelGeometry(window, stride, before=padding, after=padding), (IMAGE,)),))


def score_map(cells: tuple[int, int], classes: int = 3, **changes: object) -> ScoreMap:
    """Noise in the cells of a window of 32 pixels at stride 8."""
    generator = torch.Generator().manual_seed(0)
    size = (24 + 8 * cells[0] + 3, 24 + 8 * cells[1] + 5)  # and rows that no cell sees
    values: dict = {
        "scores": torch.randn(classes, *cells, generator=generator, dtype=torch.float64),
        "geometry": Geometry(axis(), axis()),
        "image_size": size,
        "input_size": size,
    }
    return ScoreMap(**{**values, **changes})


def classifier(classes: int, *ending: nn.Module) -> nn.Module:
    """Two outputs of 16 features over a window of 8, float64, seeded."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, classes), *ending).double().eval()


def image(*size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, *(size or (20, 24)), generator=generator, dtype=torch.float64)


# -- resampling -----------------------------------------------------------------------------------


def resampled_slowly(score_map: ScoreMap, size: tuple[int, int]) -> Tensor:
    """Every pixel by itself: bilinear between the four nearest centres, the edge held outside."""
    classes, *cells = score_map.scores.shape
    result = torch.empty(classes, *size, dtype=torch.float64)
    for y in range(size[0]):
        for x in range(size[1]):
            corners = []
            for i, pixel in enumerate((y, x)):
                axis = score_map.geometry.axes[i]
                point = (pixel + 0.5) * score_map.input_size[i] / size[i] - 0.5
                place = (point - axis.centre_of(0)) / axis.stride
                place = min(max(place, 0), cells[i] - 1)
                low = min(floor(place), cells[i] - 1)
                high = min(low + 1, cells[i] - 1)
                corners.append(((low, 1 - (place - low)), (high, place - low)))
            result[:, y, x] = sum(
                weight_y * weight_x * score_map.scores[:, row, col]
                for row, weight_y in corners[0]
                for col, weight_x in corners[1]
            )
    return result


@pytest.mark.parametrize("cells", [(1, 1), (1, 4), (3, 2), (4, 5)], ids=str)
@pytest.mark.parametrize("size", [None, (32, 40), (9, 70)], ids=str)
def test_resample_equals_the_slow_oracle(cells: tuple[int, int], size: tuple | None) -> None:
    made = score_map(cells)
    got = made.resample(size)
    torch.testing.assert_close(
        got, resampled_slowly(made, size or made.image_size), rtol=1e-12, atol=1e-12
    )


def test_resample_equals_the_slow_oracle_when_the_input_was_resized() -> None:
    made = score_map((3, 4), image_size=(37, 41))
    torch.testing.assert_close(
        made.resample(), resampled_slowly(made, (37, 41)), rtol=1e-12, atol=1e-12
    )


def test_resample_equals_the_slow_oracle_below_the_window() -> None:
    placed = Geometry(axis(padding=3), axis()).placed((10, 21))
    made = score_map((1, 1), geometry=placed, image_size=(10, 21), input_size=(10, 21))
    torch.testing.assert_close(made.resample(), resampled_slowly(made, (10, 21)), rtol=0, atol=0)


def test_resample_gives_each_cell_at_its_centre() -> None:
    geometry = Geometry(axis(window=33), axis(window=33))  # centres on pixels: 16, 24, 32, ...
    made = score_map((3, 4), geometry=geometry)
    at_centres = made.resample()[:, 16:33:8, 16:41:8]
    torch.testing.assert_close(at_centres, made.scores, rtol=1e-14, atol=0)


def test_resample_holds_the_edge() -> None:
    made = score_map((2, 2))
    pixels = made.resample()
    assert torch.equal(pixels[:, :15, :15], made.scores[:, :1, :1].expand(-1, 15, 15))
    assert torch.equal(pixels[:, 24:, 24:], made.scores[:, 1:, 1:].expand_as(pixels[:, 24:, 24:]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resample_keeps_the_dtype(dtype: torch.dtype) -> None:
    made = score_map((2, 3))
    half = ScoreMap(made.scores.to(dtype), made.geometry, made.image_size, made.input_size)
    assert half.resample().dtype == dtype
    torch.testing.assert_close(half.resample().double(), made.resample(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("size", [0, (0, 3), "x"])
def test_resample_refuses_what_is_no_size(size: object) -> None:
    with pytest.raises(fcvgg.GeometryError, match="size must be a positive int or"):
        score_map((2, 2)).resample(size)  # type: ignore[arg-type]


def test_a_resized_input_keeps_the_images_pixels() -> None:
    net = fcvgg.convert(
        classifier(2), preprocess=fcvgg.Preprocess.imagenet(resize=(16, 24)), verify=False
    )
    made = net.score_map(np.zeros((50, 60, 3), np.uint8))
    assert (made.image_size, made.input_size) == ((50, 60), (16, 24))
    assert made.scores.shape == (2, 3, 5)
    assert made.resample().shape == (2, 50, 60)
    assert made.heatmap(0).values.shape == (50, 60)


# -- what the scores are --------------------------------------------------------------------------

ENDINGS = {
    "logits": (5, ()),
    "probabilities": (5, (nn.Softmax(1),)),
    "log_probabilities": (5, (nn.LogSoftmax(1),)),
    "sigmoid": (5, (nn.Sigmoid(),)),
    "logits of one class": (1, ()),
    "sigmoid of one class": (1, (nn.Sigmoid(),)),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_the_activation_is_read_off_the_graph_and_applied_once(name: str) -> None:
    classes, ending = ENDINGS[name]
    model = classifier(classes, *ending)
    net = fcvgg.convert(model)
    assert net.activation == name.split(" ")[0]

    logits = fcvgg.convert(model[:5]).score_map(image()).scores
    expected = logits.sigmoid() if "sigmoid" in name or classes == 1 else logits.softmax(0)
    made = net.score_map(image())
    torch.testing.assert_close(made.probabilities(), expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        native = net(image()[None, :, :8, :8])
        torch.testing.assert_close(
            native[..., 0, 0], model(image()[None, :, :8, :8]), rtol=1e-12, atol=0
        )


def test_the_activation_can_be_given() -> None:
    model = classifier(3)
    net = fcvgg.convert(model, activation="independent_logits")
    made = net.score_map(image())
    assert made.activation == net.activation == "independent_logits"
    torch.testing.assert_close(made.probabilities(), torch.sigmoid(made.scores))


def test_an_unknown_activation_is_refused() -> None:
    expected = "^activation must be 'logits' .*, got 'softplus'"
    with pytest.raises(fcvgg.FcvggError, match=expected):
        fcvgg.convert(classifier(3), activation="softplus")
    net = fcvgg.convert(classifier(3))
    with pytest.raises(fcvgg.FcvggError, match=expected):
        net.activation = "softplus"


def test_half_precision_scores_give_probabilities_in_float32() -> None:
    made = score_map((2, 2), classes=7)
    half = score_map((2, 2), scores=made.scores.bfloat16())
    assert half.probabilities().dtype == torch.float32
    assert half.predict().dtype == torch.float32
    torch.testing.assert_close(half.probabilities().sum(0), torch.ones(2, 2), rtol=1e-6, atol=0)


class TwoHeads(nn.Module):
    """Logits of two classes and a sigmoid of three."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = classifier(2), classifier(3, nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_each_output_has_its_own_map_and_activation() -> None:
    net = fcvgg.convert(TwoHeads(), categories=["cat", "dog"])
    first, second = net.score_map(image()), net.score_map(image(), output=1)
    assert (first.activation, second.activation) == ("logits", "sigmoid")
    assert (first.categories, second.categories) == (("cat", "dog"), None)
    assert (len(first.scores), len(second.scores)) == (2, 3)
    assert net.classify(image(), output=1).shape == (1, 3)
    assert net.heatmap(image(), 2, output=1).label == "class 2"
    with pytest.raises(fcvgg.FcvggError, match=r"output must be from 0 to 1 .*, got 2"):
        net.score_map(image(), output=2)


# -- predictions ----------------------------------------------------------------------------------


def test_average_is_of_raw_scores() -> None:
    made = score_map((3, 4))
    torch.testing.assert_close(made.average(), made.scores.flatten(1).mean(1), rtol=1e-12, atol=0)


def test_predict_averages_scores_or_probabilities() -> None:
    made = score_map((3, 4))
    by_scores = made.average().softmax(0)
    by_probabilities = made.scores.softmax(0).mean((1, 2))
    torch.testing.assert_close(made.predict(), by_scores, rtol=1e-12, atol=0)
    torch.testing.assert_close(made.predict("probabilities"), by_probabilities, rtol=1e-12, atol=0)
    assert not torch.allclose(by_scores, by_probabilities, rtol=1e-2)


@pytest.mark.parametrize("average", ["scores", "probabilities"])
def test_log_probabilities_are_averaged_as_probabilities(average: str) -> None:
    made = score_map((3, 4))
    logs = score_map((3, 4), scores=made.scores.log_softmax(0), activation="log_probabilities")
    torch.testing.assert_close(
        logs.predict(average), made.predict("probabilities"), rtol=1e-12, atol=0
    )


def test_top_names_the_most_probable_classes() -> None:
    made = score_map((3, 4), categories=("cat", "dog", "owl"))
    order = made.predict().argsort(descending=True).tolist()
    names = [("cat", "dog", "owl")[i] for i in order]
    assert [name for name, _ in made.top(2)] == names[:2]
    assert [p for _, p in made.top()] == made.predict().sort(descending=True).values.tolist()
    assert score_map((1, 1)).top(1)[0][0].startswith("class ")


def test_label_map() -> None:
    made = score_map((3, 4))
    assert torch.equal(made.label_map(), made.scores.argmax(0))
    one = score_map((3, 4), classes=1)
    assert torch.equal(one.label_map(), torch.where(one.scores[0] > 0, 0, -1))
    likely = one.scores.sigmoid()
    sigmoid = score_map((3, 4), scores=likely, activation="sigmoid")
    assert torch.equal(sigmoid.label_map(), one.label_map())


# -- heatmaps -------------------------------------------------------------------------------------


def test_a_heatmap_interpolates_probabilities_not_scores() -> None:
    made = score_map((3, 4))
    of_cells = score_map((3, 4), scores=made.probabilities())
    torch.testing.assert_close(
        torch.from_numpy(made.heatmap(1).values), of_cells.resample()[1].float(), rtol=1e-6, atol=0
    )
    assert made.heatmap(1).values.dtype == np.float32


def test_a_heatmap_is_of_the_top_class_or_of_the_named_one() -> None:
    made = score_map((3, 4), categories=("cat", "dog", "owl"))
    assert made.heatmap().label == made.top(1)[0][0]
    assert made.heatmap("owl").label == made.heatmap(2).label == made.heatmap(-1).label == "owl"


def test_two_heatmaps_compare() -> None:
    """A faint map stays faint: nothing is stretched to the image's own range."""
    scores = torch.zeros(1, 2, 2)
    scores[0, 0, 0] = 0.1
    faint, strong = (score_map((2, 2), scores=scores * k).heatmap(0) for k in (1, 40))
    assert faint.values.max() == pytest.approx(torch.tensor(0.1).sigmoid().item())
    assert strong.values.max() == pytest.approx(torch.tensor(4.0).sigmoid().item())
    assert faint.peak == strong.peak


def test_coverage_is_the_hull_of_the_centres() -> None:
    coverage = score_map((3, 4)).heatmap(0).coverage  # centres 15.5 to 31.5 and 15.5 to 39.5
    expected = np.zeros_like(coverage)
    expected[16:32, 16:40] = True
    assert np.array_equal(coverage, expected)


def test_coverage_includes_a_pixel_that_is_a_centre() -> None:
    geometry = Geometry(axis(window=33), axis(window=33))
    coverage = score_map((3, 4), geometry=geometry, image_size=(51, 61)).heatmap(0).coverage
    rows, cols = np.flatnonzero(coverage.any(1)), np.flatnonzero(coverage.any(0))
    assert (rows[0], rows[-1], cols[0], cols[-1]) == (16, 32, 16, 40)


def test_coverage_of_one_cell_is_its_centre() -> None:
    coverage = score_map((1, 1), image_size=(35, 37)).heatmap(0).coverage
    assert np.argwhere(coverage).tolist() == [[15, 15], [15, 16], [16, 15], [16, 16]]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(4, 60), st.integers(4, 60))
def test_the_peak_lies_within_the_hull(rows: int, cols: int, height: int, width: int) -> None:
    made = score_map((rows, cols), image_size=(height, width))
    heatmap = made.heatmap(0)
    y, x = heatmap.peak
    assert heatmap.coverage[y, x]
    assert heatmap.values[y, x] == heatmap.values[heatmap.coverage].max()
    assert ((heatmap.values >= 0) & (heatmap.values <= 1)).all()


def test_the_peak_is_at_the_highest_cells_centre() -> None:
    scores = torch.zeros(1, 3, 4)
    scores[0, 2, 1] = 3
    y, x = score_map((3, 4), scores=scores).heatmap(0).peak
    assert (abs(y - 31.5), abs(x - 23.5)) == (0.5, 0.5)


def test_maps_below_the_window_speak_about_the_image() -> None:
    net = fcvgg.convert(classifier(2))
    for size in ((1, 1), (3, 7), (20, 5)):
        made = net.score_map(image(*size))
        assert made.image_size == size
        assert tuple(made.scores.shape[1:]) == net.output_size(size)
        heatmap = made.heatmap(1)
        assert heatmap.values.shape == size
        if max(size) < 8:  # one cell, which stands in the middle of the image
            assert made.geometry.centre_of(0, 0) == tuple(3.5 - (8 - n) // 2 for n in size)
            assert all(abs(p - (n - 1) / 2) <= 1 for p, n in zip(heatmap.peak, size))
