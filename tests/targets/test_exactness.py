# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Promise 2: the compiled integer graph returns what the interpreter returns, bit for bit."""

from __future__ import annotations

from pathlib import Path

import four_bit_models
import numpy as np
import pytest
from built_models import executor, show_integers
from by_path import imported
from outside_models import TRAINED

from qcompiler.driver import build_graph, quantize_model
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.passes.insert_qdq import quantize_passes
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.registry import get_target
from qcompiler.targets.base import Built
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.types import UNCALIBRATED, Array, DType, TensorType

MODELS = Path(__file__).parents[2] / "models"
ROWS = [isa.name for isa in ISA_TABLE.values() if runnable(isa)]


def compare(
    built: Built, feeds: dict[str, Array], threads: int = 1, tolerance: float = 1e-4
) -> None:
    """Run both and require equality; integers exactly, float results within a tolerance."""
    graph = built.graph
    expected = run(graph, feeds)
    found = executor(built).run([feeds[v.name] for v in graph.inputs], threads=threads)
    for (name, value), array in zip(graph.outputs, found, strict=True):
        if value.type.is_quantized or value.dtype.is_integer:
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        else:
            np.testing.assert_allclose(
                array, expected[name], rtol=tolerance, atol=tolerance, err_msg=name
            )


def compile_all_values(
    path: Path, calibration: object, target: str, precision: str = "w8a8"
) -> Built:
    """Compile a model that also returns every integer tensor it computes."""
    result = quantize_model(path, calibration=calibration, precision=precision)
    graph = result.graph
    show_integers(graph)
    return build_graph(graph, get_target(target))


def sample(samples: dict[str, Array], built: Built, i: int) -> dict[str, Array]:
    feeds = {}
    for v in built.graph.inputs:
        array = samples[v.name]
        feeds[v.name] = array[i : i + 1] if array.ndim == v.type.rank else array[i]
    return feeds


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("name", ["digits_cnn", "digits_hybrid"])
def test_bundled_models(name: str, target: str) -> None:
    folder = MODELS / name
    calibration = dict(np.load(folder / "calib.npz"))
    evaluation = dict(np.load(folder / "eval.npz"))
    built = compile_all_values(folder / "model.onnx", calibration, target)
    for i in range(20):
        compare(built, sample(evaluation, built, i))


@pytest.mark.skipif("x86-avx2" not in ROWS, reason="needs AVX2")
@pytest.mark.parametrize("precision", ["w8a7", "w7a8", "w6a8", "w4a8"])
def test_precisions_of_the_row_without_vnni(precision: str) -> None:
    folder = MODELS / "digits_cnn"
    calibration = dict(np.load(folder / "calib.npz"))
    evaluation = dict(np.load(folder / "eval.npz"))
    built = compile_all_values(folder / "model.onnx", calibration, "x86-avx2", precision)
    for i in range(5):
        compare(built, sample(evaluation, built, i))
    assert precision in {p.value for p in get_target("x86-avx2").spec.precisions}
    vnni = {p.value for p in get_target("x86-avxvnni").spec.precisions}
    assert (precision in vnni) == (precision == "w4a8")  # there only the memory counts


@pytest.mark.parametrize("target", ROWS)
def test_weights_of_four_bits_are_exact_and_take_half_the_memory(target: str) -> None:
    folder = MODELS / "digits_cnn"
    calibration = dict(np.load(folder / "calib.npz"))
    evaluation = dict(np.load(folder / "eval.npz"))
    built = compile_all_values(folder / "model.onnx", calibration, target, "w4a8")
    for i in range(5):
        compare(built, sample(evaluation, built, i))
    wide = compile_all_values(folder / "model.onnx", calibration, target, "w8a8")
    packed = [a for a in built.parameters if a.dtype == np.uint8]
    assert packed
    assert sum(a.nbytes for a in built.parameters) < sum(a.nbytes for a in wide.parameters)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("precision", [p.value for p in UNCALIBRATED])
def test_precisions_without_calibration(precision: str, target: str) -> None:
    folder = MODELS / "digits_hybrid"
    evaluation = dict(np.load(folder / "eval.npz"))
    result = quantize_model(folder / "model.onnx", precision=precision)
    built = build_graph(result.graph, get_target(target))
    assert precision in {r.precision.value for r in built.regions}
    in_halves = precision == "fp16" and get_target(target).spec.multiplies_halves
    for i in range(3):
        compare(built, sample(evaluation, built, i), tolerance=5e-3 if in_halves else 1e-4)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("four", [DType.INT4, DType.UINT4])
def test_tensors_of_four_bits(rng: np.random.Generator, four: DType, target: str) -> None:
    """Floats too: a dequantization is one product of exact numbers."""
    result = quantize_model(four_bit_models.network(four, rng))
    assert "qconv" in {n.op.name for n in result.graph.nodes}
    built = build_graph(result.graph, get_target(target))
    given = four_bit_models.feeds(four, rng)
    compare(built, given, threads=2, tolerance=0)


@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_products_at_run_time_scales_are_exact_in_a_model(per: str, target: str) -> None:
    """Float results too: every step is one rounding, in one order."""
    rng = np.random.default_rng(0)
    graph = Graph("net")
    x = graph.add_input("x", TensorType((2, 9, 48), DType.FLOAT32))
    operands = [x]
    for i, (k, n) in enumerate(((48, 96), (96, 48))):
        w = graph.constant(rng.standard_normal((k, n)).astype(np.float32), f"w{i}")
        b = graph.constant(rng.standard_normal(n).astype(np.float32), f"b{i}")
        y = graph.add("matmul", [operands[-1], w, b]).output
        operands.append(graph.add("relu", [y]).output if i == 0 else y)
    y = graph.add("add", [operands[-1], x]).output
    graph.set_outputs([("y", y)])
    name = "w8a8-dynamic" if per == "row" else "w8a8-dynamic-tensor"
    plan = uniform(graph, name)
    ctx = PassContext()
    ctx.put(plan)
    integer = PassManager(quantize_passes(plan), given=(PrecisionPlan,)).run(graph, ctx)
    names = [n.op.name for n in integer.nodes]
    assert names == ["dynamic_quantize", "dynamic_matmul"] * 2
    built = build_graph(integer, get_target(target))
    feeds = {"x": (rng.standard_normal((2, 9, 48)) * 3).astype(np.float32)}
    (found,) = executor(built).run([feeds["x"]], threads=2)
    np.testing.assert_array_equal(found, run(built.graph, feeds)["y"])


@pytest.mark.slow
@pytest.mark.parametrize("target", ROWS)
@pytest.mark.parametrize("name", TRAINED)
def test_external_models(name: str, target: str) -> None:
    models = imported("catalogue", MODELS / "catalogue.py")
    reason = models.skip_reason(name)
    if reason:
        pytest.skip(reason)
    model = models.external(name, 64, 20)
    built = compile_all_values(model.path, model.calibration, target)
    for i in range(20):
        compare(built, sample(model.evaluation, built, i), threads=1 + i % 2)
