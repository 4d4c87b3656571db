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
from qcompiler.passes.widening import Widener
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import DType, TensorType

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
        _Widener(graph, _HALVES).run()
        return True


class _Widener(Widener):
    def widened(self, v: Value) -> Value:
        """Return the float32 form of a value."""
        if v.dtype not in _HALVES:
            return v
        if v not in self.wide:
            # An input, a constant, or the result of an opaque node: nothing has replaced it.
            if v.data is not None:
                data = v.data.astype(np.float32)
                self.wide[v] = self.graph.constant(data, v.name)
            else:
                self.wide[v] = self._casted(v, DType.FLOAT32)
        return self.wide[v]

    def as_it_was(self, v: Value) -> Value:
        """Return the value in its own dtype, for an opaque node or as a result of the graph."""
        producer = v.producer
        if v.dtype not in _HALVES or producer is None or producer.op.name == "opaque":
            return v
        if v not in self.narrow:
            self.narrow[v] = self._casted(self.widened(v), v.dtype)
            self.narrow[v].batch_axis = v.batch_axis
        return self.narrow[v]

    def cast(self, node: Node) -> None:
        x, y = self.widened(node.input(0)), node.output
        if y.dtype in _HALVES:
            self.wide[y] = x if x.dtype is DType.FLOAT32 else self._casted(x, DType.FLOAT32)
        else:
            self.graph.set_input(node, 0, x)

    def wide_type(self, t: TensorType) -> TensorType:
        return t

    def _casted(self, value: Value, dtype: DType) -> Value:
        name = f"{value.name}/{dtype.value}"
        node = self.graph.add(
            "cast", [value], {"to": dtype.value}, name=name, names=[f"{name}.out"]
        )
        return node.output
