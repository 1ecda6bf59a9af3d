"""Dense training: a converted classifier that labels every pixel, and image and mask folders.

- `network`: `FCN`, on the maps that `backbone` finds, with `upsampling` whose phase geometry gives,
  and its folder,
- `fcvgg.results.label_map`: its predictions and their figures,
- `mask_folders`, `module` and `training`: images with masks, the Lightning module, and `train_fcn`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
