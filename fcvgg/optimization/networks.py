"""`optimize`: a copy of a converted network, for evaluation, as fast as the machine allows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fcvgg.errors import ArgumentError, EquivalenceError, FcvggError, check_choice, check_share
from fcvgg.geometry import Pair, checked_size
from fcvgg.inference.blocks import CHANNELS_LAST, BlockwiseGraph, run
from fcvgg.inference.memory import keep_freed_maps
from fcvgg.inference.missing import Reader, run_with_missing
from fcvgg.network import FullyConvolutional
from fcvgg.optimization.engines import ENGINES, engine_network
from fcvgg.optimization.fused import (
    FusedConv2d,
    FusedLayer,
    FusedWindowLinear,
    Packed,
    PackedConv2d,
    PackedWindowLinear,
)
from fcvgg.optimization.fusion import fused
from fcvgg.optimization.onednn import has_bfloat16, has_packing
from fcvgg.optimization.quantization import quantized
from fcvgg.optimization.samples import expected_maps, sample_images
from fcvgg.probability import require_probabilities
from fcvgg.results.agreement import Agreement, agreement_of
from fcvgg.rewriting.outputs import flattened
from fcvgg.serialization.exporting import ExportedFile
from fcvgg.support.module_state import device_of, dtype_of
from fcvgg.verification import verify

TOLERANCES = {
    torch.float64: 1e-12,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 5e-2,
}
"""Allowed error of an optimised network, relative to the largest score, by its arithmetic."""

_PACKED = (torch.float32, torch.bfloat16)

LEAST_AGREEMENT = 0.97
"""The share of cells that must keep their top class in int8."""


@dataclass(frozen=True)
class Optimization:
    """What `optimize` did.

    Attributes:
        engine: ``"torch"``, or the runtime that was asked for.
        dtype: of the arithmetic.
        layers: convolutions and fully connected layers with bias and ReLU in one call; in int8 all.
        winograd: how many of them may run by Winograd's algorithm.
        packed_bytes: bytes that the optimised network holds in addition to the plain one.
        in_float: names of the layers that int8 leaves in float32.
    """

    engine: str
    dtype: torch.dtype
    layers: int = 0
    winograd: int = 0
    packed_bytes: int = 0
    in_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.dtype == torch.int8:
            left = f"{len(self.in_float)} of {self.layers} layers in float32"
            return f"{self.engine}, {name}, {left}"
        if self.engine != "torch":
            return f"{self.engine}, {name}"
        return (
            f"{name}, {self.layers} fused layers, {self.winograd} by Winograd, "
            f"{self.packed_bytes / 1e6:,.0f} MB of packed weights"
        )


class OptimizedNetwork(FullyConvolutional):
    """A `FullyConvolutional` that only evaluates, made by `fcvgg.optimize`.

    It takes and gives the plain network's dtype whatever it computes in. Its checkpoints, bundles
    and exports are the plain network's, which it therefore keeps; `release` lets go of it.

    Attributes:
        optimization: what was done, and what memory it takes.
        agreement: in int8, how far it is from the plain network on the images of the calibration;
            `equivalence` is then None, since the two are not equivalent.
    """

    agreement: Agreement | None = None

    def __init__(self, plain: FullyConvolutional, network: Any, optimization: Optimization):
        super().__init__(
            replace(plain.program, network=network),
            input_size=plain.input_size,
            preprocess=plain.preprocess,
            categories=plain.categories,
            source=plain.source,
        )
        self._activations = plain._activations
        self.optimization = optimization
        self._plain: tuple[FullyConvolutional, ...] = (plain,)  # no submodule: not its parameters
        self._blockwise: BlockwiseGraph | None = None
        self._readers = [plain.readers(i) for i in range(len(plain.program.classes))]
        like = torch.zeros((), device=device_of(plain), dtype=dtype_of(plain))
        self._like = nn.Parameter(like, requires_grad=False)  # device and dtype of the images
        super().train(False)

    @property
    def plain(self) -> FullyConvolutional:
        """The network that this one was made from.

        Raises:
            FcvggError: if it was released.
        """
        if not self._plain:
            raise FcvggError(
                "the plain network was released; keep the one that fcvgg.convert gave to save or "
                "export it"
            )
        return self._plain[0]

    def classifier(self) -> nn.Module:
        """That of the plain network."""
        return self.plain.classifier()

    def release(self) -> None:
        """Let go of the plain network; its weights are freed if nobody else holds them."""
        self._plain = ()

    @torch.no_grad()
    def agreement_on(self, images: Any) -> Agreement:
        """How far this network's probabilities are from the plain one's on images of your choice.

        Args:
            images: as for ``net.classify``, best such as it has not seen. They are read as those of
                `calibrate` of `fcvgg.optimize`: at most 64, evenly spread over more, of each at
                most half a million pixels in the middle.

        Raises:
            ArgumentError: if the scores are not those of classes.
            FcvggError: if the plain network was released.
            ImageError: if there is no image, one cannot be used, or no cell has data.
        """
        plain = self.plain
        for activation in plain._activations:
            require_probabilities(activation)
        samples = [image.to(self._like) for image in sample_images(plain, images, "images")]
        expected = expected_maps(plain, samples, "images")
        got = [flattened(self(image))[0] for image in samples]
        made = self.optimization
        layers = made.layers if made.dtype == torch.int8 else 0
        return agreement_of(expected, got, plain._activations, layers, made.in_float)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Any:
        """Score maps ``(N, K, h, w)`` of preprocessed images ``(N, C, H, W)``."""
        self._check_images(images)
        if not images.is_floating_point():
            self._check_dtype(images)
        images = self._padded(images)
        if self._blockwise is None and isinstance(self.network, fx.GraphModule):
            self._blockwise = BlockwiseGraph(self.network)
        # run_with_missing sums the cast images at once, while they are still in the cache
        maps = run_with_missing(
            self._cast(images), lambda x: run(self.network, x, self._blockwise), self.readers
        )
        if isinstance(maps, Tensor):
            return self._in_form(maps.to(images.dtype))
        return self._in_form(tuple(scores.to(images.dtype) for scores in maps))

    def readers(self, output: int = 0) -> list[Reader]:
        """What each operation of the plain network reads, whatever engine runs here."""
        return self._readers[output]

    def _cast(self, images: Tensor) -> Tensor:
        """The images in the memory format and dtype that the network computes in.

        Two copies, since torch changes both at once pixel by pixel, three times as slowly.
        """
        channels_last = images.is_cuda or self.compute_dtype in CHANNELS_LAST
        if self.optimization.engine == "torch" and channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images.to(self.compute_dtype)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the images that the network takes; other engines always take float32."""
        engine = self.optimization.engine != "torch"
        return torch.float32 if engine else self.optimization.dtype

    @property
    def layers(self) -> Any:
        """The graph whose layers `fcvgg.stream` runs over strips of an image.

        Raises:
            ArgumentError: if the network runs in another engine.
        """
        if self.optimization.engine != "torch":
            raise ArgumentError(
                f"net must run in torch to be streamed, got engine={self.optimization.engine!r}, "
                "which runs whole images only; stream the plain network (net.plain), or one "
                "optimised with neither engine= nor dtype=torch.int8"
            )
        return self.network

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The plain network's."""
        return self.plain.state_dict(*args, **kwargs)

    def classifier_state_dict(self) -> dict[str, Tensor]:
        """The plain network's."""
        return self.plain.classifier_state_dict()

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise FcvggError(_FIXED.format("load into"))

    def train(self, mode: bool = True) -> OptimizedNetwork:
        if mode:
            raise FcvggError(_FIXED.format("train"))
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedNetwork:
        """Refuse to move or cast; calls that change neither device nor dtype are allowed."""
        moved = fn(self._like)
        if (moved.device, moved.dtype) != (self._like.device, self._like.dtype):
            raise FcvggError(_FIXED.format("move or cast"))
        return self

    def save(self, path: str | Path, **options: Any) -> Path:
        """Write the plain network's bundle; call `fcvgg.optimize` again after loading it."""
        return self.plain.save(path, **options)

    def export(self, path: str | Path, **options: Any) -> ExportedFile:
        """Write the plain network for other runtimes.

        Raises:
            FcvggError: in int8, since the file would be in float32.
        """
        if self.optimization.dtype == torch.int8:
            raise FcvggError(
                "an int8 network cannot be exported, the file would be in float32; export the "
                "plain network (net.plain.export) if that is meant"
            )
        return self.plain.export(path, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.optimization}"


