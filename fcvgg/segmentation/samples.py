"""Images and masks as tensors, cropped and mirrored together."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fcvgg.geometry import Pair
from fcvgg.images import prepare
from fcvgg.placement import dtype_of
from fcvgg.preprocessing import Preprocess
from fcvgg.segmentation.label_map import IGNORE_INDEX
from fcvgg.segmentation.mask_folders import MaskFolder
from fcvgg.segmentation.network import FCN


class MaskedImages(Dataset[tuple[Tensor, Tensor]]):
    """Preprocessed images ``(C, H, W)`` and their masks, int64 ``(H, W)``.

    Args:
        data: the files.
        fcn: for its dtype and its preprocessing, of which the resizing is left out.
        crop: the size of a random part; None for whole images.
        flip: mirror images by chance, one in two.
    """

    def __init__(
        self, data: MaskFolder, fcn: FCN, crop: Pair | None = None, flip: bool = False
    ) -> None:
        assert fcn.preprocess is not None
        self.data = data
        self.crop = crop
        self.channels = fcn.backbone.in_channels
        self.dtype = dtype_of(fcn)
        self.preprocess: Preprocess = replace(fcn.preprocess, resize=None)
        steps: list[v2.Transform] = []
        if crop is not None:
            fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
            steps.append(v2.RandomCrop(crop, pad_if_needed=True, fill=fill))
        if flip:
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(steps) if steps else None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        pixels = self._pixels(index)
        labels = torch.from_numpy(self.data.labels(index))
        if self.transform is None:
            return pixels, labels
        image, mask = self.transform(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)

    def middles(self, count: int) -> Tensor:
        """The middles of the first images, without chance, ``(N, C, H, W)``.

        They have the size of the crop, or of the smallest image along each axis.
        """
        images = [self._pixels(i) for i in range(min(count, len(self)))]
        least = [min(image.shape[dim] for image in images) for dim in (1, 2)]
        size = least if self.crop is None else [min(pair) for pair in zip(least, self.crop)]
        return torch.stack([v2.functional.center_crop(image, size) for image in images])

    def _pixels(self, index: int) -> Tensor:
        prepared = prepare(self.data.images[index], self.preprocess, self.channels)
        return prepared.tensor(self.preprocess)[0].to(self.dtype)


def collated(items: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Batches of equal size: one, or several where the images differ."""
    by_size: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    for image, mask in items:
        by_size.setdefault(tuple(mask.shape), []).append((image, mask))
    return [
        (torch.stack([image for image, _ in same]), torch.stack([mask for _, mask in same]))
        for same in by_size.values()
    ]
