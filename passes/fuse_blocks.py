# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights in blocks that integer kernels do not take become blocks that they do.

Kernels add up blocks of whole dot instructions (`WHOLE_GROUP`), and those of a convolution hold
int8 around 0. Before -> after, for a block of channels x (of rows, in a matrix product):

    x (w - z)  ->  [x, x', 0] [a, b, 0],  a + b = w - z,  both int8

`b` is what exceeds int8, x' are the channels of x where it is not 0, and channels that count for
nothing fill every block up to one size. The sum of each block is the same integer, and blocks are
added in the same order. Matrix products keep their codes, because kernels take zero points there.

`fuse_parts` makes such products of others.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.fuse_moves import dequantized, params
from qcompiler.passes.fuse_patterns import is_plain
from qcompiler.passes.fuse_wide import int8_terms, nearly_narrow, replace_product
from qcompiler.plan import WHOLE_GROUP, summed_axis
from qcompiler.types import Array, DType, PerGroup, QuantParams, TensorType

_ACTIVATIONS = (DType.INT8, DType.UINT8)
_WEIGHTS = (*_ACTIVATIONS, DType.INT4, DType.UINT4)

Known = dict[tuple[Value, int, bytes], Value]
"""What `reordered` made: by value, axis and order."""


def fit_blocks(graph: Graph) -> bool:
    """Rewrite products of 8-bit activations by weights in blocks that kernels do not take."""
    known: Known = {}
    changed = False
    for node in graph.nodes:
        found = _operands(node)
        if found is None or _fits(node, found[1]):
            continue
        _rewrite(graph, node, *found, known)
        changed = True
    if changed:
        graph.eliminate_dead()
    return changed


def _operands(node: Node) -> tuple[Value, Value] | None:
    """Return activations and weights of a product with blocks along what it sums, or None."""
    if not is_plain(node):
        return None
    x, w = dequantized(node.input(0)), dequantized(node.input(1))
    if x is None or w is None or not w.is_constant or x.is_constant:
        return None
    if x.dtype not in _ACTIVATIONS or not params(x).is_per_tensor:
        return None
    by = params(w).granularity
    if not isinstance(by, PerGroup) or by.axis != summed_axis(node):
        return None
    if node.op.name == "conv":
        held = w.dtype in _WEIGHTS or nearly_narrow(w)
        return (x, w) if held and node.attr("group") == 1 else None
    whole = w.type.rank == 2 and w.dtype in _WEIGHTS and not node.attr("transpose_a")
    return (x, w) if whole else None


def _size(w: Value) -> int:
    by = params(w).granularity
    return by.group_size if isinstance(by, PerGroup) else 0


def _fits(node: Node, w: Value) -> bool:
    """Whether kernels take the blocks as they are."""
    size, q = _size(w), params(w)
    if size % WHOLE_GROUP or w.shape[summed_axis(node)] % size:
        return False
    return node.op.name == "matmul" or (q.storage is DType.INT8 and q.is_symmetric)


def _rewrite(
    graph: Graph,
    node: Node,
    x: Value,
    w: Value,
    known: Known,
) -> None:
    axis, q = summed_axis(node), params(w)
    zero = expanded(q, w.shape)[1]
    if node.op.name == "conv":
        at = 1 if node.attr("layout") == "NCHW" else x.type.rank - 1
        around = w.array().astype(np.int32) - zero
        terms, nothing = int8_terms(around), np.zeros(w.shape, np.int8)
        low, high = _range(terms)
        storage, zeros = DType.INT8, np.zeros_like(q.zero_point)
    else:
        at = x.type.rank - 1
        terms, nothing = [w.array()], zero.astype(w.dtype.numpy)
        storage, low, high, zeros = q.storage, q.qmin, q.qmax, q.zero_point
    rows, which = _picked(terms, axis, _size(w))
    every = np.moveaxis(np.stack([*terms, nothing]), axis + 1, 1)
    codes = np.moveaxis(every[which.reshape(-1), rows.reshape(-1)], 0, axis)
    grid = QuantParams(q.scale, zeros, storage, low, high, PerGroup(axis, rows.shape[1]))
    held = graph.constant(np.ascontiguousarray(codes), w.name, grid)
    read = reordered(graph, node, x, rows.reshape(-1), at, known)
    replace_product(graph, node, read, held)


def _range(terms: list[Array]) -> tuple[int, int]:
    """Return the codes that weights have: those of 4 bits where these do."""
    four = DType.INT4
    fits = all(t.min(initial=0) >= four.min and t.max(initial=0) <= four.max for t in terms)
    kind = four if fits else DType.INT8
    return kind.min, kind.max


def _picked(terms: list[Array], axis: int, size: int) -> tuple[Array, Array]:
    """Return which channels each block reads, [blocks, whole], and by which of the terms.

    A channel that fills a block up has the number after the last term.
    """
    others = tuple(i for i in range(terms[0].ndim) if i != axis)
    more = [np.asarray(term.any(axis=others)) for term in terms[1:]]
    picked: list[list[tuple[int, int]]] = []
    for start in range(0, terms[0].shape[axis], size):
        run = range(start, min(start + size, terms[0].shape[axis]))
        again = [(c, 1 + t) for t, wanted in enumerate(more) for c in run if wanted[c]]
        picked.append([*((c, 0) for c in run), *again])
    whole = -(-max(map(len, picked)) // WHOLE_GROUP) * WHOLE_GROUP
    for block in picked:
        block += [(block[0][0], len(terms))] * (whole - len(block))
    both = np.asarray(picked)
    return both[..., 0], both[..., 1]


def reordered(
    graph: Graph,
    node: Node,
    x: Value,
    rows: Array,
    at: int,
    known: Known,
) -> Value:
    """Return the activations in the order that blocks read them; products share what they can."""
    if rows.size == x.shape[at] and (rows == np.arange(rows.size)).all():
        return x
    key = (x, at, rows.tobytes())
    if key not in known:
        shape = (*x.shape[:at], rows.size, *x.shape[at + 1 :])
        known[key] = graph.add(
            "gather",
            [x, graph.constant(rows, f"{x.name}_rows")],
            {"axis": at},
            types=[TensorType(shape, x.dtype, x.qparams)],
            before=node,
            sources=node.sources,
        ).output
    return known[key]
