# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Small edits of serialized ONNX models: wrap one node into a model, return inner values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from qcompiler.errors import ModelError, ShapeError
from qcompiler.types import DType, Shape

_ONNX = {
    DType.FLOAT32: TensorProto.FLOAT,
    DType.FLOAT16: TensorProto.FLOAT16,
    DType.FLOAT64: TensorProto.DOUBLE,
    DType.INT8: TensorProto.INT8,
    DType.UINT8: TensorProto.UINT8,
    DType.INT16: TensorProto.INT16,
    DType.UINT16: TensorProto.UINT16,
    DType.INT32: TensorProto.INT32,
    DType.UINT32: TensorProto.UINT32,
    DType.INT64: TensorProto.INT64,
    DType.UINT64: TensorProto.UINT64,
    DType.BOOL: TensorProto.BOOL,
}

# Newest version of the standard operators that accompanies a node of another domain.
_STANDARD_OPSET = 21


def single_node_model(
    node: bytes, domain: str, opset: int, operands: Sequence[tuple[DType, Shape] | None]
) -> tuple[bytes, tuple[str, ...], tuple[str, ...]]:
    """Wrap a serialized NodeProto into a model.

    Args:
        node: Serialized NodeProto.
        domain: Its operator domain.
        opset: Version of that domain.
        operands: Dtype and shape of each operand in the node's order; None where it is omitted.

    Returns:
        The serialized model, its input names (one per operand that is given, in order) and its
        output names.

    Raises:
        ModelError: The bytes are no node.
        ShapeError: The operands do not match the node's, or have a dtype that ONNX lacks.
    """
    proto = onnx.NodeProto()
    try:
        proto.ParseFromString(node)
    except DecodeError as error:
        raise ModelError(f"opaque node: its bytes are no ONNX node ({error})") from error
    slots = [i for i, name in enumerate(proto.input) if name]
    present = [t for t in operands if t is not None]
    if len(slots) != len(present):
        raise ShapeError(
            f"opaque {proto.op_type}: {len(present)} operands are given, the node has {len(slots)}",
            node=proto.name,
        )
    inputs = []
    for k, (slot, (dtype, shape)) in enumerate(zip(slots, present, strict=True)):
        if dtype not in _ONNX:
            raise ShapeError(f"opaque {proto.op_type}: operand {k} has dtype {dtype.value}")
        proto.input[slot] = f"in{k}"
        inputs.append(helper.make_tensor_value_info(f"in{k}", _ONNX[dtype], shape))
    names = [f"out{i}" if name else "" for i, name in enumerate(proto.output)]
    del proto.output[:]
    proto.output.extend(names)
    # Without types: the runtime infers them.
    outputs = [onnx.ValueInfoProto(name=name) for name in names if name]
    graph = helper.make_graph([proto], "node", inputs, outputs)
    opsets = [helper.make_opsetid(domain, opset)]
    if domain:
        opsets.append(helper.make_opsetid("", _STANDARD_OPSET))
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return (
        bytes(model.SerializeToString()),
        tuple(v.name for v in inputs),
        tuple(name for name in names if name),
    )


def with_outputs(model: bytes, names: Sequence[str]) -> bytes:
    """Return the serialized model with inner values added to its outputs.

    Raises:
        ModelError: The bytes are no model, or a name that it does not define.
    """
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise ModelError(f"the bytes are no ONNX model ({error})") from error
    known = {name for n in proto.graph.node for name in n.output}
    known |= {v.name for v in proto.graph.input}
    present = {v.name for v in proto.graph.output}
    missing = sorted(set(names) - known)
    if missing:
        raise ModelError(f"the model has no value {', '.join(missing)}")
    fresh = [onnx.ValueInfoProto(name=n) for n in dict.fromkeys(names) if n not in present]
    proto.graph.output.extend(fresh)
    return bytes(proto.SerializeToString())