_FIXED = "an optimised network only evaluates; {} the plain network (net.plain) and optimise that"


def optimize(
    net: FullyConvolutional,
    *,
    dtype: torch.dtype | None = None,
    size: int | Iterable[int] | None = None,
    engine: str | None = None,
    calibrate: Any = None,
    least_agreement: float | None = LEAST_AGREEMENT,
) -> OptimizedNetwork:
    """A copy of a converted network for evaluation, as fast as the machine allows.

    Batch norm is folded into the layer before it, bias and ReLU are computed in one call with it,
    and dropout is gone. On a CPU the weights are ordered once as oneDNN computes with them, wide
    3x3 convolutions and fc6 run by Winograd's algorithm (https://arxiv.org/abs/1509.09308) for maps
    for which that is faster, and the first layers run in strips that stay in the cache. From which
    size on it is faster is measured for each kind of layer, once in a process: 1 to 2 s for a
    VGG-16, in which torch's number of threads is 1 for all. The process then keeps up to 256 MB of
    freed memory for the next maps, unless ``MALLOC_*`` variables say otherwise. On a GPU the
    channels come last in memory. The copy keeps the methods, geometry and preprocessing of `net`;
    its `equivalence` compares it with `net`.

    The copy takes memory of its own: for a VGG-16 in float32 553 MB of weights in oneDNN's order
    and 767 MB of Winograd's, 537 of them for fc6; in bfloat16 277 MB, and 205 more where fc6 gets a
    second form for `size` (``optimized.optimization.packed_bytes``). It also keeps `net`, for
    checkpoints, until `OptimizedNetwork.release`.

    Args:
        net: what `fcvgg.convert` gave. It is left as it is.
        dtype: of the arithmetic: ``torch.float32``, ``torch.bfloat16`` on a processor that has it,
            ``torch.float16`` on a GPU, or ``torch.float64`` of a network in it; or ``torch.int8``,
            which OpenVINO computes (``pip install 'fcvgg[quantize]'``), fast on processors with
            VNNI or AMX. The net's own when None.
        size: the images' usual size, an int or ``(h, w)``. In float32, of the two forms of a wide
            layer's weights only the one that is faster at that size is kept; None keeps both, for
            all sizes. In bfloat16 on a processor with AMX, a wide fc6 gets a second form for images
            of that size with 32 cells and more, a tenth to a quarter faster for one image, or for
            several of 256 cells and more. Any size runs in either case. In torch only: other
            engines and int8 do not use it.
        engine: ``"onnxruntime"`` or ``"openvino"`` to run there, by `net.export`; None is torch,
            and in int8 OpenVINO.
        calibrate: for int8, images as for ``net.classify``, such as the network will see: the
            ranges of all maps are learnt from them. At most 64 are used, evenly spread over more,
            of each at most half a million pixels in the middle. The layers that suffer most stay
            in float32 where `least_agreement` needs it. A VGG-16 takes 25 s of one thread, and for
            images of half a million pixels 2.4 s for each pass in which ranges are learnt, of which
            an image gets seven and all together get 64 or fewer, and 2.4 s more for each image to
            compare the two networks; up to 25 s more to find the layers that stay in float32.
        least_agreement: for int8, the share of the cells of `calibrate` that must keep their top
            class (`OptimizedNetwork.agreement`), of the worst output, 0.97 unless said otherwise;
            None takes any, and leaves no layer in float32.

    Raises:
        ArgumentError: if an option is unknown, or the processor cannot compute in `dtype`.
        EquivalenceError: if the copy differs from `net` by more than its tolerance: 1e-4 of the
            largest score in float32, 5e-2 in bfloat16; in int8, if too few cells keep their top
            class with up to half of the layers, or the only one, in float32.
        ImageError: if an image of `calibrate` cannot be used.
        MissingExtraError: if the engine is not installed.
    """
    _check_network(net)
    size = None if size is None else checked_size(size)
    dtype = dtype_of(net) if dtype is None else dtype
    _check_options(dtype, device_of(net), engine)
    _check_calibration(net, dtype, calibrate, least_agreement)
    if dtype == torch.float64 and dtype_of(net) != dtype:
        raise ArgumentError(
            f"dtype must not be wider than the network's {dtype_of(net)}, got {dtype}; leave it "
            "out, or convert the model in float64"
        )
    if dtype == torch.int8:
        return _in_int8(net, calibrate, least_agreement)
    if engine is not None and engine != "torch":
        fast = OptimizedNetwork(
            net, engine_network(net, engine, dtype), Optimization(engine, dtype)
        )
        return _checked(net, fast)
    if device_of(net).type == "cpu":
        keep_freed_maps()
    fast = _fused(net, dtype, size, winograd=True)
    try:
        return _checked(net, fast)
    except EquivalenceError:
        if not fast.optimization.winograd:
            raise
        return _checked(net, _fused(net, dtype, size, winograd=False))


