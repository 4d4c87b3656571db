# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where integers are used: which nodes compute in integers, and how each value between is held.

The reason to quantize is an operator that multiplies (conv, matmul). Around those, an operator
joins the integer region when everything it reads is already in integers and its result leads to
another integer product; a head before the first product and a tail after the last stay float.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field

from qcompiler.infinite import mask_values
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.plan import INTEGER_BINARY, PrecisionPlan, integer_obstacle
from qcompiler.types import DType


class Kind(enum.Enum):
    """How a quantized activation is held."""

    U8 = "uint8, asymmetric"
    S8 = "int8, symmetric"
    S16 = "int16, symmetric"


Use = tuple[Node, int]


@dataclass
class Regions:
    """Result of `analyse`.

    Attributes:
        integer: Nodes that compute in integers, in topological order.
        fused: Operand uses (node, index) that carry an unrounded float inside one integer kernel.
        tables: Node of a table -> the quantized value that the table is indexed by.
        primary: Quantized value -> how it is held.
        eight: Value held in 16 bits -> how its readers of 8 bits get it.
        reasons: Node that could have been quantized but stays float -> why.
    """

    integer: dict[Node, None] = field(default_factory=dict)
    fused: set[Use] = field(default_factory=set)
    tables: dict[Node, Value] = field(default_factory=dict)
    primary: dict[Value, Kind] = field(default_factory=dict)
    eight: dict[Value, Kind] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)

    def reads(self, node: Node) -> Iterator[tuple[int, Value]]:
        """Yield (operand index, value) of the quantized operands of an integer node."""
        for i, v in integer_operands(node):
            if (node, i) not in self.fused:
                yield i, v


def integer_operands(node: Node) -> Iterator[tuple[int, Value]]:
    """Yield the operands of a node that its integer form reads as quantized activations.

    Weights and biases of products are not among them, scalars in elementwise functions neither.
    """
    name, kind = node.op.name, node.op.kind
    if kind is OpKind.RECURRENT:
        return  # it reads floats, the sums of its input product; its own product is inside
    for i, v in enumerate(node.inputs):
        if v is None or v.dtype is not DType.FLOAT32:
            continue
        if kind is OpKind.COMPUTE:
            stacked = (
                name == "matmul" and v.type.rank > 2
            )  # not one matrix: held like an activation
            if i == 0 or (i == 1 and (stacked or not v.is_constant)):
                yield i, v
        elif kind is OpKind.BINARY:
            if not (v.is_constant and v.type.size == 1):
                yield i, v
        elif i == 0 or name == "concat":
            yield i, v


def is_epilogue(node: Node) -> bool:
    """Whether the node only clamps, so that an integer kernel's output clamp does it."""
    return node.op.name in ("relu", "clip")


def single_use(graph: Graph, value: Value) -> bool:
    """Whether exactly one operand reads the value and the graph does not return it."""
    return len(value.uses) == 1 and not graph.is_output(value)


def analyse(graph: Graph, plan: PrecisionPlan, *, integer_scores: bool = False) -> Regions:
    """Return the integer regions of a FLOAT graph under a plan.

    Args:
        graph: FLOAT graph.
        plan: Precision per node.
        integer_scores: Quantize what softmax reads; else attention scores stay float32.
    """
    return _Analysis(graph, plan, integer_scores).run()


