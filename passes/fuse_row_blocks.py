# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Activations with scales in blocks along what a product sums become products of integers.

The sum over one block has one scale for each row. Before -> after, for codes q of scales S and zero
points Z along blocks of K, in a product by a constant matrix of any scales:

    (S (q - Z)) w  ->  dynamic_matmul(q, w in the same blocks, S) - sum of S (Z - z) sum(w)

where the last term, a constant, stands for zero points that differ from one in all, z. Codes of 16
bits are two products, of their bytes; so are weights. By anything else than a constant matrix:

    x[M, K] w[K, N]  ->  reduce_sum(x[blocks, M, size] w[blocks, size, N], blocks)

whose scales lie along rows and matrices alone: `fuse_scales` moves them behind the product.

Blocks of both sides are cut where either one's scales change, and filled up with zeros to one size.
What selects elements between codes and product (reshape, transpose, slice, gather, expand, tile,
pad with zeros) does the same with their scales. A convolution of such activations becomes a matrix
product first, of patches that are selected likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcompiler.grids import found_grid, varying
from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.ops import EvalContext, op_def
from qcompiler.passes.conv_to_matmul import to_matmul
from qcompiler.passes.free_bias import added_bias
from qcompiler.passes.fuse_moves import adder, params, succeed
from qcompiler.passes.fuse_parts import MOST_PARTS
from qcompiler.passes.fuse_patterns import is_plain
from qcompiler.passes.rewrite import producer_of
from qcompiler.plan import WHOLE_GROUP
from qcompiler.types import Array, DType, PerGroup, QuantParams, TensorType

_EIGHT = (DType.INT8, DType.UINT8)
_SIXTEEN = (DType.INT16, DType.UINT16)
_FOUR = (DType.INT4, DType.UINT4)
_BYTE = 256

IN_ORDER = 32
"""Numbers that reductions add side by side, or blocks that they add in order, on every target."""

_SELECTS = ("reshape", "transpose", "slice", "gather", "expand", "tile", "pad")

Step = Callable[..., Value]

_Move = tuple[str, dict[str, Any], tuple[Value, ...]]
"""Operator, attributes, and the constants after its first operand."""


@dataclass(frozen=True, slots=True)
class _Operand:
    """One side of a matrix product, as the product reads it: [..., M, K] or [..., K, N].

    Attributes:
        held: The codes, before what moves them.
        moves: What makes the operand of the codes.
        apart: Whether the product does not read the dequantized codes as they are.
        scale: The scale of each element, of the operand's shape.
        zero: The zero points, likewise.
        axis: The axis that is summed over.
    """

    held: Value
    moves: tuple[_Move, ...]
    apart: bool
    scale: Array
    zero: Array
    axis: int

    @property
    def changes(self) -> set[int]:
        """Where along K scales or zero points are others than just before."""
        return _changes(self.scale, self.axis) | _changes(self.zero, self.axis)

    def starts(self, a: Array, runs: list[range]) -> Array:
        """Return what `a` has at the start of each block, the axis of blocks last but one."""
        return np.take(a, [run.start for run in runs], axis=self.axis)


Made = dict[tuple[object, ...], tuple[Value, ...]]
"""Codes that products share: by value, moves and blocks."""


def move_row_blocks(graph: Graph) -> bool:
    """Rewrite matrix products whose activations have several scales along what is summed."""
    made: Made = {}
    changed = False
    for node in graph.nodes:
        if node.op.name == "conv" and is_plain(node) and _has_runs(node):
            to_matmul(graph, node)
            changed = True
    if changed:
        graph.eliminate_dead()
        graph.sort()
    for node in graph.nodes:
        if node.op.name != "matmul" or not is_plain(node):
            continue
        x, w = _operand(node, 0), _operand(node, 1)
        if x is None or w is None or x.held.is_constant:
            continue
        changed = _rewritten(graph, node, x, w, made) or changed
    if changed:
        graph.eliminate_dead()
        graph.sort()
    return changed


