# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Integers divided by what processors trap on, 0 and the least one over -1, end no process."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import qcompiler


def divided(op: str, dtype: str, constant: np.ndarray | None = None, **attrs: int) -> Any:
    """A model y = op(a, b) of six integers; b is an input unless it is given."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    info = [helper.make_tensor_value_info(name, kind, [6]) for name in "aby"]
    held = [] if constant is None else [onnx.numpy_helper.from_array(constant, "b")]
    graph = helper.make_graph(
        [helper.make_node(op, ["a", "b"], ["y"], **attrs)],
        "division",
        info[:1] if held else info[:2],
        info[2:],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
@pytest.mark.parametrize(("op", "attrs"), [("Div", {}), ("Mod", {}), ("Mod", {"fmod": 1})])
def test_every_target_divides_alike(op: str, attrs: dict[str, int], dtype: str) -> None:
    """What is divided by 0 stays, without remainder, as the interpreter has it."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    a = np.asarray([least, 7, 5, 0, most, least], dtype)
    b = np.asarray([most if least == 0 else -1, 0, 3, 0, 3, 0], dtype)
    model = divided(op, dtype, **attrs)
    compiled = qcompiler.compile(model, target="host", precision="fp32")
    if dtype == "int64":  # the stand-ins divide by 0 too, which ONNX Runtime refuses
        assert any("not timed" in note for note in compiled.report["notes"])
    assert compiled.report["latency_ms"]["compiled"] > 0
    got = compiled({"a": a, "b": b})["y"]
    want = qcompiler.compile(model, target="reference", precision="fp32")({"a": a, "b": b})["y"]
    np.testing.assert_array_equal(got, want)
    assert got.tolist()[1:4] == ([7, 1, 0] if op == "Div" else [0, 2, 0])


def test_a_constant_divisor_costs_nothing() -> None:
    from qcompiler.onnx_export import subgraph_to_onnx
    from qcompiler.onnx_import import load_onnx

    for number, guarded in ((3, False), (0, True), (-1, True)):
        graph = load_onnx(divided("Div", "int32", np.full(6, number, np.int32)))
        ops = [n.op_type for n in subgraph_to_onnx(graph.nodes).graph.node]
        assert ("Where" in ops) == guarded
