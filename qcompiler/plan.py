# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which precision each node computes in, and why: the artifact between assignment and insertion."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeGuard

import numpy as np

from qcompiler.document import Document
from qcompiler.errors import UsageError
from qcompiler.factors import FACTORED_RANGE
from qcompiler.ir import Graph, Node
from qcompiler.modality import is_regional, modalities, select
from qcompiler.ops import OpKind
from qcompiler.ops._recurrence import cell_of, settles
from qcompiler.types import DType, PerGroup, Precision

FORMAT = 1
"""Version of the JSON form."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Precision of one node and the reason for it, as a sentence fragment."""

    precision: Precision
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return the JSON form."""
        return {"precision": self.precision.value, "reason": self.reason}


@dataclass(frozen=True)
class PrecisionPlan(Document):
    """Decision per node name.

    Attributes:
        nodes: Node name -> decision, in the graph's order.
        graph: Digest of the graph it was made for; empty where it fits any graph with the names.
        methods: Text form of the post-training methods that ran under it; None where nothing is
            known of them, as in a plan written by hand.
    """

    title: ClassVar[str] = "precision plan"

    nodes: Mapping[str, Decision] = field(default_factory=dict)
    graph: str = ""
    methods: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", dict(self.nodes))

    def __iter__(self) -> Iterator[str]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def precision(self, name: str) -> Precision:
        """Return the precision of a node; FP32 for one that the plan does not name."""
        decision = self.nodes.get(name)
        return decision.precision if decision is not None else Precision.FP32

    def reason(self, name: str) -> str:
        """Return the reason of a node; empty for one that the plan does not name."""
        decision = self.nodes.get(name)
        return decision.reason if decision is not None else ""

    @property
    def has_narrow(self) -> bool:
        """Whether any node has a precision of `narrow_products`."""
        found = (d.precision for d in self.nodes.values())
        return any(p.is_dynamic or p.is_weight_only for p in found)

    @property
    def has_integers(self) -> bool:
        """Whether any node computes in integers."""
        return any(d.precision.is_integer for d in self.nodes.values())

    def replaced(self, changes: Mapping[str, Decision]) -> PrecisionPlan:
        """Return the plan with some decisions replaced or added."""
        return replace(self, nodes={**self.nodes, **changes})

    def overridden(self, graph: Graph, rules: Mapping[str, Precision | str]) -> PrecisionPlan:
        """Return the plan with precisions forced by rules; later rules win.

        Args:
            graph: Graph whose nodes the rules select.
            rules: Selector -> precision. A selector is a node name, a shell pattern over node
                names (`layer1.*`), `op:` followed by an operator's name (`op:matmul`), or a region
                (`input:image`: what depends on that input alone; `fusion`: where inputs meet), of
                which those nodes are chosen that can have the precision.

        Raises:
            UsageError: A selector that selects nothing (all of them listed), an unknown
                precision, or an integer precision for an operator without an integer form.
        """
        changes: dict[str, Decision] = {}
        empty: list[str] = []
        for selector, wanted in rules.items():
            precision = Precision.parse(wanted) if isinstance(wanted, str) else wanted
            chosen = _named(graph, selector)
            if not chosen and is_regional(selector):
                region = select(graph, selector)
                chosen = [n for n in region if obstacle_to(n, precision) is None]
            if not chosen:
                empty.append(selector)
            for node in chosen:
                obstacle = obstacle_to(node, precision)
                if obstacle is not None:
                    raise UsageError(
                        f"node {node.name!r} cannot have the precision {precision.value}: "
                        f"{obstacle}",
                        node=node.name,
                        hint=f"leave it out of {selector!r} or ask for fp32",
                    )
                changes[node.name] = Decision(precision, f"asked for by {selector!r}")
        if empty:
            raise _selects_nothing(graph, empty)
        return self.replaced(changes)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        doc: dict[str, Any] = {"format": FORMAT, "graph": self.graph}
        if self.methods is not None:
            doc["methods"] = self.methods
        doc["nodes"] = {name: d.to_json() for name, d in self.nodes.items()}
        return doc

    @classmethod
    def from_json(cls, doc: object) -> PrecisionPlan:
        """Return the plan that `to_json` wrote.

        Raises:
            UsageError: Not such a document, another format version, an unknown precision, or
                methods that are no text.
        """
        if not isinstance(doc, Mapping) or not isinstance(doc.get("nodes"), Mapping):
            raise UsageError("a precision plan is a JSON object with 'format', 'graph', 'nodes'")
        methods = doc.get("methods")
        if not isinstance(methods, str | None):
            raise UsageError(
                f"precision plan: 'methods' is {methods!r}, expected a text like 'equalize,gptq'",
                hint="an empty text stands for none",
            )
        if doc.get("format") != FORMAT:
            raise UsageError(f"precision plan of format {doc.get('format')!r}, expected {FORMAT}")
        nodes: dict[str, Decision] = {}
        for name, entry in doc["nodes"].items():
            if not isinstance(entry, Mapping) or "precision" not in entry:
                raise UsageError(f"precision plan: node {name!r} has no 'precision'")
            nodes[str(name)] = Decision(
                Precision.parse(str(entry["precision"])), str(entry.get("reason", ""))
            )
        return cls(nodes, str(doc.get("graph", "")), methods)

    def digest(self) -> str:
        """Return the sha256 of the JSON form as hex."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def selected(graph: Graph, selector: str) -> list[Node]:
    """Return the nodes that a selector of `PrecisionPlan.overridden` selects.

    Raises:
        UsageError: There is none.
    """
    chosen = _named(graph, selector)
    if not chosen and is_regional(selector):
        chosen = list(select(graph, selector))
    if not chosen:
        raise _selects_nothing(graph, [selector])
    return chosen


