"""`FullyConvolutional`: the network that `fcvgg.convert` returns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.categories import one_per_class
from fcvgg.choices import Average
from fcvgg.errors import ArgumentError, ImageError, TrainingError, one_line
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.batching import run_in_batches
from fcvgg.images.preprocessing import Preprocess, encoded_preprocess, given_preprocess
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
from fcvgg.inference.blocks import is_traced, run
from fcvgg.inference.missing import Reader, can_be_looked_at, readers_of, run_with_missing
from fcvgg.probability import (
    MeanOfViews,
    average_over_space,
    checked_activation,
    require_probabilities,
)
from fcvgg.results.heatmap import Heatmap
from fcvgg.results.score_map import ScoreMap, pyramid_heatmap
from fcvgg.rewriting.modules import WindowLinear
from fcvgg.rewriting.program import Program
from fcvgg.serialization.bundle import write_bundle
from fcvgg.serialization.exporting import ExportedFile, export_network
from fcvgg.support.module_state import device_of, dtype_of, evaluating, listed


class FullyConvolutional(nn.Module):
    """A classifier as a fully convolutional network: any input size, a map of scores.

    Made by `fcvgg.convert`. Calling it takes ``(N, C, H, W)`` images of any size, preprocessed, and
    returns raw scores ``(N, K, h, w)``, with ``(h, w) == net.output_size((H, W))``; a tuple of them
    for a model with several outputs. An image below the window is padded with zeros, centred.

    Attributes:
        network: the rewritten model, an `torch.fx.GraphModule`; `state_dict` has its keys, which
            are the source's.
        geometry: where the cells lie on the image.
        input_size: the native size ``(h, w)``.
        categories: the K class names, or None.
        preprocess: how images become input, or None.
        equivalence: the report of the check against the source, or None if there was none.
    """

    _loaded_from: str
    """The prefix of the last checkpoint's keys, by which its problems are reported."""

    _load_problems: list[str]
    """torch's own list of what does not fit, while a checkpoint is loaded."""

    def __init__(
        self,
        program: Program,
        *,
        input_size: Pair,
        preprocess: Preprocess | str | None = None,
        categories: Sequence[str] | str | os.PathLike[str] | None = None,
        activation: str | None = None,
        source: str = "",
    ):
        super().__init__()
        self.program = program
        self.network = program.network
        self.training = program.network.training
        self.input_size = input_size
        self.source = source
        self.equivalence: Any = None
        self._ties = _ties_of(program)
        self._activations = program.activations
        self.categories = categories
        self.preprocess = preprocess
        if activation is not None:
            self.activation = activation
        self.register_load_state_dict_pre_hook(_source_keys)
        self.register_load_state_dict_post_hook(_report_source_keys)

    @property
    def geometry(self) -> Geometry:
        """Where the cells lie on the image."""
        return self.program.geometry

    @property
    def native_cell(self) -> Pair:
        """The cell ``(row, col)`` that gives the source's answer at the native size."""
        row, col = (
            -axis.context_start // axis.stride if axis.context is not None else 0
            for axis in self.geometry.axes
        )
        return row, col

    @property
    def usual_scale(self) -> int:
        """The length of an image's smaller side at which such classifiers are evaluated.

        8/7 of the native size: 256 for 224. The whole image then is little more than one window, so
        that its main object has the size of those the network was trained on.
        """
        return round(min(self.input_size) * 8 / 7)

    @property
    def in_channels(self) -> int:
        """The channels of the images."""
        return self.program.in_channels

    # -- the map ----------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Any:
        """Score maps ``(N, K, h, w)`` of preprocessed images ``(N, C, H, W)``.

        In evaluation mode the cells that see a pixel that is not finite are NaN, and all others are
        as if the pixel were 0.
        """
        self._check_images(images)
        self._check_dtype(images)
        images = self._padded(images)
        if self.training or is_traced() or not can_be_looked_at(images):
            return run(self.network, images)
        return run_with_missing(images, lambda x: run(self.network, x), self.readers)

    def output_size(self, size: Iterable[int] | int) -> Pair:
        """Cells ``(h, w)`` for images of ``(H, W)`` pixels.

        Rows and columns past the last full cell are seen by no cell.
        """
        return self.geometry.output_size(size)

    def _padded(self, images: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.geometry.padding_for(images.shape[2:])
        return F.pad(images, (left, right, top, bottom)) if top + bottom + left + right else images

    def _check_images(self, images: Any) -> None:
        """Refuse what `forward` does not take.

        Raises:
            ImageError: if it is no batch ``(N, C, H, W)`` of the network's channels.
        """
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ImageError(
                f"the network takes images (N, {self.in_channels}, H, W), got {shape}; "
                "add the batch with images[None], or use net.score_map for one image"
            )
        if images.shape[1] != self.in_channels:
            raise ImageError(
                f"the network takes {self.in_channels} channels, got {images.shape[1]} in {shape}; "
                "images are (N, C, H, W)"
            )
        if 0 in images.shape:
            raise ImageError(
                f"the batch {shape} is empty; expected at least one image of one pixel"
            )

    def _check_dtype(self, images: Tensor) -> None:
        """Refuse images of another dtype than the parameters', unless autocast sees to it."""
        own = dtype_of(self)
        if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
            remedy = (
                f"cast them with images.to({own}), or the network with net.to({images.dtype})"
                if images.is_floating_point()
                else "preprocess them to floats, or use net.score_map or net.classify on pixels"
            )
            raise ImageError(f"the network takes images of {own}, got {images.dtype}; {remedy}")

    # -- modes ------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> FullyConvolutional:
        """Set the mode of every module as the source's ``train`` did when it was converted.

        Raises:
            TrainingError: if a part of the source computes something in training mode that the
                network does not hold.
        """
        known = self.program.training_mode
        if mode and known.unfollowed:
            raise TrainingError(
                "the network cannot follow the source into training mode: "
                f"{listed(known.unfollowed, self.source)} computes something else there, which its "
                "graph does not hold; train the source, and convert it again"
            )
        super().train(mode)
        exceptions = known.still if mode else known.lively
        for name, module in self.network.named_modules():
            if name in exceptions:
                module.training = not mode
        for name, parameter in self.network.named_parameters():
            if mode and name in known.frozen:
                parameter.requires_grad_(False)
        self.training = self.network.training
        return self

    # -- how parts of a map are computed -----------------------------------------------------------

    def readers(self, output: int = 0) -> list[Reader]:
        """What the operations behind an output read, by which a cell sees a pixel."""
        return readers_of(self.network, self.in_channels, output, self.geometry)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the arithmetic; an optimised network may take and give another one."""
        return dtype_of(self)

    @property
    def layers(self) -> Any:
        """The graph whose layers `fcvgg.stream` runs over strips of an image."""
        return self.network

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

    def activation_of(self, output: int = 0) -> str:
        """What the scores of one output are.

        Raises:
            ArgumentError: if there is no such output.
        """
        if not isinstance(output, int) or not 0 <= output < len(self._activations):
            raise ArgumentError(
                f"output={output!r} does not exist; the network has {len(self._activations)}"
            )
        return self._activations[output]

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

    @property
    def preprocess(self) -> Preprocess | None:
        """How images become input, or None."""
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: Preprocess | str | None) -> None:
        self._preprocess = given_preprocess(value, self.in_channels)

    # -- images -----------------------------------------------------------------------------------

    def score_map(self, image: ImageLike, *, scale: int | None = None, output: int = 0) -> ScoreMap:
        """The score map of one image.

        Args:
            image: a path, a file in memory, what `fcvgg.open_image` gives, an open rasterio
                dataset, a PIL image, or an array of pixels ``(H, W, C)`` or ``(H, W)``, which are
                preprocessed: ``uint8``, or ``uint16`` and other values as `fcvgg.Preprocess` takes
                them; or a tensor ``(C, H, W)`` or ``(1, C, H, W)``, taken as preprocessed.
            scale: length of the smaller side to which the image is rescaled, in place of the
                preprocessing's resize; results still refer to the image's own pixels. None keeps
                its size, or leaves it to preprocessing.
            output: which output, for a model with several.

        Raises:
            PreprocessError: if the image needs preprocessing and the network has none.
            ImageError: if it cannot be used as an image.
        """
        prepared = self._prepared(image)
        if scale is None:
            return self._score_map(prepared, output)
        return self._score_map_at(prepared, scale, output)

    def heatmap(
        self,
        image: ImageLike,
        target: int | str | None = None,
        *,
        scales: Sequence[int] | int | None = None,
        combine: Literal["max", "mean"] = "max",
        output: int = 0,
    ) -> Heatmap:
        """One class's probability over the image; the top class of the average if None.

        Args:
            image: as for `score_map`.
            target: a class index or category name.
            scales: lengths of the smaller side to which the image is rescaled, or one length, to
                find objects larger or smaller than the window; their maps are placed on the
                image's pixels by geometry. None keeps its size.
            combine: ``"max"`` or ``"mean"`` of the scales at each pixel.
            output: which output, for a model with several.

        Raises:
            ArgumentError: if the scores have no probabilities, or are not what they are said to be.
        """
        require_probabilities(self.activation_of(output))
        if scales is None:
            return self.score_map(image, output=output).heatmap(target)
        prepared = self._prepared(image)
        maps = [self._score_map_at(prepared, scale, output) for scale in smaller_sides(scales)]
        return pyramid_heatmap(maps, target, combine)

    @torch.no_grad()
    def classify(
        self,
        images: Any,
        *,
        scales: Sequence[int] | int | None = None,
        flip: bool = False,
        average: Average = "scores",
        output: int = 0,
    ) -> Tensor:
        """Class probabilities by dense evaluation (VGG paper, section 3.2).

        Inputs of equal size are run together.

        Args:
            images: one image or any iterable of them, each as for `score_map` and of any size; or
                a preprocessed batch ``(N, C, H, W)``.
            scales: lengths of the smaller side to which each image is rescaled, or one length. None
                keeps it: an image many windows large is then seen in parts, and an object larger
                than the window is recognised at a smaller scale only, such as ``net.usual_scale``.
                Below the window the image is padded with zeros up to it.
            flip: also evaluate the mirrored image.
            average: what is averaged over the map's cells: ``"scores"`` (logits before the softmax;
                scores that are probabilities or their logarithms are averaged as probabilities), or
                ``"probabilities"``. Over scales and flips probabilities are averaged.

        Returns:
            float32 ``(N, K)`` on the CPU, each row summing to 1 unless the classes are independent.
            Cells that see pixels that are not finite do not count; the row of an image whose every
            cell does is NaN.

        Raises:
            ArgumentError: if the scores have no probabilities, or are not what they are said to be.
        """
        require_probabilities(self.activation_of(output))
        if average not in ("scores", "probabilities"):
            raise ArgumentError(
                f"average={average!r} is unknown; expected 'scores' or 'probabilities'"
            )
        flip = checked_flip(flip)
        lengths = None if scales is None else smaller_sides(scales)
        means: dict[int, MeanOfViews] = {}
        for index, row in run_in_batches(
            self._views(images, lengths, flip),
            lambda _, batch: self._predicted(batch, average, output),
        ):
            means.setdefault(index, MeanOfViews()).add(row)
        if not means:
            raise ImageError("no images were given; expected at least one")
        return torch.stack([means[i].value() for i in sorted(means)])

    def _views(
        self, images: Any, scales: Sequence[int] | None, flip: bool
    ) -> Iterator[tuple[int, None, Tensor]]:
        """Every image's input at every scale, and mirrored, with the image's index."""
        for index, image in enumerate(each_image(images)):
            prepared = self._prepared(image)
            for view in (with_smallest_side(prepared, n) for n in scales) if scales else [prepared]:
                for pixels in (view, mirrored(view)) if flip else (view,):
                    yield index, None, pixels.tensor(self.preprocess)

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
        return maps[output] if isinstance(maps, tuple) else maps

    def _prepared(self, image: ImageLike) -> PreparedImage:
        return prepare(image, self.preprocess, self.in_channels)

    def _score_map(self, image: PreparedImage, output: int) -> ScoreMap:
        activation = self.activation_of(output)
        pixels = image.tensor(self.preprocess)
        scores = self._scores(pixels, output)
        size = (pixels.shape[2], pixels.shape[3])
        return ScoreMap(
            scores=scores[0],
            geometry=self.geometry.placed(size),
            image_size=image.size,
            input_size=size,
            categories=self.categories if output == 0 else None,
            activation=activation,
            image=image.picture,
        )

    def _score_map_at(self, image: PreparedImage, scale: int, output: int) -> ScoreMap:
        """The score map of the rescaled image, in the pixels of the image as it was."""
        made = self._score_map(with_smallest_side(image, scale), output)
        return replace(made, image_size=image.size, image=image.picture)

    # -- files ------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The parameters under the source's keys; FC weights are shaped ``(O, C, kh, kw)``."""
        state = self.network.state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for key in [
            k for k in state if k.removeprefix(prefix).split(".")[0] in self.program.aliases
        ]:
            del state[key]
        return state

    def classifier_state_dict(self) -> dict[str, Tensor]:
        """The parameters as the source model holds them: FC-shaped, in the source's order.

        ``source.load_state_dict(net.classifier_state_dict())`` is the way back.
        """
        state = self.state_dict()
        for name, module in self.network.named_modules():
            if isinstance(module, WindowLinear) and f"{name}.weight" in state:
                state[f"{name}.weight"] = module.fc_weight()
        return state

    def save(self, path: str | Path) -> Path:
        """Write a bundle, a folder that `fcvgg.load` reads back bit for bit.

        It holds the parameters (``model.safetensors``) and, in ``config.json``, graph, geometry,
        preprocessing, categories and equivalence report. It is written whole or not at all.

        Raises:
            FcvggError: if `path` is something else than a bundle, has the ending of another format,
                or cannot be written.
        """
        path = Path(path)
        write_bundle(
            path,
            self.program,
            {
                "source": self.source,
                "input_size": list(self.input_size),
                "activation": self.activation,
                "categories": self.categories,
                "preprocess": encoded_preprocess(self.preprocess),
                "equivalence": _report_of(self.equivalence),
            },
        )
        return path

    def export(self, path: str | Path) -> ExportedFile:
        """Write the network for other runtimes: ``.onnx``, or ``.pt2`` (torch.export).

        The file takes preprocessed images ``(N, C, H, W)`` of any number and any size from the
        window up, and carries stride, window, offset, preprocessing and categories as metadata
        (``fcvgg.stride`` and so on, in JSON). The file is run at several sizes and compared with
        the network where its engine is installed: onnxruntime for ``.onnx``, torch for ``.pt2``.

        Returns:
            the path; its `check` says what was compared, or why it was not.

        Raises:
            FcvggError: if the ending is unknown, or the file cannot be written or run.
            EquivalenceError: if the file gives other scores than the network; it is not kept.
            MissingExtraError: if ONNX's packages are not installed.
        """
        geometry = self.geometry
        height, width = (
            axis.window + 3 * axis.stride * (i + 1) for i, axis in enumerate(geometry.axes)
        )
        uneven = tuple(axis.window + axis.stride + 1 + i for i, axis in enumerate(geometry.axes))
        return export_network(
            Path(path),
            self.network,
            (2, self.in_channels, height, width),
            {
                "window": geometry.window,
                "stride": geometry.stride,
                "offset": geometry.offset,
                "receptive_field": geometry.receptive_field,
                "geometry": geometry.to_dict(),
                "input_size": self.input_size,
                "activation": self.activation,
                "preprocess": encoded_preprocess(self.preprocess),
                "categories": self.categories,
            },
            sizes=[geometry.window, (uneven[0], uneven[1])],
        )

    def extra_repr(self) -> str:
        return f"{self.source}, native size {self.input_size}, {self.geometry}"


