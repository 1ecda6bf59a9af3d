"""A score map on disk as a cloud-optimised GeoTIFF, which geographic systems lay on its scene."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fcvgg.categories import class_name
from fcvgg.errors import FcvggError, ImageError, one_line
from fcvgg.streaming.slide_maps import row_ranges
from fcvgg.support.atomic import atomic_file, checked_file
from fcvgg.support.extras import imported

if TYPE_CHECKING:
    from fcvgg.streaming.score_store import ScoreStore

TILE = 512
"""Rows and columns of a tile; larger maps have overviews."""

_OVERVIEWS = {"scores": "AVERAGE", "argmax": "MODE", "top5": "NEAREST"}


def save_geotiff(store: ScoreStore, path: str | Path) -> Path:
    """Write a map with a band for each class, as `ScoreStore.save` describes it."""
    path = checked_file(path, "path", (".tif", ".tiff"))
    if not store.complete:
        raise FcvggError(f"{store.path} is not finished; repeat the call that began it")
    transform, kind = store.description.get("cell_transform"), store.description["kind"]
    if transform is None:
        raise ImageError(
            f"{store.path} must be the map of a georeferenced image to become a GeoTIFF, got one "
            "without a place; SlideMap(store).save_pyramid(path) writes a pyramid for slides"
        )
    rasterio, shutil = imported("rasterio", "geo"), imported("rasterio.shutil", "geo")
    *lead, height, width = store.array.shape
    dtype, nodata = store.array.dtype, float("nan")
    if kind == "argmax":  # the narrowest that geographic systems know, of the ones that hold -1
        count = store.description.get("num_classes", 1 << 24)
        dtype, nodata = np.dtype(np.int16 if count < 1 << 15 else np.int32), -1
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": int(np.prod(lead, dtype=int)),
        "dtype": dtype.name,
        "nodata": nodata,
        "crs": store.description.get("crs"),
        "transform": rasterio.Affine(*transform),
        "interleave": "band",  # rows of one band follow each other, as they are written
        "BIGTIFF": "IF_SAFER",
    }
    options = {
        "BLOCKSIZE": TILE,
        "COMPRESS": "DEFLATE",
        "BIGTIFF": "IF_SAFER",
        "OVERVIEW_RESAMPLING": _OVERVIEWS[kind],
    }
    try:
        with atomic_file(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # GDAL makes cloud-optimised files of finished ones only
            plain = Path(folder) / "plain.tif"
            with store.reading(), rasterio.open(plain, "w", **profile) as file:
                file.descriptions = _band_names(store)
                for rows in row_ranges(store):
                    part = store.array[..., rows, :].reshape(-1, rows.stop - rows.start, width)
                    window = rasterio.windows.Window(0, rows.start, width, rows.stop - rows.start)
                    file.write(part.astype(dtype, copy=False), window=window)
            shutil.copy(plain, temporary, driver="COG", **options)
    except rasterio.errors.RasterioError as error:
        raise FcvggError(f"{path} cannot be written: {one_line(error)}") from error
    return path


def _band_names(store: ScoreStore) -> tuple[str, ...]:
    """What every band holds."""
    description: dict[str, Any] = dict(store.description)
    if description["kind"] == "argmax":
        return ("class",)
    if description["kind"] == "top5":
        ranks = range(1, store.array.shape[1] + 1)
        return tuple(f"{what} {rank}" for what in ("class", "score") for rank in ranks)
    names = description["categories"]
    if names is not None:
        return tuple(names)
    return tuple(class_name(index, None) for index in description["classes"])
