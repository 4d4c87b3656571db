# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The opaque operator: one ONNX node that the table does not model, kept whole.

It computes on plain tensors. The interpreter runs it through ONNX Runtime; the targets lower it
through TVM's own ONNX importer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.ops import _infer as c
from qcompiler.ops._base import REQUIRED, Attrs, EvalContext, OpDef, register
from qcompiler.types import Array, TensorType

Arrays = Sequence["Array | None"]


def _infer(types: c.Types, attrs: Attrs) -> tuple[TensorType, ...]:
    raise c.fail("opaque", "result types follow from the ONNX node and must be declared")


def _evaluate(arrays: Arrays, attrs: Attrs, ctx: EvalContext) -> tuple[Array, ...]:
    from qcompiler.ort import run_node

    node: Any = attrs["node"]
    opset: Any = attrs["opset"]
    return run_node(node, str(attrs["domain"]), int(opset), arrays)


register(
    OpDef(
        "opaque",
        ("xs*",),
        _infer,
        _evaluate,
        {"node": REQUIRED, "domain": "", "opset": REQUIRED},
        declared=True,
        outputs=0,
    )
)
