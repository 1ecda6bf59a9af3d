"""Cells of a score map as a cloud-optimised GeoTIFF, which geographic systems lay on its scene."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fcvgg.errors import FcvggError, ImageError, one_line
from fcvgg.images.lazy.georeference import Transform
from fcvgg.support.atomic import atomic_file, checked_file
from fcvgg.support.extras import imported

TILE = 512
"""Rows and columns of a tile; larger maps have overviews."""

ENDINGS = (".tif", ".tiff")


def save_cells(
    path: str | os.PathLike[str],
    parts: Iterable[NDArray[np.generic]],
    shape: tuple[int, int, int],
    dtype: DTypeLike,
    names: Sequence[str],
    transform: Transform | None,
    crs: str | None,
    overviews: str = "AVERAGE",
) -> Path:
    """Write bands of cells, of which those without data are NaN, or -1 of integers.

    Args:
        path: a name in ``.tif`` or ``.tiff``.
        parts: some rows of all bands at a time, ``(bands, rows, w)``, from top to bottom.
        shape: ``(bands, h, w)``.
        dtype: of the file.
        names: of the bands.
        transform: from cells to coordinates.
        crs: of those coordinates.
        overviews: how GDAL makes them.

    Raises:
        ArgumentError: if the name ends otherwise.
        ImageError: if there is no transform.
        FcvggError: if the file cannot be written.
    """
    path = checked_file(path, "path", ENDINGS)
    if transform is None:
        raise ImageError(
            "the score map must be of a georeferenced image to become a GeoTIFF, got one without a "
            "place; to_geojson gives polygons in pixels"
        )
    rasterio, shutil = imported("rasterio", "geo"), imported("rasterio.shutil", "geo")
    count, height, width = shape
    profile = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": count,
        "dtype": np.dtype(dtype).name,
        "nodata": -1 if np.dtype(dtype).kind == "i" else float("nan"),
        "crs": crs,
        "transform": rasterio.Affine(*transform),
        "interleave": "band",  # rows of one band follow each other, as they are written
        "BIGTIFF": "IF_SAFER",
    }
    options = {"BLOCKSIZE": TILE, "COMPRESS": "DEFLATE", "BIGTIFF": "IF_SAFER"}
    try:
        with atomic_file(path) as temporary, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            # GDAL makes cloud-optimised files of finished ones only
            plain, row = Path(folder) / "plain.tif", 0
            with rasterio.open(plain, "w", **profile) as file:
                file.descriptions = tuple(names)
                for part in parts:
                    window = rasterio.windows.Window(0, row, width, part.shape[1])
                    file.write(part.astype(dtype, copy=False), window=window)
                    row += part.shape[1]
            shutil.copy(plain, temporary, driver="COG", OVERVIEW_RESAMPLING=overviews, **options)
    except (rasterio.errors.RasterioError, rasterio.errors.CRSError) as error:
        raise FcvggError(f"{path} cannot be written: {one_line(error)}") from error
    return path
