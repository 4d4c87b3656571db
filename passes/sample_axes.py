# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where the samples of a run lie in every value of a graph, so that copies can be left out.

The last run of a sample set is filled up with copies of its samples. What they make must not count
in any statistic. Most operators treat samples apart; this follows them from the inputs: through
reshapes that merge the axis of the samples with others, transposes, broadcasting and products.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import numpy as np

from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.types import Array

_FIRST_AXIS = frozenset({"conv", "conv_transpose", "max_pool", "average_pool", "resize",
                         "depth_to_space", "space_to_depth", "instance_norm"})  # fmt: skip
"""Operators that treat the indices of axis 0 of their first operand apart."""


class SampleAxes:
    """The layout of samples in the values of a FLOAT graph.

    In row-major order, element e of a value belongs to sample `e // block % size`; `block` is what
    this finds. Reshapes keep it.

    Args:
        graph: The graph.
        inputs: Names of the inputs whose first axis counts samples.
        size: Extent of that axis.
    """

    def __init__(self, graph: Graph, inputs: Iterable[str], size: int) -> None:
        self.size = size
        self.blocks: dict[Value, int] = {}
        named = set(inputs)
        for v in graph.inputs:
            if v.name in named:
                self.blocks[v] = prod(v.shape[1:])
        for node in graph.nodes:
            if any(v in self.blocks for v in node.operands):
                self._visit(node)

    def block(self, value: Value) -> int | None:
        """Return how many elements of one sample follow each other; None where samples mix."""
        return self.blocks.get(value)

    def cut(self, value: Value, array: Array, real: int) -> Array:
        """Return the elements of the first samples; the array itself where samples mix in it."""
        block = self.blocks.get(value)
        if block is None or array.size != value.type.size:
            return array
        return array.reshape(-1, self.size, block)[:, :real]

    # ------------------------------------------------------------------------- propagation

    def _axis(self, value: Value) -> tuple[int, int] | None:
        """Return (axis that holds the samples, its indices per sample), if one axis does."""
        block, inner = self.blocks.get(value), 1
        if block is None:
            return None
        for axis in reversed(range(value.type.rank)):
            extent = value.shape[axis]
            if block % inner == 0 and extent % (block // inner * self.size) == 0:
                return axis, block // inner
            inner *= extent
        return None

    def _set(self, value: Value, source: Value, axis: int | None) -> None:
        """Note that the samples of a source lie along an axis of a value."""
        found = self._axis(source)
        if found is None or axis is None or not 0 <= axis < value.type.rank:
            return
        if value.shape[axis] == source.shape[found[0]]:
            self.blocks[value] = found[1] * prod(value.shape[axis + 1 :])

    def _visit(self, node: Node) -> None:
        if node.op.name == "reshape":
            self.blocks[node.output] = self.blocks[node.input(0)]
            return
        for out in node.outputs:
            places: dict[tuple[int, int] | None, None] = {}
            for i, v in enumerate(node.inputs):
                if v is None or v not in self.blocks:
                    continue
                found = self._axis(v)
                axis = None if found is None else self._follow(node, i, v, found[0], out)
                self._set(out, v, axis)
                places[None if found is None or axis is None else (axis, found[1])] = None
            if len(places) != 1 or None in places:
                self.blocks.pop(out, None)  # operands disagree, or samples mix

    def _follow(self, node: Node, i: int, v: Value, axis: int, out: Value) -> int | None:
        """Return the axis of a result along which the samples of operand i lie, if any."""
        name, kind = node.op.name, node.op.kind
        rank = v.type.rank
        if kind in (OpKind.UNARY, OpKind.BINARY, OpKind.CAST) or name in ("where", "expand"):
            return axis + out.type.rank - rank
        if name == "matmul":
            return self._matmul(node, i, axis, out)
        if name in _FIRST_AXIS:
            return axis if i == 0 and axis == 0 else None
        if kind is OpKind.RECURRENT:
            if i == 0:
                return axis if out is node.outputs[0] else (0 if axis == 1 else None)
            return axis + 1 if out is node.outputs[0] else axis  # a state: samples of axis 1
        if name == "transpose":
            return tuple(node.attr("perm")).index(axis)
        if name == "gather":
            along = int(node.attr("axis")) % node.input(0).type.rank
            if i == 1:
                return along + axis
            if along == axis:
                return None
            return axis if axis < along else axis + node.input(1).type.rank - 1
        if name in ("pad", "tile"):
            amounts = node.attr("pads" if name == "pad" else "repeats")
            none = 0 if name == "pad" else 1
            return axis if all(a == none for a in amounts[axis::rank]) else None
        if name == "batch_norm":
            return axis if i == 0 else None
        if name == "layer_norm":
            return axis if axis < int(node.attr("axis")) % rank else None
        if name.startswith("reduce_"):
            over = {int(a) % rank for a in node.attr("axes")}
            if axis in over:
                return None
            return axis if node.attr("keepdims") else axis - sum(a < axis for a in over)
        if name == "slice":  # one that keeps the whole axis; a reversed one would move the copies
            taken = {int(a) % rank: int(s) for a, s in zip(node.attr("axes"), node.attr("steps"),
                                                           strict=True)}  # fmt: skip
            return axis if taken.get(axis, 1) == 1 else None
        if "axis" in node.op.attrs:  # softmax, concat, split, cumsum, argmax
            along = int(node.attr("axis")) % rank
            if along == axis:
                return None
            kept = node.op.name not in ("argmax", "argmin") or node.attr("keepdims")
            return axis if kept or axis < along else axis - 1
        return None

    @staticmethod
    def _matmul(node: Node, i: int, axis: int, out: Value) -> int | None:
        v = node.input(i)
        rank, turned = v.type.rank, bool(node.attr("transpose_b" if i else "transpose_a"))
        if i > 1 or rank < 2 or node.input(1 - i).type.rank < 2:
            return axis + out.type.rank - rank if i == 3 else None
        free = rank - 1 - (turned if i else not turned)
        if axis >= rank - 2:
            return (out.type.rank - (1 if i else 2)) if axis == free else None
        return axis + out.type.rank - rank


class Filled:
    """Leaves the copies out of what runs of a graph make; layouts are found at the first need."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._found: dict[tuple[tuple[str, ...], int], SampleAxes] = {}

    def axes(self, batch: Batch) -> tuple[SampleAxes, int] | None:
        """Return the layout for a run and its real samples; None where it holds no copies."""
        extents = set(batch.filled.values())
        if len(extents) != 1:
            return None
        real, size = extents.pop()
        key = (tuple(batch.filled), size)
        if key not in self._found:
            self._found[key] = SampleAxes(self._graph, batch.filled, size)
        return self._found[key], real

    def real(self, value: Value, array: Array, batch: Batch) -> Array:
        """Return what real samples made of a value."""
        found = self.axes(batch)
        return array if found is None else found[0].cut(value, array, found[1])

    def steps(self, value: Value, array: Array, batch: Batch) -> Array:
        """Return the first part of a sequence [T, ...] that real samples made."""
        found = self.axes(batch)
        if found is None or found[0].block(value) != int(np.prod(array.shape[1:])):
            return array
        return array[: found[1]]
