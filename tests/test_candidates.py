# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Which precisions automatic precision builds and measures, and what it makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.auto import choose, wanted_precisions
from qcompiler.data import Budget, Evaluation
from qcompiler.registry import get_target
from qcompiler.types import Precision
from qcompiler.workshop import prepare

pytestmark = [
    pytest.mark.timed,
    pytest.mark.isa("x86-avx2"),
    pytest.mark.usefixtures("own_cache"),
]

MODEL = Path(__file__).parents[1] / "models" / "digits_cnn" / "model.onnx"
TARGET = "x86-avx2"


def test_which_precisions_are_worth_a_build() -> None:
    def names(model: Any, **options: Any) -> set[str]:
        prepared = prepare(model, calibration=None)
        found = wanted_precisions(get_target(TARGET), prepared, Budget(**options.pop("limits", {})),
                                  **options)  # fmt: skip
        return {p.value for p in found}

    always = {"w8a8", "w8a7", "w7a8", "w6a8", "w4a8", "w4a8-group", "fp32"}
    assert names(MODEL) == always  # its one matrix product is little of the work
    assert names(MODEL, limits={"max_size_mb": 1.0}) == always | {"fp16", "w8", "w4"}
    assert names(MODEL, overrides={"fc": "w8a8-dynamic"}) == always | {"w8a8-dynamic"}
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.standard_normal((1024, 1024)).astype(np.float32), "w")
    for rows, more in ((1, {"w8a8-dynamic", "fp16", "w8", "w4"}), (128, {"w8a8-dynamic"})):
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"])], "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, 1024])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, 1024])], [w],
        )  # fmt: skip
        opset = [helper.make_opsetid("", 17)]
        found = names(helper.make_model(graph, opset_imports=opset, ir_version=9))
        assert found == always | more


@pytest.mark.parametrize(
    ("target", "tried"),
    [("arm-neon", False), ("arm-dotprod", True), ("arm-i8mm", True), ("cuda-sm80", True)],
)
def test_half_precision_is_worth_a_build_where_it_is_faster(target: str, tried: bool) -> None:
    prepared = prepare(MODEL, calibration=None)
    found = wanted_precisions(get_target(target), prepared, Budget())
    assert (Precision.FP16 in found) is tried


def test_products_that_gain_by_scales_at_run_time_get_them() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((32, 64, 512)).astype(np.float32)
    x *= np.exp2(rng.integers(-6, 6, (32, 64, 1))).astype(np.float32)  # rows of different ranges
    parts = [
        numpy_helper.from_array((rng.standard_normal((512, 512)) / 22).astype(np.float32), f"w{i}")
        for i in range(2)
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["y"], name="second"),
    ]
    shape = [1, 64, 512]
    graph = helper.make_graph(
        nodes, "rows", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)], parts,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = choose(
        model, get_target(TARGET), calibration={"x": x}, evaluate=Evaluation({"x": x}, "sqnr"),
        budget=Budget(max_drop=120.0 - 30.0),
    )  # fmt: skip
    assert found.log is not None
    assert found.log["kept"], found.log["infeasible"]
    options = found.log["nodes"]["first"]["options"]
    assert options["w8a8-dynamic"]["loss"] < 0.2 * options["w8a8"]["loss"]
    assert found.log["uniform"]["w8a8-dynamic"]["drop"] < found.log["uniform"]["w8a8"]["drop"]
    assert found.plan.precision("first").value == "w8a8-dynamic"
