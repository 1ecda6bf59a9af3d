"""Dense training: a converted classifier that labels every pixel, and image and mask folders.

- `network`: `FCN`, on the maps that `backbone` finds and with `upsampling` in the phase that
  geometry asks for, and as a folder,
- `fcvgg.results.label_map`: what it predicts, and how that is shown,
- `mask_folders` and `training`: images with masks, and `train_fcn`.
"""
