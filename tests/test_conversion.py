"""The headline: at the native size the converted network gives the source model's scores."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from nets import (
    EXACT,
    VGGS,
    Functional,
    GlobalPooled,
    Headed,
    Lambda,
    SmallVGG,
    Unpadded,
    as_tuple,
    images,
    narrow_vgg,
    native_error,
    relative_error,
    seeded,
    sliding_window,
)
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import fcvgg

# -- published architectures ----------------------------------------------------------------------


@pytest.mark.parametrize("name", VGGS)
def test_every_torchvision_vgg_is_exact_and_its_native_size_is_inferred(name: str) -> None:
    model = seeded(narrow_vgg, name)
    net = fcvgg.convert(model, verify=False)
    assert net.input_size == (224, 224)
    assert native_error(model, net, 2) <= EXACT[torch.float64]
    single = model.float()
    assert native_error(single, fcvgg.convert(single, verify=False), 2) <= EXACT[torch.float32]


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_a_vgg_passes_its_own_verification(name: str) -> None:
    report = fcvgg.convert(seeded(narrow_vgg, name)).equivalence
    assert report.passed
    assert report.max_rel_error <= EXACT[torch.float64]
    assert report.translation_error <= 1e-11
    assert report.top1_agreement == 1.0


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", None),
        ("resnet18", 96),
        ("resnet50", 64),
        ("densenet121", 64),
        ("mobilenet_v2", 64),
        ("googlenet", 96),
        ("squeezenet1_1", 96),
        ("shufflenet_v2_x0_5", 64),
        ("regnet_x_400mf", 64),
        ("resnext50_32x4d", 64),
    ],
)
def test_torchvision_classifiers_are_exact(name: str, size: int | None) -> None:
    more = {"init_weights": True} if name == "googlenet" else {}
    model = seeded(getattr(torchvision.models, name), num_classes=7, **more)
    net = fcvgg.convert(model, input_size=size, verify=False)
    assert native_error(model, net, 2) <= EXACT[torch.float64]
    assert net.activation == "logits"
    assert net.num_classes == 7


def test_the_smallest_size_of_alexnet() -> None:
    """223, not 224: the smallest size that gives the 6x6 features that its head takes."""
    net = fcvgg.convert(torchvision.models.alexnet(num_classes=3), verify=False)
    assert net.input_size == (223, 223)


# -- ways of writing the same classifier ----------------------------------------------------------


def test_a_sequential_classifier() -> None:
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(6 * 16 * 16, 5),),
        )
    )
    net = fcvgg.convert(model)
    assert net.input_size == (32, 32)
    assert native_error(model, net) <= 1e-12


def test_a_functional_classifier_with_parameters_of_its_own() -> None:
    model = seeded(Functional)
    net = fcvgg.convert(model, input_size=28)
    assert native_error(model, net) <= 1e-12
    assert net.activation == "log_probabilities"
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }


def test_functional_dropout_and_batch_norm_follow_the_mode() -> None:
    model = seeded(Functional)
    net = fcvgg.convert(model, input_size=28, copy=True)
    batch = images(4, 3, 28, 28)
    outputs = []
    for module in (model, net):
        module.train()
        torch.manual_seed(3)
        outputs.append(module(batch).flatten(1))
    assert relative_error(*outputs) <= 1e-12
    torch.testing.assert_close(net.network.mean, model.mean, rtol=0, atol=1e-14)
    assert not torch.equal(net(batch), net(batch))
    net.eval()
    assert torch.equal(net(batch), net(batch))


FLATTENS = {
    "view by batch": lambda x: x.view(x.size(0), -1),
    "view by shape": lambda x: x.view(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "view with fixed features": lambda x: x.view(-1, 8 * 6 * 6),
    "flatten": lambda x: torch.flatten(x, 1),
    "flatten by keyword": lambda x: torch.flatten(input=x, start_dim=1),
    "reshape with the batch's length": lambda x: x.reshape(len(x), -1),
    "rows, columns, channels": lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
    "columns, rows, channels": lambda x: x.permute(0, 3, 2, 1).flatten(1),
    "transposed": lambda x: x.transpose(2, 3).contiguous().view(x.size(0), -1),
    "dropout, relu and tanh on the way": lambda x: torch.tanh(
        F.relu(F.dropout(x.permute(0, 2, 3, 1), 0.5, False).flatten(2)).flatten(1)
    ),
    "einops-like split of the channels": lambda x: x.unflatten(1, (2, 4)).movedim(2, 1).flatten(1),
    "flipped rows": lambda x: x.flip(2).flatten(1),
    "stacked slices": lambda x: torch.cat([x[:, 4:], x[:, :4]], 1).flatten(1),
}


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS.keys())
def test_every_flatten_order(flatten) -> None:
    layers = [nn.Linear(8 * 36, 16), nn.Linear(16, 5)]
    model = seeded(Headed, Lambda(lambda x, fc1, fc2: fc2(F.relu(fc1(flatten(x)))), *layers))
    net = fcvgg.convert(model)
    assert net.input_size == (24, 24)
    assert native_error(model, net) <= 1e-12
    assert native_error(model.float(), fcvgg.convert(model, verify=False)) <= 1e-5


HEADS = {
    "batch norm after fc1": lambda: [nn.Linear(288, 16), nn.BatchNorm1d(16), nn.ReLU()],
    "batch norm without parameters": lambda: [nn.Linear(288, 16), nn.BatchNorm1d(16, affine=False)],
    "prelu": lambda: [nn.Linear(288, 16), nn.PReLU()],
    "prelu per channel": lambda: [nn.Linear(288, 16), nn.PReLU(16)],
    "layer norm": lambda: [nn.Linear(288, 16), nn.LayerNorm(16), nn.GELU()],
    "layer norm without parameters": lambda: [
        nn.Linear(288, 16),
        nn.LayerNorm(16, elementwise_affine=False),
    ],
    "dropouts": lambda: [nn.Dropout(), nn.Linear(288, 16), nn.AlphaDropout(), nn.SELU()],
    "no bias": lambda: [nn.Linear(288, 16, bias=False), nn.Hardswish()],
    "sigmoid inside": lambda: [nn.Linear(288, 16), nn.Sigmoid()],
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_layers_on_vectors_become_layers_on_channels(head) -> None:
    model = seeded(lambda: Headed(nn.Sequential(nn.Flatten(), *head(), nn.Linear(16, 5))))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    assert net.activation == "logits"


@pytest.mark.parametrize(
    ("last", "activation"),
    [
        (nn.Softmax(1), "probabilities"),
        (nn.Softmax(-1), "probabilities"),
        (nn.LogSoftmax(1), "log_probabilities"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Identity(), "logits"),
        (nn.Sequential(nn.Softmax(1), nn.Dropout()), "probabilities"),
        (Lambda(lambda x: F.softmax(x, dim=1)), "probabilities"),
        (Lambda(lambda x: x.log_softmax(-1)), "log_probabilities"),
        (Lambda(lambda x: torch.sigmoid(x)), "sigmoid"),
        (Lambda(lambda x: x.softmax(1).float().double()), "probabilities"),
        (Lambda(lambda x: x.log_softmax(1).exp()), "probabilities"),
        (Lambda(lambda x: x.softmax(1).log()), "log_probabilities"),
        (Lambda(lambda x: x.softmax(1).clamp(1e-7, 1)), "probabilities"),
        (Lambda(lambda x: x.sigmoid().clamp(min=1e-6, max=1 - 1e-6)), "sigmoid"),
        (Lambda(lambda x: x.softmax(1) / 1.0), "probabilities"),
        (Lambda(lambda x: (x.softmax(1) + (2 * x).softmax(1)) / 2), "probabilities"),
        (Lambda(lambda x: 0.3 * x.softmax(1) + 0.7 * (2 * x).softmax(1)), "probabilities"),
        (Lambda(lambda x: sum([x.sigmoid(), (2 * x).sigmoid()]) * 0.5), "sigmoid"),
        (Lambda(lambda x: x.sigmoid() * 1), "sigmoid"),
        (Lambda(lambda x: F.hardsigmoid(x)), "sigmoid"),
        (nn.Hardsigmoid(), "sigmoid"),
        (Lambda(lambda x: (0.2 * x + 0.5).clamp(0, 1)), "sigmoid"),
        (Lambda(lambda x: F.logsigmoid(x)), "log_probabilities"),
        (Lambda(lambda x: x.softmax(1).log().clamp(min=-100)), "log_probabilities"),
        (Lambda(lambda x: x * x.sigmoid()), "unknown"),
        (Lambda(lambda x: x.softmax(1) ** 2), "unknown"),
        (Lambda(lambda x: 1 - x.sigmoid()), "unknown"),
        (Lambda(lambda x: x.softmax(1) / 2), "unknown"),
        (Lambda(lambda x: x.softmax(1) + 1e-6), "unknown"),
        (Lambda(lambda x: x.softmax(1) + (2 * x).softmax(1)), "unknown"),
        (Lambda(lambda x: x.softmax(1).clamp(0.2, 0.3)), "unknown"),
        (Lambda(lambda x: x.log_softmax(1) * 0.5), "unknown"),
        (Lambda(lambda x, fc: fc(x.sigmoid() * x), nn.Linear(5, 4)), "logits"),
        (Lambda(lambda x: x * 2 - 1), "logits"),
    ],
)
def test_what_the_scores_are_is_read_off_the_graph(last: nn.Module, activation: str) -> None:
    model = seeded(lambda: Headed(nn.Sequential(nn.Flatten(), nn.Linear(288, 5), last)))
    net = fcvgg.convert(model)
    assert net.activation == activation
    assert native_error(model, net) <= (1e-6 if "float" in str(last) else 1e-12)


@pytest.mark.parametrize(
    ("head", "activation"),
    [
        (lambda x, conv: conv(x).softmax(1).mean((2, 3)), "probabilities"),
        (
            lambda x, conv: F.avg_pool2d(conv(x).softmax(1), x.size()[2:]).flatten(1),
            "probabilities",
        ),
        (lambda x, conv: conv(x).sigmoid().amax((2, 3)), "sigmoid"),
        (lambda x, conv: conv(x).softmax(1).amax((2, 3)), "unknown"),
        (lambda x, conv: conv(x).log_softmax(1).mean((2, 3)), "unknown"),
        (lambda x, conv: conv(x).sigmoid().sum((2, 3)), "unknown"),
        (lambda x, conv: conv(x.sigmoid() * x).mean((2, 3)), "logits"),
    ],
)
def test_what_pooled_scores_are(head, activation: str) -> None:
    model = seeded(Headed, Lambda(head, nn.Conv2d(8, 5, 1)))
    net = fcvgg.convert(model, input_size=24)
    assert native_error(model, net) <= 1e-12
    assert net.activation == activation


def test_several_heads_give_several_maps() -> None:
    def heads(x, shared, kind, colour):
        x = F.relu(shared(x.flatten(1)))
        return kind(x), colour(x).softmax(1)

    model = seeded(Headed, Lambda(heads, nn.Linear(288, 16), nn.Linear(16, 5), nn.Linear(16, 3)))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    assert [tuple(m.shape) for m in net(images(2, 3, 40, 56))] == [(2, 5, 5, 9), (2, 3, 5, 9)]
    assert [net.activation_of(i) for i in (0, 1)] == ["logits", "probabilities"]


def test_a_dictionary_of_outputs_gives_a_dictionary_of_maps() -> None:
    model = seeded(
        Headed,
        Lambda(
            lambda x, a, b: {"kind": a(x.flatten(1)), "colour": b(x.flatten(1))},
            *(nn.Linear(288, 5), nn.Linear(288, 3)),
        ),
    )
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    maps = net(images(1, 3, 24, 24))
    assert {name: m.shape[1] for name, m in maps.items()} == {"kind": 5, "colour": 3}


@pytest.mark.parametrize(
    "head",
    [
        Lambda(lambda x, conv: F.adaptive_avg_pool2d(conv(x), 1), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: conv(x).mean((2, 3)), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: conv(x).mean([-1, -2]), nn.Conv2d(8, 5, 3, padding=1)),
        Lambda(lambda x, conv: conv(x).mean(3).mean(2), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: conv(x).flatten(2).mean(-1), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: conv(x).sum(dim=(2, 3)), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: torch.mean(conv(x), axis=(2, 3)), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: torch.amax(conv(x), dim=(2, 3)), nn.Conv2d(8, 5, 1)),
        Lambda(lambda x, conv: conv(x).squeeze(-1).squeeze(-1), nn.Conv2d(8, 5, 6)),
        Lambda(lambda x, fc: fc(x.permute(0, 2, 3, 1)).mean((1, 2)), nn.Linear(8, 5)),
        Lambda(lambda x, fc: fc(F.avg_pool2d(x, x.size()[2:]).flatten(1)), nn.Linear(8, 5)),
        Lambda(lambda x, fc: fc(F.avg_pool2d(x, x.size(2)).view(-1, 8)), nn.Linear(8, 5)),
        Lambda(lambda x, fc: fc(F.max_pool2d(x, x.size()[2:]).flatten(1)), nn.Linear(8, 5)),
        Lambda(
            lambda x, fc: fc(
                torch.cat([F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)], 1).flatten(1)
            ),
            nn.Linear(16, 5),
        ),
        Lambda(lambda x, fc: fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], -1)), nn.Linear(16, 5)),
        Lambda(
            lambda x, fc: fc(
                F.avg_pool2d(x, x.size()[2:]).squeeze() + F.max_pool2d(x, x.size()[2:]).squeeze()
            ),
            nn.Linear(8, 5),
        ),
        Lambda(lambda x, fc: fc(x.mean((2, 3))).squeeze(1), nn.Linear(8, 1)),
    ],
)
def test_global_pools(head: nn.Module) -> None:
    model = seeded(Headed, head)
    net = fcvgg.convert(model, input_size=24)
    assert native_error(model, net) <= 1e-12
    assert net.geometry.stride == (4, 4)
    assert net.geometry.window == (24, 24)


GLOBAL_BY_SIZE = {
    "size": lambda x: F.avg_pool2d(x, x.size()[2:]),
    "shape": lambda x: F.avg_pool2d(x, kernel_size=x.shape[-2:]),
    "one number": lambda x: F.avg_pool2d(x, x.size(2) // 1),
    "rows and columns": lambda x: F.avg_pool2d(x, (x.size(2), x.shape[3]), stride=1),
    "unpacked": lambda x: F.max_pool2d(x, (lambda n, c, h, w: [h, w])(*x.shape)),
    "maximum": lambda x: F.max_pool2d(x, x.size(-1)),
}


@pytest.mark.parametrize("pool", GLOBAL_BY_SIZE.values(), ids=GLOBAL_BY_SIZE.keys())
@pytest.mark.parametrize("size", [8, 12])
def test_a_pool_of_the_features_own_size_is_global_however_small(pool, size: int) -> None:
    model = seeded(Headed, Lambda(lambda x, fc: fc(pool(x).flatten(1)), nn.Linear(8, 5)))
    net = fcvgg.convert(model, input_size=size)
    assert native_error(model, net) <= 1e-12
    assert net.geometry.stride == (4, 4)
    assert net.geometry.window == (size, size)


def test_an_average_written_out_that_ends_the_trunk_is_global() -> None:
    """Early ResNets end in AvgPool2d(7); in such a net 1x1 layers and the head follow."""
    pool = nn.AvgPool2d(6)
    for head in (
        nn.Sequential(pool, nn.Flatten(), nn.Linear(8, 5)),
        nn.Sequential(pool, nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5)),
    ):
        model = seeded(Headed, head)
        net = fcvgg.convert(model, input_size=24)
        assert native_error(model, net) <= 1e-12
        assert net.geometry.stride == (4, 4)


class Trunk(nn.Module):
    """A pool over all of the native features, 4x4, and what follows it."""

    def __init__(self, pool: nn.Module, *after: nn.Module):
        super().__init__()
        stem = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4)]
        self.trunk = nn.Sequential(*stem, pool, *after)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).flatten(1))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.MaxPool2d(4)],
        [nn.MaxPool2d(4), nn.Conv2d(6, 6, 3, padding=1)],
        [nn.AvgPool2d(4), nn.Conv2d(6, 6, 3, padding=1)],
        [nn.AvgPool2d(4), nn.ReLU(), Lambda(lambda x: F.pad(x, (1, 1, 1, 1))), nn.MaxPool2d(3)],
        [nn.AvgPool2d(4), nn.AdaptiveAvgPool2d(1)],
    ],
)
def test_a_pool_inside_the_trunk_keeps_its_stride(layers: list[nn.Module]) -> None:
    model = seeded(Trunk, *layers)
    net = fcvgg.convert(model, input_size=16)
    assert native_error(model, net) <= 1e-12
    assert net.geometry.stride == (16, 16)
    if len(layers) == 2 and isinstance(layers[1], nn.Conv2d):  # the trunk as it is written
        batch = images(1, 3, 64, 48)
        with torch.no_grad():
            expected = model.fc(model.trunk(batch).movedim(1, -1)).movedim(-1, 1)
        assert relative_error(expected, net(batch)) <= 1e-12


def test_a_vgg_of_32_pixels_with_average_pools_keeps_its_stride() -> None:
    layers: list[nn.Module] = []
    for channels in (3, 4, 4, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)]
    net = fcvgg.convert(seeded(nn.Sequential, *layers, nn.Flatten(), nn.Linear(4, 5)))
    assert (net.input_size, net.geometry.stride) == ((32, 32), (32, 32))


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d])
@pytest.mark.parametrize(
    ("size", "bins"),
    [
        (24, 6),  # the identity
        (24, 3),  # divides
        (24, (6, 2)),  # one axis is the identity, the other divides
        (40, 7),  # 10 -> 7 does not divide
        (40, (10, 7)),
        ((40, 24), (7, 3)),
        (16, 7),  # 4 -> 7 repeats
        (24, (None, 1)),
    ],
)
def test_adaptive_pools(pool: type, size, bins) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    wanted = (bins, bins) if isinstance(bins, int) else bins
    rows, cols = (n // 4 if b is None else b for n, b in zip((height, width), wanted))
    model = seeded(
        lambda: Headed(
            nn.Sequential(
                pool(bins), nn.Flatten(), nn.Linear(8 * rows * cols, 9), nn.ReLU(), nn.Linear(9, 4)
            )
        )
    )
    net = fcvgg.convert(model, input_size=size)
    assert native_error(model, net) <= 1e-12
    assert net.geometry.stride == (4, 4)
    assert net.geometry.window == (height, width)
    assert torch.equal(
        net.state_dict()["head.2.weight"].flatten(), model.state_dict()["head.2.weight"].flatten()
    )


def test_ceil_mode_pools() -> None:
    model = seeded(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(nn.Conv2d(6, 8, 3), nn.AvgPool2d(2, 2, ceil_mode=True), nn.Flatten()),
            *(nn.Linear(8 * 4 * 4, 5),),
        )
    )
    net = fcvgg.convert(model, input_size=37)
    assert native_error(model, net) <= 1e-12
    for size in range(37, 60):
        assert tuple(net(images(1, 3, size, size)).shape[2:]) == net.output_size(size)


@pytest.mark.parametrize("size", [(24, 40), (56, 24)])
def test_a_native_size_that_is_not_square(size: tuple[int, int]) -> None:
    features = 12 * (size[0] // 4) * (size[1] // 4)
    model = seeded(SmallVGG)
    model.classifier[0] = seeded(lambda: nn.Linear(features, 24))
    net = fcvgg.convert(model, input_size=size)
    assert net.input_size == net.geometry.window == size
    assert native_error(model, net) <= 1e-12
    with pytest.raises(fcvgg.InputSizeError, match=r"no square input gives .* pass input_size="):
        fcvgg.convert(model)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels(channels: int) -> None:
    model = seeded(SmallVGG, in_channels=channels)
    net = fcvgg.convert(model)
    assert net.in_channels == channels
    assert native_error(model, net) <= 1e-12


def test_the_first_convolution_may_be_defined_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(8, 4, 3, padding=1)
            self.first = nn.Conv2d(2, 8, 3, padding=1)
            self.fc = nn.Linear(4 * 64, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.second(self.first(x)).flatten(1))

    model = seeded(Backwards)
    net = fcvgg.convert(model)
    assert (net.in_channels, net.input_size) == (2, (8, 8))
    assert native_error(model, net) <= 1e-12


# -- modules used in unusual ways -----------------------------------------------------------------


def test_modules_called_at_several_places() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.conv = nn.Conv2d(8, 8, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.pool = nn.MaxPool2d(2)
            self.squash = nn.AdaptiveAvgPool2d(2)
            self.fc1 = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(self.relu(self.conv1(x)))
            x = self.pool(self.relu(self.conv(x)))
            x = self.relu(self.conv(x))
            x = self.squash(x).flatten(1)
            return self.fc1(self.relu(self.fc1(x)))

    model = seeded(Shared)
    for stride in (None, 2, 1):
        net = fcvgg.convert(model, input_size=16, output_stride=stride)
        assert native_error(model, net) <= 1e-12
        assert net.state_dict().keys() == model.state_dict().keys()


def test_one_linear_over_a_window_and_over_its_own_result() -> None:
    model = seeded(Headed, Lambda(lambda x, fc: fc(fc(x.flatten(1))), nn.Linear(288, 288)))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    assert net.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        model.head.layers[0].weight.mul_(-2)
    net.load_state_dict(model.state_dict())
    assert native_error(model, net) <= 1e-12


class ScaledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(2 * x)


class ReLUBatchNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class NamedLinear(nn.Linear):
    """A subclass that changes nothing."""


def test_subclassed_layers() -> None:
    model = seeded(
        lambda: nn.Sequential(
            *(ScaledConv(3, 6, 3, padding=1), ReLUBatchNorm(6), nn.MaxPool2d(4), nn.Flatten()),
            *(NamedLinear(6 * 36, 8), nn.ReLU(), NamedLinear(8, 4)),
        )
    )
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    assert net.state_dict().keys() == model.state_dict().keys()


def test_a_subclassed_batch_norm_follows_the_mode() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 6, 3),
            ReLUBatchNorm(6),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        )

    model = seeded(build)
    net = fcvgg.convert(model, input_size=12, copy=True)
    batch = images(4, 3, 12, 12)
    model.train()
    net.train()
    assert relative_error(model(batch), net(batch).flatten(1)) <= 1e-12
    torch.testing.assert_close(net.state_dict()["1.running_mean"], model[1].running_mean)


def test_a_part_kept_in_evaluation_mode_stays_in_it() -> None:
    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, training=self.training)

        def train(self, mode: bool = True) -> Frozen:
            return super().train(False)

    model = seeded(lambda: Headed(nn.Sequential(Frozen(), nn.Flatten(), nn.Linear(288, 5))))
    net = fcvgg.convert(model)
    net.train()
    model.train()
    batch = images(2, 3, 24, 24)
    assert relative_error(model(batch), net(batch).flatten(1)) <= 1e-12


@pytest.mark.parametrize("stride", [None, 1])
def test_parametrized_layers(stride: int | None) -> None:
    norm = nn.utils.parametrizations.weight_norm

    def build() -> nn.Module:
        return nn.Sequential(
            *(norm(nn.Conv2d(3, 6, 3, padding=1)), nn.MaxPool2d(2), norm(nn.Conv2d(6, 6, 3))),
            *(nn.Flatten(), norm(nn.Linear(6 * 36, 8)), nn.ReLU(), norm(nn.Linear(8, 4))),
        )

    model = seeded(build)
    net = fcvgg.convert(model, output_stride=stride)
    assert net.input_size == (16, 16)
    assert native_error(model, net) <= 1e-12
    assert net.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert native_error(model, net) <= 1e-12


class StandardisedConv(nn.Conv2d):
    """Weights normalised at every call, as timm's norm-free networks do."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = torch.full((self.out_channels,), 2.0, dtype=torch.float64)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True)
        var, mean = torch.var_mean(weight)
        return F.conv2d(x, (weight.view_as(self.weight) - mean) / var.sqrt(), self.bias, padding=1)