def _selects_nothing(graph: Graph, selectors: Sequence[str]) -> UsageError:
    return UsageError(
        f"no node is selected by {', '.join(map(repr, selectors))}",
        hint="a selector is a node name, a pattern over node names, op:NAME, or a region: "
        f"{', '.join(m.name for m in modalities(graph))}",
    )


def _named(graph: Graph, selector: str) -> list[Node]:
    """Return the nodes that a selector other than a region selects."""
    return [n for n in graph.nodes if _selects(selector, n)]


def _selects(selector: str, node: Node) -> bool:
    if selector.startswith("op:"):
        return node.op.name == selector[3:]
    return node.name == selector or fnmatch.fnmatchcase(node.name, selector)


# Elementwise functions whose 8-bit form is a table; the rest of the kind returns bool.
_NOT_FLOAT = frozenset({"not", "isnan", "isinf"})
# Binary operators: the first three have integer kernels, the others only join a table when one
# operand is a scalar constant (or both come from one tensor).
INTEGER_BINARY = frozenset({"add", "sub", "mul"})
TABLE_BINARY = frozenset({"add", "sub", "mul", "div", "pow", "min", "max", "prelu"})
# Functions whose small results matter as much as the large ones: a uniform 8-bit grid loses them.
_WIDE = frozenset({"exp", "log", "pow", "reciprocal", "sqrt"})
_REDUCTIONS = frozenset({"average_pool", "reduce_mean"})


def integer_obstacle(node: Node) -> str | None:
    """Return why the node has no integer form on its own, or None where it has one.

    This looks at the node alone; whether integers pay off also depends on its neighbours.
    """
    name, kind = node.op.name, node.op.kind
    results = [v.dtype for v in node.outputs]
    if any(t is not DType.FLOAT32 for t in results):
        return f"operator works on {results[0].value}, not float32: {name}"
    if kind is OpKind.COMPUTE:
        return _compute_obstacle(node)
    if kind is OpKind.RECURRENT:
        return _recurrent_obstacle(node)
    if kind is OpKind.MOVEMENT:
        return _movement_obstacle(node)
    if name in _WIDE or (name == "mul" and node.input(0) is node.input(1)):
        return f"its results span too many magnitudes for 8 bits: {name}"
    if kind is OpKind.UNARY and name not in _NOT_FLOAT:
        return None
    if kind is OpKind.BINARY and name in TABLE_BINARY:
        return None
    if name in _REDUCTIONS:
        return None
    if name == "softmax":
        return None
    if name == "layer_norm":
        if int(node.attr("axis")) not in (-1, node.input(0).type.rank - 1):
            return "layer_norm over more than the last axis has no integer form"
        if any(v is not None and not v.is_constant for v in node.inputs[1:]):
            return "layer_norm with computed scale or bias has no integer form"
        return None
    return f"operator has no integer form: {name}"


