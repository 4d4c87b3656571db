# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What a converter of one ONNX operator sees: its operands, attributes, and how to emit nodes.

Emitting folds: an operator whose operands are all constants is evaluated at once, so that shape
arithmetic has turned into constants by the time a Reshape or Slice asks for its operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from qcompiler.errors import ModelError, QCompilerError, ShapeError, UnsupportedOpError
from qcompiler.ir import Graph, Value, complete_attrs
from qcompiler.onnx_import_tensors import element_count, read_tensor
from qcompiler.ops import AttrValue, EvalContext, op_def
from qcompiler.types import Array, DType, TensorType

MAX_FOLDED_BYTES = 256 * 2**20
"""Greatest constant that folding may make."""

_NOT_FOLDED = frozenset({"quantize", "dequantize", "requantize", "opaque"})


class Builder:
    """Emits nodes into a graph under names that the model has not taken.

    Args:
        graph: The graph that grows.
        taken: Names of the model's tensors and nodes, which helpers must not use.

    Attributes:
        created: Values made since somebody emptied it, so that results can take the model's names.
        plain: Names of the model's tensors whose numbers something reads as they are.
    """

    def __init__(self, graph: Graph, taken: set[str]) -> None:
        self.graph = graph
        self.created: dict[Value, None] = {}
        self.plain: set[str] = set()
        self._taken = taken

    def unique(self, base: str) -> str:
        """Reserve and return a name made from `base`."""
        name, k = base, 0
        while name in self._taken:
            k += 1
            name = f"{base}_{k}"
        self._taken.add(name)
        return name

    def constant(
        self, data: Array, name: str, dtype: DType | None = None, *, exact: bool = False
    ) -> Value:
        """Make a constant; `exact` keeps a name that the model itself gives."""
        v = self.graph.constant(data, name if exact else self.unique(name), dtype=dtype)
        if not exact:
            self.created[v] = None
        return v

    def emit(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, AttrValue],
        owner: str,
        types: Sequence[TensorType] | None = None,
    ) -> tuple[Value, ...]:
        """Add a node, or evaluate it where every operand is a constant.

        Raises:
            ShapeError: Operands that do not fit, a result too large.
        """
        row = op_def(op)
        attrs = complete_attrs(row, attrs)
        if op not in _NOT_FOLDED and all(v is None or v.is_constant for v in inputs):
            return self._evaluate(op, inputs, attrs, owner)
        base = self.unique(f"{owner}/{op}")
        count = len(types) if types is not None else row.outputs
        if count == 0:
            count = len(row.infer([v.type if v else None for v in inputs], attrs))
        names = [self.unique(f"{base}:{i}") for i in range(count)]
        node = self.graph.add(
            op, inputs, attrs, types=types, name=base, names=names, sources=(owner,)
        )
        for v in node.outputs:
            element_count(v.shape, f"result {v.name!r}")
        self.created.update(dict.fromkeys(node.outputs))
        return node.outputs

    def _evaluate(
        self, op: str, inputs: Sequence[Value | None], attrs: Mapping[str, AttrValue], owner: str
    ) -> tuple[Value, ...]:
        row = op_def(op)
        in_types = tuple(v.type if v is not None else None for v in inputs)
        types = row.infer(in_types, attrs)
        for t in types:
            check_folded_size(t.shape, t.dtype, f"the constant result of {op}")
        arrays = row.evaluate(
            [v.array() if v is not None else None for v in inputs],
            attrs,
            EvalContext(in_types, types),
        )
        return tuple(
            self.constant(np.asarray(a, t.dtype.numpy), f"{owner}/{op}", t.dtype)
            for a, t in zip(arrays, types, strict=True)
        )


def check_folded_size(shape: Sequence[int], dtype: DType, what: str) -> None:
    """Refuse to fold into a constant beyond `MAX_FOLDED_BYTES`.

    Raises:
        ShapeError: The constant would be larger.
    """
    nbytes = element_count(shape, what) * dtype.numpy.itemsize
    if nbytes > MAX_FOLDED_BYTES:
        raise ShapeError(
            f"{what} of shape {list(shape)} takes {nbytes >> 20} MB; constants are folded up to"
            f" {MAX_FOLDED_BYTES >> 20} MB"
        )


def attributes_of(proto: onnx.NodeProto) -> dict[str, Any]:
    """Return the attributes as Python values (text decoded; tensors stay TensorProtos)."""
    found: dict[str, Any] = {}
    for a in proto.attribute:
        value = onnx.helper.get_attribute_value(a)
        found[a.name] = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return found


