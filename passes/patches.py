# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A product as a matrix product: sampled rows of its operand, and the results to reach.

A convolution with G groups reads, for each position of its result, G rows of K elements; its
weights are G matrices [K, O]. A matrix product has one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.single_node import Unit
from qcompiler.passes.trails import Trail
from qcompiler.types import Array


@dataclass(frozen=True)
class Patches:
    """Sampled rows of a product.

    Attributes:
        x: Operands [G, P, K], from the quantized network.
        y: Results to reach [G, P, O], after the fused addition, from the float network.
        add: What is added before the clamp [G, P, O], from the quantized network; None for nothing.
        clamp: (least, greatest) of the fused clamp.
    """

    x: Array
    y: Array
    add: Array | None
    clamp: tuple[float, float]

    def residual(self, z: Array, rows: Array | slice = slice(None)) -> Array:
        """Return the sum before the clamp, given the product's results."""
        return z if self.add is None else z + self.add[:, rows]

    def target(self) -> Array:
        """Return the results to reach after the clamp."""
        return np.clip(self.y, *self.clamp)

    def error(self, matrix: Array, bias: Array) -> float:
        """Return the mean squared error after the clamp of weights [G, K, O], bias [G, 1, O]."""
        z = np.clip(self.residual(self.x @ matrix + bias), *self.clamp)
        return float(np.mean((z - self.target()) ** 2))


@dataclass(frozen=True)
class Epilogue:
    """What joins a product's kernel.

    Attributes:
        value: Result of the float graph before the clamp.
        other: What is added, in the quantized graph; None for nothing.
        clamp: (least, greatest) of the clamp.
    """

    value: Value
    other: Value | None
    clamp: tuple[float, float]


def epilogue(graph: Graph, qdq: Graph, unit: Unit) -> Epilogue:
    """Return what follows a product: only a sum with a tensor of its shape, and one clamp."""
    value, other = graph.node(unit.node).output, None
    lo, hi = -np.inf, np.inf
    for name in unit.members[1:]:
        reader = graph.node(name)
        if reader.op.name == "add" and other is None:
            twin = qdq.node(name)
            twin_value = qdq.node(unit.node).output
            sides = [v for v in twin.operands if v is not twin_value]
            if len(sides) != 1 or sides[0].is_constant or sides[0].shape != value.shape:
                break
            other, value = sides[0], reader.output
            continue
        if reader.op.name == "relu":
            lo = 0.0
        elif reader.op.name == "clip":
            least, most = reader.attr("min"), reader.attr("max")
            lo = -np.inf if least is None else float(least)
            hi = np.inf if most is None else float(most)
        break
    return Epilogue(value, other, (lo, hi))


def collect(
    exact: Trail, rounded: Trail, unit: Unit, count: int, rng: np.random.Generator
) -> Patches:
    """Draw rows of a product from each run.

    Args:
        exact: Trail of the FLOAT graph, at most at the product.
        rounded: Trail of the QDQ graph, at most at the product.
        unit: The product.
        count: Rows per run.
        rng: Chooses them.
    """
    node = rounded.graph.node(unit.node)
    after = epilogue(exact.graph, rounded.graph, unit)
    x, other = node.input(0), after.other
    inner = [x] if other is None else [x, other]
    xs, ys, adds = [], [], []
    for got, want in zip(rounded.values(inner), exact.values([after.value]), strict=True):
        y = want[after.value.name]
        rows = _positions(node, y.shape, count, rng)
        xs.append(operand_rows(node, got[x.name], rows))
        ys.append(_result_rows(node, y, rows))
        if other is not None:
            adds.append(_result_rows(node, got[other.name], rows))
    add = np.concatenate(adds, 1) if adds else None
    return Patches(np.concatenate(xs, 1), np.concatenate(ys, 1), add, after.clamp)


def _positions(node: Node, shape: Sequence[int], count: int, rng: np.random.Generator) -> Array:
    """Draw distinct rows of a result: indices over all axes but the channels."""
    rows = int(np.prod(shape)) // shape[1 if node.op.name == "conv" else -1]
    chosen: Array = np.sort(rng.choice(rows, min(count, rows), replace=False))
    return chosen


def groups_of(node: Node) -> int:
    """Return the groups of a product."""
    return int(node.attr("group")) if node.op.name == "conv" else 1


def _result_rows(node: Node, y: Array, rows: Array) -> Array:
    """Return rows of a result as [G, P, O]."""
    if node.op.name == "conv":
        picked = y.reshape(*y.shape[:2], -1)
        at = np.unravel_index(rows, (y.shape[0], picked.shape[2]))
        picked = picked[at[0], :, at[1]]
    else:
        picked = y.reshape(-1, y.shape[-1])[rows]
    moved: Array = picked.reshape(len(rows), groups_of(node), -1).transpose(1, 0, 2)
    return np.ascontiguousarray(moved)


def operand_rows(node: Node, x: Array, rows: Array) -> Array:
    """Return the operand rows that give those rows of the result, as [G, P, K]."""
    if node.op.name != "conv":
        picked: Array = x.reshape(-1, x.shape[-1])[rows]
        return picked[None]
    kernel = node.input(1).shape[2:]
    pads, strides, dilations = (node.attr(a) for a in ("pads", "strides", "dilations"))
    half = len(kernel)
    padded = np.pad(
        x, [(0, 0), (0, 0), *((pads[i], pads[half + i]) for i in range(half))]
    )  # what pads is real 0
    n, oh, ow = np.unravel_index(rows, (x.shape[0], *node.output.shape[2:]))
    ys = oh[:, None] * strides[0] + np.arange(kernel[0]) * dilations[0]
    xs = ow[:, None] * strides[1] + np.arange(kernel[1]) * dilations[1]
    taken = padded[n[:, None, None], :, ys[:, :, None], xs[:, None, :]]  # [P, kh, kw, C]
    flat = taken.transpose(0, 3, 1, 2).reshape(len(rows), groups_of(node), -1)
    return np.ascontiguousarray(flat.transpose(1, 0, 2))


def matrix_of(node: Node, w: Array) -> Array:
    """Return weights as [G, K, O]."""
    if node.op.name != "conv":
        return w[None]
    groups = groups_of(node)
    return np.ascontiguousarray(w.reshape(groups, w.shape[0] // groups, -1).transpose(0, 2, 1))


def weights_of(node: Node, matrix: Array) -> Array:
    """Return matrices [G, K, O] as weights of the product's shape."""
    if node.op.name != "conv":
        plain: Array = matrix[0]
        return plain
    w: Array = np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(node.input(1).shape)
    return w


def bias_of(node: Node, groups: int, outputs: int) -> Array:
    """Return the bias as [G, 1, O]; zeros where the product has none."""
    bias = node.optional(2)
    if bias is None:
        return np.zeros((groups, 1, outputs), np.float32)
    return np.broadcast_to(bias.array(), (groups * outputs,)).reshape(groups, 1, outputs)
