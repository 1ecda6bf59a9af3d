"""Every element-wise function with a rule: over one map, two maps, and a map and a number."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Headed, Lambda, images, relative_error, seeded, sliding_window
from torch import Tensor, nn

import fcvgg
from fcvgg.rewriting.rules import elementwise, reductions
from fcvgg.rewriting.rules.registry import KINDS

OPERANDS: dict[str, Callable[[Tensor], tuple[Any, ...]]] = {
    "one map": lambda x: (x,),
    "two maps": lambda x: (x, x * -0.3),
    "a map and a number": lambda x: (x, 0.2),
    "a map and limits": lambda x: (x, 0.1, 0.4),
    "a choice of two maps": lambda x: (x > 0.2, x, x * -0.3),
    "a map and a mask": lambda x: (x, x > 0.2, 0.5),
}

TWO = OPERANDS["two maps"]


def called(target: Any, operands: tuple[Any, ...]) -> Any:
    if isinstance(target, str):
        return getattr(operands[0], target)(*operands[1:])
    return target(*operands)


def cases() -> dict[str, list[tuple[Any, Any]]]:
    """By name, every function and method with each kind of operands that torch lets it have."""
    x = torch.rand(2, 4, 6, 6, dtype=torch.float64) + 0.1
    found: dict[str, list[tuple[Any, Any]]] = {}
    for target, kind in KINDS.items():
        ours = kind.elementwise or kind.rewrite is reductions.maximum
        drops = kind.rewrite is elementwise.dropout
        if not ours or isinstance(target, type) or drops or target == "to":
            continue
        for operands in OPERANDS.values():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    result = called(target, operands(x.clone()))
            except (TypeError, RuntimeError, AttributeError, ValueError):
                continue
            kept = isinstance(result, Tensor) and result.shape == x.shape
            if kept and result.dtype in (x.dtype, torch.bool):
                name = target if isinstance(target, str) else target.__name__
                found.setdefault(name.strip("_"), []).append((target, operands))
    return found


CASES = cases()


def inside(x: Tensor) -> Tensor:
    """Values in 0.1 to 0.9, where every function is defined (logit and atanh are not beyond 1)."""
    return 0.1 + 0.8 * torch.sigmoid(x)


def test_the_cases_hold_functions_of_two_maps() -> None:
    both = {name for name, calls in CASES.items() if (getattr(torch, name, 0), TWO) in calls}
    assert {"add", "sub", "mul", "div", "maximum", "minimum", "max"} <= both


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("calls", CASES.values(), ids=CASES.keys())
def test_it_converts_and_streams(calls: list[tuple[Any, Any]]) -> None:
    def head(x: Tensor, fc: nn.Module) -> Tensor:
        results = [called(target, operands(inside(x))) * x for target, operands in calls]
        return fc(sum(results).flatten(1))

    model = seeded(lambda: Headed(Lambda(head, nn.Linear(288, 3)), pads=0))
    net = fcvgg.convert(model, input_size=30, verify=False)
    batch = images(1, 3, 35, 31)
    expected = net(batch).detach()
    assert relative_error(sliding_window(model, net, batch), expected) <= 1e-12
    streamed = fcvgg.stream(net, batch[0].numpy(), memory="32MiB").scores
    torch.testing.assert_close(torch.as_tensor(streamed), expected[0], rtol=1e-10, atol=1e-10)
