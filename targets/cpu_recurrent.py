# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the CPU lowering table for recurrent operators, float32 and int8."""

from __future__ import annotations

from functools import partial

import numpy as np

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.ir import Node
from qcompiler.ops._recurrence import cell_of
from qcompiler.ops.recurrent import operand_index
from qcompiler.targets.cpu_lowering import CpuLowering, grid, is_float32, is_per_tensor, row
from qcompiler.targets.tvm_lower import KernelCall
from qcompiler.types import Array, DType


@row("lstm", "gru", "rnn", "qlstm", "qgru", "qrnn")
def _recurrent(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels import recurrent

    integer = node.op.name.startswith("q")
    kind = node.op.name.removeprefix("q")
    gates, r, y = node.input(0), node.input(1), node.outputs[0]
    operands = {
        name: node.optional(operand_index(kind, name))
        for name in ("h0", "c0", "lens", "peephole", "bias")
        if operand_index(kind, name) >= 0
    }
    floats = [v for name, v in operands.items() if v is not None and name != "lens"]
    if not is_float32(gates, *floats) or 0 in y.shape:
        return None
    steps, batch, hidden = y.shape
    held = None
    weights: Array | None = None
    scale: Array | None = None
    if integer:
        q = r.qparams
        if not r.is_constant or q is None or not q.is_symmetric or not is_per_tensor(y):
            return None
        if r.dtype not in (DType.INT8, DType.INT4) or y.dtype is DType.INT16:
            return None
        g = grid(y)
        held = recurrent.Grid(y.dtype.value, g.s, g.z, g.qmin, g.qmax)
        scale = np.broadcast_to(numerics.multiplier(g.scale, q.scale), (r.shape[1],))
    elif not is_float32(r):
        return None
    if r.is_constant:
        weights = r.array()
    lens, extra = operands.get("lens"), operands.get("peephole") or operands.get("bias")
    try:
        w = recurrent.RecurrentWorkload(
            cell_of(kind, node.attrs), steps, batch, hidden, held, weights is not None,
            lens is not None, extra is not None,
        )  # fmt: skip
    except CodegenError:
        return None  # a function that no kernel has
    packed = recurrent.pack_recurrent(w, self.isa, weights, scale)
    read = [gates, None if r.is_constant else r, operands["h0"], operands.get("c0"), lens, extra]
    return KernelCall(
        node.op.name,
        (node.op.name, w, self.isa.name, packed.key),
        partial(recurrent.build_recurrent, w, self.isa, packed),
        tuple(v for v in read if v is not None),
        packed.arrays,
        w.macs,
    )
