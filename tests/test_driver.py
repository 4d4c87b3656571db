# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompiler.compile` end to end on the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qcompiler
from qcompiler import driver
from qcompiler.errors import (
    DataError,
    InfeasibleBudgetError,
    ShapeError,
    UnknownTargetError,
    UnsupportedByTargetError,
    UsageError,
)
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.plan import PrecisionPlan

DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn"
MODEL = DIGITS / "model.onnx"


@pytest.fixture(scope="module")
def calibration() -> dict[str, Any]:
    return dict(np.load(DIGITS / "calib.npz"))


@pytest.fixture(scope="module")
def compiled(calibration: dict[str, Any]) -> qcompiler.CompiledModel:
    evaluation = qcompiler.Evaluation(DIGITS / "eval.npz", "top1")
    return qcompiler.compile(MODEL, calibration=calibration, evaluate=evaluation)


def test_the_report_holds_what_the_interface_names(compiled: qcompiler.CompiledModel) -> None:
    report = compiled.report
    assert report is not None
    assert report["target"].startswith("x86-")
    assert report["metric"]["drop"] <= 1.0
    assert report["metric"]["compiled"] > 0.98
    assert report["latency_ms"]["compiled"] > 0
    assert report["latency_ms"]["float"] > 0
    assert 0 < report["size_bytes"]["parameters"] < report["size_bytes"]["artifact"]
    assert report["size_bytes"]["model"] == MODEL.stat().st_size
    assert {d["precision"] for d in report["precision"].values()} <= {"w8a8", "fp32"}
    assert all(d["reason"] for d in report["precision"].values())
    assert {"model", "calibration", "plan"} <= set(report["digests"])
    assert report["seconds"]["total"] > 0
    for node in report["nodes"]:
        assert node["latency_ms"] is not None, node
    assert {"qconv", "qmatmul"} <= {op for n in report["nodes"] for op in n["ops"]}


def test_same_inputs_same_bytes(
    compiled: qcompiler.CompiledModel, calibration: dict[str, Any], tmp_path: Path
) -> None:
    again = qcompiler.compile(MODEL, calibration=calibration)
    compiled.save(tmp_path / "a.qcm")
    again.save(tmp_path / "b.qcm")
    assert (tmp_path / "a.qcm").read_bytes() == (tmp_path / "b.qcm").read_bytes()


def test_save_load_run(compiled: qcompiler.CompiledModel, tmp_path: Path) -> None:
    compiled.save(tmp_path / "net.qcm")
    x = np.load(DIGITS / "eval.npz")["input"][:7]
    loaded = qcompiler.load(tmp_path / "net.qcm")
    want = compiled({"input": x})["logits"]
    assert want.shape == (7, 10)
    for threads in (1, 2):
        np.testing.assert_array_equal(loaded({"input": x}, threads=threads)["logits"], want)
    np.testing.assert_array_equal(loaded(x)["logits"], want)


def test_the_reference_target_gives_the_same_numbers(
    compiled: qcompiler.CompiledModel, calibration: dict[str, Any], tmp_path: Path
) -> None:
    reference = qcompiler.compile(MODEL, target="reference", calibration=calibration)
    x = np.load(DIGITS / "eval.npz")["input"][:5]
    want = compiled(x)["logits"]
    np.testing.assert_array_equal(reference(x)["logits"], want)
    reference.save(tmp_path / "ref.qcm")
    np.testing.assert_array_equal(qcompiler.load(tmp_path / "ref.qcm")(x)["logits"], want)


def test_fp32_needs_no_samples() -> None:
    model = qcompiler.compile(MODEL, precision="fp32")
    x = np.load(DIGITS / "eval.npz")["input"][:3]
    from qcompiler.ort import Session

    want = np.concatenate([Session(MODEL).run({"input": x[i : i + 1]})["logits"] for i in range(3)])
    np.testing.assert_allclose(model(x)["logits"], want, rtol=1e-4, atol=1e-4)


def test_a_batch_of_four(calibration: dict[str, Any]) -> None:
    one = qcompiler.compile(MODEL, calibration=calibration)
    four = qcompiler.compile(MODEL, calibration=calibration, input_shapes={"input": (4, 1, 8, 8)})
    x = np.load(DIGITS / "eval.npz")["input"][:6]
    np.testing.assert_array_equal(four(x)["logits"], one(x)["logits"])


def test_a_model_in_memory(calibration: dict[str, Any]) -> None:
    model = qcompiler.compile(onnx.load(MODEL), calibration=calibration, target="x86-64")
    assert model.target.name == "x86-64"


def test_a_saved_plan(calibration: dict[str, Any], tmp_path: Path) -> None:
    from qcompiler.plan import PrecisionPlan

    first = qcompiler.compile(MODEL, calibration=calibration)
    plan = PrecisionPlan.from_json(dict(first.plan))
    plan.save(tmp_path / "plan.json")
    again = qcompiler.compile(MODEL, calibration=calibration, precision=tmp_path / "plan.json")
    assert again.artifact.digest() == first.artifact.digest()


