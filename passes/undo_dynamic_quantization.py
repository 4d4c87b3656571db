# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Take a product with dynamically quantized activations as the float product that it stands for.

    q, s, z = DynamicQuantizeLinear(x)
    cast(MatMulInteger(q, w, z, zw)) * (s * sw)   ->   matmul(x, (w - zw) * sw)

The weights keep the values of their grid. How x is rounded is up to the plan: not at all in
float32, and by a scale from calibration instead of one computed in every run in integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import float_constant, producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, DType


@dataclass(frozen=True)
class UndoDynamicQuantization(Pass):
    """Replace dynamically quantized matrix products by products of floats."""

    name: ClassVar[str] = "undo_dynamic_quantization"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was replaced."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "mul" and node.graph is not None:
                changed |= _replace(graph, node)
        if changed:
            graph.eliminate_dead()
        return changed


def _replace(graph: Graph, node: Node) -> bool:
    for product, factor in (node.operands, node.operands[::-1]):
        cast = producer_of(product, "cast")
        inner = None if cast is None else _opaque(cast.input(0), "MatMulInteger")
        if cast is None or inner is None or product.dtype is not DType.FLOAT32:
            continue
        source = _opaque(inner.input(0), "DynamicQuantizeLinear")
        if source is None or len(source.outputs) != 3 or len(inner.inputs) < 3:
            continue
        q, scale, zero_point = source.outputs
        if inner.input(0) is not q or inner.inputs[2] is not zero_point:
            continue
        weights = _weights(inner)
        scales = _constant_factor(factor, scale)
        if weights is None or scales is None or scales.ndim > 1:
            continue
        data = (weights * scales.astype(np.float64)).astype(np.float32)
        if data.shape != weights.shape:
            continue
        w = graph.constant(data, inner.input(1).name)
        new = graph.add("matmul", [source.input(0), w], before=node)
        supersede(graph, node, new, inner, cast)
        return True
    return False


def _opaque(value: Value, operator: str) -> Node | None:
    from qcompiler.onnx_export_ops import opaque_proto

    node = producer_of(value, "opaque")
    return node if node is not None and opaque_proto(node).op_type == operator else None


def _weights(inner: Node) -> Array | None:
    """Return w - zw of a product with constant weights [K, N] or stacks of such, in float64."""
    w = inner.input(1)
    zero = inner.inputs[3] if len(inner.inputs) > 3 else None
    if not w.is_constant or w.type.is_quantized or w.type.rank < 2:
        return None
    if zero is None:
        return w.array().astype(np.float64)
    if not zero.is_constant or zero.type.rank > 1:
        return None
    shifted: Array = w.array().astype(np.float64) - zero.array().astype(np.float64)
    return shifted


def _constant_factor(factor: Value, scale: Value) -> Array | None:
    """Return c of `scale` * c, 1 for the scale itself; None for anything else."""
    if factor is scale:
        return np.ones((), np.float32)
    node = producer_of(factor, "mul")
    if node is None or scale not in node.operands:
        return None
    return float_constant(next((v for v in node.operands if v is not scale), None))
