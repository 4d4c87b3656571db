# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Graphs whose extents may be partly used: which axes follow a symbol, and what mixes along them.

A model imported at two sizes gives two graphs of the same nodes; the extents that differ are the
ones that follow a symbol. A graph compiled for size S then serves every n <= S, its inputs filled
up with zeros, if nothing that is kept depends on the filling. Most operators treat the indices of
an axis apart. Those that mix them get their operand masked: softmax and maxima see -1e30 in the
filling (its exponential is exactly 0), sums, products and convolutions see 0. Whatever is left is
refused by name. So every kept integer is the one that the graph of size n computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np

from qcompiler.errors import UnsupportedOpError
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.ops.recurrent import operand_index
from qcompiler.types import DType, TensorType

FILL = -1e30
"""What `tail` holds beyond the used part: float32 sums with it are equal to it, and its exponential
after subtracting any used score is 0."""

_ZERO_SUMS = frozenset({"reduce_sum", "reduce_l1", "reduce_l2", "reduce_sum_square"})
_IMAGES = frozenset({"conv", "max_pool", "average_pool"})
_SAMPLES = frozenset({"conv_transpose", "resize", "depth_to_space", "space_to_depth",
                      "instance_norm"})  # fmt: skip
"""Operators that treat the indices of axis 0 apart, and mix those of the others."""


@dataclass(frozen=True, slots=True)
class Extents:
    """Sizes of the symbols that one graph was imported with.

    Attributes:
        sizes: Symbol -> extent.
    """

    sizes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Merged:
    """A symbol whose extent is merged with others into one axis, as rows of all samples are.

    Attributes:
        symbol: The symbol.
        count: Extent of the axis by the size of the symbol.
        inner: Neighbours along the axis that belong to one index of the symbol; 0: not known.
    """

    symbol: str
    count: int
    inner: int = 0


Follows = str | Merged
"""What an axis follows: a symbol itself, or one among others in the same axis."""


@dataclass
class DynamicAxes:
    """Which axes of which values follow a symbol.

    Attributes:
        axes: Value -> axis -> what it follows.
    """

    axes: dict[Value, dict[int, Follows]] = field(default_factory=dict)

    def of(self, value: Value | None) -> dict[int, Follows]:
        """Return the axes of a value that follow a symbol."""
        return {} if value is None else self.axes.get(value, {})

    def whole(self, value: Value) -> dict[int, str]:
        """Return the axes of a value that follow a symbol by themselves."""
        return {a: s for a, s in self.of(value).items() if isinstance(s, str)}

    def strides(self, value: Value) -> list[tuple[str, int]]:
        """Return for each axis that follows a symbol: elements from one index to the next."""
        return sorted(
            (s, prod(value.shape[axis + 1 :]))
            if isinstance(s, str)
            else (s.symbol, prod(value.shape[axis + 1 :]) * s.inner)
            for axis, s in self.of(value).items()
        )


