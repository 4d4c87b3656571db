# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Whole models through artifact, executor and emulated GPU return the interpreter's integers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import four_bit_models
import numpy as np
import pytest
from block_models import Case
from by_path import imported
from computed_cases import COMPUTED
from cuda_emulator import emulator
from product_cases import INTEGER
from product_models import Net
from row_block_cases import CASES

import qcompiler
from qcompiler.artifact import inspect_artifact
from qcompiler.driver import assemble, build_graph, quantize_model
from qcompiler.interpreter import run as interpret
from qcompiler.registry import get_target
from qcompiler.runtime import CompiledModel
from qcompiler.targets.cuda import backend
from qcompiler.targets.reference import GraphExecutor
from qcompiler.types import DType, Precision

ROOT = Path(__file__).resolve().parents[2]


catalogue = imported("qcompiler_model_catalogue", ROOT / "models" / "catalogue.py")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        emulator.skip_reason() is not None, reason=emulator.skip_reason() or "emulator"
    ),
]


def model_of(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """Return (model, calibration samples, evaluation arrays), or skip."""
    if name in {m.name for m in catalogue.STORED}:
        entry = catalogue.stored(name)
        return str(entry.path), str(entry.calibration), dict(np.load(entry.evaluation))
    reason = catalogue.skip_reason(name)
    if reason is not None:
        pytest.skip(reason)
    external = catalogue.external(name, calib=16, eval=16)
    assert external is not None
    arrays = external.calibration
    count = len(next(iter(arrays.values())))
    samples = [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)]
    return str(external.path), samples, external.evaluation


def check_model(
    name: str,
    tmp_path: Path,
    *,
    precision: str = "w8a8",
    samples: int = 4,
    target: str = "cuda-sm80",
) -> None:
    """Compile for a GPU; the saved and loaded model agrees with the interpreter bit for bit."""
    model, calibration, evaluation = model_of(name)
    if name.endswith("_qdq"):  # a quantized model has its scales
        calibration = None
    made = get_target(target)
    result = quantize_model(model, spec=made.spec, calibration=calibration, precision=precision)
    with emulator.without_nvcc(), emulator.driver_environment():
        built = build_graph(result.graph, made)
        path = tmp_path / "model.qcm"
        assemble(built, made.spec, result).save(path)
        loaded = qcompiler.load(path)
        inputs = {k: evaluation[k][:samples] for k in loaded.inputs}
        got = loaded(inputs)
    # The interpreter runs the graph as it was before the target's passes.
    reference = CompiledModel(loaded.artifact, executor=GraphExecutor(result.graph))
    assert emulator.differences(got, reference(inputs)) == []
    assert inspect_artifact(path)["manifest"]["executor"] == "cuda"


def few(name: str, count: int = 12) -> qcompiler.Evaluation:
    """Return the first samples of a stored evaluation set."""
    arrays = dict(np.load(catalogue.stored(name).evaluation))
    samples = [{k: v[i : i + 1] for k, v in arrays.items()} for i in range(count)]
    return qcompiler.Evaluation(samples, "top1")


def test_digits_cnn(tmp_path: Path) -> None:
    check_model("digits_cnn", tmp_path, samples=20)


def test_digits_cnn_on_turing(tmp_path: Path) -> None:
    check_model("digits_cnn", tmp_path, samples=3, target="cuda-sm75")


def test_digits_hybrid(tmp_path: Path) -> None:
    check_model("digits_hybrid", tmp_path)


def test_resnet20(tmp_path: Path) -> None:
    check_model("resnet20", tmp_path, samples=2)


BLOCKS = [
    Case("Conv", DType.UINT8, DType.UINT8, 12, 50, kernel=3, result=DType.UINT8, bias=True),
    Case("Conv", DType.INT8, DType.INT4, 8, 24, "middle", result=DType.INT16, seed=1),
    Case("Conv", DType.UINT16, DType.INT16, 16, 32, bias=True),
    Case("MatMul", DType.INT16, DType.INT16, 12, 50, result=DType.UINT16, bias=True),
    Case("MatMul", DType.UINT8, DType.UINT16, 0, 50, "low"),
]


