# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How activations that are quantized at run time, and their products, are written in ONNX.

Standard operators spell out the quantization, integer for integer. The product is written in
floats, of the dequantized operands: ONNX has no product of integers with a scale per block.
"""

from __future__ import annotations

import numpy as np

from qcompiler.errors import QCompilerError
from qcompiler.ir import Node
from qcompiler.numerics import MIN_SCALE
from qcompiler.numerics_dynamic import DYNAMIC_MAX
from qcompiler.onnx_export_ops import Emitter, outputs_of, quantization_operands, writer_of
from qcompiler.types import DType, PerGroup, Shape

_ONNX_INT8, _ONNX_FLOAT = 3, 1
"""TensorProto.INT8 and FLOAT."""


@writer_of("dynamic_quantize")
def _quantize(e: Emitter, node: Node) -> None:
    x, (ints, scale), name = node.input(0), node.outputs, node.name
    per, block = node.attr("per"), int(node.attr("block"))
    q = ints.qparams
    if q is None or q.z:
        raise QCompilerError(f"{name}: integers around another zero than 0 have no ONNX form here")
    view, source = x.shape, e.ref(x)
    if per == "block":
        view = (*x.shape[:-1], x.shape[-1] // block, block)
        source = _reshaped(e, source, view, name)
    axes = tuple(range(len(view))) if per == "tensor" else (len(view) - 1,)
    magnitude, keep = e.step("Abs", [source], name), int(per != "tensor")
    if e.opset >= 18:
        operands = [magnitude, e.ints(axes, f"{name}/axes")]
        top = e.step("ReduceMax", operands, name, keepdims=keep)
    else:
        top = e.step("ReduceMax", [magnitude], name, axes=axes, keepdims=keep)
    step = e.step("Div", [top, _number(e, DYNAMIC_MAX, name)], name)
    own = e.step("Max", [step, _number(e, MIN_SCALE, name)], name)
    rounded = e.step("Round", [e.step("Div", [source, own], name)], name)
    bounds = [_number(e, bound, name) for bound in (-DYNAMIC_MAX, DYNAMIC_MAX)]
    narrow = e.step("Cast", [e.step("Clip", [rounded, *bounds], name)], name, to=_ONNX_INT8)
    outs = outputs_of(e, node)
    for source, v, out in ((narrow, ints, outs[0]), (own, scale, outs[1])):
        shape = e.ints(v.shape, f"{name}/shape")
        e.put("Reshape", [source, shape], [out], f"{name}/{v.name}")


@writer_of("dynamic_matmul")
def _matmul(e: Emitter, node: Node) -> None:
    a, b, scale, name = node.input(0), node.input(1), node.input(2), node.name
    aq, bq = a.qparams, b.qparams
    if aq is None or bq is None:
        raise QCompilerError(f"the operands of {name!r} carry no quantization")
    reals = e.step("Cast", [e.ref(a)], name, to=_ONNX_FLOAT)
    if aq.z:
        reals = e.step("Sub", [reals, _number(e, aq.z, name)], name)
    own = e.ref(scale)
    if isinstance(bq.granularity, PerGroup):
        blocks = (*a.shape[:-1], scale.shape[-1], bq.granularity.group_size)
        reals, own = _reshaped(e, reals, blocks, name), _reshaped(e, own, (*scale.shape, 1), name)
    reals = e.step("Mul", [reals, own], name)
    if isinstance(bq.granularity, PerGroup):
        reals = _reshaped(e, reals, a.shape, name)
    operands, attrs = quantization_operands(e, bq, name)
    weights = e.step("DequantizeLinear", [e.ref(b), *operands], name, **attrs)
    steps = [("MatMul", [weights])]
    steps += [("Add", [e.ref(v)]) for v in (node.optional(3), node.optional(4)) if v is not None]
    low, high = node.attr("act_min"), node.attr("act_max")
    if low is not None or high is not None:
        bounds = ["" if v is None else _number(e, float(v), name) for v in (low, high)]
        steps.append(("Clip", bounds))
    for op, others in steps[:-1]:
        reals = e.step(op, [reals, *others], name)
    last, others = steps[-1]
    e.put(last, [reals, *others], outputs_of(e, node), name)


def _reshaped(e: Emitter, name: str, shape: Shape, owner: str) -> str:
    return e.step("Reshape", [name, e.ints(shape, f"{owner}/shape")], owner)


def _number(e: Emitter, value: float, owner: str) -> str:
    return e.const(np.asarray(value, np.float32), f"{owner}/number", DType.FLOAT32)
