"""Prediction from images: score maps, heatmaps and class probabilities of files and pixels."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from fcvgg.categories import one_per_class
from fcvgg.choices import Average, Combine
from fcvgg.errors import ArgumentError, ImageError, check_choice, check_integer, one_line
from fcvgg.images.batching import run_in_batches
from fcvgg.images.pipelines import TakesPreprocess
from fcvgg.images.reading import (
    ImageLike,
    PreparedImage,
    checked_flip,
    each_image,
    mirrored,
    prepare,
    smaller_sides,
    with_smallest_side,
)
from fcvgg.probability import (
    MeanOfViews,
    average_over_space,
    checked_activation,
    require_probabilities,
)
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.score_map import ScoreMap, pyramid_heatmap
from fcvgg.rewriting.outputs import flattened
from fcvgg.rewriting.program import Program
from fcvgg.support.module_state import device_of, dtype_of, evaluating
from fcvgg.support.progress import progress_bar


class ImagePrediction(TakesPreprocess):
    """What a fully convolutional network predicts from images, and what its scores mean.

    The base class of `fcvgg.FullyConvolutional`, whose ``forward`` maps preprocessed images
    ``(N, C, H, W)`` to scores ``(N, K, h, w)``. Here images are read, preprocessed and batched, and
    scores become results.
    """

    program: Program
    """The rewritten model, which knows its geometry, classes and input channels."""

    _activations: tuple[str, ...]
    """What the scores of each output are."""

    # -- what the scores are ----------------------------------------------------------------------

    @property
    def activation(self) -> str:
        """What the scores of the first output are, read off the source's graph or given.

        One of ``"logits"``, ``"independent_logits"`` (a sigmoid for each class is still to come),
        ``"probabilities"``, ``"log_probabilities"``, ``"sigmoid"`` (after a sigmoid for each
        class), ``"values"`` (regression) and ``"unknown"``.
        """
        return self._activations[0]

    @activation.setter
    def activation(self, value: str) -> None:
        self._activations = (checked_activation(value), *self._activations[1:])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs, keys joined with dots; ``("",)`` for one tensor."""
        return tuple(self.program.outputs.names())

    def output_index(self, output: int | str) -> int:
        """The number of an output that is given by number or name.

        Raises:
            ArgumentError: if there is no such output.
        """
        if isinstance(output, str) and output in self.outputs:
            return self.outputs.index(output)
        count = len(self._activations)
        if type(output) is int and 0 <= output < count:
            return output
        names = f" or one of {', '.join(map(repr, self.outputs))}" if any(self.outputs) else ""
        numbers = "0, the only one" if count == 1 else f"from 0 to {count - 1}"
        raise ArgumentError(f"output must be {numbers}{names}, got {output!r}")

    def activation_of(self, output: int | str = 0) -> str:
        """What the scores of one output are.

        Raises:
            ArgumentError: if there is no such output.
        """
        return self._activations[self.output_index(output)]

    @property
    def num_classes(self) -> int:
        return self.program.classes[0]

    @property
    def categories(self) -> tuple[str, ...] | None:
        """The names of the K classes, or None."""
        return self._categories

    @categories.setter
    def categories(self, names: Sequence[str] | str | os.PathLike[str] | None) -> None:
        self._categories = one_per_class(names, self.num_classes, "scores")

    def _channels_of_images(self) -> int:
        return self.program.in_channels

    # -- images -----------------------------------------------------------------------------------

    def score_map(
        self, image: ImageLike, *, scale: int | None = None, output: int | str = 0
    ) -> ScoreMap:
        """The score map of one image.

        Args:
            image: a path, a file in memory, what `fcvgg.open_image` gives, an open rasterio
                dataset, a PIL image, or an array of pixels ``(H, W, C)`` or ``(H, W)``, which are
                preprocessed: ``uint8``, or ``uint16`` and other values as `fcvgg.Preprocess` takes
                them; or a tensor ``(C, H, W)`` or ``(1, C, H, W)``, taken as preprocessed.
            scale: length of the smaller side to which the image is rescaled, in place of the
                preprocessing's resize; results still refer to the image's own pixels. None keeps
                its size, or leaves it to preprocessing.
            output: which output, by number or name, for a model with several.

        Raises:
            PreprocessError: if the image needs preprocessing and the network has none.
            ImageError: if it cannot be used as an image.
        """
        prepared, index = self._prepared(image), self.output_index(output)
        if scale is None:
            return self._score_map(prepared, index)
        return self._score_map_at(prepared, scale, index)

    def heatmap(
        self,
        image: ImageLike,
        target: int | str | None = None,
        *,
        scales: Sequence[int] | int | None = None,
        combine: Combine = "max",
        output: int | str = 0,
    ) -> Heatmap:
        """One class's probability over the image; the top class of the average if None.

        Args:
            image: as for `score_map`.
            target: a class index or category name.
            scales: lengths of the smaller side to which the image is rescaled, or one length, to
                find objects larger or smaller than the window; their maps are placed on the
                image's pixels by geometry. None keeps its size.
            combine: ``"max"`` or ``"mean"`` of the scales at each pixel.
            output: which output, by number or name, for a model with several.

        Raises:
            ArgumentError: if the scores have no probabilities, or are not what they are said to be.
        """
        require_probabilities(self.activation_of(output))
        if scales is None:
            return self.score_map(image, output=output).heatmap(target)
        prepared, index = self._prepared(image), self.output_index(output)
        maps = [self._score_map_at(prepared, scale, index) for scale in smaller_sides(scales)]
        return pyramid_heatmap(maps, target, combine)

    @torch.no_grad()
    def classify(
        self,
        images: Any,
        *,
        scales: Sequence[int] | int | None = None,
        flip: bool = False,
        average: Average = "scores",
        output: int | str = 0,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Class probabilities by dense evaluation (VGG paper, section 3.2).

        Inputs of equal size are run together.

        Args:
            images: one image or any iterable of them, each as for `score_map` and of any size; a
                folder, for the images in it by name; or a preprocessed batch ``(N, C, H, W)``.
            scales: lengths of the smaller side to which each image is rescaled, or one length. None
                keeps it: an image many windows large is then seen in parts, and an object larger
                than the window is recognised at a smaller scale only, such as ``net.usual_scale``.
                Below the window the image is padded with zeros up to it.
            flip: also evaluate the mirrored image.
            average: what is averaged over the map's cells: ``"scores"`` (logits before the softmax;
                scores that are probabilities or their logarithms are averaged as probabilities), or
                ``"probabilities"``. Over scales and flips probabilities are averaged.
            output: which output, by number or name, for a model with several.
            batch_size: inputs run together; as many as come to about a million pixels when None.
            progress: show a bar on stderr.

        Returns:
            float32 ``(N, K)`` on the CPU, each row summing to 1 unless the classes are independent.
            Cells that see pixels that are not finite do not count; the row of an image whose every
            cell does is NaN.

        Raises:
            ArgumentError: if the scores have no probabilities, or are not what they are said to be.
        """
        require_probabilities(self.activation_of(output))
        check_choice("average", average, get_args(Average))
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        flip, index = checked_flip(flip), self.output_index(output)
        lengths = None if scales is None else smaller_sides(scales)
        means: dict[int, MeanOfViews] = {}
        images = each_image(images)
        total = len(images) if isinstance(images, Sized) else None
        with progress_bar("classifying", total, shown=progress) as advance:
            for number, row in run_in_batches(
                self._views(images, lengths, flip, advance),
                lambda _, batch: self._predicted(batch, average, index),
                batch_size,
            ):
                means.setdefault(number, MeanOfViews()).add(row)
        if not means:
            raise ImageError("images must hold at least one, got none")
        return torch.stack([means[i].value() for i in sorted(means)])

    def _views(
        self,
        images: Iterable[Any],
        scales: Sequence[int] | None,
        flip: bool,
        advance: Callable[[float], None],
    ) -> Iterator[tuple[int, None, Tensor]]:
        """Every image's input at every scale, and mirrored, with the image's index."""
        for index, image in enumerate(images):
            prepared = self._prepared(image)
            for view in (with_smallest_side(prepared, n) for n in scales) if scales else [prepared]:
                for pixels in (view, mirrored(view)) if flip else (view,):
                    yield index, None, pixels.tensor(self.preprocess)
            advance(1)

    def _predicted(self, batch: Tensor, average: Average, output: int) -> Tensor:
        """Class probabilities ``(N, K)`` of inputs of one size, each averaged over its map."""
        activation = self.activation_of(output)
        maps = self._scores(batch, output)
        return torch.stack([average_over_space(scores, activation, average) for scores in maps])

    def _scores(self, batch: Tensor, output: int) -> Tensor:
        """One output's maps ``(N, K, h, w)`` in evaluation mode."""
        try:
            with torch.no_grad(), evaluating(self):
                maps = self(batch.to(device_of(self), dtype_of(self)))
        except (MemoryError, RuntimeError) as error:
            # torch raises RuntimeError for the CPU, its subclass OutOfMemoryError for a GPU
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise ImageError(
                f"an input of {'x'.join(map(str, batch.shape[2:]))} pixels does not fit into "
                f"memory whole ({one_line(error)}); choose a smaller scale, or compute it strip by "
                "strip with fcvgg.stream"
            ) from error
        return flattened(maps)[0][output]

    def _prepared(self, image: ImageLike) -> PreparedImage:
        return prepare(image, self.preprocess, self.program.in_channels)

    def _score_map(self, image: PreparedImage, output: int) -> ScoreMap:
        activation = self.activation_of(output)
        pixels = image.tensor(self.preprocess)
        scores = self._scores(pixels, output)
        size = (pixels.shape[2], pixels.shape[3])
        return ScoreMap(
            scores=scores[0],
            geometry=self.program.geometry.placed(size),
            image_size=image.size,
            input_size=size,
            categories=self.categories if output == 0 else None,
            activation=activation,
            image=image.picture,
            full_size=image.full_size,
            georeference=image.georeference,
            could_have_positions=self.program.could_have_positions,
        )

    def _score_map_at(self, image: PreparedImage, scale: int, output: int) -> ScoreMap:
        """The score map of the rescaled image, in the pixels of the image as it was."""
        made = self._score_map(with_smallest_side(image, scale), output)
        return replace(made, image_size=image.size, image=image.picture)
