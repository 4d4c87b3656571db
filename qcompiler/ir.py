# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The graph IR: a mutable SSA graph with immutable, typed leaves.

`Value` is a tensor: a graph input, a constant, or a result of a `Node`. Identity is equality.
Every mutator of `Graph` checks everything first and changes the graph only then, so a failed call
leaves it as it was. Node order is a topological order at all times that `verify` accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.errors import QCompilerError, VerificationError
from qcompiler.ops import OpDef, Stage, op_def
from qcompiler.ops._base import REQUIRED, Attrs, AttrValue
from qcompiler.types import Array, DType, QuantParams, TensorType


class Value:
    """A tensor of a graph.

    Attributes:
        name: Unique within the graph.
        type: Shape, dtype and quantization.
        producer: The node that computes it; None for inputs and constants.
        index: Which result of the producer it is.
        data: The elements of a constant (not writeable); None otherwise.
        batch_axis: For inputs and outputs: the axis that counts samples; None where there is none.
    """

    __slots__ = ("_uses", "batch_axis", "data", "index", "name", "producer", "type")

    def __init__(self, name: str, type: TensorType, data: Array | None = None) -> None:
        self.name = name
        self.type = type
        self.producer: Node | None = None
        self.index = 0
        self.data = data
        self.batch_axis: int | None = None
        self._uses: dict[tuple[Node, int], None] = {}  # insertion-ordered: deterministic

    @property
    def is_constant(self) -> bool:
        """Whether the elements are known at compile time."""
        return self.data is not None

    @property
    def shape(self) -> tuple[int, ...]:
        """Static extents."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """Storage dtype."""
        return self.type.dtype

    @property
    def qparams(self) -> QuantParams | None:
        """Quantization of the tensor, if it is quantized."""
        return self.type.qparams

    @property
    def uses(self) -> tuple[tuple[Node, int], ...]:
        """(node, operand index) pairs that read the value, oldest first."""
        return tuple(self._uses)

    @property
    def users(self) -> tuple[Node, ...]:
        """Nodes that read the value, each once, oldest first."""
        return tuple(dict.fromkeys(n for n, _ in self._uses))

    def array(self) -> Array:
        """Return the elements of a constant.

        Raises:
            QCompilerError: The value is not a constant.
        """
        if self.data is None:
            raise QCompilerError(f"value {self.name!r} is not a constant", value=self.name)
        return self.data

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


class Node:
    """One application of an operator.

    Attributes:
        op: Row of the operator table.
        name: Unique within the graph; kept through rewrites where the meaning is kept, because
            plans and reports are keyed by it.
        attrs: Attributes with defaults filled in; replace through `Graph.set_attrs`.
        inputs: Operands (None = omitted optional one); change through `Graph.set_input`.
        outputs: Results.
        sources: Names of the model's original nodes that this node stands for.
    """

    __slots__ = ("_inputs", "attrs", "graph", "name", "op", "outputs", "sources")

    def __init__(
        self,
        op: OpDef,
        name: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        attrs: Mapping[str, AttrValue],
        sources: tuple[str, ...],
    ) -> None:
        self.op = op
        self.name = name
        self._inputs: list[Value | None] = list(inputs)
        self.outputs: tuple[Value, ...] = tuple(outputs)
        self.attrs: Attrs = dict(attrs)
        self.sources = sources
        self.graph: Graph | None = None

    @property
    def inputs(self) -> tuple[Value | None, ...]:
        """Operands; None where an optional one is omitted."""
        return tuple(self._inputs)

    @property
    def operands(self) -> tuple[Value, ...]:
        """Operands that are given."""
        return tuple(v for v in self._inputs if v is not None)

    @property
    def output(self) -> Value:
        """The only result.

        Raises:
            QCompilerError: The node has several results.
        """
        if len(self.outputs) != 1:
            raise QCompilerError(f"node {self.name!r} has {len(self.outputs)} results")
        return self.outputs[0]

    def input(self, i: int) -> Value:
        """Return operand `i`, which must be given.

        Raises:
            QCompilerError: It is omitted.
        """
        v = self._inputs[i] if i < len(self._inputs) else None
        if v is None:
            raise QCompilerError(f"node {self.name!r} ({self.op.name}) lacks operand {i}")
        return v

    def optional(self, i: int) -> Value | None:
        """Return operand `i` or None where it is omitted."""
        return self._inputs[i] if i < len(self._inputs) else None

    def attr(self, name: str) -> Any:
        """Return an attribute (its default is already filled in)."""
        return self.attrs[name]

    def __repr__(self) -> str:
        return (
            f"{self.name} = {self.op.name}({', '.join(v.name if v else '-' for v in self._inputs)})"
        )


def complete_attrs(op: OpDef, attrs: Mapping[str, AttrValue]) -> dict[str, AttrValue]:
    """Fill in defaults in the order of the table.

    Raises:
        QCompilerError: An unknown attribute, or a required one that is missing.
    """
    unknown = sorted(set(attrs) - set(op.attrs))
    if unknown:
        raise QCompilerError(f"{op.name} has no attribute {', '.join(unknown)}")
    full: dict[str, AttrValue] = {}
    for key, default in op.attrs.items():
        value = attrs.get(key, default)
        if value is REQUIRED:
            raise QCompilerError(f"{op.name} needs the attribute {key!r}")
        full[key] = value
    return full


class Graph:
    """A network.

    Attributes:
        name: Name of the model.
        stage: What operators and types it may hold.
        inputs: Graph inputs in order.
        outputs: (result name, value) pairs in order: the name a caller uses, and the tensor.
    """

    def __init__(self, name: str = "main", stage: Stage = Stage.FLOAT) -> None:
        self.name = name
        self.stage = stage
        self.inputs: list[Value] = []
        self._outputs: list[tuple[str, Value]] = []
        self._nodes: dict[Node, None] = {}
        self._names: dict[str, int] = {}

    # ------------------------------------------------------------------ reading

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes in topological order."""
        return tuple(self._nodes)

    @property
    def outputs(self) -> tuple[tuple[str, Value], ...]:
        """(result name, value) pairs."""
        return tuple(self._outputs)

    @property
    def output_values(self) -> tuple[Value, ...]:
        """Values that the graph returns."""
        return tuple(v for _, v in self._outputs)

    def constants(self) -> tuple[Value, ...]:
        """Constants that a node or an output reads, in order of first use."""
        seen: dict[Value, None] = {}
        for node in self._nodes:
            for v in node.operands:
                if v.is_constant:
                    seen.setdefault(v)
        for v in self.output_values:
            if v.is_constant:
                seen.setdefault(v)
        return tuple(seen)

    def values(self) -> Iterator[Value]:
        """Inputs, constants and results, each once, in a stable order."""
        yield from self.inputs
        yield from self.constants()
        for node in self._nodes:
            yield from node.outputs

    def node(self, name: str) -> Node:
        """Return the node of that name.

        Raises:
            QCompilerError: No such node.
        """
        for n in self._nodes:
            if n.name == name:
                return n
        raise QCompilerError(f"graph {self.name!r} has no node {name!r}", node=name)

    def is_output(self, value: Value) -> bool:
        """Whether the graph returns the value."""
        return any(v is value for _, v in self._outputs)

    def __len__(self) -> int:
        return len(self._nodes)

    # ----------------------------------------------------------------- building

    def fresh(self, base: str) -> str:
        """Reserve and return a name that nothing in the graph has, made from `base`."""
        base = base or "v"
        if base not in self._names:
            self._names[base] = 0
            return base
        while True:
            self._names[base] += 1
            name = f"{base}_{self._names[base]}"
            if name not in self._names:
                self._names[name] = 0
                return name

    def add_input(self, name: str, type: TensorType, batch_axis: int | None = None) -> Value:
        """Append a graph input."""
        v = Value(self.fresh(name), type)
        v.batch_axis = batch_axis
        self.inputs.append(v)
        return v

    def constant(
        self,
        data: Array,
        name: str = "const",
        qparams: QuantParams | None = None,
        dtype: DType | None = None,
    ) -> Value:
        """Make a constant; the array is copied unless it is already read-only.

        `dtype` is needed only where numpy cannot tell it (4-bit values held in 8 bits).
        """
        data = np.asarray(data)
        if data.flags.writeable:
            data = np.array(data)
            data.flags.writeable = False
        dt = dtype or (qparams.storage if qparams is not None else DType.of(data.dtype))
        if dt.numpy != data.dtype:
            raise QCompilerError(f"constant {name!r}: dtype {data.dtype} does not hold {dt.value}")
        return Value(self.fresh(name), TensorType(tuple(data.shape), dt, qparams), data)

    def add(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, AttrValue] | None = None,
        *,
        types: Sequence[TensorType] | None = None,
        name: str | None = None,
        names: Sequence[str] | None = None,
        before: Node | None = None,
        sources: tuple[str, ...] = (),
    ) -> Node:
        """Add a node; result types are inferred unless `types` gives them.

        Args:
            op: Operator name.
            inputs: Operands; trailing omitted ones may be left out.
            attrs: Attributes; defaults are filled in.
            types: Result types, needed for operators whose row says `declared`.
            name: Node name (made unique); default: the operator's name.
            names: Result names (made unique); default: the node's name.
            before: Insert before this node; default: append.
            sources: Original node names it stands for; default: its own name.

        Raises:
            QCompilerError: Wrong operand count or attributes; ShapeError from inference.
        """
        row = op_def(op)
        ins = list(inputs)
        while ins and ins[-1] is None:
            ins.pop()
        limit = row.max_inputs
        if len(ins) < row.min_inputs or (limit is not None and len(ins) > limit):
            raise QCompilerError(f"{op} takes {row.inputs}, got {len(ins)} operands", node=name)
        if before is not None and before not in self._nodes:
            raise QCompilerError(f"node {before.name!r} is not in the graph")
        full = complete_attrs(row, attrs or {})
        in_types = [v.type if v is not None else None for v in ins]
        if types is None:
            types = row.infer(in_types, full)
        node_name = self.fresh(name or op)
        outs = [
            Value(
                self.fresh(
                    names[i] if names else node_name + (f".{i}" if len(types) > 1 else ".out")
                ),
                t,
            )
            for i, t in enumerate(types)
        ]
        node = Node(row, node_name, ins, outs, full, sources or (node_name,))
        for i, v in enumerate(outs):
            v.producer, v.index = node, i
        node.graph = self
        for i, operand in enumerate(ins):
            if operand is not None:
                operand._uses[(node, i)] = None
        if before is None:
            self._nodes[node] = None
        else:
            self._insert_before(node, before)
        return node

    def _insert_before(self, node: Node, before: Node) -> None:
        rest: list[Node] = []
        found = False
        for n in self._nodes:
            if n is before:
                found = True
            if found:
                rest.append(n)
        for n in rest:
            del self._nodes[n]
        self._nodes[node] = None
        for n in rest:
            self._nodes[n] = None

    def set_outputs(self, outputs: Iterable[tuple[str, Value]]) -> None:
        """Set what the graph returns: (result name, value) pairs with distinct names.

        A value that takes the place of another one under its result name keeps its batch axis.
        """
        outs = list(outputs)
        if len({n for n, _ in outs}) != len(outs):
            raise QCompilerError("result names are not distinct")
        before = dict(self._outputs)
        for name, value in outs:
            if value.batch_axis is None and name in before:
                value.batch_axis = before[name].batch_axis
        self._outputs = outs

    # ----------------------------------------------------------------- mutating

    def set_input(self, node: Node, i: int, value: Value | None) -> None:
        """Make operand `i` of `node` read `value` (extends omitted trailing operands)."""
        if node not in self._nodes:
            raise QCompilerError(f"node {node.name!r} is not in the graph")
        limit = node.op.max_inputs
        if limit is not None and i >= limit:
            raise QCompilerError(f"{node.op.name} has no operand {i}", node=node.name)
        while len(node._inputs) <= i:
            node._inputs.append(None)
        old = node._inputs[i]
        if old is not None:
            old._uses.pop((node, i), None)
        node._inputs[i] = value
        if value is not None:
            value._uses[(node, i)] = None
        while node._inputs and node._inputs[-1] is None:
            node._inputs.pop()

    def set_attrs(self, node: Node, **attrs: AttrValue) -> None:
        """Replace some attributes of a node."""
        node.attrs = complete_attrs(node.op, {**node.attrs, **attrs})

    def set_type(self, value: Value, type: TensorType) -> None:
        """Change a value's type; constants keep theirs."""
        if value.is_constant:
            raise QCompilerError(f"the type of constant {value.name!r} follows from its data")
        value.type = type

    def replace_uses(self, old: Value, new: Value, *, keep_outputs: bool = False) -> None:
        """Make every reader of `old` (graph outputs included) read `new`."""
        if old is new:
            return
        for node, i in old.uses:
            self.set_input(node, i, new)
        if not keep_outputs:
            self.set_outputs([(n, new if v is old else v) for n, v in self._outputs])

    def erase(self, node: Node) -> None:
        """Remove a node that nothing reads.

        Raises:
            QCompilerError: A result is still read.
        """
        if node not in self._nodes:
            raise QCompilerError(f"node {node.name!r} is not in the graph")
        for v in node.outputs:
            if v._uses or self.is_output(v):
                raise QCompilerError(f"cannot erase {node.name!r}: {v.name!r} is still read")
        for i, operand in enumerate(node._inputs):
            if operand is not None:
                operand._uses.pop((node, i), None)
        del self._nodes[node]
        node.graph = None

    def replace_node(self, node: Node, *values: Value) -> None:
        """Replace the results of `node` by `values` and erase it."""
        if len(values) != len(node.outputs):
            raise QCompilerError(f"{node.name!r} has {len(node.outputs)} results")
        for old, new in zip(node.outputs, values, strict=True):
            self.replace_uses(old, new)
        self.erase(node)

    def eliminate_dead(self) -> int:
        """Erase nodes whose results nothing reads; return how many. O(nodes)."""
        gone = 0
        for node in reversed(self.nodes):
            if all(not v._uses and not self.is_output(v) for v in node.outputs):
                self.erase(node)
                gone += 1
        return gone

    def sort(self) -> None:
        """Restore a topological order, stable with respect to the present order.

        Raises:
            VerificationError: The graph has a cycle.
        """
        done: set[Node] = set()
        order: list[Node] = []
        for root in self.nodes:
            if root in done:
                continue
            stack: list[tuple[Node, Iterator[Value]]] = [(root, iter(root.operands))]
            active = {root}
            while stack:
                node, it = stack[-1]
                for v in it:
                    p = v.producer
                    if p is None or p in done:
                        continue
                    if p in active:
                        raise VerificationError(f"cycle through node {p.name!r}", node=p.name)
                    active.add(p)
                    stack.append((p, iter(p.operands)))
                    break
                else:
                    stack.pop()
                    active.discard(node)
                    done.add(node)
                    order.append(node)
        self._nodes = dict.fromkeys(order)

    def clone(self) -> Graph:
        """Return a copy that shares only constant arrays and immutable leaves."""
        g, _ = self.clone_with_map()
        return g

    def clone_with_map(self) -> tuple[Graph, dict[Value, Value]]:
        """Return a copy and the map from this graph's values to the copy's."""
        g = Graph(self.name, self.stage)
        g._names = dict(self._names)
        values: dict[Value, Value] = {}

        def copy(v: Value) -> Value:
            if v not in values:
                w = Value(v.name, v.type, v.data)
                w.batch_axis = v.batch_axis
                values[v] = w
            return values[v]

        g.inputs = [copy(v) for v in self.inputs]
        for node in self._nodes:
            ins = [copy(v) if v is not None else None for v in node._inputs]
            outs = [copy(v) for v in node.outputs]
            n = Node(node.op, node.name, ins, outs, node.attrs, node.sources)
            n.graph = g
            for i, v in enumerate(outs):
                v.producer, v.index = n, i
            for i, operand in enumerate(ins):
                if operand is not None:
                    operand._uses[(n, i)] = None
            g._nodes[n] = None
        g._outputs = [(name, copy(v)) for name, v in self._outputs]
        return g, values

    # ---------------------------------------------------------------- verifying

    def verify(self, stage: Stage | None = None) -> None:
        """Check use-def chains, order, names, legality at the stage and re-inferred types.

        Args:
            stage: Stage whose rules to apply; default: the graph's own.

        Raises:
            VerificationError: All problems in one message.
        """
        from qcompiler.verifier import problems

        found = problems(self, stage or self.stage)
        if found:
            text = "\n  ".join(found[:20])
            more = f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
            raise VerificationError(
                f"graph {self.name!r} breaks the rules of stage {(stage or self.stage).value}:\n"
                f"  {text}{more}"
            )

    def __str__(self) -> str:
        from qcompiler.printer import print_graph

        return print_graph(self)
