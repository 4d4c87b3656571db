# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write convolutions whose weights are computed as matrix products of patches.

Kernels of convolutions take weights that were packed at compile time; those of matrix products pack
what is computed:

    conv(x[N, C, ...], w[M, C, K...])  ->  matmul(patches[N * P, K * C], w'[M, K * C], transpose_b)

A patch is what one position of the result sees: vectors of channels, one per tap, gathered from x
with channels last. Nothing but elements moves, so patches of codes are codes, and their product is
one of integers.

Scales and zero points that differ from one column, or image, to the next leave the operands first:

    conv(x, S (q - Z))  ->  conv(x, q - Z) * S

Depthwise convolutions of floats stay on CPUs: there, moving costs more than the product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.ops import Stage
from qcompiler.passes.rewrite import continued, producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, DType, PerAxis, QuantParams, TensorType

_FEW_COLUMNS = 8
"""Columns of a group below which its weights are the rows of the product, and patches its columns:
kernels hold vectors of columns."""

MOST_PLACES = 1 << 20
"""Places of one table: those of large images are gathered along their axes, which takes longer."""


@dataclass(frozen=True)
class ConvToMatmul(Pass):
    """Rewrite convolutions with computed weights as matrix products.

    Attributes:
        depthwise: Whether depthwise ones of floats, too: for targets that have no other form.
    """

    depthwise: bool = False

    name: ClassVar[str] = "conv_to_matmul"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "conv" and _applies(node, self.depthwise):
                to_matmul(graph, node)
                changed = True
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _applies(node: Node, depthwise: bool) -> bool:
    x, w = node.input(0), node.input(1)
    if known(w) is not None or w.is_constant or 0 in (x.type.size, w.type.size):
        return False
    if 0 in node.output.shape or node.attr("layout") != "NCHW":
        return False
    return depthwise or w.shape[1] > 1 or node.attr("group") == 1 or _codes(x) is not None


def _codes(v: Value) -> Value | None:
    """Return the quantized value that a value is the dequantization of, if it is one."""
    node = producer_of(v, "dequantize")
    return None if node is None else node.input(0)


class _Writer:
    """Adds the nodes that stand for one node."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self.node = node

    def add(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        name = f"{self.node.name}/patches"
        types = attrs.pop("types", None)
        made = self.graph.add(op, inputs, attrs, name=name, sources=self.node.sources, types=types)
        return made.output

    def reshape(self, x: Value, *shape: int) -> Value:
        return x if x.shape == shape else self.add("reshape", x, shape=shape)

    def transpose(self, x: Value, *perm: int) -> Value:
        return x if perm == tuple(range(len(perm))) else self.add("transpose", x, perm=perm)


def to_matmul(graph: Graph, node: Node) -> None:
    """Put a matrix product of patches in the place of a convolution with channels first."""
    scales_behind(graph, node)
    to = _Writer(graph, node)
    x, w = node.input(0), node.input(1)
    group = int(node.attr("group"))
    n, out, columns = x.shape[0], node.output.shape[2:], w.shape[0] // group
    patches = _patches(to, x, w.shape[2:])
    taps, each, rows = patches.shape[1], w.shape[1], n * math.prod(out)
    depth = taps * each
    # Weights in the order of the patches: taps, then channels.
    right = to.reshape(w, *w.shape[:2], taps)
    right = to.transpose(right, 0, 2, 1) if min(taps, each) > 1 else right
    bias = node.optional(2)
    if group == 1:
        left = to.reshape(patches, rows, depth)
        right = to.reshape(right, columns, depth)
        # Beside codes it would be rounded to the scale of their products.
        inside = bias is not None and known(bias) is not None and graph.stage is Stage.FLOAT
        own, bias = (bias, None) if inside else (None, bias)
        product = to.add("matmul", left, right, own, transpose_b=True)
        y, channels = product, -1
    elif columns < _FEW_COLUMNS and known(w) is None:
        left = to.reshape(right, group, columns, depth)
        apart = to.reshape(patches, rows, taps, group, each)
        apart = to.transpose(apart, 2, 1, 3, 0)
        product = to.add("matmul", left, to.reshape(apart, group, depth, rows))
        y, channels = to.reshape(product, group * columns, rows), 0
    else:
        apart = to.reshape(patches, rows, taps, group, each)
        apart = to.reshape(to.transpose(apart, 2, 0, 1, 3), group, rows, depth)
        right = to.reshape(right, group, columns, depth)
        product = to.add("matmul", apart, right, transpose_b=True)
        y = to.reshape(to.transpose(product, 1, 0, 2), rows, group * columns)
        channels = -1
    if channels:
        y = to.reshape(y, n, *out, group * columns)
        y = to.transpose(y, 0, len(out) + 1, *range(1, len(out) + 1))
    else:
        y = to.reshape(y, group * columns, n, *out)
        y = to.transpose(y, 1, 0, *range(2, len(out) + 2))
    _finish(to, product, y, bias)


def _finish(to: _Writer, product: Value, y: Value, bias: Value | None) -> None:
    """Add what is fused, and replace the convolution; plans know the product by its name."""
    graph, node = to.graph, to.node
    residual = node.optional(3)
    if bias is not None:
        wide = to.reshape(bias, bias.type.size, *(1,) * (y.type.rank - 2))
        y = to.add("add", y, wide)
    if residual is not None:
        y = to.add("add", y, residual)
    low, high = node.attr("act_min"), node.attr("act_max")
    if low is not None or high is not None:
        y = to.add("clip", y, min=low, max=high)
    last, name = y.producer, node.name
    made = product.producer
    assert last is not None
    assert made is not None
    own = last.name
    supersede(graph, node, last, node)
    if last is not made:
        last.name, made.name = own, name


def _patches(to: _Writer, x: Value, kernel: tuple[int, ...]) -> Value:
    """Return what each position sees, [N * P, taps, C]."""
    node, rank = to.node, len(kernel)
    pads, out = node.attr("pads"), node.output.shape[2:]
    n, c = x.shape[:2]
    y = to.transpose(x, 0, *range(2, rank + 2), 1)
    if any(pads):
        y = to.add("pad", y, pads=(0, *pads[:rank], 0, 0, *pads[rank:], 0))
    steps = zip(kernel, node.attr("dilations"), node.attr("strides"), out, strict=True)
    # Per axis, [extent of the result, taps]: places in the padded input.
    along = [np.arange(o)[:, None] * s + np.arange(k)[None] * d for k, d, s, o in steps]
    if math.prod(a.size for a in along) > MOST_PLACES:
        return _patches_by_axis(to, y, along)
    places = np.zeros((1, 1), np.int64)
    for extent, axis in zip(y.shape[1:-1], along, strict=True):
        far = places[:, None, :, None] * extent + axis[None, :, None, :]
        places = far.reshape(places.shape[0] * axis.shape[0], -1)
    positions, taps = places.shape
    area = math.prod(y.shape[1:-1])
    y = to.reshape(y, n, area, c)
    if positions * taps != area or (places.reshape(-1) != np.arange(area)).any():
        held = to.graph.constant(places.reshape(-1).astype(np.int32), f"{node.name}_places")
        y = to.add("gather", y, held, axis=1)
    return to.reshape(y, n * positions, taps, c)


def _patches_by_axis(to: _Writer, y: Value, along: list[Array]) -> Value:
    """Return the patches of x[N, ..., C], gathered along one axis after the other."""
    n, c, rank = y.shape[0], y.shape[-1], len(along)
    for axis, places in enumerate(along):
        held = to.graph.constant(places.reshape(-1).astype(np.int32), f"{to.node.name}_places")
        y = to.add("gather", y, held, axis=1 + axis)
    y = to.reshape(y, n, *(d for places in along for d in places.shape), c)
    y = to.transpose(y, 0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    taps = math.prod(places.shape[1] for places in along)
    return to.reshape(y, n * math.prod(places.shape[0] for places in along), taps, c)


# --------------------------------------------------------------------------------- scales


def scales_behind(graph: Graph, node: Node) -> None:
    """Give the operands of a convolution one scale each, where theirs can multiply the result.

    Those are scales of images and of columns; zero points that differ leave the codes, too.
    """
    turned = node.op.name == "conv_transpose"
    group, rank = int(node.attr("group")), node.output.type.rank
    to = _Writer(graph, node)
    factors = []
    for at, axis in ((0, 0), (1, 1 if turned else 0)):
        found = _plain(to, at, axis)
        if found is None:
            continue
        plain, scale = found
        graph.set_input(node, at, plain)
        scale = np.tile(scale, group) if turned and at else scale
        factors.append(scale.reshape(-1, *(1,) * (rank - 1 - at)))
    if not factors:
        return
    bias = node.optional(2)
    if bias is not None:
        graph.set_input(node, 2, None)

    def behind(y: Value) -> Value:
        for factor in factors:
            y = to.add("mul", y, graph.constant(factor, f"{node.name}_scale"))
        if bias is not None:
            y = to.add("add", y, to.reshape(bias, bias.type.size, *(1,) * (rank - 2)))
        return y

    continued(graph, node, behind, "unscaled")
    graph.sort()


def _plain(to: _Writer, at: int, axis: int) -> tuple[Value, Array] | None:
    """Return a computed operand on the scale 1, and its scales, if those are along an axis."""
    v = to.node.input(at)
    codes = _codes(v)
    q = None if codes is None else codes.qparams
    if codes is None or codes.is_constant or q is None or q.granularity != PerAxis(axis):
        return None
    scale, zero = expanded(q, codes.shape)
    storage, point, low, high = q.storage, int(q.zero_point[0]), q.qmin, q.qmax
    if (zero != point).any():
        if storage.bits > 8:
            return None
        storage = DType.INT16
        point, low, high = 0, storage.min, storage.max
    real = to.add("div", v, to.graph.constant(scale, f"{codes.name}_scale"))
    grid = QuantParams(np.float32(1), np.int32(point), storage, low, high)
    whole = to.add("quantize", real, types=[TensorType(v.shape, storage, grid)])
    return to.add("dequantize", whole), q.scale
