"""Fuse the layers of a converted network: batch norm folded, bias and ReLU in one call.

`fused` reads the network's graph and builds another one; the network is left alone. An unknown
layer is copied and called as it is.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fcvgg.optimization.fused import FusedConv2d, FusedWindowLinear, HalvingMaxPool2d
from fcvgg.rewriting.modules import TrainingFlag, WindowLinear
from fcvgg.rewriting.program import graph_module
from fcvgg.rewriting.rules.registry import is_relu, kind_of

MakeConv = Callable[[nn.Conv2d, Tensor, Tensor, bool], FusedConv2d]
MakeLinear = Callable[[Tensor, Tensor, tuple[int, int], bool], FusedWindowLinear]


def fused(
    network: fx.GraphModule, dtype: torch.dtype, make_conv: MakeConv, make_linear: MakeLinear
) -> fx.GraphModule:
    """The network for evaluation, with layers of `fcvgg.optimization.fused`.

    Args:
        network: of a `FullyConvolutional`.
        dtype: of the arithmetic; all layers are copied in it.
        make_conv: makes a fused convolution.
        make_linear: makes a fused fully connected layer.
    """
    return _Fusion(network, dtype, make_conv, make_linear).run()


class _Fusion:
    def __init__(
        self,
        network: fx.GraphModule,
        dtype: torch.dtype,
        make_conv: MakeConv,
        make_linear: MakeLinear,
    ):
        self._network = network
        self._dtype = dtype
        self._make_conv = make_conv
        self._make_linear = make_linear
        self._modules = nn.Module()
        self._graph = fx.Graph()
        self._made: dict[fx.Node, fx.Node] = {}
        self._names: dict[Any, str] = {}

    def run(self) -> fx.GraphModule:
        for node in self._network.graph.nodes:
            if node not in self._made:
                self._add(node)
        self._graph.lint()
        return graph_module(self._modules.eval(), self._graph)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._network.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _add(self, node: fx.Node) -> None:
        module = self._module(node)
        kind = kind_of(node, module)
        if module is not None and kind is not None and kind.inert:
            self._made[node] = self._made[node.all_input_nodes[0]]
        elif isinstance(module, TrainingFlag):
            self._made[node] = self._call(node, "off", TrainingFlag)
        elif isinstance(module, nn.Conv2d) and _is_plain(module):
            self._add_layer(node, module)
        elif module is not None:
            self._made[node] = self._call(node, node.target, lambda: self._copied(node, module))
        else:
            if node.op == "get_attr":
                self._keep_tensor(str(node.target))
            self._made[node] = self._graph.node_copy(node, self._made.__getitem__)

    def _add_layer(self, node: fx.Node, layer: nn.Conv2d) -> None:
        """A convolution or fully connected layer, with the batch norm and the ReLU after it.

        Both are taken in only where nothing else reads the map between.
        """
        chain, norm, relu = [node], None, False
        following = self._only_user(node)
        if following is not None and type(self._module(following)) is nn.BatchNorm2d:
            norm = self._module(following)
            chain.append(following)
            following = self._only_user(following)
        if following is not None and is_relu(following, self._module(following)):
            relu = True
            chain.append(following)
        made = self._call(node, (id(layer), id(norm), relu), lambda: self._layer(layer, norm, relu))
        self._made.update(dict.fromkeys(chain, made))

    def _layer(self, layer: nn.Conv2d, norm: Any, relu: bool) -> nn.Module:
        weight = layer.weight.detach()
        bias = None if layer.bias is None else layer.bias.detach()
        if norm is not None:
            weight, bias = _folded(weight, bias, norm)
        weight = weight.to(self._dtype)
        zero = weight.new_zeros(len(weight))
        bias = zero if bias is None else bias.to(self._dtype)
        if isinstance(layer, WindowLinear):
            dilation = (layer.dilation[0], layer.dilation[1])
            return self._make_linear(weight, bias, dilation, relu)
        return self._make_conv(layer, weight, bias, relu)

    def _call(self, node: fx.Node, key: Any, make: Callable[[], nn.Module]) -> fx.Node:
        """A call of a module, which is made once for all nodes of one key."""
        if key not in self._names:
            self._names[key] = str(node.target).replace(".", "_")
            if hasattr(self._modules, self._names[key]):
                self._names[key] += f"_{len(self._names)}"
            self._modules.add_module(self._names[key], make())
        args = fx.node.map_arg(node.args, self._made.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._made.__getitem__)
        return self._graph.call_module(self._names[key], args, kwargs)

    def _copied(self, node: fx.Node, module: nn.Module) -> nn.Module:
        if self._dtype == torch.bfloat16 and _halves(module):
            calls = [n for n in self._network.graph.nodes if n.target == node.target]
            fed = [n.all_input_nodes[0] for n in calls]
            return HalvingMaxPool2d(positive=all(is_relu(n, self._module(n)) for n in fed))
        return copy.deepcopy(module).to(self._dtype).requires_grad_(False)

    def _keep_tensor(self, path: str) -> None:
        """Keep a tensor that the graph reads, in a tree of plain modules under the same path."""
        value: Tensor = operator.attrgetter(path)(self._network).detach()
        owner, (*parents, name) = self._modules, path.split(".")
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        if name not in owner._buffers:
            floating = value.is_floating_point()
            owner.register_buffer(name, value.to(self._dtype) if floating else value)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None


def _halves(module: nn.Module) -> bool:
    """Whether a module is the max pool of 2x2 with stride 2."""
    settings = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    values = [getattr(module, name, None) for name in settings]
    two, one, zero = (2, (2, 2)), (1, (1, 1)), (0, (0, 0))
    expected = (two, two, zero, one, (False,), (False,))
    return type(module) is nn.MaxPool2d and all(v in e for v, e in zip(values, expected))


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether a layer is a usual one: no hooks, no computed weights, padding with zeros."""
    if type(layer) not in (nn.Conv2d, WindowLinear):
        return False
    regular = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return regular and not hooked and not nn.utils.parametrize.is_parametrized(layer)


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias that include the batch norm after the layer, computed in float64."""
    mean, var, scale, shift = (
        None if t is None else t.detach().double()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    wide = None if bias is None else bias.double()
    folded = fuse_conv_bn_weights(weight.double(), wide, mean, var, norm.eps, scale, shift)  # type: ignore[arg-type]
    return folded[0].detach(), folded[1].detach()
