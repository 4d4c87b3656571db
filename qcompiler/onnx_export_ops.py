# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How each operator of the table is written in ONNX, in forms that old importers read too.

Operators younger than the export's opset are written out (Gelu before opset 20, Mish before 18).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from qcompiler.errors import QCompilerError, UnsupportedOpError
from qcompiler.ir import Node, Value
from qcompiler.onnx_import_tensors import elem_type_of, make_tensor, placeholder
from qcompiler.types import Array, DType, PerAxis, PerGroup, QuantParams

APART = 4096
"""Bytes from which on a constant is held apart, where that is asked for."""


class Emitter:
    """Collects NodeProtos and initializers for one ONNX graph.

    Args:
        opset: Opset of the default domain that is written.
        plain: Write out what TVM's importer refuses or reads differently.
        apart: Takes the large float32 constants by name, whose elements are then left out of the
            initializers (`ort.Session(constants=...)` gives them back).

    Attributes:
        rename: Names that some values take in the file instead of their own.
        skipped: Names that the written nodes do not read although the graph's nodes do.
    """

    def __init__(
        self, opset: int, *, plain: bool = False, apart: dict[str, Array] | None = None
    ) -> None:
        self.opset = opset
        self.plain = plain
        self.apart = apart
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.domains: dict[str, int] = {"": opset}
        self.rename: dict[Value, str] = {}
        self.skipped: set[str] = set()
        self._taken: set[str] = set()

    def reserve(self, names: Sequence[str]) -> None:
        """Keep helper tensors away from names."""
        self._taken.update(names)

    def fresh(self, base: str) -> str:
        """Return a name that nothing has."""
        name, k = base, 0
        while name in self._taken:
            k += 1
            name = f"{base}_{k}"
        self._taken.add(name)
        return name

    def ref(self, v: Value | None) -> str:
        """Return the name by which nodes read a value; constants become initializers."""
        if v is None:
            return ""
        name = self.rename.get(v, v.name)
        if v.data is not None and name not in self.initializers:
            if self.apart is not None and v.dtype is DType.FLOAT32 and v.data.nbytes >= APART:
                self.apart[name] = v.data
                self.initializers[name] = placeholder(v.type, name)
            else:
                self.initializers[name] = make_tensor(v.data, v.dtype, name)
        return name

    def const(self, data: Array, base: str, dtype: DType | None = None) -> str:
        """Add an initializer and return its name."""
        name = self.fresh(base)
        self.initializers[name] = make_tensor(data, dtype or DType.of(data.dtype), name)
        return name

    def ints(self, values: Sequence[int], base: str) -> str:
        """Add an int64 vector."""
        return self.const(np.asarray(values, np.int64).reshape(-1), base)

    def put(
        self,
        op: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        **attrs: Any,
    ) -> None:
        """Add a node; attributes that are None are left out."""
        ins = list(inputs)
        while ins and not ins[-1]:
            ins.pop()
        given = {k: v for k, v in attrs.items() if v is not None}
        self.nodes.append(onnx.helper.make_node(op, ins, list(outputs), self.fresh(name), **given))

    def step(self, op: str, inputs: Sequence[str], name: str, **attrs: Any) -> str:
        """Add a helper node and return the name of its result."""
        out = self.fresh(f"{name}/{op}.out")
        self.put(op, inputs, [out], f"{name}/{op}", **attrs)
        return out

    def write(self, node: Node) -> None:
        """Write one node of a graph.

        Raises:
            UnsupportedOpError: The operator has no ONNX form.
        """
        writer = WRITERS.get(node.op.name)
        if writer is None:
            raise UnsupportedOpError(
                f"{node.op.name} has no ONNX form",
                node=node.name,
                operators=(node.op.name,),
                hint="export before the graph is lowered to integers",
            )
        writer(self, node)


Writer = Callable[[Emitter, Node], None]

WRITERS: dict[str, Writer] = {}
"""Operator name -> writer."""


def writer_of(*names: str) -> Callable[[Writer], Writer]:
    """Enter a writer into the table for some operators."""

    def add(fn: Writer) -> Writer:
        for name in names:
            WRITERS[name] = fn
        return fn

    return add


def outputs_of(e: Emitter, node: Node) -> list[str]:
    """Return the names of a node's results."""
    return [e.ref(v) for v in node.outputs]


def _ins(e: Emitter, node: Node) -> list[str]:
    return [e.ref(v) for v in node.inputs]


def scalar_like(v: Value, number: float) -> Array:
    """Return a scalar of the value's dtype."""
    return np.asarray(number, v.dtype.numpy)


