"""timm's models by name, with random weights: the hub cannot be reached from tests."""

import sys

import huggingface_hub.constants
import pytest
import timm
import torch
from torch.testing import assert_close

import fcvgg
from fcvgg.sources import timm_model

TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module", autouse=True)
def _narrow():
    """timm's VGG with a sixteenth of its head, whose 120 million weights would take the time."""
    build = timm.create_model

    def create(name, **options):
        return build(name, **options, **({"mlp_ratio": 1 / 16} if name.startswith("vgg") else {}))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", create)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A VGG11 of timm's of seven classes, and its state in a file."""
    torch.manual_seed(0)
    model = timm.create_model("vgg11", num_classes=7).eval()
    path = tmp_path_factory.mktemp("timm") / "vgg11.pth"
    torch.save(model.state_dict(), path)
    return model, path


@pytest.fixture(scope="module")
def net(checkpoint):
    return fcvgg.load("timm:vgg11", weights=checkpoint[1])


def test_vgg_equals_timm_at_its_native_size(checkpoint, net):
    model, _ = checkpoint
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert_close(net(images).flatten(1), model(images), **TOLERANCE)
    assert net.input_size == (224, 224)
    assert net.equivalence.passed


def test_map_comes_out_before_timms_averaging(checkpoint, net):
    """timm's VGG averages its head's map; here it comes out, and its mean is timm's score."""
    model, _ = checkpoint
    images = torch.rand(1, 3, 288, 256)
    with torch.no_grad():
        scores = net(images)
        assert scores.shape == (1, 7, *net.output_size((288, 256))) == (1, 7, 3, 2)
        assert_close(scores.mean((2, 3)), model(images), **TOLERANCE)


def test_small_image_is_not_stretched_as_timm_does(checkpoint, net):
    """timm stretches features below 7x7; the net pads the image to its window and says so."""
    model, _ = checkpoint
    images = torch.rand(1, 3, 160, 160)
    padded = torch.nn.functional.pad(images, (32, 32, 32, 32))
    with torch.no_grad():
        scores = net(images)
        assert_close(scores.flatten(1), model(padded), **TOLERANCE)
        assert (model(images) - model(padded)).abs().max() > 1e-3


def test_data_config_is_timms(net):
    assert net.preprocess.mean == timm.data.IMAGENET_DEFAULT_MEAN
    assert net.preprocess.std == timm.data.IMAGENET_DEFAULT_STD
    assert net.preprocess.resize is None
    assert net.categories is None  # seven classes, which are not ImageNet's


def test_other_architecture_with_its_own_data_config():
    _, settings = timm_model.read("resnet10t", None)
    assert settings["input_size"] == (176, 176)
    assert settings["preprocess"].interpolation == "bicubic"
    assert len(settings["categories"]) == 1000
    assert settings["categories"][0].startswith("tench")


def test_residual_network_is_converted():
    torch.manual_seed(0)
    net = fcvgg.load("timm:resnet10t", weights=None)
    assert net.equivalence.passed
    assert net.output_size((176 + 64, 176)) != net.output_size((176, 176))


def test_name_is_checked_and_near_ones_are_told():
    with pytest.raises(fcvgg.LoadError, match="timm has no model 'vgg111'; near: vgg11"):
        fcvgg.load("timm:vgg111", weights=None)


def test_unreachable_weights_give_one_line_and_two_ways_out(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(fcvgg.LoadError, match=r"weights=PATH .* or weights=None") as caught:
        fcvgg.load("timm:vgg11.tv_in1k")
    assert "\n" not in str(caught.value)


def test_unknown_weights():
    with pytest.raises(
        fcvgg.LoadError, match="for timm's vgg11, got 'IMAGENET1K_V1'; choose among"
    ):
        fcvgg.load("timm:vgg11", weights="IMAGENET1K_V1")


def test_checkpoint_that_does_not_fit(checkpoint):
    with pytest.raises(fcvgg.LoadError, match=r"does not fit .*missing"):
        fcvgg.load("timm:vgg13", weights=checkpoint[1])


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(fcvgg.MissingExtraError, match=r"pip install 'fcvgg\[timm\]'"):
        fcvgg.load("timm:vgg11", weights=None)


def test_what_cannot_be_converted_is_refused_before_its_weights_are_downloaded(monkeypatch):
    asked = []
    build = timm.create_model

    def create(name, pretrained=False, **options):
        asked.append(pretrained)
        return build(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(fcvgg.ConversionError, match=r"attention mixes all positions"):
        fcvgg.load("timm:vit_tiny_patch16_224")
    assert asked == [False]
