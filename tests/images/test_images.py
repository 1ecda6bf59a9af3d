"""Reading images of every common kind, and saying what is wrong with the others."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fcvgg
from fcvgg.images.datasets import split_folders
from fcvgg.images.lazy.input import warn_of_dark_values
from fcvgg.images.pictures import in_mode
from fcvgg.images.preprocessing import INTERPOLATIONS
from fcvgg.images.reading import mirrored, prepare, read_picture, with_smallest_side


def classifier(channels: int = 3, **options: Any) -> fcvgg.FullyConvolutional:
    """Window 8, stride 4, two classes; preprocessed to [0, 1]."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, 2)).eval()
    preprocess = fcvgg.Preprocess((0,) * channels, (1,) * channels)
    return fcvgg.convert(model, **{"preprocess": preprocess, "verify": False, **options})


@pytest.fixture(scope="module")
def net() -> fcvgg.FullyConvolutional:
    return classifier()


def noise(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, shape, dtype=dtype, endpoint=True)


def values(image: Any, channels: int = 3, **options: Any) -> np.ndarray:
    """What a preprocessing is given of an image, ``(H, W, C)``."""
    return read_picture(image, fcvgg.Preprocess((0,) * channels, (1,) * channels, **options)).pixels


def rgb(image: Any) -> np.ndarray:
    pixels = values(image)
    assert pixels.dtype == np.uint8
    return pixels


# -- EXIF -----------------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_rotation_is_applied(tmp_path: Path, orientation: int) -> None:
    stored = noise(12, 20, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    expected = UPRIGHT[orientation](stored)
    assert np.array_equal(rgb(tmp_path / "a.png"), expected)
    with Image.open(tmp_path / "a.png") as opened:  # by PIL, not loaded yet
        assert np.array_equal(rgb(opened), expected)


def test_results_are_in_pixels_of_the_upright_image(
    tmp_path: Path, net: fcvgg.FullyConvolutional
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(noise(12, 20, 3)).save(tmp_path / "a.jpg", exif=exif)
    assert net.score_map(tmp_path / "a.jpg").image_size == (20, 12)
    assert net.heatmap(tmp_path / "a.jpg").image.size == (12, 20)


# -- modes ----------------------------------------------------------------------------------------


def test_rgb_is_taken_as_it_is() -> None:
    pixels = noise(5, 7, 3)
    assert np.array_equal(rgb(pixels), pixels)
    assert np.array_equal(rgb(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("grey", [noise(5, 7), noise(5, 7, 1), Image.fromarray(noise(5, 7))])
def test_grey_is_repeated(grey: Any) -> None:
    expected = np.asarray(grey).reshape(5, 7, 1).repeat(3, 2)
    assert np.array_equal(rgb(grey), expected)


def test_transparent_pixels_are_shown_on_white() -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 200  # red
    pixels[0, :, 3] = 0, 128, 255
    assert rgb(pixels)[0].tolist() == [[255, 255, 255], [227, 127, 127], [200, 0, 0]]


def test_grey_with_alpha_is_shown_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 0)])
    assert rgb(image).tolist() == [[[255] * 3] * 2]
    assert values(image, 1)[..., 0].tolist() == [[255, 255]]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0])], ids=["index", "table"])
def test_a_palette_with_transparency_is_shown_on_white(tmp_path: Path, transparency: Any) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png", transparency=transparency)
    assert rgb(tmp_path / "a.png").tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_a_palette_without_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert rgb(image).tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(rgb(tmp_path / "a.jpg").astype(int) - [255, 0, 0]).max() < 5
    assert values(tmp_path / "a.jpg", 1).shape == (4, 4, 1)


def test_black_and_white() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert rgb(image).tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_files_are_scaled_to_the_range_of_bytes(tmp_path: Path, suffix: str) -> None:
    pixels = np.array([[0, 257, 257 * 100 + 64, 65535]], np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    np.testing.assert_allclose(
        values(tmp_path / f"a.{suffix}")[..., 0], [[0, 1, 100 + 64 / 257, 255]], rtol=1e-6
    )


def test_sixteen_bit_arrays_are_scaled_and_not_rounded() -> None:
    pixels = noise(5, 7, 3, dtype=np.uint16)
    np.testing.assert_allclose(values(pixels), pixels / 257, rtol=1e-6)


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(np.array([[0, 70000]], np.int32))],
    ids=["int32"],
)
def test_values_of_unknown_range_are_refused(image: Any) -> None:
    dtype = np.asarray(image).dtype
    with pytest.raises(
        fcvgg.ImageError,
        match=rf"^the image holds {dtype}, which has no known range; pass uint8 \(H, W, C\), or "
        r"value_range=\(low, high\) or a scale= of its own to fcvgg\.Preprocess$",
    ):
        values(image)
    np.testing.assert_allclose(values(image, scale=1e-3)[..., 0], np.asarray(image))
    np.testing.assert_allclose(
        values(image, value_range=(0, 70000))[..., 0], np.asarray(image) * (255 / 70000), rtol=1e-6
    )


