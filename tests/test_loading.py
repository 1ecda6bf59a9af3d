"""`fcvgg.load`: names, checkpoints in every usual wrapping, and files that must not be opened."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models.vgg import VGG, cfgs, make_layers

import fcvgg
from fcvgg.sources.checkpoints import read_state

CLASSES = 7


def narrow_vgg11(classes: int = 1000) -> nn.Module:
    """torchvision's VGG-11 with a sixteenth of the channels."""
    features = make_layers([v if v == "M" else v // 16 for v in cfgs["A"]])
    with torch.device("meta"):  # the head that torchvision would make has 120 million weights
        model = VGG(features, init_weights=False)
    model.classifier = nn.Sequential(
        *(nn.Linear(32 * 49, 64), nn.ReLU(True), nn.Dropout()),
        *(nn.Linear(64, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, classes)),
    )
    return model


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """VGG-11 is narrow, nothing is downloaded, and files lie in a folder of their own."""
    full_size = torchvision.models.get_model

    def get_model(name: str, weights: Any = None, **options: Any) -> nn.Module:
        if name == "vgg11" and weights is None:
            return narrow_vgg11(options.get("num_classes", 1000))
        return full_size(name, weights=weights, **options)

    def unreachable(*_: Any, **__: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(0)
    return narrow_vgg11(CLASSES).eval()


@torch.no_grad()
def assert_same(net: fcvgg.FullyConvolutional, source: nn.Module) -> None:
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = source(images)
    torch.testing.assert_close(net(images)[..., 0, 0], expected, rtol=1e-4, atol=1e-5)
    assert net.equivalence.passed


# -- names ----------------------------------------------------------------------------------------


def test_the_demo() -> None:
    net = fcvgg.load("demo")
    assert net.categories == ("background", "face")
    assert net.input_size == (32, 32)
    assert net.equivalence.passed
    assert net.preprocess is not None


def test_a_name_with_random_weights_has_the_published_settings() -> None:
    net = fcvgg.load("vgg11", weights=None)
    assert net.preprocess == fcvgg.Preprocess.imagenet()
    assert net.categories[281] == "tabby"
    assert (net.input_size, net.num_classes) == ((224, 224), 1000)
    assert net.equivalence.passed
    assert not net.training


def test_a_native_size_that_only_the_weights_know() -> None:
    net = fcvgg.load("resnet18", weights=None, verify=False)
    assert net.input_size == (224, 224)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "VGG11_Weights.IMAGENET1K_V1"])
def test_without_network_the_error_says_what_to_pass(weights: str) -> None:
    with pytest.raises(
        fcvgg.LoadError,
        match=r"^the weights VGG11_Weights\.IMAGENET1K_V1 could not be downloaded \(<urlopen error "
        r"Name or service not known>\); download https://download\.pytorch\.org/models/vgg11-\S+ "
        r"elsewhere and pass weights=PATH \(--weights PATH\), or use the demo model$",
    ):
        fcvgg.load("vgg11", weights=weights)


def test_a_weights_enumeration_is_taken() -> None:
    with pytest.raises(fcvgg.LoadError, match=r"VGG11_Weights\.IMAGENET1K_V1 could not be downloa"):
        fcvgg.load("vgg11", weights=torchvision.models.VGG11_Weights.DEFAULT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"source": "vgg61"},
            r"there is no model 'vgg61'; expected 'demo'.* \(near: .*vgg16.*\) or",
        ),
        ({"source": "demp"}, r"there is no model 'demp'; .* \(near: demo\)"),
        (
            {"source": "qqqq"},
            r"there is no model 'qqqq'; expected 'demo', .*, the folder of a bundle, a file",
        ),
        (
            {"source": "vgg11", "weights": "NEWEST"},
            r"weights must be IMAGENET1K_V1, DEFAULT or the path of .* for vgg11, got 'NEWEST'",
        ),
        ({"source": "a.pt"}, r"there is no checkpoint a\.pt; expected a file in \.pt, \.pth, \.ck"),
        ({"source": "a.pt", "arch": "vgg11"}, r"there is no checkpoint a\.pt; expected a file"),
        (
            {"source": "vgg11", "weights": "a.pth"},
            r"there is no checkpoint a\.pth; expected a file",
        ),
        (
            {"source": "vgg11", "arch": "vgg11"},
            r"arch='vgg11' must come with a checkpoint, got 'vgg11'",
        ),
        (
            {"source": "demo", "weights": "a.pt"},
            r"weights must be left out for 'demo', .* got 'a.p",
        ),
    ],
)
def test_what_does_not_exist(arguments: dict, message: str) -> None:
    with pytest.raises(fcvgg.LoadError, match=f"^{message}"):
        fcvgg.load(**arguments)


