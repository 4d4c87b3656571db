# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""4-bit weights get factors per group where one scale per channel loses the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from calibrated import prepared
from onnx import numpy_helper

import qcompiler
from qcompiler import fallback
from qcompiler.driver import quantize_model
from qcompiler.errors import UsageError
from qcompiler.ir import Graph
from qcompiler.passes.groups import Groups
from qcompiler.passes.keep_float import AskedFor
from qcompiler.passes.methods import parse_methods
from qcompiler.plan import Decision, PrecisionPlan
from qcompiler.types import Array, Precision

NET = """(float[1,16] x) => (float[1,8] y) {
  a = MatMul(x, w1)
  r = Relu(a)
  b = MatMul(r, w2)
  s = Relu(b)
  y = MatMul(s, w3)
}"""


def weights(*, outliers: bool) -> dict[str, Array]:
    """Weights of a network; with outliers, some read channels that are nearly silent."""
    rng = np.random.default_rng(0)
    w = {
        "w1": rng.standard_normal((16, 32)) / 4,
        "w2": rng.standard_normal((32, 32)) / 6,
        "w3": rng.standard_normal((32, 8)) / 6,
    }
    if outliers:
        w["w1"][:, :8] /= 1000
        w["w2"][:8] *= 40
    return {name: value.astype(np.float32) for name, value in w.items()}


@pytest.fixture
def lost(load_text: Callable[..., Graph]) -> Graph:
    return load_text(NET, **weights(outliers=True))


@pytest.fixture
def samples() -> dict[str, Array]:
    x = np.random.default_rng(1).standard_normal((32, 16))
    return {"x": x.astype(np.float32)}


def middle(graph: Graph) -> str:
    """The name of the second product."""
    return [n.name for n in graph.nodes if n.op.name == "matmul"][1]


def test_a_network_that_one_scale_loses_gets_groups(lost: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(lost, samples, "w4a8")
    before = ctx.get(PrecisionPlan)
    Groups().run(lost, ctx)
    plan = ctx.get(PrecisionPlan)
    assert plan.precision(middle(lost)) is Precision.W4A8_GROUP
    assert "the outputs' relative error is" in plan.reason(middle(lost))
    assert any(line.startswith("groups: kept") for line in ctx.log)
    changed = {n for n, d in plan.nodes.items() if d != before.nodes[n]}
    assert changed <= {n.name for n in lost.nodes if n.op.name == "matmul"}


def test_other_networks_keep_one_scale(
    load_text: Callable[..., Graph], samples: dict[str, Array]
) -> None:
    net = load_text(NET, **weights(outliers=False))
    ctx = prepared(net, samples, "w4a8")
    before = ctx.get(PrecisionPlan)
    Groups().run(net, ctx)
    assert ctx.get(PrecisionPlan) == before
    assert "groups: not needed (relative error held out" in ctx.log[-1]
    Groups(beyond=0.0).run(net, ctx)  # with nothing of unlike range, factors win nothing
    assert ctx.get(PrecisionPlan) == before
    assert ctx.log[-1].startswith("groups: discarded: not better")


def test_what_was_asked_for_by_name_stays(lost: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(lost, samples, "w4a8")
    before = ctx.get(PrecisionPlan)
    names = frozenset(n.name for n in lost.nodes)
    ctx.put(AskedFor(names))
    Groups().run(lost, ctx)
    assert ctx.get(PrecisionPlan) == before


def test_only_the_selected_products_change(lost: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(lost, samples, "w4a8")
    before = ctx.get(PrecisionPlan)
    (method,) = parse_methods(f"groups{{only={middle(lost)}}}")
    method.run(lost, ctx)
    after = ctx.get(PrecisionPlan)
    changed = {n for n, d in after.nodes.items() if d != before.nodes[n]}
    assert changed == {middle(lost)}
    assert after.precision(middle(lost)) is Precision.W4A8_GROUP


def test_products_without_groups_are_left_alone(lost: Graph, samples: dict[str, Array]) -> None:
    ctx = prepared(lost, samples, "w4a8")
    plan = ctx.get(PrecisionPlan)
    ctx.put(plan.replaced({n: Decision(Precision.W8A8, "") for n in plan.nodes}))
    assert not Groups().run(lost, ctx)
    assert not ctx.log


def test_a_bound_is_not_negative() -> None:
    with pytest.raises(UsageError, match=r"groups: beyond is -1\.0, expected a number from 0 on"):
        Groups(beyond=-1.0)


@pytest.fixture
def model() -> onnx.ModelProto:
    graph = onnx.parser.parse_graph("net " + NET)
    graph.initializer.extend(
        numpy_helper.from_array(w, name) for name, w in weights(outliers=True).items()
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )


def test_w4a8_has_groups_where_it_needs_them_and_saved_plans_keep_them(
    model: onnx.ModelProto, samples: dict[str, Array], tmp_path: Path
) -> None:
    made = qcompiler.compile(model, target="reference", calibration=samples, precision="w4a8")
    plan = PrecisionPlan.from_json(made.plan)
    assert plan.methods == "groups,equalize,gptq"
    assert Precision.W4A8_GROUP in {d.precision for d in plan.nodes.values()}
    plan.save(tmp_path / "plan.json")
    again = qcompiler.compile(
        model, target="reference", calibration=samples, precision=str(tmp_path / "plan.json")
    )
    assert again.artifact.params.data == made.artifact.params.data
    assert PrecisionPlan.from_json(again.plan) == plan
    plain = quantize_model(model, calibration=samples, precision="w4a8", methods="equalize,gptq")
    assert Precision.W4A8_GROUP not in {d.precision for d in plain.plan.nodes.values()}
    fixed = quantize_model(model, calibration=samples, precision=plain.plan, methods="groups")
    assert Precision.W4A8_GROUP not in {d.precision for d in fixed.plan.nodes.values()}


@pytest.mark.parametrize(("methods", "wanted"), [(None, "w4a8-group"), ("gptq", "w4a8")])
def test_what_lost_to_float_is_searched_at_the_precision_that_was_compiled(
    methods: str | None,
    wanted: str,
    model: onnx.ModelProto,
    samples: dict[str, Array],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    searched: list[str] = []

    def record(model: object, backend: object, precision: str, *_: object, **__: object) -> None:
        searched.append(precision)

    monkeypatch.setattr(fallback, "without_slower_regions", record)
    qcompiler.compile(
        model, target="reference", calibration=samples, precision="w4a8", methods=methods
    )
    assert searched == [wanted]
