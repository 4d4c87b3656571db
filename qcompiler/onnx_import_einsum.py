# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Converters of Einsum and OneHot: index notation in terms of matrix products and comparisons.

An Einsum of several operands is taken two at a time from the left. Of two operands, an index that
both have is contracted if nothing needs it afterwards, else it is a batch index:

    batch.. rows.. contracted..  @  batch.. contracted.. columns..  ->  batch.. rows.. columns..
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from qcompiler.errors import ShapeError
from qcompiler.ir import Value
from qcompiler.onnx_import_context import (
    OpContext,
    check_folded_size,
    converter,
    normal_axis,
    reshape,
)

Results = Sequence[Value] | None


@converter("Einsum")
def _einsum(ctx: OpContext) -> Results:
    text = "".join(str(ctx.attr("equation", "")).split())
    left, arrow, out = text.partition("->")
    terms = left.split(",")
    operands = [ctx.input(i) for i in range(len(ctx.inputs))]
    if "." in text or any(len(set(t)) != len(t) for t in (*terms, out)):
        return None  # "..." and diagonals stay with TVM
    if len(terms) != len(operands):
        raise ShapeError(f"equation {text!r} is about {len(terms)} operands, got {len(operands)}")
    extents: dict[str, int] = {}
    for term, v in zip(terms, operands, strict=True):
        if len(term) != v.type.rank:
            raise ShapeError(f"term {term!r} of {text!r} does not fit shape {list(v.shape)}")
        for label, extent in zip(term, v.shape, strict=True):
            if extents.setdefault(label, extent) != extent:
                raise ShapeError(
                    f"index {label!r} of {text!r} is {extents[label]} and {extent} long"
                )
    if not arrow:
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if not set(out) <= set(extents):
        raise ShapeError(f"the result of {text!r} has an index that no operand has")
    y, labels = operands[0], terms[0]
    for i in range(1, len(terms)):
        needed = set(out).union(*terms[i + 1 :])
        y, labels = _pair(ctx, (y, labels), (operands[i], terms[i]), needed, extents)
    y, labels = _summed(ctx, y, labels, set(out))
    return [_ordered(ctx, y, labels, out)]


def _pair(
    ctx: OpContext,
    first: tuple[Value, str],
    second: tuple[Value, str],
    needed: set[str],
    extents: dict[str, int],
) -> tuple[Value, str]:
    """Contract two operands; return the result and its indices."""
    a, la = _summed(ctx, *first, needed | set(second[1]))
    b, lb = _summed(ctx, *second, needed | set(la))
    batch = "".join(c for c in la if c in lb and c in needed)
    inner = "".join(c for c in la if c in lb and c not in needed)
    rows = "".join(c for c in la if c not in lb)
    columns = "".join(c for c in lb if c not in la)

    def sizes(labels: str) -> list[int]:
        return [extents[c] for c in labels]

    a = _ordered(ctx, a, la, batch + rows + inner)
    b = _ordered(ctx, b, lb, batch + inner + columns)
    result = batch + rows + columns
    if not inner:
        a = reshape(ctx, a, [*sizes(batch + rows), *[1] * len(columns)])
        b = reshape(ctx, b, [*sizes(batch), *[1] * len(rows), *sizes(columns)])
        return ctx.emit("mul", a, b), result
    k, m, n = (math.prod(sizes(c)) for c in (inner, rows, columns))
    # Against one matrix the rows may keep their axes.
    head = sizes(rows) if rows and not batch else [*sizes(batch), m]
    a = reshape(ctx, a, [*head, k])
    b = reshape(ctx, b, [*sizes(batch), k, n])
    return reshape(ctx, ctx.emit("matmul", a, b), sizes(result)), result


def _summed(ctx: OpContext, v: Value, labels: str, needed: set[str]) -> tuple[Value, str]:
    """Sum over the indices that nothing needs."""
    axes = tuple(i for i, c in enumerate(labels) if c not in needed)
    if not axes:
        return v, labels
    kept = "".join(c for c in labels if c in needed)
    return ctx.emit("reduce_sum", v, axes=axes, keepdims=False), kept


def _ordered(ctx: OpContext, v: Value, labels: str, wanted: str) -> Value:
    if labels == wanted:
        return v
    return ctx.emit("transpose", v, perm=tuple(labels.index(c) for c in wanted))


@converter("OneHot")
def _one_hot(ctx: OpContext) -> Results:
    """where(index == 0..depth-1, on, off); negative indices count from the end."""
    x = ctx.input(0)
    depth = int(ctx.static(1, "depth").reshape(-1)[0])
    values = ctx.input(2)
    off, on = (
        reshape(ctx, ctx.emit("gather", values, ctx.constant(np.array([i])), axis=0), ())
        for i in range(2)
    )
    axis = normal_axis(int(ctx.attr("axis", -1)), x.type.rank + 1)
    x = reshape(ctx, x, (*x.shape[:axis], 1, *x.shape[axis:]))
    check_folded_size((depth,), x.dtype, "OneHot: the list of classes")
    end = ctx.scalar(depth, x)
    x = ctx.emit("where", ctx.emit("less", x, ctx.scalar(0, x)), ctx.emit("add", x, end), x)
    classes = np.arange(depth, dtype=x.dtype.numpy)
    classes = classes.reshape(-1, *[1] * (x.type.rank - 1 - axis))
    return [ctx.emit("where", ctx.emit("equal", x, ctx.constant(classes)), on, off)]