def test_a_name_is_a_name_though_a_folder_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "vgg11").mkdir()
    assert fcvgg.load("demo").num_classes == 2
    assert fcvgg.load("vgg11", weights=None, verify=False).num_classes == 1000


# -- checkpoints ----------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[dict], Any]] = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "lr": 0.1},
    "model": lambda state: {"model": state, "optimizer": {"state": {}, "param_groups": []}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "twice": lambda state: {"model": {"state_dict": state}},
    "data parallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled": lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()},
    "lightning": lambda state: {"state_dict": {f"model.{k}": v for k, v in state.items()}},
    "parameters": lambda state: {k: nn.Parameter(v) for k, v in state.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_in_every_usual_wrapping(
    tmp_path: Path, source: nn.Module, wrapping: str
) -> None:
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "a.pt")
    assert_same(fcvgg.load(tmp_path / "a.pt", arch="vgg11"), source)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "old.pth", "a.safetensors"])
def test_checkpoints_in_every_format(tmp_path: Path, source: nn.Module, name: str) -> None:
    if name.endswith("safetensors"):
        save_file(source.state_dict(), tmp_path / name)
    else:
        zipped = not name.startswith("old")
        torch.save(source.state_dict(), name, _use_new_zipfile_serialization=zipped)
    assert_same(fcvgg.load(str(tmp_path / name), arch="vgg11"), source)
    assert_same(fcvgg.load("vgg11", weights=tmp_path / name), source)


def test_the_head_of_a_checkpoint_decides_the_classes(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source.state_dict(), tmp_path / "a.pt")
    net = fcvgg.load("a.pt", arch="vgg11")
    assert net.num_classes == CLASSES
    assert net.categories is None  # ImageNet's thousand names do not fit
    assert net.preprocess == fcvgg.Preprocess.imagenet()
    named = fcvgg.load("a.pt", arch="vgg11", categories=list("abcdefg"))
    assert named.categories == tuple("abcdefg")
    with pytest.raises(
        fcvgg.CategoryError, match=r"^categories must be 7 names, one per class .*, got 2"
    ):
        fcvgg.load("a.pt", arch="vgg11", categories=["a", "b"])


class Own(nn.Module):
    """A classifier that only its user knows."""

    def __init__(self, num_classes: int = 3, width: int = 4):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(width * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("arch", [Own, lambda num_classes: Own(num_classes), "a module"])
def test_a_checkpoint_of_the_users_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int, arch: Any
) -> None:
    torch.manual_seed(1)
    source = Own(classes)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "own.pth")
    reads = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **given: reads.append(a) or load(*a, **given))
    net = fcvgg.load(tmp_path / "own.pth", arch=Own(classes) if arch == "a module" else arch)
    assert len(reads) == 1
    assert net.source == "Own (state_dict)"
    assert not net.training
    images = torch.randn(2, 3, *net.input_size)
    torch.testing.assert_close(net(images)[..., 0, 0], source(images))


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (lambda: Own(width=8), r"does not fit Own \(.*; check the architecture"),
        (lambda: "text", r"arch must make a torch\.nn\.Module, got an object of str from .*lambda"),
        (
            lambda depth: Own(),
            r"arch must be a callable .* got .*, which fails \(TypeError: .*depth",
        ),
        (
            7,
            r"arch must be a torchvision name, an nn\.Module or a callable .* got an object of int",
        ),
    ],
)
def test_what_makes_no_model_is_refused(tmp_path: Path, arch: Any, message: str) -> None:
    torch.save(Own().state_dict(), tmp_path / "own.pth")
    with pytest.raises(fcvgg.LoadError, match=message):
        fcvgg.load(tmp_path / "own.pth", arch=arch)