# ------------------------------------------------------------------------------- elementwise

_PLAIN = {
    **{n: n.capitalize() for n in ("relu", "sigmoid", "tanh", "erf", "softplus", "softsign")},
    **{n: n.capitalize() for n in ("sqrt", "exp", "log", "reciprocal", "neg", "abs", "floor")},
    **{n: n.capitalize() for n in ("ceil", "round", "sign", "sin", "cos", "tan", "asin", "acos")},
    **{n: n.capitalize() for n in ("atan", "sinh", "cosh", "asinh", "acosh", "atanh", "not")},
    **{n: n.capitalize() for n in ("add", "sub", "mul", "div", "pow", "min", "max", "equal")},
    **{n: n.capitalize() for n in ("less", "greater", "and", "or", "xor", "where")},
    "less_or_equal": "LessOrEqual",
    "greater_or_equal": "GreaterOrEqual",
    "isnan": "IsNaN",
    "hard_swish": "HardSwish",
    "leaky_relu": "LeakyRelu",
    "hard_sigmoid": "HardSigmoid",
    "elu": "Elu",
    "selu": "Selu",
    "thresholded_relu": "ThresholdedRelu",
    "mod": "Mod",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "instance_norm": "InstanceNormalization",
    "batch_norm": "BatchNormalization",
    "concat": "Concat",
    "transpose": "Transpose",
    "gather": "Gather",
}


@writer_of(*_PLAIN)
def _plain(e: Emitter, node: Node) -> None:
    """Same operands and attributes under ONNX's name."""
    attrs = {k: int(v) if isinstance(v, bool) else v for k, v in node.attrs.items()}
    e.put(_PLAIN[node.op.name], _ins(e, node), outputs_of(e, node), node.name, **attrs)


@writer_of("div", "mod")
def _divided(e: Emitter, node: Node) -> None:
    """Integers over 0 stay as they are and leave no remainder; processors would trap (x86)."""
    a, b, name = node.input(0), node.input(1), node.name
    traps = (0, -1) if b.dtype.min < 0 else (0,)  # the least integer over -1 does not fit
    safe = b.dtype.is_float or (b.is_constant and not np.isin(b.array(), traps).any())
    if not e.plain or safe:
        _plain(e, node)
        return
    x, y = e.ref(a), e.ref(b)

    def number(value: int) -> str:
        return e.const(scalar_like(b, value), f"{name}/{value}")

    found = [e.step("Equal", [y, number(value)], name) for value in traps]
    either = found[0] if len(found) == 1 else e.step("Or", found, name)
    operands = [x, e.step("Where", [either, number(1), y], name)]
    if node.op.name == "mod":
        e.put("Mod", operands, outputs_of(e, node), name, fmod=int(node.attr("fmod")))
    elif len(found) == 1:
        e.put("Div", operands, outputs_of(e, node), name)
    else:
        parts = [found[1], e.step("Neg", [x], name), e.step("Div", operands, name)]
        e.put("Where", parts, outputs_of(e, node), name)


@writer_of("isinf")
def _isinf(e: Emitter, node: Node) -> None:
    attrs = {k: int(bool(v)) for k, v in node.attrs.items()}
    e.put("IsInf", _ins(e, node), outputs_of(e, node), node.name, **attrs)


@writer_of("clip")
def _clip(e: Emitter, node: Node) -> None:
    _put_clip(e, e.ref(node.input(0)), e.ref(node.output), node, "min", "max")


def _put_clip(e: Emitter, x: str, y: str, node: Node, lo: str, hi: str) -> None:
    """Write Clip with bounds from two attributes, in the dtype of the node's result."""
    bounds = [
        ""
        if node.attrs[k] is None
        else e.const(scalar_like(node.output, node.attr(k)), f"{node.name}/{k}")
        for k in (lo, hi)
    ]
    e.put("Clip", [x, *bounds], [y], node.name)


@writer_of("silu")
def _silu(e: Emitter, node: Node) -> None:
    x = e.ref(node.input(0))
    e.put("Mul", [x, e.step("Sigmoid", [x], node.name)], outputs_of(e, node), node.name)


@writer_of("celu")
def _celu(e: Emitter, node: Node) -> None:
    v, alpha = node.input(0), float(node.attr("alpha"))
    if not e.plain:
        e.put("Celu", _ins(e, node), outputs_of(e, node), node.name, alpha=alpha)
        return
    number = e.const(scalar_like(v, alpha), f"{node.name}/alpha")
    unit = e.step("Elu", [e.step("Div", [e.ref(v), number], node.name)], node.name, alpha=1.0)
    e.put("Mul", [unit, number], outputs_of(e, node), node.name)


