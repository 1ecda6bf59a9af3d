"""Idioms in any combination: trunk, stem, what stands between features and classifier, output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from idioms import FEATURES, LOGITS, NATIVE, POOLS, SCORES, STEMS, Idiom, IdiomNet, Trunk
from nets import EXACT, images, seeded, sliding_window
from torch import Tensor, nn

import fcvgg
from fcvgg.rewriting.outputs import flattened


class Strided(nn.Module):
    """Strided convolutions and a shortcut, without padding: 8 x 4 x 4 features of 22 pixels."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, 8, 4, stride=2)
        self.left = nn.Conv2d(8, 8, 4, stride=2)
        self.right = nn.Conv2d(8, 8, 4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        return F.silu(self.left(x)) + torch.tanh(self.right(x))


TRUNKS: dict[str, Callable[[int], nn.Module]] = {"pools": Trunk, "strides": Strided}

OF_WINDOWS = ("window", "of every position", "positions", "differences", "coordinates")
"""In the names of idioms after which a value is the elements of one window, and no map."""

KEEPING = {
    name: idiom
    for name, idiom in FEATURES.items()
    if name
    not in (
        "glu",
        "gate of halves",
        "maxout",
        "maxout by unflatten",
        "the mean channel",
        "channels padded",
    )
    and not any(word in name for word in (*OF_WINDOWS, "rows", "groups", "twice", "map"))
}
"""The idioms that give a map of the same shape, so that any other may follow."""

OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda z: z,
    "tuple with none": lambda z: (z, None),
    "dict": lambda z: {"scores": z, "double": z * 2},
    "nested": lambda z: [{"a": z}, (z - 1,)],
}

models = st.tuples(
    *map(
        st.sampled_from,
        (
            sorted(TRUNKS),
            sorted(STEMS),
            sorted(KEEPING),
            sorted(KEEPING),
            sorted([*FEATURES, *POOLS, *SCORES]),
            sorted(LOGITS),
            sorted(OUTPUTS),
        ),
    )
)


def combined(names: tuple[str, ...]) -> nn.Module:
    trunk, stem, first, second, head, last, output = names

    def scores(m: Any, f: Tensor) -> Any:
        f = KEEPING[second](m, KEEPING[first](m, f))
        if head in SCORES:
            return OUTPUTS[output](SCORES[head](m, f))
        features: Idiom = FEATURES.get(head) or POOLS[head]
        return OUTPUTS[output](LOGITS[last](m, m.classify(features(m, f).flatten(1))))

    return seeded(IdiomNet, scores, STEMS[stem], trunk=TRUNKS[trunk])


@settings(max_examples=40)
@given(models)
# two products of values in a row which pool the positions, unlike attention
@example(("pools", "BGR", "L2 norm", "L2 norm", "gated attention", "mixture of experts", "dict"))
# a mask that leaves nothing, of which the norm is 0 / 0
@example(
    (
        *("pools", "divided", "mask", "L2 norm by squares", "norm of the window by hand"),
        *("a class of zeros", "tuple with none"),
    )
)
def test_idioms_combine(names: tuple[str, ...]) -> None:
    model = combined(names)
    before = copy.deepcopy(model.state_dict())
    net = fcvgg.convert(model, input_size=NATIVE, verify=False)
    batch = images(2, 3, NATIVE + 4, NATIVE + 8)
    with torch.no_grad():
        maps = flattened(net(batch))[0]
        for i, got in enumerate(maps):

            def output(x: Tensor, i: int = i) -> Tensor:
                return flattened(model(x))[0][i].reshape(len(x), -1)

            windows = sliding_window(output, net, batch)
            # a mask may leave nothing but zeros, of which a norm makes 0 / 0 in the source too
            scale = max(windows.nan_to_num().abs().max().item(), 1e-3)
            atol = 1000 * EXACT[torch.float64] * scale
            torch.testing.assert_close(got, windows, rtol=0, atol=atol, equal_nan=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
