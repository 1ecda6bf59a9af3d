"""Close relatives of refused architectures that convert, to be named where a model is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fcvgg.errors import RefusedLayerError

RELATIVES = {
    "BitForImageClassification": ("resnet50", "has batch norms"),
    "ByobNet": ("resnext26ts", "has no attention"),
    "ConvNeXt": ("convnext_atto", "has no global response normalisation"),
    "ConvNextV2ForImageClassification": ("convnext_atto", "has no global response normalisation"),
    "CspNet": ("cspdarknet53", "has no channel attention"),
    "EdgeNeXt": ("convnext_atto", "has no attention"),
    "EfficientNet": ("efficientnet_lite0", "has no squeeze-and-excitation"),
    "EfficientNetForImageClassification": ("efficientnet_lite0", "has no squeeze-and-excitation"),
    "HighPerfGpuNet": ("hgnetv2_b0", "has no channel attention"),
    "MetaFormer": ("convformer_s18", "normalises each position by itself"),
    "MobileNetV3": ("tf_mobilenetv3_small_minimal_100", "has no squeeze-and-excitation"),
    "MobileViT": ("mobilenetv2_050", "has no attention"),
    "MobileViTForImageClassification": ("mobilenetv2_050", "has no attention"),
    "NormFreeNet": ("nf_resnet26", "has no channel attention"),
    "PoolFormerForImageClassification": ("convformer_s18", "normalises each position by itself"),
    "PPLCNetForImageClassification": ("mobilenetv1_100", "has no squeeze-and-excitation"),
    "RegNet": ("regnetx_002", "has no squeeze-and-excitation"),
    "RegNetForImageClassification": ("regnetx_002", "has no squeeze-and-excitation"),
    "RepViT": ("repvgg_a0", "has no squeeze-and-excitation"),
    "ResNet": ("resnet50", "has batch norms and no attention"),
    "ResNetV2": ("resnetv2_50t", "has batch norms"),
    "RexNet": ("mobilenetv2_050", "has no squeeze-and-excitation"),
    "SENet": ("resnet50", "has no squeeze-and-excitation"),
    "SwinTransformer": ("convnext_tiny", "has its design, with convolutions for attention"),
    "SwinTransformerV2": ("convnext_tiny", "has its design, with convolutions for attention"),
    "VovNet": ("vovnet39a", "has no channel attention"),
}
"""From the class of a model to a model of timm's that converts, and what sets it apart.

Each was converted by examples/benchmarks/zoo.py.
"""


@contextmanager
def relative_named(model: nn.Module) -> Iterator[None]:
    """Add to the refusal of a layer which close relative of the model converts."""
    try:
        yield
    except RefusedLayerError as error:
        names = (type(module).__name__ for module in model.modules())
        relative = next((RELATIVES[name] for name in names if name in RELATIVES), None)
        if relative is None:
            raise
        name, why = relative
        raise type(error)(f"{error}; timm's {name}, which {why}, converts") from error