@dataclass
class OpContext:
    """One ONNX node on its way into the graph.

    Attributes:
        builder: Where nodes go.
        proto: The node.
        name: Its name in reports.
        version: Opset of its domain.
        inputs: Operands; None = omitted.
        wanted: Which results something reads.
        attrs: Attributes as Python values.
    """

    builder: Builder
    proto: onnx.NodeProto
    name: str
    version: int
    inputs: tuple[Value | None, ...]
    wanted: tuple[bool, ...]
    attrs: dict[str, Any] = field(default_factory=dict)

    def attr(self, name: str, default: Any = None) -> Any:
        """Return an attribute or its default."""
        return self.attrs.get(name, default)

    def get(self, i: int) -> Value | None:
        """Return operand `i` or None where it is omitted."""
        return self.inputs[i] if i < len(self.inputs) else None

    def input(self, i: int) -> Value:
        """Return operand `i`.

        Raises:
            ModelError: It is omitted.
        """
        v = self.get(i)
        if v is None:
            raise ModelError(f"operand {i} is missing")
        return v

    def known(self, i: int) -> Array | None:
        """Return the elements of operand `i`; None where they are computed at run time."""
        return _stored(self.input(i))

    def static(self, i: int, what: str) -> Array:
        """Return the elements of operand `i`, which must be known at compile time.

        Raises:
            UnsupportedOpError: It is computed at run time.
        """
        data = self.known(i)
        if data is None:
            raise UnsupportedOpError(
                f"its {what} is computed at run time; compiling needs it as a constant"
            )
        return data

    def ints(self, i: int, name: str) -> tuple[int, ...] | None:
        """Return integers given as operand `i` or, in older opsets, as attribute `name`."""
        if self.get(i) is not None:
            return tuple(int(d) for d in self.static(i, name).reshape(-1))
        value = self.attr(name)
        return None if value is None else tuple(int(d) for d in value)

    def emit(self, op: str, *inputs: Value | None, **attrs: AttrValue) -> Value:
        """Emit an operator with one result."""
        return self.builder.emit(op, inputs, attrs, self.name)[0]

    def constant(self, data: Array, name: str = "const", dtype: DType | None = None) -> Value:
        """Make a constant."""
        return self.builder.constant(data, f"{self.name}/{name}", dtype)

    def scalar(self, value: float, like: Value) -> Value:
        """Make a constant scalar of the dtype of `like`."""
        return self.constant(np.asarray(value, like.dtype.numpy), dtype=like.dtype)

    def tensor(self, proto: onnx.TensorProto, what: str) -> tuple[Array, DType]:
        """Return the elements of a tensor attribute."""
        return read_tensor(proto, None, f"attribute {what!r}")

    def axis(self, default: int, rank: int, name: str = "axis") -> int:
        """Return an axis attribute counted from the front.

        Raises:
            ShapeError: The tensor has no such axis.
        """
        return normal_axis(int(self.attr(name, default)), rank)


def _stored(v: Value) -> Array | None:
    """Return the elements of a constant that only quantizers have come between, or None."""
    if v.data is not None:
        return v.data
    node = v.producer
    if node is None or node.op.name not in ("quantize", "dequantize"):
        return None
    data = _stored(node.input(0))
    if data is None:
        return None
    return node.op.evaluate([data], node.attrs, EvalContext((node.input(0).type,), (v.type,)))[0]


def normal_axis(axis: int, rank: int) -> int:
    """Return an axis counted from the front.

    Raises:
        ShapeError: The tensor has no such axis.
    """
    if not -rank <= axis < rank:
        raise ShapeError(f"axis {axis} is outside a tensor of rank {rank}")
    return axis % rank


def reshape(ctx: OpContext, x: Value, shape: Sequence[int]) -> Value:
    """Emit a reshape, or nothing where the shape stays."""
    target = tuple(int(d) for d in shape)
    if target == x.shape:
        return x
    if math.prod(target) != x.type.size:
        raise ShapeError(
            f"cannot reshape {list(x.shape)} ({x.type.size} elements) to {list(target)}"
        )
    return ctx.emit("reshape", x, shape=target)


Converter = Callable[[OpContext], "Sequence[Value] | None"]
"""Returns the results, as many as are wanted, or None for `keep the node opaque`."""

CONVERTERS: dict[tuple[str, str], Converter] = {}
"""(domain, operator) -> converter."""


def converter(*ops: str, domain: str = "") -> Callable[[Converter], Converter]:
    """Register a converter for operators of a domain."""

    def add(fn: Converter) -> Converter:
        for op in ops:
            if (domain, op) in CONVERTERS:
                raise QCompilerError(f"two converters for {op!r}")
            CONVERTERS[domain, op] = fn
        return fn

    return add


def standalone(ctx: OpContext, schema: onnx.defs.OpSchema) -> onnx.NodeProto:
    """Return the node with positional names (x0.. and y0..), without results nobody reads."""
    node = onnx.NodeProto()
    node.CopyFrom(ctx.proto)
    node.name, node.doc_string = "", ""
    del node.input[:], node.output[:]
    node.input.extend(f"x{i}" if v is not None else "" for i, v in enumerate(ctx.inputs))
    last = len(schema.outputs) - 1
    for i, (output, wanted) in enumerate(zip(ctx.proto.output, ctx.wanted, strict=True)):
        option = schema.outputs[min(i, last)].option
        keep = wanted or (output and option != onnx.defs.OpSchema.FormalParameterOption.Optional)
        node.output.append(f"y{i}" if keep else "")
    while node.output and not node.output[-1]:
        del node.output[-1]
    while node.input and not node.input[-1]:
        del node.input[-1]
    return node


def find_schema(op: str, domain: str, version: int) -> onnx.defs.OpSchema | None:
    """Return the schema of an operator; None where ONNX has no such one."""
    try:
        return onnx.defs.get_schema(op, version, domain)
    except onnx.defs.SchemaError:
        return None


def required_schema(node: onnx.NodeProto, domain: str, version: int) -> onnx.defs.OpSchema:
    """Return the schema of a node's operator."""
    schema = find_schema(node.op_type, domain, version)
    if schema is None:
        raise UnsupportedOpError("no operator of that name is known")
    return schema
