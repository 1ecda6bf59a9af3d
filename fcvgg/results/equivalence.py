"""`Equivalence`: the report of how far a converted network is from its source."""

from __future__ import annotations

from dataclasses import dataclass

from fcvgg.names import counted
from fcvgg.support.module_state import listed


@dataclass(frozen=True)
class Equivalence:
    """How far a converted network is from its source model.

    Attributes:
        max_abs_error: the largest difference of a score at the native size.
        max_rel_error: the same, relative to the largest score. Where softmaxes, sigmoids and their
            like saturate, the scores are also compared, here and below, with what goes into those
            divided by a temperature in both, the largest absolute value that the network gave them:
            what a flat function hides shows there.
        tolerance: what `max_rel_error` may be.
        top1_agreement: the share of images on which both name the same class, or classes whose
            scores in the source lie within the tolerance of each other: a tie, which rounding may
            break either way.
        translation_error: the largest difference between the map's interior and that of the input
            shifted by one stride, relative to the largest score; it may be 10 tolerances.
        passed: whether both errors are within what they may be, the top-1 agreement is 1, and the
            modules of the two are in the same modes.
        input_size: the native size ``(h, w)`` that was run.
        images: how many images were run.
        other_modes: the modules that are in training mode in one of the two only, or compute
            something in the source's training mode that the network does not hold. The numbers are
            those of evaluation mode; in the modes that the two are in, their scores differ.
    """

    max_abs_error: float
    max_rel_error: float
    tolerance: float
    top1_agreement: float
    translation_error: float
    passed: bool
    input_size: tuple[int, int]
    images: int
    other_modes: tuple[str, ...] = ()

    def __str__(self) -> str:
        height, width = self.input_size
        return (
            f"{'equivalent' if self.passed else 'NOT EQUIVALENT'} at {height}x{width} on "
            f"{counted(self.images, 'image')}: max error {self.max_rel_error:.1e} of the largest "
            f"score (tolerance {self.tolerance:.0e}), top-1 agreement {self.top1_agreement:.0%}, "
            f"translation error {self.translation_error:.1e}"
            + (f"; in other modes: {listed(self.other_modes)}" if self.other_modes else "")
        )
