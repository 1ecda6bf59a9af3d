"""Products of a value with parameters, as matrices or by einsum: fully connected layers too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from fcvgg.errors import UnsupportedLayerError
from fcvgg.rewriting.capture import BATCH
from fcvgg.rewriting.emission import Call, refuse_product
from fcvgg.rewriting.layouts import Cells, Constant
from fcvgg.rewriting.map_builder import MapBuilder
from fcvgg.rewriting.rules.elementwise import act_elementwise
from fcvgg.rewriting.rules.fully_connected import fully_connected
from fcvgg.rewriting.rules.reductions import reduced
from fcvgg.rewriting.rules.registry import attributes, calling, of_one_value, rule


@rule(*calling("matmul"), has_extent=True, affine=of_one_value)
def matmul(build: MapBuilder, call: Call, a: Any, b: Any) -> Cells:
    """``x @ W``, ``W @ x`` with any number of leading dimensions."""
    left, right = _ndim(a), _ndim(b)
    # as an einsum: the last two dimensions multiply as matrices, those before them go in pairs
    letters = "abcdefghijklmnopqrstuvw"[: max(left, right) - 2] if max(left, right) > 2 else ""

    def subscripts(ndim: int, own: str) -> str:
        return own[-ndim:] if ndim < 3 else letters[len(letters) - (ndim - 2) :] + own

    first = subscripts(left, "xy" if left > 1 else "y")
    second = subscripts(right, "yz" if right > 1 else "y")
    kept = ("x" if left > 1 else "") + ("z" if right > 1 else "")
    return _contracted(build, call, (a, b), (first, second), letters + kept)


@rule(*calling("einsum"), has_extent=True, affine=of_one_value)
def einsum(build: MapBuilder, call: Call, equation: str, *operands: Any) -> Cells:
    values = operands[0] if isinstance(operands[0], (list, tuple)) else operands
    equation = _written_out(equation.replace(" ", ""), values)
    given, _, result = equation.partition("->")
    terms = given.split(",")
    if len(terms) != len(values) or len(terms) > 2:
        raise UnsupportedLayerError(
            f"{call} computes {equation!r}; expected one or two terms written out, such as "
            "'bd,dk->bk'"
        )
    if len(terms) == 1:
        return _moved(build, call, values[0], terms[0], result)
    return _contracted(build, call, (values[0], values[1]), (terms[0], terms[1]), result)


def _written_out(equation: str, values: Sequence[Any]) -> str:
    """The equation with letters for an ellipsis, and with its result."""
    given, arrow, result = equation.partition("->")
    terms = given.split(",")
    hidden = [_ndim(x) - len(term) + 3 if "..." in term else 0 for x, term in zip(values, terms)]
    letters = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation][: max(hidden)]
    for i, count in enumerate(hidden):  # aligned from the right, as torch broadcasts
        terms[i] = terms[i].replace("...", "".join(letters[len(letters) - count :]))
    if not arrow:
        single = sorted(c for c in set(given) if c.isalpha() and given.count(c) == 1)
        result = "...".join(["", "".join(single)]) if letters else "".join(single)
    return f"{','.join(terms)}->{result.replace('...', ''.join(letters))}"


@rule(
    *(nn.Conv1d, *calling("conv1d")),
    arguments=attributes("weight", "bias", "stride", "padding", "dilation", "groups"),
    role="conv",
    affine=of_one_value,
)
def conv1d(
    build: MapBuilder,
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Cells:
    """A convolution of one position, over a row of positions or over features of length 1."""
    if call.module is not None:
        weight, bias = (build.parameter(call, name) for name in ("weight", "bias"))
    plain = stride in (1, (1,)) and padding in (0, (0,)) and groups == 1
    if not plain or weight.value.shape[2] != 1 or not isinstance(input, Cells):
        raise UnsupportedLayerError(
            f"{call} slides over flattened positions, which are no rows of an image; expected a "
            "kernel of 1"
        )
    flat = Constant(build.graph.call_method("flatten", (weight.node, 1)), weight.value.flatten(1))
    rows = replace(input, moved=input.layout.movedim(0, -1))  # (L, C)
    made = fully_connected(build, call, rows, flat, bias)
    return replace(made, moved=made.layout.movedim(-1, 0))


def _ndim(x: Any) -> int:
    return len(x.dims) + 1 if isinstance(x, Cells) else x.value.ndim


def _moved(build: MapBuilder, call: Call, x: Any, term: str, result: str) -> Cells:
    """An einsum of one term: it sums over what the result lacks, and moves the rest."""
    if not isinstance(x, Cells) or len(set(term)) != len(term):
        raise UnsupportedLayerError(f"{call} computes with {term!r}; expected a value of the image")
    lost = tuple(i for i, letter in enumerate(term) if letter not in result)
    summed = reduced(build, call, x, lost, False, "sum") if lost else x
    own = [c for c in term if c in result]
    batch = own.pop(summed.batch)
    order = [own.index(c) for c in result if c != batch]
    return replace(summed, moved=summed.layout.permute(order), batch=result.index(batch))


def _contracted(
    build: MapBuilder, call: Call, operands: tuple[Any, Any], terms: tuple[str, str], result: str
) -> Cells:
    """The sum of products over the letters that the result lacks, as a fully connected layer."""
    (x, constant), (own, other) = operands, terms
    if isinstance(x, Constant):
        x, constant, own, other = constant, x, other, own
    if isinstance(x, Cells) and isinstance(constant, Cells):
        return _multiplied(build, call, (x, constant), (own, other), result)
    if not isinstance(x, Cells) or not isinstance(constant, Constant):
        refuse_product(call)
    batch = own[x.batch]
    alone = "".join(c for c in own if c not in other and c not in result)
    if alone:  # summed over by itself
        rest = "".join(c for c in own if c not in alone)
        x, own = _moved(build, call, x, own, rest), rest
    own = own.replace(batch, "")
    constant, other = _without_images(build, call, constant, other, batch)
    # a dimension of length 1 of the constant stands for every index of the value's
    for axis in [i for i, c in enumerate(other) if c in own and constant.value.shape[i] == 1]:
        letter = other[axis]
        if x.dims[own.index(letter)] != 1:
            constant = _selected(build, constant, axis)
            other = other.replace(letter, "", 1)
    # a matrix product: letters of both are summed over, the others stay, in any order
    over = [c for c in own if c in other and c not in result]
    kept = [c for c in own if c not in over]
    new = [c for c in other if c not in over]
    if not over or set(kept) & set(new) or set(result) != {*kept, *new, batch}:
        raise UnsupportedLayerError(
            f"{call} multiplies {own!r} by a parameter {other!r}; expected a matrix product over "
            "features"
        )
    layout = x.layout.permute([own.index(c) for c in (*kept, *over)]).flatten(len(kept))
    weight = _matrix(build, constant, [other.index(c) for c in (*new, *over)], len(new))
    made = fully_connected(build, call, replace(x, moved=layout, batch=0), weight, None)
    sizes = [constant.value.shape[other.index(c)] for c in new]
    layout = made.layout.unflatten(-1, sizes) if new else made.layout.squeeze(-1)
    order = [[*kept, *new].index(c) for c in result if c != batch]
    return replace(made, moved=layout.permute(order), batch=result.index(batch))


def _multiplied(
    build: MapBuilder, call: Call, values: tuple[Cells, Cells], terms: tuple[str, str], result: str
) -> Cells:
    """The sum of products of two values over what the result lacks: bilinear pools, gated sums.

    Both are multiplied element by element, so they must lie at the same positions; attention, where
    each position meets every other one, is refused.
    """
    batch = terms[0][values[0].batch]
    distinct = all(len(set(term)) == len(term) for term in terms)
    if not distinct or batch != terms[1][values[1].batch] or batch not in result:
        refuse_product(call)
    size: dict[str, int] = {}
    for x, term in zip(values, terms):
        size.update(zip(term.replace(batch, ""), x.dims))
    if prod(size.values()) > _LARGEST_PRODUCT:
        refuse_product(call)
    letters = list(size)
    factors = [_with_axes(x, term.replace(batch, ""), letters) for x, term in zip(values, terms)]
    try:
        product = act_elementwise(build, call, *factors, as_function=torch.mul)
    except UnsupportedLayerError:
        refuse_product(call)
    lost = tuple(1 + i for i, c in enumerate(letters) if c not in result)
    product = reduced(build, call, product, lost, False, "sum") if lost else product
    own = [c for c in letters if c in result]
    order = [own.index(c) for c in result if c != batch]
    return replace(product, moved=product.layout.permute(order), batch=result.index(batch))


_LARGEST_PRODUCT = 1 << 24
"""Products of two values' elements, of one image: those of 512 channels and 8x8 positions."""


