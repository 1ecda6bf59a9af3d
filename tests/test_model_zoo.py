"""Models that nobody here wrote: each converts exactly, or is refused and told the truth."""

from __future__ import annotations

import pytest
import timm
import torch
from nets import images, native_error, relative_error, seeded
from timm.models.vgg import VGG
from torch import nn

import fcvgg


def narrow_timm_vgg() -> nn.Module:
    """timm's VGG with few channels: its head is convolutional and branches on the map's shape."""
    with torch.random.fork_rng():
        model = VGG([8, "M", 8, "M", 16, "M", 16, "M", 16, "M"], num_classes=7, mlp_ratio=1 / 64)
    return model


def test_timms_vgg() -> None:
    model = seeded(narrow_timm_vgg)
    with pytest.raises(fcvgg.InputSizeError, match=r"takes features of any size.*input_size"):
        fcvgg.convert(model)
    net = fcvgg.convert(model, input_size=224)
    assert native_error(model, net, 2) <= 1e-12
    assert (net.geometry.window, net.geometry.stride) == ((224, 224), (32, 32))
    assert tuple(net(images(1, 3, 288, 230)).shape) == (1, 7, 3, 1)
    assert net.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    "name",
    [
        "resnet10t",
        "regnetx_002",
        "mobilenetv2_050",
        "nf_resnet26",
        "dla46_c",
        "test_mambaout",
        "hrnet_w18_small",
    ],
)
def test_timm_models_that_convert(name: str) -> None:
    model = seeded(timm.create_model, name, num_classes=7)
    net = fcvgg.convert(model, input_size=64)
    assert net.equivalence.passed
    assert native_error(model, net, 2) <= 1e-12
    assert net.state_dict().keys() == model.state_dict().keys()


def test_timms_batch_norms_train() -> None:
    """timm's are subclasses with a forward of their own."""
    model = seeded(timm.create_model, "regnetx_002", num_classes=7)
    net = fcvgg.convert(model, input_size=64, copy=True, verify=False)
    batch = images(2, 3, 64, 64)
    model.train()
    net.train()
    assert relative_error(model(batch), net(batch).flatten(1)) <= 1e-12
    means = [m["stem.bn.running_mean"] for m in (model.state_dict(), net.state_dict())]
    torch.testing.assert_close(*means, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        (
            "mobilenetv3_small_050",
            64,
            r"blocks\.0\.0\.se\) combines a map with a value pooled over all its positions, as "
            r"squeeze-and-excitation does; every cell would depend on the whole image; timm's "
            r"tf_mobilenetv3_small_minimal_100, which has no squeeze-and-excitation, converts$",
        ),
        (
            "ecaresnet26t",
            64,
            r"expand .*layer1\.0\.se\) combines a map .*; timm's resnet50, which",
        ),
        ("skresnet18", 64, r"layer1\.0\.conv1\.attn|mul .*combines a map with a value pooled"),
        ("resnest14d", 64, r"mul .*layer1\.0\.conv2\) combines a map with a value pooled"),
        (
            "convnextv2_atto",
            64,
            r"mlp\.grn\) combines a map .*; timm's convnext_atto, which has no",
        ),
        ("resnetv2_50d_evos", 64, r"stem\.norm1\) (combines a map|is refused: its statistics)"),
        ("sequencer2d_s", 224, r"rnn_v \(LSTM\) is refused: a recurrent layer runs over"),
        ("vit_tiny_patch16_224", 224, r"scaled_dot_product_attention .*refused: attention mixes"),
        ("mixer_s32_224", 224, r"mlp_tokens\.fc1 \(Linear\) mixes positions .*\(N, 512, 256\)"),
        ("poolformer_s12", 64, r"norm1 \(GroupNorm1\) is refused: its statistics mix all positio"),
    ],
)
def test_timm_models_that_are_refused(name: str, size: int, message: str) -> None:
    with torch.device("meta"):  # weights do not matter
        model = timm.create_model(name, num_classes=7).eval()
    with pytest.raises(fcvgg.UnsupportedLayerError, match=message):
        fcvgg.convert(model, input_size=size)