def test_weights_computed_from_parameters_need_no_rules() -> None:
    model = seeded(
        lambda: nn.Sequential(
            StandardisedConv(3, 6, 3), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(6 * 36, 4)
        )
    )
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    with torch.no_grad():
        model[0].weight.exp_()
    assert native_error(model, net) <= 1e-12


MORE = {
    "frozen batch norm": (lambda x, n, fc: fc(n(x).flatten(1)), FrozenBatchNorm2d(8)),
    "synchronised batch norm": (lambda x, n, fc: fc(n(x).flatten(1)), nn.SyncBatchNorm(8)),
    "batch norm over flat positions": (
        lambda x, n, fc: fc(n(x.flatten(2)).flatten(1)),
        nn.BatchNorm1d(8),
    ),
    "scale and shift": (
        lambda x, n, fc: fc((x * n.weight.view(1, -1, 1, 1) + n.bias[:, None, None]).flatten(1)),
        nn.BatchNorm2d(8),
    ),
    "cosine classifier": (
        lambda x, fc1, fc: (
            F.linear(F.normalize(x.flatten(2).mean(2)), F.normalize(fc1.weight, dim=1))
            + fc(x.flatten(1))
        ),
        nn.Linear(8, 4),
    ),
    "where": (lambda x, n, fc: fc(torch.where(x > 0.1, x, 0.1 * n(x)).flatten(1)), nn.ReLU()),
    "maxout": (
        lambda x, n, fc: fc(torch.cat([torch.maximum(*n(x).chunk(2, 1))] * 2, 1).flatten(1)),
        nn.LocalResponseNorm(3),
    ),
    "shuffled channels": (lambda x, n, fc: fc(n(x).flatten(1)), nn.ChannelShuffle(4)),
    "reflected borders": (
        lambda x, n, fc: fc(n(F.pad(x, (1, 1, 1, 1), mode="reflect")).flatten(1)),
        nn.Conv2d(8, 8, 3),
    ),
    "borders that differ": (
        lambda x, n, fc: fc(n(F.pad(x, (2, 0, 1, 1), value=0.3)).flatten(1)),
        nn.Conv2d(8, 8, 3),
    ),
    "even kernel with the same size": (
        lambda x, n, fc: fc(n(x).flatten(1)),
        nn.Conv2d(8, 8, 4, padding="same"),
    ),
    "depthwise and dilated": (
        lambda x, n, fc: fc(n(x).flatten(1)),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8),
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("call", "layer"), MORE.values(), ids=MORE.keys())
def test_layers_of_the_trunk(call, layer: nn.Module) -> None:
    model = seeded(Headed, Lambda(call, layer, nn.Linear(288, 4)))
    net = fcvgg.convert(model, input_size=24)
    assert native_error(model, net) <= 1e-12
    assert list(net.state_dict()) == list(model.state_dict())


