# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Precision, calibration and limits of single regions of a model with several inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

import qcompiler
from qcompiler import RegionOptions, auto
from qcompiler.auto import choose
from qcompiler.data import Budget, Evaluation
from qcompiler.driver import quantize_model
from qcompiler.errors import InfeasibleBudgetError, LockError, UsageError
from qcompiler.fallback import faster_in_float
from qcompiler.modality import select
from qcompiler.regional import options_of, overrides_with, parse_region, parse_regions
from qcompiler.registry import get_target
from qcompiler.types import Precision

pytestmark = [pytest.mark.isa("x86-64"), pytest.mark.usefixtures("own_cache")]
TARGET = "x86-64"  # the fewest precisions
IMAGE, TEXT = "input:image", "input:text"


@pytest.fixture(autouse=True)
def _measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "OFF", 1e9)  # a busy machine is no reason to measure again here


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    """A convolution over a picture and a product over a text meet in a product."""
    net = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[1, 4, 8, 8] image, float[1, 32] text) => (float[1, 10] y) {
            a = Conv <pads = [1, 1, 1, 1]> (image, k)
            b = Relu(a)
            c = Flatten(b)
            d = MatMul(c, p)
            e = MatMul(text, q)
            f = Relu(e)
            g = MatMul(f, r)
            h = Concat <axis = 1> (d, g)
            y = MatMul(h, s)
        }
    """)
    rng = np.random.default_rng(3)
    shapes = {"k": (8, 4, 3, 3), "p": (512, 16), "q": (32, 64), "r": (64, 16), "s": (32, 10)}
    for name, shape in shapes.items():
        w = rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        net.graph.initializer.append(onnx.numpy_helper.from_array(w.astype(np.float32), name))
    return net


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    rng = np.random.default_rng(4)
    image = rng.standard_normal((48, 4, 8, 8)).astype(np.float32)
    image[:2] *= 12  # outliers: a percentile cuts them off
    return {"image": image, "text": rng.standard_normal((48, 32)).astype(np.float32)}


# ------------------------------------------------------------------------------- what is asked


def test_options_are_checked() -> None:
    for given, message in (
        ({"observer": "best"}, "unknown observer 'best': expected one of auto, minmax"),
        ({"percentile": 99.0}, "a percentile serves the observers percentile and auto, not None"),
        ({"observer": "percentile", "percentile": 40}, "percentile 40: expected above 50"),
        ({"precision": "w3a3"}, "unknown precision 'w3a3'"),
        ({"max_size_mb": -1}, "budget max_size_mb is -1"),
    ):
        with pytest.raises(UsageError, match=message):
            RegionOptions(**given)
    with pytest.raises(UsageError, match="'image' names no region"):
        options_of({"image": "fp32"})
    with pytest.raises(UsageError, match="expected RegionOptions or a precision, got int"):
        options_of({"fusion": 8})  # type: ignore[dict-item]
    found = options_of({"fusion": "fp32", IMAGE: RegionOptions(max_drop=1.0)})
    assert found["fusion"].precision == "fp32"
    assert not found["fusion"].limited
    assert found[IMAGE].budget == Budget(max_drop=1.0)
    assert overrides_with(found, {"fusion": "w8a8"}) == {"fusion": "w8a8"}
    assert overrides_with({}, None) is None


def test_the_text_form() -> None:
    selector, found = parse_region(
        "input:image+text=w8a8,observer=percentile,percentile=99.9,max-drop=0.5,max-latency=2,"
        "max-size=0.25"
    )
    assert selector == "input:image+text"
    assert found == RegionOptions("w8a8", "percentile", 99.9, 0.5, 2.0, 0.25)
    assert parse_regions(["fusion=max-size=1"]) == {"fusion": RegionOptions(max_size_mb=1.0)}
    assert parse_regions([]) is None
    for text, message in (
        ("fusion", "expected SELECTOR=PRECISION,KEY=VALUE"),
        ("fusion=w8a8,size=3", "unknown key 'size'"),
        ("fusion=w8a8,fp32", "fp32 is given twice|precision is given twice"),
        ("fusion=max-size=big", "max-size is 'big', expected a number"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_region(text)
    with pytest.raises(UsageError, match="'fusion' is given twice"):
        parse_regions(["fusion=fp32", "fusion=w8a8"])


def test_a_region_that_is_not_there(model: onnx.ModelProto, data: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="no region of the model is 'input:sound'") as info:
        quantize_model(model, calibration=data, regions={"input:sound": RegionOptions()})
    assert info.value.hint == "its regions are input:image, input:text, input:image+text"


# ------------------------------------------------------------------------------- calibration


def test_calibration_by_region(model: onnx.ModelProto, data: dict[str, Any]) -> None:
    plain = quantize_model(model, calibration=data)
    rules = {IMAGE: RegionOptions(observer="percentile", percentile=95.0)}
    own = quantize_model(model, calibration=data, regions=rules)
    assert plain.table is not None
    assert own.table is not None
    assert own.float_graph is not None
    inside = {v.name for n in select(own.float_graph, IMAGE) for v in n.outputs} | {"image"}
    changed = {n for n, t in own.table.tensors.items() if t.range != plain.table.tensors[n].range}
    assert "image" in changed
    assert changed <= inside
    assert {"text"} <= set(own.table.tensors) - changed
    assert own.table.tensors["image"].range[1] < 0.5 * plain.table.tensors["image"].range[1]
    assert "input:image=percentile 95" in own.table.spec
    assert own.table.spec != plain.table.spec  # what is kept for one is not taken for the other
    both = quantize_model(
        model,
        calibration=data,
        regions={IMAGE: RegionOptions(observer="auto"), TEXT: RegionOptions()},
    )
    assert any("observers by measured error" in line for line in both.log)
    assert both.table is not None
    assert both.table.tensors["text"] == plain.table.tensors["text"]


def test_precisions_by_hand_never_go_back_to_float(
    model: onnx.ModelProto, data: dict[str, Any]
) -> None:
    """What the fallback does not know (here products quantized at run time) is left as asked."""
    backend = get_target("host")
    asked = overrides_with({TEXT: RegionOptions("w8a8-dynamic")}, None)
    found = faster_in_float(model, backend, Precision.W8A8, calibration=data, overrides=asked)
    assert found is None


def test_the_lock_knows_how_regions_are_calibrated(
    model: onnx.ModelProto, data: dict[str, Any], tmp_path: Path
) -> None:
    rules = {IMAGE: RegionOptions("w8a8", observer="minmax")}
    first = qcompiler.compile(model, target="reference", calibration=data, regions=rules)
    first.save(tmp_path / "a.qcm")
    again = qcompiler.compile(
        model, target="reference", calibration=data, regions=rules, locked=tmp_path / "a.qcm"
    )
    assert again.artifact.params.data == first.artifact.params.data
    with pytest.raises(LockError, match="regions"):
        qcompiler.compile(model, target="reference", calibration=data, locked=tmp_path / "a.qcm")


# ------------------------------------------------------------------------------- what regions cost


@pytest.fixture(scope="module")
def report(model: onnx.ModelProto, data: dict[str, Any]) -> dict[str, Any]:
    compiled = qcompiler.compile(
        model, target=TARGET, calibration=data, evaluate=Evaluation(data, "sqnr"),
        regions={"fusion": RegionOptions("fp32", max_latency_ms=10.0), IMAGE: RegionOptions()},
    )  # fmt: skip
    assert compiled.report is not None
    return compiled.report


def test_the_report_says_what_each_region_costs(report: dict[str, Any]) -> None:
    found = {m["name"]: m for m in report["modalities"]}
    assert list(found) == [IMAGE, TEXT, "input:image+text"]
    assert found["input:image+text"]["drop_alone"] == 0.0  # it is float
    whole = report["metric"]["drop"]
    alone = [found[n]["drop_alone"] for n in (IMAGE, TEXT)]
    assert all(0 < drop <= whole + 0.5 for drop in alone)
    assert found[IMAGE]["parameter_bytes"] >= found[IMAGE]["weight_bytes"] - 8 * 4 * 9
    total = sum(m["parameter_bytes"] for m in found.values())
    # The block of parameters is aligned; some constants belong to no region.
    assert total <= report["size_bytes"]["parameters"]
    assert total > 0.5 * report["size_bytes"]["parameters"]
    asked = report["regions"]
    assert asked["fusion"]["limits"] == {"max_latency_ms": 10.0}
    assert 0 < asked["fusion"]["found"]["max_latency_ms"] < 10
    size = asked[IMAGE]["found"]["max_size_mb"]
    assert size == pytest.approx(found[IMAGE]["parameter_bytes"] / 1e6)


def test_limits_of_a_region_are_checked(model: onnx.ModelProto, data: dict[str, Any]) -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"input:text max_size_mb is 0\.\d+") as info:
        qcompiler.compile(
            model, target=TARGET, calibration=data, regions={TEXT: RegionOptions(max_size_mb=1e-3)}
        )
    assert info.value.least["input:text max_size_mb"] > 1e-3
    assert isinstance(info.value.best, qcompiler.CompiledModel)
    with pytest.raises(UsageError, match="max_drop of region 'input:text' cannot be checked"):
        qcompiler.compile("nowhere.onnx", regions={TEXT: RegionOptions(max_drop=1)})


# ------------------------------------------------------------------------------- the search


def test_automatic_precision_keeps_limits_of_regions(
    model: onnx.ModelProto, data: dict[str, Any]
) -> None:
    evaluation = Evaluation(data, "sqnr")
    free = choose(
        model, get_target(TARGET), calibration=data, evaluate=evaluation,
        budget=Budget(max_latency_ms=100.0),
    )  # fmt: skip
    assert free.log is not None
    assert {d.precision.value for d in free.plan.nodes.values()} == {"fp32"}  # the least loss
    assert free.log["regions"] is None
    limit = 6e-3  # float takes 4 * (32 * 64 + 64 * 16) bytes
    small = choose(
        model, get_target(TARGET), calibration=data, evaluate=evaluation,
        budget=Budget(max_latency_ms=100.0), regions={TEXT: RegionOptions(max_size_mb=limit)},
    )  # fmt: skip
    assert small.log is not None
    assert small.log["kept"], small.log["infeasible"]
    text = small.log["regions"][TEXT]
    assert text["limits"] == {"max_size_mb": limit}
    assert text["measured"]["size_bytes"] <= limit * 1e6
    assert "input:text within max_size_mb 0.006" in small.log["statement"]
    graph = quantize_model(model, precision="fp32").float_graph
    assert graph is not None
    inside = {n.name for n in select(graph, TEXT)}
    assert {small.plan.precision(n).value for n in inside} != {"fp32"}
    # Only what must be is quantized.
    assert small.log["measured"]["loss"] < 0.5 * small.log["uniform"]["w8a8"]["loss"]


def test_automatic_precision_keeps_the_drop_of_a_region(
    model: onnx.ModelProto, data: dict[str, Any]
) -> None:
    regions = {IMAGE: RegionOptions(max_drop=120.0 - 45.0)}  # an SQNR of 45 dB
    found = choose(
        model, get_target(TARGET), calibration=data, evaluate=Evaluation(data, "sqnr"),
        budget=Budget(max_drop=120.0 - 12.0), regions=regions,
    )  # fmt: skip
    assert found.log is not None
    assert found.log["kept"], found.log["infeasible"]
    image = found.log["regions"][IMAGE]
    assert image["measured"]["drop"] <= 75.0
    assert found.log["measured"]["drop"] <= 108.0
    never = choose(
        model, get_target(TARGET), calibration=data, evaluate=Evaluation(data, "sqnr"),
        budget=Budget(max_drop=120.0), regions={IMAGE: RegionOptions(max_latency_ms=1e-7)},
    )  # fmt: skip
    assert never.log is not None
    assert never.least["input:image max_latency_ms"] > 1e-7
    assert "input:image max_latency_ms 1e-07 was not reached" in never.log["infeasible"]["message"]