@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: f"{c.op}-{c.stored.value}-{c.kind.value}")
def test_imported_weights_in_blocks(case: Case) -> None:
    """Whatever the storage, blocks and zero points: integers, and the interpreter's."""
    model, x = case.made()
    graph = quantize_model(model).graph
    assert not {"conv", "matmul"} & {n.op.name for n in graph.nodes}
    made = get_target("cuda-sm80")
    with emulator.without_nvcc():
        shaped = build_graph(graph, made).graph
    got = emulator.run_graph(shaped, {"x": x})
    assert emulator.differences(got, interpret(graph, {"x": x})) == []


@pytest.mark.parametrize("four", [DType.INT4, DType.UINT4])
def test_tensors_of_four_bits(rng: np.random.Generator, four: DType, tmp_path: Path) -> None:
    """As inputs, as results and in between, through the artifact."""
    made = get_target("cuda-sm80")
    result = quantize_model(four_bit_models.network(four, rng))
    inputs = four_bit_models.feeds(four, rng)
    with emulator.without_nvcc(), emulator.driver_environment():
        assemble(build_graph(result.graph, made), made.spec, result).save(tmp_path / "a.qcm")
        got = qcompiler.load(tmp_path / "a.qcm")(inputs)
    assert emulator.differences(got, interpret(result.graph, inputs)) == []


@pytest.mark.parametrize(
    "name",
    [
        "MatMul of matrices, uint8, 4",
        "Conv of groups, uint4, 3",
        "Conv of [3, 8, 7] along 1 by [8, 1, 3], uint8, far",
        "MatMul of [2, 3, 16] along 1 by [16, 8], uint8, far",
        "attention by head, far",
        "blocks of 16 by uint4 in blocks of 8, any",
        "blocks of 3 by uint16 in blocks of 4, any",
        "uint8 by computed ones in blocks of 12, one",
        "blocks of one row by one column",
        "a window, uint8, {}, one",
        "groups of few columns, uint8, far, columns",
        "transposed, uint16, middle, tensor",
        "QLinearConv, uint8, computed weights, zero points",
    ],
)
def test_imported_products(name: str) -> None:
    """Scales and zero points that are moved behind a product, and products in parts."""
    net = Net()
    model = net.model(net.quantized({**INTEGER, **CASES, **COMPUTED}[name](net), 20.0))
    graph = quantize_model(model).graph
    made = get_target("cuda-sm80")
    with emulator.without_nvcc():
        shaped = build_graph(graph, made).graph
    got = emulator.run_graph(shaped, net.samples)
    assert emulator.differences(got, interpret(graph, net.samples)) == []


