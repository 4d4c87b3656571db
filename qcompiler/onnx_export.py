# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Graphs as ONNX models: whole graphs at stages FLOAT and QDQ, single nodes, and regions.

Values keep their names, so that a tensor can be asked for by its name in the graph. The opset is
the least that has every operator and dtype: 17, or 21 for 16-bit, 4-bit and blocked quantization.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx

from qcompiler import (  # writers enter the table
    onnx_export_dynamic,
    onnx_export_movement,
    onnx_export_recurrent,
)
from qcompiler.errors import ModelError, UnsupportedOpError, UsageError
from qcompiler.ir import Graph, Node, Value
from qcompiler.onnx_export_ops import Emitter, opaque_proto
from qcompiler.onnx_import_model import MAX_OPSET, NodeChecker
from qcompiler.onnx_import_tensors import make_type
from qcompiler.ops import Stage
from qcompiler.types import Array, DType, PerGroup, TensorType

del onnx_export_dynamic, onnx_export_movement, onnx_export_recurrent

LEAST_OPSET = 17
"""LayerNormalization's opset; every importer that matters reads it."""

_NEEDS_21 = frozenset({DType.INT16, DType.UINT16, DType.INT4, DType.UINT4})


def to_onnx(
    graph: Graph, *, opset: int | None = None, extra_outputs: Sequence[str] = ()
) -> onnx.ModelProto:
    """Write a graph at stage FLOAT or QDQ as an ONNX model.

    Quantized constants are integer initializers followed by DequantizeLinear, as in the graph.

    Args:
        graph: The graph.
        opset: Opset to write; default: the least that fits.
        extra_outputs: Names of values that the model returns after the graph's own results.

    Raises:
        UsageError: The graph is at stage INTEGER, an unknown value name, or an opset that lacks
            an operator.
        UnsupportedOpError: No opset fits all opaque nodes.
    """
    if graph.stage is Stage.INTEGER:
        raise UsageError(
            f"graph {graph.name!r} is at stage integer; ONNX is written at float and qdq"
        )
    wanted = _extra(graph, extra_outputs)
    by_name = {v.name: v for v in graph.values()}
    e = Emitter(_opset(graph.nodes, opset))
    e.reserve([*by_name, *(n for n, _ in graph.outputs)])
    for name, v in graph.outputs:
        other = by_name.get(name)
        if other is not None and other is not v:
            if other in graph.inputs:
                raise UsageError(f"result {name!r} has the name of an input, which ONNX forbids")
            e.rename[other] = e.fresh(
                f"{name}/inner"
            )  # the result has the better claim to the name
        free = v.producer is not None and v not in e.rename and v.name not in extra_outputs
        if name != v.name and free and other is None:
            e.rename[v] = name
    for node in graph.nodes:
        e.write(node)
    outputs = []
    for name, v in graph.outputs:
        if e.ref(v) != name:
            e.put("Identity", [e.ref(v)], [name], f"{name}/Identity")
        outputs.append((name, v.type))
    own = {name for name, _ in graph.outputs}
    outputs += [(e.ref(v), v.type) for v in wanted if v.name not in own]
    return _model(e, graph.name, graph.inputs, outputs)


def node_to_onnx(node: Node, *, opset: int | None = None) -> onnx.ModelProto:
    """Write one node as a model: operands that are not constant are inputs, by value name."""
    if opset is None and node.op.name == "opaque" and not node.attr("domain"):
        opset = max(LEAST_OPSET, int(node.attr("opset")))
        opset = opset if _keeps_meaning(node, opset) else int(node.attr("opset"))
        given = list(dict.fromkeys(v for v in node.operands if not v.is_constant))
        return _region([node], given, node.outputs, opset, None)
    return subgraph_to_onnx([node], outputs=node.outputs, opset=opset)


