# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Slopes of a sum of errors by any values of a graph, as more nodes of the same graph.

The nodes are ordinary float operators, so one model computes results and slopes in ONNX Runtime.
Rounding counts as if it were not there (a straight-through estimator) as long as nothing is
clipped. Where an operator has no rule no slope passes: what is before it is not told about errors
behind it.

Source: reverse-mode differentiation; Bengio et al., arXiv 1308.3432, for the estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import Array

Slopes = Iterator[tuple[int, Value]]
"""Operand index and the slope by it."""
Rule = Callable[["Writer", Node, Value], Slopes]


class Writer:
    """Appends float nodes to a graph."""

    def __init__(self, graph: Graph, active: set[Value]) -> None:
        self.graph, self._active = graph, active

    def wanted(self, node: Node, i: int) -> bool:
        """Whether the slope by an operand leads anywhere."""
        return node.optional(i) in self._active

    def add(self, op: str, *inputs: Value, **attrs: object) -> Value:
        """Append a node and return its result."""
        given = {k: v if not isinstance(v, list) else tuple(v) for k, v in attrs.items()}
        node = self.graph.add(op, inputs, given, name=f"slope/{op}")  # type: ignore[arg-type]
        return node.output

    def constant(self, data: Array | float) -> Value:
        """Return a float32 constant."""
        return self.graph.constant(np.asarray(data, np.float32), "slope/constant")

    def where(self, mask: Value, d: Value) -> Value:
        """Return slopes where a mask is set, and 0 elsewhere."""
        return self.add("where", mask, d, self.constant(0.0))

    def shaped(self, d: Value, shape: Sequence[int]) -> Value:
        """Return a value in another shape of as many elements."""
        return d if d.shape == tuple(shape) else self.add("reshape", d, shape=tuple(shape))

    def turned(self, d: Value, perm: Sequence[int]) -> Value:
        """Return a value with its axes in another order."""
        return self.add("transpose", d, perm=tuple(perm))

    def summed_to(self, d: Value, shape: Sequence[int]) -> Value:
        """Return slopes summed over the axes along which an operand was repeated."""
        if d.shape == tuple(shape):
            return d
        lead = len(d.shape) - len(shape)
        axes = [i for i, n in enumerate(d.shape) if i < lead or (shape[i - lead] == 1 and n != 1)]
        return self.shaped(self.add("reduce_sum", d, axes=tuple(axes)) if axes else d, shape)


def add_slopes(
    graph: Graph, seeds: Mapping[Value, Value], wanted: Sequence[Value]
) -> dict[Value, Value]:
    """Append the nodes that compute the slopes of an error.

    Args:
        graph: Graph of stage FLOAT or QDQ; values to differentiate by are inputs or results.
        seeds: Slopes of the error by some of its values.
        wanted: Values by which to differentiate.

    Returns:
        The slope by each wanted value that any seed depends on by operators with rules.
    """
    active = set(wanted)
    for node in graph.nodes:
        if node.op.name in RULES and active.intersection(node.operands):
            active.update(node.outputs)
    write = Writer(graph, active)
    found = {v: d for v, d in seeds.items() if v in active}
    for node in reversed(graph.nodes):
        d = found.get(node.outputs[0])
        rule = RULES.get(node.op.name)
        if d is None or rule is None:
            continue
        for i, part in rule(write, node, d):
            v = node.input(i)
            found[v] = write.add("add", found[v], part) if v in found else part
    return {v: found[v] for v in wanted if v in found}


# ------------------------------------------------------------------------------------ products


