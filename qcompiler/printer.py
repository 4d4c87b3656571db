# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Stable text form of a graph, and its digest.

The text names everything that gives the graph its meaning; constants appear by the digest of their
bytes, so equal texts are equal networks.
"""

from __future__ import annotations

import hashlib
from typing import Any

from qcompiler.ir import Graph, Node, Value
from qcompiler.types import Array


def array_digest(data: Array) -> str:
    """Return a short digest of an array's dtype, shape and bytes."""
    h = hashlib.sha256(f"{data.dtype.str}{data.shape}".encode())
    h.update(data.tobytes())
    return h.hexdigest()[:12]


def _attr(value: Any) -> str:
    if isinstance(value, bytes):
        return f"bytes:{hashlib.sha256(value).hexdigest()[:12]}"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, tuple):
        return "[" + ",".join(_attr(v) for v in value) + "]"
    return str(value)


def _constant(value: Value) -> str:
    data = value.array()
    if data.size <= 8:
        body = "[" + ", ".join(_attr(v) for v in data.reshape(-1).tolist()) + "]"
    else:
        body = f"#{array_digest(data)}"
    qparams = ""
    if value.qparams is not None and not value.qparams.is_per_tensor:
        q = value.qparams
        qparams = f" scale#{array_digest(q.scale)} zero_point#{array_digest(q.zero_point)}"
    return f"%{value.name}: {value.type} = {body}{qparams}"


def print_node(node: Node) -> str:
    """Return one line for a node."""
    results = ", ".join(f"%{v.name}: {v.type}" for v in node.outputs)
    operands = ", ".join(f"%{v.name}" if v is not None else "_" for v in node.inputs)
    attrs = " ".join(f"{k}={_attr(v)}" for k, v in node.attrs.items() if v is not None)
    braces = f" {{{attrs}}}" if attrs else ""
    return f"{results} = {node.op.name}({operands}){braces}  # {node.name}"


def print_graph(graph: Graph) -> str:
    """Return the whole graph as text, one line per input, constant and node."""
    lines = [f"graph {graph.name} stage={graph.stage.value} {{"]
    lines += [f"  input %{v.name}: {v.type}" for v in graph.inputs]
    lines += [f"  const {_constant(v)}" for v in graph.constants()]
    lines += [f"  {print_node(n)}" for n in graph.nodes]
    lines += [f"  return {name} = %{v.name}" for name, v in graph.outputs]
    return "\n".join([*lines, "}"]) + "\n"


def digest(graph: Graph) -> str:
    """Return the sha256 of the printed graph as hex."""
    return hashlib.sha256(print_graph(graph).encode()).hexdigest()