@writer_of("mish")
def _mish(e: Emitter, node: Node) -> None:
    x = e.ref(node.input(0))
    if e.opset >= 18:
        e.put("Mish", [x], outputs_of(e, node), node.name)
        return
    t = e.step("Tanh", [e.step("Softplus", [x], node.name)], node.name)
    e.put("Mul", [x, t], outputs_of(e, node), node.name)


@writer_of("gelu")
def _gelu(e: Emitter, node: Node) -> None:
    v = node.input(0)
    x, name = e.ref(v), node.name
    approximate = str(node.attr("approximate"))
    if e.opset >= 20:
        e.put("Gelu", [x], outputs_of(e, node), name, approximate=approximate)
        return

    def number(value: float) -> str:
        return e.const(scalar_like(v, value), f"{name}/const")

    if approximate == "tanh":
        cube = e.step("Mul", [e.step("Mul", [x, x], name), x], name)
        inner = e.step("Add", [x, e.step("Mul", [cube, number(0.044715)], name)], name)
        inner = e.step("Mul", [inner, number(math.sqrt(2 / math.pi))], name)
        bent = e.step("Tanh", [inner], name)
    else:
        bent = e.step("Erf", [e.step("Div", [x, number(math.sqrt(2))], name)], name)
    gate = e.step("Add", [bent, number(1.0)], name)
    e.put("Mul", [e.step("Mul", [x, gate], name), number(0.5)], outputs_of(e, node), name)


@writer_of("prelu")
def _prelu(e: Emitter, node: Node) -> None:
    x, slope = node.input(0), node.input(1)
    if x.shape == node.output.shape:
        e.put("PRelu", _ins(e, node), outputs_of(e, node), node.name)
        return
    # PRelu broadcasts the slope only; here the slope is the larger operand.
    zero = e.const(scalar_like(x, 0), f"{node.name}/zero")
    scaled = e.step("Mul", [e.ref(x), e.ref(slope)], node.name)
    below = e.step("Less", [e.ref(x), zero], node.name)
    e.put("Where", [below, scaled, e.ref(x)], outputs_of(e, node), node.name)


@writer_of("cast")
def _cast(e: Emitter, node: Node) -> None:
    to = elem_type_of(DType(node.attr("to")))
    e.put("Cast", _ins(e, node), outputs_of(e, node), node.name, to=to)


# ------------------------------------------------------------------------- linear and pooling


def _finished(e: Emitter, node: Node, residual: int) -> tuple[str, Callable[[str], None]]:
    """Return (name the operator writes to, function that adds residual and activation clamp)."""
    r = node.optional(residual)
    clamps = node.attrs["act_min"] is not None or node.attrs["act_max"] is not None
    out = e.ref(node.output)
    first = e.fresh(f"{node.name}/raw") if r is not None or clamps else out

    def finish(raw: str) -> None:
        if r is not None:
            total = e.fresh(f"{node.name}/sum") if clamps else out
            e.put("Add", [raw, e.ref(r)], [total], f"{node.name}/Add")
            raw = total
        if clamps:
            _put_clip(e, raw, out, node, "act_min", "act_max")

    return first, finish


def to_nchw(e: Emitter, x: str, node: Node, rank: int) -> str:
    """Return the name of an operand of a channels-first operator."""
    if node.attrs["layout"] == "NCHW":
        return x
    return e.step("Transpose", [x], node.name, perm=[0, rank - 1, *range(1, rank - 1)])


def from_nchw(
    e: Emitter, op: str, inputs: Sequence[str], y: str, node: Node, rank: int, **attrs: Any
) -> None:
    """Write a channels-first operator whose result must have the node's layout."""
    if node.attrs["layout"] == "NCHW":
        e.put(op, inputs, [y], node.name, **attrs)
        return
    first = e.step(op, inputs, node.name, **attrs)
    e.put("Transpose", [first], [y], node.name, perm=[0, *range(2, rank), 1])


def _window(node: Node) -> dict[str, Any]:
    return {k: list(node.attr(k)) for k in ("strides", "pads", "dilations")}


@writer_of("conv")
def _conv(e: Emitter, node: Node) -> None:
    rank = node.input(0).type.rank
    x = to_nchw(e, e.ref(node.input(0)), node, rank)
    y, finish = _finished(e, node, 3)
    from_nchw(
        e,
        "Conv",
        [x, e.ref(node.input(1)), e.ref(node.optional(2))],
        y,
        node,
        rank,
        kernel_shape=list(node.input(1).shape[2:]),
        group=node.attr("group"),
        **_window(node),
    )
    finish(y)


