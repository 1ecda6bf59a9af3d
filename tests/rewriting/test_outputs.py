"""The form of a model's outputs: containers of vectors become the same containers of maps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from nets import EXACT, Headed, Lambda, images, native_error, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg
from fcvgg.rewriting.outputs import flattened, form_of_data


class Scores(NamedTuple):
    age: Any
    sex: Any = None


@dataclass
class Result:
    logits: Any
    loss: Any = None


def heads(form: Callable[[Tensor, Tensor], Any]) -> nn.Module:
    """Two heads of 4 and 2 classes on 8x6x6 unpadded features, returned in a form."""

    def call(x: Tensor, age: nn.Module, sex: nn.Module) -> Any:
        return form(age(x.flatten(1)), sex(x.flatten(1)))

    return seeded(Headed, Lambda(call, nn.Linear(128, 4), nn.Linear(128, 2)), pads=0)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "tensor": (lambda a, b: a, [""]),
    "tuple": (lambda a, b: (a, b), ["0", "1"]),
    "list": (lambda a, b: [a], ["0"]),
    "none": (lambda a, b: (a, None), ["0"]),
    "dict": (lambda a, b: {"age": a, "sex": b}, ["age", "sex"]),
    "dict with none": (lambda a, b: {"aux": None, "logits": b, "loss": 0.0}, ["logits"]),
    "ordered": (lambda a, b: OrderedDict(b=b, a=a), ["b", "a"]),
    "numbered": (lambda a, b: {0: a, 1: b}, ["0", "1"]),
    "NamedTuple": (Scores, ["age", "sex"]),
    "NamedTuple with none": (lambda a, b: Scores(a), ["age"]),
    "dataclass": (lambda a, b: Result(b), ["logits"]),
    "dataclass of two": (Result, ["logits", "loss"]),
    "nested": (lambda a, b: {"x": [a, (b,)], "y": Scores(b)}, ["x.0", "x.1.0", "y.age"]),
}


def same_form(expected: Any, got: Any) -> bool:
    """Whether two values are the same containers, also by class, up to their tensors."""
    if isinstance(expected, Tensor):
        return isinstance(got, Tensor)
    if isinstance(expected, dict):  # an OrderedDict may come back as a dict
        alike = isinstance(got, dict) and list(expected) == list(got)
        return alike and all(same_form(expected[k], got[k]) for k in expected)
    if type(expected) is not type(got):
        return False
    if isinstance(expected, (tuple, list)):
        return len(expected) == len(got) and all(map(same_form, expected, got))
    if isinstance(expected, Result):
        return all(same_form(getattr(expected, k), getattr(got, k)) for k in vars(expected))
    return expected == got


@pytest.mark.parametrize("name", FORMS)
def test_maps_come_in_the_containers_of_the_source(name: str, tmp_path: Path) -> None:
    form, names = FORMS[name]
    model = heads(form)
    net = fcvgg.convert(model, input_size=22)
    assert net.outputs == tuple(names)
    assert native_error(model, net) <= EXACT[torch.float64]
    batch = images(1, 3, 26, 30)
    with torch.no_grad():
        assert same_form(model(batch[:, :, :22, :22]), net(batch))
        maps = flattened(net(batch))[0]
        for i, scores in enumerate(maps):

            def output(x: Tensor, i: int = i) -> Tensor:
                return flattened(model(x))[0][i]

            windows = sliding_window(output, net, batch)
            assert relative_error(windows, scores) <= EXACT[torch.float64]
        loaded = fcvgg.load(net.save(tmp_path / "bundle"))
        assert loaded.outputs == net.outputs
        for scores, again in zip(maps, flattened(loaded(batch))[0], strict=True):
            torch.testing.assert_close(again, scores, rtol=1e-12, atol=1e-12)
    assert form_of_data(net.program.outputs.to_data()) == net.program.outputs


def test_a_loaded_network_gives_fields_by_name(tmp_path: Path) -> None:
    net = fcvgg.convert(heads(Result), input_size=22)
    loaded = fcvgg.load(net.save(tmp_path / "bundle"))(images(1, 3, 22, 22))
    assert type(loaded).__name__ == "Result"
    assert loaded._fields == ("logits", "loss")
    assert loaded.loss.shape == (1, 2, 1, 1)


def test_outputs_are_taken_by_name_wherever_by_number() -> None:
    net = fcvgg.convert(heads(lambda a, b: {"age": a, "sex": b}), input_size=22)
    image = images(1, 3, 40, 44)
    by_name = net.score_map(image, output="sex").scores
    torch.testing.assert_close(by_name, net.score_map(image, output=1).scores, rtol=0, atol=0)
    by_name = net.classify(image, output="sex")
    torch.testing.assert_close(by_name, net.classify(image, output=1), rtol=0, atol=0)
    by_name = net.heatmap(image, 0, output="sex").values
    np.testing.assert_array_equal(by_name, net.heatmap(image, 0, output=1).values)
    by_name = fcvgg.stream(net, image, output="sex").scores
    torch.testing.assert_close(by_name, fcvgg.stream(net, image, output=1).scores)
    assert net.activation_of("age") == "logits"
    assert fcvgg.effective_receptive_field(net, image, output="age").influence.any()


def test_an_output_that_does_not_exist() -> None:
    named = fcvgg.convert(heads(lambda a, b: {"age": a, "sex": b}), input_size=22)
    for output in ("size", 2, -1, None):
        with pytest.raises(
            fcvgg.ArgumentError,
            match=rf"^output must be from 0 to 1 or one of 'age', 'sex', got {output!r}$",
        ):
            named.classify(images(1, 3, 30, 30), output=output)
    single = fcvgg.convert(heads(lambda a, b: a), input_size=22)
    with pytest.raises(fcvgg.ArgumentError, match=r"^output must be 0, the only one, got 1$"):
        fcvgg.stream(single, images(1, 3, 30, 30), output=1)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda a, b: (a, "label"), r"returns str as output 1 where class scores are expected; w"),
        (lambda a, b: {"x": [a, {1j: b}]}, r"returns dict as output x\.1 where class scores are"),
        (lambda a, b: {"a": a, "n": a.new_zeros(3)}, r"output n is constant, not computed from"),
        (lambda a, b: None, "^the model returns None where class scores are expected"),
        (lambda a, b: (None, 3), "^the model returns tuple where class scores are expected"),
    ],
)
def test_what_holds_no_scores_is_refused(form: Callable[..., Any], message: str) -> None:
    with pytest.raises(fcvgg.ConversionError, match=message):
        fcvgg.convert(heads(form), input_size=22)


def test_a_size_is_no_output() -> None:
    model = seeded(
        Headed, Lambda(lambda x, fc: (fc(x.flatten(1)), x.shape[2]), nn.Linear(128, 4)), pads=0
    )
    with pytest.raises(fcvgg.ConversionError, match="returns FeatureSize as output 1 where"):
        fcvgg.convert(model, input_size=22)


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"map": None, "tuple": 3},
        {"dict": [["a"]]},
        {"dict": [[None, {"map": None}]]},
        {"fields": [["class", {"map": None}]], "name": "Name"},
        {"fields": [["a", {"map": None}]], "name": "not a name"},
        {"value": "text"},
        {"other": []},
    ],
)
def test_forms_in_files_are_checked(data: Any) -> None:
    if data == {"map": None, "tuple": 3}:
        assert form_of_data(data).is_tensor
        return
    with pytest.raises(ValueError, match=r"no form of outputs|are no strings|ield names"):
        form_of_data(data)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["tensor", "tuple", "none", "dict", "NamedTuple", "dataclass"])
def test_the_network_is_exported_and_traced_as_it_is(name: str) -> None:
    net = fcvgg.convert(heads(FORMS[name][0]), input_size=22)
    batch, other = images(2, 3, 30, 34), images(1, 3, 46, 42)
    height, width = (torch.export.Dim(n, min=26, max=512) for n in ("height", "width"))
    shapes = {"images": {2: height, 3: width}}
    program = torch.export.export(net, (batch[:1],), dynamic_shapes=shapes, strict=False)
    traced = torch.jit.trace(net, batch[:, :, :22, :22])  # one cell, as users trace classifiers
    for run in (program.module(), traced):
        expected, got = (flattened(f(other))[0] for f in (net, run))
        for a, b in zip(expected, got, strict=True):
            assert relative_error(a, b) <= EXACT[torch.float64]
