"""A trained classifier moved to another input size."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from imagenet_weights import imagenet_example
from nets import (
    VGGS,
    Functional,
    GlobalPooled,
    Headed,
    Lambda,
    SmallVGG,
    Unpadded,
    images,
    narrow_vgg,
    native_error,
    relative_error,
    seeded,
)
from torch import nn

import fcvgg
from fcvgg.demo import demo_model
from fcvgg.transfer.input_sizes import resampled_kernels

skimage_data = pytest.importorskip("skimage.data")


@pytest.mark.parametrize("name", VGGS)
def test_all_torchvision_vggs_get_a_head_for_the_size(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    new = fcvgg.for_input_size(model, (96, 160), num_classes=7)
    assert type(new) is type(model)
    assert new.avgpool.output_size == (3, 5)
    shapes = [tuple(m.weight.shape) for m in new.classifier if isinstance(m, nn.Linear)]
    assert shapes == [(4096, 512 * 15), (4096, 4096), (7, 4096)]
    assert list(new.state_dict()) == list(model.state_dict())
    assert model.classifier[0].in_features == 512 * 49
    assert model.avgpool.output_size == (7, 7)


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
@pytest.mark.parametrize("size", [32, 50, (96, 160), 224, 256])
@pytest.mark.parametrize("init", ["random", "resample"])
def test_the_result_runs_converts_and_keeps_the_features(
    name: str, size: int | tuple[int, int], init: str
) -> None:
    model = seeded(narrow_vgg, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = fcvgg.for_input_size(model, size, init=init)
    net = fcvgg.convert(new, input_size=size)
    assert native_error(new, net, 2) < 1e-12
    for key, value in new.features.state_dict().items():
        assert torch.equal(value, before[f"features.{key}"])
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_random_is_normal_with_deviation_001_and_no_bias() -> None:
    torch.manual_seed(0)
    new = fcvgg.for_input_size(seeded(narrow_vgg, "vgg11"), 128)
    for layer in (new.classifier[0], new.classifier[3]):
        count = layer.weight.numel()
        assert abs(layer.weight.std().item() - 0.01) < 0.01 * 5 / count**0.5
        assert abs(layer.weight.mean().item()) < 0.01 * 5 / count**0.5
    assert all((m.bias == 0).all() for m in new.classifier if isinstance(m, nn.Linear))


def test_modes_dtype_and_gradients() -> None:
    model = seeded(narrow_vgg, "vgg11").train()
    model.requires_grad_(False)
    new = fcvgg.for_input_size(model, 64, num_classes=3)
    assert all(m.training for m in new.modules())
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    trained = {n.split(".")[0] for n, p in new.named_parameters() if p.requires_grad}
    assert trained == {"classifier"}


# -- resampling -------------------------------------------------------------------------------


def test_resample_at_the_same_size_changes_nothing() -> None:
    model = seeded(narrow_vgg, "vgg13")
    new = fcvgg.for_input_size(model, 224, init="resample")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in new.state_dict().items())


@pytest.mark.parametrize("extent", [(1, 1), (3, 5), (7, 7), (8, 8), (14, 10), (21, 6)])
def test_resampled_kernels_keep_the_response_to_constant_features(extent: tuple[int, int]) -> None:
    kernels = images(5, 4, 7, 7)
    new = resampled_kernels(kernels, extent)
    assert tuple(new.shape) == (5, 4, *extent)
    assert relative_error(kernels.sum((2, 3)), new.sum((2, 3))) < 1e-14


@pytest.mark.parametrize("extent", [(3, 5), (4, 9), (14, 14)])
def test_resampled_kernels_see_what_the_old_see_on_resampled_features(
    extent: tuple[int, int],
) -> None:
    kernels, features = images(5, 4, 7, 7), images(3, 4, *extent, seed=2)
    down = [n > 7 for n in extent]
    resized = features
    for axis, shrinks in enumerate(down):
        size = [7 if i <= axis else n for i, n in enumerate(extent)]
        resized = F.interpolate(resized, size, mode="bilinear", antialias=shrinks)
    expected = torch.einsum("ocij,ncij->no", kernels, resized)
    got = torch.einsum("ocij,ncij->no", resampled_kernels(kernels, extent), features)
    assert relative_error(expected, got) < 1e-14


class FlattensHWC(nn.Module):
    """Flattens rows, columns, channels, as Keras does."""

    def __init__(self) -> None:
        super().__init__()
        self.features = SmallVGG().features
        self.fc1 = nn.Linear(8 * 8 * 12, 9)
        self.fc2 = nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(self.features(x).permute(0, 2, 3, 1), 1)
        return self.fc2(torch.relu(self.fc1(x)))


@pytest.mark.parametrize("size", [24, (40, 16)])
def test_any_flatten_order_is_resampled_right(size: int | tuple[int, int]) -> None:
    model = seeded(FlattensHWC)
    new = fcvgg.for_input_size(model, size, init="resample")
    net = fcvgg.convert(new, input_size=size)
    old = fcvgg.convert(model).network.fc1.weight
    assert torch.equal(net.network.fc1.weight, resampled_kernels(old, net.network.fc1.kernel_size))
    assert torch.equal(new.fc1.bias, model.fc1.bias)


def test_num_classes_starts_the_last_layer_anew_and_keeps_the_others() -> None:
    model = seeded(SmallVGG)
    new = fcvgg.for_input_size(model, 48, num_classes=9, init="resample")
    assert torch.equal(new.classifier[3].weight, model.classifier[3].weight)
    assert new.classifier[6].out_features == 9
    same = fcvgg.for_input_size(model, 48, num_classes=5, init="resample")
    assert torch.equal(same.classifier[6].weight, model.classifier[6].weight)


def test_demo_faces_at_24_pixels_start_far_better_resampled() -> None:
    model = demo_model()
    faces = torch.from_numpy(skimage_data.lfw_subset()).float()[:, None]
    batch = F.interpolate(faces, (24, 24), mode="bilinear", antialias=True)
    batch = ((batch.clamp(0, 1) - 0.5) / 0.25).expand(-1, 3, -1, -1)
    truth = torch.arange(200) < 100

    def accuracy(init: str) -> float:
        torch.manual_seed(0)
        new = fcvgg.for_input_size(model, 24, init=init)
        with torch.no_grad():
            return float((new(batch).argmax(1) == truth).float().mean())

    assert accuracy("resample") > 0.97
    assert accuracy("random") < 0.7


def test_imagenet_textures_at_96_pixels_start_far_better_resampled() -> None:
    example = imagenet_example()
    source = fcvgg.for_input_size(example.imagenet_vgg16(narrow_head=True), 64)
    source = fcvgg.replace_head(source, 3, hidden=())
    rng = np.random.default_rng(0)

    def crops(size: int, column: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch = []
        for name in ("brick", "grass", "gravel"):
            photograph = getattr(skimage_data, name)()
            for _ in range(count):
                y, x = rng.integers(0, 448), column + rng.integers(0, 192)
                batch.append(photograph[y : y + 64, x : x + 64])
        grey = torch.from_numpy(np.stack(batch)).float()[:, None]
        scaled = F.interpolate(grey, (size, size), mode="bicubic", antialias=True)
        mean = torch.tensor(example.PREPROCESS.mean)[:, None, None]
        return scaled - mean, torch.arange(3).repeat_interleave(count)

    def accuracy(model: nn.Module) -> float:
        scaled, truth = crops(96, 256, 8)
        return float((model(scaled).argmax(1) == truth).float().mean())

    seen, labels = crops(64, 0, 8)
    with torch.no_grad():  # the head by least squares on one-hot targets
        rows = source.features(seen).flatten(1).double()
        weight = torch.linalg.lstsq(rows, F.one_hot(labels).double(), driver="gelsd").solution
        source.classifier[0].weight.copy_(weight.T)
        torch.manual_seed(0)
        assert accuracy(fcvgg.for_input_size(source, 96, init="resample")) > 0.9
        assert accuracy(fcvgg.for_input_size(source, 96, init="random")) < 0.7


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [31, (64, 20), (1, 1)])
def test_vanishing_features_name_the_least_size(size: int | tuple[int, int]) -> None:
    pair = (size, size) if isinstance(size, int) else size
    message = (
        f"size must be at least (32, 32), of which pool5 gives one position, got {pair}, where the "
        "features vanish; pass 32 or more, to which images are enlarged"
    )
    with pytest.raises(fcvgg.InputSizeError, match=f"^{re.escape(message)}$"):
        fcvgg.for_input_size(seeded(narrow_vgg, "vgg11"), size)


@pytest.mark.parametrize("build", [SmallVGG, Unpadded])
def test_the_least_size_is_the_least(build: type[nn.Module]) -> None:
    model = seeded(build)
    with pytest.raises(fcvgg.InputSizeError) as caught:
        fcvgg.for_input_size(model, 1)
    least = int(re.search(r"; pass (\d+) or more", str(caught.value))[1])
    with pytest.raises(fcvgg.InputSizeError):
        fcvgg.for_input_size(model, least - 1)
    new = fcvgg.for_input_size(model, least)
    assert new(images(2, 3, least, least)).shape[0] == 2


def fixed_view() -> nn.Module:
    return Headed(Lambda(lambda x, fc: fc(x.view(-1, 6 * 6 * 8)), nn.Linear(6 * 6 * 8, 4)))


@pytest.mark.parametrize(
    ("build", "options", "error", "message"),
    [
        (SmallVGG, {"size": 0}, fcvgg.InputSizeError, "size must be a positive int or"),
        (SmallVGG, {"size": "a"}, fcvgg.InputSizeError, "size must be a positive int or"),
        (
            SmallVGG,
            {"size": 64, "init": "zeros"},
            fcvgg.ArgumentError,
            "init must be 'random' or 'resample', got 'zeros'",
        ),
        (
            SmallVGG,
            {"size": 64, "num_classes": 0},
            fcvgg.ArgumentError,
            "num_classes must be an integer of at least 1, got 0",
        ),
        (
            lambda: SmallVGG().features,
            {"size": 64},
            fcvgg.ConversionError,
            "Sequential has no fully connected layer; stack one on it with torch.nn.Sequential",
        ),
        (
            Functional,
            {"size": 64},
            fcvgg.ConversionError,
            "fc6 is linear; only nn.Linear layers can be replaced",
        ),
        (
            fixed_view,
            {"size": 32},
            fcvgg.ConversionError,
            "view before fc6 does not give one row per image at input size (32, 32)",
        ),
        (
            GlobalPooled,
            {"size": 64, "init": "resample"},
            fcvgg.ConversionError,
            "init='resample' needs the source's native size, which is not determined",
        ),
    ],
)
def test_refusals(build, options, error, message) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        fcvgg.for_input_size(build(), **options)
    assert "\n" not in str(caught.value)
