"""A classifier and the networks made from it, timed side by side on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fcvgg.choices import Clock, Timed
from fcvgg.errors import FcvggError
from fcvgg.geometry import Pair
from fcvgg.network import FullyConvolutional
from fcvgg.optimization.networks import optimize
from fcvgg.optimization.onednn import has_bfloat16

CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""``"cpu"`` counts the processor's time; with one thread, neighbours do not disturb it."""

_OPTIONS: dict[Timed, dict[str, Any]] = {
    "optimized": {},
    "optimized-bf16": {"dtype": torch.bfloat16},
    "optimized-int8": {"dtype": torch.int8, "least_agreement": None},
    "onnxruntime": {"engine": "onnxruntime"},
    "openvino": {"engine": "openvino"},
    "openvino-bf16": {"engine": "openvino", "dtype": torch.bfloat16},
}
"""Options of `optimize`; int8 is calibrated on noise, for the time that it takes alone."""

_SHORT = 1.0
"""Seconds of a call up to which every turn begins with a call that is not counted: users call one
network again and again, and at the start of a turn another one's weights are in the cache. That
costs a millisecond or two, which longer calls do not notice.
"""

_TURN = 0.5
"""Seconds that the counted calls of a turn fill, so that medians of short calls are steady."""

_PAUSE = 0.05
"""Seconds between turns, in which the threads of the network before stop waiting for work."""


@dataclass(frozen=True)
class Timing:
    """The time that one network takes.

    Attributes:
        network: its name.
        size: height and width of its images.
        batch: images per call.
        windows: how many windows it scores in an image.
        seconds: the median of the calls.
        quartiles: the first and third.
        calls: how many were counted.
    """

    network: Timed
    size: Pair
    batch: int
    windows: int
    seconds: float
    quartiles: tuple[float, float]
    calls: int

    @property
    def windows_per_second(self) -> float:
        return self.windows * self.batch / self.seconds


class Timer:
    """Times a function: one call, or a turn of as many calls as fill half a second."""

    def __init__(self, work: Callable[[], object], clock: Clock = "wall"):
        self._work = work
        self._clock = CLOCKS[clock]
        self._calls: int | None = None  # of a turn
        self._is_short = True

    def call(self) -> float:
        """Seconds of one call."""
        with torch.no_grad():
            start = self._clock()
            self._work()
            return self._clock() - start

    def turn(self) -> list[float]:
        """Seconds of a turn's calls; short ones come after a call that is not counted."""
        if self._calls is None:
            usual = self.call()
            self._calls = max(int(_TURN / max(usual, 1e-6)), 1)
            self._is_short = usual < _SHORT
        if self._is_short:
            self.call()
        return [self.call() for _ in range(self._calls)]


def network_for(
    name: Timed, source: nn.Module | None, net: FullyConvolutional, size: int
) -> nn.Module:
    """The network of a name, for square images of a size.

    Raises:
        FcvggError: that says why this machine or model has none.
    """
    if name == "plain":
        return net
    if name == "source":
        if source is None:
            raise FcvggError("a bundle holds the converted network only")
        return source
    if _OPTIONS[name].get("dtype") == torch.bfloat16 and not has_bfloat16():
        raise FcvggError("the processor has no bfloat16")
    options = _OPTIONS[name]
    if options.get("dtype") == torch.int8:
        noise = torch.Generator().manual_seed(0)
        calibrate = torch.randn(1, net.in_channels, size, size, generator=noise)
        options = {**options, "calibrate": calibrate}
    return optimize(net, size=size, **options)


def time_in_turns(
    networks: Mapping[Timed, nn.Module],
    net: FullyConvolutional,
    size: int,
    batch: int = 1,
    repeat: int = 7,
    clock: Clock = "wall",
    advance: Callable[[float], object] = lambda turns: None,
) -> list[Timing]:
    """Time networks on noise, in turns, so that whatever else the machine does affects all alike.

    Args:
        networks: by name. The source model gets images of the native size, which it was made for.
        net: the plain network, whose geometry gives the number of windows.
        size: height and width of the images of all others.
        batch: images per call.
        repeat: turns of each network; short calls are made several times in one.
        clock: the time that is counted.
        advance: is called with 1 after every turn.
    """
    rows, cols = net.output_size(size)
    sizes = {name: net.input_size if name == "source" else (size, size) for name in networks}
    windows = {name: 1 if name == "source" else rows * cols for name in networks}
    timers = {}
    for name, network in networks.items():
        images = torch.rand(batch, net.in_channels, *sizes[name])
        timers[name] = Timer(lambda n=network, x=images: n(x), clock)  # type: ignore[misc]
    seconds: dict[Timed, list[float]] = {name: [] for name in networks}
    for _ in range(repeat):
        for name, timer in timers.items():
            time.sleep(_PAUSE)
            seconds[name] += timer.turn()
            advance(1)
    timings = []
    for name, calls in seconds.items():
        low, median, high = np.percentile(calls, [25, 50, 75]).tolist()
        of = name, sizes[name], batch, windows[name]
        timings.append(Timing(*of, median, (low, high), len(calls)))
    return timings
