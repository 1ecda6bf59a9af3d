"""What is known of every layer kind, first of all its rule: what it becomes on maps.

A rule gets the `fcvgg.rewriting.map_builder.MapBuilder`, the `fcvgg.rewriting.emission.Call` in the
source, and the arguments of the call by the names that torch gives them. A module passes its
attributes as those arguments, so that both forms of a layer share one rule. `registry.LayerKind`
lists all that one registration may state: how the layer slides over strips of a map, whether it
works on each position or element by itself, its role, whether a bundle may hold it.

A layer that acts on each element takes one line: ``pointwise(Swish, swish)``. One that slides a
kernel takes ten, here the two forms of torch's power-average pool::

    def slide_lp_pool2d(norm_type, kernel_size, stride=None, ceil_mode=False):
        windows = windows_of(kernel_size, stride)  # ceil_mode is refused, as it changes the size
        return Sliding(windows, lambda x, part: F.lp_pool2d(x, norm_type, kernel_size, stride))

    lp_settings = attributes("norm_type", "kernel_size", "stride", "ceil_mode")

    @rule(nn.LPPool2d, F.lp_pool2d, arguments=lp_settings, slides=slide_lp_pool2d, role="pool")
    def lp_pool2d(build, call, x, norm_type, kernel_size, stride=None, ceil_mode=False):
        windows = windows_of(kernel_size, stride)
        return build.window(call, build.as_map(x, call), windows, pools="other")

The package's own kinds stand in one file a family: `elementwise`, `channels` (normalisation,
softmax), `reductions` (means, norms and ranks of channels or of a window), `joining`
(concatenation, stacks), `convolution`, `pooling`, `fully_connected` and `products` (with
parameters), `reshaping` (what only moves elements), `patches` (blocks of positions that become
channels), `resizing` (what enlarges or shrinks a map), and `refused` (what would not stay exact,
and why). What is in none is refused by name.
"""

from fcvgg.rewriting.modules import TrainingFlag, cut_to
from fcvgg.rewriting.rules import (
    channels,
    convolution,
    elementwise,
    fully_connected,
    joining,
    patches,
    pooling,
    products,
    reductions,
    refused,
    reshaping,
    resizing,
)
from fcvgg.rewriting.rules.elementwise import pointwise
from fcvgg.rewriting.rules.registry import KINDS, attributes, is_known, kind_for, register, rule
from fcvgg.rewriting.rules.reshaping import moves
from fcvgg.rewriting.sliding import Sliding, windows_of

__all__ = [
    "Sliding",
    "attributes",
    "is_known",
    "kind_for",
    "moves",
    "pointwise",
    "register",
    "rule",
    "windows_of",
]

_RULES_LOADED = (
    *(channels, convolution, elementwise, fully_connected, joining, patches, pooling),
    *(products, reductions, refused, reshaping, resizing),
)

register(TrainingFlag)
register(cut_to, positional=True)  # which the rewriter itself emits where branches join
register(*KINDS, in_bundle=True)  # the package's own kinds, not what users register later
