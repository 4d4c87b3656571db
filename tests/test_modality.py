# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

import qcompiler
from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.modality import labels, modalities, select
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import OpKind
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import uniform
from qcompiler.report_page import page
from qcompiler.types import Precision

HYBRID = Path(__file__).parents[1] / "models" / "digits_hybrid"


@pytest.fixture(scope="module")
def hybrid() -> Graph:
    """The bundled network of two inputs: a picture and its rows as a sequence."""
    graph = load_onnx(HYBRID / "model.onnx")
    return PassManager(canonicalize_passes()).run(graph, PassContext())


def test_regions_of_the_bundled_hybrid(hybrid: Graph) -> None:
    found = {m.name: m for m in modalities(hybrid)}
    assert {name: m.kind for name, m in found.items()} == {
        "input:image": "convolutional",
        "input:rows": "attention",
        "input:image+rows": "dense",
    }
    assert sum(len(m.nodes) for m in found.values()) == len(hybrid.nodes)
    assert [m.fused for m in found.values()] == [False, False, True]
    names = [n.op.name for n in found["input:image+rows"].nodes]
    assert names[0] == "concat"
    assert names.count("matmul") == 2


def network() -> Graph:
    """Three inputs: b is only scaled, and meets a; both meet c later."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[1, 4] a, float[1, 4] b, float[1, 4] c) => (float[1, 4] y, float[1, 4] z)
        <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float two = {2.0}> {
            h = MatMul(a, w)
            k = Mul(b, two)
            m = Mul(h, k)
            n = MatMul(m, w)
            o = Tanh(c)
            y = Add(n, o)
            z = MatMul(y, w)
        }
    """)
    return load_onnx(model)


def test_nodes_without_products_belong_to_what_takes_them_in() -> None:
    graph = network()
    ops = [(m.inputs, [n.op.name for n in m.nodes]) for m in modalities(graph)]
    assert ops == [
        (("a",), ["matmul"]),
        (("a", "b"), ["mul", "mul", "matmul"]),  # scaling b is part of where a and b meet
        (("a", "b", "c"), ["tanh", "add", "matmul"]),
    ]
    assert labels(graph)[graph.nodes[-1]] == {"a", "b", "c"}
    assert [n.op.name for n in select(graph, "input:b+a")] == ["mul", "mul", "matmul"]
    assert len(select(graph, "fusion")) == 6
    assert select(graph, "input:b") == []


def test_precisions_by_region(hybrid: Graph) -> None:
    plan = uniform(hybrid).overridden(hybrid, {"input:image": "fp32", "fusion": Precision.W8A8})
    products = {
        m.name: {plan.precision(n.name).value for n in m.nodes if n.op.kind is OpKind.COMPUTE}
        for m in modalities(hybrid)
    }
    assert products == {
        "input:image": {"fp32"},
        "input:rows": {"w8a8"},
        "input:image+rows": {"w8a8"},
    }
    softened = uniform(hybrid, "fp32").overridden(hybrid, {"input:rows": "w8a8"})
    # Nodes of the region that cannot have the precision keep what they have.
    assert {softened.precision(n.name).value for n in select(hybrid, "input:rows")} >= {"w8a8"}
    with pytest.raises(UsageError, match="no node is selected by 'input:text'") as caught:
        plan.overridden(hybrid, {"input:text": "fp32"})
    assert "input:image, input:rows, input:image+rows" in str(caught.value.hint)


def compiled(overrides: dict[str, str] | None) -> tuple[dict[str, Any], float]:
    model = qcompiler.compile(
        HYBRID / "model.onnx",
        calibration=HYBRID / "calib.npz",
        evaluate=qcompiler.Evaluation(HYBRID / "eval.npz", "sqnr"),
        overrides=overrides,
    )
    assert model.report is not None
    found = {m["name"]: m for m in model.report["modalities"]}
    return found, float(model.report["metric"]["compiled"])


def test_the_report_shows_each_region() -> None:
    uniform_regions, before = compiled(None)
    assert list(uniform_regions) == ["input:image", "input:rows", "input:image+rows"]
    image = uniform_regions["input:image"]
    assert (image["kind"], image["inputs"], image["fusion"]) == ("convolutional", ["image"], False)
    assert image["precisions"] == {"w8a8": 7}
    for m in uniform_regions.values():
        assert m["latency_ms"] > 0
        assert 20 < m["sqnr_alone"] < 100
    # The region that costs most alone is the one to soften.
    worst = min(uniform_regions.values(), key=lambda m: m["sqnr_alone"])
    regions, after = compiled({worst["name"]: "fp32"})
    assert after > before + 1
    softened = regions[worst["name"]]
    assert softened["sqnr_alone"] is None
    assert softened["weight_bytes"] > 3 * worst["weight_bytes"]


def test_the_page_shows_each_region() -> None:
    found = [
        {"name": "input:<b>", "kind": "attention", "precisions": {"w8a8": 3, "fp32": 1},
         "weight_bytes": 2500, "latency_ms": 0.25, "sqnr_alone": 31.0},
        {"name": "input:a+<b>", "kind": "dense", "precisions": {"w8a8": 2},
         "weight_bytes": None, "latency_ms": None, "sqnr_alone": 22.5},
    ]  # fmt: skip
    html = page({"target": "host", "modalities": found})
    assert '<section id="modalities">' in html
    assert '<a href="#modalities">' in html
    assert "input:&lt;b&gt;" in html
    assert "input:<b>" not in html
    rows = [line for line in html.split("<tr") if "input:" in line]
    assert ["class=bad" in row.partition(">")[0] for row in rows] == [False, True]
    assert "2.5" in rows[0]
    assert "22.5" in rows[1]
    assert "by-region" not in html
    asked = {"fusion": {"observer": "percentile", "percentile": 99.9,
                        "limits": {"max_size_mb": 0.5, "max_drop": 1.0},
                        "found": {"max_size_mb": 0.25, "max_drop": 2.0}}}  # fmt: skip
    html = page({"target": "host", "modalities": found, "regions": asked})
    rows = [line for line in html.split("<tr") if "percentile 99.9" in line]
    assert len(rows) == 2
    assert ["class=bad" in row.partition(">")[0] for row in rows] == [False, True]
    assert '<section id="modalities">' not in page({"target": "host", "modalities": found[:1]})
    assert '<section id="modalities">' not in page({"target": "host", "modalities": None})


def test_a_model_of_one_region_has_no_such_part() -> None:
    model = qcompiler.compile(HYBRID.parent / "digits_cnn" / "model.onnx", precision="fp32")
    assert model.report is not None
    assert model.report["modalities"] is None


def test_a_region_without_samples_has_no_error() -> None:
    model = qcompiler.compile(HYBRID / "model.onnx", precision="fp32")
    assert model.report is not None
    found = model.report["modalities"]
    assert [m["sqnr_alone"] for m in found] == [None] * 3
    assert sum(m["weight_bytes"] for m in found) > 100_000
    assert np.isfinite([m["latency_ms"] for m in found]).all()
