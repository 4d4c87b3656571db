# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write 3-D convolutions and poolings as 2-D ones, which the kernels compute.

A convolution over depth, height and width is one over height and width whose input holds, for each
depth of the result, the slices that its window covers, side by side among the channels:

    conv(x[N, C, D, H, W], w[M, C, K, R, S])
        ->  conv(x'[N * D', K * C, H, W], w'[M, K * C, R, S])

A pooling runs over height and width first and over depth second. In between, the axes are kept in
the order N, D, H, W, C, so that what moves are whole slices and whole channel vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, PerAxis, PerGroup

_TO_LAST = (0, 2, 3, 4, 1)
_TO_FIRST = (0, 4, 1, 2, 3)
_POOLS = frozenset({"max_pool", "average_pool"})


@dataclass(frozen=True)
class Conv3dTo2d(Pass):
    """Rewrite rank-5 convolutions with constant weights and poolings as rank-4 ones."""

    name: ClassVar[str] = "conv_3d_to_2d"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in ("conv", *_POOLS) and node.input(0).type.rank == 5:
                rewrite = _conv if node.op.name == "conv" else _pool
                changed |= rewrite(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


class _Writer:
    """Adds the nodes that stand for one node."""

    def __init__(self, graph: Graph, node: Node) -> None:
        self.graph = graph
        self.node = node
        self.main: Node | None = None  # the last 2-D operator

    def add(self, op: str, *inputs: Value | None, suffix: str = "planes", **attrs: Any) -> Value:
        name = f"{self.node.name}/{suffix}"
        return self.graph.add(op, inputs, attrs, name=name, sources=self.node.sources).output

    def reshape(self, x: Value, *shape: int) -> Value:
        return x if x.shape == shape else self.add("reshape", x, shape=shape)

    def plane(self, op: str, x: Value, *rest: Value | None, **attrs: Any) -> Value:
        """Apply a 2-D operator to x[N, H, W, C] and return its result in that order."""
        first = self.add("transpose", x, perm=(0, 3, 1, 2))
        y = self.add(op, first, *rest, **attrs)
        self.main = y.producer
        return self.add("transpose", y, perm=(0, 2, 3, 1))

    def finish(self, y: Value) -> None:
        """Replace the node by y[N, D, H, W, C]; plans know its last 2-D operator by its name."""
        graph, node = self.graph, self.node
        last = graph.add("transpose", [y], {"perm": _TO_FIRST}, name=f"{node.name}/volume")
        name, own = node.name, last.name
        supersede(graph, node, last, node)
        last.name = own
        if self.main is not None:
            self.main.name = name


def _planes(pads: tuple[int, ...]) -> tuple[int, ...]:
    """Return the padding of height and width out of that of three axes."""
    return (*pads[1:3], *pads[4:6])


def _conv(graph: Graph, node: Node) -> bool:
    x, group = node.input(0), int(node.attr("group"))
    weight = _weight(graph, node.input(1), group)
    if weight is None or 0 in node.output.shape:
        return False
    n, c, _, h, w = x.shape
    pads, depth, out = node.attr("pads"), node.input(1).shape[2], node.output.shape
    step, dilation = node.attr("strides")[0], node.attr("dilations")[0]
    to = _Writer(graph, node)
    y = to.add("transpose", x, perm=_TO_LAST)
    if pads[0] or pads[3]:
        y = to.add("pad", y, pads=(0, pads[0], 0, 0, 0, 0, pads[3], 0, 0, 0))
    each = weight.shape[1] // depth
    if each > c // group:  # blocks are filled up
        y = to.reshape(y, *y.shape[:4], group, c // group)
        y = to.add("pad", y, pads=(*(0,) * 11, each - c // group))
        c = group * each
        y = to.reshape(y, *y.shape[:4], c)
    reach = (out[2] - 1) * step + 1
    parts = []
    for k in range(depth):
        start = k * dilation
        part = y
        if reach != y.shape[1] or step != 1:
            part = to.add(
                "slice", y, axes=(1,), starts=(start,), ends=(start + reach,), steps=(step,)
            )
        # The channels of a group stay together.
        parts.append(to.reshape(part, n, out[2], h, w, group, c // group))
    y = parts[0] if depth == 1 else to.add("concat", *parts, axis=5)
    y = to.plane(
        "conv",
        to.reshape(y, n * out[2], h, w, depth * c),
        weight,
        node.optional(2),
        strides=node.attr("strides")[1:],
        pads=_planes(pads),
        dilations=node.attr("dilations")[1:],
        group=group,
    )
    to.finish(to.reshape(y, n, *out[2:], out[1]))
    return True


def _weight(graph: Graph, w: Value, group: int) -> Value | None:
    """Return w[M, C / g, K, R, S] as [M, K * C / g, R, S], or None if it is not constant.

    Blocks of a plane follow each other, so the last one of a plane is filled up: the result may
    have more channels.
    """

    def flat(data: Array) -> Array:
        m, c, k, r, s = data.shape
        return np.ascontiguousarray(np.moveaxis(data, 2, 1).reshape(m, k * c, r, s))

    if w.is_constant and w.qparams is None:
        return graph.constant(flat(w.array()), w.name, dtype=w.dtype)
    node = producer_of(w, "dequantize")
    held = node.input(0) if node is not None else None
    if node is None or held is None or not held.is_constant or held.qparams is None:
        return None
    q, by, data = held.qparams, held.qparams.granularity, held.array()
    if isinstance(by, PerGroup):
        if by.axis != 1:
            return None
        lacks = -w.shape[1] % by.group_size
        if lacks:  # what fills a block up counts nothing
            fill = np.repeat(q.zero_point[:, -1:], lacks, axis=1).astype(data.dtype)
            data = np.concatenate([data, fill], axis=1)
        q = replace(q, scale=flat(q.scale), zero_point=flat(q.zero_point))
    elif not (q.is_per_tensor or by == PerAxis(0)):
        return None
    new = graph.constant(flat(data), held.name, q, held.dtype)
    return graph.add("dequantize", [new], name=node.name, sources=node.sources).output


def _pool(graph: Graph, node: Node) -> bool:
    n, c, d, h, w = node.input(0).shape
    out, pads = node.output.shape, node.attr("pads")
    if 0 in out:
        return False
    kernel, strides, dilations = (node.attr(k) for k in ("kernel", "strides", "dilations"))
    same = {k: node.attr(k) for k in ("ceil_mode", "count_include_pad") if k in node.attrs}
    to = _Writer(graph, node)
    y = to.reshape(to.add("transpose", node.input(0), perm=_TO_LAST), n * d, h, w, c)
    y = to.plane(
        node.op.name,
        y,
        kernel=kernel[1:],
        strides=strides[1:],
        pads=_planes(pads),
        dilations=dilations[1:],
        **same,
    )
    if (kernel[0], strides[0], pads[0], pads[3]) != (1, 1, 0, 0):
        y = to.plane(
            node.op.name,
            to.reshape(y, n, d, out[3] * out[4], c),
            suffix="depth",
            kernel=(kernel[0], 1),
            strides=(strides[0], 1),
            pads=(pads[0], 0, pads[3], 0),
            dilations=(dilations[0], 1),
            **same,
        )
    to.finish(to.reshape(y, n, *out[2:], c))
    return True
