# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""FLOAT -> QDQ: put quantize/dequantize pairs where the plan computes in integers.

Before -> after, for a convolution with an integer precision:

    y = conv(x, w, b)  ->  y = conv(dequantize(quantize(x)), dequantize(w8), dequantize(b32))

Nothing is rounded between a product, an addition and a clamp that become one kernel, nor inside a
chain of elementwise functions that becomes one table.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import networkx as nx
import numpy as np

from qcompiler.errors import CalibrationError
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import (
    choose_qparams,
    least_weight_scale,
    quantize,
    quantize_bias,
)
from qcompiler.ops import OpKind, Stage
from qcompiler.passes.calibrate import Calibrate, CalibrationTable
from qcompiler.passes.channel_affine import use_depthwise
from qcompiler.passes.fold_factors import FoldFactors
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.narrow_products import NarrowProducts, group_qparams, in_bytes
from qcompiler.passes.regions import Kind, Regions, analyse, integer_operands
from qcompiler.passes.weights import bias_qparams, weight_qparams
from qcompiler.passmanager import Pass, PassContext
from qcompiler.plan import Decision, PrecisionPlan, integer_group, integer_obstacle
from qcompiler.printer import digest
from qcompiler.types import (
    DType,
    PerGroup,
    Precision,
    QuantParams,
    TensorType,
)

S16_HEADROOM = 1.25
"""Factor by which a 16-bit range exceeds what calibration saw: 16 bits have room, and inputs
beyond the calibrated ones then do not saturate the residual stream."""

Form = tuple[Value, Kind]


@dataclass(frozen=True)
class WeightGrids:
    """Grids of weights that lie on them already, by name of the product.

    A method that rounds weights itself (`adaround`) provides them: the grid chosen anew from
    rounded weights could differ.
    """

    nodes: Mapping[str, QuantParams] = field(default_factory=dict)


_BOUNDED = 0.6
"""Root mean square that is assumed of what sigmoid and its like give: they use all of [0, 1]."""


