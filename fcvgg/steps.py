"""Collecting the geometry of a network while it is written: one step per layer with a kernel."""

from __future__ import annotations

from collections.abc import Iterable

from fcvgg.errors import UnsupportedLayerError
from fcvgg.geometry import IMAGE, Axis, Geometry, Pair, Step, Window
from fcvgg.program import Windows


class Steps:
    """The steps of both axes in order of computation, each with the layer that it stands for."""

    def __init__(self) -> None:
        self._axes: tuple[list[Step], list[Step]] = ([], [])
        self._strides: list[Pair] = []
        self._places: list[str] = []

    def add(self, windows: Windows, inputs: Iterable[int], place: str) -> int:
        """Append a step to both axes and return its place; an identity over one input adds none."""
        inputs = tuple(dict.fromkeys(inputs))
        if len(inputs) == 1 and all(window.is_identity for window in windows):
            return inputs[0]
        for steps, window in zip(self._axes, windows):
            steps.append(Step(window, inputs))
        stride = self.stride_at(inputs[0])
        self._strides.append((stride[0] * windows[0].stride, stride[1] * windows[1].stride))
        self._places.append(place)
        return len(self._places) - 1

    def join(self, inputs: Iterable[int], place: str) -> int:
        """The step of a layer over several maps, whose cells must lie on one grid."""
        inputs = tuple(inputs)
        strides = {self.stride_at(step) for step in inputs}
        if len(strides) > 1:
            raise UnsupportedLayerError(
                f"{place} joins branches with different strides {sorted(strides)}; "
                "branches must have the same number of input pixels between cells"
            )
        return self.add((Window(), Window()), inputs, place)

    def stride_at(self, step: int) -> Pair:
        """Image pixels between neighbours after a step."""
        return (1, 1) if step == IMAGE else self._strides[step]

    def geometry_at(self, step: int) -> Geometry:
        """The geometry of the network up to a step."""
        return Geometry(*(Axis(tuple(steps)).upto(step) for steps in self._axes))

    def check_branches(self, geometry: Geometry) -> None:
        """Refuse branches whose sizes differ at some input size; one period of the stride decides.

        Raises:
            UnsupportedLayerError: naming the layer that joins them.
        """
        for axis in geometry.axes:
            for size in range(axis.window, axis.window + axis.stride):
                sizes = axis.sizes(size)
                for i, step in enumerate(axis.steps):
                    fed = {size if k == IMAGE else sizes[k] for k in step.inputs}
                    if len(fed) > 1:
                        raise UnsupportedLayerError(
                            f"{self._places[i]} joins branches whose sizes differ for an input of "
                            f"{size} pixels ({sorted(fed)}); pad them alike"
                        )


def same_grid(a: Geometry, b: Geometry) -> bool:
    """Whether the cells of two maps lie in the same places for every input size."""
    return all(
        (x.stride, x.offset, x.receptive_field, x.window)
        == (y.stride, y.offset, y.receptive_field, y.window)
        and x.agree(y)
        for x, y in zip(a.axes, b.axes)
    )
