"""The registry: what every known layer and function becomes in a fully convolutional network.

A rule receives the `fcvgg.rewriting.rewriter.Rewriter`, the `fcvgg.rewriting.rewriter.Call` in the
source, and the call's arguments, bound to the names that torch gives them. Rules of one kind share
a helper, so a
new layer is often one line:

- `elementwise.pointwise` registers what acts on each element by itself,
- `reshaping.moves` what only moves elements,
- a `registry.rule` in `convolution` states the windows of what slides a kernel,
- rules in `pooling`, `channels` and `fully_connected` treat what reduces positions, what works
  along the channels, and the head,
- `refused` names what would not stay exact, and why.

What is in no table is refused by name too.
"""

from fcvgg.rewriting.rules import (
    channels,
    convolution,
    elementwise,
    fully_connected,
    pooling,
    refused,
    reshaping,
)
from fcvgg.rewriting.rules.elementwise import pointwise
from fcvgg.rewriting.rules.registry import attributes, is_known, kind_for, rule
from fcvgg.rewriting.rules.reshaping import moves

__all__ = ["attributes", "is_known", "kind_for", "moves", "pointwise", "rule"]

_RULES_LOADED = (channels, elementwise, fully_connected, pooling, refused, reshaping, convolution)
