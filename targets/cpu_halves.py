# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Half precision on CPUs that multiply vectors of float16 (`kernels/halves` says how they add)."""

from __future__ import annotations

from typing import Any

from qcompiler.ir import Graph
from qcompiler.targets.choice import Tunable
from qcompiler.targets.cpu_lowering import CpuLowering
from qcompiler.targets.halves import HalfRules, with_halves
from qcompiler.targets.isa import Isa

__all__ = ["for_row"]

_EITHER = frozenset({
    "add", "average_pool", "elu", "gelu", "hard_sigmoid", "hard_swish", "leaky_relu", "max", "min",
    "mul", "reduce_mean", "sigmoid", "silu", "softplus", "sub", "tanh",
})  # fmt: skip
_TIED = frozenset({
    "clip", "concat", "depth_to_space", "expand", "max_pool", "pad", "relu", "reshape", "slice",
    "space_to_depth", "tile", "transpose",
})  # fmt: skip


def _unpacked(tunable: Tunable) -> tuple[Any, Any]:
    """Choose nothing: whether there is a kernel does not depend on it, and packing takes time."""
    from qcompiler.targets.kernels.packing import Facts, Packed

    del tunable
    return None, Packed((), (), Facts("half", saturating=False, zero_point=False, clip=False))


def for_row(graph: Graph, isa: Isa) -> Graph:
    """Return the graph as a row computes it: itself, or a copy with halves where the row has them.

    Products of float16 weights multiply halves there; on other rows they read their weights as
    float32.
    """
    if not isa.halves:
        return graph
    lowering = CpuLowering(isa, _unpacked)
    rules = HalfRules(_EITHER, _TIED, can=lambda node: bool(lowering.supports(node)))
    return with_halves(graph, rules)