def test_a_whole_pickled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(Own(), tmp_path / "own.pth")
    with pytest.raises(
        fcvgg.LoadError,
        match=r"Own\) as well as tensors; .* save model\.state_dict\(\) instead, and pass arch=, a "
        r"torchvision name, your own nn\.Module or a function that makes it$",
    ):
        fcvgg.load(tmp_path / "own.pth", arch=Own)


def test_settings_given_win_over_published_ones(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source.state_dict(), tmp_path / "a.pt")
    preprocess = fcvgg.Preprocess((1, 2, 3), (1, 1, 1), scale=1, channel_order="BGR")
    net = fcvgg.load(
        "a.pt", arch="vgg11", preprocess=preprocess, input_size=240, output_stride=16, verify=False
    )
    assert net.preprocess == preprocess
    assert (net.input_size, net.geometry.stride) == ((240, 240), (16, 16))
    assert net.equivalence is None


def test_half_precision_checkpoints(tmp_path: Path, source: nn.Module) -> None:
    torch.save({k: v.half() for k, v in source.state_dict().items()}, tmp_path / "a.pt")
    net = fcvgg.load("a.pt", arch="vgg11")
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_the_state_of_a_converted_network_loads_too(tmp_path: Path, source: nn.Module) -> None:
    state = fcvgg.convert(source, verify=False).state_dict()
    assert state["classifier.0.weight"].shape == (64, 32, 7, 7)
    torch.save(state, tmp_path / "a.pt")
    assert_same(fcvgg.load("a.pt", arch="vgg11"), source)