def dynamic_axes(
    graph: Graph, sizes: Mapping[str, int], other: Graph, others: Mapping[str, int]
) -> DynamicAxes:
    """Compare a graph with the same model at other sizes.

    Args:
        graph: FLOAT graph at `sizes`.
        sizes: Extent of every symbol.
        other: FLOAT graph at `others`.
        others: Another extent of every symbol; no two symbols have equal pairs.

    Raises:
        UnsupportedOpError: The graphs differ in more than extents.
    """
    problems: list[str] = []
    if [n.name for n in graph.nodes] != [n.name for n in other.nodes] or any(
        a.op is not b.op or len(a.inputs) != len(b.inputs)
        for a, b in zip(graph.nodes, other.nodes, strict=True)
    ):
        raise UnsupportedOpError(
            "the model computes by other operators at other sizes, so no range of sizes fits it",
            hint="compile it for one size",
        )
    pairs = {(sizes[s], others[s]): s for s in sizes}
    found = DynamicAxes()

    def compare(a: Value, b: Value, where: str) -> None:
        if a in found.axes:
            return
        axes: dict[int, Follows] = {}
        found.axes[a] = axes
        if len(a.shape) != len(b.shape):
            problems.append(f"{where}: its rank depends on the size")
            return
        for axis, extents in enumerate(zip(a.shape, b.shape, strict=True)):
            if extents[0] == extents[1]:
                continue
            symbol = pairs.get(extents)
            times = [Merged(s, extents[0] // n) for (n, m), s in pairs.items()
                     if extents[0] * m == extents[1] * n and extents[0] % n == 0]  # fmt: skip
            if symbol is not None:
                axes[axis] = symbol
            elif len(times) == 1 and a.producer is not None:
                axes[axis] = times[0]
            else:
                problems.append(f"{where}: extent {extents[0]} is not the size itself")
        if a.is_constant and b.is_constant:
            shared = tuple(slice(min(p)) for p in zip(a.shape, b.shape, strict=True))
            if not np.array_equal(a.array()[shared], b.array()[shared], equal_nan=_nan(a)):
                problems.append(f"{where}: a constant in it depends on the size")

    for x, y in zip(graph.inputs, other.inputs, strict=True):
        compare(x, y, f"input {x.name!r}")
    for n, m in zip(graph.nodes, other.nodes, strict=True):
        where = f"{n.op.name} ({n.name!r})"
        for p, q in zip(n.inputs, m.inputs, strict=True):
            if (p is None) != (q is None):
                problems.append(f"{where}: it has other operands at other sizes")
            elif p is not None and q is not None:
                compare(p, q, where)
        for p, q in zip(n.outputs, m.outputs, strict=True):
            compare(p, q, where)
            for axis, follows in found.of(p).items():
                if isinstance(follows, Merged):
                    found.axes[p][axis] = _merged_by(n, p, axis, follows, found)
                    if found.axes[p][axis] == follows:
                        problems.append(f"{where}: extent {p.shape[axis]} is not the size itself")
        if not _same_attrs(n, m, found):
            problems.append(f"{where}: it picks its elements by the size")
    _refuse(problems)
    return found


def _merged_by(node: Node, out: Value, axis: int, follows: Merged, found: DynamicAxes) -> Merged:
    """Return how a symbol lies in an axis of a result; as given where that is not known."""
    if node.op.name == "reshape":
        inner = prod(out.shape[axis + 1 :])
        strides = {d for s, d in found.strides(node.input(0)) if s == follows.symbol}
        if len(strides) != 1:
            return follows
        stride = strides.pop()
        fits = stride % inner == 0 and follows.count % (stride // inner or 1) == 0
        return replace(follows, inner=stride // inner) if fits else follows
    read = {
        s
        for v in node.operands
        for s in found.of(v).values()
        if isinstance(s, Merged) and (s.symbol, s.count) == (follows.symbol, follows.count)
    }
    return read.pop() if len(read) == 1 else follows


def _nan(value: Value) -> bool:
    return value.dtype.is_float


def _same_attrs(a: Node, b: Node, found: DynamicAxes) -> bool:
    """Whether attributes agree, but for those that only say the extents of the result."""
    free = {"shape"} if a.op.name in ("reshape", "expand", "resize") else set()
    if a.op.name == "slice":
        # An end at the very end of a dynamic axis says "all of it".
        axes = a.attr("axes")
        ends = [
            e == f or (axis in found.of(a.input(0)) and e == a.input(0).shape[axis])
            for axis, e, f in zip(axes, a.attr("ends"), b.attr("ends"), strict=True)
        ]
        if not all(ends):
            return False
        free = {"ends"}
    return all(a.attr(name) == b.attr(name) for name in a.op.attrs if name not in free)


def _refuse(problems: list[str]) -> None:
    if problems:
        listed = "".join(f"\n  {p}" for p in dict.fromkeys(problems))
        raise UnsupportedOpError(
            f"the model cannot serve a range of sizes because of:{listed}",
            hint="compile it for one size, or give the extent a fixed value; a batch needs no "
            "range: calls take any number of samples",
        )


class _Masking:
    """One run of `mask_tails`."""

    def __init__(self, graph: Graph, dynamic: DynamicAxes, least: Mapping[str, int]) -> None:
        self.graph = graph
        self.dynamic = dynamic
        self.least = least
        self.problems: list[str] = []
        self.tails: dict[str, Value] = {}
        self.masked: dict[tuple[Value, int], Value] = {}
        self.raised: set[Node] = set()

    def tail(self, symbol: str, size: int) -> Value:
        """Return the input that says which part of the symbol's extent is in use."""
        if symbol not in self.tails:
            type = TensorType((size,), DType.FLOAT32)
            self.tails[symbol] = self.graph.add_input(self.graph.fresh(f"tail_{symbol}"), type)
        return self.tails[symbol]

    def known(self, symbol: Follows) -> int:
        """Return how many indices of an axis every size has."""
        return self.least[symbol] if isinstance(symbol, str) else 0

    def alone(self, node: Node, value: Value, axis: int) -> str | None:
        """Return the symbol that an axis follows by itself; else note that it must be masked."""
        symbol = self.dynamic.of(value)[axis]
        if isinstance(symbol, str):
            return symbol
        self.fail(node, "it mixes an extent that is merged with another one")
        return None

    def fail(self, node: Node, why: str) -> None:
        """Note what stands in the way."""
        self.problems.append(f"{node.op.name} ({node.name!r}): {why}")

    def run(self) -> None:
        for node in self.graph.nodes:
            if any(self.dynamic.of(v) for v in (*node.operands, *node.outputs)):
                self.visit(node)
        _refuse(self.problems)
        self.graph.sort()

    def visit(self, node: Node) -> None:
        """Check a node that touches a dynamic axis; mask what it mixes."""
        name, kind = node.op.name, node.op.kind
        if kind in (OpKind.UNARY, OpKind.BINARY, OpKind.CAST) or name == "where":
            self.elementwise(node)
        elif name == "matmul":
            self.matmul(node)
        elif name in _IMAGES:
            self.image(node)
        elif name.startswith("reduce_"):
            self.reduction(node)
        elif name in ("softmax", "log_softmax", "argmax"):
            axis = int(node.attr("axis")) % node.input(0).type.rank
            if axis in self.dynamic.of(node.input(0)):
                self.raise_tail(node, axis)
        elif name == "layer_norm":
            first = int(node.attr("axis")) % node.input(0).type.rank
            if any(axis >= first for axis in self.dynamic.of(node.input(0))):
                self.fail(node, "it normalizes over the extent")
        elif kind is OpKind.RECURRENT:
            self.recurrent(node)
        elif name in ("transpose", "reshape", "expand", "slice", "split", "concat", "pad", "tile",
                      "gather", "cumsum"):  # fmt: skip
            self.movement(node)
        elif name in _SAMPLES and self.follows_samples(node):
            pass
        else:
            self.fail(node, "it is not known to treat the indices of the extent apart")

    # ------------------------------------------------------------------------- operators

    def follows_samples(self, node: Node) -> bool:
        """Whether axis 0 of the first operand and of the result is all that follows a symbol."""
        x, out, of = node.input(0), node.output, self.dynamic.of
        return set(of(x)) == {0} and of(out) == of(x) and not any(map(of, node.operands[1:]))

    def elementwise(self, node: Node) -> None:
        out = node.output
        for v in node.operands:
            shift = out.type.rank - v.type.rank
            for axis, symbol in self.dynamic.of(v).items():
                if self.dynamic.of(out).get(axis + shift) != symbol:
                    self.fail(node, "it combines different extents")

    def matmul(self, node: Node) -> None:
        a, b = node.input(0), node.input(1)
        ta, tb = bool(node.attr("transpose_a")), bool(node.attr("transpose_b"))
        inner_a = a.type.rank - (2 if ta and a.type.rank > 1 else 1)
        inner_b = b.type.rank - (1 if tb or b.type.rank == 1 else 2)
        symbol = self.dynamic.of(a).get(inner_a)
        if symbol is None and inner_b not in self.dynamic.of(b):
            return
        if symbol is None or self.dynamic.of(b).get(inner_b) != symbol:
            self.fail(node, "it sums over an extent that only one operand has")
        elif not (self.zero_tail(a, inner_a) or self.zero_tail(b, inner_b)):
            self.mask(node, 0, inner_a)

    def image(self, node: Node) -> None:
        x, out = node.input(0), node.output
        for axis, symbol in self.dynamic.of(x).items():
            if axis == 0:
                continue
            if axis == 1 or self.dynamic.of(out).get(axis) != symbol:
                self.fail(node, "the extent is not that of its result")
                continue
            conv = node.op.name == "conv"
            if (node.input(1).shape[axis] if conv else node.attr("kernel")[axis - 2]) == 1:
                continue
            if not conv:
                self.fail(node, "its windows reach over the end of the extent")
            else:
                self.mask(node, 0, axis)
        if node.op.name == "conv" and self.dynamic.of(node.input(1)):
            self.fail(node, "its weights follow the extent")

    def reduction(self, node: Node) -> None:
        x, name = node.input(0), node.op.name
        over = {int(a) % x.type.rank for a in node.attr("axes")}
        axes = [a for a in self.dynamic.of(x) if a in over]
        for axis in axes:
            if name in _ZERO_SUMS:
                if not self.zero_tail(x, axis):
                    self.mask(node, 0, axis)
            elif name == "reduce_max":
                self.raise_tail(node, axis)
            elif name == "reduce_mean" and len(axes) == 1:
                self.mean(node, axis)
            else:
                self.fail(node, "it reduces the extent in a way that has no masked form")

    def mean(self, node: Node, axis: int) -> None:
        """Turn a mean into the sum of the used part, by the number of its elements."""
        graph, x = self.graph, node.input(0)
        symbol = self.alone(node, x, axis)
        if symbol is None:
            return
        tail = self.tail(symbol, x.shape[axis])
        over = [int(a) % x.type.rank for a in node.attr("axes")]
        rest = prod(x.shape[a] for a in over if a != axis)
        count = self.count(node, tail)
        if rest != 1:
            scale = graph.constant(np.float32(rest), f"{node.name}_rest")
            count = graph.add("mul", [count, scale], name=f"{node.name}_elements").output
        self.mask(node, 0, axis)
        attrs = {"axes": node.attr("axes"), "keepdims": node.attr("keepdims")}
        total = graph.add("reduce_sum", [node.input(0)], attrs, name=f"{node.name}_sum").output
        new = graph.add("div", [total, count], name=f"{node.name}_by_count")
        self.dynamic.axes[new.output] = self.dynamic.of(node.output)
        old = node.output
        new.sources = node.sources
        graph.replace_node(node, new.output)
        new.output.name = old.name

    def count(self, node: Node, tail: Value) -> Value:
        """Return how much of an extent is in use, as a float32 scalar."""
        graph = self.graph
        zero = graph.constant(np.float32(0.0), f"{node.name}_zero")
        used = graph.add("equal", [tail, zero], name=f"{node.name}_used").output
        ones = graph.add("cast", [used], {"to": DType.FLOAT32.value}, name=f"{node.name}_ones")
        return graph.add("reduce_sum", [ones.output], {"axes": (0,), "keepdims": False},
                         name=f"{node.name}_count").output  # fmt: skip

    def recurrent(self, node: Node) -> None:
        """Let the loop over time end with the used part: its lengths say where."""
        graph, gates = self.graph, node.input(0)
        axes, y = self.dynamic.of(gates), node.outputs[0]
        if 2 in axes or self.dynamic.of(node.input(1)):
            self.fail(node, "its width follows the extent")
            return
        if self.dynamic.of(y) != axes:
            self.fail(node, "it combines different extents")
            return
        at = operand_index(node.op.name, "lens")
        if 0 not in axes or node.optional(at) is not None:
            return  # lengths that are given end within the used part
        symbol = self.alone(node, gates, 0)
        if symbol is None:
            return
        count = self.count(node, self.tail(symbol, gates.shape[0]))
        whole = graph.add("cast", [count], {"to": DType.INT32.value}, name=f"{node.name}_steps")
        shape = (gates.shape[1],)
        lens = graph.add("expand", [whole.output], {"shape": shape}, name=f"{node.name}_lens")
        inputs: list[Value | None] = [*node.inputs, *[None] * (at + 1 - len(node.inputs))]
        inputs[at] = lens.output
        new = graph.add(node.op.name, inputs, node.attrs, before=node, sources=node.sources)
        names = [v.name for v in node.outputs]
        for old, value in zip(node.outputs, new.outputs, strict=True):
            self.dynamic.axes[value] = self.dynamic.of(old)
            graph.replace_uses(old, value)
        graph.erase(node)
        new.name = node.name
        for value, name in zip(new.outputs, names, strict=True):
            value.name = name

    def movement(self, node: Node) -> None:
        x, name = node.input(0), node.op.name
        if name == "reshape":
            self.reshape(node)
        elif name == "gather":
            axis = int(node.attr("axis")) % x.type.rank
            index = node.input(1)
            symbol = self.dynamic.of(x).get(axis)
            if symbol is None:
                return
            picks = index.array() if index.is_constant else None
            if picks is None or picks.min() < 0 or picks.max() >= self.known(symbol):
                self.fail(node, "it reads the extent at places that small sizes do not have")
        elif name in ("concat", "split", "cumsum"):
            axis = int(node.attr("axis")) % x.type.rank
            if any(axis in self.dynamic.of(v) for v in node.operands) and (
                name != "cumsum" or node.attr("reverse")
            ):
                self.fail(node, "it works along the extent")
        elif name == "slice":
            self.slice(node)
        elif name in ("pad", "tile"):
            amounts = node.attr("pads" if name == "pad" else "repeats")
            rank, none = x.type.rank, 0 if name == "pad" else 1
            if any(amounts[i] != none for i in range(len(amounts))
                   if i % rank in self.dynamic.of(x)):  # fmt: skip
                self.fail(node, "it works along the extent")

    def slice(self, node: Node) -> None:
        x, out = node.input(0), node.output
        for axis, start, step in zip(
            node.attr("axes"), node.attr("starts"), node.attr("steps"), strict=True
        ):
            symbol = self.dynamic.of(x).get(int(axis) % x.type.rank)
            if symbol is None:
                continue
            whole = self.dynamic.of(out).get(int(axis) % x.type.rank) == symbol
            last = start + step * (out.shape[axis] - 1)
            if whole and start == 0 and step == 1:
                continue
            if whole or min(start, last) < 0 or max(start, last) >= self.known(symbol):
                self.fail(node, "it reads the extent at places that small sizes do not have")

    def reshape(self, node: Node) -> None:
        x, out = node.input(0), node.output
        # In row-major order a reshape moves nothing: indices lie as far apart as before.
        if self.dynamic.strides(x) != self.dynamic.strides(out):
            self.fail(node, "it merges the extent with another one")

    # --------------------------------------------------------------------------- masking

    def zero_tail(self, value: Value, axis: int) -> bool:
        """Whether a value is 0 in the filling of an axis already."""
        node = value.producer
        if node is None:
            return False
        if node.op.name == "softmax":
            return node in self.raised and int(node.attr("axis")) % value.type.rank == axis
        if node.op.name == "mask_tail":
            return int(node.attr("axis")) == axis
        if node.op.name == "transpose":
            return self.zero_tail(node.input(0), node.attr("perm")[axis])
        if node.op.name == "reshape":
            symbol = self.dynamic.of(value)[axis]
            before = [a for a, s in self.dynamic.of(node.input(0)).items() if s == symbol]
            return len(before) == 1 and self.zero_tail(node.input(0), before[0])
        return False

    def mask(self, node: Node, operand: int, axis: int) -> None:
        """Let an operand be 0 in the filling."""
        x = node.input(operand)
        if (x, axis) not in self.masked:
            symbol = self.alone(node, x, axis)
            if symbol is None:
                return
            tail = self.tail(symbol, x.shape[axis])
            made = self.graph.add("mask_tail", [x, tail], {"axis": axis}, name=f"{x.name}_used")
            self.dynamic.axes[made.output] = self.dynamic.of(x)
            self.masked[x, axis] = made.output
        self.graph.set_input(node, operand, self.masked[x, axis])

    def raise_tail(self, node: Node, axis: int) -> None:
        """Let an operand be lower in the filling than anywhere else."""
        x = node.input(0)
        symbol = self.alone(node, x, axis)
        if symbol is None:
            return
        tail = self.tail(symbol, x.shape[axis])
        if axis != x.type.rank - 1:
            shape = (x.shape[axis], *[1] * (x.type.rank - 1 - axis))
            name = f"{node.name}_tail"
            tail = self.graph.add("reshape", [tail], {"shape": shape}, name=name).output
        made = self.graph.add("add", [x, tail], name=f"{node.name}_used")
        self.dynamic.axes[made.output] = self.dynamic.of(x)
        self.graph.set_input(node, 0, made.output)
        self.raised.add(node)


def mask_tails(
    graph: Graph, dynamic: DynamicAxes, least: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, str]]:
    """Make a FLOAT graph right for every smaller size, its inputs filled up with zeros.

    Args:
        graph: Changed in place: inputs `tail_*` are added, one for each symbol that needs it, 0 in
            the used part and `FILL` beyond.
        dynamic: Of the graph.
        least: Least size of every symbol.

    Returns:
        Symbol -> name of its input; new value -> name of the value whose range it has.

    Raises:
        UnsupportedOpError: Operators that mix the extent in a way that has no masked form.
    """
    work = _Masking(graph, dynamic, least)
    work.run()
    tails = {symbol: v.name for symbol, v in work.tails.items()}
    return tails, {v.name: x.name for (x, _), v in work.masked.items()}
