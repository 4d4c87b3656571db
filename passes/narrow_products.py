# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products that need no calibration: weights in fewer bits, activations quantized at run time.

Before -> after, by the precision that the plan gives a product:

    fp16:          matmul(x, w)  ->  matmul(x, cast(w16))
    w8, w4:        matmul(x, w)  ->  matmul(x, dequantize(w4)), one scale per group along K
    w8a8-dynamic:  matmul(x, w)  ->  dynamic_matmul(q, w8, s), (q, s) = dynamic_quantize(x)

The graph so says what is computed, and targets look through the cast and the dequantize of a
constant: they keep the weights as they are and widen them in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.errors import UsageError
from qcompiler.factors import snapped
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import choose_weight_qparams, quantize
from qcompiler.numerics_dynamic import RUN_TIME_GRID, Per
from qcompiler.ops import Stage
from qcompiler.passes.fuse_moves import succeed
from qcompiler.passes.weights import weight_qparams
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import PrecisionPlan, group_size, narrow_obstacle, summed_axis
from qcompiler.types import Array, DType, PerGroup, Precision, QuantParams, TensorType


@dataclass(frozen=True)
class NarrowProducts(Pass):
    """Give float products the forms that the plan asks for.

    Attributes:
        w8_group: Weights that share a scale along K, for w8.
        w4_group: The same for w4.
        asymmetric: Give groups zero points, so that a range need not be centred on 0.
    """

    name: ClassVar[str] = "narrow_products"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.INTEGER, Stage.INTEGER)
    requires: ClassVar[tuple[type, ...]] = (PrecisionPlan,)
    w8_group: int = 128
    w4_group: int = 32
    asymmetric: bool = False

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything changed.

        Raises:
            UsageError: A group size below 1.
        """
        if min(self.w8_group, self.w4_group) < 1:
            raise UsageError(f"{self.spec()}: a group has at least one weight")
        plan = ctx.get(PrecisionPlan)
        forms = _Forms(graph, self)
        changed = False
        for node in graph.nodes:
            precision = plan.precision(node.name)
            if not (precision.is_dynamic or precision.is_weight_only):
                continue
            if narrow_obstacle(node, precision) is None:
                forms.apply(node, precision)
                changed = True
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


class _Forms:
    """Makes the forms; operands that several products share are made once."""

    def __init__(self, graph: Graph, options: NarrowProducts) -> None:
        self.graph = graph
        self.options = options
        self.held: dict[tuple[Value, Precision, int], Value] = {}
        self.quantized: dict[tuple[Value, Per], Node] = {}

    def apply(self, node: Node, precision: Precision) -> None:
        if precision.is_dynamic:
            self._dynamic(node, "row" if precision is Precision.W8A8_DYNAMIC else "tensor")
        elif node.op.name == "gather":
            self._gather(node)
        else:
            w = node.input(1)
            half = precision is Precision.FP16
            held = self._half(w) if half else self._weights(node, w, precision)
            # A widening of its own for each product, so that a kernel can take it in.
            op, attrs = ("cast", {"to": DType.FLOAT32.value}) if half else ("dequantize", {})
            wide = self.graph.add(op, [held], attrs, name=f"{w.name}_wide", before=node)
            self.graph.set_input(node, 1, wide.output)

    # ------------------------------------------------------------------ weights in fewer bits

    def _weights(self, node: Node, w: Value, precision: Precision) -> Value:
        axis = summed_axis(node)
        key = (w, precision, axis)
        if key not in self.held:
            four = precision is Precision.W4
            limit = self.options.w4_group if four else self.options.w8_group
            size = group_size(w.shape[axis], limit)
            q = group_qparams(w.array(), axis, size, 4 if four else 8, self.options.asymmetric)
            self.held[key] = self.graph.constant(quantize(w.array(), q), f"{w.name}_q", q)
        return self.held[key]

    def _gather(self, node: Node) -> None:
        """Read rows of a table held in half precision, and widen what was read."""
        out = node.output
        self.graph.set_input(node, 0, self._half(node.input(0)))
        uses, returned = out.uses, self.graph.is_output(out)
        self.graph.set_type(out, TensorType(out.shape, DType.FLOAT16))
        wide = self.graph.add(
            "cast", [out], {"to": DType.FLOAT32.value}, name=f"{node.name}_wide"
        ).output
        for user, i in uses:
            self.graph.set_input(user, i, wide)
        if returned:
            outs = [(name, wide if v is out else v) for name, v in self.graph.outputs]
            self.graph.set_outputs(outs)

    def _half(self, w: Value) -> Value:
        key = (w, Precision.FP16, -1)
        if key not in self.held:
            self.held[key] = self.graph.constant(w.array().astype(np.float16), w.name)
        return self.held[key]

    # ------------------------------------------------------------------ run-time quantization

    def _dynamic(self, node: Node, per: Per) -> None:
        x, w = node.input(0), node.input(1)
        data = w.array()
        if node.attr("transpose_b"):
            data = np.ascontiguousarray(data.T)
        key = (w, Precision.W8A8_DYNAMIC, int(bool(node.attr("transpose_b"))))
        if key not in self.held:
            q = weight_qparams(data, 1, 8)
            self.held[key] = self.graph.constant(quantize(data, q), f"{w.name}_q", q)
        quantizer = self.quantized.get((x, per))
        if quantizer is None:
            quantizer = self._quantizer(x, per, node)
            self.quantized[x, per] = quantizer
        ints, scale = quantizer.outputs
        out = node.output
        new = self.graph.add(
            "dynamic_matmul",
            [ints, self.held[key], scale, node.optional(2), node.optional(3)],
            {"act_min": node.attr("act_min"), "act_max": node.attr("act_max")},
            before=node,
            sources=node.sources,
        )
        self.graph.replace_node(node, new.output)
        succeed(new, node, out)

    def _quantizer(self, x: Value, per: Per, before: Node) -> Node:
        shape = (*x.shape[:-1], 1) if per == "row" else ()
        return self.graph.add(
            "dynamic_quantize",
            [x],
            {"per": per},
            types=[
                TensorType(x.shape, DType.INT8, RUN_TIME_GRID),
                TensorType(shape, DType.FLOAT32),
            ],
            name=f"{x.name}_quantize",
            names=[f"{x.name}_q", f"{x.name}_scale"],
            before=before,
        )


def group_qparams(
    w: Array, axis: int, size: int, bits: int, asymmetric: bool = False, factored: bool = False
) -> QuantParams:
    """Choose the scale of each group of `size` weights along `axis`.

    Symmetric scales of narrow weights have the least squared error over a grid of clipped ranges
    (`weight_qparams`); asymmetric ones cover the range.

    Args:
        w: Finite weights; `size` divides the extent of `axis`.
        axis: The axis that products sum over.
        size: Weights that share a scale.
        bits: 8 or 4.
        asymmetric: With zero points, held as unsigned integers.
        factored: Scales of a column are whole multiples of one (`factors`): what `w4a8-group` has.
    """
    if asymmetric:
        storage = DType.UINT4 if bits == 4 else DType.UINT8
        return choose_weight_qparams(
            w, axis=axis, group_size=size, storage=storage, scheme="asymmetric", narrow_range=False
        )
    parts = (*w.shape[:axis], w.shape[axis] // size, size, *w.shape[axis + 1 :])
    grouped = np.moveaxis(w.reshape(parts), axis + 1, -1)
    found = weight_qparams(grouped.reshape(-1, size), 0, bits)
    scale = found.scale.reshape(grouped.shape[:-1])
    if factored:
        scale = snapped(scale, 1 if axis == 0 else 0)
    storage = DType.INT4 if bits == 4 else DType.INT8
    zero = np.zeros(scale.shape, np.int32)
    return QuantParams(scale, zero, storage, found.qmin, found.qmax, PerGroup(axis, size))


def in_bytes(q: QuantParams) -> QuantParams:
    """Return the same symmetric grid held in int8, as integer products take weights."""
    return QuantParams(q.scale, q.zero_point, DType.INT8, q.qmin, q.qmax, q.granularity)