def test_a_mode_that_has_no_rgb_is_refused() -> None:
    with pytest.raises(fcvgg.ImageError, match="must be of a mode that converts to RGB, got La"):
        in_mode(Image.new("La", (3, 3)), 3)


def test_transparency_that_is_multiplied_already() -> None:
    image = Image.fromarray(noise(5, 7, 4))
    of_premultiplied = rgb(image.convert("RGBa")).astype(int)
    assert np.abs(of_premultiplied - rgb(image)).max() <= 1
    grey = Image.fromarray(noise(5, 7, 2))
    assert np.abs(rgb(grey.convert("La")).astype(int) - rgb(grey)).max() <= 1


def test_a_grey_network_takes_colour() -> None:
    image = Image.fromarray(noise(12, 20, 3))
    made = classifier(1).score_map(image)
    assert made.image.mode == "L"
    of_grey = classifier(1).score_map(np.asarray(image.convert("L")))
    assert torch.equal(made.scores, of_grey.scores)


def test_a_network_of_four_channels_takes_alpha() -> None:
    pixels = noise(12, 20, 4)
    prepared = prepare(pixels, fcvgg.Preprocess((0,) * 4, (1,) * 4), 4)
    got = prepared.tensor(fcvgg.Preprocess((0,) * 4, (1,) * 4))[0].permute(1, 2, 0) * 255
    np.testing.assert_allclose(got, pixels, atol=1e-3)
    assert np.array_equal(values(noise(12, 20, 3), 4)[..., 3], np.full((12, 20), 255))


def test_a_network_of_other_channels_takes_tensors_only() -> None:
    net = classifier(5)
    assert net.score_map(torch.rand(5, 8, 8)).scores.shape == (2, 1, 1)
    with pytest.raises(
        fcvgg.ImageError,
        match=r"the array \(8, 8, 3\) must have the network's 5 channels, got 3; pass a preproc",
    ):
        net.score_map(noise(8, 8, 3))
    torch.testing.assert_close(
        net.score_map(noise(8, 8, 5)).scores,
        net.score_map(torch.from_numpy(noise(8, 8, 5) / 255).permute(2, 0, 1)).scores,
    )


