# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Hold tensors of 4-bit integers in 8 bits between the operators of a model.

    y = f(x: int4)   ->   y = f(cast(x, int8))

Kernels address bytes, so a tensor of int4 takes one byte an element, with values from -8 to 7: the
same elements as of int8, in the clamp range of 4 bits where the tensor is quantized. Inputs and
results keep their dtypes, behind a cast (behind a requantize on the same grid if they are
quantized) that moves nothing; so do casts to 4 bits, which drop bits, and constants that a
dequantize reads: weights are packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import Stage
from qcompiler.passes.widening import Widener
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import WIDENED, DType, TensorType

_BEFORE_DROPPING = {
    DType.BOOL: DType.INT8,
    DType.FLOAT16: DType.FLOAT32,
    DType.BFLOAT16: DType.FLOAT32,
}
"""Dtypes that are cast to 4 bits by way of another, which holds them exactly."""


@dataclass(frozen=True)
class WidenIntegers(Pass):
    """Turn values of 4-bit integers into 8-bit ones, but for the graph's interface.

    A model that is quantized already says with 4 bits what its integers are quantized to, and is
    written as it came: such graphs can be left as they are until they are fused.
    """

    name: ClassVar[str] = "widen_integers"
    only_float: bool = False  # leave graphs at stage qdq alone

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was widened."""
        del ctx
        if self.only_float and graph.stage is not Stage.FLOAT:
            return False
        if not any(_computes_narrow(n) for n in graph.nodes):
            return False
        _Widener(graph, WIDENED).run()
        return True


def _is_narrow(v: Value) -> bool:
    return v.dtype in WIDENED


def _computes_narrow(node: Node) -> bool:
    """Whether a node is more than a cast between a 4-bit value and what holds it."""
    if not any(_is_narrow(v) for v in (*node.operands, *node.outputs)):
        return False
    if node.op.name == "dequantize":
        return not node.input(0).is_constant
    if node.op.name == "opaque":
        return any(_is_narrow(v) for v in node.operands)
    if node.op.name not in ("cast", "requantize"):
        return True
    x, y = node.input(0).dtype, node.output.dtype
    if node.op.name == "requantize":
        return WIDENED.get(x) is not y and WIDENED.get(y) is not x
    return WIDENED.get(x, y) is not y or (y in WIDENED and x in _BEFORE_DROPPING)


def _wide_type(t: TensorType) -> TensorType:
    """Return the type of the same elements in 8 bits."""
    storage = WIDENED[t.dtype]
    q = None if t.qparams is None else replace(t.qparams, storage=storage)
    return TensorType(t.shape, storage, q)


class _Widener(Widener):
    def stays(self, node: Node) -> bool:
        return node.op.name == "dequantize" and node.input(0).is_constant

    def widened(self, v: Value) -> Value:
        """Return a value with its 4-bit integers held in 8 bits."""
        if not _is_narrow(v):
            return v
        if v not in self.wide:
            # An input, a constant, a cast or the result of an opaque node: nothing replaced it.
            wanted = _wide_type(v.type)
            if v.is_constant:
                self.wide[v] = self.graph.constant(v.array(), v.name, wanted.qparams, wanted.dtype)
            else:
                self.wide[v] = self._held(v, wanted)
        return self.wide[v]

    def as_it_was(self, v: Value) -> Value:
        """Return a value in its own dtype, for an opaque node or as a result of the graph."""
        if v not in self.wide or v.producer is None or v.producer.op.name in ("cast", "opaque"):
            return v
        if v not in self.narrow:
            self.narrow[v] = self._held(self.wide[v], v.type)
        return self.narrow[v]

    def cast(self, node: Node) -> None:
        x, y = self.widened(node.input(0)), node.output
        if x.type == y.type:
            self.graph.replace_uses(y, x)
            return
        between = _BEFORE_DROPPING.get(x.dtype)
        if _is_narrow(y) and between is not None:
            x = self._held(x, TensorType(x.shape, between))
        self.graph.set_input(node, 0, x)

    def wide_type(self, t: TensorType) -> TensorType:
        return _wide_type(t)

    def name_conversion(self, v: Value, wide: Value, made: Value) -> None:
        if made.producer is not None:
            wide.name = f"{v.name}/{wide.dtype.value}"
            made.producer.name = f"{v.name}/{v.dtype.value}"

    def _held(self, v: Value, wanted: TensorType) -> Value:
        """Return a value in another dtype: by a requantize where it is quantized, else a cast."""
        name = f"{v.name}/{wanted.dtype.value}"
        if wanted.qparams is None:
            to = {"to": wanted.dtype.value}
            node = self.graph.add("cast", [v], to, name=name, names=[f"{name}.out"])
        else:
            node = self.graph.add("requantize", [v], types=[wanted], name=name,
                                  names=[f"{name}.out"])  # fmt: skip
        node.output.batch_axis = v.batch_axis
        return node.output