def _in_int8(
    net: FullyConvolutional, calibrate: Any, least_agreement: float | None
) -> OptimizedNetwork:
    network, agreement = quantized(net, calibrate, least_agreement)
    optimization = Optimization(
        "openvino", torch.int8, layers=agreement.layers, in_float=agreement.in_float
    )
    fast = OptimizedNetwork(net, network, optimization)
    fast.agreement = agreement
    return fast


def _fused(
    net: FullyConvolutional, dtype: torch.dtype, size: Pair | None, winograd: bool
) -> OptimizedNetwork:
    packs = device_of(net).type == "cpu" and dtype in _PACKED and has_packing()

    def conv(layer: nn.Conv2d, weight: Tensor, bias: Tensor, relu: bool) -> FusedConv2d:
        if packs:
            return PackedConv2d(layer, weight, bias, relu, winograd)
        return FusedConv2d(layer, weight, bias, relu)

    def linear(weight: Tensor, bias: Tensor, dilation: Pair, relu: bool) -> FusedWindowLinear:
        if packs:
            return PackedWindowLinear(weight, bias, dilation, relu, winograd)
        return FusedWindowLinear(weight, bias, dilation, relu)

    network = fused(net.network, dtype, conv, linear)
    if size is not None and packs:
        _specialise(net, network, size)
    layers = [m for m in network.modules() if isinstance(m, FusedLayer)]
    optimization = Optimization(
        engine="torch",
        dtype=dtype,
        layers=len(layers),
        winograd=sum(isinstance(m, Packed) and m.has_winograd for m in layers),
        packed_bytes=sum(m.held_bytes() for m in layers),
    )
    return OptimizedNetwork(net, network, optimization)


