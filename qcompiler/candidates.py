# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which precisions of a target are worth a build: what automatic precision chooses among."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qcompiler.data import Budget
from qcompiler.ir import Graph, Node
from qcompiler.ops import OpKind
from qcompiler.plan import integer_group, obstacle_to
from qcompiler.targets.base import Backend
from qcompiler.types import Precision

if TYPE_CHECKING:
    from qcompiler.workshop import Prepared

__all__ = ["wanted_precisions"]

_NOTABLE = 0.1
"""Share of the work that products must be able to do in a precision that is worth a build."""
_FEW_ROWS = 16
"""Rows below which reading the weights takes longer than multiplying them."""
_CACHED = 2e6
"""Bytes of float weights that caches may keep between runs."""


def wanted_precisions(
    backend: Backend,
    prepared: Prepared,
    limits: Budget,
    overrides: Mapping[str, str | Precision] | None = None,
) -> list[Precision]:
    """Return the precisions of the target that are worth measuring, W8A8 and FP32 among them.

    Each of them costs a build and its measurement. Scales made at run time serve matrix products
    with constant weights, where those are a notable part of the work. Weights held in fewer bits
    for float products are there for limits on size, and where reading the weights is most of the
    work: large ones that multiply few rows. Half precision is faster than float32 as well where the
    target multiplies halves.
    """
    found = []
    asked = {Precision.parse(p) if isinstance(p, str) else p for p in (overrides or {}).values()}
    work = _Work(prepared.graph)
    for p in backend.spec.precisions:
        if p.is_integer or p is Precision.FP32:
            worth = p is not Precision.W4A8_GROUP or work.grouped()
        elif p.is_dynamic:
            worth = p is Precision.W8A8_DYNAMIC and work.share(p) >= _NOTABLE
        else:
            faster = p is Precision.FP16 and backend.spec.multiplies_halves
            worth = limits.max_size_mb is not None or (
                (faster or work.bound_by_weights()) and work.share(p) >= _NOTABLE
            )
        if worth or p in asked:
            found.append(p)
    return found


class _Work:
    """What the products of a graph have to do."""

    def __init__(self, graph: Graph) -> None:
        self.products = [
            n for n in graph.nodes
            if n.op.kind is OpKind.COMPUTE and len(n.inputs) > 1 and n.input(1).is_constant
        ]  # fmt: skip
        self.macs = {n: _macs(n) for n in self.products}

    def share(self, precision: Precision) -> float:
        """Return the share of the work that products can do in a precision."""
        total = sum(self.macs.values())
        able = sum(m for n, m in self.macs.items() if obstacle_to(n, precision) is None)
        return able / total if total else 0.0

    def grouped(self) -> bool:
        """Whether some product's weights make groups."""
        return any(integer_group(n) is not None for n in self.products)

    def bound_by_weights(self) -> bool:
        """Whether most of the weights multiply few rows and do not stay in the caches."""
        sizes = {n: n.input(1).type.size for n in self.products}
        total = sum(sizes.values())
        few = sum(s for n, s in sizes.items() if self.macs[n] <= _FEW_ROWS * s)
        return total * 4 > _CACHED and few > total / 2


def _macs(node: Node) -> int:
    """Return the multiply-accumulates of a product with constant weights."""
    w, out = node.input(1), node.output
    if node.op.name == "conv":
        return out.type.size * (w.type.size // max(w.shape[0], 1))
    return out.type.size * (node.input(0).shape[-1] if node.input(0).type.rank else 1)