def _rewritten(graph: Graph, node: Node, x: _Operand, w: _Operand, made: Made) -> bool:
    computed = [v for v in (x, w) if not v.held.is_constant]
    blocks, depth = any(v.changes for v in computed), x.scale.shape[-1]
    # Few matrices in blocks are products of their own (`fuse_parts`).
    count = int(np.prod(w.scale.shape[:-2]))
    blocks |= w.held.is_constant and count > MOST_PARTS and bool(w.changes)
    if not blocks and not any(v.apart and not params(v.held).is_per_tensor for v in computed):
        return False
    cuts = sorted(x.changes | w.changes) if blocks else []
    if len(cuts) + 1 >= depth > 1 and blocks:
        return False  # a scale for each index: no integers are summed
    runs = [range(a, b) for a, b in zip([0, *cuts], [*cuts, depth], strict=True)]
    if blocks and w.held.is_constant and w.scale.ndim == 2 and _has_bytes(x) and _has_bytes(w):
        y = _by_matrix(graph, node, x, w, runs, made)
    else:
        y = _by_blocks(graph, node, x, w, runs)
    last, out = y.producer, node.output
    assert last is not None  # a product, or what adds to one
    graph.replace_node(node, y)
    succeed(last, node, out)
    return True


def _has_bytes(v: _Operand) -> bool:
    """Whether the scales of high bytes are numbers."""
    most = np.finfo(np.float32).max / _BYTE
    return v.held.dtype not in _SIXTEEN or bool((params(v.held).scale <= most).all())


def _has_runs(node: Node) -> bool:
    """Whether scales of a convolution's activations differ in what is summed, but not everywhere.

    Where a few channels each share one, at a position or at all, these are the runs to be summed.
    """
    x, w = node.input(0), node.input(1)
    if node.attr("layout") != "NCHW" or not (w.is_constant or producer_of(w, "dequantize")):
        return False
    found = _tracked(x, ())
    if found is None or found[0].is_constant or params(found[0]).is_per_tensor:
        return False
    each = x.shape[1] // int(node.attr("group"))
    cuts: set[int] = set()
    summed = False
    for a in found[2:]:
        apart = a.reshape(x.shape[0], -1, each, *x.shape[2:])
        summed |= any(axis >= 2 for axis in varying(apart))  # channels of a group, or positions
        cuts |= _changes(apart, 2)
    return summed and len(cuts) + 1 < each


def _changes(a: Array, axis: int) -> set[int]:
    """Return where along an axis numbers are others than just before."""
    along = np.moveaxis(a, axis, 0)
    differ = (along[1:] != along[:-1]).any(axis=tuple(range(1, along.ndim)))
    return {int(k) + 1 for k in np.flatnonzero(differ)}


def _operand(node: Node, at: int) -> _Operand | None:
    """Return an operand of a matrix product that comes from codes, or None."""
    v = node.input(at)
    rank = v.type.rank
    if rank < 2:
        return None
    turned: tuple[_Move, ...] = ()
    if node.attr("transpose_b" if at else "transpose_a"):
        turned = (("transpose", {"perm": (*range(rank - 2), rank - 1, rank - 2)}, ()),)
    found = _tracked(v, turned)
    if found is None:
        return None
    held, moves, scale, zero = found
    apart = len(moves) > len(turned)
    return _Operand(held, moves, apart, scale, zero, rank - 2 if at else rank - 1)


def _tracked(
    v: Value, last: tuple[_Move, ...]
) -> tuple[Value, tuple[_Move, ...], Array, Array] | None:
    """Return the codes that reals come from, what moves them, and scale and zero of each real."""
    if 0 in v.shape:
        return None
    moves: list[_Move] = []
    while (made := v.producer) is not None and made.op.name in _SELECTS:
        rest = tuple(made.operands[1:])
        if any(not other.is_constant for other in rest):
            return None
        if made.op.name == "pad" and (made.attr("mode") != "constant" or made.attr("value") != 0):
            return None
        moves.append((made.op.name, dict(made.attrs), rest))
        v = made.input(0)
    if made is None or made.op.name != "dequantize":
        return None
    held, every = made.input(0), (*reversed(moves), *last)
    if held.is_constant and any(name == "pad" for name, _, _ in every):
        return None
    if held.dtype not in (*_EIGHT, *_SIXTEEN, *(_FOUR if held.is_constant else ())):
        return None
    if 0 in held.shape:
        return None
    scale, zero = (np.broadcast_to(a, held.shape) for a in expanded(params(held), held.shape))
    # Padding is a code of real 0, whatever its scale: that of the others, where there is one.
    fill = float(scale.reshape(-1)[0]), _middle(params(held))
    scale, zero = (_moved(a, every, n) for a, n in zip((scale, zero), fill, strict=True))
    return held, every, scale, zero.astype(np.int32)


