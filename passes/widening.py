# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What passes share that hold values of some dtypes in wider ones between a graph's interface.

Operators are made again on wide operands; inputs, results and what opaque operators read and
return keep their dtypes, behind a conversion.
"""

from __future__ import annotations

import abc
from collections.abc import Collection

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import DType, TensorType


class Widener(abc.ABC):
    """One run of such a pass.

    Attributes:
        graph: The graph that is rewritten.
        narrow_dtypes: What is widened.
        wide: Narrow value -> the same in its wide form.
        narrow: Narrow value -> itself, made from its wide form.
    """

    def __init__(self, graph: Graph, narrow_dtypes: Collection[DType]) -> None:
        """Begin with nothing widened."""
        self.graph, self.narrow_dtypes = graph, narrow_dtypes
        self.wide: dict[Value, Value] = {}
        self.narrow: dict[Value, Value] = {}
        self._replaced: list[tuple[Node, Node]] = []

    def run(self) -> None:
        """Rewrite the graph."""
        for node in self.graph.nodes:
            if not any(map(self.is_narrow, (*node.operands, *node.outputs))) or self.stays(node):
                continue
            if node.op.name == "opaque":
                for i, v in enumerate(node.inputs):
                    if v is not None and self.is_narrow(v):
                        self.graph.set_input(node, i, self.as_it_was(v))
            elif node.op.name == "cast":
                self.cast(node)
            else:
                self._compute(node)
        self.graph.set_outputs((name, self.as_it_was(v)) for name, v in self.graph.outputs)
        self.graph.eliminate_dead()
        for old, new in self._replaced:  # the old nodes are gone: their names are free
            new.name = old.name
            for v, w in zip(old.outputs, new.outputs, strict=True):
                made = self.narrow.get(v, w)
                made.name = v.name
                if made is not w:
                    self.name_conversion(v, w, made)
        self.graph.sort()

    def is_narrow(self, v: Value) -> bool:
        """Whether a value is widened."""
        return v.dtype in self.narrow_dtypes

    def stays(self, node: Node) -> bool:
        """Whether a node is left as it is."""
        del node
        return False

    @abc.abstractmethod
    def widened(self, v: Value) -> Value:
        """Return the wide form of a value, itself where it is not narrow."""

    @abc.abstractmethod
    def as_it_was(self, v: Value) -> Value:
        """Return a value in its own dtype, for an opaque node or as a result of the graph."""

    @abc.abstractmethod
    def cast(self, node: Node) -> None:
        """Rewrite a cast from or to a narrow dtype."""

    @abc.abstractmethod
    def wide_type(self, t: TensorType) -> TensorType:
        """Return the declared type of a narrow result in its wide form."""

    def name_conversion(self, v: Value, wide: Value, made: Value) -> None:
        """Name what converts a result of the graph back; by default it keeps its name."""
        del v, wide, made

    def _compute(self, node: Node) -> None:
        types = [self.wide_type(v.type) if self.is_narrow(v) else v.type for v in node.outputs]
        new = self.graph.add(
            node.op.name,
            [None if v is None else self.widened(v) for v in node.inputs],
            node.attrs,
            types=types if node.op.declared else None,
            name=node.name,
            names=[v.name for v in node.outputs],
            sources=node.sources,
        )
        self._replaced.append((node, new))
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.batch_axis = old.batch_axis
            if self.is_narrow(old):
                self.wide[old] = value
            else:
                self.graph.replace_uses(old, value)