# -- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 9, 12), (1, 3, 9, 12)])
def test_a_tensor_is_taken_as_preprocessed(
    net: fcvgg.FullyConvolutional, shape: tuple[int, ...]
) -> None:
    image = torch.rand(shape, dtype=torch.float64)
    made = net.score_map(image)
    assert (made.image_size, made.image) == ((9, 12), None)
    with torch.no_grad():
        expected = net(image.float().reshape(1, 3, 9, 12))[0]
    torch.testing.assert_close(made.scores, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 12), r"preprocessed floats must be \(C, H, W\) or .*, got the tensor \(9, 12\)"),
        ((2, 3, 9, 12), r"preprocessed floats must be .*, got the tensor \(2, 3, 9, 12\)"),
        ((9, 12, 3), r"the tensor \(9, 12, 3\) must have the network's 3 channels, got 9; floats"),
        ((3, 0, 12), r"the tensor \(3, 0, 12\) must have pixels, got the size \(0, 12\)"),
    ],
)
def test_tensors_of_the_wrong_shape(
    net: fcvgg.FullyConvolutional, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(fcvgg.ImageError, match=f"^{message}"):
        net.score_map(torch.zeros(shape))


def test_a_tensor_of_bytes_holds_pixels(net: fcvgg.FullyConvolutional) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    expected = net.score_map(pixels).scores
    for tensor in (torch.from_numpy(pixels), torch.from_numpy(pixels.transpose(2, 0, 1))):
        torch.testing.assert_close(net.score_map(tensor).scores, expected)
    torch.testing.assert_close(net.score_map(pixels.transpose(2, 0, 1)).scores, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_from_0_to_1_are_pixels_and_it_is_said(
    net: fcvgg.FullyConvolutional, dtype: Any
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    with pytest.warns(UserWarning, match=r"holds floats, which are taken for the range from 0 to"):
        found = net.score_map((pixels / 255).astype(dtype)).scores
    torch.testing.assert_close(found, net.score_map(pixels).scores, rtol=1e-5, atol=1e-5)


def test_encoded_bytes_and_files_are_images(net: fcvgg.FullyConvolutional, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    expected = net.score_map(pixels).scores
    data = path.read_bytes()
    with path.open("rb") as file:
        for image in (data, bytearray(data), io.BytesIO(data), file):
            torch.testing.assert_close(net.score_map(image).scores, expected)
            torch.testing.assert_close(fcvgg.stream(net, image).scores, expected)
            assert net.classify([image]).shape == (1, 2)
    with path.open("rb") as file:
        file.close()
        with pytest.raises(fcvgg.ImageError, match=r"must be open for reading, got: "):
            net.score_map(file)
    with (
        path.open("r", encoding="latin-1") as text,
        pytest.raises(
            fcvgg.ImageError, match=r"must be open for bytes, got text; open it with 'rb'"
        ),
    ):
        net.score_map(text)


def test_the_first_of_several_frames_is_taken_and_it_is_said(
    net: fcvgg.FullyConvolutional, tmp_path: Path
) -> None:
    frames = [Image.new("L", (12, 9), value) for value in (40, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"a\.gif has several pages or frames, of which the first"):
        found = net.score_map(tmp_path / "a.gif").scores
    torch.testing.assert_close(found, net.score_map(frames[0]).scores)


def test_a_folder_with_files_of_several_pages_warns_once(tmp_path: Path) -> None:
    frames = [Image.new("L", (12, 9), value) for value in (40, 200)]
    for name in ("a/1.gif", "a/2.gif", "b/1.gif", "b/2.gif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.warns(fcvgg.errors.FcvggWarning) as warned:
        split_folders(tmp_path)
    split_folders(tmp_path)  # which says it no more
    (message,) = [str(one.message) for one in warned]
    assert re.search(r"1\.gif and 3 other files have several pages or frames, of which", message)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 9, 12), r"images must be \(N, 3, H, W\), got \(3, 9, 12\); add the batch"),
        ("a.png", r"images must be \(N, 3, H, W\), got str; add the batch with images\[None\]"),
        (
            torch.zeros(1, 4, 9, 9),
            r"images must have 3 channels, got 4 in \(1, 4, 9, 9\); pass \(N, C",
        ),
        (torch.zeros(0, 3, 9, 9), r"images must hold at least one pixel, got .*\(0, 3, 9, 9\)"),
        (torch.zeros(1, 3, 0, 9), r"images must hold at least one pixel, got .*\(1, 3, 0, 9\)"),
    ],
)
def test_what_the_network_itself_refuses(
    net: fcvgg.FullyConvolutional, images: Any, message: str
) -> None:
    with pytest.raises(fcvgg.ImageError, match=message):
        net(images)


# -- what is wrong with an image ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (
            np.zeros((9, 9), bool),
            r"the array \(9, 9\) holds bool, which has no known range; pass ui",
        ),
        (np.zeros((9, 9), np.int64), r"the array \(9, 9\) holds int64, which has no known range; "),
        (
            np.zeros((9, 9, 2), np.uint8),
            r"the array \(9, 9, 2\) must have 1, 3 or 4 channels, .*, got 2",
        ),
        (
            np.zeros((2, 9, 9, 3), np.uint8),
            r"pixels must be \(H, W\), .*, got the array \(2, 9, 9, 3\)",
        ),
        (np.zeros(9, np.uint8), r"pixels must be \(H, W\), .*, got the array \(9,\)"),
        (
            np.zeros((0, 9, 3), np.uint8),
            r"the array \(0, 9, 3\) must have pixels, got the size \(0, 9",
        ),
        (Image.new("RGB", (0, 5)), r"the image must have pixels, got the size \(0, 5\)"),
        (7, r"the image must be a path, a PIL image, a uint8 array \(H, W, C\) .*, got int"),
        (None, r"the image must be a path, a PIL image, .*, got NoneType"),
    ],
)
def test_what_is_no_image(net: fcvgg.FullyConvolutional, image: Any, message: str) -> None:
    with pytest.raises(fcvgg.ImageError, match=f"^{message}"):
        net.score_map(image)