@torch.no_grad()
def _specialise(net: FullyConvolutional, network: nn.Module, size: Pair) -> None:
    """Let every packed layer keep only the weights that images of `size` need.

    The network runs once on noise of that size, and each layer decides by the map that it is given.
    """
    size = tuple(max(n, w) for n, w in zip(size, net.geometry.window))  # type: ignore[assignment]
    layers = [m for m in network.modules() if isinstance(m, Packed)]
    handles = [m.register_forward_pre_hook(lambda m, args: m.specialise(args[0])) for m in layers]
    noise = torch.rand(1, net.in_channels, *size, generator=torch.Generator().manual_seed(0))
    try:
        network(noise.to(layers[0].dtype) if layers else noise)
    finally:
        for handle in handles:
            handle.remove()


def _checked(net: FullyConvolutional, fast: OptimizedNetwork) -> OptimizedNetwork:
    """The optimised network, with the report that compares it with the plain one.

    Raises:
        EquivalenceError: if they differ by more than the tolerance of the dtype.
    """
    report = verify(_CentreScores(net), fast, tolerance=TOLERANCES[fast.optimization.dtype])
    if not report.passed:
        raise EquivalenceError(
            f"the optimised network differs from the plain one by {report.max_rel_error:.1e} of "
            f"the largest score, more than {report.tolerance:.0e}; optimise in a wider dtype, or "
            "use the plain network"
        )
    fast.equivalence = report
    return fast


