"""The table of layers: fields, sizes, parameters and multiply-adds."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

import fcvgg


def table(name: str, size: int | tuple[int, int] | None = None) -> fcvgg.LayerTable:
    """Of a torchvision model without memory for its parameters."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    return fcvgg.receptive_fields(model, input_size=size)


VGG16 = [64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0]
"""Configuration D of the VGG paper, table 1; 0 is a pool."""


def test_vgg16_counts_equal_those_of_the_paper_by_hand() -> None:
    parameters = multiply_adds = 0
    channels, side = 3, 224
    for width in VGG16:
        if not width:
            side //= 2
            continue
        parameters += width * channels * 9 + width
        multiply_adds += width * channels * 9 * side**2
        channels = width
    for inputs, outputs in ((512 * 7 * 7, 4096), (4096, 4096), (4096, 1000)):
        parameters += inputs * outputs + outputs
        multiply_adds += inputs * outputs

    made = table("vgg16")
    assert made.parameters == parameters == 138_357_544
    assert made.multiply_adds == multiply_adds == 15_470_264_320  # torchvision says 15.47 G


def test_vgg16_layers() -> None:
    made = table("vgg16")
    assert len(made) == 13 + 5 + 3
    assert made.input_size == (224, 224)
    pool5 = made["features.30"]
    assert (pool5.kind, pool5.kernel, pool5.stride) == ("MaxPool2d", (2, 2), (2, 2))
    assert (pool5.receptive_field, pool5.output_stride) == ((212, 212), (32, 32))
    assert (pool5.channels, pool5.output_size, pool5.parameters) == (512, (7, 7), 0)
    fc6 = made["classifier.0"]
    assert (fc6.kind, fc6.kernel, fc6.channels, fc6.output_size) == ("Linear", (7, 7), 4096, (1, 1))
    assert (fc6.receptive_field, fc6.offset) == ((404, 404), (-90, -90))
    assert made[-1].name == "classifier.6"
    # the receptive fields of the convolutions, known from the literature
    fields = [row.receptive_field[0] for row in made if row.kind == "Conv2d"]
    assert fields == [3, 5, 10, 14, 24, 32, 40, 60, 76, 92, 132, 164, 196]


def test_sizes_and_multiply_adds_are_for_the_size_asked_for() -> None:
    native, large = table("vgg16"), table("vgg16", (512, 256))
    assert large.input_size == (512, 256)
    assert large["features.30"].output_size == (16, 8)
    assert large["classifier.0"].output_size == (10, 2)
    assert large.parameters == native.parameters
    assert large["classifier.0"].multiply_adds == 20 * native["classifier.0"].multiply_adds
    assert large["features.0"].receptive_field == native["features.0"].receptive_field


def test_below_the_window_the_padded_input_counts() -> None:
    assert [r.output_size for r in table("vgg16", 10)] == [r.output_size for r in table("vgg16")]


def test_resnet18_counts() -> None:
    made = table("resnet18", 224)
    assert made.parameters == 11_689_512
    assert made["conv1"].receptive_field == (7, 7)
    assert made["layer4.1.conv2"].receptive_field == (435, 435)
    # torchvision's weights say 1.814 GMACs; batch norms, pools and additions are not counted
    assert made.multiply_adds == pytest.approx(1.814e9, rel=2e-3)


def test_rows_are_read_like_a_sequence() -> None:
    made = table("vgg11")
    assert list(made) == [made[i] for i in range(len(made))]
    assert made[2:4] == (made[2], made[3])
    assert made["features.0"] in made
    assert made.index(made["features.3"]) == 2


def test_an_unknown_layer_lists_the_near_ones() -> None:
    with pytest.raises(KeyError, match=r"no layer 'feature\.3'; near: features\.3, "):
        table("vgg11")["feature.3"]
    with pytest.raises(KeyError, match=r"no layer 'xyz'; the first is features\.0"):
        table("vgg11")["xyz"]


def test_a_converted_network_has_the_same_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2), nn.MaxPool2d(2), nn.Flatten())
    model.append(nn.Linear(4 * 36, 2))
    net = fcvgg.convert(model)
    assert str(fcvgg.receptive_fields(net)) == str(fcvgg.receptive_fields(model))


def test_a_network_with_a_global_pool_needs_its_size() -> None:
    with pytest.raises(fcvgg.InputSizeError, match="pass input_size="):
        table("resnet18")


def test_the_table_is_printed_aligned_with_totals() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, (3, 5), padding=(1, 2)), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, dilation=2), nn.Flatten(), nn.Linear(4 * 4 * 4, 10)),
    )
    assert str(fcvgg.receptive_fields(model, input_size=(20, 24))) == EXPECTED.strip()


EXPECTED = """
layer  kind       kernel  stride  receptive field  output stride  offset   output  parameters  multiply-adds
0      Conv2d        3x5       1              3x5              1   -1,-2  8x20x24         368        172,800
2      MaxPool2d       2       2              4x6              2   -1,-2  8x10x12
3      Conv2d       3 d2       1            12x14              2   -1,-2    4x6x8         292         13,824
5      Linear          4       1            18x20              2   -1,-2   10x3x5         650          9,600
total  at 20x24                                                                         1,310        196,224
"""  # noqa: E501


class Shared(nn.Module):
    """One convolution, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.fc = nn.Conv2d(3, 3, 3), nn.MaxPool2d(2), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv(self.pool(self.conv(x)))).flatten(1))


def test_a_layer_called_twice_counts_its_parameters_once() -> None:
    made = fcvgg.receptive_fields(Shared())
    assert [row.name for row in made] == ["conv", "pool", "conv", "pool", "fc"]
    assert made.parameters == sum(p.numel() for p in Shared().parameters())
    assert made.multiply_adds == sum(row.multiply_adds for row in made)
