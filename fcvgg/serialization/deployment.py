"""What an exported file computes besides the network: its images from pixels, probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fcvgg.errors import FcvggError, PreprocessError
from fcvgg.images.preprocessing import Preprocess
from fcvgg.probability import BOUNDED, require_probabilities, to_probabilities
from fcvgg.support.module_state import device_of, dtype_of


class Deployed(nn.Module):
    """A converted network from pixels, or to probabilities, or both.

    Args:
        network: takes images ``(N, C, H, W)`` and returns one map or a tuple of maps.
        preprocess: makes the images of pixels ``(N, H, W, C)``, uint8; None takes images.
        activations: what the scores of each map are, to give probabilities; None gives scores.

    Raises:
        PreprocessError: if `preprocess` resizes, which a file cannot do as Pillow does.
        ArgumentError: if scores have no probabilities.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess | None,
        activations: Sequence[str] | None,
    ):
        super().__init__()
        self.training = network.training
        self.network = network
        self.preprocess = preprocess
        for activation in activations or ():
            require_probabilities(activation)
        self.activations = activations
        if preprocess is None:
            return
        if preprocess.resize is not None:
            raise PreprocessError(
                f"the preprocessing in a file must keep the size of images, got "
                f"resize={preprocess.resize!r}, which Pillow does otherwise than other runtimes; "
                "resize them before, and set net.preprocess to one with resize=None"
            )
        for name in ("mean", "std"):
            row = torch.tensor(getattr(preprocess, name), device=device_of(network))
            self.register_buffer(name, row.view(1, 1, 1, -1), persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        maps = self.network(inputs if self.preprocess is None else self._images(inputs))
        if self.activations is None:
            return maps
        if isinstance(maps, Tensor):
            return _probabilities(maps, self.activations[0])
        return tuple(map(_probabilities, maps, self.activations))

    def _images(self, pixels: Tensor) -> Tensor:
        """What `Preprocess.normalized` makes of pixels ``(N, H, W, C)``, in the same order."""
        assert self.preprocess is not None
        values = pixels.float()
        if self.preprocess.channel_order == "BGR":
            values = values[..., [2, 1, 0]]
        values = (values * self.preprocess.scale - self.mean) / self.std
        images = values.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
        return images.to(dtype_of(self.network))  # (N, C, H, W)


def checked_preprocess(preprocess: Preprocess | None) -> Preprocess:
    """The preprocessing of a network, which an export with it needs.

    Raises:
        FcvggError: if there is none.
    """
    if preprocess is None:
        raise FcvggError(
            "preprocess=True puts the network's preprocessing in the file, but it has none; pass "
            "preprocess= to fcvgg.convert or fcvgg.load, or set net.preprocess"
        )
    return preprocess


def exported_activation(activation: str, classes: int) -> str:
    """What the probabilities of scores are, for who reads the file."""
    shared = activation == "logits" and classes > 1
    return (
        "probabilities"
        if shared or activation == "log_probabilities"
        else (activation if activation in BOUNDED else "sigmoid")
    )


def _probabilities(scores: Tensor, activation: str) -> Tensor:
    """As `to_probabilities` does, without its look at the values, which a graph cannot take."""
    if activation not in BOUNDED:
        return to_probabilities(scores, activation, dim=1)
    bounded = scores.exp() if activation == "log_probabilities" else scores
    return bounded.clamp(0, 1)
