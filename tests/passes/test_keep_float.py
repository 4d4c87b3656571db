# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products stay float where 8 bits do not hold their operands, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qcompiler
from qcompiler import fallback
from qcompiler.auto import Choice
from qcompiler.data import Batch
from qcompiler.driver import Quantized, quantize_model
from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node
from qcompiler.ops import OpKind, Stage
from qcompiler.passes import keep_float
from qcompiler.passes.keep_float import AskedFor, KeepFloat, KeptFloat, _Left, _Sums
from qcompiler.passes.sample_axes import Filled
from qcompiler.passmanager import parse_pass
from qcompiler.plan import Decision, PrecisionPlan
from qcompiler.registry import get_target
from qcompiler.types import Array, DType, Precision, TensorType

WIDTH, HIDDEN, FRAMES = 16, 8, 96


def network(*, cell: bool = False) -> onnx.ModelProto:
    """Normalized loudness: x -> a product -> by its mean magnitude -> a product -> an LSTM or not.

    After the normalization a quiet sample counts as much as a loud one.
    """
    rng = np.random.default_rng(5)
    constants: dict[str, Array] = {
        "a": (rng.normal(size=(WIDTH, 32)) / 4).astype(np.float32),
        "b": (rng.normal(size=(32, WIDTH)) / 4).astype(np.float32),
        "tiny": np.float32(1e-6),
        "middle": np.asarray([-1, 1, WIDTH]),
        "W": (rng.normal(size=(1, 4 * HIDDEN, WIDTH)) / 4).astype(np.float32),
        "R": (rng.normal(size=(1, 4 * HIDDEN, HIDDEN)) / 4).astype(np.float32),
        "rows": np.asarray([-1, HIDDEN]),
        "o": rng.normal(size=(HIDDEN, 2)).astype(np.float32),
        "axis": np.asarray([1]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["f"], "front"),
        helper.make_node("Abs", ["f"], ["g"]),
        helper.make_node("ReduceMean", ["g", "axis"], ["m"]),
        helper.make_node("Add", ["m", "tiny"], ["p"]),
        helper.make_node("Div", ["g", "p"], ["n"]),
        helper.make_node("MatMul", ["n", "b"], ["e"], "back"),
    ]
    if cell:
        nodes += [
            helper.make_node("Reshape", ["e", "middle"], ["s"]),
            helper.make_node("LSTM", ["s", "W", "R"], ["Y"], "cell", hidden_size=HIDDEN),
            helper.make_node("Reshape", ["Y", "rows"], ["z"]),
            helper.make_node("MatMul", ["z", "o"], ["y"], "head"),
        ]
    result = ("y", 2) if cell else ("e", WIDTH)
    used = {i for n in nodes for i in n.input}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", WIDTH])],
        [helper.make_tensor_value_info(result[0], TensorProto.FLOAT, ["T", result[1]])],
        [numpy_helper.from_array(a, k) for k, a in constants.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 9
    return model


def frames(decades: float) -> Array:
    """Samples whose loudness spans some powers of ten."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(FRAMES, WIDTH))
    return (x * 10.0 ** rng.uniform(-decades, 0, (FRAMES, 1))).astype(np.float32)


def quantized(decades: float, *, cell: bool = False, **options: Any) -> Quantized:
    return quantize_model(
        network(cell=cell),
        calibration={"x": frames(decades)},
        input_shapes={"x": (FRAMES, WIDTH)},
        **options,
    )


def left(result: Quantized, decades: float) -> float:
    """SQNR of the result, in dB."""
    assert result.float_graph is not None
    feeds = {"x": frames(decades)}
    (want,), (found,) = (list(run(g, feeds).values()) for g in (result.float_graph, result.graph))
    return float(10 * np.log10(np.mean(want**2) / np.mean((found - want) ** 2)))


@pytest.mark.parametrize("cell", [False, True])
def test_only_the_product_that_loses_the_result_stays_float(cell: bool) -> None:
    found = quantized(3.0, cell=cell)
    assert found.plan.precision("front") is Precision.FP32
    assert "alone in 8 bits it would leave" in found.plan.reason("front")
    wanted = 25 if cell else 20  # more of what a recurrent operator reads
    assert f"less than {wanted} dB" in found.plan.reason("front")
    assert found.plan.precision("back") is Precision.W8A8
    ops = {n.op.name for n in found.graph.nodes}
    assert {"matmul", "qmatmul"} <= ops
    assert ("qlstm" in ops) == cell
    assert found.kept is not None
    assert set(found.kept.nodes) == {"front"}
    assert found.kept.overrides() == {"front": Precision.FP32}
    assert any(line.startswith("keep_float: in 8 bits ") and "front stay float" in line
               for line in found.log)  # fmt: skip
    as_asked = quantized(3.0, cell=cell, precision=found.plan.replaced({
        "front": Decision(Precision.W8A8, "asked for")}))  # fmt: skip
    assert as_asked.plan.precision("front") is Precision.W8A8
    assert left(found, 3.0) > left(as_asked, 3.0) + 10


@pytest.mark.parametrize("cell", [False, True])
def test_a_network_that_8_bits_hold_is_left_as_it_is(cell: bool) -> None:
    found = quantized(0.3, cell=cell)
    assert found.plan.precision("front") is Precision.W8A8
    assert found.kept is None
    assert not found.log
    assert left(found, 0.3) > 25


def test_where_little_is_won_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that the named products do not explain is left to budgets."""
    monkeypatch.setattr(keep_float, "_whole", lambda *_: _Left(10.0, 10.0, "y"))
    found = quantized(3.0)
    assert found.plan.precision("front") is Precision.W8A8
    assert found.kept is None
    assert not found.log


def test_a_loss_that_is_spread_over_many_products_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(__file__).parents[2] / "models" / "digits_cnn"
    with np.load(folder / "calib.npz") as z:
        samples = {k: z[k][:8] for k in z.files}
    many: list[int] = []

    def each(graph: Graph, *_: Any) -> Iterator[tuple[Node, _Left]]:
        for node in [n for n in graph.nodes if n.op.kind is OpKind.COMPUTE][: many[-1]]:
            yield node, _Left(5.0, 5.0, "y")

    def whole(graph: Graph, plan: PrecisionPlan, *_: Any) -> _Left:
        kept = sum(d.precision is Precision.FP32 for d in plan.nodes.values())
        return _Left(40.0 if kept else 2.0, 2.0, "y")

    monkeypatch.setattr(keep_float, "_whole", whole)
    monkeypatch.setattr(keep_float, "_each_alone", each)
    for count, kept in ((2, True), (3, False)):
        many.append(count)
        found = quantize_model(folder / "model.onnx", calibration=samples)
        assert (found.kept is not None) == kept


def test_what_is_asked_for_by_name_stays() -> None:
    found = quantized(3.0, overrides={"front": "w8a8"})
    assert found.plan.precision("front") is Precision.W8A8
    assert found.kept is None


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w8a7"])
def test_the_width_of_weights_is_not_what_is_measured(precision: str) -> None:
    """Four-bit weights cost more than the floor allows; that alone keeps nothing in float."""
    assert quantized(0.3, precision=precision).kept is None
    assert set(quantized(3.0, precision=precision).kept.nodes) == {"front"}  # type: ignore[union-attr]


def test_copies_that_fill_up_a_run_do_not_count() -> None:
    """One loud frame at the end, repeated 15 times, would outweigh what is lost."""
    x = frames(3.0)[:40]
    x[-1] *= 3 / np.abs(x[-1]).max()
    reasons = [
        quantize_model(network(), calibration={"x": x}, input_shapes={"x": (n, WIDTH)}).plan.reason(
            "front"
        )
        for n in (40, 600)
    ]
    assert reasons[0] == reasons[1]
    assert "alone in 8 bits" in reasons[0]


def test_the_exported_model_is_the_same_mixture() -> None:
    found = quantized(3.0, stage=Stage.QDQ)
    front, back = (found.graph.node(n) for n in ("front", "back"))
    assert front.input(0).producer is None
    assert back.input(0).producer is not None
    assert back.input(0).producer.op.name == "dequantize"


def test_the_report_says_why() -> None:
    model = qcompiler.compile(
        network(),
        target="reference",
        calibration={"x": frames(3.0)},
        input_shapes={"x": (FRAMES, WIDTH)},
    )
    assert model.report is not None
    entry = model.report["precision"]["front"]
    assert entry["precision"] == "fp32"
    assert entry["reason"].startswith("alone in 8 bits it would leave ")


def test_regions_that_lose_to_float_do_not_bring_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search for slower regions keeps their precision and their reason."""
    seen: dict[str, Any] = {}

    def searched(*args: Any, **options: Any) -> Choice:
        seen.update(options)
        return Choice(PrecisionPlan({"front": Decision(Precision.W8A8, "")}), {})

    monkeypatch.setattr(fallback, "faster_in_float", searched)
    monkeypatch.setattr(fallback, "lost_to_float", lambda report: True)
    kept = KeptFloat({"front": Decision(Precision.FP32, "measured")})
    found = fallback.without_slower_regions(
        "net.onnx",
        get_target("host"),
        "w8a8",
        {},
        calibration={"x": frames(0.3)},
        overrides={"back": "w8a8"},
        kept=kept,
    )
    assert found is not None
    assert found.plan.nodes["front"] == kept.nodes["front"]
    assert seen["overrides"] == {"back": "w8a8", "front": Precision.FP32}


def test_text_forms() -> None:
    p = KeepFloat(floor=12.0)
    assert parse_pass(p.spec(), {"keep_float": KeepFloat}) == p
    assert AskedFor(frozenset({"b", "a"})).spec() == "asked{a, b}"


@pytest.mark.parametrize("name", ["digits_cnn", "digits_hybrid"])
def test_small_models_keep_every_product_in_integers(name: str) -> None:
    folder = Path(__file__).parents[2] / "models" / name
    with np.load(folder / "calib.npz") as z:
        samples = {k: z[k][:32] for k in z.files}
    found = quantize_model(folder / "model.onnx", calibration=samples)
    assert found.kept is None


def test_a_locked_compilation_makes_the_same_mixture(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "target": "reference",
        "calibration": {"x": frames(3.0)},
        "input_shapes": {"x": (FRAMES, WIDTH)},
    }
    first = qcompiler.compile(network(), precision="w8a8", **given)
    first.save(tmp_path / "net.qcm")
    again = qcompiler.compile(network(), precision="w8a8", locked=tmp_path / "net.qcm", **given)
    assert again.artifact.plan == first.artifact.plan
    x = {"x": frames(3.0)}
    np.testing.assert_array_equal(again(x)["e"], first(x)["e"])


def test_a_range_of_sizes_has_the_mixture_of_the_samples() -> None:
    made = qcompiler.compile(
        network(cell=True),
        calibration={"x": frames(3.0)},
        input_shapes={"x": ((1, FRAMES), WIDTH)},
    )
    assert made.plan["nodes"]["front"]["precision"] == "fp32"
    found = made({"x": frames(3.0)[:40]})["y"]
    want = run(quantized(3.0, cell=True, precision="fp32").graph, {"x": frames(3.0)})["y"][:40]
    assert float(10 * np.log10(np.mean(want**2) / np.mean((found - want) ** 2))) > 20


def test_results_with_infinities_decide_nothing(recwarn: pytest.WarningsRecorder) -> None:
    graph, x = Graph("net"), np.float32([[np.inf, 1.0], [2.0, 3.0]])
    v = graph.add_input("x", TensorType(x.shape, DType.FLOAT32))
    sums = _Sums(Filled(graph), {v: 0.0})
    sums.add(v, x, x + 1, Batch({"x": x}, 2, 2))
    assert sums.worst() == _Left()
    assert not recwarn.list