@writer_of("conv_transpose")
def _conv_transpose(e: Emitter, node: Node) -> None:
    extra = list(node.attr("output_padding"))
    e.put(
        "ConvTranspose",
        _ins(e, node),
        outputs_of(e, node),
        node.name,
        kernel_shape=list(node.input(1).shape[2:]),
        group=node.attr("group"),
        output_padding=extra if any(extra) else None,
        **_window(node),
    )


def _swap(e: Emitter, v: Value, node: Node) -> str:
    perm = list(range(v.type.rank))
    perm[-2:] = perm[:-3:-1]
    return e.step("Transpose", [e.ref(v)], node.name, perm=perm)


@writer_of("matmul")
def _matmul(e: Emitter, node: Node) -> None:
    a, b, bias = node.input(0), node.input(1), node.optional(2)
    y, finish = _finished(e, node, 3)
    turn_a, turn_b = bool(node.attr("transpose_a")), bool(node.attr("transpose_b"))
    if a.type.rank == b.type.rank == 2 and (turn_a or turn_b or bias is not None):
        e.put(
            "Gemm",
            [e.ref(a), e.ref(b), e.ref(bias)],
            [y],
            node.name,
            transA=int(turn_a),
            transB=int(turn_b),
        )
    else:
        left = _swap(e, a, node) if turn_a else e.ref(a)
        right = _swap(e, b, node) if turn_b else e.ref(b)
        if bias is None:
            e.put("MatMul", [left, right], [y], node.name)
        else:
            product = e.step("MatMul", [left, right], node.name)
            e.put("Add", [product, e.ref(bias)], [y], node.name)
    finish(y)


@writer_of("max_pool", "average_pool")
def _pool(e: Emitter, node: Node) -> None:
    rank = node.input(0).type.rank
    attrs: dict[str, Any] = {"kernel_shape": list(node.attr("kernel")), **_window(node)}
    attrs["ceil_mode"] = int(bool(node.attr("ceil_mode")))
    op = "MaxPool"
    if node.op.name == "average_pool":
        op = "AveragePool"
        attrs["count_include_pad"] = int(bool(node.attr("count_include_pad")))
        if e.opset < 19:  # AveragePool has no dilations before opset 19
            del attrs["dilations"]
    x = to_nchw(e, e.ref(node.input(0)), node, rank)
    from_nchw(e, op, [x], e.ref(node.output), node, rank, **attrs)


_REDUCE = {
    "reduce_mean": "ReduceMean",
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_l1": "ReduceL1",
    "reduce_l2": "ReduceL2",
    "reduce_sum_square": "ReduceSumSquare",
    "reduce_log_sum": "ReduceLogSum",
    "reduce_log_sum_exp": "ReduceLogSumExp",
}
_GLOBAL = {"reduce_mean": "GlobalAveragePool", "reduce_max": "GlobalMaxPool"}


@writer_of(*_REDUCE)
def _reduce(e: Emitter, node: Node) -> None:
    x = node.input(0)
    axes = [int(a) % x.type.rank for a in node.attr("axes")]
    keepdims = int(bool(node.attr("keepdims")))
    spatial = x.type.rank >= 3 and axes == list(range(2, x.type.rank)) and x.dtype.is_float
    if spatial and keepdims and node.op.name in _GLOBAL:
        e.put(_GLOBAL[node.op.name], [e.ref(x)], outputs_of(e, node), node.name)
        return
    op, outs = _REDUCE[node.op.name], outputs_of(e, node)
    if e.opset >= 18 or op == "ReduceSum":
        operands = [e.ref(x), e.ints(axes, f"{node.name}/axes")]
        e.put(op, operands, outs, node.name, keepdims=keepdims)
    else:
        e.put(op, [e.ref(x)], outs, node.name, axes=axes, keepdims=keepdims)


@writer_of("argmax", "argmin")
def _arg(e: Emitter, node: Node) -> None:
    attrs = {k: int(node.attr(k)) for k in ("axis", "keepdims", "select_last_index")}
    op = "ArgMax" if node.op.name == "argmax" else "ArgMin"
    e.put(op, _ins(e, node), outputs_of(e, node), node.name, **attrs)


@writer_of("cumsum")
def _cumsum(e: Emitter, node: Node) -> None:
    axis = e.const(np.asarray(node.attr("axis"), np.int64), f"{node.name}/axis")
    attrs = {k: int(bool(node.attr(k))) for k in ("exclusive", "reverse")}
    e.put("CumSum", [e.ref(node.input(0)), axis], outputs_of(e, node), node.name, **attrs)


