# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The rules of each stage, checked on a whole graph.

FLOAT: no quantized type anywhere. QDQ: quantized values come only from quantize, from constants,
and from movement operators between them; everything else computes on floats. INTEGER: integer
operators too. At every stage scales fit the tensor: one, one per index of an axis, or one per group
along it.
"""

from __future__ import annotations

from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind, Stage
from qcompiler.types import PerGroup, PerTensor


def problems(graph: Graph, stage: Stage) -> list[str]:
    """Return everything that is wrong with the graph at that stage, as sentences."""
    found: list[str] = []
    names: set[str] = set()
    defined: set[Value] = set(graph.inputs)

    def name_of(value: Value) -> None:
        if value.name in names:
            found.append(f"two values are named {value.name!r}")
        names.add(value.name)

    for v in graph.inputs:
        name_of(v)
    for v in graph.constants():
        name_of(v)
        defined.add(v)
        if v.data is not None and tuple(v.data.shape) != v.shape:
            found.append(f"constant {v.name!r}: data {v.data.shape}, type {v.type}")
    node_names: set[str] = set()
    for node in graph.nodes:
        if node.name in node_names:
            found.append(f"two nodes are named {node.name!r}")
        node_names.add(node.name)
        found += _node_problems(node, stage, defined)
        for i, v in enumerate(node.outputs):
            name_of(v)
            defined.add(v)
            if v.producer is not node or v.index != i:
                found.append(f"{node.name}: result {v.name!r} names another producer")
    for name, v in graph.outputs:
        if v not in defined:
            found.append(f"output {name!r} reads {v.name!r}, which nothing defines")
    for v in graph.values():
        problem = quantization_problem(v)
        if problem is not None:
            found.append(f"{v.name!r} is {v.type}: {problem}")
    if stage is Stage.FLOAT:
        found += [f"{v.name!r} is quantized" for v in graph.values() if v.type.is_quantized]
    return found


def quantization_problem(value: Value) -> str | None:
    """Return why the scales of a value do not fit it, or its integers their storage; or None."""
    q, shape = value.qparams, value.shape
    if q is None:
        return None
    g = q.granularity
    if not isinstance(g, PerTensor):
        if not -len(shape) <= g.axis < len(shape):
            return f"axis {g.axis} is outside a tensor of rank {len(shape)}"
        axis = g.axis % len(shape)
        want: tuple[int, ...] = (shape[axis],)
        if isinstance(g, PerGroup):
            groups = -(-shape[axis] // g.group_size)  # the last one may be shorter
            want = (*shape[:axis], groups, *shape[axis + 1 :])
        if q.scale.shape != want:
            return f"its scales have shape {list(q.scale.shape)}, expected {list(want)}"
    if value.data is not None and value.data.size and q.storage.bits < 8:
        least, greatest = int(value.data.min()), int(value.data.max())
        if least < q.storage.min or greatest > q.storage.max:
            return f"its integers [{least}, {greatest}] do not fit {q.storage.value}"
    return None


def _node_problems(node: Node, stage: Stage, defined: set[Value]) -> list[str]:
    found = []
    where = f"{node.name} ({node.op.name})"
    if stage not in node.op.stages:
        found.append(f"{where}: not legal at this stage")
    for i, v in enumerate(node.inputs):
        if v is None:
            continue
        if v not in defined:
            found.append(f"{where}: operand {v.name!r} is not defined before its use")
        if (node, i) not in v.uses:
            found.append(f"{where}: operand {v.name!r} does not know this use")
    reals = Stage.FLOAT in node.op.stages and node.op.kind not in (OpKind.CAST, OpKind.MOVEMENT)
    if stage is Stage.QDQ and reals:
        found += [
            f"{where}: reads quantized {v.name!r}" for v in node.operands if v.type.is_quantized
        ]
    if node.op.declared and node.op.outputs == 0:
        return found  # opaque: nothing but the ONNX node determines its results
    try:
        types = node.op.infer([v.type if v else None for v in node.inputs], node.attrs)
    except QCompilerError as error:
        return [*found, f"{where}: {error}"]
    if len(types) != len(node.outputs):
        found.append(f"{where}: {len(types)} results inferred, {len(node.outputs)} present")
        return found
    for t, v in zip(types, node.outputs, strict=True):
        same = t.shape == v.shape if node.op.declared else t == v.type
        if not same:
            found.append(f"{where}: result {v.name!r} is {v.type}, inferred {t}")
    return found
