# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Move rank-4 regions to the channels-last layout (NHWC) that the CPU kernels compute in.

    x[N,C,H,W] -> conv -> relu -> y      =>      x -> T -> conv{NHWC} -> relu -> T' -> y

Each operator that has a `layout` is rewritten between a pair of transposes; the transposes are
then pushed down through everything that does not care (elementwise operators, casts, concat,
reductions) until they meet their inverse, a graph output, or an operator that needs NCHW.
Transposes that move no element become reshapes. Weights stay OIHW: packing is the lowering's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import PerAxis, QuantParams, TensorType

TO_LAST = (0, 2, 3, 1)
TO_FIRST = (0, 3, 1, 2)
_NEW_AXIS = {0: 0, 1: 3, 2: 1, 3: 2}  # axis in NCHW -> axis in NHWC

_AXIS_ATTR = frozenset({"concat", "split", "softmax", "log_softmax", "qsoftmax"})
_CASTS = frozenset({"quantize", "dequantize", "requantize", "cast", "table", "where"})
_INTEGER_BINARY = frozenset({"qadd", "qsub", "qmul"})


@dataclass(frozen=True)
class ChannelsLast(Pass):
    """Rewrite convolutional regions to NHWC and cancel the transposes between them."""

    name: ClassVar[str] = "channels_last"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        rewriter = _Rewriter(graph)
        changed = False
        for node in graph.nodes:
            changed |= rewriter.visit(node)
        for node in graph.nodes:
            changed |= _fold_into_matmul(graph, node)
        for node in graph.nodes:
            changed |= _transpose_to_reshape(graph, node)
        graph.eliminate_dead()
        return changed


class _Rewriter:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._last: dict[Value, Value] = {}

    def visit(self, node: Node) -> bool:
        name = node.op.name
        if node.attrs.get("layout") == "NCHW":
            if node.output.type.rank != 4:
                return False
            operands = [0, 3] if name in ("conv", "qconv") else [0]
            attrs: dict[str, Any] = {"layout": "NHWC"}
            if name == "resize":  # its extents are those of the physical shape
                for key in ("scales", "shape"):
                    attrs[key] = tuple(node.attr(key)[a] for a in TO_LAST)
            return self._rewrite(node, operands, attrs)
        operands = [
            i
            for i, v in enumerate(node.inputs)
            if v is not None and v.type.rank == 4 and _is_first(v)
        ]
        if not operands or (
            any(v.type.rank != 4 for v in node.outputs) and "axes" not in node.attrs
        ):
            return False
        moved_attrs = self._remapped(node)
        if moved_attrs is None:
            return False
        if node.op.kind in (OpKind.UNARY, OpKind.BINARY) or name in (
            _CASTS | _INTEGER_BINARY | {"concat"}
        ):
            moved = self._broadcastable(node)
            if moved is None:
                return False
            return self._rewrite(node, moved, moved_attrs)
        return self._rewrite(node, [0], moved_attrs)

    def _remapped(self, node: Node) -> dict[str, Any] | None:
        """Attributes of the node in NHWC, or None where it cannot move."""
        name = node.op.name
        if node.op.kind in (OpKind.UNARY, OpKind.BINARY) or name in (_CASTS | _INTEGER_BINARY):
            per_axis = any(
                v.qparams is not None and not v.qparams.is_per_tensor
                for v in (*node.operands, *node.outputs)
                if not v.is_constant
            )
            return None if per_axis else {}
        if name in _AXIS_ATTR:
            return {"axis": _NEW_AXIS[node.attr("axis") % 4]}
        if name == "slice":
            return {"axes": tuple(_NEW_AXIS[a % 4] for a in node.attr("axes"))}
        if name == "pad":
            p = node.attr("pads")
            order = TO_LAST
            return {"pads": tuple(p[a] for a in order) + tuple(p[4 + a] for a in order)}
        if name == "qreduce_mean" or name.startswith("reduce_"):
            axes = tuple(a % 4 for a in node.attr("axes"))
            moved = tuple(sorted(_NEW_AXIS[a] for a in axes))
            if not node.attr("keepdims"):
                left_first = [a for a in range(4) if a not in axes]
                left_last = [a for a in TO_LAST if a not in axes]
                if left_first != left_last:
                    return None
            return {"axes": moved}
        return None

    def _broadcastable(self, node: Node) -> list[int] | None:
        """Operands to move, or None where one of them cannot."""
        moved = []
        for i, v in enumerate(node.inputs):
            if v is None or v.type.size == 1 or (node.op.name == "table" and i == 1):
                continue
            if v.type.rank == 4 or (v.is_constant and v.type.rank < 4):
                moved.append(i)
            else:
                return None
        return moved

    def _rewrite(self, node: Node, operands: list[int], attrs: dict[str, Any]) -> bool:
        ins = list(node.inputs)
        for i in operands:
            v = ins[i] if i < len(ins) else None
            if v is not None:
                ins[i] = self._to_last(v, node)
        types = []
        back = []
        for v in node.outputs:
            if v.type.rank == 4:
                types.append(v.type.with_shape(tuple(v.shape[a] for a in TO_LAST)))
                back.append(True)
            else:
                types.append(v.type)
                back.append(False)
        new = self.graph.add(
            node.op.name,
            ins,
            {**node.attrs, **attrs},
            types=types,
            name=node.name + "_nhwc",
            before=node,
            sources=node.sources,
        )
        results = []
        for v, to_first in zip(new.outputs, back, strict=True):
            if not to_first:
                results.append(v)
                continue
            t = self.graph.add(
                "transpose",
                [v],
                {"perm": TO_FIRST},
                types=[v.type.with_shape(tuple(v.shape[a] for a in TO_FIRST))],
                name=node.name + "_nchw",
                before=node,
                sources=node.sources,
            )
            results.append(t.output)
        self.graph.replace_node(node, *results)
        new.name = node.name  # reports are keyed by it
        return True

    def _to_last(self, v: Value, before: Node) -> Value:
        if _is_first(v) and v.producer is not None:
            return v.producer.input(0)
        if v in self._last:
            return self._last[v]
        if v.is_constant:
            data = v.array()
            data = data.reshape((1,) * (4 - data.ndim) + data.shape)
            q = _moved_qparams(v.qparams, 4 - v.type.rank)
            moved = self.graph.constant(
                np.ascontiguousarray(data.transpose(TO_LAST)), v.name, q, v.dtype
            )
        else:
            types = [v.type.with_shape(tuple(v.shape[a] for a in TO_LAST))]
            moved = self.graph.add(
                "transpose",
                [v],
                {"perm": TO_LAST},
                types=types,
                name=v.name + "_nhwc",
                before=before,
                sources=v.producer.sources if v.producer is not None else (),
            ).output
        self._last[v] = moved
        return moved


