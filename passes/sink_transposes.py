# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Undo the channels-last order that some exporters write around image operators.

A model exported from a channels-last framework keeps its tensors as [N, H, W, C] and transposes
around every convolution; what lies between (bias, batch normalization, activation, padding,
concatenation) is then out of reach of the rewrites for convolutions:

    mul(transpose(conv(x)), f[C])         ->  transpose(mul(conv(x), f[C, 1, 1]))
    transpose(pad(x[N, H, W, C]))         ->  pad(transpose(x))

Transposes sink below everything that does not care, until they meet their inverse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.passes.rewrite import bypass, only_use, producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import TensorType

_CASTS = frozenset({"quantize", "dequantize"})
_AXIS = frozenset({"concat", "split", "softmax", "log_softmax"})
_IMAGE = frozenset(
    {
        "conv", "conv_transpose", "max_pool", "average_pool", "resize", "depth_to_space",
        "space_to_depth", "batch_norm", "instance_norm",
    }
)  # fmt: skip
"""Operators that want the channels second: only transposes that come from these sink."""


@dataclass(frozen=True)
class SinkTransposes(Pass):
    """Move transposes to channels last, of rank 4 or 5, below what reads them."""

    name: ClassVar[str] = "sink_transposes"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was moved."""
        del ctx
        changed = False
        image: set[Value] = set()  # values [N, C, ...] that image operators lead to
        for node in graph.nodes:  # in topological order, so that one sweep reaches chains
            if node.op.name in _IMAGE:
                image.update(node.outputs)
            elif _cancel(graph, node):
                changed = True
            else:
                changed |= _sink(graph, node, image) or _hoist_pad(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _to_last(rank: int) -> tuple[int, ...]:
    return (0, *range(2, rank), 1)


def _to_first(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))


def _transposed(v: Value | None) -> Node | None:
    """Return the transpose to channels last that makes the value, if one does."""
    node = producer_of(v, "transpose")
    if node is None or node.output.type.rank not in (4, 5):
        return None
    return node if node.attr("perm") == _to_last(node.output.type.rank) else None


def _cancel(graph: Graph, node: Node) -> bool:
    """transpose(transpose(x)) of the two orders  ->  x."""
    inner = _transposed(node.input(0)) if node.op.name == "transpose" else None
    if inner is None or node.attr("perm") != _to_first(node.output.type.rank):
        return False
    bypass(graph, node, inner.input(0))
    return True


def _sink(graph: Graph, node: Node, image: set[Value]) -> bool:
    moved = [_transposed(v) for v in node.operands]
    if not any(t is not None and t.input(0) in image for t in moved):
        return False
    rank = next(t.output.type.rank for t in moved if t is not None)
    attrs = _attrs(node, rank)
    operands = _operands(graph, node, rank) if attrs is not None else None
    if attrs is None or operands is None:
        return False
    back = _to_first(rank)
    types = [
        TensorType(tuple(v.shape[a] for a in back), v.dtype, v.qparams)
        if v.type.rank == rank
        else v.type
        for v in node.outputs
    ]
    name = node.name
    new = graph.add(
        node.op.name,
        operands,
        attrs,
        types=types,
        name=f"{name}/first",
        names=[f"{v.name}/first" for v in node.outputs],
        sources=node.sources,
    )
    image.update(new.outputs)
    if [v.type.rank for v in node.outputs] != [rank] * len(node.outputs):
        supersede(graph, node, new, node)
        return True
    lasts = [
        graph.add("transpose", [v], {"perm": _to_last(rank)}, name=f"{name}/last").output
        for v in new.outputs
    ]
    for v, last in zip(node.outputs, lasts, strict=True):
        last.batch_axis = v.batch_axis
    names = [v.name for v in node.outputs]
    graph.replace_node(node, *lasts)
    for last, meaning in zip(lasts, names, strict=True):
        last.name = meaning
        if last.producer is not None:
            last.producer.sources = new.sources
    new.name = name  # plans know the operator by its name
    return True


def _operands(graph: Graph, node: Node, rank: int) -> list[Value | None] | None:
    """Return the operands with the channels second, or None where one of them has no such form."""
    found: list[Value | None] = []
    for v in node.inputs:
        t = _transposed(v)
        if v is None or (t is not None and t.output.type.rank == rank):
            found.append(None if t is None else t.input(0))
        elif v.is_constant and v.type.size == 1:
            found.append(v)
        elif v.is_constant and v.type.rank <= rank and not v.type.is_quantized:
            data = v.array().reshape((1,) * (rank - v.type.rank) + v.shape)
            data = np.ascontiguousarray(data.transpose(_to_first(rank)))
            found.append(graph.constant(data, v.name, dtype=v.dtype))
        else:
            return None
    return found


def _attrs(node: Node, rank: int) -> dict[str, Any] | None:
    """Return the attributes with the channels second, or None where the node cannot move."""
    name, kind, last = node.op.name, node.op.kind, _to_last(rank)
    attrs = dict(node.attrs)
    if kind in (OpKind.UNARY, OpKind.BINARY) or name in _CASTS:
        per_tensor = all(
            v.qparams is None or v.qparams.is_per_tensor for v in (*node.operands, *node.outputs)
        )
        return attrs if per_tensor and name != "table" else None
    if name in _AXIS:
        return {**attrs, "axis": last[node.attr("axis") % rank]}
    if name == "slice":
        return {**attrs, "axes": tuple(last[a % rank] for a in node.attr("axes"))}
    if name == "pad":
        pads, first = node.attr("pads"), _to_first(rank)
        return {**attrs, "pads": tuple(pads[side * rank + a] for side in (0, 1) for a in first)}
    if kind is OpKind.REDUCE and "axes" in attrs:
        axes = [a % rank for a in node.attr("axes")]
        kept = [last[a] for a in range(rank) if a not in axes]
        if not node.attr("keepdims") and kept != sorted(kept):
            return None
        return {**attrs, "axes": tuple(sorted(last[a] for a in axes))}
    return None


def _hoist_pad(graph: Graph, node: Node) -> bool:
    """transpose(pad(x)) to channels second  ->  pad(transpose(x)): next to the convolution."""
    rank = node.output.type.rank if node.op.name == "transpose" else 0
    if rank not in (4, 5) or node.attr("perm") != _to_first(rank):
        return False
    pad = producer_of(node.input(0), "pad")
    if pad is None or not only_use(graph, pad.output) or pad.input(0).type.is_quantized:
        return False
    pads = pad.attr("pads")
    first = graph.add("transpose", [pad.input(0)], {"perm": _to_first(rank)}, name=node.name)
    first.sources = node.sources
    moved = tuple(pads[side * rank + a] for side in (0, 1) for a in _to_first(rank))
    new = graph.add(
        "pad",
        [first.output, *pad.inputs[1:]],
        {**pad.attrs, "pads": moved},
        name=pad.name,
        sources=pad.sources,
    )
    name = pad.name
    supersede(graph, node, new, pad)
    new.name = name
    return True