def _conv(write: Writer, node: Node, d: Value) -> Slopes:
    x, w = node.input(0), node.input(1)
    if x.type.rank != 4 or node.attr("layout") != "NCHW":
        return
    if write.wanted(node, 2):
        yield 2, write.add("reduce_sum", d, axes=(0, 2, 3), keepdims=False)
    strides, pads = node.attr("strides"), node.attr("pads")
    dilations, group = node.attr("dilations"), int(node.attr("group"))
    if write.wanted(node, 0):
        yield 0, _conv_operand(write, node, d)
    if not write.wanted(node, 1):
        return
    n, c, height, width = x.shape
    o, per_group, kh, kw = w.shape
    if (kh, kw) == (1, 1) and group == 1 and not any(pads) and tuple(strides) == (1, 1):
        positions = n * height * width
        left = write.shaped(d if n == 1 else write.turned(d, (1, 0, 2, 3)), (o, positions))
        right = write.shaped(write.turned(x, (0, 2, 3, 1)), (positions, c))
        yield 1, write.shaped(write.add("matmul", left, right), w.shape)
        return
    # The slope by tap t is the sum of x at t + stride * i times d at i: a convolution of x with d
    # as its kernel, strides and dilations exchanged, samples as channels.
    rows = write.shaped(x, (n, group, per_group, height, width))
    rows = write.turned(rows, (2, 1, 0, 3, 4))
    rows = write.shaped(rows, (per_group, group * n, height, width))
    kernel = write.turned(d, (1, 0, 2, 3))
    whole = write.add(
        "conv",
        rows,
        kernel,
        strides=tuple(dilations),
        dilations=tuple(strides),
        pads=tuple(pads),
        group=group,
    )
    cut = write.add("slice", whole, starts=(0, 0), ends=(kh, kw), axes=(2, 3), steps=(1, 1))
    yield 1, write.turned(cut, (1, 0, 2, 3))


def _conv_operand(write: Writer, node: Node, d: Value) -> Value:
    """Return the slope by what a convolution reads."""
    x, w = node.input(0), node.input(1)
    strides, pads, dilations = (node.attr(k) for k in ("strides", "pads", "dilations"))
    one = w.shape[2:] == (1, 1) and node.attr("group") == 1
    if one and tuple(strides) == (1, 1) and not any(pads):
        plain = {"strides": (1, 1), "pads": (0,) * 4, "dilations": (1, 1)}
        return write.add("conv", d, write.turned(w, (1, 0, 2, 3)), **plain)
    extra = tuple(
        x.shape[2 + i]
        - ((d.shape[2 + i] - 1) * strides[i] + (w.shape[2 + i] - 1) * dilations[i] + 1)
        + pads[i]
        + pads[2 + i]
        for i in range(2)
    )
    return write.add(
        "conv_transpose",
        d,
        w,
        strides=tuple(strides),
        pads=tuple(pads),
        dilations=tuple(dilations),
        group=node.attr("group"),
        output_padding=extra,
    )


