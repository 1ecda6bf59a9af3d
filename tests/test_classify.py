"""Dense evaluation averaged into one prediction, against what the VGG paper says, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fcvgg

PREPROCESS = fcvgg.Preprocess.imagenet()


def classifier(classes: int = 4, *ending: nn.Module) -> fcvgg.FullyConvolutional:
    """Window 8, stride 4; strong weights, so that predictions differ."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(16, classes), *ending).eval()
    nn.init.normal_(model[4].weight)
    return fcvgg.convert(model, preprocess=PREPROCESS)


@pytest.fixture(scope="module")
def net() -> fcvgg.FullyConvolutional:
    return classifier()


def pixels(height: int = 20, width: int = 33, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tensor(array: np.ndarray) -> Tensor:
    return PREPROCESS(Image.fromarray(array))


@torch.no_grad()
def dense(net: fcvgg.FullyConvolutional, image: Tensor, average: str = "scores") -> Tensor:
    """One image at one scale, by hand: logits -> softmax, before or after the mean over space."""
    maps = net(image)
    if average == "scores":
        return maps.mean((2, 3)).softmax(1)
    return maps.softmax(1).mean((2, 3))


@pytest.mark.parametrize("average", ["scores", "probabilities"])
def test_a_single_scale(net: fcvgg.FullyConvolutional, average: str) -> None:
    got = net.classify(pixels(), average=average)
    expected = dense(net, tensor(pixels()), average)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.sum(1), torch.ones(1), rtol=1e-5, atol=0)
    assert (got.dtype, got.device.type) == (torch.float32, "cpu")


def test_the_two_averages_differ(net: fcvgg.FullyConvolutional) -> None:
    of_scores, of_probabilities = (
        net.classify(pixels(), average=name) for name in ("scores", "probabilities")
    )
    assert (of_scores - of_probabilities).abs().max() > 0.01


