# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Recognize activation functions that a model writes out, by their values.

    x * 0.5 * (1 + erf(x / sqrt(2)))   ->  gelu(x)        x * sigmoid(x)        ->  silu(x)
    x * clip(x + 3, 0, 6) / 6          ->  hard_swish(x)  x * tanh(softplus(x)) ->  mish(x)

Exporters write these in dozens of ways. So instead of one pattern per way, an expression of one
tensor and constant numbers is evaluated on a grid and compared with the functions of the operator
table: two such short expressions that agree on thousands of points are the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import EvalContext, OpKind, op_def
from qcompiler.ops._base import AttrValue
from qcompiler.passes.rewrite import scalar, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, DType, TensorType

_MAX_NODES = 16
"""Longest expression tried; the tanh form of GELU as exported by PyTorch has 9 operators."""

_TOLERANCE = 4e-6
"""Greatest difference relative to 1 + |x|: float32 rounding of the longest forms stays below;
the two forms of GELU, the closest candidates, differ by 1.6e-4."""

_GRID = np.concatenate(
    [np.linspace(-30, 30, 3001), np.linspace(-4, 4, 1601), [-1e-3, -1e-6, 0.0, 1e-6, 1e-3]]
).astype(np.float32)

_CANDIDATES: tuple[tuple[str, dict[str, AttrValue]], ...] = (
    ("gelu", {"approximate": "none"}),
    ("gelu", {"approximate": "tanh"}),
    ("silu", {}),
    ("hard_swish", {}),
    ("mish", {}),
    ("sigmoid", {}),
    ("hard_sigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    ("softplus", {}),
    ("softsign", {}),
)
_BENT = frozenset(
    {
        *("erf", "tanh", "sigmoid", "softplus", "exp", "hard_sigmoid", "clip", "relu", "abs"),
        *("min", "max", "silu", "mish"),
    }
)


@dataclass(frozen=True)
class RecognizeActivations(Pass):
    """Replace expressions of one float32 tensor by the activation function that they compute."""

    name: ClassVar[str] = "recognize_activations"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was recognized."""
        del ctx
        position = {n: i for i, n in enumerate(graph.nodes)}
        changed = False
        for node in reversed(graph.nodes):  # outermost first: the longest expression wins
            if node.graph is graph and node.op.name in ("mul", "div", "reciprocal", "log", "clip"):
                changed |= _recognize(graph, node, position)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def _recognize(graph: Graph, root: Node, position: dict[Node, int]) -> bool:
    """Grow the expression upwards from its root; test it whenever it has one operand left."""
    if root.output.dtype is not DType.FLOAT32:
        return False
    region: list[Node] = []
    frontier: dict[Value, None] = {root.output: None}
    while len(region) < _MAX_NODES:
        value = max(frontier, key=lambda v: position.get(v.producer, -1) if v.producer else -1)
        node = value.producer
        if node is None or not _is_step(node, root):
            return False
        del frontier[value]
        region.append(node)
        frontier.update((v, None) for v in node.operands if scalar(v) is None)
        if len(frontier) == 1 and len(region) > 1:
            (leaf,) = frontier
            found = _identify(region, root, leaf)
            if found is not None:
                name, attrs = found
                new = graph.add(name, [leaf], attrs, name=root.name, sources=root.sources)
                position[new] = position[root]
                supersede(graph, root, new, *(n for n in reversed(region) if n is not root))
                return True
        if not frontier:
            return False
    return False


def _is_step(node: Node, root: Node) -> bool:
    """Whether a node computes each element from the same element of same-shaped operands."""
    if node.op.kind not in (OpKind.UNARY, OpKind.BINARY):
        return False
    same = all(v.shape == root.output.shape or scalar(v) is not None for v in node.operands)
    return same and all(v.dtype is DType.FLOAT32 for v in (*node.operands, *node.outputs))


def _identify(
    region: list[Node], root: Node, leaf: Value
) -> tuple[str, dict[str, AttrValue]] | None:
    if leaf.shape != root.output.shape or not any(n.op.name in _BENT for n in region):
        return None
    values: dict[Value, Array] = {leaf: _GRID}
    for node in reversed(region):
        arrays = [_element(v, values) for v in node.operands]
        types = tuple(TensorType(a.shape, DType.FLOAT32) for a in arrays)
        out = TensorType(_GRID.shape, DType.FLOAT32)
        with np.errstate(all="ignore"):
            values[node.output] = node.op.evaluate(arrays, node.attrs, EvalContext(types, (out,)))[
                0
            ]
    y = values[root.output]
    if y.shape != _GRID.shape or not np.isfinite(y).all():
        return None
    for i, (name, attrs) in enumerate(_CANDIDATES):
        if (np.abs(y - _reference(i)) <= _TOLERANCE * (1 + np.abs(_GRID))).all():
            return name, attrs
    return None


def _element(value: Value, values: dict[Value, Array]) -> Array:
    number = scalar(value)
    return values[value] if number is None else np.asarray(number, np.float32)


@cache
def _reference(i: int) -> Array:
    name, attrs = _CANDIDATES[i]
    t = TensorType(_GRID.shape, DType.FLOAT32)
    y: Array = op_def(name).evaluate([_GRID], attrs, EvalContext((t,), (t,)))[0]
    return y