class _Analysis:
    def __init__(self, graph: Graph, plan: PrecisionPlan, integer_scores: bool) -> None:
        self.graph = graph
        self.plan = plan
        self.integer_scores = integer_scores
        self.out = Regions()
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.candidates: set[Node] = set()
        self.masks = mask_values(graph)
        self.base: dict[Value, Value] = {}
        self.requests: dict[Value, set[Kind]] = {}

    def run(self) -> Regions:
        products = [n for n in self.graph.nodes if self._is_product(n)]
        anyway = {v for n in products for _, v in integer_operands(n) if not v.is_constant}
        anyway.update(n.input(0) for n in self._norms_before(products))
        for node in self.graph.nodes:
            self._forward(node, anyway)
        self._backward()
        self._fuse_adds()
        for node in reversed(tuple(self.out.integer)):
            self._request(node)
        self._settle()
        return self.out

    def _norms_before(self, products: list[Node]) -> Iterator[Node]:
        """Yield the layer norms that some product depends on.

        They take any float, as 16 bits: a residual stream from an embedding or a float head then
        runs in integers from its first layer norm on.
        """
        before: set[Node] = set(products)
        for node in reversed(self.graph.nodes):
            if node in before or any(r in before for v in node.outputs for r in v.users):
                before.add(node)
                if (
                    node.op.name == "layer_norm"
                    and integer_obstacle(node) is None
                    and self.plan.precision(node.name).is_integer
                ):
                    yield node

    def _is_product(self, node: Node) -> bool:
        return (
            node.op.kind is OpKind.COMPUTE
            and self.plan.precision(node.name).is_integer
            and integer_obstacle(node) is None
        )

    def _is_recurrent(self, node: Node) -> bool:
        return (
            node.op.kind is OpKind.RECURRENT
            and self.plan.precision(node.name).is_integer
            and integer_obstacle(node) is None
        )

    # ------------------------------------------------------------------ which nodes

    def _forward(self, node: Node, anyway: set[Value]) -> None:
        """Decide whether the node could join: everything that it reads is in integers."""
        if self._is_product(node) or self._is_recurrent(node):
            self.candidates.add(node)
            return
        why = integer_obstacle(node)
        if why is None and not self.plan.precision(node.name).is_integer:
            why = self.plan.reason(node.name) or "the plan says float"
        if why is None and node.op.kind is OpKind.COMPUTE:
            why = "the plan says float"
        operands = [v for _, v in integer_operands(node) if not v.is_constant]
        if why is None and not operands:
            why = "it reads no activation"
        if why is None and not self.masks.isdisjoint(node.outputs):
            why = "it may hold infinities, as a mask of softmax does"
        if why is None and node.op.name != "softmax":
            for v in operands:
                if v.producer not in self.candidates and v not in anyway:
                    why = f"its operand {v.name!r} is float"
                    break
        if why is None and node.op.kind in (OpKind.UNARY, OpKind.BINARY):
            why = self._elementwise(node, operands)
        if why is None:
            self.candidates.add(node)
        else:
            self.out.reasons[node] = why

    def _elementwise(self, node: Node, operands: list[Value]) -> str | None:
        """Find what the function depends on; return why there is no integer form, or None."""
        roots = {self.base.get(v, v) for v in operands}
        vectors = [v for v in node.operands if v.is_constant and v.type.size > 1]
        if is_epilogue(node) and self._ends_kernel(operands[0]):
            return None
        if len(roots) == 1 and not vectors and self._keeps_shape(node, operands):
            root = roots.pop()
            self.base[node.output] = root
            self.out.tables[node] = root
            return None
        if node.op.name in INTEGER_BINARY:
            return None
        return f"operator has no integer form on two tensors: {node.op.name}"

    @staticmethod
    def _keeps_shape(node: Node, operands: list[Value]) -> bool:
        return all(v.shape == node.output.shape for v in operands)

    def _ends_kernel(self, value: Value) -> bool:
        """Whether the value is the result of a kernel that can clamp it, read only here."""
        p = value.producer
        return (
            p is not None
            and p in self.candidates
            and p not in self.out.tables
            and single_use(self.graph, value)
            and (
                p.op.kind in (OpKind.COMPUTE, OpKind.REDUCE)
                or p.op.name == "layer_norm"
                or p.op.kind is OpKind.BINARY
            )
        )

    def _backward(self) -> None:
        """Keep the candidates that lead to an integer product."""
        chosen: set[Node] = set()
        scores: set[Node] = set()  # float nodes whose result a softmax in integers reads
        for node in reversed(self.graph.nodes):
            integer = node in self.candidates and (
                node.op.kind in (OpKind.COMPUTE, OpKind.RECURRENT) or self._leads(node, chosen)
            )
            readers = [n for v in node.outputs for n in v.users]
            if integer:
                chosen.add(node)
            elif any(n in scores or (n in chosen and n.op.name == "softmax") for n in readers):
                scores.add(node)
            if node in self.candidates and not integer:
                why = "attention scores stay float32"
                self.out.reasons[node] = (
                    why if node in scores else "no integer product comes after it"
                )
        self.out.integer = {n: None for n in self.graph.nodes if n in chosen}
        self.out.tables = {n: v for n, v in self.out.tables.items() if n in chosen}
        for node in self.out.integer:
            if node in self.out.tables:
                self.out.fused.update(
                    (node, i) for i, v in integer_operands(node) if self.base.get(v, v) is not v
                )
            elif is_epilogue(node):
                self.out.fused.add((node, 0))

    def _leads(self, node: Node, chosen: set[Node]) -> bool:
        for v in node.outputs:
            for reader, i in v.uses:
                if reader not in chosen or (
                    reader.op.name == "softmax" and not self.integer_scores
                ):
                    continue
                if any(i == j for j, _ in integer_operands(reader)):
                    return True
        return False

    def _fuse_adds(self) -> None:
        """Let an addition join the product that makes one of its operands (the later one)."""
        for node in self.out.integer:
            if node.op.name != "add" or node in self.out.tables:
                continue
            a, b = node.input(0), node.input(1)
            best: int | None = None
            for i, (v, other) in enumerate(((a, b), (b, a))):
                p = v.producer
                if (
                    p is None
                    or p.op.kind is not OpKind.COMPUTE
                    or p not in self.out.integer
                    or not single_use(self.graph, v)
                    or other.is_constant
                    or not v.shape == other.shape == node.output.shape
                ):
                    continue
                if best is None or self.order[p] > self._order(node.input(best)):
                    best = i
            if best is not None:
                self.out.fused.add((node, best))

    def _order(self, value: Value) -> int:
        return -1 if value.producer is None else self.order[value.producer]

    # ------------------------------------------------------------------ how values are held

    def _request(self, node: Node) -> None:
        """Ask for the form in which the node reads its operands (its readers came before)."""
        if node.op.kind is OpKind.RECURRENT:
            # The loop itself reads its hidden state back in 8 bits, whoever else reads it.
            self.requests.setdefault(node.outputs[0], set()).add(Kind.U8)
            return
        kind = self._operand_kind(node)
        for i, v in self.out.reads(node):
            if node.op.name == "softmax" and not self.integer_scores:
                self.out.fused.add((node, i))  # reads a float that no kernel rounds
                continue
            wanted = Kind.S8 if node.op.kind is OpKind.COMPUTE and i == 1 else kind
            self.requests.setdefault(v, set()).add(wanted)

    def _operand_kind(self, node: Node) -> Kind:
        if node.op.name == "layer_norm":
            return Kind.S16
        if node.op.kind is OpKind.MOVEMENT:
            found = {self._held(v) for v in node.outputs if v in self.requests}
            return _widest(found)
        if node.op.kind is OpKind.BINARY and node.op.name in ("add", "sub"):
            if node in self.out.tables:
                return Kind.U8
            return Kind.S16 if self._held(self._final(node)) is Kind.S16 else Kind.U8
        return Kind.U8

    def _final(self, node: Node) -> Value:
        """Return the value that a kernel ending in this node stores (after a fused clamp)."""
        v = node.output
        for reader, i in v.uses:
            if (reader, i) in self.out.fused and is_epilogue(reader):
                return reader.output
        return v

    def _held(self, value: Value) -> Kind:
        return _widest(self.requests.get(value, set()))

    def _settle(self) -> None:
        for value, kinds in self.requests.items():
            if value.producer is not None and value.producer.op.kind is OpKind.RECURRENT:
                kinds = kinds - {Kind.S16}  # its readers take what 8 bits hold
            primary = _widest(kinds)
            self.out.primary[value] = primary
            if primary is Kind.S16 and len(kinds) > 1:
                self.out.eight[value] = _widest(kinds - {Kind.S16})


def _widest(kinds: set[Kind]) -> Kind:
    if Kind.S16 in kinds:
        return Kind.S16
    return Kind.S8 if Kind.S8 in kinds else Kind.U8
