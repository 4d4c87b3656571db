# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A graph as JSON plus a list of constant arrays, and back. No pickles, no code."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.errors import ArtifactError, QCompilerError
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.types import (
    Array,
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    TensorType,
)


def _granularity_json(g: Granularity) -> list[Any]:
    if isinstance(g, PerAxis):
        return ["per_axis", g.axis]
    if isinstance(g, PerGroup):
        return ["per_group", g.axis, g.group_size]
    return ["per_tensor"]


def qparams_json(q: QuantParams) -> dict[str, Any]:
    """Return quantization parameters as JSON; scales are exact (hexadecimal floats)."""
    spread = {} if q.spread is None else {"spread": q.spread}
    return {
        "scale": [float(s).hex() for s in q.scale.reshape(-1)],
        "zero_point": q.zero_point.reshape(-1).tolist(),
        "shape": list(q.scale.shape),
        "storage": q.storage.value,
        "qmin": q.qmin,
        "qmax": q.qmax,
        "granularity": _granularity_json(q.granularity),
        **spread,
    }


def qparams_from_json(d: dict[str, Any]) -> QuantParams:
    """Inverse of `qparams_json`."""
    kind, *rest = d["granularity"]
    makers: dict[str, Any] = {"per_tensor": PerTensor, "per_axis": PerAxis, "per_group": PerGroup}
    shape = tuple(d["shape"])
    return QuantParams(
        np.array([float.fromhex(s) for s in d["scale"]], np.float32).reshape(shape),
        np.array(d["zero_point"], np.int32).reshape(shape),
        DType(d["storage"]),
        d["qmin"],
        d["qmax"],
        makers[kind](*rest),
        d.get("spread"),
    )


def _type_json(t: TensorType) -> dict[str, Any]:
    d: dict[str, Any] = {"shape": list(t.shape), "dtype": t.dtype.value}
    if t.qparams is not None:
        d["qparams"] = qparams_json(t.qparams)
    return d


def _type_from_json(d: dict[str, Any]) -> TensorType:
    q = qparams_from_json(d["qparams"]) if "qparams" in d else None
    return TensorType(tuple(d["shape"]), DType(d["dtype"]), q)


def _attr_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, tuple):
        return [_attr_json(v) for v in value]
    return value


def _attr_from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if "bytes" in value:
            return base64.b64decode(value["bytes"])
        return float.fromhex(value["float"])
    if isinstance(value, list):
        return tuple(_attr_from_json(v) for v in value)
    return value


def graph_to_json(graph: Graph) -> tuple[dict[str, Any], list[Array]]:
    """Return the graph as JSON and its constants in the order that the JSON refers to them."""
    constants = graph.constants()
    doc = {
        "name": graph.name,
        "stage": graph.stage.value,
        "inputs": [
            {"name": v.name, "type": _type_json(v.type), "batch_axis": v.batch_axis}
            for v in graph.inputs
        ],
        "constants": [{"name": v.name, "type": _type_json(v.type)} for v in constants],
        "nodes": [
            {
                "op": n.op.name,
                "name": n.name,
                "inputs": [v.name if v is not None else None for v in n.inputs],
                "outputs": [{"name": v.name, "type": _type_json(v.type)} for v in n.outputs],
                "attrs": {k: _attr_json(v) for k, v in n.attrs.items()},
                "sources": list(n.sources),
            }
            for n in graph.nodes
        ],
        "outputs": [
            {"name": name, "value": v.name, "batch_axis": v.batch_axis} for name, v in graph.outputs
        ],
    }
    return doc, [v.array() for v in constants]


def graph_from_json(doc: dict[str, Any], constants: Sequence[Array]) -> Graph:
    """Inverse of `graph_to_json`; the graph is verified.

    Raises:
        ArtifactError: The document does not describe a valid graph.
    """
    try:
        g = Graph(doc["name"], Stage(doc["stage"]))
        values: dict[str, Value] = {}
        for d in doc["inputs"]:
            v = g.add_input(d["name"], _type_from_json(d["type"]), d["batch_axis"])
            values[d["name"]] = v
        for d, data in zip(doc["constants"], constants, strict=True):
            t = _type_from_json(d["type"])
            values[d["name"]] = g.constant(data, d["name"], t.qparams, t.dtype)
        for d in doc["nodes"]:
            node = g.add(
                d["op"],
                [values[n] if n is not None else None for n in d["inputs"]],
                {k: _attr_from_json(v) for k, v in d["attrs"].items()},
                types=[_type_from_json(o["type"]) for o in d["outputs"]],
                name=d["name"],
                names=[o["name"] for o in d["outputs"]],
                sources=tuple(d["sources"]),
            )
            for o, v in zip(d["outputs"], node.outputs, strict=True):
                values[o["name"]] = v
        for o in doc["outputs"]:
            values[o["value"]].batch_axis = o["batch_axis"]
        g.set_outputs([(o["name"], values[o["value"]]) for o in doc["outputs"]])
        g.verify()
    except (KeyError, ValueError, TypeError, QCompilerError) as error:
        raise ArtifactError(f"the stored graph is not valid: {error}") from error
    return g