def test_progress_is_reported(calibration: dict[str, Any]) -> None:
    seen: dict[str, tuple[int, int]] = {}

    def progress(stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        seen[stage] = (done, total)

    qcompiler.compile(MODEL, calibration=calibration, progress=progress)
    assert {"import", "calibrate", "lower", "build"} <= set(seen)
    assert all(done == total for done, total in seen.values())


def test_budget_that_is_kept_and_one_that_is_not(calibration: dict[str, Any]) -> None:
    budget = qcompiler.Budget(max_size_mb=1.0)
    qcompiler.compile(MODEL, calibration=calibration, budget=budget)
    budget = qcompiler.Budget(max_size_mb=0.001)
    with pytest.raises(InfeasibleBudgetError, match="max_size_mb is") as caught:
        qcompiler.compile(MODEL, calibration=calibration, budget=budget)
    assert isinstance(caught.value.best, qcompiler.CompiledModel)
    assert caught.value.least["max_size_mb"] > 0.001
    with pytest.raises(UsageError, match="max_drop cannot be checked"):
        qcompiler.compile(MODEL, calibration=calibration, budget=qcompiler.Budget(max_drop=1))


def test_own_scoring_function(calibration: dict[str, Any]) -> None:
    samples = np.load(DIGITS / "eval.npz")

    def score(model: qcompiler.CompiledModel) -> float:
        found = model(samples["input"][:50])["logits"].argmax(1)
        return float((found == samples["label"][:50]).mean())

    model = qcompiler.compile(MODEL, calibration=calibration, evaluate=score)
    assert model.report is not None
    assert model.report["metric"]["compiled"] > 0.9


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, DataError, "needs calibration samples"),
        ({"target": "z80"}, UnknownTargetError, "unknown target 'z80'"),
        ({"precision": "w9a9"}, UsageError, "unknown precision 'w9a9'"),
        ({"precision": "w8a7", "target": "x86-64"}, UnsupportedByTargetError, "no kernels for"),
        ({"precision": "fp32", "input_shapes": {"inputs": (1, 1, 8, 8)}}, UsageError, "'inputs'"),
        ({"precision": "fp32", "input_shapes": {"input": (1, 2, 8, 8)}}, UsageError, "declared"),
        ({"calibration": {"image": np.zeros((4, 1, 8, 8), "f")}}, DataError, "input"),
        ({"calibration": {"input": np.zeros((4, 1, 8, 9), "f")}}, DataError, "8, 9"),
        ({"calibration": {"input": np.zeros((4, 1, 8, 8), "u1")}}, DataError, "uint8"),
        ({"calibration": {"input": np.zeros((0, 1, 8, 8), "f")}}, DataError, "input|empty"),
        ({"calibration": {"input": np.full((4, 1, 8, 8), np.nan, "f")}}, DataError, "input.*NaN"),
    ],
)
def test_mistakes_are_explained(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        qcompiler.compile(MODEL, **arguments)


def test_open_extents_come_from_the_samples(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "L", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", "L", 4])
    w = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net", [x], [y], [onnx.numpy_helper.from_array(w, "w")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(ShapeError, match=r"'L'.*--input-shape x:1xLx8"):
        qcompiler.compile(model, precision="fp32")
    samples = {"x": np.random.default_rng(1).standard_normal((16, 5, 8)).astype(np.float32)}
    compiled = qcompiler.compile(model, calibration=samples)
    assert compiled.inputs["x"].shape == (1, 5, 8)
    np.testing.assert_allclose(compiled(samples)["y"], samples["x"] @ w, atol=0.2)


def test_compiled_for_another_cpu(
    calibration: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the features the artifact cannot run here, but its accuracy is known all the same."""
    here = qcompiler.compile(MODEL, target="x86-avx2", calibration=calibration)
    monkeypatch.setattr("qcompiler.cpu.cpu_features", lambda: frozenset({"sse2"}))
    samples = np.load(DIGITS / "eval.npz")
    few = {"input": samples["input"][:40], "label": samples["label"][:40]}
    compiled = qcompiler.compile(
        MODEL,
        target="x86-avx2",
        calibration=calibration,
        evaluate=qcompiler.Evaluation(few, "top1"),
    )
    report = compiled.report
    assert report is not None
    assert report["metric"]["compiled"] > 0.9
    assert report["latency_ms"]["compiled"] is None
    assert any("avx2" in note and "interpreter" in note for note in report["notes"])
    assert compiled.artifact.digest() == here.artifact.digest()
    with pytest.raises(UnsupportedByTargetError, match="avx2"):
        compiled(few["input"])


def test_frozen_inputs_are_compared_too(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
        for n, s in (("x", ["N", 8]), ("gain", [1]), ("y", ["N", 4]))
    ]
    w = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "gain"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "net", values[:2], values[2:], [onnx.numpy_helper.from_array(w, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    x = {"x": np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)}
    compiled = qcompiler.compile(
        model, calibration=x, freeze={"gain": [2.0]}, evaluate=qcompiler.Evaluation(x, "sqnr")
    )
    assert list(compiled.inputs) == ["x"]
    assert compiled.report is not None
    assert compiled.report["metric"]["compiled"] > 30
    np.testing.assert_allclose(compiled(x)["y"], 2 * x["x"] @ w, atol=0.3)


def test_evaluation_samples_are_checked_before_the_long_part(calibration: dict[str, Any]) -> None:
    stages: list[str] = []
    samples = dict(np.load(DIGITS / "eval.npz"))
    samples["slice"] = np.zeros(3, int)
    with pytest.raises(DataError, match="'slice' has shape"):
        qcompiler.compile(
            MODEL,
            calibration=calibration,
            evaluate=qcompiler.Evaluation(samples, "top1"),
            progress=lambda stage, done, total: stages.append(stage),
        )
    assert set(stages) == {"import"}


@pytest.mark.e2e
def test_what_a_quantized_model_has_in_float_is_told_from_what_found_no_integers() -> None:
    """Only weights are in int8 before `apart`; `between` has integers on both sides."""

    def tensor(name: str, array: np.ndarray[Any, Any]) -> onnx.TensorProto:
        return onnx.numpy_helper.from_array(array, name)

    node = onnx.helper.make_node
    codes = np.arange(64, dtype=np.int8).reshape(8, 8)
    constants = [
        tensor("codes", codes), tensor("scale", np.float32(0.1)), tensor("zero", np.int8(0)),
        tensor("uzero", np.uint8(128)),
    ]  # fmt: skip
    nodes = [
        node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
        node("MatMul", ["x", "w"], ["p"]),
        node("Sin", ["p"], ["s"], name="apart"),
        node("Erf", ["s"], ["e"], name="before"),
        node("QuantizeLinear", ["e", "scale", "uzero"], ["q"]),
        node("DequantizeLinear", ["q", "scale", "uzero"], ["d"]),
        node("CumSum", ["d", "axis"], ["c"], name="between"),
        node("QuantizeLinear", ["c", "scale", "uzero"], ["q2"]),
        node("DequantizeLinear", ["q2", "scale", "uzero"], ["d2"]),
        node("MatMul", ["d2", "w"], ["y"]),
    ]
    constants.append(tensor("axis", np.int64(1)))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes, "g", [value("x", 1, [1, 8])], [value("y", 1, [1, 8])], constants
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    model.ir_version = 9
    plan = qcompiler.compile(model, target="reference").plan["nodes"]
    reasons = {n: d["reason"] for n, d in plan.items()}
    assert reasons["between"] == "no integer form of cumsum fits what the model says"
    assert reasons["before"] == "no integer form of erf fits what the model says"
    assert reasons["apart"] == "float in the model"


def test_methods_that_nobody_chose_leave_quantized_models_alone() -> None:
    found = driver.quantize_model(MODEL, calibration=MODEL.parent / "calib.npz", stage=Stage.QDQ)
    quantized = to_onnx(found.graph)
    made = qcompiler.compile(quantized, precision="w4a8", calibration=MODEL.parent / "calib.npz")
    plain = qcompiler.compile(quantized)
    assert made.artifact.params.data == plain.artifact.params.data
    with pytest.raises(UsageError, match="the model is quantized already"):
        qcompiler.compile(quantized, precision="w4a8", methods="gptq")


@pytest.mark.e2e
@pytest.mark.parametrize("precision", ["w4a8", "w4a8-group"])
def test_a_saved_plan_keeps_the_methods_it_was_made_with(
    precision: str, calibration: dict[str, Any], tmp_path: Path
) -> None:
    def parameters(precision: str, methods: str | None) -> tuple[bytes, PrecisionPlan]:
        made = qcompiler.compile(
            MODEL, target="reference", calibration=calibration, precision=precision, methods=methods
        )
        return bytes(made.artifact.params.data), PrecisionPlan.from_json(made.plan)

    path = tmp_path / "plan.json"
    found = []
    chosen = "groups,equalize,gptq" if precision == "w4a8" else "equalize,gptq"
    for methods, recorded in (("none", ""), (None, chosen)):
        data, plan = parameters(precision, methods)
        assert plan.methods == recorded
        plan.save(path)
        again, kept = parameters(str(path), None)
        assert again == data
        assert kept.methods == plan.methods
        found.append(data)
    assert found[0] != found[1]


def test_kernels_of_7_bit_activations_are_reported_as_such(calibration: dict[str, Any]) -> None:
    model = qcompiler.compile(
        MODEL,
        target="reference",
        calibration=calibration,
        precision="w8a7",
        overrides={"fc": "w8a8"},
    )
    assert model.report is not None
    made = {name: n["precision"] for n in model.report["nodes"] for name in n["nodes"]}
    assert made["stem_1"] == model.report["precision"]["stem_1"]["precision"] == "w8a7"
    assert made["fc"] == "w8a8"
