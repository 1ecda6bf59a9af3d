"""Where the results of a command on several images go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fcvgg.errors import ImageError


class OutputFiles:
    """One file for each image, named after it, such that none takes the place of another.

    Args:
        images: all images of the run.
        folder: where the files go.
        ending: of their names, which begin with the image's stem: ``"-heatmap.png"``.
    """

    def __init__(self, images: Sequence[Path], folder: Path, ending: str):
        self.folder = folder
        self.ending = ending
        self.inputs = {image.resolve(): image for image in images}
        self.owners: dict[Path, Path] = {}
        for image in images:
            self.owners.setdefault(self._name(image), image)

    def path_for(self, image: Path) -> Path:
        """The path of an image's file.

        Raises:
            ImageError: if it is that of another image of this run, or of an input.
        """
        path = self._name(image)
        owner = self.owners[path]
        if owner != image:
            raise ImageError(
                f"{image} and {owner} would both be written to {path}; "
                "run them apart, each with its own --output"
            )
        if path.resolve() in self.inputs:
            raise ImageError(
                f"the {path.stem.rpartition('-')[2]} of {image} would overwrite the input {path}; "
                "choose another --output"
            )
        return path

    def _name(self, image: Path) -> Path:
        return self.folder / f"{image.stem}{self.ending}"