@writer_of("layer_norm")
def _layer_norm(e: Emitter, node: Node) -> None:
    x, scale = node.input(0), node.optional(1)
    axis = int(node.attr("axis")) % x.type.rank
    ones = np.ones(x.shape[axis:], x.dtype.numpy)
    gain = e.ref(scale) if scale is not None else e.const(ones, f"{node.name}/scale", x.dtype)
    operands = [e.ref(x), gain, e.ref(node.optional(2))]
    epsilon = float(node.attr("epsilon"))
    e.put(
        "LayerNormalization", operands, outputs_of(e, node), node.name, axis=axis, epsilon=epsilon
    )


# ------------------------------------------------------------------------------- quantization


def quantization_operands(
    e: Emitter, q: QuantParams, name: str
) -> tuple[list[str], dict[str, Any]]:
    """Return (scale and zero point operands, attributes) of Quantize- or DequantizeLinear."""
    attrs: dict[str, Any] = {}
    if isinstance(q.granularity, PerAxis):
        attrs["axis"] = q.granularity.axis
    elif isinstance(q.granularity, PerGroup):
        attrs["axis"] = q.granularity.axis
        attrs["block_size"] = q.granularity.group_size
    scale = e.const(q.scale, f"{name}/scale")
    if q.storage is DType.INT32:  # ONNX: int32 has no zero point
        if not q.is_symmetric:
            raise QCompilerError(f"{name}: int32 with a zero point has no ONNX form")
        return [scale, ""], attrs
    zero = q.zero_point.astype(q.storage.numpy)
    return [scale, e.const(zero, f"{name}/zero_point", q.storage)], attrs


@writer_of("quantize")
def _quantize(e: Emitter, node: Node) -> None:
    _put_quantize(e, e.ref(node.input(0)), node)


def _put_quantize(e: Emitter, x: str, node: Node) -> None:
    """Write QuantizeLinear, then Clip where the range is narrower than the storage."""
    y, q = node.output, node.output.qparams
    if q is None:
        raise QCompilerError(f"the result of {node.name!r} carries no quantization")
    operands, attrs = quantization_operands(e, q, node.name)
    narrow = (q.qmin, q.qmax) != (q.storage.min, q.storage.max)
    if not narrow:
        e.put("QuantizeLinear", [x, *operands], [e.ref(y)], node.name, **attrs)
        return
    wide = e.step("QuantizeLinear", [x, *operands], node.name, **attrs)
    bounds = [
        e.const(np.asarray(b, q.storage.numpy), f"{node.name}/{k}", q.storage)
        for k, b in (("qmin", q.qmin), ("qmax", q.qmax))
    ]
    e.put("Clip", [wide, *bounds], [e.ref(y)], node.name)


@writer_of("dequantize")
def _dequantize(e: Emitter, node: Node) -> None:
    q = node.input(0).qparams
    if q is None:
        raise QCompilerError(f"the operand of {node.name!r} carries no quantization")
    operands, attrs = quantization_operands(e, q, node.name)
    inputs = [e.ref(node.input(0)), *operands]
    e.put("DequantizeLinear", inputs, outputs_of(e, node), node.name, **attrs)


@writer_of("requantize")
def _requantize(e: Emitter, node: Node) -> None:
    q = node.input(0).qparams
    if q is None:
        raise QCompilerError(f"the operand of {node.name!r} carries no quantization")
    operands, attrs = quantization_operands(e, q, node.name)
    x = e.step("DequantizeLinear", [e.ref(node.input(0)), *operands], node.name, **attrs)
    _put_quantize(e, x, node)


# -------------------------------------------------------------------------------------- opaque


def opaque_proto(node: Node) -> onnx.NodeProto:
    """Return the ONNX node that an opaque node keeps (names x0.. and y0..)."""
    proto = onnx.NodeProto()
    proto.ParseFromString(node.attr("node"))
    return proto


@writer_of("opaque")
def _opaque(e: Emitter, node: Node) -> None:
    proto = opaque_proto(node)
    operands = [e.ref(v) for v in node.inputs]
    results = iter(outputs_of(e, node))
    for i, name in enumerate(list(proto.input)):
        proto.input[i] = operands[i] if name and i < len(operands) else ""
    for i, name in enumerate(list(proto.output)):
        proto.output[i] = next(results) if name else ""
    proto.name = e.fresh(node.name)
    domain = str(node.attr("domain"))
    e.domains.setdefault(domain, int(node.attr("opset")))
    e.nodes.append(proto)