@pytest.mark.parametrize("group", [1, 4, 8])
def test_floats_of_computed_windows(group: int) -> None:
    """Depthwise convolutions too, which CPUs leave to TVM, with what is fused into them."""
    net = Net()
    x, w = net.input(2, 8, 6, 5, far=False), net.input(8, 8 // group, 3, 3, far=False)
    y = net.node("Conv", x, w, net.floats(8), group=group, pads=[1] * 4)
    model = net.model(net.node("Relu", net.node("Add", y, net.input(2, 8, 6, 5, far=False))))
    graph = quantize_model(model, precision="fp32").graph
    with emulator.without_nvcc():
        shaped = build_graph(graph, get_target("cuda-sm80")).graph
    assert "conv" not in {n.op.name for n in shaped.nodes}
    (got,), (want,) = (
        list(found.values())
        for found in (emulator.run_graph(shaped, net.samples), interpret(graph, net.samples))
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kws_dscnn", "kws_dscnn_qdq", "ic_resnet8", "mobilenetv2"])
def test_more_models(name: str, tmp_path: Path) -> None:
    check_model(name, tmp_path, samples=2)


def test_four_bit_weights_in_groups(tmp_path: Path) -> None:
    check_model("digits_cnn", tmp_path, samples=3, precision="w4a8-group")


@pytest.mark.slow
def test_four_bit_weights(tmp_path: Path) -> None:
    check_model("resnet20", tmp_path, samples=2, precision="w4a8")


@pytest.mark.slow
def test_resnet50() -> None:
    rng = np.random.default_rng(0)
    samples = [{"input": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)}] * 2
    model = catalogue.built("resnet50").build()
    result = quantize_model(model, calibration=samples, precision="w8a8")
    made = get_target("cuda-sm80")
    with emulator.without_nvcc(), emulator.driver_environment():
        built = build_graph(result.graph, made)
        compiled = assemble(built, made.spec, result)
        got = compiled(samples[0])
    reference = CompiledModel(compiled.artifact, executor=GraphExecutor(result.graph))
    assert emulator.differences(got, reference(samples[0])) == []


def test_a_float_model_is_close() -> None:
    model, _, evaluation = model_of("digits_hybrid")
    inputs = {k: evaluation[k][:3] for k in ("image", "rows")}
    result = quantize_model(model, precision="fp32")
    made = get_target("cuda-sm80")
    with emulator.without_nvcc(), emulator.driver_environment():
        compiled = assemble(build_graph(result.graph, made), made.spec, result)
        got = compiled(inputs)
    expected = CompiledModel(compiled.artifact, executor=GraphExecutor(result.graph))(inputs)
    assert emulator.far_results(got, expected, list(expected), 1e-5) == []


@pytest.mark.parametrize("target", ["cuda-sm80", "cuda-sm75"])
def test_half_precision_is_close(target: str) -> None:
    model, _, evaluation = model_of("digits_hybrid")
    inputs = {k: evaluation[k][:3] for k in ("image", "rows")}
    result = quantize_model(model, precision="fp16")
    made = get_target(target)
    with emulator.without_nvcc(), emulator.driver_environment():
        built = build_graph(result.graph, made)
        compiled = assemble(built, made.spec, result)
        got = compiled(inputs)
    expected = CompiledModel(compiled.artifact, executor=GraphExecutor(result.graph))(inputs)
    assert emulator.far_results(got, expected, list(expected), 3e-3) == []
    assert any(r.precision is Precision.FP16 and "_f16" in r.symbols[-1] for r in built.regions)
    assert any("rounding of half precision" in note for note in built.notes)


def test_compiling_measures_on_the_gpu_and_profiles_it() -> None:
    model, calibration, _ = model_of("digits_cnn")
    # A plan, not a name: what an emulated GPU measures must not send regions back to float.
    plan = quantize_model(model, calibration=calibration, precision="w8a8").plan
    with emulator.without_nvcc(), emulator.driver_environment():
        compiled = qcompiler.compile(
            model, target="cuda-sm80", calibration=calibration, precision=plan,
            evaluate=few("digits_cnn"),
        )  # fmt: skip
    report = compiled.report
    assert report is not None
    assert report["metric"]["compiled"] > 0.9
    assert report["latency_ms"]["compiled"] > 0
    products = [n for n in report["nodes"] if n["kernel"].startswith("conv")]
    assert products
    assert all(n["latency_ms"] > 0 and n["macs"] > 0 for n in products)
    assert any("NVRTC" in note for note in report["notes"])


def test_without_a_gpu_accuracy_is_the_interpreter_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calibration, _ = model_of("digits_cnn")
    monkeypatch.setenv("QCOMPILER_LIBCUDA", "/nonexistent/libcuda.so.1")
    monkeypatch.setattr(backend, "find_nvcc", lambda: None)
    from qcompiler import cuda_driver

    cuda_driver.driver.cache_clear()
    try:
        compiled = qcompiler.compile(
            model,
            target="cuda-sm90",
            calibration=calibration,
            precision="w8a8",
            evaluate=few("digits_cnn"),
        )
    finally:
        cuda_driver.driver.cache_clear()
    report = compiled.report
    assert report is not None
    assert report["metric"]["compiled"] > 0.9
    assert report["latency_ms"]["compiled"] is None
    assert any(
        "no NVIDIA driver" in note and "accuracy is the interpreter's" in note
        for note in report["notes"]
    )