def _middle(q: QuantParams) -> int:
    """Return the zero point that codes get which have several."""
    return int(np.clip(np.median(q.zero_point), q.storage.min, q.storage.max))


def _moved(a: Array, moves: Sequence[_Move], fill: float = 0) -> Array:
    """Return numbers that stand for the elements of a tensor where these are moved to."""
    for name, attrs, rest in moves:
        op = op_def(name)
        attrs = {**attrs, "value": fill} if name == "pad" else attrs
        types = (TensorType(a.shape, DType.of(a.dtype)), *(v.type for v in rest))
        arrays = [a, *(v.array() for v in rest)]
        a = np.asarray(op.evaluate(arrays, attrs, EvalContext(types, op.infer(types, attrs)))[0])
    return a


def _reals(v: _Operand, step: Step) -> Value:
    """Return what an operand's codes are made of, or stand for, where the product is."""
    made = v.held.producer
    quantized = made is not None and made.op.name == "quantize"
    x = made.input(0) if made is not None and quantized else step("dequantize", v.held)
    for op, attrs, rest in v.moves:
        x = step(op, x, *rest, **attrs)
    return x


def _whole(runs: list[range], unit: int) -> int:
    """Return the one size of all blocks, of whole units."""
    return -(-max(map(len, runs)) // unit) * unit


def _picked(runs: list[range], size: int, nothing: int) -> Array:
    """Return which index of K each index of the filled blocks holds; `nothing` where none."""
    picked = np.full((len(runs), size), nothing)
    for row, run in zip(picked, runs, strict=True):
        row[: len(run)] = run
    return picked.reshape(-1)


def _taken(graph: Graph, step: Step, x: Value, axis: int, picked: Array) -> Value:
    """Return reals in the order of filled blocks; zeros where nothing is picked (index K)."""
    depth = x.shape[axis]
    in_place = (picked[:depth] == np.arange(depth)).all() and (picked[depth:] == depth).all()
    more = picked.size - depth if in_place else int((picked == depth).any())
    if more:
        ends = [0] * x.type.rank
        ends[axis] = more
        x = step("pad", x, pads=(*[0] * x.type.rank, *ends))
    if in_place:
        return x
    return step("gather", x, graph.constant(picked, f"{x.name}_blocks"), axis=axis)


# ------------------------------------------------------------------------ by a constant matrix


def _by_matrix(
    graph: Graph, node: Node, x: _Operand, w: _Operand, runs: list[range], made: Made
) -> Value:
    """Return the product by a constant matrix: sums of blocks, scaled, in the order of K."""
    size = _whole(runs, WHOLE_GROUP)
    own = x.starts(x.scale, runs).astype(np.float32)
    zeros = x.starts(x.zero, runs).astype(np.int64)
    zero = _middle(params(x.held))
    shift = zeros - zero
    parts = _codes(graph, node, x, runs, size, zero, made)
    weights, total = _weights(w, runs, size)
    y: Value | None = None
    if shift.any():
        off = -((own.astype(np.float64) * shift) @ total)
        y = graph.constant(
            np.broadcast_to(off, node.output.shape).astype(np.float32), f"{node.output.name}_zero"
        )
    bias, reals = node.optional(2), None
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
        reals = np.broadcast_to(reals, node.output.shape[-1:]).astype(np.float32)
    for a, factor in zip(parts, (1,) if len(parts) == 1 else (_BYTE, 1), strict=True):
        scale = graph.constant(
            np.ascontiguousarray(own * np.float32(factor)), f"{node.output.name}_scale"
        )
        for codes, grid in weights:
            held = graph.constant(codes, w.held.name, grid)
            last = a is parts[-1] and grid is weights[-1][1]
            added = graph.constant(reals, f"{node.output.name}_bias") if (
                last and reals is not None) else None  # fmt: skip
            y = graph.add(
                "dynamic_matmul", [a, held, scale, added, y], before=node, sources=node.sources
            ).output
    assert y is not None  # there are parts
    return y


def _codes(
    graph: Graph, node: Node, x: _Operand, runs: list[range], size: int, zero: int, made: Made
) -> tuple[Value, ...]:
    """Return the codes in filled blocks, on a grid of scale 1 and one zero point, by bytes."""
    moves = tuple((name, str(attrs), rest) for name, attrs, rest in x.moves)
    key = (x.held, moves, tuple(runs), size)
    if key in made:
        return made[key]
    step = adder(graph, node)
    q, count = params(x.held), len(runs)
    depth = x.scale.shape[-1]

    def grid(real: Value, scale: Array, zeros: Array) -> tuple[Value, ...]:
        """Codes of reals on the grid of scale 1, by bytes."""
        real = step("div", real, graph.constant(scale.astype(np.float32), f"{x.held.name}_scale"))
        if (zeros != zero).any():
            off = graph.constant((zeros - zero).astype(np.float32), f"{x.held.name}_zero")
            real = step("add", step("round", real), off)
        return _bytes(graph, node, real, q, zero)

    if x.scale.size > 2 * x.held.type.size:  # as patches are: it is codes that are moved
        source = _reals(replace(x, moves=()), step)
        parts = grid(source, *(np.broadcast_to(a, x.held.shape) for a in expanded(q, x.held.shape)))
        picked = _picked(runs, size, depth)
        for op, attrs, rest in x.moves:
            parts = tuple(step(op, v, *rest, **attrs) for v in parts)
        made[key] = tuple(_taken(graph, step, v, x.axis, picked) for v in parts)
        return made[key]
    # What fills a block is multiplied by nothing. Codes are less to move than reals.
    even = all(len(run) == len(runs[0]) for run in runs[:-1]) and len(runs[-1]) <= len(runs[0])
    held = len(runs[0]) if even else size
    real = _taken(graph, step, _reals(x, step), x.axis, _picked(runs, held, depth))
    # A scale for each block, not for each number.
    real = step("reshape", real, shape=(*real.shape[:-1], count, held))
    parts = grid(real, *(_least(x.starts(a, runs))[..., None] for a in (x.scale, x.zero)))
    if size > held:
        ends = (*[0] * (2 * real.type.rank - 1), size - held)
        parts = tuple(step("pad", v, pads=ends) for v in parts)
    flat = (*real.shape[:-2], count * size)
    made[key] = tuple(step("reshape", v, shape=flat) for v in parts)
    return made[key]


def _bytes(graph: Graph, node: Node, real: Value, q: QuantParams, zero: int) -> tuple[Value, ...]:
    """Return reals of scale 1 as codes of a storage around one zero point; of 16 bits, as two."""
    step = adder(graph, node)

    def quantized(v: Value, storage: DType, zero: int, qmin: int, qmax: int) -> Value:
        grid = QuantParams(np.float32(1), np.int32(zero), storage, qmin, qmax)
        types = [TensorType(v.shape, storage, grid)]
        return graph.add("quantize", [v], types=types, before=node, sources=node.sources).output

    codes = quantized(real, q.storage, zero, q.qmin, q.qmax)
    if q.storage not in _SIXTEEN:
        return (codes,)
    upper = DType.INT8 if q.storage is DType.INT16 else DType.UINT8
    low_zero = zero & (_BYTE - 1)

    def number(value: float) -> Value:
        return graph.constant(np.asarray(value, np.float32), f"{codes.name}_byte")

    whole = step("dequantize", codes)  # q - z, exact
    above = step("add", whole, number(low_zero)) if low_zero else whole
    high = step("floor", step("mul", above, number(1 / _BYTE)))
    low = step("sub", whole, step("mul", high, number(_BYTE)))
    return (
        quantized(high, upper, zero >> 8, upper.min, upper.max),
        quantized(low, DType.UINT8, low_zero, 0, _BYTE - 1),
    )


def _least(a: Array) -> Array:
    """Return a tensor that broadcasts to the same one, whole along its last axis."""
    axes = (*varying(a), a.ndim - 1)
    return a[tuple(slice(None) if i in axes else slice(0, 1) for i in range(a.ndim))]


def _weights(
    w: _Operand, runs: list[range], size: int
) -> tuple[list[tuple[Array, QuantParams]], Array]:
    """Return int8 matrices in filled blocks, by bytes, and the sum of each block and column."""
    scale = w.starts(w.scale, runs).astype(np.float32)
    zero = w.starts(w.zero, runs).astype(np.int32)
    codes = _moved(w.held.array(), w.moves).astype(np.int32)
    nothing = codes.shape[0]
    picked = _picked(runs, size, nothing)
    filled = np.take(codes, np.minimum(picked, nothing - 1), axis=0)
    each = np.repeat(zero, size, axis=0)
    filled = np.where((picked == nothing)[:, None], each, filled)
    around = (filled - each).astype(np.float64).reshape(len(runs), size, -1).sum(axis=1)
    total = scale.astype(np.float64) * around
    storage, by = w.held.dtype, PerGroup(0, size)

    def part(
        data: Array, scale: Array, zero: Array, shift: int, kind: DType
    ) -> tuple[Array, QuantParams]:
        grid = QuantParams(scale, zero - shift, DType.INT8, kind.min, kind.max, by)
        return np.ascontiguousarray(data - shift).astype(np.int8), grid

    if storage not in _SIXTEEN:
        kind = DType.INT4 if storage in _FOUR else DType.INT8
        return [part(filled, scale, zero, storage.min - kind.min, kind)], total
    top = 0 if storage is DType.INT16 else 128
    wide, mask, kind = scale * np.float32(_BYTE), _BYTE - 1, DType.INT8
    return [
        part(filled >> 8, wide, zero >> 8, top, kind),
        part(filled & mask, scale, zero & mask, 128, kind),
    ], total


# ------------------------------------------------------------------------- by anything else


def _by_blocks(graph: Graph, node: Node, x: _Operand, w: _Operand, runs: list[range]) -> Value:
    """Return the sum of the products of blocks: of one, the product itself."""
    step, size = adder(graph, node), _whole(runs, 1)
    left, right = (_cut(graph, node, v, runs, size) for v in (x, w))
    y = step("matmul", left, right)
    if len(runs) > 1:
        y = _summed(y, y.type.rank - 3, step)
    bias = node.optional(2)
    if bias is not None:
        reals = known(bias)
        assert reals is not None  # `is_plain` looked
        y = added_bias(graph, node, y, graph.constant(reals, bias.name))
    return y


def _summed(y: Value, axis: int, step: Step) -> Value:
    """Return the sum of matrices in their order, which reductions of few numbers need not keep."""
    numbers = y.shape[axis + 1] * y.shape[axis + 2]
    if numbers >= IN_ORDER or (numbers > 1 and y.shape[axis] < IN_ORDER):
        return step("reduce_sum", y, axes=(axis,), keepdims=False)
    total: Value | None = None
    for start in range(y.shape[axis]):
        one = step("slice", y, starts=(start,), ends=(start + 1,), axes=(axis,), steps=(1,))
        total = one if total is None else step("add", total, one)
    assert total is not None  # there are blocks
    return step("reshape", total, shape=(*y.shape[:axis], 1, 1))


def _cut(graph: Graph, node: Node, v: _Operand, runs: list[range], size: int) -> Value:
    """Return an operand with an axis of blocks before its matrices, dequantized."""
    step, q, axis = adder(graph, node), params(v.held), v.axis
    shape, count = v.scale.shape, len(runs)
    picked = _picked(runs, size, shape[axis])
    split = (*shape[:axis], count, size, *shape[axis + 1 :])
    order = tuple(range(len(split)))
    if axis == len(shape) - 1:  # [..., M, blocks, size] -> [..., blocks, M, size]
        order = (*order[:-3], order[-2], order[-3], order[-1])

    def cut(a: Array) -> Array:
        if count == 1:
            return a
        every = np.repeat(v.starts(a, runs), size, axis=axis)
        return np.asarray(every.reshape(split).transpose(order))

    by, scale, zero = found_grid(cut(v.scale), cut(v.zero))
    grid = QuantParams(scale, zero, q.storage, q.qmin, q.qmax, by)
    if v.held.is_constant:
        codes = _moved(v.held.array(), v.moves)
        if count > 1:
            points = np.repeat(v.starts(v.zero, runs), size, axis=axis)
            taken = np.take(codes, np.minimum(picked, shape[axis] - 1), axis=axis)
            empty = (picked == shape[axis]).reshape(
                tuple(-1 if i == axis else 1 for i in range(len(shape)))
            )
            codes = np.where(empty, points, taken).astype(codes.dtype)
            codes = codes.reshape(split).transpose(order)
        held = graph.constant(np.ascontiguousarray(codes), v.held.name, grid)
        return step("dequantize", held)
    real = _reals(v, step)
    if count > 1:
        real = step("reshape", _taken(graph, step, real, axis, picked), shape=split)
        if order != tuple(range(len(split))):
            real = step("transpose", real, perm=order)
    types = [TensorType(real.shape, q.storage, grid)]
    codes_ = graph.add("quantize", [real], types=types, before=node, sources=node.sources)
    return step("dequantize", codes_.output)


__all__ = ["move_row_blocks"]
