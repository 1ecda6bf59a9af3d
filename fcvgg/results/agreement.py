"""`Agreement`: the report of how far an optimised network's classes are from the plain one's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fcvgg.names import counted
from fcvgg.probability import to_probabilities


@dataclass(frozen=True)
class Agreement:
    """How far the probabilities of an optimised network are from the plain one's, on images.

    Attributes:
        images: how many images were compared.
        cells: how many cells of their maps, in all outputs; cells without data do not count.
        top1: the share of the cells on which both name the same class; of one class, whether it is
            at 0.5 or above. Of several outputs, that of the lowest.
        max_difference: the largest difference of a probability.
        mean_difference: the mean over the cells of the largest difference in each.
        layers: in int8, convolutions and fully connected layers of the network; otherwise 0.
        in_float: names of those that were left in float32.
        of_calibration: whether the images are those that the network was calibrated on. On others
            the two may differ more, see `fcvgg.OptimizedNetwork.agreement_on`.
    """

    images: int
    cells: int
    top1: float
    max_difference: float
    mean_difference: float
    layers: int
    in_float: tuple[str, ...] = ()
    of_calibration: bool = False

    def __str__(self) -> str:
        images = counted(self.images, "image")
        if self.of_calibration:
            images = f"the {images} of the calibration"
        layers = f", {len(self.in_float)} of {counted(self.layers, 'layer')} in float32"
        return (
            f"the same top class in {self.top1:.1%} of {counted(self.cells, 'cell')} of {images}, "
            f"probabilities within {self.max_difference:.2g} (mean {self.mean_difference:.1e})"
            + (layers if self.layers else "")
        )


@dataclass(frozen=True)
class _Differences:
    """Of one output: for each cell with data, whether the class is the same, and how far it is."""

    same: Tensor
    largest: Tensor


def agreement_of(
    expected: Sequence[Sequence[Tensor]],
    got: Sequence[Sequence[Tensor]],
    activations: Sequence[str],
    layers: int = 0,
    in_float: tuple[str, ...] = (),
    of_calibration: bool = False,
) -> Agreement:
    """The report on score maps of the same images by both networks.

    Args:
        expected: for every image, the maps ``(1, K, h, w)`` of all outputs; NaN has no data.
        got: those of the optimised network.
        activations: what the scores of each output are.
        layers: as in `Agreement`.
        in_float: as in `Agreement`.
        of_calibration: as in `Agreement`.
    """
    found = [
        _joined([_differences(a[i], b[i], kind) for a, b in zip(expected, got)])
        for i, kind in enumerate(activations)
    ]
    largest = torch.cat([differences.largest for differences in found])
    return Agreement(
        images=len(expected),
        cells=len(largest),
        top1=min((float(d.same.double().mean()) for d in found if len(d.same)), default=1.0),
        max_difference=float(largest.max()) if len(largest) else 0.0,
        mean_difference=float(largest.double().mean()) if len(largest) else 0.0,
        layers=layers,
        in_float=in_float,
        of_calibration=of_calibration,
    )


def _differences(expected: Tensor, got: Tensor, activation: str) -> _Differences:
    """Of one map ``(1, K, h, w)``."""
    has_data = expected.isfinite().all(1)  # (1, h, w)
    a, b = (
        to_probabilities(scores.movedim(1, -1)[has_data], activation, dim=1)  # (cells, K)
        for scores in (expected.float(), got.float())
    )
    same = (a >= 0.5) == (b >= 0.5) if a.shape[1] == 1 else a.argmax(1) == b.argmax(1)
    return _Differences(same.flatten(), (a - b).abs().amax(1))


def _joined(parts: Sequence[_Differences]) -> _Differences:
    return _Differences(
        torch.cat([part.same for part in parts]), torch.cat([part.largest for part in parts])
    )