def _report_of(equivalence: Any) -> dict[str, Any] | None:
    """A report as data, without the modes, which a bundle does not keep."""
    if equivalence is None:
        return None
    return {name: value for name, value in asdict(equivalence).items() if name != "other_modes"}


def _source_keys(
    net: nn.Module, state: dict[str, Any], prefix: str, _meta: Any, _strict: Any, *reports: Any
) -> None:
    """Put the source's keys where the network's modules look for them."""
    assert isinstance(net, FullyConvolutional)
    for key in [k for k in state if k.startswith(prefix)]:
        state[f"{prefix}network.{key.removeprefix(prefix)}"] = state.pop(key)
    net._loaded_from = prefix
    net._load_problems = reports[-1]
    own = net.network.state_dict(keep_vars=True)
    for name in own:  # further instances of a layer, which get its tensors when it has them
        if name.split(".")[0] in net.program.aliases:
            state.setdefault(f"{prefix}network.{name}", own[name])


def _report_source_keys(net: nn.Module, incompatible: Any) -> None:
    """Report missing, unexpected and misshapen keys under the source's names too."""
    assert isinstance(net, FullyConvolutional)
    _tie(net)
    prefix = net._loaded_from
    inner = re.compile(rf'(?<=[ "]){re.escape(prefix)}network\.')
    net._load_problems[:] = [inner.sub(prefix, problem) for problem in net._load_problems]
    net._load_problems = []
    for keys in (incompatible.missing_keys, incompatible.unexpected_keys):
        for i, key in enumerate(keys):
            if key.startswith(f"{prefix}network."):
                keys[i] = f"{prefix}{key.removeprefix(f'{prefix}network.')}"


