"""Layers by name: their names, the network up to one, replacing and inserting."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from nets import (
    VGGS,
    Functional,
    GlobalPooled,
    SmallVGG,
    images,
    narrow_vgg,
    native_error,
    relative_error,
    seeded,
)
from torch import nn

import fcvgg
from fcvgg.demo import demo_model

CONVOLUTIONS = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def conv(*arguments: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(*arguments, **options).double()


# -- names ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VGGS)
def test_names_of_all_torchvision_vggs(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    expected, keras = [], []
    for block, count in enumerate(CONVOLUTIONS[name.removesuffix("_bn")], 1):
        for i in range(1, count + 1):
            expected.append(f"conv{block}_{i}")
            keras.append(f"block{block}_conv{i}")
            expected += [f"bn{block}_{i}"] * name.endswith("_bn") + [f"relu{block}_{i}"]
        expected.append(f"pool{block}")
        keras.append(f"block{block}_pool")
    expected += ["avgpool", "flatten", "fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]
    names = fcvgg.layer_names(model)
    assert list(names.names) == expected
    assert [x.keras for x in names if x.keras] == [*keras, "fc1", "fc2", "predictions"]
    paths = [x.path for x in names if x.block]
    assert paths == [f"features.{i}" for i in range(len(model.features))]
    assert names["block5_conv1"] is names["conv5_1"] is names[names["conv5_1"].path]
    assert names["fc8"].path == "classifier.6"


def test_names_of_ones_own_sequential_net_and_of_its_conversion() -> None:
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.LeakyReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3)),
            *(nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(45, 7)),
            *(nn.ReLU(), nn.Linear(7, 2), nn.LogSoftmax(1)),
        )
    )
    names = fcvgg.layer_names(model)
    assert names.names == (
        *("conv1_1", "leakyrelu1_1", "pool1", "conv2_1", "bn2_1", "relu2_1", "pool2"),
        *("flatten", "fc6", "relu6", "fc7", "prob"),
    )
    assert names["predictions"].name == "fc7"
    assert str(names).splitlines()[:2] == [
        "layer         Keras         path  kind",
        "conv1_1       block1_conv1  0     Conv2d",
    ]
    converted = fcvgg.layer_names(fcvgg.convert(model))
    assert converted.names == tuple(n for n in names.names if n != "flatten")
    assert converted["fc6"].path == "8"


def test_a_converted_global_pool_ends_no_block() -> None:
    net = fcvgg.convert(seeded(GlobalPooled), input_size=40)
    roles = {x.path: x.role for x in fcvgg.layer_names(net)}
    assert "avgpool" in roles.values()
    assert [x.name for x in fcvgg.layer_names(net) if x.role == "pool"] == ["pool1"]


def test_names_where_forward_calls_functions() -> None:
    names = fcvgg.layer_names(Functional())
    assert [x.name for x in names if not x.path] == list(names.names)
    assert {"conv1_1", "relu1_1", "bn1_1", "pool1", "fc6", "fc7", "prob"} <= set(names.names)


def test_fully_connected_layers_written_as_convolutions() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vgg11", pretrained=False)
    names = fcvgg.layer_names(model)
    assert names["fc6"].path == "pre_logits.fc1"
    assert names["fc7"].path == "pre_logits.fc2"
    assert names["predictions"].path == "head.fc"


def test_an_unknown_name_says_what_is_near() -> None:
    message = (
        "the model has no layer 'block2_pol' (near: block2_pool, block1_pool, block2_conv1); "
        "fcvgg.layer_names(model) lists them all"
    )
    with pytest.raises(fcvgg.ArgumentError, match=f"^{re.escape(message)}$"):
        fcvgg.layer_names(SmallVGG()).find("block2_pol")
    with pytest.raises(fcvgg.ArgumentError, match=r"its layers are conv1_1, features\.1, relu1_1"):
        fcvgg.layer_names(SmallVGG()).find("xyz")


# -- the network up to a layer ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_features_are_the_models_own_at_every_layer_and_any_size(name: str) -> None:
    model = seeded(narrow_vgg, name)
    batch = images(2, 3, 70, 45)
    expected = batch
    for i, layer in enumerate(x for x in fcvgg.layer_names(model) if x.block):
        expected = model.features[i](expected.clone())
        if layer.role in ("pool", "conv"):
            features = fcvgg.features_upto(model, layer.name)
            torch.testing.assert_close(features(batch), expected)
            assert features.out_channels == expected.shape[1]
            assert features.geometry.output_size(batch.shape[2:]) == tuple(expected.shape[2:])


def test_features_end_where_the_name_says() -> None:
    model = seeded(narrow_vgg, "vgg13_bn")
    assert [n for n, _ in fcvgg.features_upto(model, "conv1_2").named_children()] == [
        *("conv1_1", "bn1_1", "relu1_1", "conv1_2"),
    ]
    assert next(reversed(fcvgg.features_upto(model, "block1_conv2")._modules)) == "relu1_2"
    assert next(reversed(fcvgg.features_upto(model, "features.3")._modules)) == "conv1_2"
    fc7 = fcvgg.features_upto(model, "fc7")
    batch = images(1, 3, 224, 224)
    torch.testing.assert_close(
        fc7(batch), model.classifier[:4](torch.flatten(model.features(batch), 1))
    )


def test_features_share_nothing_and_keep_the_mode() -> None:
    model = seeded(SmallVGG).train()
    features = fcvgg.features_upto(model, "pool1")
    assert features.training
    assert all(m.training for m in features.modules())
    with torch.no_grad():
        features.conv1_1.weight.zero_()
    assert model.features[0].weight.abs().min() > 0


def test_geometry_of_features_is_the_layer_tables() -> None:
    model = seeded(narrow_vgg, "vgg16")
    table = fcvgg.receptive_fields(model)
    for name in ("conv1_2", "pool3", "conv5_3"):
        geometry = fcvgg.features_upto(model, name).geometry
        row = table[fcvgg.layer_names(model)[name].path]
        assert geometry.receptive_field == row.receptive_field
        assert geometry.stride == row.output_stride
        assert geometry.offset == row.offset


def test_converted_features_take_any_size_up_to_the_scores() -> None:
    net = fcvgg.convert(seeded(SmallVGG))
    batch = images(1, 3, 50, 41)
    torch.testing.assert_close(fcvgg.features_upto(net, "fc8")(batch), net(batch))
    assert fcvgg.features_upto(net, "fc7").geometry.window == (32, 32)


def test_several_maps_in_one_run_are_not_changed_in_place() -> None:
    model = seeded(SmallVGG)
    features = fcvgg.features_upto(model, "pool2")
    batch = images(1, 3, 32, 32)
    maps = features.maps(batch, ["conv1_1", "pool1", "conv2_1"])
    for name, values in maps.items():
        torch.testing.assert_close(values, fcvgg.features_upto(model, name)(batch))


def test_anything_stacks_on_features_and_converts() -> None:
    features = fcvgg.features_upto(seeded(narrow_vgg, "vgg11"), "block2_pool")
    stacked = nn.Sequential(
        features, nn.Conv2d(8, 6, 3).double(), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3).double()
    )
    net = fcvgg.convert(stacked)
    assert net.input_size == (32, 32)
    assert native_error(stacked, net) < 1e-12
    pooled = nn.Sequential(
        features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3).double()
    )
    assert native_error(pooled, fcvgg.convert(pooled, input_size=48)) < 1e-12


@pytest.mark.parametrize(
    ("build", "layer", "message"),
    [
        (
            Functional,
            "pool1",
            "bn1_1 (batch_norm) is fed by relu, mean, var, norm_weight; the layers up to a named "
            "one must be a chain of layers with parameters of their own",
        ),
        (GlobalPooled, "fc6", "add (add) is fed by left, right; the layers up to a named one"),
    ],
)
def test_features_that_are_no_chain(build, layer, message) -> None:
    with pytest.raises(fcvgg.UnsupportedLayerError, match=f"^{re.escape(message)}"):
        fcvgg.features_upto(build(), layer)


def test_geometry_ends_with_the_maps() -> None:
    with pytest.raises(fcvgg.ConversionError, match="not a map; geometry is known up to"):
        _ = fcvgg.features_upto(seeded(narrow_vgg, "vgg11"), "fc6").geometry


# -- replacing --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vgg13", "vgg16_bn", "vgg19"])
def test_two_3x3_by_one_5x5(name: str) -> None:
    model = seeded(narrow_vgg, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    new = nn.Conv2d(3, 4, 5, padding=2).double()
    edited = fcvgg.replace_layers(model, "conv1_1", "block1_conv2", new)
    old, names = fcvgg.layer_names(model), fcvgg.layer_names(edited)
    replaced = old.upto("conv1_2")
    assert edited.get_submodule(names["conv1_1"].path) is new
    assert [x.path for x in names[1:]] == [x.path for x in old[len(replaced) :]]
    assert names[1].kind == ("BatchNorm2d" if name.endswith("_bn") else "ReLU")
    gone = tuple(f"{x.path}." for x in replaced)
    kept = {k: v for k, v in before.items() if not k.startswith(gone)}
    after = dict(edited.state_dict())
    added = f"features.0_{3 if name.endswith('_bn') else 2}_new."
    assert set(after) == {*kept, f"{added}weight", f"{added}bias"}
    assert all(torch.equal(after[k], v) for k, v in kept.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    net = fcvgg.convert(edited)
    assert native_error(edited, net) < 1e-12
    source = fcvgg.convert(model).geometry
    assert (net.geometry.receptive_field, net.geometry.offset) == (
        source.receptive_field,
        source.offset,
    )
    assert fcvgg.geometry_changes(model, edited).same


def test_a_checkpoint_of_the_source_still_fits_the_rest() -> None:
    model = seeded(SmallVGG)
    edited = fcvgg.replace_layers(model, "conv2_1", "conv2_1", conv(8, 12, 5, padding=2))
    result = edited.load_state_dict(model.state_dict(), strict=False)
    assert result.missing_keys == ["features.4_new.weight", "features.4_new.bias"]
    assert result.unexpected_keys == ["features.4.weight", "features.4.bias"]


def test_the_merged_kernel_of_the_example_is_exact_away_from_the_border() -> None:
    path = Path(__file__).parents[2] / "examples" / "surgery.py"
    spec = importlib.util.spec_from_file_location("surgery_example", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example
    spec.loader.exec_module(example)
    model = demo_model()
    new = example.merged(model)
    first, second = model.features[0], model.features[2]
    batch = images(1, 3, 20, 20, dtype=torch.float32)
    with torch.no_grad():
        expected, got = second(first(batch)), new(batch)
    inner = (..., slice(2, -2), slice(2, -2))
    assert relative_error(expected[inner], got[inner]) < 1e-5


def test_a_layer_that_forward_calls_by_name_is_replaced_alone() -> None:
    model = seeded(GlobalPooled)
    name = next(x.name for x in fcvgg.layer_names(model) if x.path == "pool")
    edited = fcvgg.replace_layers(model, name, name, nn.MaxPool2d(2))
    assert edited.pool.kernel_size == 2
    assert model.pool.kernel_size == 3
    message = "pool1 (pool) stands in a GlobalPooled, whose forward calls it by name; surgery needs"
    with pytest.raises(fcvgg.ConversionError, match=f"^{re.escape(message)}"):
        fcvgg.insert_after(model, name, nn.ReLU())


def test_changes_of_geometry_are_told(caplog) -> None:
    model = seeded(narrow_vgg, "vgg11")
    with caplog.at_level(logging.INFO, "fcvgg"):
        edited = fcvgg.replace_layers(
            model, "conv2_1", "conv2_1", nn.Conv2d(4, 8, 5, padding=2).double()
        )
    assert caplog.messages == [
        "surgery: the last map's geometry was window 32, stride 32, receptive field 150 from pixel "
        "(-59, -59), first centre (15.5, 15.5), and is window 32, stride 32, receptive field 154 "
        "from pixel (-61, -61), first centre (15.5, 15.5)"
    ]
    changes = fcvgg.geometry_changes(model, edited)
    assert not changes.same
    assert [(row.path, row.before, row.after) for row in changes[:4]] == [
        ("features.0", ((3, 3), (1, 1), (-1, -1)), ((3, 3), (1, 1), (-1, -1))),
        ("features.2", ((4, 4), (2, 2), (-1, -1)), ((4, 4), (2, 2), (-1, -1))),
        ("features.3", ((8, 8), (2, 2), (-3, -3)), None),
        ("features.3_new", None, ((12, 12), (2, 2), (-5, -5))),
    ]
    assert str(changes).splitlines()[4:6] == [
        "features.3_new  Conv2d     - -> 12          - -> 2  - -> -5",
        "features.5      MaxPool2d  10 -> 14         4       -3 -> -5",
    ]


# -- inserting --------------------------------------------------------------------------------


def test_inserting_keeps_everything_else() -> None:
    model = seeded(narrow_vgg, "vgg16")
    edited = fcvgg.insert_after(model, "block3_conv3", nn.BatchNorm2d(16).double())
    assert edited.features[16].num_features == 16
    assert fcvgg.layer_names(edited)["features.15_after"].name == "bn3_3"
    assert set(model.state_dict()) < set(edited.state_dict())
    batch = images(1, 3, 224, 224)
    scale = (1 + 1e-5) ** -0.5
    features = fcvgg.features_upto(edited, "bn3_3")
    assert relative_error(fcvgg.features_upto(model, "relu3_3")(batch) * scale, features(batch)) < (
        1e-12
    )
    assert native_error(edited, fcvgg.convert(edited)) < 1e-12
    assert len(model.features) == 31
    plain = fcvgg.insert_after(model, "conv3_3", nn.BatchNorm2d(16).double())
    assert fcvgg.layer_names(plain)["features.14_after"].name == "bn3_3"


def test_inserting_several_and_again() -> None:
    model = seeded(SmallVGG)
    block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()).double()
    edited = fcvgg.insert_after(model, "pool1", block)
    twice = fcvgg.insert_after(edited, "features.3", nn.Dropout2d(0.1))
    assert "conv2_2" in fcvgg.layer_names(twice).names
    assert native_error(twice, fcvgg.convert(twice)) < 1e-12
    thrice = fcvgg.insert_after(twice, "features.3", nn.Identity())
    keys = [key for key, _ in thrice.features.named_children()]
    assert keys == ["0", "1", "2", "3", "3_after3", "3_after2", "3_after", "4", "5", "6"]


# -- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "last", "new", "message"),
    [
        (
            "conv1_1",
            "conv1_2",
            conv(1, 4, 5, padding=2),
            "the new layers take 1 channels, but the image gives 3; expected 3 input channels",
        ),
        (
            "conv2_1",
            "conv2_1",
            conv(3, 8, 3, padding=1),
            "the new layers take 3 channels, but pool1 gives 4; expected 4 input channels",
        ),
        (
            "conv1_1",
            "conv1_2",
            conv(3, 5, 5, padding=2),
            "the new layers give 5 channels, but conv2_1 (features.5) takes 4; expected 4 output "
            "channels",
        ),
        (
            "fc7",
            "fc7",
            nn.Linear(64, 9).double(),
            "the new layers give 9 channels, but fc8 (classifier.6) takes 64; expected 64 output",
        ),
        (
            "conv1_2",
            "conv1_2",
            conv(4, 4, 300),
            "the new layers do not run on what relu1_1 gives, (4, 224, 224) per image: ",
        ),
        (
            "pool5",
            "pool5",
            nn.Flatten(),
            "the new layers give (6272,) per image after relu5_3; expected (32, 7, 7)",
        ),
        (
            "conv1_2",
            "conv1_1",
            conv(3, 4, 3),
            "first must not come after last in the model, got 'conv1_2' and 'conv1_1'",
        ),
        (
            "pool5",
            "fc6",
            conv(3, 4, 3),
            "pool5 (features.30) and fc6 (classifier.0) stand in different modules; surgery needs",
        ),
        (
            "flatten",
            "flatten",
            nn.Flatten(),
            "flatten is a call of flatten in the model's forward, not a module; surgery needs",
        ),
        ("conv9_9", "pool5", nn.Identity(), "the model has no layer 'conv9_9' (near: "),
        (
            "pool5",
            "pool5",
            nn.Conv2d(32, 32, 3),
            "the new layers have dtype torch.float32, and the model torch.float64; call "
            "new.to(torch.float64) first",
        ),
        ("pool5", "pool5", "new", "new must be a torch.nn.Module, got str; pass several as"),
    ],
)
def test_layers_that_do_not_fit(first, last, new, message) -> None:
    model = seeded(narrow_vgg, "vgg16")
    with pytest.raises(fcvgg.FcvggError, match=f"^{re.escape(message)}") as caught:
        fcvgg.replace_layers(model, first, last, new)
    assert "\n" not in str(caught.value)


def test_a_head_that_no_longer_fits_is_named() -> None:
    message = "after surgery fc6 got (192,) per image and fails at input size (32, 32): "
    with pytest.raises(fcvgg.ConversionError, match=f"^{re.escape(message)}") as caught:
        fcvgg.insert_after(seeded(SmallVGG), "pool2", nn.MaxPool2d(2))
    assert str(caught.value).endswith("or rebuild the head with fcvgg.for_input_size")


def test_the_example_runs(tmp_path: Path, run_example: Callable[..., str]) -> None:
    printed = run_example("surgery.py")
    starts = dict(re.findall(r"(80 pixels, \w+): accuracy ([\d.]+)", printed))
    assert float(starts["80 pixels, resample"]) > 0.9
    assert float(starts["80 pixels, random"]) < 0.6
    assert float(re.search(r"([\d.]+)% of the mosaic's pixels", printed)[1]) > 85
    assert (tmp_path / "surgery.png").stat().st_size > 20_000
