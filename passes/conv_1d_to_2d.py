# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write 1-D convolutions and poolings as 2-D ones of height 1, which the kernels compute.

    conv(x[N, C, L], w[M, C, K])  ->  reshape(conv(reshape(x)[N, C, 1, L], w[M, C, 1, K]))

The reshapes behind them then sink through elementwise operators to meet the next one's, where
`simplify_movement` cancels both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.ops._base import AttrValue
from qcompiler.passes.conv_to_matmul import scales_behind
from qcompiler.passes.rewrite import merged_sources, producer_of, scalar, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import PerAxis, PerGroup, QuantParams

_PER_AXIS = {"strides": 1, "dilations": 1, "kernel": 1, "output_padding": 0}
"""Attributes with one entry per spatial axis -> the entry of the new axis of extent 1."""

_WINDOWS = frozenset({"conv", "conv_transpose", "max_pool", "average_pool"})


@dataclass(frozen=True)
class Conv1dTo2d(Pass):
    """Rewrite rank-3 convolutions and poolings as rank-4 ones."""

    name: ClassVar[str] = "conv_1d_to_2d"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name in _WINDOWS and node.input(0).type.rank == 3:
                changed |= _widen(graph, node)
        if changed:
            graph.sort()
            for node in graph.nodes:
                _sink(graph, node)
            graph.eliminate_dead()
            graph.sort()
        return changed


def _lifted(graph: Graph, value: Value) -> Value:
    """Return the value [A, B, L] as [A, B, 1, L]; behind a dequantize of a constant, before it."""
    a, b, length = value.shape
    shape = (a, b, 1, length)
    if value.is_constant:
        data = value.array().reshape(shape)
        return graph.constant(data, value.name, _widened(value.qparams), value.dtype)
    node = producer_of(value, "dequantize")
    stored = node.input(0) if node is not None else None
    if node is not None and stored is not None and stored.is_constant and _keeps_axes(stored):
        new = graph.add(
            "dequantize", [_lifted(graph, stored)], name=node.name, sources=node.sources
        )
        return new.output
    back = producer_of(value, "reshape")
    if back is not None and back.input(0).shape == shape:
        return back.input(0)
    return graph.add("reshape", [value], {"shape": shape}, name=f"{value.name}/widen").output


def _keeps_axes(value: Value) -> bool:
    """Whether the quantization says the same of the widened tensor: axes 0 and 1 stay."""
    q = value.qparams
    return (
        q is None
        or q.is_per_tensor
        or (isinstance(q.granularity, (PerAxis, PerGroup)) and q.granularity.axis < 2)
    )


def _widened(q: QuantParams | None) -> QuantParams | None:
    """Return the quantization of the widened tensor: scales per block have its axes."""
    if q is None or not isinstance(q.granularity, PerGroup):
        return q
    a, b, length = q.scale.shape
    shape = (a, b, 1, length)
    return replace(q, scale=q.scale.reshape(shape), zero_point=q.zero_point.reshape(shape))


def _widen(graph: Graph, node: Node) -> bool:
    if node.op.name in ("conv", "conv_transpose") and known(node.input(1)) is None:
        scales_behind(graph, node)
    operands: list[Value | None] = [_lifted(graph, node.input(0))]
    if node.op.name in ("conv", "conv_transpose"):
        operands += [_lifted(graph, node.input(1)), node.optional(2)]
    attrs: dict[str, AttrValue] = dict(node.attrs)
    for key, entry in _PER_AXIS.items():
        if key in attrs:
            attrs[key] = (entry, *node.attr(key))
    begin, end = node.attr("pads")
    attrs["pads"] = (0, begin, 0, end)
    wide = graph.add(
        node.op.name,
        operands,
        attrs,
        name=f"{node.name}/wide",
        names=[f"{node.output.name}/wide"],
        sources=node.sources,
    )
    back = graph.add(
        "reshape", [wide.output], {"shape": node.output.shape}, name=f"{node.name}/narrow"
    )
    name = node.name
    supersede(graph, node, back, node)
    back.name, wide.name = wide.name, name  # the plan knows the operator by its name
    return True


def _narrowed(value: Value) -> Value | None:
    """Return x[A, B, 1, L] if the value is its reshape to [A, B, L]."""
    node = producer_of(value, "reshape")
    if node is None or value.type.rank != 3:
        return None
    a, b, length = value.shape
    return node.input(0) if node.input(0).shape == (a, b, 1, length) else None


def _sink(graph: Graph, node: Node) -> None:
    """Move reshapes [A, B, 1, L] -> [A, B, L] from the operands of a node to its result."""
    if node.op.kind not in (OpKind.UNARY, OpKind.BINARY) or node.output.type.rank != 3:
        return
    operands: list[Value] = []
    for v in node.operands:
        wide = _narrowed(v)
        if wide is not None and v.shape == node.output.shape:
            operands.append(wide)
        elif v.is_constant and (scalar(v) is not None or v.type.rank == 3):
            operands.append(v if v.type.rank < 3 else _lifted(graph, v))
        else:
            return
    if all(v.is_constant for v in operands):
        return
    wide_node = graph.add(
        node.op.name,
        operands,
        node.attrs,
        name=f"{node.name}/wide",
        names=[f"{node.output.name}/wide"],
        sources=node.sources,
    )
    back = graph.add(
        "reshape",
        [wide_node.output],
        {"shape": node.output.shape},
        name=f"{node.name}/narrow",
        sources=merged_sources(node),
    )
    name = node.name
    supersede(graph, node, back, node)
    back.name, wide_node.name = wide_node.name, name
