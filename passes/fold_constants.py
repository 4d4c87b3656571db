# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Evaluate nodes whose operands are all constants, or whose results have no elements.

A dequantize of a constant stays: it is how a quantized weight looks at stage QDQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node
from qcompiler.ops import EvalContext
from qcompiler.passes.rewrite import bypass
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array

_KEPT = frozenset({"dequantize", "opaque"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace nodes of constants by constants.

    Attributes:
        max_mb: Greatest constant to make, in MB of 2^20 bytes.
    """

    name: ClassVar[str] = "fold_constants"
    max_mb: int = 256

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was folded."""
        del ctx
        changed = False
        for node in graph.nodes:
            if self._folds(node):
                _fold(graph, node)
                changed = True
        return changed

    def _folds(self, node: Node) -> bool:
        if node.op.name in _KEPT or not all(v.is_constant for v in node.operands):
            return _is_empty(node)
        nbytes = sum(v.type.size * v.dtype.numpy.itemsize for v in node.outputs)
        return nbytes <= self.max_mb << 20


def _is_empty(node: Node) -> bool:
    """Whether the results are known whatever the operands: none of them has an element."""
    return all(v.type.size == 0 for v in node.outputs) and not any(
        v.type.is_quantized for v in node.outputs
    )


def _fold(graph: Graph, node: Node) -> None:
    if _is_empty(node):
        _replace(graph, node, [np.empty(v.shape, v.dtype.numpy) for v in node.outputs])
        return
    types = tuple(v.type if v is not None else None for v in node.inputs)
    arrays = node.op.evaluate(
        [v.array() if v is not None else None for v in node.inputs],
        node.attrs,
        EvalContext(types, tuple(v.type for v in node.outputs)),
    )
    _replace(graph, node, arrays)


def _replace(graph: Graph, node: Node, arrays: Sequence[Array]) -> None:
    constants = []
    for v, a in zip(node.outputs, arrays, strict=True):
        held = np.asarray(a, v.dtype.numpy)
        constants.append(graph.constant(held, v.name, v.qparams, v.dtype))
    if len(constants) == 1:
        bypass(graph, node, constants[0])
    else:
        graph.replace_node(node, *constants)
    for v, old in zip(constants, node.outputs, strict=True):
        v.name = old.name