class Engine(nn.Module):
    """In place of ``ultralytics.YOLO``, whose ``forward`` takes files."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


Engine.__module__ = "ultralytics.engine.model"


def test_wrappers_are_unwrapped() -> None:
    model = seeded(SmallVGG)
    for wrapped in (
        Engine(model),
        nn.DataParallel(model),
        torch.compile(model),
        nn.DataParallel(torch.compile(model)),
    ):
        net = fcvgg.convert(wrapped, verify=False)
        assert net.state_dict().keys() == model.state_dict().keys()
        assert net.source == "SmallVGG"
        assert native_error(model, net) <= 1e-12


def test_unregistered_tensors_and_literals_are_constants() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1).double()
            self.net = SmallVGG()
            self.net.scale = torch.tensor(3.0).double()

        def forward(self, x: Tensor) -> Tensor:
            x = (x - self.mean) / torch.tensor([0.2, 0.3, 0.4], dtype=x.dtype)[None, :, None, None]
            return self.net(x) * self.net.scale

    model = seeded(Normalised)
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    assert net.state_dict().keys() == model.state_dict().keys()
    single = net.float()
    assert single(images(1, 3, 32, 32, dtype=torch.float32)).dtype == torch.float32


def test_a_copy_before_an_in_place_layer_is_a_copy() -> None:
    def head(x, fc):
        kept = x.clone()
        return fc((F.relu(x - 1, inplace=True) + kept - x.sub_(2)).flatten(1))

    model = seeded(Headed, Lambda(head, nn.Linear(288, 5)))
    assert native_error(model, fcvgg.convert(model)) <= 1e-12


def _reshaped(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(x.size(0), -1)


def _in_place(change):
    """A copy of the features is changed in place; the features are read later."""

    def head(x, f, g, *layers):
        y = _reshaped(x)
        return f(change(y, *layers)) + g(x.flatten(1))

    return head


def _renamed(x, f, g):
    kept = x
    x += 0.5
    x.relu_()
    return f(kept.flatten(1)) + g(x.flatten(1))


def _viewed(x, f, g):
    y = x.view(x.size(0), -1)
    F.relu_(y)
    return f(y) + g(x.flatten(1))


def _copied_before(x, f, g):
    y = x.flip(2)
    x.relu_()
    return f(y.flatten(1)) + g(x.flatten(1))


def _half(x, f, g):
    a, b = x.chunk(2, 1)
    a.relu_()
    return f(torch.cat([a, b], 1).flatten(1))


def _pooled(x, f, g):
    y = F.adaptive_avg_pool2d(x, 6)  # the identity here, and a copy
    y.relu_()
    return f(y.flatten(1)) + g(x.flatten(1))


IN_PLACE = {
    "function": (_in_place(lambda y: F.relu_(y)), []),
    "argument": (_in_place(lambda y: F.relu(y, True)), []),
    "method": (_in_place(lambda y: y.sub_(0.5)), []),
    "layer": (_in_place(lambda y, relu: relu(y)), [nn.ReLU(inplace=True)]),
    "dropout": (_in_place(lambda y, drop: drop(y)), [nn.Dropout(0.5, inplace=True)]),
    "another name": (_renamed, []),
    "a view": (_viewed, []),
    "a copy before": (_copied_before, []),
    "a half": (_half, []),
    "an adaptive pool": (_pooled, []),
}


@pytest.mark.parametrize(("head", "layers"), IN_PLACE.values(), ids=IN_PLACE.keys())
def test_layers_in_place_change_what_they_change_in_the_source(head, layers) -> None:
    def signed(x, *rest):
        return head(x - 0.4, *rest)

    model = seeded(Headed, Lambda(signed, nn.Linear(288, 5), nn.Linear(288, 5), *layers))
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12


@pytest.mark.parametrize("layer", [nn.Dropout(1.0, inplace=True), nn.ReLU(inplace=True)])
def test_layers_in_place_after_a_copy_leave_the_rest_alone_in_training_too(layer) -> None:
    head = _in_place(lambda y, change: change(y))
    model = seeded(
        Headed, Lambda(head, nn.Linear(288, 5, bias=False), nn.Linear(288, 5, bias=False), layer)
    )
    net = fcvgg.convert(model)
    batch = images(2, 3, 24, 24)
    with torch.no_grad():
        assert relative_error(model.train()(batch), net.train()(batch).flatten(1)) <= 1e-12


def test_scores_changed_in_place_are_what_they_became() -> None:
    def head(x, fc):
        scores = fc(x.flatten(1))
        torch.sigmoid_(scores)
        return scores

    model = seeded(Headed, Lambda(head, nn.Linear(288, 5)))
    net = fcvgg.convert(model)
    assert net.activation == "sigmoid"
    assert native_error(model, net) <= 1e-12


def test_unused_layers_keep_their_place_in_checkpoints() -> None:
    model = seeded(SmallVGG)
    model.features[0].unused = nn.Conv2d(3, 3, 1).double()
    model.auxiliary = nn.Linear(4, 4).double()
    net = fcvgg.convert(model)
    assert net.state_dict().keys() == model.state_dict().keys()


def test_the_source_may_have_parts_named_like_the_networks() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = SmallVGG()
            self.training_flag = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.training_flag(F.dropout(self.network(x), 0.2, self.training))

    model = seeded(Named)
    net = fcvgg.convert(model, copy=True)
    assert net.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        model.network.classifier[0].weight.mul_(2)
    net.load_state_dict(model.state_dict())
    assert native_error(model, net) <= 1e-12


# -- types and layouts ----------------------------------------------------------------------------


def test_a_bfloat16_model_and_a_network_cast_to_bfloat16() -> None:
    model = seeded(SmallVGG, dtype=torch.float32)
    reference = fcvgg.convert(model)
    half = fcvgg.convert(seeded(SmallVGG, dtype=torch.bfloat16))
    cast = fcvgg.convert(model, copy=True).bfloat16()
    batch = images(2, 3, 48, 40, dtype=torch.bfloat16)
    expected = reference(batch.float())
    for net in (half, cast):
        assert net(batch).dtype == torch.bfloat16
        assert relative_error(expected, net(batch).float()) <= 5e-2


@pytest.mark.parametrize("count", [1, 300])
def test_channels_last_images(count: int) -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model)
    batch = images(2, 3, 32, 32 + 4 * count)
    expected = net(batch)
    got = net(batch.to(memory_format=torch.channels_last))
    assert relative_error(expected, got) <= 1e-12
    assert native_error(model.to(memory_format=torch.channels_last), net) <= 1e-12


# -- larger images: the sliding window ------------------------------------------------------------


def test_an_unpadded_net_equals_the_sliding_window_everywhere() -> None:
    model = seeded(Unpadded)
    net = fcvgg.convert(model)
    batch = images(2, 3, 61, 50)
    expected = sliding_window(model, net, batch)
    assert expected.shape[2:] == (5, 3)
    assert relative_error(expected, net(batch)) <= 1e-12
    assert not net.geometry.touches_padding((61, 50)).any()


def test_a_padded_net_differs_from_the_sliding_window_but_not_at_the_native_size() -> None:
    model = seeded(SmallVGG)
    net = fcvgg.convert(model)
    assert native_error(model, net) <= 1e-12
    batch = images(1, 3, 48, 48)
    assert relative_error(sliding_window(model, net, batch), net(batch)) > 1e-2


def test_interior_cells_of_a_padded_net_equal_its_unpadded_twin() -> None:
    """Where no padding is touched, padding is the only thing that could differ."""
    model = seeded(SmallVGG)
    twin = seeded(SmallVGG)
    for layer in (twin.features[0], twin.features[4]):
        layer.padding = (0, 0)
    net = fcvgg.convert(model)
    bare = fcvgg.convert(twin, input_size=38, verify=False)
    batch = images(1, 3, 64, 64)
    whole = net(batch)
    inside = ~torch.from_numpy(net.geometry.touches_padding((64, 64)))
    assert inside.any()
    assert not inside.all()
    for row, col in inside.nonzero().tolist():
        top, left, bottom, right = net.geometry.receptive_field_of(row, col)
        crop = batch[:, :, top:bottom, left:right]
        assert relative_error(bare(crop)[:, :, 0, 0], whole[:, :, row, col]) <= 1e-12


def test_shifting_the_image_by_the_stride_shifts_the_map_by_a_cell() -> None:
    net = fcvgg.convert(seeded(GlobalPooled), input_size=64)
    stride = net.geometry.stride[0]
    batch = images(1, 3, 64 + 12 * stride, 80)
    inside = ~torch.from_numpy(net.geometry.touches_padding(batch.shape[2:])).all(1)
    assert inside.any()
    moved = net(batch[:, :, stride:])
    interior = inside.nonzero().flatten()[1:-1]
    assert relative_error(net(batch)[:, :, interior + 0], moved[:, :, interior - 1]) <= 1e-11


def test_outputs_are_a_tuple_only_where_the_source_gives_several() -> None:
    assert isinstance(fcvgg.convert(seeded(SmallVGG))(images(1, 3, 32, 32)), Tensor)
    single = seeded(Headed, Lambda(lambda x, fc: [fc(x.flatten(1))], nn.Linear(288, 5)))
    assert len(as_tuple(fcvgg.convert(single)(images(1, 3, 24, 24)))) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_what_is_not_a_number_stays_visible(grad):
    net = fcvgg.load("demo", verify=False)
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    images[:, :, 40:44, 40:44] = torch.nan
    with torch.set_grad_enabled(grad):
        unknown = net(images).isnan()
    assert unknown.any()
    assert not unknown.all()
    assert torch.equal(unknown, net.network(images).isnan())
