"""Numbers that a traced model computes with and that remember where they come from.

Python computes with plain numbers, so the graph of a model holds those of one size and one mode.
These subclasses of `int` pass for such numbers, and a rule can tell them from numbers written out.
"""

from __future__ import annotations

from typing import Any


class ModeQuestions:
    """The modules whose Python code branched on their mode while it was traced."""

    def __init__(self) -> None:
        self.places: set[str] = set()
        self.paused = False

    def note(self, place: str) -> None:
        if not self.paused:
            self.places.add(place)


class FollowsTraining(int):
    """Stands for ``self.training`` while a model is traced, recognisable as an argument.

    Functional dropout and batch norm receive the mode as a plain bool; this lets the converted
    network pass its own mode on instead of the one at the time of conversion. A branch on the mode
    is noted in `questions`, since the graph holds one of its sides only.
    """

    questions: ModeQuestions | None = None
    place: str = ""

    @classmethod
    def of(cls, mode: bool, questions: ModeQuestions, place: str) -> FollowsTraining:
        """The mode of the module at `place`."""
        flag = cls(mode)
        flag.questions, flag.place = questions, place
        return flag

    def __bool__(self) -> bool:
        if self.questions is not None:
            self.questions.note(self.place)
        return int(self) != 0

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __ne__(self, other: object) -> bool:
        return bool(self) != other

    __hash__ = int.__hash__


class FeatureSize(int):
    """A number that a model computes from the height or width of its features.

    A pool of that size is a global one; the same number written out need not be.
    """

    def __add__(self, other: int) -> int:
        return _of_features(int.__add__(self, other))

    def __sub__(self, other: int) -> int:
        return _of_features(int.__sub__(self, other))

    def __mul__(self, other: int) -> int:
        return _of_features(int.__mul__(self, other))

    def __floordiv__(self, other: int) -> int:
        return _of_features(int.__floordiv__(self, other))

    __radd__, __rmul__ = __add__, __mul__


def _of_features(number: Any) -> Any:
    return FeatureSize(number) if isinstance(number, int) else number  # also NotImplemented
