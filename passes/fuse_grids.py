# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Activations with several scales become ones on a grid of scale 1, which every kernel takes.

Before -> after, for scales S and zero points Z along an axis or in blocks, z one zero point:

    q = quantize(x; S, Z)   ->  q = quantize(round(x / S) + (Z - z); 1, z), the same codes
    dequantize(q; S, Z)     ->  S (dequantize(q; 1, z) - (Z - z)), the same reals
"""

from __future__ import annotations

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.fuse_moves import adder, dequantized, params, succeed
from qcompiler.types import DType, QuantParams, TensorType

Grids = dict[tuple[Value, tuple[int, ...]], Value]
"""Activations on a grid of scale 1, by value and padding."""

_CODES = (DType.INT8, DType.UINT8, DType.INT16, DType.UINT16)


def plain_grids(graph: Graph) -> bool:
    """Rewrite what is quantized with several scales and read as floats only."""
    made: Grids = {}
    changed = False
    for node in graph.nodes:
        v = dequantized(node.output) if node.op.name == "dequantize" else None
        if v is None or v.producer is None or v.producer.op.name != "quantize":
            continue
        if graph.is_output(v) or any(reader.op.name != "dequantize" for reader, _ in v.uses):
            continue  # its codes are needed: what dequantizes them is one kernel
        if params(v).is_per_tensor or v.dtype not in _CODES or not v.type.size:
            continue
        scale, zero = expanded(params(v), v.shape)
        middle = int(np.clip(np.median(zero), v.dtype.min, v.dtype.max))
        shifted = bool((zero != middle).any())
        real = regrid(graph, node, v, middle, shifted, made)
        if shifted:
            off = graph.constant((zero - middle).astype(np.float32), f"{v.name}_zero")
            real = graph.add("sub", [real, off], before=node, sources=node.sources).output
        factor = graph.constant(scale, f"{v.name}_scale")
        new = graph.add("mul", [real, factor], before=node, sources=node.sources)
        out = node.output
        graph.replace_node(node, new.output)
        succeed(new, node, out)
        changed = True
    if changed:
        graph.eliminate_dead()
        graph.sort()
    return changed


def regrid(
    graph: Graph,
    node: Node,
    v: Value,
    zero: int,
    shifted: bool,
    made: Grids,
    *,
    pads: tuple[int, ...] = (),
    always: bool = False,
) -> Value:
    """Return the codes of a value as reals on a grid of scale 1, of one zero point.

    Args:
        graph: The graph.
        node: What reads them.
        v: The quantized value.
        zero: The one zero point.
        shifted: Whether the value has others.
        made: What was made before.
        pads: Real zeros around the value that are to be codes too: those that its zero points say.
        always: Whether a value of one scale, which need not be 1, gets the scale 1, too.
    """
    if params(v).is_per_tensor and not (pads or always):
        return graph.add("dequantize", [v], before=node, sources=node.sources).output
    key = (v, pads)
    if key in made:
        return made[key]

    step = adder(graph, node)
    moves, root = _moves(v)
    source = root.producer
    if source is not None and source.op.name == "quantize":
        x = source.input(0)
        if any(pads):  # what is padded is moved as floats
            for move in moves:
                x = step(move.op.name, x, **dict(move.attrs))
            moves, root = [], v
    else:
        moves, root, x = [], v, step("dequantize", v)
    q = params(root)
    scale, zeros = expanded(q, root.shape)
    if any(pads):
        x = step("pad", x, pads=pads)  # before the rest, which one kernel then computes
    x = step("div", x, graph.constant(scale, f"{v.name}_scale"))
    if shifted:
        off = graph.constant((zeros - zero).astype(np.float32), f"{v.name}_zero")
        x = step("add", step("round", x), off)
    grid = QuantParams(np.float32(1), np.int32(zero), q.storage, q.qmin, q.qmax)
    types = [TensorType(x.shape, q.storage, grid)]
    codes = graph.add("quantize", [x], types=types, before=node, sources=node.sources)
    found = step("dequantize", codes.output)
    for move in moves:
        found = step(move.op.name, found, **dict(move.attrs))
    made[key] = found
    return found


def _moves(v: Value) -> tuple[list[Node], Value]:
    """Return the reshapes and transposes that a value comes from, in order, and what they move."""
    found: list[Node] = []
    while (made := v.producer) is not None and made.op.name in ("reshape", "transpose"):
        found.append(made)
        v = made.input(0)
    return found[::-1], v
