"""From `uint8` pixels to a network's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import fcvgg
from fcvgg import Preprocess


def picture(height: int = 6, width: int = 9, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_pixels_are_scaled_and_normalised_per_channel() -> None:
    image = picture()
    got = Preprocess((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))(image)
    pixels = np.asarray(image, np.float64) / 255
    expected = (pixels - [0.1, 0.2, 0.3]) / [0.5, 0.6, 0.7]
    assert got.shape == (1, 3, 6, 9)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(
        got[0].double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=1e-6, atol=1e-6
    )


def test_caffe_style_models_take_bgr_and_raw_values() -> None:
    """Keras' and caffe's VGG16: BGR, the mean subtracted from 0..255."""
    image = picture()
    got = Preprocess((103.9, 116.8, 123.7), (1, 1, 1), scale=1, channel_order="BGR")(image)
    expected = np.asarray(image, np.float32)[..., ::-1] - np.float32([103.9, 116.8, 123.7])
    np.testing.assert_allclose(got[0].permute(1, 2, 0), expected, atol=1e-4)


def test_imagenet_is_torchvisions() -> None:
    from torchvision.models import VGG16_Weights

    transforms = VGG16_Weights.DEFAULT.transforms()
    assert Preprocess.imagenet().mean == tuple(transforms.mean)
    assert Preprocess.imagenet().std == tuple(transforms.std)
    image = picture(256, 256)
    got = Preprocess.imagenet()(image)[..., 16:240, 16:240]
    torch.testing.assert_close(got[0], transforms(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("channels", [(1, "L"), (4, "RGBA")])
def test_grey_and_four_channel_networks(channels: tuple[int, str]) -> None:
    count, mode = channels
    values = [0.1 * (i + 1) for i in range(count)]
    preprocess = Preprocess(values if count > 1 else 0.1, values if count > 1 else 0.1)
    image = picture(mode=mode)
    assert preprocess.channels == count
    got = preprocess(image)[0].permute(1, 2, 0).numpy()
    pixels = np.asarray(image, np.float64).reshape(6, 9, count) / 255
    np.testing.assert_allclose(got, (pixels - values) / values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("resize", "expected"),
    [
        (None, (6, 9)),
        (12, (12, 18)),
        (4, (4, 6)),
        ((5, 7), (5, 7)),
        ([5, 7], (5, 7)),
        (np.int64(4), (4, 6)),
    ],
)
def test_resize(resize: object, expected: tuple[int, int]) -> None:
    preprocess = Preprocess.imagenet(resize=resize)
    assert preprocess(picture()).shape[2:] == expected
    assert hash(preprocess)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_interpolation_is_pillows(name: str) -> None:
    expected = picture().resize((18, 12), Image.Resampling[name.upper()])
    got = Preprocess((0, 0, 0), (1, 1, 1), scale=1, resize=(12, 18), interpolation=name)(picture())
    np.testing.assert_array_equal(got[0].permute(1, 2, 0), np.asarray(expected))


def test_the_picture_is_not_changed() -> None:
    image = picture()
    before = image.tobytes()
    Preprocess((0, 0, 0), (1, 1, 1), channel_order="BGR")(image).fill_(0)
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (1, 2)}, r"mean and std must have one value per channel each, got 2 and 3"),
        (
            {"mean": (), "std": ()},
            r"mean and std must have one value per channel each, got 0 and 0",
        ),
        ({"mean": (0, 0, float("nan"))}, r"mean must be finite, got \(0\.0, 0\.0, nan\)"),
        ({"std": (1, 0, 1)}, r"std must be positive, got \(1\.0, 0\.0, 1\.0\)"),
        ({"std": (1, 1, float("inf"))}, r"std must be positive, got \(1\.0, 1\.0, inf\)"),
        ({"scale": 0}, r"scale must be positive, got 0"),
        ({"scale": float("nan")}, r"scale must be positive, got nan"),
        ({"channel_order": "GBR"}, r"channel_order must be 'RGB' or 'BGR', got 'GBR'"),
        (
            {"interpolation": "area"},
            r"interpolation must be 'nearest', .* or 'lanczos', got 'area'",
        ),
        ({"resize": 0}, r"resize must be a positive int or \(h, w\), got 0"),
        ({"resize": (1, 2, 3)}, r"resize must be a positive int or .*, got \(1, 2, 3\)"),
        ({"resize": "256"}, r"resize must be a positive int or .*, got '256'"),
        ({"resize": 2.5}, r"resize must be a positive int or .*, got 2\.5"),
    ],
)
def test_unusable_values_are_refused(options: dict, message: str) -> None:
    with pytest.raises(fcvgg.PreprocessError, match=f"^{message}"):
        Preprocess(**{"mean": (0, 0, 0), "std": (1, 1, 1), **options})


def test_bgr_needs_three_channels() -> None:
    with pytest.raises(fcvgg.PreprocessError, match="channel_order must be 'RGB' for 4 channels"):
        Preprocess((0,) * 4, (1,) * 4, channel_order="BGR")


def test_an_image_of_other_channels_is_refused() -> None:
    with pytest.raises(
        fcvgg.PreprocessError,
        match=r"the image must have the preprocessing's 3 channels, got mode L; convert it first",
    ):
        Preprocess.imagenet()(picture(mode="L"))


def test_the_pipelines_own_view_is_of_a_pil_image() -> None:
    with pytest.raises(fcvgg.PreprocessError, match=r"^the image must be a PIL image, got str"):
        fcvgg.Preprocess.imagenet().at_native_size("photo.jpg")  # type: ignore[arg-type]
