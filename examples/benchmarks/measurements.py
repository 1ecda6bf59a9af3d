"""Measure a converted network beside what a user could pick instead.

Every contender runs in a process of its own. They take turns, so that what else the machine does
hits them alike; medians and quartiles are reported. The peak is measured in the same run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn

from contenders import CONTENDERS, PLAIN, ContenderError, classifier
from fcvgg.choices import Clock
from fcvgg.conversion import convert
from fcvgg.errors import ArgumentError, FcvggError
from fcvgg.network import FullyConvolutional
from fcvgg.optimization.timing import CLOCKS
from machine import machine, measured_peak
from results import Benchmark, Measurement
from workers import Case, Worker

_SLOW = 10.0
"""Seconds of a first call beyond which only one more is made."""

_PAUSE = 0.05
"""Seconds between turns, in which the threads of the contender before stop waiting for work."""

_MOST_CROPS = 100
"""Crops of a batch up to which sliding windows are run: 0.14 s each for a VGG-16."""

_LARGEST_EXACT = 512 * 512
"""Pixels of a batch up to which scores are compared with float64's."""


def benchmark(
    model: str = "vgg16",
    *,
    sizes: Sequence[int] = (224, 512, 1024),
    batches: Sequence[int] = (1,),
    repeats: int = 7,
    contenders: Sequence[str] | None = None,
    threads: int | None = None,
    clock: Clock = "wall",
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[Benchmark], None] = lambda result: None,
) -> Benchmark:
    """Measure contenders side by side, each in a process of its own.

    A script that calls this needs the usual ``if __name__ == "__main__":``.

    Args:
        model: a torchvision name; its weights are random, which costs the same.
        sizes: sides of the square images, of the native size at least.
        batches: images per call.
        repeats: turns of each; short calls are made several times in one.
        contenders: names of `contenders.CONTENDERS`; None takes all.
        threads: of every contender; None keeps torch's setting.
        clock: ``"wall"`` or ``"cpu"``.
        report: is told what is being done.
        keep: is given what was measured so far, after every size and number of images, so that an
            interruption loses little; it names what is missing.

    Raises:
        ArgumentError: if a name or number is none of these, or nothing can run.
    """
    names = list(CONTENDERS) if contenders is None else list(dict.fromkeys(contenders))
    _check_arguments(model, names, sizes, batches, repeats, clock)
    with _settings(threads):
        threads = torch.get_num_threads()
        source, native = classifier(model)
        net = convert(source, input_size=native, verify=False)
        _check_sizes(sizes, net)
        result = Benchmark(model, machine(), threads, clock, peak_gflops=0.0, rows=(), skipped={})
        cases = [Case(model, size, batch, threads, clock) for size in sizes for batch in batches]
        for i, case in enumerate(cases):
            report(str(case))
            fitting = [name for name in names if _fits(name, net, case, native)]
            turns = _Turns(case, report)
            turns.take([name for name in fitting if name not in result.skipped], repeats)
            rows = list(_rows(turns, net))
            slow = _too_slow([*result.rows, *rows], net, cases[: i + 1])
            result = result.extended(rows, turns.peak, turns.left_out | slow)
            if rows:
                missing = {
                    str(case): "not measured when this was written" for case in cases[i + 1 :]
                }
                keep(replace(result, skipped=result.skipped | missing))
    if not result.rows:
        reasons = [f"{name}: {why}" for name, why in result.skipped.items()]
        raise ArgumentError(
            f"none of {', '.join(names)} can run at these sizes; "
            f"{'; '.join(reasons) or f'some run at {native}x{native} only'}"
        )
    return result


def operations(net: FullyConvolutional, size: int) -> int:
    """Multiplications and additions of the dense network on one square image."""
    total = 0
    axes = net.geometry.axes
    grids = [axis.sizes(size) for axis in axes]
    for record in net.program.records:
        rows, cols = (grid[record.step] if record.step >= 0 else size for grid in grids)
        total += 2 * record.multiply_adds_per_position * rows * cols
    return total


def _check_arguments(
    model: str,
    names: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    repeats: int,
    clock: str,
) -> None:
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown or not names:
        raise ArgumentError(
            f"there is no contender {', '.join(map(repr, unknown)) or 'given'}; expected some of "
            f"{', '.join(map(repr, CONTENDERS))}"
        )
    if model not in torchvision.models.list_models(module=torchvision.models):
        raise ArgumentError(f"there is no model {model!r}; expected a torchvision name")
    if clock not in CLOCKS:
        raise ArgumentError(
            f"clock={clock!r} is unknown; expected {' or '.join(map(repr, CLOCKS))}"
        )
    if repeats < 1 or not sizes or not batches or min([*sizes, *batches]) < 1:
        raise ArgumentError("sizes, batches and repeats must be positive")


def _check_sizes(sizes: Sequence[int], net: FullyConvolutional) -> None:
    least = max(net.geometry.window)
    if min(sizes) < least:
        raise ArgumentError(
            f"size {min(sizes)} is below the network's window of {least}, to which it would be "
            f"padded; give sizes from {least} on"
        )