def test_a_checkpoint_of_batch_norms_without_their_counters(tmp_path: Path) -> None:
    """As saved by torch 0.4 and before."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "a.safetensors")
    net = fcvgg.load("a.safetensors", arch="resnet18")
    assert (net.num_classes, net.input_size) == (3, (224, 224))
    assert_same(net, model)


# -- checkpoints that do not fit ------------------------------------------------------------------


def edited(source: nn.Module, edit: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    state = dict(source.state_dict())
    edit(state)
    return state


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda s: s.pop("features.0.bias"),
            r"a\.pt does not fit VGG \(1 missing: features\.0\.bias\); check the architecture's na",
        ),
        (
            lambda s: s.update(extra=torch.zeros(2)),
            r"a\.pt does not fit VGG \(1 unexpected: extra\); check the architecture's name$",
        ),
        (
            lambda s: s.update({"features.3.weight": torch.zeros(8, 4, 5, 5)}),
            r"a\.pt does not fit VGG \(1 of another shape: features\.3\.weight \(8, 4, 5, 5\) "
            r"instead of \(8, 4, 3, 3\)\); check the architecture's name$",
        ),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("features")],
            r"a\.pt does not fit VGG \(16 missing: features\.0\.weight, features\.0\.bias, "
            r"features\.3\.weight, features\.3\.bias, \.\.\.\); check the architecture's name$",
        ),
        (
            lambda s: s.pop("classifier.6.weight"),
            r"the checkpoint does not fit vgg11: it must hold classifier\.6\.weight, of the last "
            r"layer, got features\.0\.weight, ",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    tmp_path: Path, source: nn.Module, edit: Callable[[dict], Any], message: str
) -> None:
    torch.save(edited(source, edit), tmp_path / "a.pt")
    with pytest.raises(fcvgg.LoadError, match=message):
        fcvgg.load("a.pt", arch="vgg11")


def test_a_wrong_architecture_names_the_keys(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        fcvgg.LoadError,
        match=r"the checkpoint does not fit resnet18: it must hold fc\.weight, of the last layer, "
        r"got features\.0\.weight, features\.0\.bias, features\.3\.weight, features\.3\.bias, \.",
    ):
        fcvgg.load("a.pt", arch="resnet18")


def test_a_checkpoint_needs_its_architecture(tmp_path: Path, source: nn.Module) -> None:
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        fcvgg.LoadError,
        match=r"^a\.pt holds parameters only; pass arch=, a torchvision name such as 'vgg16', your "
        r"own nn\.Module or a function that makes it$",
    ):
        fcvgg.load("a.pt")
    with pytest.raises(fcvgg.LoadError, match=r"^there is no model 'vgg12'; .*\(near: .*vgg11"):
        fcvgg.load("a.pt", arch="vgg12")


def test_weights_that_are_not_finite_are_found(tmp_path: Path, source: nn.Module) -> None:
    nan = edited(source, lambda s: s.update({"features.3.bias": torch.full((8,), torch.nan)}))
    torch.save(nan, tmp_path / "a.pt")
    with pytest.raises(
        fcvgg.EquivalenceError,
        match=r"not finite at the native size: features\.3\.bias holds values that are not finite",
    ):
        fcvgg.load("a.pt", arch="vgg11")


# -- files that are no checkpoints ----------------------------------------------------------------


class Malicious:
    """What a hostile checkpoint holds: an object that runs a command when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code_does_not_run(tmp_path: Path, how: str) -> None:
    proof = tmp_path / "code has run"
    content = {"state_dict": {"weight": torch.zeros(2)}, "extra": Malicious(proof)}
    path = tmp_path / "a.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content["extra"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(
        fcvgg.LoadError,
        match=r"a\.pt holds a Python object \(\w+\.mkdir\) as well as tensors; opening it could "
        r"run code, so it is refused; save model\.state_dict\(\) instead, and pass arch=, ",
    ):
        fcvgg.load(path, arch="vgg11")
    assert not proof.exists()
    pickle.loads(path.read_bytes()) if how == "pickle" else torch.load(path, weights_only=False)
    assert proof.exists()  # and it is hostile indeed


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pt")
    with pytest.raises(
        fcvgg.LoadError, match=r"holds a Python object \(torch\.nn\.modules\.linear"
    ):
        fcvgg.load("a.pt", arch="vgg11")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a\.pt must be a file of torch\.save, got an empty one; download it again$"),
        (
            b"<!DOCTYPE html><html>404</html>",
            r"a\.pt must be a file of torch\.save, got one that begins with b'<!DOCTYPE html><'",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1",
            r"a\.pt must be a file of torch\.save, got one that begins with b'version https://'",
        ),
        (
            pickle.dumps({"a": 1}),
            r"a\.pt is broken, or a pickle that torch\.save did not write; sa",
        ),
        (b"PK\x03\x04 and so on", r"a\.pt is a broken checkpoint: "),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(fcvgg.LoadError, match=message):
        fcvgg.load("a.pt", arch="vgg11")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"state_dict": {}}, torch.zeros(3), {}])
def test_what_holds_no_state(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(
        fcvgg.LoadError,
        match=r"a\.pt must hold tensors by name, or an entry "
        r"'state_dict' or 'model_state_dict' or 'model' of them, got (list|dict|Tensor)$",
    ):
        fcvgg.load("a.pt", arch="vgg11")


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
def test_truncated_and_corrupted_files_give_one_clear_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"weight": torch.rand(5, 4), "bias": torch.rand(5)}
    if name.endswith("pt"):
        torch.save(state, path, _use_new_zipfile_serialization=name == "a.pt")
    else:
        save_file(state, path)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for cut in (3, 40, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:cut].tobytes())
        with pytest.raises(fcvgg.LoadError, match=rf"^{path} (is a? ?broken|must be|cannot be)"):
            read_state(path)
    random = np.random.default_rng(0)
    for _ in range(150):
        broken = content.copy()
        broken[random.integers(0, len(broken), 3)] = random.integers(0, 256, 3)
        path.write_bytes(broken.tobytes())
        message = complaint(read_state, path)
        assert message.startswith(str(path)) or not message
        assert "\n" not in message
        assert "weights_only" not in message  # torch recommends what would run code