def _matmul(write: Writer, node: Node, d: Value) -> Slopes:
    a, b = node.input(0), node.input(1)
    if node.attr("transpose_a") or node.attr("transpose_b") or min(a.type.rank, b.type.rank) < 2:
        return
    if b.type.rank > 2 and a.shape[:-2] != b.shape[:-2]:
        return
    if write.wanted(node, 0):
        yield 0, write.add("matmul", d, b, transpose_b=True)
    if write.wanted(node, 1):
        if b.type.rank == 2:
            a = write.shaped(a, (a.type.size // a.shape[-1], a.shape[-1]))
            flat = write.shaped(d, (d.type.size // d.shape[-1], d.shape[-1]))
            yield 1, write.add("matmul", a, flat, transpose_a=True)
        else:
            yield 1, write.add("matmul", a, d, transpose_a=True)
    if write.wanted(node, 2):
        yield 2, write.summed_to(d, node.input(2).shape)


# ---------------------------------------------------------------------------------- elementwise


def _sum(write: Writer, node: Node, d: Value) -> Slopes:
    for i in range(2):
        if write.wanted(node, i):
            part = write.add("neg", d) if i and node.op.name == "sub" else d
            yield i, write.summed_to(part, node.input(i).shape)


def _mul(write: Writer, node: Node, d: Value) -> Slopes:
    for i in range(2):
        if write.wanted(node, i):
            part = write.add("mul", d, node.input(1 - i))
            yield i, write.summed_to(part, node.input(i).shape)


def _clamp(write: Writer, node: Node, d: Value) -> Slopes:
    yield 0, write.where(write.add("equal", node.output, node.input(0)), d)


def _leaky_relu(write: Writer, node: Node, d: Value) -> Slopes:
    less = write.add("mul", d, write.constant(float(node.attr("alpha"))))
    below = write.add("less", node.input(0), write.constant(0.0))
    yield 0, write.add("where", below, less, d)


def _sigmoid(write: Writer, node: Node, d: Value) -> Slopes:
    y = node.output
    yield 0, write.add("mul", d, write.add("sub", y, write.add("mul", y, y)))


def _tanh(write: Writer, node: Node, d: Value) -> Slopes:
    y = node.output
    rest = write.add("sub", write.constant(1.0), write.add("mul", y, y))
    yield 0, write.add("mul", d, rest)


def _silu(write: Writer, node: Node, d: Value) -> Slopes:
    # y = x s: y' = s + y (1 - s)
    s = write.add("sigmoid", node.input(0))
    y = node.output
    steep = write.add("add", s, write.add("sub", y, write.add("mul", y, s)))
    yield 0, write.add("mul", d, steep)


def _hard_sigmoid(write: Writer, node: Node, d: Value) -> Slopes:
    y = node.output
    inner = write.add("clip", y, min=1e-7, max=1 - 1e-6)
    steep = write.add("mul", d, write.constant(float(node.attr("alpha"))))
    yield 0, write.where(write.add("equal", y, inner), steep)


def _hard_swish(write: Writer, node: Node, d: Value) -> Slopes:
    # x (x + 3) / 6 between -3 and 3, 0 below, x above
    x = node.input(0)
    line = write.add("add", write.add("mul", x, write.constant(1 / 3)), write.constant(0.5))
    above = write.add("less", write.constant(3.0), x)
    steep = write.add("where", above, write.constant(1.0), line)
    below = write.add("less", write.constant(-3.0), x)
    yield 0, write.where(below, write.add("mul", d, steep))


def _quantize(write: Writer, node: Node, d: Value) -> Slopes:
    x, q = node.input(0), node.output.qparams
    assert q is not None
    if not q.is_per_tensor:
        return
    low = float(q.s) * (q.qmin - int(q.z) - 0.5)
    high = float(q.s) * (q.qmax - int(q.z) + 0.5)
    p = x.producer
    if p is not None and p.op.name in ("relu", "clip"):
        least = 0.0 if p.op.name == "relu" else p.attr("min")
        most = None if p.op.name == "relu" else p.attr("max")
        if least is not None and most is not None and least >= low and most <= high:
            yield 0, d  # the clamp has taken out what lies beyond
            return
    inside = write.add("equal", write.add("clip", x, min=low, max=high), x)
    yield 0, write.where(inside, d)


def _through(write: Writer, node: Node, d: Value) -> Slopes:
    yield 0, d


# ----------------------------------------------------------------------- reductions and movement


def _reduce(write: Writer, node: Node, d: Value) -> Slopes:
    x = node.input(0)
    axes = {int(a) % x.type.rank for a in node.attr("axes")}
    kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    d = write.shaped(d, kept)
    if node.op.name == "reduce_mean":
        d = write.add("mul", d, write.constant(d.type.size / x.type.size))
    yield 0, write.add("expand", d, shape=x.shape)


def _reshape(write: Writer, node: Node, d: Value) -> Slopes:
    yield 0, write.shaped(d, node.input(0).shape)


def _transpose(write: Writer, node: Node, d: Value) -> Slopes:
    yield 0, write.turned(d, np.argsort(node.attr("perm")).tolist())


def _concat(write: Writer, node: Node, d: Value) -> Slopes:
    axis = int(node.attr("axis")) % d.type.rank
    start = 0
    for i, v in enumerate(node.operands):
        end = start + v.shape[axis]
        if write.wanted(node, i):
            at = {"starts": (start,), "ends": (end,), "axes": (axis,), "steps": (1,)}
            yield i, write.add("slice", d, **at)
        start = end


RULES: dict[str, Rule] = {
    "conv": _conv,
    "matmul": _matmul,
    "add": _sum,
    "sub": _sum,
    "mul": _mul,
    "relu": _clamp,
    "clip": _clamp,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "silu": _silu,
    "hard_sigmoid": _hard_sigmoid,
    "hard_swish": _hard_swish,
    "quantize": _quantize,
    "dequantize": _through,
    "reduce_mean": _reduce,
    "reduce_sum": _reduce,
    "reshape": _reshape,
    "transpose": _transpose,
    "concat": _concat,
}
"""How each operator hands slopes on to its operands."""
