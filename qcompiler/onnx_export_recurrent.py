# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How recurrent operators are written in ONNX: as LSTM, GRU and RNN.

ONNX puts the product of the inputs inside the operator. Where `gates` comes from a plain matrix
product, that product's operands are written as X, W and B, and the product is left out unless
something else reads it; elsewhere W is the identity.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.ir import Node, Value
from qcompiler.onnx_export_ops import WRITERS, Emitter
from qcompiler.onnx_import_recurrent import ALPHA, BETA, ONNX_NAMES
from qcompiler.ops._recurrence import GATES, cell_of
from qcompiler.ops.recurrent import operand_index


def _write(e: Emitter, node: Node) -> None:
    kind = node.op.name
    cell = cell_of(kind, node.attrs)
    hidden = node.outputs[0].shape[2]
    names = [f[0] for f in cell.functions]
    inputs = _input_product(e, node, hidden * GATES[kind])

    def given(name: str) -> Value | None:
        i = operand_index(kind, name)
        return node.optional(i) if i >= 0 else None

    def lead(v: Value | None) -> str:
        return _unsqueezed(e, node, e.ref(v), 0) if v is not None else ""

    r = _turned(e, node, node.input(1))
    bias = _bias(e, node, inputs[2], given("bias"), hidden * GATES[kind])
    operands = [inputs[0], inputs[1], r, bias, e.ref(given("lens")), lead(given("h0"))]
    if kind == "lstm":
        peephole = given("peephole")
        flat = ""
        if peephole is not None:
            shape = e.ints((1, 3 * hidden), f"{node.name}/shape")
            flat = e.step("Reshape", [e.ref(peephole), shape], node.name)
        operands += [lead(given("c0")), flat]
    results = [e.fresh(f"{node.name}/{v.name}") for v in node.outputs]
    attrs: dict[str, Any] = {
        "hidden_size": hidden,
        "direction": "reverse" if cell.reverse else "forward",
        "activations": [ONNX_NAMES[n] for n in names],
        "activation_alpha": [f[1] for f in cell.functions if f[0] in ALPHA] or None,
        "activation_beta": [f[2] for f in cell.functions if f[0] in BETA] or None,
        "clip": cell.clip,
    }
    if kind == "lstm":
        attrs["input_forget"] = int(cell.input_forget)
    if kind == "gru":
        attrs["linear_before_reset"] = int(cell.linear_before_reset)
    e.put(kind.upper(), operands, results, node.name, **attrs)
    for v, result, axis in zip(node.outputs, results, (1, 0, 0), strict=False):
        axes = e.ints((axis,), f"{node.name}/axis")
        e.put("Squeeze", [result, axes], [e.ref(v)], f"{node.name}/Squeeze")


def _unsqueezed(e: Emitter, node: Node, name: str, axis: int) -> str:
    return e.step("Unsqueeze", [name, e.ints((axis,), f"{node.name}/axis")], node.name)


def _turned(e: Emitter, node: Node, v: Value) -> str:
    """Return [K, N] weights as ONNX has them, [1, N, K]."""
    if v.is_constant and v.qparams is None:
        data = np.ascontiguousarray(v.array().T)[None]
        return e.const(data, f"{v.name}/turned", v.dtype)
    turned = e.step("Transpose", [e.ref(v)], node.name, perm=[1, 0])
    return _unsqueezed(e, node, turned, 0)


def _input_product(e: Emitter, node: Node, columns: int) -> tuple[str, str, str]:
    """Return X, W [1, N, I] and the bias of the product of the inputs (empty for none)."""
    gates = node.input(0)
    p = gates.producer
    plain = (
        p is not None
        and p.op.name == "matmul"
        and not p.attr("transpose_a")
        and p.optional(3) is None
        and p.attr("act_min") is None
        and p.attr("act_max") is None
        and p.input(0).type.rank == 3
        and p.input(1).type.rank == 2
    )
    if p is None or not plain or e.plain:
        identity = np.eye(columns, dtype=gates.dtype.numpy)[None]
        return e.ref(gates), e.const(identity, f"{node.name}/identity", gates.dtype), ""
    w = p.input(1)
    held = _unsqueezed(e, node, e.ref(w), 0) if p.attr("transpose_b") else _turned(e, node, w)
    e.skipped.add(e.ref(gates))
    bias = p.optional(2)
    return e.ref(p.input(0)), held, e.ref(bias)


def _bias(e: Emitter, node: Node, bias: str, inner: Value | None, columns: int) -> str:
    """Return B [1, 2 N]: the inputs' bias, then zeros or the bias inside the reset."""
    if not bias and inner is None:
        return ""
    dtype = node.input(0).dtype

    def zeros(n: int) -> str:
        return e.const(np.zeros(n, dtype.numpy), f"{node.name}/zeros", dtype)

    parts = [bias or zeros(columns)]
    if inner is None:
        parts.append(zeros(columns))
    else:
        parts += [zeros(columns - columns // 3), e.ref(inner)]
    return _unsqueezed(e, node, e.step("Concat", parts, node.name, axis=0), 0)


for _kind in GATES:
    WRITERS[_kind] = _write
