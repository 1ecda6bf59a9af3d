"""All eight VGGs on real photographs: the converted network gives its source's classes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import skimage.data
import torch
from nets import EXACT, VGGS, narrow_vgg, relative_error, seeded
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import fcvgg

CROP, SIDE = 3 / 4, 224
PREPROCESS = fcvgg.Preprocess.imagenet()


@lru_cache(maxsize=1)
def crops() -> tuple[Image.Image, ...]:
    """Two opposite corners of each of five photographs, at the native size."""
    found = []
    data = (skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea())
    for pixels in (*data, *load_sample_images().images):
        photograph = Image.fromarray(np.asarray(pixels)).convert("RGB")
        side = round(CROP * min(photograph.size))
        for left, top in ((0, 0), (photograph.width - side, photograph.height - side)):
            crop = photograph.crop((left, top, left + side, top + side))
            found.append(crop.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return tuple(found)


def sensitive_vgg(name: str) -> nn.Module:
    """Narrow, with weights that pass on what sets two photographs apart."""
    model = narrow_vgg(name)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("name", VGGS)
@torch.no_grad()
def test_scores_and_classes_of_photographs_are_the_sources(name: str, dtype: torch.dtype) -> None:
    model = seeded(sensitive_vgg, name, dtype=dtype)
    batch = torch.cat([PREPROCESS(crop) for crop in crops()]).to(dtype)
    model.classifier[-1].bias -= model(batch).mean(0)  # so that no class leads in all of them
    net = fcvgg.convert(model, preprocess=PREPROCESS)
    assert net.input_size == (SIDE, SIDE)
    expected = model(batch)
    assert_photographs_differ(expected)
    assert relative_error(expected, net(batch).flatten(1)) <= EXACT[dtype]

    report = fcvgg.verify(model, net, batch)
    assert report.passed
    assert report.top1_agreement == 1
    assert report.images == len(crops()) == 10

    of_pictures = torch.stack([net.score_map(crop).average() for crop in crops()])
    assert torch.equal(of_pictures.argmax(1), expected.argmax(1))
    probabilities = net.classify(crops())
    torch.testing.assert_close(probabilities, expected.softmax(1).float(), rtol=0, atol=1e-5)


def assert_photographs_differ(scores: Tensor) -> None:
    """Else the equality of two nets would say little."""
    spread = (scores - scores.mean(0)).abs().max() / scores.abs().max()
    assert spread > 0.1
    assert len(scores.argmax(1).unique()) > 2
