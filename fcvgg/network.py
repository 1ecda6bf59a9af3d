"""`FullyConvolutional`: the network that `fcvgg.convert` returns.

Its ``forward``, geometry, modes, checkpoints and files are here; what it predicts from images is in
`fcvgg.inference.prediction`.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fcvgg.errors import ImageError, TrainingError
from fcvgg.geometry import Geometry, Pair
from fcvgg.images.lazy.opening import strip_source
from fcvgg.images.preprocessing import PreprocessLike, encoded_preprocess
from fcvgg.inference.blocks import is_traced, run
from fcvgg.inference.missing import Reader, can_be_looked_at, readers_of, run_with_missing
from fcvgg.inference.prediction import ImagePrediction
from fcvgg.inference.streamed_map import streamed_map
from fcvgg.inference.strip_input import StripInput
from fcvgg.probability import final_scores
from fcvgg.rewriting.classifier import classifier_of
from fcvgg.rewriting.modules import WindowLinear
from fcvgg.rewriting.outputs import flattened
from fcvgg.rewriting.program import Program
from fcvgg.serialization.bundle import write_bundle
from fcvgg.serialization.deployment import Deployed, checked_preprocess, exported_activation
from fcvgg.serialization.exporting import ExportedFile, export_network
from fcvgg.serialization.hub import upload_bundle
from fcvgg.serialization.model_card import UNKNOWN_LICENSE
from fcvgg.support.memory_text import parsed_memory
from fcvgg.support.module_state import dtype_of, listed


class FullyConvolutional(ImagePrediction):
    """A classifier as a fully convolutional network: any input size, a map of scores.

    Made by `fcvgg.convert`. Calling it takes ``(N, C, H, W)`` images of any size, preprocessed, and
    returns raw scores ``(N, K, h, w)``, with ``(h, w) == net.output_size((H, W))``; of several
    outputs in the model's own containers, a dict as a dict of maps. An image below the window is
    padded with zeros, centred.

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
        preprocess: PreprocessLike | None = None,
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
    def head(self) -> str:
        """What a cell is: ``"window"``, or ``"position"`` of the features of one."""
        return self.program.head

    @property
    def native_cell(self) -> Pair:
        """The cell ``(row, col)`` that gives the source's answer at the native size."""
        row, col = (
            -axis.context_start // axis.stride if axis.context is not None else 0
            for axis in self.geometry.axes
        )
        return row, col

    def native_scores(self, maps: Any) -> list[Tensor]:
        """The source's scores ``(N, K)`` of images of the native size, one tensor for each output.

        Args:
            maps: what the network gives for the images.
        """
        row, col = self.native_cell
        found = flattened(maps)[0]  # (N, K, h, w) each
        if self.program.head == "window":
            return [scores[:, :, row, col] for scores in found]
        assert self.program.average is not None
        rows, cols = (slice(0, w.span, w.dilation) for w in self.program.average)
        means = [scores[:, :, rows, cols].mean((2, 3)) for scores in found]
        return [final_scores(x, final) for x, final in zip(means, self.program.finals)]

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

        They come in the containers in which the source returns its scores: dicts, tuples, lists,
        NamedTuples, dataclasses. While torch traces or exports, a NamedTuple stands for a
        dataclass; torch.jit.trace, which knows no None, gets a plain tuple. A loaded network gives
        NamedTuples for classes with fields, since a bundle holds no classes. `torch.export.export`
        and `torch.jit.trace` take the network for all sizes from the window up; ``net.export``
        also checks the file and writes what is known of the network into it.

        In evaluation mode the cells that see a pixel that is not finite are NaN, and all others are
        as if the pixel were 0.
        """
        if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            # for every size from the window up: what padding takes depends on the size
            return self._in_form(self.network(images))
        self._check_images(images)
        self._check_dtype(images)
        images = self._padded(images)
        if self.training or is_traced() or not can_be_looked_at(images):
            return self._in_form(run(self.network, images))
        return self._in_form(run_with_missing(images, lambda x: run(self.network, x), self.readers))

    def streamed(
        self,
        image: Any,
        *,
        memory: int | str = "1GiB",
        output: int | str = 0,
        nodata: float | str | None = None,
    ) -> Tensor:
        """The score map of an image of any size, for a loss: differentiable in bounded memory.

        Equals the network's map of the whole image, and ``loss(net.streamed(image)).backward()``
        gives every parameter the gradient of the whole image. The image is streamed
        strip by strip without a graph; the backward pass goes through the strips from the last to
        the first and computes each once more, so that memory does not grow with the image. Strips
        behind which no cell has a gradient are left out. Batch norm must be in evaluation mode:
        the statistics of a strip are not the image's.

        Args:
            image: as for `fcvgg.stream`.
            memory: bytes that the call and its backward pass may add, or text such as
                ``"512MiB"``, the map and the parameters' gradients aside. Images too wide for it
                are cut into blocks of columns, whose borders are computed twice.
            output: which output, by number or name, for a network with several.
            nodata: as for `fcvgg.stream`.

        Returns:
            scores ``(1, K, h, w)``, as of ``net(images)``; cells that see pixels that are not
            finite hold NaN.

        Raises:
            ArgumentError: if an option cannot be used, or `memory` is too little.
            ImageError: if the image cannot be used, or is a tensor that requires a gradient.
            TrainingError: if batch norm is in training mode.
        """
        if isinstance(image, Tensor) and image.requires_grad:
            raise ImageError(
                "image must not require a gradient in net.streamed, which gives those of the "
                "parameters alone, got a tensor that does; pass image.detach()"
            )
        trained = None if self.preprocess is None else self.preprocess.mpp
        source = strip_source(image, self.in_channels, nodata, trained=trained)
        pixels = StripInput.of(self, source)
        return streamed_map(self, pixels, self.output_index(output), parsed_memory(memory))

    def _in_form(self, maps: Any) -> Any:
        """The maps that the graph gives in the containers of the source's outputs."""
        form = self.program.outputs
        if form.is_tensor:
            return maps
        values = maps if isinstance(maps, tuple) else (maps,)
        if torch._C._get_tracing_state() is not None:
            return values
        return form.filled(values, records=not is_traced())

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
            ImageError: if it is not a batch ``(N, C, H, W)`` of the network's channels.
        """
        shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        if not isinstance(images, Tensor) or images.ndim != 4:
            raise ImageError(
                f"images must be (N, {self.in_channels}, H, W), got {shape}; "
                "add the batch with images[None], or use net.score_map for one image"
            )
        if images.shape[1] != self.in_channels:
            raise ImageError(
                f"images must have {self.in_channels} channels, got {images.shape[1]} in {shape}; "
                "pass (N, C, H, W)"
            )
        if 0 in images.shape:
            raise ImageError(f"images must hold at least one pixel, got a batch of shape {shape}")

    def _check_dtype(self, images: Tensor) -> None:
        """Refuse images of another dtype than the parameters', unless autocast sees to it."""
        own = dtype_of(self)
        if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
            remedy = (
                f"cast them with images.to({own}), or the network with net.to({images.dtype})"
                if images.is_floating_point()
                else "preprocess them to floats, or use net.score_map or net.classify on pixels"
            )
            raise ImageError(f"images must be of {own}, got {images.dtype}; {remedy}")

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

    def classifier(self) -> nn.Module:
        """The classifier ``(N, C, H, W) -> (N, K)`` that the network stands for.

        It takes images of the extent of one crop, ``net.geometry.crop``, has fully connected
        layers under the source's names, and shares the parameters.

        Raises:
            ConversionError: if the network scores positions (``head="position"``), not windows.
        """
        return classifier_of(self.program)

    def save(self, path: str | Path, *, license: str = UNKNOWN_LICENSE) -> Path:
        """Write a bundle, a folder that `fcvgg.load` reads back bit for bit.

        It holds the parameters (``model.safetensors``), in ``config.json`` graph, geometry,
        preprocessing, categories and equivalence report, and a model card (``README.md``). It is
        written whole or not at all.

        Args:
            path: the folder.
            license: of the weights, for the card: an identifier of the Hugging Face hub.

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
            license=license,
        )
        return path

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        license: str = UNKNOWN_LICENSE,
        message: str | None = None,
    ) -> str:
        """Write a bundle to a repository of the Hugging Face hub, for ``fcvgg.load("hf:NAME")``.

        Args:
            name: ``user/name``, or ``user/name@branch``; a repository is made if there is none.
            private: whether a new repository is private; the account's default when None.
            license: of the weights, for the model card: an identifier of the hub such as ``"mit"``.
            message: of the commit.

        Returns:
            the repository's address.

        Raises:
            FcvggError: if it cannot be written.
            MissingExtraError: if huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as folder:
            bundle = self.save(Path(folder) / "bundle", license=license)
            return upload_bundle(bundle, name, private, message)

    def export(
        self, path: str | Path, *, preprocess: bool = False, probabilities: bool = False
    ) -> ExportedFile:
        """Write the network for other runtimes: ``.onnx``, or ``.pt2`` (torch.export).

        The file takes preprocessed images ``(N, C, H, W)`` of any number and any size from the
        window up, and carries stride, window, offset, preprocessing and categories as metadata
        (``fcvgg.stride`` and so on, in JSON). The file is run at several sizes and compared with
        the network where its engine is installed: onnxruntime for ``.onnx``, torch for ``.pt2``.

        Args:
            path: where to.
            preprocess: whether the file takes pixels ``(N, H, W, C)``, uint8 in RGB, and
                preprocesses them itself.
            probabilities: whether it gives the probabilities of every cell in place of scores.

        Returns:
            the path; its `check` says what was compared, or why it was not.

        Raises:
            ArgumentError: if the scores have no probabilities.
            FcvggError: if the ending is unknown, the preprocessing is unknown or resizes, or the
                file cannot be written or run.
            EquivalenceError: if the file gives other scores than the network; it is not kept.
            MissingExtraError: if ONNX's packages are not installed.
        """
        geometry = self.geometry
        height, width = (
            axis.window + 3 * axis.stride * (i + 1) for i, axis in enumerate(geometry.axes)
        )
        uneven = tuple(axis.window + axis.stride + 1 + i for i, axis in enumerate(geometry.axes))
        network: nn.Module = self.network
        activation, inside = self.activation, None
        if preprocess or probabilities:
            inside = checked_preprocess(self.preprocess) if preprocess else None
            network = Deployed(network, inside, self._activations if probabilities else None)
        if probabilities:
            activation = exported_activation(activation, self.num_classes)
        return export_network(
            Path(path),
            network,
            (2, self.in_channels, height, width),
            {
                "window": geometry.window,
                "stride": geometry.stride,
                "offset": geometry.offset,
                "receptive_field": geometry.receptive_field,
                "geometry": geometry.to_dict(),
                "input_size": self.input_size,
                "activation": activation,
                "preprocess": encoded_preprocess(self.preprocess),
                "takes": "images" if inside is None else "pixels",
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