@dataclass(frozen=True)
class InsertQdq(Pass):
    """Insert quantize/dequantize pairs by the precision plan and the calibration table.

    The plan is replaced by one that says for each node what it got and why.
    """

    name: ClassVar[str] = "insert_qdq"
    stage: ClassVar[tuple[Stage, Stage]] = (Stage.FLOAT, Stage.QDQ)
    requires: ClassVar[tuple[type, ...]] = (PrecisionPlan,)
    provides: ClassVar[tuple[type, ...]] = (PrecisionPlan,)
    integer_scores: bool = False  # quantize what softmax reads; else attention scores stay float32

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Insert the pairs.

        Raises:
            CalibrationError: A value that must be quantized has no range in the table.
        """
        plan = ctx.get(PrecisionPlan)
        regions = analyse(graph, plan, integer_scores=self.integer_scores)
        ctx.put(_explained(graph, plan, regions))
        if not regions.integer:
            return True  # the stage changes
        table = ctx.find(CalibrationTable)
        if table is None:
            raise CalibrationError(
                "the plan asks for integers but there is no calibration table",
                hint="give calibration data, or compile with precision fp32",
            )
        if table.graph and table.graph != digest(graph):
            raise CalibrationError(
                "the calibration table was made for another graph",
                hint="calibrate again: ranges belong to one graph after the same passes",
            )
        if use_depthwise(graph, regions):
            regions = analyse(graph, plan, integer_scores=self.integer_scores)
        grids = ctx.find(WeightGrids) or WeightGrids()
        _Insertion(graph, plan, regions, table, grids).run()
        return True


def quantize_passes(plan: PrecisionPlan, methods: Sequence[Pass] = ()) -> list[Pass]:
    """Return the passes from Graph[FLOAT] to Graph[INTEGER] for a plan.

    Args:
        plan: Precision per node.
        methods: Methods that keep accuracy (`qcompiler.passes.methods`); those that need the
            calibration table run after calibration, the others before it, in the given order.
    """
    passes: list[Pass] = [InsertQdq(), Fuse()]
    if plan.has_integers:
        passes.insert(1, FoldFactors())
    if plan.has_narrow:
        passes.append(NarrowProducts())
    if not plan.has_integers:
        return passes
    late = [m for m in methods if CalibrationTable in m.requires]
    early = [m for m in methods if CalibrationTable not in m.requires]
    return [*early, Calibrate(), *late, *passes]


def _explained(graph: Graph, plan: PrecisionPlan, regions: Regions) -> PrecisionPlan:
    """Return the plan with what each node got."""
    got: dict[str, Decision] = {}
    for node in graph.nodes:
        wanted = plan.precision(node.name)
        if node in regions.integer:
            reason = plan.reason(node.name)
            if node.op.kind not in (OpKind.COMPUTE, OpKind.RECURRENT):
                fused = [i for n, i in regions.fused if n is node]
                alone = not fused or node in regions.tables or node.op.name == "softmax"
                reason = "between integer products" if alone else "joins the kernel before it"
            got[node.name] = Decision(wanted, reason)
        elif wanted.is_integer or node in regions.reasons:
            reason = regions.reasons.get(node, integer_obstacle(node) or "stays float")
            kept = Precision.FP32 if wanted.is_integer else wanted
            got[node.name] = Decision(kept, reason)
    return plan.replaced(got)


class _Insertion:
    """One run of the pass."""

    def __init__(
        self,
        graph: Graph,
        plan: PrecisionPlan,
        regions: Regions,
        table: CalibrationTable,
        grids: WeightGrids,
    ) -> None:
        self.graph = graph
        self.plan = plan
        self.regions = regions
        self.table = table
        self.grids = grids
        self.qparams = self._choose()
        self.pairs: dict[Form, Value] = {}

    def run(self) -> None:
        readers = {v: v.uses for v in self.regions.primary}
        returned = {v for v in self.regions.primary if self.graph.is_output(v)}
        for node in self.regions.integer:
            for i, v in tuple(self.regions.reads(node)):
                self.graph.set_input(node, i, self._pair(v, self._form(node, i, v)))
            if node.op.kind is OpKind.COMPUTE:
                self._weights(node)
            elif node.op.kind is OpKind.RECURRENT:
                self._recurrent(node)
        for v, uses in readers.items():
            if v.producer is None or v.producer not in self.regions.integer:
                continue  # readers in float read the float itself
            real = self._pair(v, self.regions.primary[v])
            for node, i in uses:
                if node not in self.regions.integer or (
                    node.op.name == "softmax" and (node, i) in self.regions.fused
                ):
                    self.graph.set_input(node, i, real)
            if v in returned:
                outs = [(name, real if o is v else o) for name, o in self.graph.outputs]
                self.graph.set_outputs(outs)
        self.graph.sort()

    # ------------------------------------------------------------------ forms and parameters

    def _form(self, node: Node, i: int, v: Value) -> Kind:
        """Return the form of a value that an operand reads."""
        primary = self.regions.primary[v]
        if primary is not Kind.S16:
            return primary
        wide = node.op.name == "layer_norm"
        if node.op.kind is OpKind.MOVEMENT:
            wide = any(self.regions.primary.get(o) is Kind.S16 for o in node.outputs)
        elif node.op.name in ("add", "sub") and node not in self.regions.tables:
            wide = self.regions.primary.get(self._final(node)) is Kind.S16
        return Kind.S16 if wide else self.regions.eight[v]

    def _final(self, node: Node) -> Value:
        for reader, i in node.output.uses:
            if (reader, i) in self.regions.fused and reader.op.name in ("relu", "clip"):
                return reader.output
        return node.output

    def _choose(self) -> dict[Form, QuantParams]:
        """Choose the parameters of every form; those that movement ties together share one."""
        self._check_ranges()
        ties = nx.Graph()
        for v, kind in self.regions.primary.items():
            ties.add_node((v, kind))
            if v in self.regions.eight:
                ties.add_node((v, self.regions.eight[v]))
        bits: dict[Form, int] = {}
        for node in self.regions.integer:
            for i, v in self.regions.reads(node):
                form = (v, self._form(node, i, v))
                if node.op.kind is OpKind.MOVEMENT:
                    for o in node.outputs:
                        held = self.regions.primary.get(o)
                        # A result of another width than the operand gets its own requantize.
                        if held is not None and (held is Kind.S16) == (form[1] is Kind.S16):
                            ties.add_edge(form, (o, held))
                elif node.op.kind is OpKind.COMPUTE and form[1] is not Kind.S16:
                    asked = self.plan.precision(node.name).activation_bits
                    bits[form] = min(asked, bits.get(form, asked))
        chosen: dict[Form, QuantParams] = {}
        for group in nx.connected_components(ties):
            kinds = {kind for _, kind in group}
            # An operand read as int8 decides for everything tied to it.
            kind = Kind.S8 if kinds == {Kind.S8, Kind.U8} else next(iter(kinds))
            width = min((bits.get(f, 8) for f in group), default=8)
            q = self._group_qparams({v for v, _ in group}, kind, width)
            chosen.update(dict.fromkeys(group, q))
        return chosen

    def _check_ranges(self) -> None:
        missing = [
            v.name
            for v in self.graph.values()
            if v in self.regions.primary and not self._known(v) and self.table.find(v.name) is None
        ]
        if missing:
            raise CalibrationError(
                f"the calibration table has no range for {', '.join(missing)}",
                value=missing[0],
                hint="calibrate the graph that is quantized, after the same passes",
            )

    @staticmethod
    def _known(v: Value) -> bool:
        """Whether the range of a value follows from what it is."""
        bounded = ("softmax", "sigmoid", "hard_sigmoid")
        return v.is_constant or (v.producer is not None and v.producer.op.name in bounded)

    def _group_qparams(self, values: set[Value], kind: Kind, width: int) -> QuantParams:
        bounds = [self._range(v, kind) for v in values]
        lo, hi = min(b[0] for b in bounds), max(b[1] for b in bounds)
        if kind is Kind.S16:
            return choose_qparams(
                lo * S16_HEADROOM,
                hi * S16_HEADROOM,
                storage=DType.INT16,
                scheme="symmetric",
            )
        if kind is Kind.S8:
            q = choose_qparams(lo, hi, storage=DType.INT8, scheme="symmetric", bits=width)
        else:
            q = choose_qparams(lo, hi, storage=DType.UINT8, bits=width)
        return replace(q, spread=self._spread(values, q.s))

    def _spread(self, values: Collection[Value], scale: float) -> float | None:
        """The root mean square of the widest value, in steps; None where it is not known."""
        found = [self.table.find(v.name) for v in values if not v.is_constant]
        squares = [t.mean**2 + t.deviation**2 for t in found if t is not None and t.count]
        if any(self._known(v) and not v.is_constant for v in values):
            squares.append(_BOUNDED**2)
        return math.sqrt(max(squares)) / scale if squares else None

    def _range(self, v: Value, kind: Kind) -> tuple[float, float]:
        if v.is_constant:
            data = v.array()
            return float(data.min()), float(data.max())
        found = self.table.find(v.name)
        if self._known(v) or found is None:
            return 0.0, 1.0
        return found.bounds if kind is Kind.S16 else found.range

    # ------------------------------------------------------------------ inserting

    def _pair(self, v: Value, kind: Kind) -> Value:
        """Return the dequantized value of a form, making the pair on first use."""
        made = self.pairs.get((v, kind))
        if made is not None:
            return made
        q = self.qparams[v, kind]
        if v.is_constant:
            held = self.graph.constant(quantize(v.array(), q), f"{v.name}_q", q)
        else:
            source = v
            if self.regions.primary[v] is Kind.S16 and kind is not Kind.S16:
                source = self._pair(v, Kind.S16)
            held = self.graph.add(
                "quantize",
                [source],
                types=[TensorType(v.shape, q.storage, q)],
                name=f"{v.name}_quantize",
                names=[f"{v.name}_q"],
                sources=v.producer.sources if v.producer is not None else (),
            ).output
        real = self.graph.add(
            "dequantize", [held], name=f"{v.name}_dequantize", names=[f"{v.name}_dq"]
        ).output
        self.pairs[v, kind] = real
        return real

    def _weights(self, node: Node) -> None:
        """Quantize constant weights and the bias of a product."""
        w, bias = node.input(1), node.optional(2)
        computed = any(i == 1 for i, _ in integer_operands(node))
        weights = self._quantized_of(w) if computed else None
        x = self._quantized_of(node.input(0))
        if weights is None:
            data = w.array()
            axis = 0
            if node.op.name == "matmul":
                if node.attr("transpose_b"):
                    data = np.ascontiguousarray(np.swapaxes(data, 0, 1))
                    self.graph.set_attrs(node, transpose_b=False)
                axis = 1
            least = 0.0 if bias is None else least_weight_scale(bias.array(), x.s)
            precision = self.plan.precision(node.name)
            weights = self.grids.nodes.get(node.name)
            size = integer_group(node) if precision is Precision.W4A8_GROUP else None
            if weights is None and size is not None:
                bits = precision.weight_bits
                weights = in_bytes(group_qparams(data, 1 - axis, size, bits, factored=True))
            if weights is None:
                weights = weight_qparams(data, axis, precision.weight_bits, least)
            held = self.graph.constant(quantize(data, weights), f"{w.name}_q", weights)
            real = self.graph.add("dequantize", [held], name=f"{w.name}_dequantize")
            self.graph.set_input(node, 1, real.output)
        if bias is not None and not isinstance(weights.granularity, PerGroup):
            self._bias(node, bias, x, weights)

    def _recurrent(self, node: Node) -> None:
        """Quantize the recurrent weights: one scale per column, so one per gate and unit."""
        r = node.input(1)
        data = r.array()
        weights = self.grids.nodes.get(node.name)
        if weights is None:
            weights = weight_qparams(data, 1, self.plan.precision(node.name).weight_bits)
        held = self.graph.constant(quantize(data, weights), f"{r.name}_q", weights)
        real = self.graph.add("dequantize", [held], name=f"{r.name}_dequantize")
        self.graph.set_input(node, 1, real.output)
        if "carry" in node.attrs:
            self.graph.set_attrs(node, carry=self.table.states.get(node.name))

    def _bias(self, node: Node, bias: Value, x: QuantParams, w: QuantParams) -> None:
        ints = quantize_bias(bias.array(), x.s, w.scale).q
        held = self.graph.constant(ints, f"{bias.name}_q", bias_qparams(x.s, w))
        real = self.graph.add("dequantize", [held], name=f"{bias.name}_dequantize")
        self.graph.set_input(node, 2, real.output)

    @staticmethod
    def _quantized_of(value: Value) -> QuantParams:
        """Return the parameters of the quantized value that a dequantized one comes from."""
        p = value.producer
        q = p.input(0).qparams if p is not None and p.op.name == "dequantize" else None
        if q is None:
            raise CalibrationError(f"{value.name!r} is read by an integer product but is float")
        return q
