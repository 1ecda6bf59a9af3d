"""`VGGFeatures`: scikit-learn's own checks, exact features, every kind of image, caches."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import SmallVGG, images, seeded
from PIL import Image
from torch import nn

import fcvgg
from fcvgg.demo import demo_photograph
from fcvgg.transfer.image_features import DiskCache, MemoryCache

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from sklearn.utils.estimator_checks import check_estimator

HALF = fcvgg.Preprocess((0.5,) * 3, (0.25,) * 3)

EXPECTED_TO_SKIP = {"check_array_api_input": "SCIPY_ARRAY_API is not set in these tests"}
"""Checks that do not apply. With a model object in place of a name, `check_estimators_overwrite_
params` cannot pass either: it compares joblib hashes of a parameter and of its deep copy, and those
of one and the same nn.Module differ."""


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return seeded(SmallVGG, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore:.*was skipped")
def test_scikit_learns_own_checks() -> None:
    estimator = fcvgg.VGGFeatures(
        "demo", "pool1", image_shape=(1, -1), value_range=(-3, 3), size=(8, 8)
    )
    results = check_estimator(estimator, on_fail=None, on_skip=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    skipped = {r["check_name"] for r in results if r["status"] == "skipped"}
    assert not failed
    assert skipped <= EXPECTED_TO_SKIP.keys()
    assert sum(r["status"] == "passed" for r in results) >= 40


@pytest.mark.parametrize("pooling", ["avg", "max", None])
@pytest.mark.parametrize("layer", ["pool1", "block2_conv1", "conv2_1", "pool2"])
def test_features_are_the_layers_pooled(small: nn.Module, pooling: str | None, layer: str) -> None:
    batch = images(5, 3, 20, 24, dtype=torch.float32)
    rows = fcvgg.VGGFeatures(small, layer, pooling, batch_size=2).fit_transform(batch)
    with torch.no_grad():
        maps = fcvgg.features_upto(small, layer).eval()(batch)
    expected = {"avg": maps.mean((2, 3)), "max": maps.amax((2, 3)), None: maps.flatten(1)}
    assert rows.dtype == np.float32
    assert np.allclose(rows, expected[pooling].numpy(), rtol=1e-5, atol=1e-6)


def test_head_features_of_a_model_and_of_its_conversion(small: nn.Module) -> None:
    batch = images(3, 3, 32, 32, dtype=torch.float32)
    with torch.no_grad():
        expected = small.classifier[:4](torch.flatten(small.features(batch), 1)).numpy()
    rows = fcvgg.VGGFeatures(small, "fc7").fit_transform(batch)
    assert np.allclose(rows, expected, rtol=1e-5, atol=1e-6)
    dense = fcvgg.VGGFeatures(fcvgg.convert(small), "fc7").fit(batch)
    assert np.allclose(dense.transform(batch), expected, rtol=1e-5, atol=1e-6)
    assert dense.transform(images(2, 3, 50, 41, dtype=torch.float32)).shape == (2, 16)


def test_every_kind_of_image_gives_the_same(tmp_path: Path) -> None:
    picture = demo_photograph().resize((48, 40))
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    net = fcvgg.load("demo")
    one = fcvgg.VGGFeatures(net, "pool2").fit([picture])
    expected = one.transform([picture])
    for other in (
        [tmp_path / "a.png"],
        [str(tmp_path / "a.png")],
        np.array([str(tmp_path / "a.png")]),
        [array],
        array[None],
        net.preprocess(picture),
        [net.preprocess(picture)[0]],
    ):
        np.testing.assert_allclose(one.transform(other), expected, rtol=1e-5, atol=1e-6)
    floats = fcvgg.VGGFeatures(net, "pool2", value_range=(0, 1)).fit_transform(array[None] / 255)
    assert np.allclose(floats, expected, rtol=1e-4, atol=1e-5)
    table = fcvgg.VGGFeatures(net, "pool2", image_shape=(40, 48, 3))
    np.testing.assert_allclose(
        table.fit_transform(array.reshape(1, -1)), expected, rtol=1e-5, atol=1e-6
    )


def test_size_is_the_preprocessings_resize() -> None:
    net = fcvgg.load("demo")
    photograph = demo_photograph().crop((0, 0, 300, 200))
    for size in (40, (40, 48)):
        pixels = replace(net.preprocess, resize=size)(photograph)
        expected = fcvgg.VGGFeatures(net, "pool2").fit_transform(pixels)
        got = fcvgg.VGGFeatures(net, "pool2", size=size).fit_transform([photograph])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_images_of_different_sizes_keep_their_order(small: nn.Module) -> None:
    sizes = [(20, 20), (32, 24), (20, 20), (16, 40), (32, 24)]
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (*s, 3), dtype=np.uint8)) for s in sizes]
    features = fcvgg.VGGFeatures(small, "pool2", preprocess=HALF, batch_size=3).fit(pictures)
    together = features.transform(pictures)
    apart = np.concatenate([features.transform([p]) for p in pictures])
    assert np.allclose(together, apart, rtol=1e-5, atol=1e-6)


# -- pipelines --------------------------------------------------------------------------------


@pytest.mark.parametrize("classifier", [LinearSVC(), LogisticRegression(max_iter=1000)])
def test_digits_in_a_pipeline(classifier) -> None:
    X, y = load_digits(return_X_y=True)  # noqa: N806
    X, y = X[:200], y[:200]  # noqa: N806
    features = fcvgg.VGGFeatures(
        "demo",
        "pool1",
        pooling=None,
        size=(16, 16),
        image_shape=(8, 8),
        value_range=(0, 16),
        cache="memory",
    )
    pipeline = make_pipeline(features, StandardScaler(), classifier)
    assert cross_val_score(pipeline, X, y, cv=3).mean() > 0.85


def test_grid_search_over_layers_shares_the_network(small: nn.Module) -> None:
    X = images(12, 3, 16, 16, dtype=torch.float32).numpy()  # noqa: N806
    X = (X - X.min()).transpose(0, 2, 3, 1)  # noqa: N806
    y = np.arange(12) % 2
    features = fcvgg.VGGFeatures(small, preprocess=HALF, value_range=(0, 8))
    assert clone(features).model is small
    search = GridSearchCV(
        make_pipeline(features, LogisticRegression()),
        {"vggfeatures__layer": ["pool1", "pool2"]},
        cv=2,
    ).fit(X, y)
    assert search.best_params_["vggfeatures__layer"] in ("pool1", "pool2")


def test_names_of_features_and_pickles(small: nn.Module) -> None:
    batch = images(2, 3, 16, 16, dtype=torch.float32)
    features = fcvgg.VGGFeatures(small, "pool1").fit(batch)
    assert features.get_feature_names_out().tolist() == [f"pool1_{i}" for i in range(8)]
    again = pickle.loads(pickle.dumps(features))
    np.testing.assert_allclose(
        again.transform(batch), features.transform(batch), rtol=1e-5, atol=1e-6
    )


# -- caches -----------------------------------------------------------------------------------


def counted(features: fcvgg.VGGFeatures, batch: torch.Tensor, monkeypatch) -> int:
    """How many images the network runs on in a transform."""
    seen: list[int] = []
    network = features.extractor_.network
    run = type(network).maps
    monkeypatch.setattr(
        type(network), "maps", lambda self, x, names: seen.append(len(x)) or run(self, x, names)
    )
    features.transform(batch)
    monkeypatch.undo()
    return sum(seen)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_what_was_computed_is_found_again(small, kind, tmp_path, monkeypatch) -> None:
    cache = "memory" if kind == "memory" else tmp_path / "cache"
    monkeypatch.setattr("fcvgg.transfer.image_features.MEMORY", MemoryCache())
    batch = images(4, 3, 16, 16, dtype=torch.float32)
    features = fcvgg.VGGFeatures(small, "pool1", cache=cache).fit(batch)
    assert counted(features, batch, monkeypatch) == 3  # fit saw the first
    monkeypatch.setattr("fcvgg.transfer.image_features.MEMORY", features.extractor_._cache)
    fresh = fcvgg.VGGFeatures(small, "pool1", cache=cache).fit(batch)
    assert counted(fresh, batch, monkeypatch) == 0
    plain = fcvgg.VGGFeatures(small, "pool1").fit_transform(batch)
    assert np.allclose(fresh.transform(batch), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [{"pooling": "max"}, {"layer": "pool2"}, {"size": 24}, {"model": "other weights"}],
    ids=lambda c: next(iter(c)),
)
def test_nothing_stale_is_found(small, change, tmp_path, monkeypatch) -> None:
    batch = images(3, 3, 16, 16, dtype=torch.float32)
    first = {"model": small, "layer": "pool1", "cache": tmp_path}
    fcvgg.VGGFeatures(**first).fit(batch).transform(batch)
    if "model" in change:
        other = SmallVGG()
        other.load_state_dict(small.state_dict())
        with torch.no_grad():
            other.features[0].weight[0, 0, 0, 0] += 1e-3
        change = {"model": other}
    changed = fcvgg.VGGFeatures(**{**first, **change}).fit(batch)
    assert counted(changed, batch, monkeypatch) == 2  # fit saw the first image


def test_broken_files_are_computed_anew(small, tmp_path) -> None:
    batch = images(2, 3, 16, 16, dtype=torch.float32)
    features = fcvgg.VGGFeatures(small, "pool1", cache=tmp_path).fit(batch)
    expected = features.transform(batch)
    files = sorted(tmp_path.rglob("*.npy"))
    assert len(files) == 2
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:50])
    assert np.allclose(features.transform(batch), expected, rtol=1e-5, atol=1e-6)
    assert DiskCache(tmp_path).get(files[0].stem) is not None


def test_the_cache_in_memory_has_a_limit() -> None:
    cache = MemoryCache(limit=100)
    for i in range(5):
        cache.put(str(i), np.zeros(10, np.float32))  # 40 bytes
    assert [key for key in "01234" if cache.get(key) is not None] == ["3", "4"]
    assert cache.size == 80
    cache.clear()
    assert cache.size == 0


def test_progress_goes_to_a_terminal_only(small, capsys) -> None:
    batch = images(2, 3, 16, 16, dtype=torch.float32)
    fcvgg.VGGFeatures(small, "pool1", progress=True).fit_transform(batch)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip() == ""


# -- refusals ---------------------------------------------------------------------------------

NOISE = np.zeros((2, 16, 16, 3), np.uint8)


@pytest.mark.parametrize(
    ("options", "X", "message"),
    [
        ({"pooling": "sum"}, NOISE, "pooling must be 'avg', 'max' or None, got 'sum'"),
        ({"batch_size": 0}, NOISE, "batch_size must be an integer of at least 1, got 0"),
        ({"size": (0, 3)}, NOISE, "size must be a positive int or (h, w), got (0, 3)"),
        (
            {"value_range": (1, 1)},
            NOISE,
            "value_range must be two different numbers (low, high)",
        ),
        ({"cache": 3}, NOISE, "cache must be None, 'memory' or a folder, got 3"),
        ({"layer": "pool9"}, NOISE, "the model has no layer 'pool9' (near: "),
        ({"size": (3, 9)}, NOISE, "an image of (3, 9) pixels is too small for pool2, which needs"),
        ({"preprocess": None}, NOISE, "the network's preprocessing is unknown, so an image file"),
        ({}, NOISE + 300.0, "the array (16, 16, 3) must hold floats from 0 to 1, got float64"),
        (
            {},
            np.zeros((2, 48)),
            "X must hold images, got a table of 48 numbers per image; pass image_shape=(H, W) or",
        ),
        (
            {"image_shape": (7, 7)},
            np.zeros((2, 48)),
            "image_shape must hold the 48 numbers of a row of X, got (7, 7)",
        ),
        ({}, "photo.jpg", "X must be a sequence of images, got one str; pass [X]"),
        ({}, [], "X must hold at least one image, got none"),
        ({}, ["absent.jpg"], "there is no image file absent.jpg"),
        (
            {"pooling": None},
            [NOISE[0], np.zeros((16, 24, 3), np.uint8)],
            "the images give 288 features with pooling=None, but the one seen in fit gave 192",
        ),
    ],
)
def test_refusals(small, options, X, message) -> None:  # noqa: N803
    features = fcvgg.VGGFeatures(small, **{"layer": "pool2", "preprocess": HALF, **options})
    with pytest.raises(fcvgg.FcvggError, match=f"^{re.escape(message)}"):
        features.fit(X).transform(X[1:] if options.get("pooling", 1) is None else X)


def test_different_lengths_in_one_call(small) -> None:
    pictures = [NOISE[0], np.zeros((16, 24, 3), np.uint8)]
    features = fcvgg.VGGFeatures(small, "pool2", None, preprocess=HALF).fit(pictures)
    message = "images of different sizes give [192, 288] features with pooling=None; pass size="
    with pytest.raises(fcvgg.ImageError, match=f"^{re.escape(message)}"):
        features.transform(pictures)


def test_without_scikit_learn_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None\n"
        "import fcvgg\n"
        "try: fcvgg.VGGFeatures\n"
        "except fcvgg.MissingExtraError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("VGGFeatures needs scikit-learn 1.6 or later, which cannot be")
    assert run.stdout.rstrip().endswith("install it with: pip install 'fcvgg[sklearn]'")