def _compute_obstacle(node: Node) -> str | None:
    name = node.op.name
    if name not in ("conv", "matmul"):
        return f"operator has no integer form: {name}"
    x, w, bias = node.input(0), node.input(1), node.optional(2)
    if x.is_constant:
        return f"the left operand of {name} is a constant"
    if name == "conv" and not w.is_constant:
        return "the weights of conv are computed, not constant"
    if name == "matmul" and (x.type.rank < 2 or w.type.rank < 2):
        return "matmul with a vector operand has no integer form"
    if bias is not None and not bias.is_constant:
        return f"the bias of {name} is computed, not constant"
    if node.optional(3) is not None:
        return f"{name} already carries a fused float operand"
    return None


def _recurrent_obstacle(node: Node) -> str | None:
    if not node.input(1).is_constant:
        return f"the recurrent weights of {node.op.name} are computed, not constant"
    cell = cell_of(node.op.name, node.attrs)
    unbounded = [f[0] for f in cell.functions if not settles(f)]
    if unbounded:
        return f"no table stands for {unbounded[0]}: it does not settle beyond [-8, 8]"
    return None


def _movement_obstacle(node: Node) -> str | None:
    name = node.op.name
    if name == "resize" and node.attr("mode") != "nearest":
        return f"resize with {node.attr('mode')} interpolation has no integer form"
    if name == "pad" and node.attr("mode") == "constant" and float(node.attr("value")) != 0.0:
        return "pad with a value other than 0 has no integer form"
    if name == "gather" and node.input(0).is_constant:
        return "gather reads a constant table"
    return None


def obstacle_to(node: Node, precision: Precision) -> str | None:
    """Return why the node cannot have a precision, or None where it can."""
    if precision is Precision.FP32:
        return None
    return integer_obstacle(node) if precision.is_integer else narrow_obstacle(node, precision)


_HALF_MAX = 65504.0
NO_WEIGHTS = "it has no weights to multiply"
"""Why most operators are float where only weights are to be held in fewer bits: by that choice."""
FLOAT_THERE = "float in the model"
"""Why operators of a quantized model are float where the model says nothing of integers."""


def narrow_obstacle(node: Node, precision: Precision) -> str | None:
    """Return why a node cannot have a precision that needs no calibration, or None.

    Those hold weights in fewer bits, or quantize activations at run time (`narrow_products`).
    """
    name = node.op.name
    if name == "gather" and precision is Precision.FP16:
        return _half_obstacle(node, 0)
    if name not in ("conv", "matmul"):
        return f"{NO_WEIGHTS}: {name}"
    w = node.input(1)
    if not w.is_constant or w.dtype is not DType.FLOAT32 or w.type.rank < 2 or not w.type.size:
        return f"the second operand of {name} is not a constant matrix of float32"
    if precision is Precision.FP16:
        return _half_obstacle(node, 1)
    if not np.isfinite(w.array()).all():
        return f"the weights of {name} have NaN or infinity"
    if name == "conv" and precision.is_dynamic:
        return "activations are quantized at run time for matrix products only: conv"
    if name == "conv" and node.attr("group") != 1:
        return "convolutions of several groups keep float weights"
    if name == "matmul" and (
        w.type.rank != 2 or node.input(0).type.rank < 2 or node.attr("transpose_a")
    ):
        return "the matrix product is not one of rows with a constant matrix"
    if precision.is_weight_only:
        extent = w.shape[summed_axis(node)]
        if group_size(extent, 32) < LEAST_GROUP:
            return f"{extent} weights along the summed axis make no groups of {LEAST_GROUP} or more"
    return None


WHOLE_GROUP = 8
"""Weights in groups that integers multiply: whole dot instructions of every target."""

LEAST_GROUP = 8
"""Fewest weights that share a scale: below, scales take as much memory as what they save."""


def group_size(extent: int, limit: int) -> int:
    """Return the largest group size up to `limit` that divides an extent."""
    return max(size for size in range(1, min(extent, limit) + 1) if extent % size == 0)


