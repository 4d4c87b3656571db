# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Biases that the kernels of products cannot take are added behind them.

Before -> after:

    conv(x, w, b)  ->  add(conv(x, w), b)

where b is computed at run time, or, in a product of integers, does not fit 32 bits at the scale of
the accumulator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import quantize_bias
from qcompiler.ops import Stage
from qcompiler.passes.fuse_moves import dequantized, params
from qcompiler.passes.fuse_patterns import is_volume
from qcompiler.passes.rewrite import continued
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, PerGroup


@dataclass(frozen=True)
class FreeBias(Pass):
    """Add computed biases of a float graph behind its convolutions.

    A graph that is quantized already keeps them until it is fused, and is written as it came.
    """

    name: ClassVar[str] = "free_bias"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether a bias was moved."""
        del ctx
        return graph.stage is Stage.FLOAT and free_bias(graph)


def free_bias(graph: Graph) -> bool:
    """Add biases that kernels cannot take behind the product; return whether there were any."""
    changed = False
    for node in graph.nodes:
        if node.op.name not in ("conv", "matmul") or is_volume(node):
            continue
        bias = node.optional(2)
        x, w = dequantized(node.input(0)), dequantized(node.input(1))
        if bias is None or node.optional(3) is not None:
            continue
        if node.attr("act_min") is not None or node.attr("act_max") is not None:
            continue
        reals = known(bias)
        if reals is not None and (x is None or w is None or not _exceeds(reals, x, w)):
            continue
        graph.set_input(node, 2, None)
        continued(graph, node, partial(_with, graph, node, bias), "unbiased")
        changed = True
    if changed:
        graph.sort()
    return changed


def _exceeds(reals: Array, x: Value, w: Value) -> bool:
    """Whether a bias in the integers of the accumulator leaves 32 bits."""
    if isinstance(params(w).granularity, PerGroup) or not params(x).is_per_tensor:
        return False  # it is added as a float
    if reals.ndim != 1 or params(w).scale.size not in (1, reals.size):
        return False
    return bool(quantize_bias(reals, params(x).s, params(w).scale).clamped)


def _with(graph: Graph, node: Node, bias: Value, value: Value) -> Value:
    return added_bias(graph, node, value, bias)


def added_bias(graph: Graph, node: Node, value: Value, bias: Value) -> Value:
    """Return a value plus the bias of a product, which has one number per column."""
    if node.op.name == "conv" and node.attr("layout") == "NCHW":
        shape = (bias.type.size, *(1,) * (value.type.rank - 2))
        if bias.is_constant and bias.qparams is None:
            bias = graph.constant(bias.array().reshape(shape), bias.name)
        else:
            name = f"{node.name}/bias_shape"
            shaped = graph.add("reshape", [bias], {"shape": shape}, name=name, sources=node.sources)
            bias = shaped.output
    name = f"{node.name}/bias"
    return graph.add("add", [value, bias], name=name, sources=node.sources).output
