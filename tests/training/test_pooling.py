"""Pooling heads against plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

import pytest
import torch
from nets import SmallVGG, images, seeded
from torch import Tensor, nn

import fcvgg
from fcvgg.training import AttentionPool, LogSumExpPool, MeanPool, TopSharePool


def attention() -> AttentionPool:
    torch.manual_seed(0)
    return AttentionPool(3, hidden=5).double()


def attended(cells: Tensor) -> Tensor:
    pool = attention()
    logits = [
        pool.attention(pool.content(cell).tanh() * pool.gate(cell).sigmoid()) for cell in cells.T
    ]
    return cells @ torch.cat(logits).softmax(0)


POOLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "mean": (MeanPool, lambda cells: cells.mean(1)),
    "top share": (
        lambda: TopSharePool(0.3),
        lambda cells: cells.topk(ceil(0.3 * cells.shape[1])).values.mean(1),
    ),
    "one cell": (lambda: TopSharePool(1e-6), lambda cells: cells.amax(1)),
    "log-sum-exp": (
        lambda: LogSumExpPool(2.5),
        lambda cells: (2.5 * cells).exp().mean(1).log() / 2.5,
    ),
    "attention": (attention, attended),
}


def maps_with_missing_cells() -> Tensor:
    """Two images of three classes, one with cells that hold NaN, some in one class alone."""
    maps = images(2, 3, 4, 5, seed=1)
    maps[0, :, 1, 2:] = torch.nan
    maps[0, 1, 3, 0] = torch.nan
    return maps


@pytest.mark.parametrize("name", POOLS)
def test_pools_follow_their_formulas_and_leave_missing_cells_out(name: str) -> None:
    build, formula = POOLS[name]
    maps = maps_with_missing_cells()
    cells = [one.flatten(1)[:, ~one.flatten(1).isnan().any(0)] for one in maps]
    assert [c.shape[1] for c in cells] == [16, 20]
    torch.testing.assert_close(build()(maps), torch.stack([*map(formula, cells)]))


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_those_of_differences(name: str) -> None:
    pool = POOLS[name][0]()
    values, missing = maps_with_missing_cells().nan_to_num(), maps_with_missing_cells().isnan()
    torch.autograd.gradcheck(
        lambda x: pool(x.masked_fill(missing, torch.nan)), [values.requires_grad_()]
    )


@pytest.mark.parametrize("name", POOLS)
def test_an_image_without_cells_has_no_score(name: str) -> None:
    maps = maps_with_missing_cells()
    maps[1] = torch.nan
    pooled = POOLS[name][0]()(maps)
    assert pooled[0].isfinite().all()
    assert pooled[1].isnan().all()


def test_attention_tells_what_cells_count_for() -> None:
    pool, maps = attention(), maps_with_missing_cells()
    weights = pool.weights(maps)
    assert weights.shape == (2, 1, 4, 5)
    torch.testing.assert_close(weights.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    assert torch.equal(weights[:, 0] == 0, maps.isnan().any(1))
    torch.testing.assert_close((maps.nan_to_num() * weights).sum((2, 3)), pool(maps))
    maps[1] = torch.nan
    weights = pool.weights(maps)
    assert torch.equal(weights[:, 0] == 0, maps.isnan().any(1))
    with pytest.raises(fcvgg.ArgumentError, match=r"^maps must be \(N, K, h, w\), got \(4, 5\)"):
        pool.weights(torch.zeros(4, 5))


def test_large_scores_do_not_overflow() -> None:
    maps = torch.tensor([[[[1e4, -1e4]]]])
    torch.testing.assert_close(LogSumExpPool(8)(maps), torch.tensor([[1e4]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", POOLS)
def test_streamed_maps_train_as_those_of_batches_do(name: str) -> None:
    net = fcvgg.convert(seeded(SmallVGG)).eval()
    pool = POOLS[name][0]() if name != "attention" else AttentionPool(5).double()
    image = images(3, 70, 50)
    wanted = [*net.parameters(), *pool.parameters()]
    losses = [pool(maps).square().sum() for maps in (net(image[None]), net.streamed(image))]
    whole, streamed = (torch.autograd.grad(loss, wanted) for loss in losses)
    torch.testing.assert_close(whole, streamed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TopSharePool(0), r"^share must be above 0 and at most 1, got 0$"),
        (lambda: LogSumExpPool(-1), r"^sharpness must be above 0 and finite, got -1$"),
        (lambda: AttentionPool(0), "^channels must be"),
        (
            lambda: MeanPool()(torch.zeros(3, 4, 5)),
            r"^maps must be \(N, K, h, w\), got \(3, 4, 5\)",
        ),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(fcvgg.ArgumentError, match=message):
        build()
