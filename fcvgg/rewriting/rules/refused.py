"""Layers known to break the equivalence, each with its reason."""

from __future__ import annotations

import torch
from torch import nn
from torchvision.ops import SqueezeExcitation

from fcvgg.rewriting.rules.registry import ATTENTION, STATISTICS, calling, refuse

refuse(
    STATISTICS,
    *(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d),
    *calling("group_norm", "instance_norm"),
)
refuse(
    ATTENTION,
    *(nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder),
    *calling("scaled_dot_product_attention"),
)
refuse(
    "squeeze-and-excitation pools over all positions, so a cell would change with the rest of the "
    "image",
    SqueezeExcitation,
)
refuse(
    "a grid of points that is computed from the image moves positions, so a cell would not stay in "
    "its place",
    *calling("grid_sample"),
)
refuse(
    "a Fourier transform mixes all positions, so a cell would change with the rest of the image",
    *(getattr(torch.fft, name) for name in ("fft", "fft2", "fftn", "rfft", "rfft2", "rfftn")),
)
refuse(
    "the scores of all classes must come out, not a choice among them",
    *calling("argmax", "argsort"),
)
refuse(
    "shuffling or rolling positions moves a cell away from its place in the image",
    *calling("roll"),
    nn.Fold,
)
refuse(
    "a recurrent layer runs over the positions, so a cell would change with the rest of the image",
    *(nn.RNN, nn.LSTM, nn.GRU),
)
