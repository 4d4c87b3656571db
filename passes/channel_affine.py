# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Per-channel scale and shift between integer products -> a depthwise 1x1 convolution.

    x * f + s  ->  conv(x, f as [C, 1, 1, 1], s) with one group per channel

A normalization in front of an activation (DenseNet, pre-activation ResNet) cannot fold into a
convolution. As two 8-bit operations with an 8-bit constant each it would be rounded four times; as
a depthwise convolution its factors are exact (one scale per channel) and it is rounded once.
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.regions import Regions, single_use
from qcompiler.types import Array


def use_depthwise(graph: Graph, regions: Regions) -> bool:
    """Rewrite the per-channel constants of integer nodes; return whether any was.

    The convolution has the name of the first node that it stands for.
    """
    changed = False
    for node in graph.nodes:
        if node.graph is None or node not in regions.integer or node in regions.tables:
            continue
        found = _affine(node)
        if found is None:
            continue
        x, factor, shift = found
        last = node
        if node.op.name == "mul" and single_use(graph, node.output):
            (reader,) = node.output.users
            more = _affine(reader) if reader in regions.integer else None
            if more is not None and reader.op.name in ("add", "sub"):
                last, shift = reader, more[2]
        _replace(graph, node, last, x, factor, shift)
        changed = True
    return changed


def _affine(node: Node) -> tuple[Value, Array, Array] | None:
    """Return (x, factor [C], shift [C]) of a node that computes x * factor + shift."""
    name = node.op.name
    if name not in ("mul", "add", "sub") or node.output.type.rank != 4:
        return None
    for k in (0, 1):
        x, c = node.input(k), node.input(1 - k)
        if x.is_constant or not c.is_constant or x.shape != node.output.shape:
            continue
        if name == "sub" and k == 1:
            continue  # constant - x
        channels = x.shape[1]
        full = (1,) * (4 - c.type.rank) + c.shape
        if full != (1, channels, 1, 1):
            continue
        v = c.array().reshape(-1).astype(np.float32)
        one, zero = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        if name == "mul":
            return x, v, zero
        return x, one, v if name == "add" else -v
    return None


def _replace(graph: Graph, node: Node, last: Node, x: Value, factor: Array, shift: Array) -> None:
    channels = factor.size
    new = graph.add(
        "conv",
        [
            x,
            graph.constant(factor.reshape(channels, 1, 1, 1), f"{node.name}.factor"),
            graph.constant(shift, f"{node.name}.shift") if shift.any() else None,
        ],
        {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": channels},
        before=node,
        sources=tuple(dict.fromkeys((*node.sources, *last.sources))),
    )
    out = last.output
    graph.replace_node(last, new.output)
    if last is not node:
        graph.erase(node)
    new.name, new.output.name = node.name, out.name
