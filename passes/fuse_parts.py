# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of several matrices, or groups of channels, become products of one.

Kernels take weights in blocks where there is one matrix, and one group of channels:

    conv(x, w) of g groups    ->  concat of convolutions of one group each
    matmul(x, w[B, K, N])     ->  concat of matmul(x[i], w[i])

Where a group has few columns, several groups make one convolution: block b of it holds the b-th
blocks of all of them, and weights of other groups are at their zero point. The integers of every
block are the same, and blocks are added in the same order.
"""

from __future__ import annotations

import numpy as np

from qcompiler.grids import found_grid
from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.fuse_blocks import Known, reordered
from qcompiler.passes.fuse_moves import adder, dequantized, params, succeed
from qcompiler.passes.fuse_patterns import is_plain
from qcompiler.types import Array, PerGroup, QuantParams, TensorType

MOST_PARTS = 64
"""Products that stand for one, at most."""

COLUMNS = 8
"""Columns of groups that make one convolution: kernels compute so many together at little cost.

Twice as many where more than `MANY_PARTS` would be left otherwise: each has a cost of its own.
"""

MANY_PARTS = 16


# ---------------------------------------------------------------------------------- groups


def split_groups(graph: Graph) -> bool:
    """Rewrite convolutions of groups with weights in blocks as convolutions of one group.

    Not those with a scale for each weight: no integers are summed there.
    """
    changed = False
    for node in graph.nodes:
        if node.op.name != "conv" or int(node.attr("group")) == 1:
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if not is_plain(node) or x is None or w is None or not w.is_constant or x.is_constant:
            continue
        by = params(w).granularity
        if not isinstance(by, PerGroup) or by.axis != 1 or not params(x).is_per_tensor:
            continue
        if w.shape[1] > 1:
            _split(graph, node, x, w)
            changed = True
    if changed:
        graph.eliminate_dead()
    return changed


def groups_together(node: Node) -> int:
    """Return how many groups of a convolution make one; the last ones may be fewer."""
    groups = int(node.attr("group"))
    columns = node.input(1).shape[0] // groups

    def divisor(most: int) -> int:
        return max(n for n in range(1, max(1, min(most, groups)) + 1) if groups % n == 0)

    together = divisor(COLUMNS // columns)
    if groups // together > MANY_PARTS:
        together = divisor(2 * COLUMNS // columns)
    return max(together, -(-groups // MOST_PARTS))


def _split(graph: Graph, node: Node, x: Value, w: Value) -> None:
    """Put convolutions of one group each in the place of one of several."""
    most, bias, reals = groups_together(node), node.optional(2), None
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
    at = 1 if node.attr("layout") == "NCHW" else x.type.rank - 1
    groups, out, q = int(node.attr("group")), node.output, params(w)
    size = q.granularity.group_size if isinstance(q.granularity, PerGroup) else 0
    columns, channels = w.shape[0] // groups, w.shape[1]
    starts = range(0, channels, size)
    runs = [slice(start, min(start + size, channels)) for start in starts]
    zero = np.broadcast_to(q.zero_point, q.scale.shape)
    order: Known = {}
    parts = []
    for first in range(0, groups, most):
        together = min(most, groups - first)
        shape = (*out.shape[:at], columns * together, *out.shape[at + 1 :])
        mine = slice(first * columns, (first + together) * columns)
        codes = _together(w.array()[mine], zero[mine], runs, together)
        by = PerGroup(1, size * together)
        grid = QuantParams(q.scale[mine], zero[mine], q.storage, q.qmin, q.qmax, by)
        own = graph.constant(codes, w.name, grid)
        every = np.arange(channels)
        rows = np.concatenate(
            [g * channels + every[run] for run in runs for g in range(first, first + together)]
        )
        read = reordered(graph, node, x, rows, at, order)
        operands: list[Value | None] = [
            graph.add("dequantize", [v], before=node, sources=node.sources).output
            for v in (read, own)
        ]
        if bias is not None and reals is not None:
            operands.append(graph.constant(np.ascontiguousarray(reals[mine]), bias.name))
        parts.append(
            graph.add(
                "conv",
                operands,
                {**node.attrs, "group": 1},
                types=[TensorType(shape, out.dtype)],
                name=f"{node.name}_group{first}",
                before=node,
                sources=node.sources,
            ).output
        )
    _join(graph, node, parts, at)


def _together(codes: Array, zero: Array, runs: list[slice], together: int) -> Array:
    """Return the weights of groups as those of one: by block, then group; others are nothing."""
    columns = codes.shape[0] // together
    blocks = []
    for block, run in enumerate(runs):
        for group in range(together):
            mine = slice(group * columns, (group + 1) * columns)
            part = np.repeat(zero[:, block : block + 1], run.stop - run.start, axis=1)
            part = part.astype(codes.dtype)
            part[mine] = codes[mine, run]
            blocks.append(part)
    return np.ascontiguousarray(np.concatenate(blocks, axis=1))


def _join(graph: Graph, node: Node, parts: list[Value], axis: int) -> None:
    out = node.output
    joined = graph.add("concat", parts, {"axis": axis}, before=node, sources=node.sources)
    graph.replace_node(node, joined.output)
    succeed(joined, node, out)


# --------------------------------------------------------------------------------- batches


def split_batches(graph: Graph) -> bool:
    """Rewrite products by several constant matrices, scaled one by one, as products by one each."""
    changed = False
    for node in graph.nodes:
        if node.op.name != "matmul" or not is_plain(node):
            continue
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if x is None or w is None or not w.is_constant or x.is_constant or w.type.rank < 3:
            continue
        if params(w).is_per_tensor or not params(x).is_per_tensor or not few_matrices(w):
            continue
        new = _by_matrix(graph, node, x, w)
        last = new.producer
        assert last is not None  # a product, or what joins several
        out = node.output
        graph.replace_node(node, new)
        succeed(last, node, out)
        changed = True
    if changed:
        graph.eliminate_dead()
    return changed


def few_matrices(w: Value) -> bool:
    """Whether weights hold few enough matrices for a product each."""
    return 0 < int(np.prod(w.shape[:-2])) <= MOST_PARTS


def _by_matrix(graph: Graph, node: Node, x: Value, w: Value) -> Value:
    """Return the product by several matrices, as what is made of products by one each."""
    q = params(w)
    scale, zero = (np.broadcast_to(a, w.shape) for a in expanded(q, w.shape))
    bias, reals = node.optional(2), None
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked

    add = adder(graph, node)

    def product(x: Value, index: tuple[int, ...]) -> Value:
        """By the matrices at a place along the first axes."""
        axes = w.type.rank - 2 - len(index)
        if axes == 0:
            by, s, z = found_grid(scale[index], zero[index])
            grid = QuantParams(s, z, q.storage, q.qmin, q.qmax, by)
            held = graph.constant(np.ascontiguousarray(w.array()[index]), w.name, grid)
            operands: list[Value | None] = [add("dequantize", v) for v in (x, held)]
            if bias is not None and reals is not None:
                operands.append(graph.constant(reals, bias.name))
            return add("matmul", *operands, **node.attrs)
        count, at = w.shape[len(index)], x.type.rank - 2 - axes
        parts = []
        for i in range(count):
            own = x
            if at >= 0 and x.shape[at] > 1 and count > 1:
                own = add("slice", x, starts=(i,), ends=(i + 1,), axes=(at,), steps=(1,))
            part = product(own, (*index, i))
            rank = axes + 2
            if part.type.rank < rank:
                shape = ((1,) * (rank - part.type.rank)) + part.shape
                part = add("reshape", part, shape=shape)
            parts.append(part)
        if count == 1:
            return parts[0]
        return add("concat", *parts, axis=parts[0].type.rank - 2 - axes)

    return product(x, ())