@contextmanager
def _settings(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def _fits(name: str, net: FullyConvolutional, case: Case, native: int) -> bool:
    contender = CONTENDERS[name]
    if contender.native_only:
        return case.size == native
    return not contender.by_crops or _crops(net, case) <= _MOST_CROPS


def _crops(net: FullyConvolutional, case: Case) -> int:
    return prod(net.output_size((case.size, case.size))) * case.batch


class _Turns:
    """The contenders of one case, each in its own process, and what they gave.

    Attributes:
        seconds: of every counted call, by contender.
        memory: bytes that each one's process held at most, where the system tells.
        scores: of those that are compared with float64.
        left_out: why, by contender where it can run nowhere, else by contender and case.
        peak: GFLOP/s of the machine meanwhile.
    """

    def __init__(self, case: Case, report: Callable[[str], None]) -> None:
        self.case = case
        self.seconds: dict[str, list[float]] = {}
        self.memory: dict[str, int | None] = {}
        self.scores: dict[str, NDArray[Any]] = {}
        self.left_out: dict[str, str] = {}
        self.peak = 0.0
        self._report = report
        self._running: dict[str, Worker] = {}

    @property
    def exact(self) -> bool:
        """Whether scores are compared with float64's."""
        return self.case.size**2 * self.case.batch <= _LARGEST_EXACT

    def take(self, names: Iterable[str], repeats: int) -> None:
        """Start the contenders and call them in ``repeats`` turns.

        One whose first call is slow is called once more, then ended, so that the memory of slow
        ones does not add up.
        """
        clock = CLOCKS[self.case.clock]
        with ExitStack() as stack:
            for name in names:
                self._report(f"preparing {name}")
                with self._left_out_if_it_fails(name):
                    worker = stack.enter_context(Worker(name, self.case))
                    self._running[name], self.seconds[name] = worker, []
                    if worker.call() >= _SLOW:
                        self.seconds[name].append(worker.call())
                        self._finish(name)
            for i in range(repeats if self.seconds else 0):
                self._report(f"turn {i + 1} of {repeats}")
                time.sleep(_PAUSE)
                self.peak = max(self.peak, measured_peak(clock))
                for name, worker in [*self._running.items()]:
                    time.sleep(_PAUSE)
                    with self._left_out_if_it_fails(name):
                        self.seconds[name] += worker.turn()
            for name in [*self._running]:
                with self._left_out_if_it_fails(name):
                    self._finish(name)

    def _finish(self, name: str) -> None:
        worker = self._running[name]
        self.memory[name] = worker.memory()
        if self.exact and CONTENDERS[name].comparable:
            try:
                self.scores[name] = worker.scores()
            except FcvggError as error:  # what was measured counts without them
                self._report(f"no scores of {name}: {error}")
        worker.close()
        del self._running[name]

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except FcvggError as error:
            self.seconds.pop(name, None)
            if name in self._running:
                self._running.pop(name).close()
            where = f"{name} at {self.case}" if isinstance(error, ContenderError) else name
            self.left_out[where] = str(error)
            self._report(f"left out {name}: {error}")


def _rows(turns: _Turns, net: FullyConvolutional) -> Iterator[Measurement]:
    """In the order in which the contenders are known."""
    case = turns.case
    work = operations(net, case.size) * case.batch / 1e9
    medians = {name: float(np.median(seconds)) for name, seconds in turns.seconds.items()}
    own = medians.get(PLAIN)
    expected = _exact(net, case.images()) if turns.scores else None
    for name in (name for name in CONTENDERS if name in medians):
        low, high = np.percentile(turns.seconds[name], [25, 75])
        gflops = work / medians[name]
        yield Measurement(
            contender=name,
            size=case.size,
            batch=case.batch,
            seconds=medians[name],
            quartiles=(float(low), float(high)),
            calls=len(turns.seconds[name]),
            ratio=None if own is None else medians[name] / own,
            gflops=gflops,
            share=gflops / turns.peak,
            memory=turns.memory[name],
            error=_error(turns.scores.get(name), expected),
        )


def _too_slow(
    rows: Sequence[Measurement], net: FullyConvolutional, cases: Sequence[Case]
) -> dict[str, str]:
    """What is said of sliding windows where they were not run, from the time of their crops."""
    reasons = {}
    by_size = {(case.size, case.batch): case for case in cases}
    for name in dict.fromkeys(row.contender for row in rows if CONTENDERS[row.contender].by_crops):
        last = [row for row in rows if row.contender == name][-1]
        measured = by_size[last.size, last.batch]
        per_crop = last.seconds / _crops(net, measured)
        for case in cases:
            number = _crops(net, case)
            if number > _MOST_CROPS:
                reasons[f"{name} at {case}"] = (
                    f"{number:,} crops, about {number * per_crop:,.0f} s at the time per crop of "
                    f"{measured} (not run)"
                )
    return reasons


def _exact(net: FullyConvolutional, images: Tensor) -> Any:
    """The scores in float64, of a chain layer by layer so that one is widened at a time."""
    x: Any = images.double()
    values: dict[Any, Any] = {}
    for node in net.network.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "call_module":
            module = net.network.get_submodule(str(node.target))
            values[node] = _widened(module, *(values[a] for a in node.args))
        elif node.op == "output":
            return values[node.args[0]]
        else:  # a graph with functions
            break
    return copy.deepcopy(net.network).double()(x)


def _widened(module: nn.Module, *args: Tensor) -> Any:
    state = {name: value.double() for name, value in module.state_dict().items()}
    return torch.func.functional_call(module, state, args)


def _error(scores: NDArray[Any] | None, expected: Tensor | None) -> float | None:
    if scores is None or expected is None:
        return None
    found = torch.from_numpy(scores).double()
    found = found[..., None, None] if found.ndim == 2 else found
    return ((found - expected).abs().max() / expected.abs().max()).item()
