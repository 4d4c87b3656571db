# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The memory between kernels that a built model says it takes, on networks that add up by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.driver import build_graph, quantize_model
from qcompiler.registry import get_target

TARGET = "x86-64"


def products(sizes: list[int], skip: bool = False) -> onnx.ModelProto:
    """Return products whose results have these sizes; the first one is added to the last."""
    rng = np.random.default_rng(0)
    weights, nodes, last = [], [], "x"
    for i, (rows, columns) in enumerate(zip([16, *sizes], sizes, strict=False)):
        w = rng.standard_normal((rows, columns)).astype(np.float32)
        weights.append(numpy_helper.from_array(w, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"h{i}"]))
        nodes.append(helper.make_node("Tanh", [f"h{i}"], [f"t{i}"]))
        last = f"t{i}"
    if skip:
        nodes.append(helper.make_node("Add", ["t0", last], ["y"]))
        last = "y"
    graph = helper.make_graph(
        nodes, "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, sizes[-1]])], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def memory(model: onnx.ModelProto, precision: str) -> int:
    backend = get_target(TARGET)
    x = np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32)
    result = quantize_model(model, spec=backend.spec, calibration={"x": x}, precision=precision)
    found = build_graph(result.graph, backend).memory
    assert found is not None
    return found


@pytest.mark.parametrize("skip", [False, True])
def test_memory_is_what_lives_at_once(skip: bool) -> None:
    model = products([1024, 2048, 1024], skip)
    wide, narrow = memory(model, "fp32"), memory(model, "w8a8")
    # A product or a function holds what it reads and what it makes; the skip holds t0 beside them.
    assert wide >= 4 * (2048 + (2048 if skip else 1024))
    assert wide <= 4 * (2048 + 2048 + (1024 if skip else 0))
    assert narrow < wide * 0.75


def test_the_reference_cannot_tell() -> None:
    backend = get_target("reference")
    result = quantize_model(products([8, 8]), spec=backend.spec, precision="fp32")
    assert build_graph(result.graph, backend).memory is None
