# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The pattern table: float islands between dequantize and quantize -> one integer operator.

Each rule takes the quantize node that ends an island (clamps before it are in its type already) and
returns the integer node that replaces it, or None where the island is not its shape. Rules are
tried in the order of `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler import numerics_dynamic
from qcompiler.errors import VerificationError
from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import dequantize, quantize_bias, table_entries
from qcompiler.ops import EvalContext, OpKind
from qcompiler.passes.fuse_moves import dequantized, params, succeed
from qcompiler.plan import TABLE_BINARY, WHOLE_GROUP, summed_axis
from qcompiler.types import (
    Array,
    DType,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    TensorType,
)


@dataclass(frozen=True, slots=True)
class Island:
    """A quantize node and the float before it.

    Attributes:
        graph: The graph.
        end: The quantize node; its type says the grid and the clamp.
        value: The float that it quantizes.
        alone: Whether nothing else reads `value`.
    """

    graph: Graph
    end: Node
    value: Value
    alone: bool

    @classmethod
    def of(cls, graph: Graph, end: Node) -> Island:
        """Return the island that a quantize node ends."""
        return cls(graph, end, end.input(0), _alone(graph, end.input(0)))

    @property
    def target(self) -> TensorType:
        """Type of the result."""
        return self.end.output.type

    def replace(
        self,
        op: str,
        inputs: Sequence[Value | None],
        core: Node,
        attrs: dict[str, object] | None = None,
        more: Sequence[Node] = (),
    ) -> Node:
        """Put an integer node in the place of the island; its name is the core operator's.

        `more` are the further nodes that it stands for.
        """
        names = [name for n in (core, *more, self.end) for name in n.sources]
        sources = tuple(dict.fromkeys(names))
        return replace_core(
            self.graph, op, inputs, core, self.end, self.target, sources, attrs or {}
        )


def replace_core(
    graph: Graph,
    op: str,
    inputs: Sequence[Value | None],
    core: Node,
    end: Node,
    target: TensorType,
    sources: tuple[str, ...],
    attrs: dict[str, object],
) -> Node:
    """Replace `end` by an integer node that carries the name of `core`."""
    full: dict[str, object] = {k: core.attrs[k] for k in core.attrs if k in attrs_of(op)}
    full.update(attrs)
    new = graph.add(op, inputs, full, types=[target], before=end, sources=sources)  # type: ignore[arg-type]
    old = end.output
    graph.replace_node(end, new.output)
    graph.eliminate_dead()
    if core.graph is None:  # nothing else needs it: the name is free
        succeed(new, core, old)
    else:
        new.output.name = old.name
    return new


def attrs_of(op: str) -> frozenset[str]:
    """Return the attribute names of an operator."""
    from qcompiler.ops import op_def

    return frozenset(op_def(op).attrs)


def _alone(graph: Graph, value: Value) -> bool:
    return len(value.uses) == 1 and not graph.is_output(value)


# ------------------------------------------------------------------------------- products


@dataclass(frozen=True, slots=True)
class Product:
    """A convolution or matrix product whose operands are all quantized."""

    node: Node
    op: str
    operands: tuple[Value, Value, Value | None]
    attrs: dict[str, object]


class Weights:
    """Constant weights in the form that integer products take, made once per constant."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[Value, bool], Value | None] = {}

    def get(self, w: Value, transpose: bool) -> Value | None:
        """Return the weights held as int8 around zero, the last two axes swapped if asked.

        None where a zero point leaves weights that int8 cannot hold: the product stays float.
        """
        key = (w, transpose)
        if key not in self._made:
            self._made[key] = self._make(w, transpose)
        return self._made[key]

    def in_blocks(self, w: Value, transpose: bool) -> Value:
        """Return a matrix with scales per block along K held as int8 [K, N]."""
        key = (w, transpose)
        q = params(w)
        if q.storage is DType.INT8 and not transpose:
            return w
        if key not in self._made:
            codes, grid = numerics_dynamic.blocked_weights(w.array(), q)
            self._made[key] = self.graph.constant(codes, w.name, grid)
        made = self._made[key]
        assert made is not None
        return made

    def _make(self, w: Value, transpose: bool) -> Value | None:
        q, data = params(w), w.array()
        if q.storage is DType.INT8 and q.is_symmetric and not transpose:
            return w
        # The same grid, moved so that its zero is 0: kernels multiply the stored numbers.
        shape = [1] * data.ndim
        if isinstance(q.granularity, PerAxis):
            shape[q.granularity.axis] = -1
        moved = data.astype(np.int16) - q.zero_point.astype(np.int16).reshape(shape)
        if moved.size and (moved.min() < -128 or moved.max() > 127):
            return None
        data = moved.astype(np.int8)
        granularity = q.granularity
        if transpose:
            data = np.ascontiguousarray(np.swapaxes(data, -1, -2))
            if isinstance(granularity, PerAxis):
                axis = {data.ndim - 1: data.ndim - 2, data.ndim - 2: data.ndim - 1}
                granularity = PerAxis(axis.get(granularity.axis, granularity.axis))
        held = QuantParams(
            q.scale,
            np.zeros_like(q.zero_point),
            DType.INT8,
            max(DType.INT8.min, q.qmin - int(q.zero_point.max())),
            min(DType.INT8.max, q.qmax - int(q.zero_point.min())),
            granularity,
        )
        return self.graph.constant(data, w.name, held)


_NARROW = (DType.INT8, DType.UINT8)
_WEIGHT_STORAGE = (DType.INT8, DType.UINT8, DType.INT4, DType.UINT4)


def product(node: Node | None, weights: Weights) -> Product | None:
    """Return the integer form of a float product between dequantized operands, or None."""
    if node is None or node.op.name not in ("conv", "matmul") or node.optional(3) is not None:
        return None
    if node.attr("act_min") is not None or node.attr("act_max") is not None:
        return None
    x, w = dequantized(node.input(0)), dequantized(node.input(1))
    if x is None or w is None or not _activation(x) or is_volume(node):
        return None
    attrs: dict[str, object] = {}
    if w.is_constant:
        q = params(w)
        transpose = node.op.name == "matmul" and bool(node.attr("transpose_b"))
        if transpose:
            attrs["transpose_b"] = False
        axis = 0 if node.op.name == "conv" else w.type.rank - (2 if transpose else 1)
        if isinstance(q.granularity, PerGroup):
            return _grouped(node, x, w, weights)
        if q.storage not in _WEIGHT_STORAGE or w.type.rank < 2:
            return None
        if not q.is_per_tensor and q.granularity != PerAxis(axis):
            return None
        if not q.is_per_tensor and q.scale.shape != (w.shape[axis],):
            return None
        held = weights.get(w, transpose)
        if held is None:
            return None
        w = held
    elif node.op.name == "conv" or not _activation(w) or w.type.rank < 2:
        return None
    bias = node.optional(2)
    if bias is not None:
        bias = _integer_bias(weights.graph, bias, params(x), params(w))
        if bias is None:
            return None
    return Product(node, "q" + node.op.name, (x, w, bias), attrs)


def _grouped(node: Node, x: Value, w: Value, weights: Weights) -> Product | None:
    """Return the integer form of a product whose weights have scales in groups along K, or None.

    Its bias stays float32: there is no one scale of its sums.
    """
    q, bias = params(w), node.optional(2)
    axis = summed_axis(node)
    size = q.granularity.group_size if isinstance(q.granularity, PerGroup) else 0
    if q.granularity != PerGroup(axis, size) or w.shape[axis] % size or size % WHOLE_GROUP:
        return None
    if bias is not None and not bias.is_constant:
        reals = known(bias)
        if reals is None:
            return None
        bias = weights.graph.constant(reals, bias.name)
    if bias is not None and bias.dtype is not DType.FLOAT32:
        return None
    if node.op.name == "conv":
        if node.attr("group") != 1 or q.storage is not DType.INT8 or not q.is_symmetric:
            return None
        return Product(node, "qconv", (x, w, bias), {})
    if node.attr("transpose_a") or w.type.rank != 2 or q.storage not in _WEIGHT_STORAGE:
        return None
    held = weights.in_blocks(w, bool(node.attr("transpose_b")))
    return Product(node, "qmatmul", (x, held, bias), {"transpose_b": False})


def is_volume(node: Node) -> bool:
    """Whether a convolution runs along three axes, still: what no integer kernel does."""
    return node.op.name == "conv" and node.input(0).type.rank > 4


def is_plain(node: Node) -> bool:
    """Whether a product has at most a bias, whose elements are known: it may be split."""
    if node.op.name not in ("conv", "matmul") or is_volume(node) or node.optional(3) is not None:
        return False
    bias = node.optional(2)
    if bias is not None and known(bias) is None:
        return False
    return node.attr("act_min") is None and node.attr("act_max") is None


def _activation(v: Value) -> bool:
    return not v.is_constant and v.dtype in _NARROW and params(v).is_per_tensor


def _integer_bias(graph: Graph, bias: Value, x: QuantParams, w: QuantParams) -> Value | None:
    """Return the bias as int32 at the scale of the accumulator; None where that cannot be."""
    source = dequantized(bias)
    scale = np.float64(x.s) * w.scale.astype(np.float64)
    if source is not None and source.is_constant:
        q = params(source)
        if (
            source.dtype is DType.INT32
            and q.is_symmetric
            and np.allclose(np.broadcast_to(q.scale, bias.shape), scale, rtol=1e-5, atol=0)
        ):
            ints: Array = source.array()
        else:
            ints = _rounded(dequantize(source.array(), q), x, w)
    elif bias.is_constant:
        ints = _rounded(bias.array(), x, w)
    else:
        return None
    if ints.size == 0:
        return None
    held = QuantParams(
        scale.astype(np.float32),
        np.zeros(scale.shape, np.int32),
        DType.INT32,
        DType.INT32.min,
        DType.INT32.max,
        PerTensor() if w.is_per_tensor else PerAxis(0),
    )
    name = source.name if source is not None else bias.name
    return graph.constant(ints, name, held)


def _rounded(bias: Array, x: QuantParams, w: QuantParams) -> Array:
    found = quantize_bias(bias, x.s, w.scale)
    return np.empty(0, np.int32) if found.clamped else found.q


def fuse_product(i: Island, weights: Weights) -> Node | None:
    """product(dq x, dq w, dq b), then quantize -> qconv / qmatmul."""
    if not i.alone or not params_ok(i.target, (8, 16)):
        return None
    p = product(i.value.producer, weights)
    if p is None:
        return None
    return i.replace(p.op, p.operands, p.node, p.attrs)


def fuse_residual(i: Island, weights: Weights) -> Node | None:
    """add(product(...), dq r), then quantize -> qconv / qmatmul with a residual operand."""
    add = i.value.producer
    if add is None or add.op.name != "add" or not i.alone or not params_ok(i.target, (8, 16)):
        return None
    order = {n: k for k, n in enumerate(i.graph.nodes)}
    places = [0, 1]
    places.sort(key=lambda k: -_position(order, add.input(k)))
    for k in places:
        v, other = add.input(k), dequantized(add.input(1 - k))
        if other is None or other.is_constant or not params(other).is_per_tensor:
            continue
        if other.dtype.bits > 16 or not v.shape == other.shape == add.output.shape:
            continue
        p = product(v.producer, weights) if _alone(i.graph, v) else None
        if p is None:
            continue
        return i.replace(p.op, (*p.operands, other), p.node, p.attrs, (add,))
    return None


def _position(order: dict[Node, int], v: Value) -> int:
    return -1 if v.producer is None else order[v.producer]


def params_ok(t: TensorType, bits: tuple[int, ...]) -> bool:
    """Whether a result type has one scale and an allowed width."""
    return t.qparams is not None and t.qparams.is_per_tensor and t.dtype.bits in bits


# ---------------------------------------------------------------- binary, reductions, norms


def fuse_binary(i: Island, weights: Weights) -> Node | None:
    """add|sub|mul(dq a, dq b), then quantize -> qadd / qsub / qmul."""
    node = i.value.producer
    if node is None or node.op.name not in ("add", "sub", "mul") or not i.alone:
        return None
    a, b = dequantized(node.input(0)), dequantized(node.input(1))
    if a is None or b is None or not params_ok(i.target, (8, 16)):
        return None
    if any(not params(v).is_per_tensor or v.dtype.bits > 16 for v in (a, b)):
        return None
    return i.replace("q" + node.op.name, (a, b), node)


def fuse_reduction(i: Island, weights: Weights) -> Node | None:
    """average_pool|reduce_mean(dq x), then quantize -> qaverage_pool / qreduce_mean."""
    node = i.value.producer
    if node is None or node.op.name not in ("average_pool", "reduce_mean") or not i.alone:
        return None
    x = dequantized(node.input(0))
    if x is None or not params(x).is_per_tensor or x.dtype.bits > 16:
        return None
    if not params_ok(i.target, (8, 16)):
        return None
    return i.replace("q" + node.op.name, (x,), node)


def fuse_softmax(i: Island, weights: Weights) -> Node | None:
    """softmax(dq x) or softmax(x), then quantize -> qsoftmax."""
    node = i.value.producer
    if node is None or node.op.name != "softmax" or not i.alone or not params_ok(i.target, (8,)):
        return None
    x = dequantized(node.input(0))
    if x is None or x.dtype not in _NARROW or not params(x).is_per_tensor:
        x = node.input(0)
    if x.dtype is not DType.FLOAT32 and not x.type.is_quantized:
        return None
    return i.replace("qsoftmax", (x,), node)


def fuse_layer_norm(i: Island, weights: Weights) -> Node | None:
    """layer_norm(dq x), then quantize -> qlayer_norm."""
    node = i.value.producer
    if node is None or not i.alone or not params_ok(i.target, (8, 16)):
        return None
    operands = layer_norm_operands(i.graph, node)
    return None if operands is None else i.replace("qlayer_norm", operands, node)


def layer_norm_operands(graph: Graph, node: Node) -> tuple[Value, Value, Value] | None:
    """Return the operands of the integer form of a layer_norm over a dequantized tensor."""
    if node.op.name != "layer_norm":
        return None
    x = dequantized(node.input(0))
    if x is None or x.is_constant or x.dtype.bits > 16 or not params(x).is_per_tensor:
        return None
    if int(node.attr("axis")) not in (-1, x.type.rank - 1):
        return None
    affine: list[Value] = []
    for k, fill in ((1, 1.0), (2, 0.0)):
        v = node.optional(k)
        d = x.shape[-1]
        if v is None:
            affine.append(graph.constant(np.full(d, fill, np.float32), f"{node.name}_{k}"))
            continue
        source = dequantized(v)
        if source is not None and source.is_constant:
            real = dequantize(source.array(), params(source))
        elif v.is_constant:
            real = v.array()
        else:
            return None
        if v.is_constant and real.shape == (d,) and real.dtype == np.float32:
            affine.append(v)
        else:
            flat = np.broadcast_to(real, (d,)).astype(np.float32)
            affine.append(graph.constant(flat, v.name))
    return x, affine[0], affine[1]


# --------------------------------------------------------------------------------- tables


def cone(value: Value) -> tuple[Value, list[Node]] | None:
    """Return (quantized root, float nodes in order) of an elementwise function of one tensor.

    Every path from `value` backwards runs through elementwise operators whose other operands are
    scalar constants, and ends at dequantizations of one 8-bit tensor of the same shape.
    """
    root: Value | None = None
    nodes: dict[Node, None] = {}
    stack = [value]
    while stack:
        v = stack.pop()
        if v.is_constant:
            if v.type.size != 1:
                return None
            continue
        source = dequantized(v)
        if source is not None:
            if source.is_constant:
                if source.type.size != 1:
                    return None
                continue
            if root is not None and source is not root:
                return None
            root = source
            continue
        p = v.producer
        if p is None or v.dtype is not DType.FLOAT32 or v.shape != value.shape:
            return None
        if p.op.kind is not OpKind.UNARY and p.op.name not in TABLE_BINARY:
            return None
        if p not in nodes:
            nodes[p] = None
            stack.extend(p.operands)
    if root is None or not nodes or root.shape != value.shape:
        return None
    if root.dtype not in _NARROW or not params(root).is_per_tensor:
        return None
    return root, list(nodes)


def cone_function(value: Value, root: Value) -> Callable[[Array], Array]:
    """Return the float function of the root's reals that a cone computes, through evaluate."""

    def compute(x: Array) -> Array:
        known: dict[Value, Array] = {}

        def at(v: Value) -> Array:
            if v in known:
                return known[v]
            source = dequantized(v)
            if v.is_constant:
                known[v] = v.array().reshape(-1)
            elif source is root:
                known[v] = x
            elif source is not None:
                known[v] = dequantize(source.array(), params(source)).reshape(-1)
            else:
                known[v] = _evaluate(v, [at(u) for u in _producer(v).operands], x)
            return known[v]

        return at(value)

    return compute


def _producer(v: Value) -> Node:
    if v.producer is None:
        raise VerificationError(f"{v.name} has no producer")
    return v.producer


def _evaluate(v: Value, arrays: list[Array], like: Array) -> Array:
    node = _producer(v)
    types = tuple(TensorType(a.shape, DType.of(a.dtype)) for a in arrays)
    out = (TensorType(like.shape, v.dtype),)
    return node.op.evaluate(arrays, node.attrs, EvalContext(types, out))[0]


def fuse_table(i: Island, weights: Weights) -> Node | None:
    """quantize(f(dq x)) for an elementwise f -> a table."""
    found = cone(i.value)
    if found is None or not params_ok(i.target, (8, 16)):
        return None
    root, nodes = found
    target = params(i.end.output)
    entries = table_entries(cone_function(i.value, root), params(root), target)
    held = i.graph.constant(entries, f"{i.end.output.name}_entries", dtype=target.storage)
    reached = target.clamped(int(entries.min()), int(entries.max()))
    sources = tuple(dict.fromkeys(s for n in (*reversed(nodes), i.end) for s in n.sources))
    result = TensorType(root.shape, target.storage, reached)
    return replace_core(i.graph, "table", (root, held), nodes[0], i.end, result, sources, {})


Rule = Callable[[Island, Weights], "Node | None"]

RULES: tuple[Rule, ...] = (
    fuse_table,
    fuse_product,
    fuse_residual,
    fuse_binary,
    fuse_reduction,
    fuse_softmax,
    fuse_layer_norm,
)
