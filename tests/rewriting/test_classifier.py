"""A converted network is converted again: another output stride or padding, as from its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import seeded
from torch import Tensor, nn

import fcvgg

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"output_stride": 4},
    {"padding": "same"},
    {"output_stride": 2, "padding": "same"},
)


class Permuted(nn.Module):
    """Average pools, an adaptive pool, a flatten in another order, and norms of vectors."""

    def __init__(self, bins: int, pool: type[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2)),
        )
        self.pool = pool(bins)
        self.fc1 = nn.Linear(6 * bins * bins, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.features(x)).permute(0, 2, 3, 1).flatten(1)
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


@pytest.mark.parametrize(
    ("bins", "pool"),
    [
        *((1, nn.AdaptiveAvgPool2d), (1, nn.AdaptiveMaxPool2d), (4, nn.AdaptiveAvgPool2d)),
        *((3, nn.AdaptiveAvgPool2d), (3, nn.AdaptiveMaxPool2d)),
        *((2, nn.AdaptiveAvgPool2d), (2, nn.AdaptiveMaxPool2d)),
    ],
)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_network_becomes_what_its_source_becomes(
    bins: int, pool: type[nn.Module], options: dict[str, Any]
) -> None:
    source = seeded(lambda: Permuted(bins, pool))
    images = torch.randn(1, 3, 70, 61, dtype=torch.float64)
    net = fcvgg.convert(source, input_size=32, **options)
    for wanted in ({"output_stride": 2}, {"output_stride": 1, "padding": "same"}):
        pooled = (bins == 1 and "output_stride" in options) or (bins == 2 and "padding" in options)
        if pooled and "same" in {**options, **wanted}.values():
            with pytest.raises(fcvgg.ConversionError, match="which begins with a pool; pass paddi"):
                fcvgg.convert(net, **wanted)
            continue
        again = fcvgg.convert(net, **wanted)
        if bins == 2 and "padding" in wanted:
            continue  # padded before the layer after the pool, not before the pool
        expected = fcvgg.convert(source, input_size=32, **{**options, **wanted})
        assert again.equivalence.passed
        assert again.geometry.stride == expected.geometry.stride
        assert again.geometry.centre_of(0, 0) == expected.geometry.centre_of(0, 0)
        torch.testing.assert_close(again(images), expected(images), rtol=1e-4, atol=1e-5)
        assert list(again.state_dict()) == list(net.state_dict())


def test_padding_is_taken_off_again() -> None:
    source = seeded(lambda: Permuted(4, nn.AdaptiveAvgPool2d))
    images = torch.randn(1, 3, 70, 61, dtype=torch.float64)
    same = fcvgg.convert(source, input_size=32, padding="same")
    plain = fcvgg.convert(source, input_size=32)
    torch.testing.assert_close(fcvgg.convert(same, padding="valid")(images), plain(images))
    torch.testing.assert_close(fcvgg.convert(same)(images), same(images))


def test_the_classifier_of_a_network_has_the_sources_layers() -> None:
    source = seeded(lambda: Permuted(4, nn.AdaptiveAvgPool2d))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    classifier = fcvgg.convert(source, input_size=32, output_stride=2).classifier()
    torch.testing.assert_close(classifier(images), source(images))
    assert isinstance(classifier.get_submodule("fc1"), nn.Linear)
    classifier.load_state_dict(source.state_dict())


def test_settings_and_parameters_are_those_of_the_network(tmp_path: Path) -> None:
    net = fcvgg.load("demo")
    fine = fcvgg.convert(net, output_stride=2)
    assert (fine.categories, fine.preprocess, fine.source) == (
        *(net.categories, net.preprocess, net.source),
    )
    weights = net.network.get_parameter("classifier.0.weight")
    assert fine.network.get_parameter("classifier.0.weight").data_ptr() == weights.data_ptr()
    own = fcvgg.convert(net, output_stride=2, copy=True, activation="independent_logits")
    assert own.activation == "independent_logits"
    assert own.network.get_parameter("classifier.0.weight").data_ptr() != weights.data_ptr()
    assert own.network.get_parameter("classifier.0.weight").shape == weights.shape
    fine.save(tmp_path / "fine")
    images = torch.randn(1, 3, 90, 70)
    torch.testing.assert_close(fcvgg.load(tmp_path / "fine")(images), fine(images))


def test_outputs_and_modes_are_kept() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout())
            self.a, self.b = nn.Linear(4 * 9, 2), nn.Linear(4 * 9, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = self.trunk(x).flatten(1)
            return {"a": self.a(x), "b": self.b(x)}

    net = fcvgg.convert(seeded(Heads))
    images = torch.randn(1, 3, 30, 25, dtype=torch.float64)
    fine = fcvgg.convert(net, output_stride=1)
    assert list(fine(images)) == ["a", "b"]
    for name, scores in fcvgg.convert(seeded(Heads), output_stride=1)(images).items():
        torch.testing.assert_close(fine(images)[name], scores)
    assert fine.train().network.get_submodule("trunk.3").training
    assert fine.network.get_parameter("a.weight").requires_grad


def test_strides_that_its_layers_do_not_come_to() -> None:
    with pytest.raises(fcvgg.ConversionError, match=r"8, 4, 2 or 1, got 3$"):
        fcvgg.convert(fcvgg.load("demo"), output_stride=3)
    with pytest.raises(fcvgg.ArgumentError, match="in_channels must be left out for a converted"):
        fcvgg.convert(fcvgg.load("demo"), in_channels=3)


def test_a_global_pool_gives_way_to_positions_and_comes_back() -> None:
    source = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)),
            *(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
            nn.Softmax(1),
        )
    )
    images = torch.randn(1, 3, 70, 61, dtype=torch.float64)
    net = fcvgg.convert(source, input_size=32)
    positions = fcvgg.convert(source, input_size=32, head="position", output_stride=2)
    torch.testing.assert_close(
        fcvgg.convert(net, head="position", output_stride=2)(images), positions(images)
    )
    windows = fcvgg.convert(positions, head="window", output_stride=4)
    torch.testing.assert_close(windows(images), net(images))
    assert (positions.activation, windows.activation) == ("logits", "probabilities")
