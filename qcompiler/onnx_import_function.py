# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Bodies of operators that ONNX defines as functions of simpler ones.

Source: onnx.defs: OpSchema.function_body and its context-dependent form, which ONNX builds for the
node's attributes, the presence of its operands and their types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx


def function_body(
    schema: onnx.defs.OpSchema,
    node: onnx.NodeProto,
    version: int,
    types: Sequence[onnx.TypeProto],
) -> onnx.FunctionProto | None:
    """Return the body of an operator for a node, its attributes filled in; None without a body.

    Args:
        schema: The operator's schema.
        node: The node.
        version: Opset of the node's domain.
        types: Types of its operands; an empty TypeProto for an omitted one.
    """
    if schema.has_context_dependent_function:
        known = schema.context_dependent_function_opset_versions
        data = schema.get_context_dependent_function_with_opset_version(
            _nearest(known, version),
            node.SerializeToString(),
            [t.SerializeToString() for t in types],
        )
    elif schema.has_function:
        known = schema.function_opset_versions
        data = schema.get_function_with_opset_version(_nearest(known, version))
    else:
        return None
    if not data:
        return None
    body = onnx.FunctionProto()
    body.ParseFromString(data)
    given = {a.name: a for a in node.attribute}
    for name, attribute in schema.attributes.items():
        if name not in given and attribute.default_value.type:
            given[name] = attribute.default_value
    omitted = {n for n, t in zip(body.input, types, strict=False) if not t.WhichOneof("value")}
    omitted.update(body.input[len(types) :])
    for i, inner in enumerate(body.node):
        # Names say where a node comes from.
        inner.name = f"{node.name or node.op_type}/{inner.op_type}_{i}"
        _bind(inner, given, omitted)
    return body


def _nearest(known: Sequence[int], version: int) -> int:
    """Return the greatest version up to the node's, else the least."""
    return max((v for v in known if v <= version), default=min(known))


def _bind(
    node: onnx.NodeProto, given: Mapping[str, onnx.AttributeProto], omitted: set[str]
) -> None:
    """Replace references to the function's attributes and operands by what the node gives."""
    for i, name in enumerate(node.input):
        if name in omitted:
            node.input[i] = ""
    kept = []
    for a in node.attribute:
        if not a.ref_attr_name:
            kept.append(a)
        elif a.ref_attr_name in given:
            bound = onnx.AttributeProto()
            bound.CopyFrom(given[a.ref_attr_name])
            bound.name = a.name
            kept.append(bound)
    for a in kept:
        for inner in (*a.g.node, *(n for g in a.graphs for n in g.node)):
            _bind(inner, given, omitted)
    copies = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
    del node.attribute[:]
    node.attribute.extend(copies)
