# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Move activations to the signedness that a target's kernels take.

int8 with zero point z and uint8 with zero point z + 128 are the same grid shifted by 128, so only
types, table entries and constants change, never a real value. The same holds of 16 bits.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

import numpy as np

from qcompiler.ir import Graph, Value
from qcompiler.types import Array, DType, TensorType

_OTHER = {DType.UINT8: DType.INT8, DType.INT8: DType.UINT8, DType.INT16: DType.UINT16}
_SUFFIX = {DType.UINT8: "u8", DType.INT8: "s8", DType.INT16: "s16", DType.UINT16: "u16"}


def hold_activations(graph: Graph, wanted: DType, kept: AbstractSet[Value] = frozenset()) -> bool:
    """Shift every activation of the other signedness to `wanted`; return whether any was.

    Weights, and the types of graph inputs and results, stay as they are.

    Args:
        graph: Graph[INTEGER].
        wanted: UINT8, INT8 or INT16.
        kept: Values to leave alone.
    """
    other = _OTHER[wanted]
    suffix, back_suffix = _SUFFIX[wanted], _SUFFIX[other]
    changed = False
    for v in graph.inputs:
        if is_activation(v, other) and v.uses and v not in kept:
            changed = True
            first = graph.nodes[0]
            new = graph.add(
                "requantize",
                [v],
                types=[shifted(v.type, wanted)],
                name=f"{v.name}_{suffix}",
                before=first,
            )
            for node, i in v.uses:
                if node is not new:
                    graph.set_input(node, i, new.output)
    for node in graph.nodes:
        for v in node.outputs:
            if not is_activation(v, other) or v in kept:
                continue
            changed = True
            if node.op.name == "table":
                entries = node.input(1)
                data = _shifted_data(entries.array(), wanted)
                graph.set_input(node, 1, graph.constant(data, entries.name))
            old = v.type
            graph.set_type(v, shifted(old, wanted))
            if graph.is_output(v):
                back = graph.add("requantize", [v], types=[old], name=f"{v.name}_{back_suffix}")
                graph.set_outputs([(n, back.output if o is v else o) for n, o in graph.outputs])
        for i, operand in enumerate(node.inputs):
            if operand is None or not operand.is_constant or not is_activation(operand, other):
                continue
            if node.op.name in ("qconv", "qmatmul") and i == 1:
                continue
            if node.op.name == "dequantize" or operand in kept:
                continue
            changed = True
            data = _shifted_data(operand.array(), wanted)
            q = shifted(operand.type, wanted).qparams
            graph.set_input(node, i, graph.constant(data, operand.name, q))
    return changed


def shifted(t: TensorType, wanted: DType) -> TensorType:
    """Return the type of the same grid in the other signedness, which is `wanted`."""
    q = t.qparams
    if q is None:
        return t
    by = _shift(wanted)
    moved = replace(
        q,
        zero_point=np.asarray(q.zero_point, np.int32) + by,
        storage=wanted,
        qmin=q.qmin + by,
        qmax=q.qmax + by,
    )
    return TensorType(t.shape, wanted, moved)


def is_activation(v: Value, dtype: DType) -> bool:
    """Whether a value is quantized per tensor and stored as `dtype`."""
    return v.dtype is dtype and v.qparams is not None and v.qparams.is_per_tensor


def _shifted_data(data: Array, wanted: DType) -> Array:
    return (data.astype(np.int32) + _shift(wanted)).astype(wanted.numpy)


def _shift(wanted: DType) -> int:
    """Return what is added to codes of the other signedness."""
    return wanted.min - _OTHER[wanted].min
