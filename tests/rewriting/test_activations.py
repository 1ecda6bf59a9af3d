"""What scores are, and that nothing is called a probability that cannot be one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import run
from nets import images, seeded
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import fcvgg
from fcvgg.evaluation.window_comparison import compare_windows
from fcvgg.probability import ACTIVATIONS, to_probabilities
from fcvgg.streaming.score_store import open_store

PLAIN = fcvgg.Preprocess((0,) * 3, (1,) * 3)


def classifier(classes: int = 3) -> nn.Module:
    """Native size 12, whose last layer gives scores on both sides of 0."""
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(54, classes))
        ),
        dtype=torch.float32,
    )
    with torch.no_grad():
        model[3].bias.copy_(torch.linspace(-1.5, 1.5, classes) if classes > 1 else torch.ones(1))
    return model


def network(activation: str | None, classes: int = 3) -> fcvgg.FullyConvolutional:
    """A network whose scores are said to be of a kind, whatever they are."""
    return fcvgg.convert(classifier(classes), activation=activation, preprocess=PLAIN, verify=False)


@pytest.fixture
def picture() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 255, (32, 28, 3)).astype(np.uint8)


# -- independent logits ---------------------------------------------------------------------------


def test_independent_logits_go_through_a_sigmoid_each(picture: NDArray[np.uint8]) -> None:
    net = network("independent_logits")
    made = net.score_map(picture)
    expected = torch.sigmoid(made.scores)
    torch.testing.assert_close(made.probabilities(), expected)
    torch.testing.assert_close(made.predict("probabilities"), expected.mean((1, 2)))
    averaged = torch.sigmoid(made.scores.mean((1, 2)))
    torch.testing.assert_close(net.classify(picture)[0], averaged)
    torch.testing.assert_close(fcvgg.stream(net, picture).probabilities(), expected)
    some = fcvgg.stream(net, picture, classes=[2])
    torch.testing.assert_close(some.probabilities(), expected[2:])
    heatmap = net.heatmap(picture, 1)
    assert heatmap.values.min() >= expected[1].min().item() - 1e-6
    assert heatmap.values.max() <= expected[1].max().item() + 1e-6
    assert torch.equal(made.label_map(), made.scores.argmax(0))


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(
            ("multi_label_classification", "independent_logits"),
            ("multilabel", "independent_logits"),
        ),
        *(("regression", "values"), ("single_label_classification", "logits")),
    ],
)
def test_spellings_of_other_libraries(spelling: str, name: str) -> None:
    assert network(spelling).activation == name


@pytest.mark.parametrize("value", ["softmax", "", 3, ("logits",), ["logits"]])
def test_an_unknown_activation_explains_the_known_ones(value: Any) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=r"^activation must be 'logits'") as caught:
        fcvgg.convert(classifier(), activation=value)
    assert all(f"{kind!r} ({what})" in str(caught.value) for kind, what in ACTIVATIONS.items())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("activation", ["independent_logits", "values"])
@pytest.mark.parametrize("name", ["bundle", "net.onnx"])
def test_files_keep_what_scores_are(activation: str, name: str, tmp_path: Path) -> None:
    net = network(activation)
    if name == "net.onnx":
        pytest.importorskip("onnx")
        net.export(tmp_path / name)
    else:
        net.save(tmp_path / name)
    loaded = fcvgg.load(tmp_path / name)
    assert loaded.activation == activation
    assert fcvgg.optimize(net).activation == activation


def test_load_takes_what_scores_are() -> None:
    assert fcvgg.load("demo", activation="independent_logits").activation == "independent_logits"


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize(
    "use",
    [
        *(lambda net, x: net.classify(x), lambda net, x: net.heatmap(x, 0)),
        *(lambda net, x: net.heatmap(x, 0, scales=[32, 48]), lambda net, x: net.score_map(x).top()),
        lambda net, x: net.score_map(x).probabilities(),
        lambda net, x: net.score_map(x).predict(),
        lambda net, x: net.score_map(x).label_map(),
        lambda net, x: net.score_map(x).heatmap(0),
        lambda net, x: fcvgg.stream(net, x, classes="argmax"),
        lambda net, x: fcvgg.stream(net, x, classes="top5"),
    ],
)
def test_values_are_no_probabilities(
    use: Callable[[Any, Any], Any], classes: int, picture: NDArray[np.uint8]
) -> None:
    net = network("values", classes)
    with pytest.raises(
        fcvgg.ArgumentError, match=r"are values .*'fcvgg stream IMAGE -o values.zarr' writes"
    ):
        use(net, picture)


def test_values_come_out_as_they_are(picture: NDArray[np.uint8]) -> None:
    net = network("values", 1)
    made = net.score_map(picture)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    torch.testing.assert_close(made.scores, net(pixels)[0].detach())
    torch.testing.assert_close(made.average(), made.scores.mean((1, 2)))
    torch.testing.assert_close(fcvgg.stream(net, picture).scores, made.scores)


def test_one_class_is_a_sigmoid_unless_it_is_a_value(picture: NDArray[np.uint8]) -> None:
    for activation in (None, "logits", "independent_logits"):
        made = network(activation, 1).score_map(picture)
        torch.testing.assert_close(made.probabilities(), torch.sigmoid(made.scores))


# -- scores that are said to be probabilities -----------------------------------------------------

FALSE = {
    "sigmoid": r"^scores must be in \[0, 1\] where activation='sigmoid', got -\d",
    "probabilities": r"^scores must be in \[0, 1\] where activation='probabilities', got -\d",
    "log_probabilities": r"^scores must be at most 0 where activation='log_probabilities', got \d",
}


@pytest.mark.parametrize("activation", FALSE)
@pytest.mark.parametrize(
    "use",
    [
        *(lambda net, x: net.classify(x), lambda net, x: net.heatmap(x)),
        *(
            lambda net, x: net.classify(x, average="probabilities"),
            lambda net, x: net.heatmap(x, 0),
        ),
        *(lambda net, x: net.score_map(x).top(), lambda net, x: net.score_map(x).probabilities()),
        *(lambda net, x: net.score_map(x).heatmap(0), lambda net, x: net.score_map(x).plot()),
        lambda net, x: fcvgg.stream(net, x).probabilities(),
        lambda net, x: fcvgg.stream(net, x).heatmap(),
    ],
)
def test_scores_outside_their_range_are_refused(
    activation: str, use: Callable[[Any, Any], Any], picture: NDArray[np.uint8]
) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=FALSE[activation]) as caught:
        use(network(activation), picture)
    assert "pass activation='logits' or 'independent_logits'" in str(caught.value)


@pytest.mark.parametrize("activation", FALSE)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_range_that_the_graph_does_not_show_is_tried_by_convert(
    activation: str, classes: int
) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=r"^scores must be (in \[0, 1\]|at most 0) where"):
        fcvgg.convert(classifier(classes), activation=activation)
    model = classifier(classes)
    with torch.no_grad():  # in range for values of usual size
        model[3].weight.mul_(-0.3 if activation == "log_probabilities" else 0.3)
        model[3].bias.fill_(-0.5 if activation == "log_probabilities" else 0.5)
        torch.manual_seed(0)
        usual = to_probabilities(model(torch.randn(4, 3, 12, 12)), activation, dim=1)
        assert usual.isfinite().all()
    with pytest.raises(fcvgg.ArgumentError, match=r"^scores must be (in \[0, 1\]|at most 0) where"):
        fcvgg.convert(model, activation=activation)
    with torch.no_grad():  # and always
        model[3].weight.zero_()
    assert fcvgg.convert(model, activation=activation).activation == activation


def test_the_command_line_tries_it_too(tmp_path: Path) -> None:
    network(None).save(tmp_path / "bundle")
    for model in ("demo", tmp_path / "bundle"):
        ran = run("convert", model, "--activation", "probabilities", "-o", tmp_path / "converted")
        assert ran.exit_code == 2
        assert "scores must be in [0, 1] where --activation 'probabilities', got" in ran.stderr
        assert not (tmp_path / "converted").exists()


def test_the_command_line_streams_values(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    net = network("values", 1)
    net.save(tmp_path / "bundle")
    Image.fromarray(picture).save(tmp_path / "picture.png")
    ran = run("classify", tmp_path / "picture.png", "--model", tmp_path / "bundle")
    assert ran.exit_code == 2
    assert "'fcvgg stream IMAGE -o values.zarr' writes them" in ran.stderr
    values = tmp_path / "values.zarr"
    ran = run("stream", tmp_path / "picture.png", "--model", tmp_path / "bundle", "-o", values)
    assert ran.exit_code == 0, ran.stderr
    torch.testing.assert_close(
        torch.from_numpy(open_store(values).array[:]), net.score_map(picture).scores
    )


@pytest.mark.parametrize("activation", FALSE)
def test_evaluation_refuses_them_too(activation: str, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(tmp_path / name / "1.png")
    net = network(activation)
    net.categories = ("a", "b", "c")
    with pytest.raises(fcvgg.ArgumentError, match=FALSE[activation]):
        fcvgg.evaluate(net, tmp_path, protocols=["dense"])


def test_a_stored_map_refuses_them_too(picture: NDArray[np.uint8], tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    store = fcvgg.stream(network("sigmoid"), picture, out=tmp_path / "map.zarr")
    with pytest.raises(fcvgg.ArgumentError, match=FALSE["sigmoid"]):
        store.heatmap(0)


@pytest.mark.parametrize(
    ("scores", "activation", "expected"),
    [
        ([-1e-5, 0.5, 1 + 1e-5], "sigmoid", [0.0, 0.5, 1.0]),
        ([-1e-5, 0.5, 1 + 1e-5], "probabilities", [0.0, 0.5, 1.0]),
        ([1e-5, -1.0, float("-inf")], "log_probabilities", [1.0, np.exp(-1), 0.0]),
        ([float("nan"), 0.5, 1.0], "sigmoid", [float("nan"), 0.5, 1.0]),
    ],
)
def test_rounding_is_cut_and_what_is_not_a_number_stays(
    scores: list[float], activation: str, expected: list[float]
) -> None:
    got = to_probabilities(torch.tensor(scores, dtype=torch.float64)[:, None, None], activation)
    wanted = torch.tensor(expected, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(got, wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_true_probabilities_of_every_dtype_are_taken(dtype: torch.dtype) -> None:
    scores = torch.softmax(images(5, 8, 8, dtype=torch.float32) * 9, 0).to(dtype)
    for activation in ("probabilities", "sigmoid"):
        got = to_probabilities(scores, activation)
        assert got.min() >= 0
        assert got.max() <= 1


def test_windows_of_values_compare_no_classes(picture: NDArray[np.uint8]) -> None:
    model = classifier()
    net = fcvgg.convert(model, activation="values", preprocess=PLAIN)
    with pytest.raises(fcvgg.ArgumentError, match="are values"):
        compare_windows(model, net, picture)