def _with_axes(x: Cells, own: str, letters: Sequence[str]) -> Cells:
    """A value with an axis for every letter, the images first."""
    layout = x.layout.permute([own.index(c) for c in letters if c in own])
    for axis, letter in enumerate(letters):
        layout = layout if letter in own else layout.unsqueeze(axis)
    return replace(x, moved=layout, batch=0)


def _without_images(
    build: MapBuilder, call: Call, constant: Constant, term: str, batch: str
) -> tuple[Constant, str]:
    """A parameter that was repeated for the images, as ``W.expand(len(x), -1, -1)``, once."""
    if batch not in term:
        return constant, term
    axis = term.index(batch)
    if constant.value.shape[axis] == BATCH:
        values = build.evaluated(constant)
        if values.is_meta or not torch.equal(values.select(axis, 0), values.select(axis, 1)):
            raise UnsupportedLayerError(f"{call} multiplies each image by other parameters")
    return _selected(build, constant, axis), term.replace(batch, "")


def _selected(build: MapBuilder, constant: Constant, axis: int) -> Constant:
    node = build.graph.call_method("select", (constant.node, axis, 0))
    return Constant(node, constant.value.select(axis, 0))


def _matrix(build: MapBuilder, constant: Constant, order: list[int], rows: int) -> Constant:
    """A constant as the weight ``(O, C)`` of a fully connected layer."""
    node, value = constant.node, constant.value
    if order != sorted(order):
        node = build.graph.call_method("permute", (node, tuple(order)))
        value = value.permute(order)
    shape = (prod(value.shape[:rows]), prod(value.shape[rows:]))
    if shape != tuple(value.shape):
        node = build.graph.call_method("reshape", (node, shape))
    return Constant(node, value.reshape(shape))