def test_one_image_of_the_native_size_is_the_source_models_answer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    net = fcvgg.convert(model, input_size=8)
    batch = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        expected = model(batch).softmax(1)
    torch.testing.assert_close(net.classify(batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", ["scores", "probabilities"])
def test_flips_average_probabilities(net: fcvgg.FullyConvolutional, average: str) -> None:
    image = tensor(pixels())
    expected = (dense(net, image, average) + dense(net, image.flip(-1), average)) / 2
    got = net.classify(pixels(), flip=True, average=average)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    mirrored = net.classify(pixels()[:, ::-1].copy(), flip=True, average=average)
    torch.testing.assert_close(got, mirrored, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flip", [False, True])
def test_scales_are_smallest_sides_and_average_probabilities(
    net: fcvgg.FullyConvolutional, flip: bool
) -> None:
    image = Image.fromarray(pixels(20, 30))
    views = [PREPROCESS(image.resize((w, h), 2)) for h, w in ((8, 12), (20, 30), (32, 48))]
    views += [view.flip(-1) for view in views] if flip else []
    expected = torch.stack([dense(net, view) for view in views]).mean(0)
    got = net.classify(image, scales=[8, 20, 32], flip=flip)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_images_may_differ_in_size(net: fcvgg.FullyConvolutional) -> None:
    sizes = [(20, 33), (8, 8), (3, 5), (33, 20), (20, 33), (1, 1), (8, 8)]
    images = [pixels(*size, seed=i) for i, size in enumerate(sizes)]
    one_by_one = torch.cat([net.classify(image, flip=True) for image in images])
    torch.testing.assert_close(net.classify(images, flip=True), one_by_one, rtol=1e-5, atol=1e-6)


def test_every_form_of_the_same_image_gives_the_same(
    net: fcvgg.FullyConvolutional, tmp_path: Path
) -> None:
    image = Image.fromarray(pixels())
    image.save(tmp_path / "a.png")
    forms: list[Any] = [
        pixels(),
        image,
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        tensor(pixels()),
        tensor(pixels())[0],
        tensor(pixels()).double(),
    ]
    together = net.classify(forms)
    assert together.shape == (7, 4)
    torch.testing.assert_close(together, net.classify(pixels()).expand(7, 4), rtol=1e-5, atol=1e-6)
    assert net.classify(tuple(forms[:2])).shape == (2, 4)
    for form in forms:
        torch.testing.assert_close(net.classify(form)[0], together[0], rtol=1e-5, atol=1e-6)


def test_a_batch_of_tensors(net: fcvgg.FullyConvolutional) -> None:
    batch = torch.randn(5, 3, 20, 14)
    torch.testing.assert_close(net.classify(batch), dense(net, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("average", ["scores", "probabilities"])
@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.LogSoftmax(1)], ids=["soft", "log"])
def test_probabilities_are_never_softmaxed_twice(ending: nn.Module, average: str) -> None:
    """Scores that are probabilities, or their logarithms, are averaged as probabilities."""
    expected = classifier().classify(pixels(), average="probabilities", flip=True)
    got = classifier(4, ending).classify(pixels(), average=average, flip=True)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


ENDINGS = {
    "limited": lambda x: x.softmax(1).clamp(1e-7, 1),
    "divided": lambda x: x.softmax(1) / 1.0,
    "averaged": lambda x: (x.softmax(1) + x.softmax(1)) / 2,
}


class Ending(nn.Module):
    def __init__(self, call: Any):
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_probabilities_that_are_computed_with_are_not_softmaxed_again(ending: Any) -> None:
    expected = classifier().classify(pixels(), average="probabilities")
    got = classifier(4, Ending(ending)).classify(pixels())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


UNKNOWN = (
    r"^what the scores are cannot be read off the model, which computes on after its softmax or "
    r"sigmoid; pass activation= to fcvgg\.convert: 'logits', 'probabilities', "
    r"'log_probabilities', 'sigmoid', 'independent_logits' or 'values'$"
)


def test_scores_that_may_be_anything_are_no_probabilities(tmp_path: Path) -> None:
    unknown = classifier(4, Ending(lambda x: x.softmax(1) ** 2))
    again = fcvgg.load(unknown.save(tmp_path / "bundle"), preprocess=PREPROCESS)
    for net in (unknown, again):
        assert net.activation == "unknown"
        score_map = net.score_map(pixels())
        assert score_map.label_map().shape == score_map.scores.shape[1:]
        for use in (
            score_map.probabilities,
            score_map.predict,
            score_map.top,
            score_map.heatmap,
            lambda: score_map.heatmap(1),  # noqa: B023
            lambda: net.heatmap(pixels(), 1),  # noqa: B023
            lambda: net.classify(pixels()),  # noqa: B023
        ):
            with pytest.raises(fcvgg.ArgumentError, match=UNKNOWN):
                use()
    unknown.activation = "sigmoid"
    torch.testing.assert_close(unknown.classify(pixels()).shape, torch.Size([1, 4]))


def test_scores_that_may_be_anything_are_what_the_user_says() -> None:
    layers = [
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 3),
        Ending(lambda x: 1 - x.sigmoid()),
    ]
    net = fcvgg.convert(nn.Sequential(*layers), input_size=8, activation="sigmoid")
    batch = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(net.classify(batch), net(batch).flatten(1).detach())


def test_one_class_and_independent_classes_use_a_sigmoid() -> None:
    one = classifier(1)
    with torch.no_grad():
        expected = one(tensor(pixels())).mean((2, 3)).sigmoid()
    torch.testing.assert_close(one.classify(pixels()), expected, rtol=1e-5, atol=1e-6)
    several = classifier(4, nn.Sigmoid())
    with torch.no_grad():
        expected = several(tensor(pixels())).mean((2, 3))
    torch.testing.assert_close(several.classify(pixels()), expected, rtol=1e-5, atol=1e-6)


def test_the_mode_and_the_gradients_are_left_alone() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(), nn.Linear(144, 2)]
    net = fcvgg.convert(nn.Sequential(*layers), input_size=8, preprocess=PREPROCESS, copy=True)
    net.train()
    net.network.get_submodule("1").eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (net.classify(pixels()) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_bfloat16(net: fcvgg.FullyConvolutional) -> None:
    half = classifier().bfloat16()
    got = half.classify(pixels(), scales=[16, 24], flip=True)
    assert got.dtype == torch.float32
    expected = net.classify(pixels(), scales=[16, 24], flip=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("images", [[], (), torch.zeros(0, 3, 8, 8)], ids=["[]", "()", "batch"])
def test_no_images(net: fcvgg.FullyConvolutional, images: Any) -> None:
    with pytest.raises(fcvgg.ImageError, match="images must hold at least one, got none"):
        net.classify(images)


def test_an_unknown_average(net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(
        fcvgg.FcvggError,
        match=r"^average must be 'scores' or 'probabilities', got 'mean'$",
    ):
        net.classify(pixels(), average="mean")


def test_an_output_that_does_not_exist(net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(fcvgg.FcvggError, match=r"^output must be 0, the only one, got 1$"):
        net.classify(pixels(), output=1)


def test_one_bad_image_of_many_is_named(net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(fcvgg.ImageError, match=r"there is no image file absent\.png"):
        net.classify([pixels(), "absent.png"])


@pytest.mark.parametrize("scales", [16, np.int64(16), np.array([16]), (16,), range(16, 17)])
def test_scales_may_be_one_length_or_any_sequence(
    net: fcvgg.FullyConvolutional, scales: Any
) -> None:
    torch.testing.assert_close(
        net.classify(pixels(), scales=scales), net.classify(pixels(), scales=[16]), rtol=0, atol=0
    )


@pytest.mark.parametrize("scales", ["16", 16.5, ["16"]])
def test_what_is_no_length_is_no_scale(net: fcvgg.FullyConvolutional, scales: Any) -> None:
    with pytest.raises(fcvgg.ImageError, match=r"^scales must be positive integers, .*, got '?16"):
        net.classify(pixels(), scales=scales)


@pytest.mark.parametrize("scales", [[], (), np.array([], int), {}.values()])
def test_no_scale_is_not_the_same_as_none_given(net: fcvgg.FullyConvolutional, scales: Any) -> None:
    with pytest.raises(
        fcvgg.ArgumentError, match=r"^scales must be smaller sides in pixels, or None"
    ):
        net.classify(pixels(), scales=scales)


@pytest.mark.parametrize("flip", [[], None, "no", 1])
def test_flip_is_true_or_false(net: fcvgg.FullyConvolutional, flip: Any) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=r"^flip must be True or False, got "):
        net.classify(pixels(), flip=flip)


def test_any_iterable_of_images(net: fcvgg.FullyConvolutional) -> None:
    arrays = [pixels(seed=i) for i in range(3)]
    expected = net.classify(arrays)
    for images in (iter(arrays), dict(enumerate(arrays)).values(), np.stack(arrays)):
        torch.testing.assert_close(net.classify(images), expected)
    of_tensors = net.classify(tensor(array) for array in arrays)
    torch.testing.assert_close(of_tensors, expected)


def test_bytes_that_are_no_image(net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(fcvgg.ImageError, match=r"^the image is not an image that Pillow can read"):
        net.classify(b"photo.jpg")


@pytest.mark.parametrize("output", [3, -1, "scores", None])
def test_the_activation_of_an_output_that_does_not_exist(
    net: fcvgg.FullyConvolutional, output: Any
) -> None:
    with pytest.raises(
        fcvgg.ArgumentError, match=rf"^output must be 0, the only one, got {output!r}$"
    ):
        net.activation_of(output)


def test_a_folder_stands_for_its_images_by_name(
    net: fcvgg.FullyConvolutional, tmp_path: Path
) -> None:
    for seed, name in enumerate(("b.png", "a.PNG", "c.png")):
        Image.fromarray(pixels(seed=seed)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    expected = net.classify([pixels(seed=seed) for seed in (1, 0, 2)])
    with pytest.warns(fcvgg.errors.FcvggWarning, match=r"^1 of 4 files left out: 1 \.txt"):
        torch.testing.assert_close(net.classify(tmp_path), expected)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(fcvgg.ImageError, match=r"^the folder .*empty has no images; pass one"):
        net.classify(str(empty))


def test_batch_size_bounds_what_runs_together(
    net: fcvgg.FullyConvolutional, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [pixels(seed=i) for i in range(5)]
    expected, seen = net.classify(images), list[int]()
    forward = type(net).forward

    def counting(self: Any, batch: Tensor) -> Any:
        seen.append(len(batch))
        return forward(self, batch)

    monkeypatch.setattr(type(net), "forward", counting)
    torch.testing.assert_close(net.classify(images, batch_size=2, progress=True), expected)
    assert seen == [2, 2, 1]
    with pytest.raises(fcvgg.ArgumentError, match=r"^batch_size must be an integer of at least 1"):
        net.classify(images, batch_size=0)


def test_an_address_keeps_its_slashes(net: fcvgg.FullyConvolutional) -> None:
    with pytest.raises(fcvgg.ImageError, match=r"got the address https://x\.org/a\.png; download"):
        net.score_map("https://x.org/a.png")
