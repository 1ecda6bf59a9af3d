"""`VGGFeatures`: a layer's features for scikit-learn (extra ``sklearn``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from fcvgg.choices import Pooling
from fcvgg.errors import ArgumentError, ImageError, MissingExtraError
from fcvgg.images.preprocessing import PreprocessLike
from fcvgg.transfer.image_features import FeatureExtractor

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as _error:
    raise MissingExtraError(
        f"VGGFeatures needs scikit-learn 1.6 or later, which cannot be imported ({_error}); "
        "install it with: pip install 'fcvgg[sklearn]'"
    ) from _error


class VGGFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """A transformer of images to the features of a network's layer.

    ``make_pipeline(VGGFeatures("vgg16", "pool4"), StandardScaler(), LinearSVC())``

    It learns nothing: `fit` only reads the network and looks at the first image.

    Args:
        model: a converted network, any other model with `preprocess`, or a name or file for
            `fcvgg.load`. Clones share it.
        layer: a name as for `fcvgg.features_upto`.
        pooling: ``"avg"`` or ``"max"`` over the map's positions; None keeps them all, for images of
            one size.
        size: None keeps an image's size; an int is its smaller side, ``(h, w)`` its size.
        preprocess: how images become input; the network's own when None.
        image_shape: for X as a table, the ``(H, W)`` or ``(H, W, C)`` of the image that a row
            holds; one of them may be -1, as in `numpy.reshape`.
        value_range: the values ``(black, white)`` of numbers that are not ``uint8``.
        batch_size: images of one size that run at once.
        cache: None, ``"memory"`` (shared in the process) or a folder. The key is the preprocessed
            image, the layers' weights and the settings, so that nothing stale is found.
        progress: show a bar on stderr.
        device: where to run; where the model is when None.

    X is a sequence of images, each a path, a PIL image, a ``uint8`` array or a preprocessed tensor;
    an array ``(n, H, W)`` or ``(n, H, W, C)``; a tensor ``(n, C, H, W)``, taken as preprocessed; or
    a table ``(n, features)`` with `image_shape`.
    """

    def __init__(
        self,
        model: nn.Module | str | Path = "vgg16",
        layer: str = "pool5",
        pooling: Pooling | None = "avg",
        *,
        size: int | Iterable[int] | None = None,
        preprocess: PreprocessLike | None = None,
        image_shape: tuple[int, ...] | None = None,
        value_range: tuple[float, float] | None = None,
        batch_size: int = 16,
        cache: str | Path | None = None,
        progress: bool = False,
        device: str | torch.device | None = None,
    ):
        self.model = model
        self.layer = layer
        self.pooling = pooling
        self.size = size
        self.preprocess = preprocess
        self.image_shape = image_shape
        self.value_range = value_range
        self.batch_size = batch_size
        self.cache = cache
        self.progress = progress
        self.device = device

    def fit(self, X: Any, y: Any = None) -> VGGFeatures:  # noqa: N803
        """Read the network, and see from the first image how many features there are."""
        images = self._images(X, reset=True)
        options = self.get_params(deep=False)
        model, layer = options.pop("model"), options.pop("layer")
        del options["image_shape"], options["progress"]  # of X, and of `transform`
        self.extractor_ = FeatureExtractor(model, (layer,), **options)
        first = self.extractor_.rows(images[:1])[self.layer]
        self.n_features_out_ = first.shape[1]
        return self

    def transform(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The features ``(n, n_features_out_)`` of images, float32."""
        check_is_fitted(self)
        self.extractor_.progress = self.progress
        rows = self.extractor_.rows(self._images(X, reset=False))[self.layer]
        if rows.shape[1] != self.n_features_out_:
            raise ImageError(
                f"the images give {rows.shape[1]} features with pooling=None, but the one seen in "
                f"fit gave {self.n_features_out_}; pass size=(h, w), or pooling='avg'"
            )
        return rows

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[Any]:
        """``pool5_0``, ``pool5_1``, ..."""
        check_is_fitted(self)
        return np.array([f"{self.layer}_{i}" for i in range(self.n_features_out_)], dtype=object)

    def __sklearn_clone__(self) -> VGGFeatures:
        """Unfitted, with the same parameters; the network is shared, since nothing changes it."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def _images(self, X: Any, reset: bool) -> list[Any]:  # noqa: N803
        """One image after the other, of whatever X is."""
        if isinstance(X, (str, Path, Image.Image)):
            raise ImageError(
                f"X must be a sequence of images, got one {type(X).__name__}; pass [X]"
            )
        if isinstance(X, Tensor) and X.ndim == 4:
            return list(X)
        if isinstance(X, np.ndarray) and (X.ndim in (3, 4) or X.dtype.kind in "US"):
            return list(X)
        if isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.dtype == object):
            if not len(X):
                raise ImageError("X must hold at least one image, got none")
            first = X[0]
            if isinstance(first, (str, Path, Image.Image)) or getattr(first, "ndim", 0) >= 2:
                return list(X)
        table = validate_data(self, X, reset=reset, dtype=None if _is_bytes(X) else "numeric")
        return [self._image_of(row) for row in table]

    def _image_of(self, row: NDArray[Any]) -> NDArray[Any]:
        if self.image_shape is None:
            raise ArgumentError(
                f"X must hold images, got a table of {len(row)} numbers per image; pass "
                "image_shape=(H, W) or (H, W, C)"
            )
        try:
            return row.reshape(self.image_shape)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"image_shape must hold the {len(row)} numbers of a row of X, got "
                f"{self.image_shape!r}"
            ) from error


def _is_bytes(X: Any) -> bool:  # noqa: N803
    return getattr(X, "dtype", None) == np.uint8
