# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The nodes of an integer graph, one by one on the operands that ONNX Runtime computed.

ONNX Runtime runs a model without any optimization (ORT_DISABLE_ALL), and so computes what the file
says, operator by operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime

from qcompiler.driver import quantize_model
from qcompiler.interpreter import evaluate
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind, Stage
from qcompiler.types import Array, DType, PerTensor, QuantParams, TensorType

FINE = 256
"""Steps per code in which the distance from a tie is measured."""


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session that computes what the file says, on one thread."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def with_outputs(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Return the model with every value of our graph as an output that it computes too."""
    known = {o for n in model.graph.node for o in n.output} - {o.name for o in model.graph.output}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for node in graph.nodes:
        for v in node.outputs:
            if v.name in known:
                wide.graph.output.append(onnx.ValueInfoProto(name=v.name))
    return wide


@dataclass
class Layers:
    """What came of comparing the nodes one by one.

    Attributes:
        nodes: Nodes whose result ONNX Runtime computes too.
        integers: Elements of integer results that were compared.
        apart: How many of them differ.
        codes: Greatest difference, codes.
        tie: Greatest distance from a tie of those that differ, codes.
        floats: Greatest difference of float results, as a share of their greatest magnitude.
        worst: Node of the greatest distance.
    """

    nodes: int = 0
    integers: int = 0
    apart: int = 0
    codes: int = 0
    tie: float = 0.0
    floats: float = 0.0
    worst: str = ""


def compare_layers(
    model: onnx.ModelProto,
    graph: Graph,
    feeds: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Layers:
    """Run every node on ONNX Runtime's own operands, and compare what it computes with it."""
    wide = with_outputs(model, graph)
    names = [o.name for o in wide.graph.output]
    theirs = dict(zip(names, session(wide).run(names, dict(feeds)), strict=True))
    found = Layers()
    spelled = quantize_model(model, input_shapes=shapes, stage=Stage.QDQ).graph
    values: dict[Value, Array] = {}
    for v in graph.inputs:
        values[v] = np.asarray(feeds[v.name], v.dtype.numpy)
    held: dict[Node, list[Array | None]] = {}
    for node in graph.nodes:
        operands = [None if v is None else (v.array() if v.is_constant else values[v])
                    for v in node.inputs]  # fmt: skip
        held[node] = operands
        for v, ours in zip(node.outputs, evaluate(node, operands), strict=True):
            values[v] = ours
            want = _in_codes(theirs.get(v.name), v)
            if want is None or want.shape != ours.shape or want.dtype != ours.dtype:
                continue
            values[v] = want
            found.nodes += 1
            if ours.dtype.kind == "f":
                _floats(found, node, ours, want)
            else:
                _codes(found, node, v, held, ours, want)
                if node.op.name == "table" and (ours != want).any():
                    _table(found, spelled, v, values, ours != want)
    return found


def _in_codes(array: Array | None, v: Value) -> Array | None:
    """Return what ONNX Runtime computed as the codes that we hold, where it is on their grid."""
    q = v.qparams
    if array is None or q is None or not q.is_per_tensor or array.dtype.kind != "f":
        return array
    exact = array.astype(np.float64) / q.s
    codes = np.rint(exact)
    if np.abs(exact - codes).max(initial=0) > 1e-3:
        return None
    return (codes + q.z).astype(v.dtype.numpy)


def _floats(found: Layers, node: Node, ours: Array, want: Array) -> None:
    share = float(np.abs(ours - want).max(initial=0)) / max(
        float(np.abs(want).max(initial=0)), 1e-6
    )
    found.floats = max(found.floats, share)


def _codes(
    found: Layers,
    node: Node,
    v: Value,
    held: Mapping[Node, list[Array | None]],
    ours: Array,
    want: Array,
) -> None:
    apart = np.abs(ours.astype(np.int64) - want.astype(np.int64))
    found.integers += apart.size
    found.apart += int((apart > 0).sum())
    found.codes = max(found.codes, int(apart.max(initial=0)))
    if not apart.any():
        return
    distance = _from_tie(node, v, held, apart > 0)
    if distance > found.tie:
        found.tie = distance
        found.worst = f"{node.op.name} {v.name}"


def _from_tie(node: Node, v: Value, held: Mapping[Node, list[Array | None]], where: Array) -> float:
    """Return the greatest distance of some results from a tie: by the same node on a finer grid."""
    if node.op.name == "table":
        return 0.0  # see _table
    if v.qparams is None or not v.qparams.is_per_tensor:
        return 0.5
    exact = _fine(node, v, held).astype(np.float64)[where] / FINE
    return float(np.abs(exact - np.floor(exact) - 0.5).max())


def _fine(node: Node, v: Value, held: Mapping[Node, list[Array | None]]) -> Array:
    """Return a result in steps of 1 / FINE code; movement moves those of its source."""
    q = v.qparams
    assert q is not None
    grid = QuantParams(
        np.float32(q.s / FINE), np.int32(0), DType.INT32, -(2**30), 2**30, PerTensor()
    )
    operands = list(held[node])
    changed = [v]
    if node.op.kind is OpKind.MOVEMENT:
        changed += [x for x in node.operands if x.type.is_quantized]
        for i, x in enumerate(node.inputs):
            if x is not None and x.type.is_quantized and x.producer in held:
                operands[i] = _fine(x.producer, x, held)
    before = [x.type for x in changed]
    try:
        for x in changed:
            x.type = TensorType(x.shape, DType.INT32, grid)
        return evaluate(node, operands)[node.outputs.index(v)]
    finally:
        for x, kept in zip(changed, before, strict=True):
            x.type = kept


def _table(
    found: Layers, spelled: Graph, v: Value, values: Mapping[Value, Array], where: Array
) -> None:
    """Note the distance from a tie of table results: by the floats that the entries stand for."""
    held = {x.name: a for x, a in values.items() if x.qparams is not None and x is not v}
    last = next(n for n in spelled.nodes if n.outputs[0].name == v.name)

    def at(x: Value) -> Array:
        if x.is_constant:
            return x.array()
        if x.name in held:
            return held[x.name]
        assert x.producer is not None, f"nothing computes {x.name}"
        operands = [None if o is None else at(o) for o in x.producer.inputs]
        return evaluate(x.producer, operands)[x.producer.outputs.index(x)]

    q = v.qparams
    assert q is not None
    assert last.op.name == "quantize", last.op.name
    exact = at(last.input(0)).astype(np.float64)[where] / q.s
    distance = float(np.abs(exact - np.floor(exact) - 0.5).max())
    if distance > found.tie:
        found.tie, found.worst = distance, f"table {v.name}"