def subgraph_to_onnx(
    nodes: Sequence[Node],
    inputs: Sequence[Value] | None = None,
    outputs: Sequence[Value] | None = None,
    *,
    opset: int | None = None,
    apart: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    """Write a region of a graph (of any stage, float operators only) as a model for TVM.

    What TVM's importer refuses or reads differently is written out in plainer operators.

    Args:
        nodes: The region in topological order.
        inputs: Values that come from outside; default: all such, in order of first use.
        outputs: Values to return; default: results that something outside reads.
        opset: Opset to write; default: the least that fits.
        apart: Takes the large constants by name, to be given to `ort.Session` beside the model:
            nothing is copied.

    Raises:
        UnsupportedOpError: An operator without an ONNX form.
        UsageError: An opset that lacks an operator.
    """
    region = set(nodes)
    if inputs is None:
        inside = {v for n in nodes for v in n.outputs}
        found = (v for n in nodes for v in n.operands if not v.is_constant and v not in inside)
        inputs = list(dict.fromkeys(found))
    if outputs is None:
        outputs = [v for n in nodes for v in n.outputs if _leaves(v, region)]
    return _region(nodes, inputs, outputs, _opset(nodes, opset), apart)


def _region(
    nodes: Sequence[Node],
    inputs: Sequence[Value],
    outputs: Sequence[Value],
    opset: int,
    apart: dict[str, Array] | None,
) -> onnx.ModelProto:
    e = Emitter(opset, plain=True, apart=apart)
    e.reserve([v.name for n in nodes for v in (*n.operands, *n.outputs)])
    for node in nodes:
        e.write(node)
    return _model(e, nodes[-1].name, inputs, [(v.name, v.type) for v in outputs])


def _leaves(v: Value, region: set[Node]) -> bool:
    graph = v.producer.graph if v.producer is not None else None
    returned = graph is not None and graph.is_output(v)
    return returned or not v.uses or any(n not in region for n in v.users)


def _extra(graph: Graph, names: Sequence[str]) -> list[Value]:
    by_name = {v.name: v for v in graph.values()}
    unknown = [n for n in names if n not in by_name]
    if unknown:
        raise UsageError(f"graph {graph.name!r} has no value named {', '.join(map(repr, unknown))}")
    return [by_name[n] for n in dict.fromkeys(names)]


def _model(
    e: Emitter,
    name: str,
    inputs: Iterable[Value],
    outputs: Iterable[tuple[str, TensorType]],
) -> onnx.ModelProto:
    outputs = list(outputs)
    nodes = _needed(e, {n for n, _ in outputs})
    graph = onnx.helper.make_graph(
        nodes,
        name,
        [onnx.helper.make_value_info(v.name, make_type(v.type)) for v in inputs],
        [onnx.helper.make_value_info(n, make_type(t)) for n, t in outputs],
        list(e.initializers.values()),
    )
    return _finish(graph, e.domains)


def _needed(e: Emitter, returned: set[str]) -> list[onnx.NodeProto]:
    """Return the nodes without those that only make what no written node reads."""
    nodes = e.nodes
    while e.skipped:
        read = returned | {name for node in nodes for name in node.input}
        idle = [n for n in nodes if all(o in e.skipped and o not in read for o in n.output)]
        if not idle:
            break
        # What only they read is made for nothing as well.
        e.skipped |= {name for n in idle for name in n.input}
        nodes = [n for n in nodes if n not in idle]
        kept = returned | {name for node in nodes for name in node.input}
        e.initializers = {n: t for n, t in e.initializers.items() if n in kept}
    return nodes


def _finish(graph: onnx.GraphProto, domains: dict[str, int]) -> onnx.ModelProto:
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in sorted(domains.items())]
    model: onnx.ModelProto = onnx.helper.make_model(
        graph, producer_name="qcompiler", opset_imports=opsets
    )
    known = [o for o in opsets if not o.domain]
    model.ir_version = max(8, onnx.helper.find_min_ir_version_for(known)) if known else 8
    return model


# ------------------------------------------------------------------------------------- opsets


def _required(node: Node) -> int:
    """Return the least opset that can express a node."""
    name, attrs = node.op.name, node.attrs
    need = [LEAST_OPSET]
    if name == "pad" and attrs["mode"] == "wrap":
        need.append(19)
    if name == "average_pool" and any(d != 1 for d in node.attr("dilations")):
        need.append(19)
    if name == "resize" and attrs["coordinate_mode"] == "half_pixel_symmetric":
        need.append(19)
    if name == "resize" and attrs["antialias"]:
        need.append(18)
    for v in (*node.operands, *node.outputs):
        q = v.qparams
        young = q is not None and (q.storage in _NEEDS_21 or isinstance(q.granularity, PerGroup))
        if young or v.dtype in (DType.INT4, DType.UINT4):
            need.append(21)
    return max(need)


_REDEFINED = {"Hardmax": 13, "RoiAlign": 16, "GridSample": 20}
"""Operators -> opset at which the same node came to mean something else."""


def _opset(nodes: Sequence[Node], asked: int | None) -> int:
    """Return the opset to write: the least that fits all nodes and keeps what opaque ones mean."""
    need = max((_required(n) for n in nodes), default=LEAST_OPSET)
    if asked is not None and not need <= asked <= MAX_OPSET:
        raise UsageError(f"opset {asked} does not fit; {need} to {MAX_OPSET} do")
    opaque = [n for n in nodes if n.op.name == "opaque" and not n.attr("domain")]
    for opset in [asked] if asked is not None else range(need, MAX_OPSET + 1):
        if all(_keeps_meaning(n, opset) for n in opaque):
            return opset
    operators = tuple(sorted({opaque_proto(n).op_type for n in opaque}))
    raise UnsupportedOpError(
        f"no opset from {need} to {MAX_OPSET} has the model's versions of {', '.join(operators)}",
        operators=operators,
    )


def _keeps_meaning(node: Node, opset: int) -> bool:
    """Whether an opaque node means the same at another opset.

    So it is where its operator has the same version, and where a later version still accepts the
    node and only added dtypes or attributes.
    """
    proto, own = opaque_proto(node), int(node.attr("opset"))
    if _since(proto.op_type, opset) == _since(proto.op_type, own):
        return True
    if opset < own or own < _REDEFINED.get(proto.op_type, 0) <= opset:
        return False
    try:
        NodeChecker({"": opset}, onnx.IR_VERSION).check(proto)
    except ModelError:
        return False
    return True


def _since(op: str, opset: int) -> int:
    try:
        schema = onnx.defs.get_schema(op, opset, "")
    except onnx.defs.SchemaError:
        return -1
    return int(schema.since_version)