class _CentreScores(nn.Module):
    """The plain network as a model that gives vectors of scores at the native size."""

    def __init__(self, net: FullyConvolutional):
        super().__init__()
        self.training = False  # evaluates like an optimised network, whatever the net's mode
        self.net = net

    def forward(self, images: Tensor) -> Any:
        maps = self.net(images.to(dtype_of(self.net)))
        return flattened(maps)[1].filled(self.net.native_scores(maps))


def _check_network(net: Any) -> None:
    if isinstance(net, OptimizedNetwork):
        raise ArgumentError(
            "net must be a plain network, got one that is optimised already; pass the one it was "
            "made from"
        )
    if not isinstance(net, FullyConvolutional):
        raise ArgumentError(
            f"net must be a converted network, got {type(net).__name__}; pass fcvgg.convert(model)"
        )


def _check_options(dtype: Any, device: torch.device, engine: str | None) -> None:
    check_choice("engine", engine, (None, "torch", *ENGINES))
    check_choice("dtype", dtype, (*TOLERANCES, torch.int8))
    if dtype == torch.int8 and engine not in (None, "openvino"):
        raise ArgumentError(
            f"engine must be 'openvino' or None with dtype=torch.int8, got {engine!r}; leave it out"
        )
    if engine in ENGINES and (device.type != "cpu" or dtype == torch.float64):
        raise ArgumentError(
            f"engine={engine!r} runs float32 networks on the CPU, got {dtype} on {device}; move "
            "the network with net.cpu().float(), or leave engine out"
        )
    if device.type != "cpu":
        return
    if dtype == torch.float16:
        raise ArgumentError(
            "dtype must not be torch.float16 on a CPU, which computes slowly in it; use "
            "torch.bfloat16, or move the network to a GPU"
        )
    if dtype == torch.bfloat16 and not has_bfloat16():
        raise ArgumentError(
            "dtype must not be torch.bfloat16 on this processor, which has neither AMX nor AVX-512 "
            "BF16 (or oneDNN may not use them) and would be slower; use dtype=torch.float32"
        )
    if engine == "onnxruntime" and dtype != torch.float32:
        raise ArgumentError(
            f"dtype must be torch.float32 or None with engine='onnxruntime', got {dtype}"
        )


def _check_calibration(
    net: FullyConvolutional, dtype: torch.dtype, calibrate: Any, least_agreement: float | None
) -> None:
    if dtype != torch.int8:
        if calibrate is not None:
            raise ArgumentError(
                f"calibrate must be None with dtype={dtype}, got {type(calibrate).__name__}; it is "
                "for dtype=torch.int8"
            )
        if least_agreement != LEAST_AGREEMENT:
            raise ArgumentError(
                f"least_agreement must be left out with dtype={dtype}, got {least_agreement!r}; it "
                "is for dtype=torch.int8"
            )
        return
    if calibrate is None:
        raise ArgumentError(
            "calibrate must be images with dtype=torch.int8, got None; pass some such as the "
            "network will see, a folder of them for example"
        )
    if least_agreement is not None:
        check_share("least_agreement", least_agreement)
    if device_of(net).type != "cpu" or dtype_of(net) != torch.float32:
        raise ArgumentError(
            "net must be in float32 on the CPU with dtype=torch.int8, got one in "
            f"{dtype_of(net)} on {device_of(net)}; move it with net.cpu().float()"
        )
    for activation in net._activations:
        require_probabilities(activation)