def _moved_qparams(q: QuantParams | None, added: int) -> QuantParams | None:
    if q is None or not isinstance(q.granularity, PerAxis):
        return q
    axis = _NEW_AXIS[q.granularity.axis + added]
    return QuantParams(q.scale, q.zero_point, q.storage, q.qmin, q.qmax, PerAxis(axis))


def _is_first(v: Value) -> bool:
    p = v.producer
    return p is not None and p.op.name == "transpose" and p.attr("perm") == TO_FIRST


def _fold_into_matmul(graph: Graph, node: Node) -> bool:
    """reshape(transpose(x, NCHW), [N, C*H*W]) @ w  =>  reshape(x, [N, H*W*C]) @ w permuted."""
    if node.op.name not in ("matmul", "qmatmul") or node.attr("transpose_a"):
        return False
    a, b = node.input(0), node.input(1)
    r = a.producer
    if r is None or r.op.name != "reshape" or not b.is_constant or b.type.rank != 2:
        return False
    x = r.input(0)
    if not _is_first(x) or x.producer is None:
        return False
    n, c, h, w = x.shape
    if a.shape != (n, c * h * w) or len(a.users) != 1:
        return False
    data = b.array()
    rows_first = not node.attr("transpose_b")
    k = data if rows_first else data.T
    k = k.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(c * h * w, -1)
    data = np.ascontiguousarray(k if rows_first else k.T)
    flat = graph.add(
        "reshape",
        [x.producer.input(0)],
        {"shape": a.shape},
        types=[a.type],
        name=r.name,
        before=node,
        sources=r.sources,
    )
    graph.set_input(node, 0, flat.output)
    graph.set_input(node, 1, graph.constant(data, b.name, b.qparams, b.dtype))
    return True


def _transpose_to_reshape(graph: Graph, node: Node) -> bool:
    """Transpose that keeps the order of all axes longer than 1  =>  reshape."""
    if node.op.name != "transpose":
        return False
    x = node.input(0)
    perm = node.attr("perm")
    moved = [a for a in perm if x.shape[a] != 1]
    if moved != sorted(moved):
        return False
    out = node.output
    new = graph.add(
        "reshape",
        [x],
        {"shape": out.shape},
        types=[TensorType(out.shape, out.dtype, out.qparams)],
        name=node.name,
        before=node,
        sources=node.sources,
    )
    graph.replace_node(node, new.output)
    return True
