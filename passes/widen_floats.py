# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Compute in float32 what a model computes in float16 or bfloat16.

    y = f(x, w16)   ->   y = cast(f(cast(x), w32))

Half-precision exports are meant for GPUs; a CPU computes them in float32 anyway, and everything
that observes or quantizes float32 values then works on such models too. Inputs and results keep
their dtypes; opaque nodes keep theirs between casts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType

_HALVES = frozenset({DType.FLOAT16, DType.BFLOAT16})
_SHELL = frozenset({"cast", "opaque"})


@dataclass(frozen=True)
class WidenFloats(Pass):
    """Turn float16 and bfloat16 values into float32 ones, but for the graph's interface."""

    name: ClassVar[str] = "widen_floats"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was widened."""
        del ctx
        computing = [n for n in graph.nodes if n.op.name not in _SHELL]
        if not any(v.dtype in _HALVES for n in computing for v in (*n.operands, *n.outputs)):
            return False
        _Widener(graph).run()
        return True


class _Widener:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.wide: dict[Value, Value] = {}  # half value -> the same in float32
        self.narrow: dict[Value, Value] = {}  # half value -> itself, cast from its float32 form
        self.replaced: list[tuple[Node, Node]] = []

    def run(self) -> None:
        for node in self.graph.nodes:
            if not any(v.dtype in _HALVES for v in (*node.operands, *node.outputs)):
                continue
            if node.op.name == "opaque":
                for i, v in enumerate(node.inputs):
                    if v is not None and v.dtype in _HALVES:
                        self.graph.set_input(node, i, self.half(v))
            elif node.op.name == "cast":
                self.cast(node)
            else:
                self.compute(node)
        self.graph.set_outputs((name, self.half(v)) for name, v in self.graph.outputs)
        self.graph.eliminate_dead()
        for old, new in self.replaced:  # the old nodes are gone: their names are free
            new.name = old.name
            for v, w in zip(old.outputs, new.outputs, strict=True):
                self.narrow.get(v, w).name = v.name
        self.graph.sort()

    def float32(self, value: Value) -> Value:
        """Return the float32 form of a value."""
        if value.dtype not in _HALVES:
            return value
        if value not in self.wide:
            # An input, a constant, or the result of an opaque node: nothing has replaced it.
            if value.data is not None:
                data = value.data.astype(np.float32)
                self.wide[value] = self.graph.constant(data, value.name)
            else:
                self.wide[value] = self._casted(value, DType.FLOAT32)
        return self.wide[value]

    def half(self, value: Value) -> Value:
        """Return the value in its own dtype, for an opaque node or as a result of the graph."""
        producer = value.producer
        if value.dtype not in _HALVES or producer is None or producer.op.name == "opaque":
            return value
        if value not in self.narrow:
            self.narrow[value] = self._casted(self.float32(value), value.dtype)
            self.narrow[value].batch_axis = value.batch_axis
        return self.narrow[value]

    def cast(self, node: Node) -> None:
        x, y = self.float32(node.input(0)), node.output
        if y.dtype in _HALVES:
            self.wide[y] = x if x.dtype is DType.FLOAT32 else self._casted(x, DType.FLOAT32)
        else:
            self.graph.set_input(node, 0, x)

    def compute(self, node: Node) -> None:
        operands = [self.float32(v) if v is not None else None for v in node.inputs]
        new = self.graph.add(
            node.op.name,
            operands,
            node.attrs,
            types=[v.type for v in node.outputs] if node.op.declared else None,
            name=node.name,
            names=[v.name for v in node.outputs],
            sources=node.sources,
        )
        self.replaced.append((node, new))
        for old, value in zip(node.outputs, new.outputs, strict=True):
            value.batch_axis = old.batch_axis
            if old.dtype in _HALVES:
                self.wide[old] = value
            else:
                self.graph.replace_uses(old, value)

    def _casted(self, value: Value, dtype: DType) -> Value:
        name = f"{value.name}/{dtype.value}"
        node = self.graph.add(
            "cast", [value], {"to": dtype.value}, name=name, names=[f"{name}.out"]
        )
        return node.output