def _ties_of(program: Program) -> dict[str, str]:
    """The tensors of further instances of a layer, each with the first one's that it shares."""

    def memory(tensor: Tensor) -> tuple[int, ...]:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()

    first: dict[tuple[int, ...], str] = {}
    further: dict[str, Tensor] = {}
    for name, tensor in program.network.state_dict(keep_vars=True).items():
        if name.split(".")[0] in program.aliases:
            further[name] = tensor
        else:
            first.setdefault(memory(tensor), name)
    found = {name: first.get(memory(tensor)) for name, tensor in further.items()}
    return {name: place for name, place in found.items() if place is not None}


def _tie(net: FullyConvolutional) -> None:
    """Let further instances of a layer hold the first one's tensors again.

    Loading with ``assign=True`` gives the first one new tensors, and copies and casts part tensors
    that share memory in different shapes.
    """
    own = net.network.state_dict(keep_vars=True)
    for name, place in net._ties.items():
        further, first = own[name], own[place]
        if further is first:
            continue
        if further.shape != first.shape:  # another window over the same columns
            view = first.detach().view(further.shape)
            if (view.dtype, view.device) == (further.dtype, further.device):
                further.data = view  # stays the parameter that an optimizer may hold
                continue
            first = nn.Parameter(view, further.requires_grad)
        owner, _, child = name.rpartition(".")
        setattr(net.network.get_submodule(owner), child, first)