GROUP = 8
"""Weights along K that share a factor in `w4a8-group`; half of it where eight do not divide K."""


def integer_group(node: Node) -> int | None:
    """Return the group size of a product's weights in `w4a8-group`; None: one scale per column.

    Groups hold whole dot instructions of most targets; their factors cost no time (`factors`).
    """
    w = node.input(1)
    if node.op.name not in ("conv", "matmul") or not w.is_constant or w.type.rank not in (2, 4):
        return None
    if node.op.name == "conv" and node.attr("group") != 1:
        return None
    extent = w.shape[summed_axis(node)]
    return next((size for size in (GROUP, GROUP // 2) if extent % size == 0), None)


def summed_axis(node: Node) -> int:
    """Return the axis of the weights along which groups share a scale."""
    return 1 if node.op.name == "conv" or node.attr("transpose_b") else 0


def _half_obstacle(node: Node, at: int) -> str | None:
    w = node.input(at)
    if not w.is_constant or w.dtype is not DType.FLOAT32:
        return f"operand {at} of {node.op.name} is not a float32 constant"
    if w.type.size and not float(np.abs(w.array()).max()) <= _HALF_MAX:
        return f"the weights of {node.op.name} leave the range of half precision"
    return None


def is_name(precision: object) -> TypeGuard[str]:
    """Whether this names a precision for every node, rather than a plan or its file."""
    return isinstance(precision, str) and not precision.endswith(".json")


def uniform(graph: Graph, precision: Precision | str = Precision.W8A8) -> PrecisionPlan:
    """Return the plan that gives every node the precision where it has such a form.

    Args:
        graph: FLOAT graph; its digest is recorded.
        precision: For integer precisions the nodes without an integer form get FP32 with the
            reason; `insert_qdq` completes the reasons with what the neighbours decide.
    """
    from qcompiler.printer import digest

    wanted = Precision.parse(precision) if isinstance(precision, str) else precision
    nodes: dict[str, Decision] = {}
    for node in graph.nodes:
        obstacle = obstacle_to(node, wanted)
        if obstacle is not None:
            nodes[node.name] = Decision(Precision.FP32, obstacle)
        elif not wanted.is_integer:
            nodes[node.name] = Decision(wanted, _asked(wanted))
        elif node.op.kind in (OpKind.COMPUTE, OpKind.RECURRENT):
            constant = node.input(1).is_constant
            what = "weights and activations" if constant else "both operands"
            given = wanted
            if wanted is Precision.W4A8_GROUP and integer_group(node) is None:
                given = Precision.W4A8  # no groups: one scale per column
            nodes[node.name] = Decision(given, f"{what} are known: {_words(given)}")
        else:
            nodes[node.name] = Decision(wanted, "has an integer form; follows its neighbours")
    return PrecisionPlan(nodes, digest(graph))


def edges_in_eight_bits(graph: Graph, plan: PrecisionPlan) -> PrecisionPlan:
    """Return the plan with 8-bit weights in the first and last products.

    The first ones read what no product made, the last ones lead to no product: they hold few of the
    weights and, unlike all others, no neighbour makes up for their errors.
    """
    products = [n for n in graph.nodes if plan.precision(n.name).weight_bits < 8
                and plan.precision(n.name).is_integer and n.op.kind is OpKind.COMPUTE]  # fmt: skip
    every = {n for n in graph.nodes if n.op.kind is OpKind.COMPUTE}
    after: set[Node] = set()
    for node in graph.nodes:
        made = [v.producer for v in node.operands if v.producer is not None]
        if any(p in every or p in after for p in made):
            after.add(node)
    before: set[Node] = set()
    for node in reversed(graph.nodes):
        readers = [r for v in node.outputs for r in v.users]
        if any(r in every or r in before for r in readers):
            before.add(node)
    changes: dict[str, Decision] = {}
    for node in products:
        where = [w for w, inner in (("first", after), ("last", before)) if node not in inner]
        if where:
            reason = f"{' and '.join(where)} product: 8-bit weights"
            changes[node.name] = Decision(Precision.W8A8, reason)
    return plan.replaced(changes)


def _asked(precision: Precision) -> str:
    """Return the reason of a node that has a precision without calibration."""
    if precision is Precision.FP16:
        return "weights held in float16"
    if precision.is_weight_only:
        return f"weights held in int{precision.weight_bits} by groups, computed in float32"
    if precision.is_dynamic:
        by = "tensor" if precision is Precision.W8A8_DYNAMIC_TENSOR else "row"
        return f"activations quantized per {by} at run time"
    return f"{precision.value} was asked for"


def _words(precision: Precision) -> str:
    if precision is Precision.W4A8_GROUP:
        return "int4 weights by groups, int8 activations"
    w, a = precision.weight_bits, precision.activation_bits
    return f"int{w}" if w == a else f"int{w} weights, int{a} activations"


def precision_of(node: Node) -> Precision:
    """Return what a node of an INTEGER graph computes in."""
    weight = node.optional(1)
    product = node.op.name in ("qconv", "qmatmul")
    if product and weight is not None and weight.is_constant and weight.qparams is not None:
        q = weight.qparams
        four = q.qmax - q.qmin < 16
        if (isinstance(q.granularity, PerGroup) and four) or (q.qmin, q.qmax) == FACTORED_RANGE:
            return Precision.W4A8_GROUP
        bits = (q.qmax - q.qmin).bit_length()
        for p in Precision:
            if p.is_integer and (p.weight_bits, p.activation_bits) == (bits, 8):
                return p
        return Precision.W8A8
    narrow = _narrow_precision(node)
    if narrow is not None:
        return narrow
    quantized = any(v.type.is_quantized for v in (*node.operands, *node.outputs))
    return Precision.W8A8 if quantized else Precision.FP32


def _narrow_precision(node: Node) -> Precision | None:
    """Return the precision of a node with weights in fewer bits or a product at run-time scales."""
    if node.op.name == "dynamic_quantize":
        in_all = node.attr("per") == "tensor"
        return Precision.W8A8_DYNAMIC_TENSOR if in_all else Precision.W8A8_DYNAMIC
    if node.op.name == "dynamic_matmul":
        q, per_row = node.input(1).qparams, node.input(2).type.rank > 0
        if q is not None and isinstance(q.granularity, PerGroup) and q.qmax - q.qmin < 16:
            return Precision.W4A8_GROUP
        if node.input(2).is_constant:
            return Precision.W8A8
        return Precision.W8A8_DYNAMIC if per_row else Precision.W8A8_DYNAMIC_TENSOR
    if node.op.name == "gather" and node.input(0).dtype is DType.FLOAT16:
        return Precision.FP16
    w = node.optional(1)
    held = w.producer.input(0) if w is not None and w.producer is not None else None
    if node.op.name not in ("conv", "matmul") or held is None or not held.is_constant:
        return None
    if held.dtype is DType.FLOAT16:
        return Precision.FP16
    if held.qparams is not None:
        return Precision.W4 if held.dtype.bits == 4 else Precision.W8
    return None


def found_in(graph: Graph, products: Mapping[str, str] | None = None) -> PrecisionPlan:
    """Return the plan that an INTEGER graph of an already quantized model amounts to.

    Args:
        graph: The graph.
        products: Why products of quantized operands stay float, by name.
    """
    nodes: dict[str, Decision] = {}
    for node in graph.nodes:
        precision = precision_of(node)
        if products is not None and node.name in products:
            reason = f"no integer form of {node.op.name}: {products[node.name]}"
            decision = Decision(precision, reason)
        elif precision is not Precision.FP32:
            decision = Decision(precision, "quantized in the model: its scales are kept")
        elif _between_integers(node):
            reason = f"no integer form of {node.op.name} fits what the model says"
            decision = Decision(precision, reason)
        else:
            decision = Decision(precision, FLOAT_THERE)
        nodes[node.name] = decision
    return PrecisionPlan(nodes)


def _between_integers(node: Node) -> bool:
    """Whether the model quantizes what the node reads or makes: integers were meant there."""
    made = [v.producer for v in node.operands if not v.is_constant]
    read = [r for v in node.outputs for r in v.users]
    return any(n is not None and n.op.name == "dequantize" and not n.input(0).is_constant
               for n in made) or any(n.op.name == "quantize" for n in read)  # fmt: skip