def test_an_absent_file(tmp_path: Path, net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(fcvgg.ImageError, match=r"^there is no image file .*absent\.png$"):
        net.score_map(tmp_path / "absent.png")
    with pytest.raises(fcvgg.ImageError, match=r"^there is no image file absent\.png$"):
        net.score_map("absent.png")


def test_a_pipe_is_not_waited_for(tmp_path: Path, net: fcvgg.FullyConvolutional) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", "/dev/zero"):
        with pytest.raises(
            fcvgg.ImageError, match=r"^\S+ must be a file, got a pipe, socket or device; "
        ):
            net.score_map(path)


def test_a_web_address(net: fcvgg.FullyConvolutional) -> None:
    message = r"^the image must be a file, got the address https://example\.org/a\.png; download it"
    for image in ("https://example.org/a.png", Path("https://example.org/a.png")):
        with pytest.raises(fcvgg.ImageError, match=message):
            net.score_map(image)


def test_floats_that_numpy_does_not_have_are_preprocessed(net: fcvgg.FullyConvolutional) -> None:
    image = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0)).to(torch.float8_e5m2)
    torch.testing.assert_close(net.score_map(image).scores, net.score_map(image.float()).scores)
    torch.testing.assert_close(fcvgg.stream(net, image).scores, net.score_map(image).scores)


def test_a_folder(tmp_path: Path, net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(
        fcvgg.ImageError, match=r" must be an image file or a zarr image, got a folder; pass .*/\*$"
    ):
        net.score_map(tmp_path)


@pytest.mark.parametrize("name", ["a\0b.png", "a" * 5000])
def test_a_name_that_no_file_can_have(net: fcvgg.FullyConvolutional, name: str) -> None:
    with pytest.raises(fcvgg.ImageError, match=r" cannot be read: "):
        net.score_map(name)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image(
    tmp_path: Path, net: fcvgg.FullyConvolutional, content: bytes
) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        fcvgg.ImageError, match=r"a\.png is not an image that Pillow can read; conv"
    ):
        net.score_map(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "webp"])
def test_a_truncated_image(tmp_path: Path, net: fcvgg.FullyConvolutional, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        fcvgg.ImageError,
        match=rf"a\.{suffix} (is a broken image: |is not an image that |is truncated: |cannot be )",
    ):
        net.score_map(path)


def test_a_truncated_image_opened_by_pil(tmp_path: Path, net: fcvgg.FullyConvolutional) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(64, 64, 3)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with Image.open(path) as opened, pytest.raises(fcvgg.ImageError, match="is a broken image: "):
        net.score_map(opened)


