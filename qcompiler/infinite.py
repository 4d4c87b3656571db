# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where infinities may go: attention masks hold -inf, and no integer stands for it.

An infinity passes through elementwise operators, movement, minima and maxima. A softmax ends it
(e**-inf is 0), and so does a comparison. Everything else (a product, a mean, a quantization) makes
NaN or a saturated number of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind
from qcompiler.types import DType

_ENDS = frozenset({"softmax", "log_softmax", "qsoftmax"})
_PASSES = frozenset({"where", "cast", "reduce_max", "reduce_min"})
_KINDS = frozenset({OpKind.UNARY, OpKind.BINARY, OpKind.MOVEMENT})
_RESIDUAL = 3
"""Operand of a product that is added to it."""


def mask_values(graph: Graph) -> frozenset[Value]:
    """Return the float32 values of a FLOAT graph that may hold infinities on purpose.

    These are inputs and constants with infinities that nothing but softmax and comparisons reads
    in the end, and what is computed of them before: they are never quantized.
    """
    found: set[Value] = set()
    sources: list[Value] = [v for v in graph.inputs if v.dtype is DType.FLOAT32]
    sources += [
        v for v in graph.constants() if v.array().dtype.kind == "f" and np.isinf(v.array()).any()
    ]
    for v in sources:
        trail, ends = _trail(graph, v)
        if ends and all(e is not None and _ends(e[0], e[1]) for e in ends):
            found |= trail
    return frozenset(found)


def takes_infinity(graph: Graph) -> frozenset[str]:
    """Return the names of the float32 inputs whose infinities mean what they mean in floats.

    At any stage: those that reach softmax, comparisons and results only.
    """
    names: set[str] = set()
    for v in graph.inputs:
        if v.dtype is not DType.FLOAT32 or v.type.is_quantized:
            continue
        ends = _trail(graph, v)[1]
        if all(e is None or _ends(e[0], e[1]) for e in ends):
            names.add(v.name)
    return frozenset(names)


def names_of(values: Iterable[Value], graph: Graph) -> frozenset[str]:
    """Return the names of the inputs among some values."""
    inputs: Mapping[Value, None] = dict.fromkeys(graph.inputs)
    return frozenset(v.name for v in values if v in inputs)


def _trail(graph: Graph, start: Value) -> tuple[set[Value], list[tuple[Node, int] | None]]:
    """Return the values that infinities of one pass through, and the uses that end them.

    None among the uses: a result of the graph.
    """
    trail = {start}
    ends: list[tuple[Node, int] | None] = []
    todo = [start]
    while todo:
        v = todo.pop()
        if graph.is_output(v):
            ends.append(None)
        for node, i in v.uses:
            if not _passes(node, i):
                ends.append((node, i))
                continue
            for y in node.outputs:
                if y not in trail:
                    trail.add(y)
                    todo.append(y)
    return trail, ends


def _passes(node: Node, operand: int) -> bool:
    if node.outputs[0].dtype is not DType.FLOAT32:
        return False
    if node.op.kind is OpKind.COMPUTE:
        return operand == _RESIDUAL and node.attrs.get("act_min") is None
    return node.op.kind in _KINDS or node.op.name in _PASSES


def _ends(node: Node, operand: int) -> bool:
    """Whether the operator makes a sound result of infinities."""
    if node.outputs[0].dtype is DType.BOOL:
        return True
    return node.op.name in _ENDS and operand == 0