def complaint(call: Callable[[Path], Any], path: Path) -> str:
    """The message of the error that a call raises; empty if it raises none."""
    try:
        call(path)
    except fcvgg.LoadError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("suffix", [".pth.tar", ".ckpt", ".bin"])
def test_what_training_scripts_keep_beside_the_state_does_no_harm(tmp_path, suffix):
    path = tmp_path / f"best{suffix}"
    beside = {"best_acc": np.float64(0.9), "epoch": np.int64(3), "args": argparse.Namespace(lr=0.1)}
    torch.save({"state_dict": {"conv.weight": torch.ones(2)}, **beside}, path)
    assert torch.equal(read_state(path)["conv.weight"], torch.ones(2))


# -- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [None, 16, b"vgg16", nn.Identity()])
def test_what_is_no_source(source: Any) -> None:
    kind = type(source).__name__
    with pytest.raises(
        fcvgg.LoadError, match=rf"^source must be a name such as 'vgg16' .*, got {kind}; "
    ):
        fcvgg.load(source)


def test_an_option_that_is_misspelt() -> None:
    with pytest.raises(
        fcvgg.ArgumentError, match=r"option 'catgories'; did you mean 'categories'\?$"
    ):
        fcvgg.load("demo", catgories=["a", "b"])


def test_an_option_that_load_does_not_have(tmp_path: Path) -> None:
    fcvgg.load("demo").save(tmp_path / "bundle")
    for name in ("demo", tmp_path / "bundle", "absent.onnx"):
        with pytest.raises(
            fcvgg.ArgumentError,
            match=r"^options of load must be among arch, weights, preprocess, categories, "
            r"input_size, output_stride, padding, head, copy, verify, activation, "
            r"in_channels, got foo$",
        ):
            fcvgg.load(name, foo=1)
    with pytest.raises(fcvgg.PreprocessError, match=r"^preprocess must be a fcvgg\.Preprocess"):
        fcvgg.load(tmp_path / "bundle", preprocess=255)
    named = fcvgg.load(tmp_path / "bundle", preprocess="imagenet")
    assert named.preprocess == fcvgg.Preprocess.imagenet()


# -- before a download ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_b_16", r"self_attention \(MultiheadAttention\) is refused: attention mixes"),
        ("efficientnet_b0", r"\(SqueezeExcitation\) is refused: squeeze-and-excitation"),
        ("regnet_y_400mf", r"\(SqueezeExcitation\) is refused: squeeze-and-excitation"),
    ],
)
def test_what_cannot_be_converted_is_refused_before_its_weights_are_downloaded(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[str] = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetched.append)
    with pytest.raises(fcvgg.RefusedLayerError, match=message):
        fcvgg.load(name)
    assert not fetched


def test_what_can_be_converted_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = torchvision.models.squeezenet1_1().eval()
    fetched = []

    def fetch(url: str, *_: Any, **__: Any) -> dict[str, Tensor]:
        fetched.append(url)
        return model.state_dict()

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    net = fcvgg.load("squeezenet1_1")
    assert fetched == ["https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth"]
    assert net.categories[283] == "Persian cat"
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(images).flatten(1), model(images), atol=1e-5, rtol=1e-5)


def test_files_of_scripted_and_exported_models_say_how_to_go_on(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    program = torch.export.export(model, (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(fcvgg.LoadError, match=r"torch\.export\.load\(path\)\.state_dict with torc"):
        fcvgg.load(tmp_path / "net.pt2")
    torch.save(dict(program.state_dict), tmp_path / "net.pt")
    assert fcvgg.load(tmp_path / "net.pt", arch=model, input_size=8).num_classes == 2
    with pytest.raises(fcvgg.ConversionError, match=r"pass the nn\.Module it was exported"):
        fcvgg.convert(program)
    (tmp_path / "net.foo").write_bytes(b"")
    with pytest.raises(fcvgg.LoadError, match=r"net\.foo must be a file \.onnx, \.keras or \.h5"):
        fcvgg.load(tmp_path / "net.foo")