def test_flipped_bytes_give_an_image_or_an_image_error(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for suffix in ("png", "jpg", "gif", "bmp", "tif"):
        path = tmp_path / f"a.{suffix}"
        Image.fromarray(noise(16, 16, 3)).save(path)
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            broken = content.copy()
            broken[random.integers(0, min(len(broken), 400), 4)] = random.integers(0, 256, 4)
            path.write_bytes(broken.tobytes())
            with suppress(fcvgg.ImageError):
                assert min(rgb(path).shape) > 0


def test_a_decompression_bomb(
    tmp_path: Path, net: fcvgg.FullyConvolutional, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(20, 20, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # Pillow warns from here, and refuses twice
    assert net.score_map(tmp_path / "a.png").image_size == (20, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(
        fcvgg.ImageError,
        match=r"a\.png must be smaller to be loaded whole, got .* 200 .*; reduce it, save it as a "
        r"tiled TIFF, which fcvgg\.stream .*, or raise PIL\.Image\.MAX_IMAGE_PIXELS if you trust",
    ):
        net.score_map(tmp_path / "a.png")


def test_unknown_preprocessing() -> None:
    with pytest.raises(
        fcvgg.PreprocessError,
        match=r"^the network's preprocessing is unknown, .*; pass preprocess=fcvgg\.Preprocess"
        r"\(mean, std\) to convert or load, or a tensor$",
    ):
        classifier(preprocess=None).score_map(noise(8, 8, 3))


def test_preprocessing_of_other_channels() -> None:
    with pytest.raises(
        fcvgg.PreprocessError,
        match=r"^the preprocessing must have the network's 3 channels, got 1; give mean and std",
    ):
        classifier(preprocess=fcvgg.Preprocess(0, 1)).score_map(noise(8, 8, 3))


def test_an_image_for_which_memory_does_not_suffice(
    net: fcvgg.FullyConvolutional, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 EB")

    monkeypatch.setattr(type(net), "forward", allocate)
    for read in (net.score_map, net.classify, net.heatmap):
        with pytest.raises(
            fcvgg.ImageError,
            match=r"^an input of 20x30 pixels does not fit into memory whole \(Def.*\); choose a "
            r"smaller scale, or compute it strip by strip with fcvgg\.stream$",
        ):
            read(noise(20, 30, 3))


# -- scales and flips -----------------------------------------------------------------------------


@pytest.mark.parametrize("image", [noise(20, 30, 3), torch.rand(3, 20, 30)], ids=["file", "tensor"])
def test_with_smallest_side_keeps_the_aspect_ratio(image: Any) -> None:
    prepared = prepare(image, fcvgg.Preprocess.imagenet(), 3)
    for side, size in ((10, (10, 15)), (20, (20, 30)), (30, (30, 45)), (1, (1, 2))):
        scaled = with_smallest_side(prepared, side)
        assert scaled.size == size
        assert scaled.tensor(fcvgg.Preprocess.imagenet()).shape == (1, 3, *size)


def test_a_chosen_scale_is_not_resized_again() -> None:
    preprocess = fcvgg.Preprocess.imagenet(resize=64)
    prepared = prepare(noise(20, 30, 3), preprocess, 3)
    assert prepared.tensor(preprocess).shape[2:] == (64, 96)
    scaled = with_smallest_side(prepared, 10)
    assert scaled.tensor(preprocess).shape[2:] == (10, 15)
    assert mirrored(scaled).tensor(preprocess).shape[2:] == (10, 15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensors_keep_their_dtype_when_rescaled(dtype: torch.dtype) -> None:
    prepared = prepare(torch.rand(3, 20, 30, dtype=dtype), None, 3)
    scaled = with_smallest_side(prepared, 10)
    assert scaled.pixels.dtype == dtype
    assert scaled.pixels.shape == (1, 3, 10, 15)


@pytest.mark.parametrize("side", [0, -5, 2.5, True, "10"])
def test_what_is_no_scale_is_refused(net: fcvgg.FullyConvolutional, side: Any) -> None:
    with pytest.raises(fcvgg.ImageError, match="scales must be positive integers, in pixels, got"):
        net.classify(noise(9, 9, 3), scales=[side])


def test_mirrored_exchanges_left_and_right() -> None:
    pixels = noise(5, 7, 3)
    preprocess = fcvgg.Preprocess.imagenet()
    of_picture = mirrored(prepare(pixels, preprocess, 3)).tensor(preprocess)
    of_tensor = mirrored(prepare(preprocess(Image.fromarray(pixels)), None, 3)).pixels
    assert torch.equal(of_picture, of_tensor)
    assert torch.equal(of_picture.flip(-1), preprocess(Image.fromarray(pixels)))


# -- scaled score maps ----------------------------------------------------------------------------


@pytest.mark.parametrize("resize", [None, 12, (10, 30)], ids=str)
def test_a_scale_takes_the_place_of_the_preprocessings_resize(resize: Any) -> None:
    preprocess = fcvgg.Preprocess((0,) * 3, (1,) * 3, resize=resize)
    net, image = classifier(preprocess=preprocess), Image.fromarray(noise(20, 30, 3))
    made = net.score_map(image, scale=40)
    assert (made.input_size, made.image_size) == ((40, 60), (20, 30))
    assert made.image.size == image.size
    larger = image.resize((60, 40), Image.Resampling.BILINEAR)
    with torch.no_grad():
        expected = net(replace(preprocess, resize=None)(larger))[0]
    torch.testing.assert_close(made.scores, expected, rtol=0, atol=0)
    np.testing.assert_array_equal(made.heatmap(1).values, net.heatmap(image, 1, scales=[40]).values)
    np.testing.assert_array_equal(made.heatmap(1).values, net.heatmap(image, 1, scales=40).values)


def test_a_scaled_score_map_of_a_tensor_keeps_its_pixels(net: fcvgg.FullyConvolutional) -> None:
    made = net.score_map(torch.rand(3, 20, 30), scale=40)
    assert (made.input_size, made.image_size, made.image) == ((40, 60), (20, 30), None)
    with pytest.raises(fcvgg.ImageError, match=r"^scale must be a positive integer, in .*, got 0"):
        net.score_map(torch.rand(3, 20, 30), scale=0)


@pytest.mark.parametrize("name", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_scales_are_interpolated_as_the_preprocessing_says(name: str) -> None:
    preprocess = fcvgg.Preprocess((0,) * 3, (1,) * 3, interpolation=name)
    image = Image.fromarray(noise(20, 30, 3))
    scaled = with_smallest_side(prepare(image, preprocess, 3), 13)
    expected = image.resize((20, 13), INTERPOLATIONS[name])
    assert np.array_equal(np.asarray(scaled.picture), np.asarray(expected))
    of_tensor = with_smallest_side(prepare(preprocess(image), preprocess, 3), 13).pixels
    assert of_tensor.shape == (1, 3, 13, 20)
    if name != "lanczos":  # which torch does not have
        difference = (of_tensor - preprocess(expected)).clamp(-1, 1).abs()
        assert difference.mean() < 0.01


def test_integers_of_32_bits_that_fit_a_byte_are_bytes() -> None:
    pixels = noise(5, 7)
    image = Image.fromarray(pixels.astype(np.int32))
    assert image.mode == "I"
    assert np.array_equal(values(image, 1)[..., 0], pixels)
    brighter = Image.fromarray(np.array([[0, 257 * 100]], np.int32))
    assert values(brighter, 1)[..., 0].tolist() == [[0, 100]]
    dark = Image.fromarray(np.array([[0, 200]], np.uint16))  # mode I;16 says that it has 16 bits
    warn_of_dark_values.cache_clear()
    with pytest.warns(UserWarning, match="only 16-bit values below 16384"):
        np.testing.assert_allclose(values(dark, 1)[..., 0], [[0, 200 / 257]], rtol=1e-6)


# -- what the network is given --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (torch.uint8, r"preprocess them to floats, or use net\.score_map or net\.classify on pixe"),
        (torch.float64, r"cast them with images\.to\(torch\.float32\), or the network with net\.t"),
        (torch.float16, r"cast them with images\.to\(torch\.float32\), or the network with net\.t"),
    ],
    ids=str,
)
def test_images_of_another_dtype_are_refused(
    net: fcvgg.FullyConvolutional, dtype: torch.dtype, remedy: str
) -> None:
    with pytest.raises(
        fcvgg.ImageError,
        match=rf"^images must be of torch\.float32, got {dtype}; {remedy}",
    ):
        net(torch.zeros(1, 3, 9, 9).to(dtype))


def test_autocast_takes_what_it_casts(net: fcvgg.FullyConvolutional) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.zeros(1, 3, 9, 9).bfloat16()).shape == (1, 2, 1, 1)


@pytest.mark.parametrize("preprocess", [lambda image: image, 255, (0.5, 0.5)])
def test_what_is_no_preprocessing_is_refused(preprocess: Any) -> None:
    expected = (
        r"^preprocess must be a fcvgg\.Preprocess, such as fcvgg\.Preprocess\(mean, std\), or one "
        r"of 'imagenet', 'caffe', .*, got "
    )
    with pytest.raises(fcvgg.PreprocessError, match=expected):
        classifier(preprocess=preprocess)
    net = classifier()
    with pytest.raises(fcvgg.PreprocessError, match=expected):
        net.preprocess = preprocess


def test_a_preprocessing_is_given_by_its_name() -> None:
    net = classifier(preprocess="caffe")
    assert net.preprocess == fcvgg.Preprocess.preset("caffe")
    net.preprocess = "imagenet"
    assert net.preprocess == fcvgg.Preprocess.imagenet()
    assert fcvgg.load("demo", preprocess="tf").preprocess == fcvgg.Preprocess.preset("tf")
    fcn = fcvgg.FCN(fcvgg.load("demo"), 2, preprocess="unit")
    assert fcn.preprocess == fcvgg.Preprocess.preset("unit")
    with pytest.raises(
        fcvgg.PreprocessError, match=r"preprocess must be 'imagenet', .*, got 'imagn"
    ):
        classifier(preprocess="imagnet")
