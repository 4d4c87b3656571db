# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`precision="auto"` end to end: the plan, its log, budgets and resumption."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

import qcompiler
from qcompiler import auto
from qcompiler.assignment_nodes import RULES
from qcompiler.auto import choose, default_budget
from qcompiler.cache import Cache, cache_folder, key_of
from qcompiler.data import Budget, Evaluation
from qcompiler.errors import (
    AssignmentError,
    DataError,
    InfeasibleBudgetError,
    UnsupportedByTargetError,
    UsageError,
)
from qcompiler.plan import PrecisionPlan
from qcompiler.registry import get_target

pytestmark = [
    pytest.mark.timed,
    pytest.mark.isa("x86-avx2"),
    pytest.mark.usefixtures("own_cache"),
]

DIGITS = Path(__file__).parents[1] / "models" / "digits_cnn"
MODEL = DIGITS / "model.onnx"
CALIBRATION = DIGITS / "calib.npz"
EVALUATION = Evaluation(DIGITS / "eval.npz", "top1")
TARGET = "x86-avx2"


@pytest.fixture(scope="module")
def compiled(own_cache: Path) -> qcompiler.CompiledModel:
    del own_cache  # what the search learns here is known to the tests after it
    return qcompiler.compile(
        MODEL, target=TARGET, calibration=CALIBRATION, precision="auto", evaluate=EVALUATION,
        budget=Budget(max_drop=1.0),
    )  # fmt: skip


def log_of(model: qcompiler.CompiledModel) -> dict[str, Any]:
    assert model.report is not None
    log: dict[str, Any] = model.report["assignment"]
    return log


# ------------------------------------------------------------------------------- plan and log


def test_the_budget_is_kept_and_float_is_beaten(compiled: qcompiler.CompiledModel) -> None:
    log = log_of(compiled)
    assert log["kept"]
    assert log["infeasible"] is None
    assert log["measured"]["drop"] <= 1.0
    assert log["measured"]["latency_ms"] < log["measured"]["float_latency_ms"]
    assert log["measured"]["latency_ms"] <= log["measured"]["uniform_latency_ms"] * 1.02
    assert log["objective"] == "latency"
    assert "at most 1 percentage point below float" in log["statement"]


def test_the_log_says_why_for_every_node(compiled: qcompiler.CompiledModel) -> None:
    log = log_of(compiled)
    assert compiled.report is not None
    decided = compiled.report["precision"]
    assert set(log["nodes"]) == set(decided)
    products = 0
    for name, entry in log["nodes"].items():
        assert entry["precision"] == decided[name]["precision"]
        assert entry["reason"]
        if not entry["options"]:
            continue
        products += 1
        assert {"fp32", "w8a8"} <= set(entry["options"])
        assert entry["precision"] in entry["options"]
        assert all(o["latency_us"] > 0 for o in entry["options"].values())
        losses = entry["options"]
        assert losses["fp32"]["loss"] == 0 <= losses["w8a8"]["loss"]
        if entry["next_step"] is None:
            assert entry["blocked_by"] in (None, "slower", "override")
        else:
            assert entry["blocked_by"] in ("max_drop", "tied", *RULES)
        stops = {p: o["blocked_by"] for p, o in entry["options"].items()}
        assert stops.pop(entry["precision"]) is None
        assert set(stops.values()) <= {"max_drop", "tied", "slower", *RULES}
    assert products == 8
    json.dumps(log)  # plain data


def test_the_front_is_a_front(compiled: qcompiler.CompiledModel) -> None:
    front = log_of(compiled)["front"]
    assert sum(p["chosen"] for p in front) == 1
    assert len(front) >= 6
    best = [p for p in front if not p["chosen"]]
    for a, b in itertools.pairwise(best):
        assert a["latency_ms"] < b["latency_ms"]
        assert a["loss"] > b["loss"]


def test_rounds_were_built_and_evaluated(compiled: qcompiler.CompiledModel) -> None:
    log = log_of(compiled)
    assert [r["round"] for r in log["rounds"]] == list(range(1, len(log["rounds"]) + 1))
    for made in log["rounds"]:
        assert made["measured"]["drop"] is not None
        assert made["measured"]["loss"] >= 0
        assert made["kept"] == (made["measured"]["drop"] <= 1.0)
    floats = next(r for r in log["rounds"] if set(r["counts"]) == {"fp32"})
    assert floats["measured"]["loss"] < 1e-6
    assert log["uniform"]["w8a8"]["latency_ms"] < log["uniform"]["fp32"]["latency_ms"]


def test_predicted_latency_is_close(compiled: qcompiler.CompiledModel) -> None:
    log = log_of(compiled)
    # 15 % is held by the slow tests on a machine of their own; here others may run as well.
    assert log["predicted"]["latency_ms"] == pytest.approx(log["measured"]["latency_ms"], rel=0.5)


def test_the_plan_in_the_artifact_has_no_measured_figures(
    compiled: qcompiler.CompiledModel,
) -> None:
    for decision in compiled.plan["nodes"].values():
        assert " us" not in decision["reason"]


def test_the_same_plan_gives_the_same_bytes(
    compiled: qcompiler.CompiledModel, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    PrecisionPlan.from_json(compiled.plan).save(path)
    again = qcompiler.compile(MODEL, target=TARGET, calibration=CALIBRATION, precision=str(path))
    first, second = compiled.artifact.members(), again.artifact.members()
    assert first["lib.so"] == second["lib.so"]
    assert first["params.bin"] == second["params.bin"]
    assert [d["precision"] for d in again.plan["nodes"].values()] == [
        d["precision"] for d in compiled.plan["nodes"].values()
    ]
    assert again.report is not None
    assert again.report["assignment"] is None


# ------------------------------------------------------------------------------ budgets


def test_an_impossible_latency_names_the_least() -> None:
    with pytest.raises(InfeasibleBudgetError, match="max_latency_ms 1e-05 was not reached") as info:
        qcompiler.compile(
            MODEL, target=TARGET, calibration=CALIBRATION, precision="auto",
            budget=Budget(max_latency_ms=1e-5),
        )  # fmt: skip
    assert info.value.least["max_latency_ms"] > 1e-5
    best = info.value.best
    assert isinstance(best, qcompiler.CompiledModel)
    assert log_of(best)["infeasible"]["least"] == info.value.least
    assert not log_of(best)["kept"]
    assert best.report is not None
    assert {d["precision"] for d in best.report["precision"].values()} - {"fp32"}


def test_a_limit_on_latency_alone_takes_the_least_loss(compiled: qcompiler.CompiledModel) -> None:
    slow = log_of(compiled)["measured"]["float_latency_ms"] * 5
    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION, budget=Budget(max_latency_ms=slow)
    )
    assert found.log is not None
    assert found.log["objective"] == "loss"
    assert {d.precision.value for d in found.plan.nodes.values()} == {"fp32"}


def test_without_a_limit_or_labels_it_stays_near_float() -> None:
    found = choose(MODEL, get_target(TARGET), calibration=CALIBRATION)
    assert found.log is not None
    assert found.log["budget"]["default"]
    assert found.log["metric"] == "kl"
    assert found.log["measured"]["drop"] <= 0.01
    assert any("the default limit" in n for n in found.notes)
    assert found.plan.has_integers


def test_default_limits_follow_the_metric(tmp_path: Path) -> None:
    from qcompiler.workshop import prepare

    prepared = prepare(MODEL, calibration=CALIBRATION)
    for metric, limit in (("top1", 1.0), ("top5", 1.0), ("cosine", 0.01), ("sqnr", 90.0)):
        found, _, default = default_budget(
            None, Evaluation(CALIBRATION, metric), CALIBRATION, prepared
        )
        assert (found.max_drop, default) == (limit, True)
    with pytest.raises(UsageError, match="needs something that measures it"):
        default_budget(Budget(max_drop=1.0), None, CALIBRATION, prepared)


def test_size_can_bind(compiled: qcompiler.CompiledModel) -> None:
    limit = log_of(compiled)["measured"]["size_bytes"] * 0.96e-6
    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION, budget=Budget(max_size_mb=limit)
    )
    assert found.log is not None
    assert found.log["kept"], found.log["infeasible"]
    assert found.log["measured"]["size_bytes"] <= limit * 1e6


# ------------------------------------------------------------------------------ overrides, errors


def test_overrides_bind_the_search() -> None:
    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION,
        overrides={"res*": "fp32", "op:matmul": "w8a8"},
    )  # fmt: skip
    assert found.log is not None
    seen = set()
    for name, entry in found.log["nodes"].items():
        if entry["options"] and name.startswith("res"):
            assert entry["precision"] == "fp32"
            assert entry["blocked_by"] == "override"
            assert entry["reason"] == "asked for by an override"
            seen.add(name)
        if entry["op"] == "matmul":
            assert entry["precision"] == "w8a8"
            seen.add(name)
    assert seen >= {"res1_1", "res2_1", "fc"}
    with pytest.raises(UsageError, match="no node is selected by 'nowhere'"):
        choose(MODEL, get_target(TARGET), calibration=CALIBRATION, overrides={"nowhere": "fp32"})
    with pytest.raises(UsageError, match="cannot have the precision w8a8-dynamic"):
        choose(
            MODEL, get_target(TARGET), calibration=CALIBRATION,
            overrides={"res1_1": "w8a8-dynamic"},
        )  # fmt: skip


def test_overrides_of_a_uniform_precision() -> None:
    model = qcompiler.compile(
        MODEL, target=TARGET, calibration=CALIBRATION, overrides={"stem*": "fp32"}
    )
    decided = model.plan["nodes"]
    assert decided["stem_1"] == {"precision": "fp32", "reason": "asked for by 'stem*'"}
    assert decided["res1_1"]["precision"] == "w8a8"


def test_overrides_that_contradict_each_other() -> None:
    folder = DIGITS.parent / "digits_hybrid"
    rules = {"rows.0.query*": "w8a7", "rows.0.key*": "w8a8"}  # they read one tensor
    with pytest.raises(AssignmentError, match="the overrides contradict each other"):
        choose(
            folder / "model.onnx", get_target(TARGET), calibration=folder / "calib.npz",
            overrides=rules,
        )  # fmt: skip


def test_a_callable_scores_joint_models() -> None:
    data = dict(np.load(DIGITS / "eval.npz"))
    scored: list[float] = []

    def accuracy(model: Any) -> float:
        found = next(iter(model({"input": data["input"][:200]}).values()))
        scored.append(float((found.argmax(1) == data["label"][:200]).mean()))
        return scored[-1]

    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION, evaluate=accuracy,
        budget=Budget(max_drop=0.02),
    )  # fmt: skip
    assert found.log is not None
    assert found.log["metric"] == "custom"
    assert found.log["kept"]
    assert max(scored) - scored[-1] <= 0.02 + 1e-9
    assert len(scored) >= 7  # every joint model and float


def test_one_limit_is_shared_between_tuning_and_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompiler.targets.cpu import CpuBackend

    given: list[float] = []

    def tune(self: object, graph: object, tuning: qcompiler.Tuning, **_: object) -> None:
        assert tuning.seconds is not None
        given.append(tuning.seconds)

    monkeypatch.setattr(CpuBackend, "tune", tune)
    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION,
        tuning=qcompiler.Tuning(records=tmp_path / "r.jsonl", seconds=1000),
    )  # fmt: skip
    assert len(given) == 6  # every integer precision
    # Of what is left (here nearly all, for nothing was tuned) 60 % may go to tuning: half of that
    # to W8A8, the rest to the others in equal shares.
    shares = [0.3, 0.12, 0.15, 0.2, 0.3, 0.6]
    for seconds, share in zip(given, shares, strict=True):
        assert share * 400 < seconds <= share * 1000
    assert found.tuning is None or found.tuning.seconds is None
    assert '"stage": "latency"' in (tmp_path / "r.jsonl").read_text()


def test_calibration_is_needed() -> None:
    with pytest.raises(DataError, match="automatic precision needs calibration samples"):
        qcompiler.compile(MODEL, target=TARGET, precision="auto")


def test_a_target_without_kernels_is_refused() -> None:
    with pytest.raises(UnsupportedByTargetError, match="cannot tell what its kernels take"):
        qcompiler.compile(MODEL, target="reference", calibration=CALIBRATION, precision="auto")


def test_a_target_that_is_not_here_needs_records(monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompiler import latency

    def absent(target: object, what: str) -> None:
        raise UnsupportedByTargetError("this CPU lacks avx2")

    monkeypatch.setattr(latency, "check_runnable", absent)
    monkeypatch.setenv("QCOMPILER_CACHE", "/nonexistent/nowhere")  # nothing is known
    with pytest.raises(UnsupportedByTargetError, match="cannot be measured here: this CPU lacks"):
        choose(MODEL, get_target(TARGET), calibration=CALIBRATION)


def test_a_model_without_products_stays_float(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])
    graph = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "sin", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    found = qcompiler.compile(
        model, target=TARGET, calibration={"x": np.ones((4, 4), "f")}, precision="auto"
    )
    assert found.report is not None
    assert found.report["assignment"] is None
    assert any("everything stays float" in n for n in found.report["notes"])


# ------------------------------------------------------------------------------ resumption


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path))
    monkeypatch.setattr(auto, "OFF", 1e9)  # a busy machine is no reason to measure again here

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "analyze" and done == 5:
            raise KeyboardInterrupt

    backend = get_target(TARGET)
    with pytest.raises(KeyboardInterrupt):
        choose(MODEL, backend, calibration=CALIBRATION, evaluate=EVALUATION, progress=stop)
    part = next(tmp_path.glob("sensitivity-part-*.json"))
    kept = dict(json.loads(part.read_text())["nodes"])
    assert len(kept) == 5
    first = choose(MODEL, backend, calibration=CALIBRATION, evaluate=EVALUATION)
    assert not part.exists()
    report = json.loads(next(tmp_path.glob("sensitivity-*.json")).read_text())["report"]
    again = {n["node"]: n for n in report["nodes"]}
    for name, entry in kept.items():  # taken over, not measured again
        assert again[name]["weight"] == entry["weight"]
    stages: list[str] = []
    second = choose(
        MODEL, backend, calibration=CALIBRATION, evaluate=EVALUATION,
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert "analyze" not in stages  # nothing is analysed again,
    assert "measure" not in stages  # and no kernel measured
    assert first.log is not None
    assert second.log is not None
    assert first.log["latency"]["measured"] > 20
    assert second.log["latency"]["measured"] == 0
    assert second.log["uniform"]["w8a8"]["loss"] == first.log["uniform"]["w8a8"]["loss"]


def test_another_target_reuses_the_sensitivities(compiled: qcompiler.CompiledModel) -> None:
    del compiled  # it was searched for: its sensitivities are in the cache
    stages: list[str] = []
    choose(
        MODEL, get_target("x86-64"), calibration=CALIBRATION,
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    assert "measure" in stages
    assert "analyze" not in stages


def test_where_work_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QCOMPILER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "qcompiler"
    assert cache_folder(tmp_path) == tmp_path / "qcompiler-cache"
    assert cache_folder(tmp_path / "r.jsonl") == tmp_path / "qcompiler-cache"
    monkeypatch.setenv("QCOMPILER_CACHE", str(tmp_path / "mine"))
    cache = Cache(cache_folder())
    assert cache.kept
    cache.save("kind", key_of(1, "a"), {"x": 1})
    assert cache.load("kind", key_of(1, "a")) == {"x": 1}
    assert cache.load("kind", key_of(2)) is None
    cache.path("kind", key_of(2)).write_text("{torn")
    assert cache.load("kind", key_of(2)) is None
    assert not Cache(Path("/proc/nowhere")).kept


def test_a_cache_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)

    def full(self: Path, text: str) -> int:
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UsageError, match=r"cannot keep work in .*joint-k\.json: No space left"):
        cache.save("joint", "k", {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ memory


def test_memory_can_bind(compiled: qcompiler.CompiledModel) -> None:
    assert compiled.report is not None
    integers = compiled.report["memory_bytes"]["activations"]
    assert integers == log_of(compiled)["measured"]["memory_bytes"]
    limit = integers * 2.2e-6  # float takes 4 times as much
    found = choose(
        MODEL, get_target(TARGET), calibration=CALIBRATION,
        budget=Budget(max_latency_ms=1e3, max_memory_mb=limit),
    )  # fmt: skip
    assert found.log is not None
    assert found.log["kept"], found.log["infeasible"]
    assert found.log["objective"] == "loss"  # without the limit everything would be float
    assert integers / 2 < found.log["measured"]["memory_bytes"] <= limit * 1e6
    predicted = found.log["predicted"]["memory_bytes"]
    assert predicted == pytest.approx(found.log["measured"]["memory_bytes"], rel=0.5)
    assert found.plan.has_integers
    assert f"at most {limit:g} MB of memory" in found.log["statement"]


def test_memory_that_nothing_fits_in() -> None:
    with pytest.raises(InfeasibleBudgetError, match=r"max_memory_mb 0\.001 was not") as info:
        qcompiler.compile(
            MODEL, target=TARGET, calibration=CALIBRATION, precision="auto",
            budget=Budget(max_memory_mb=1e-3),
        )  # fmt: skip
    assert 1e-3 < info.value.least["max_memory_mb"] < 0.05
    with pytest.raises(InfeasibleBudgetError, match="max_memory_mb is"):
        qcompiler.compile(MODEL, target=TARGET, precision="fp32", budget=Budget(max_memory_mb=1e-3))


# ------------------------------------------------------------------------------ limits of time


def test_the_analysis_keeps_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qcompiler.auto import Clock, sensitivity_of
    from qcompiler.types import Precision
    from qcompiler.workshop import prepare

    prepared = prepare(MODEL, calibration=CALIBRATION)
    precisions = [Precision.W8A8, Precision.W4A8_GROUP, Precision.W8A8_DYNAMIC, Precision.FP32]
    cache = Cache(tmp_path)
    notes: list[str] = []
    assert sensitivity_of(prepared, precisions, cache, clock=Clock(0.0), notes=notes).nodes == ()
    assert notes == [
        "time for 0 of 8 products was enough in the analysis: the others stay at w8a8 or in float"
    ]
    assert not list(tmp_path.glob("sensitivity-[0-9a-f]*.json"))  # what is not whole is not kept
    monkeypatch.setattr(auto, "_seconds_of_a_run", lambda prepared: 1.0)
    stages: list[tuple[str, int]] = []
    few = sensitivity_of(
        prepared, precisions, cache, clock=Clock(200.0),
        progress=lambda stage, done, total: stages.append((stage, done)),
    )  # fmt: skip
    assert few.samples < auto.SAMPLES  # 8 products * 4 changes * half a second each
    assert len(few.nodes) == 8
    product = next(n for n in few.nodes if n.op == "matmul")
    assert set(product.activation) == {"8", "w8a8-dynamic"}
    assert set(product.weight) == {"8", "w4a8-group"}
    assert product.weight["8"].sqnr > product.weight["w4a8-group"].sqnr > 10
    assert product.activation["w8a8-dynamic"].loss < 1e-2


def test_mistakes_in_the_evaluation_come_before_calibration() -> None:
    stages: list[str] = []
    labels = np.load(DIGITS / "eval.npz")["label"]
    inputs = np.load(DIGITS / "eval.npz")["input"]
    wrong = Evaluation({"input": inputs, "label": labels[:-1]}, "top1")
    with pytest.raises(DataError, match="label"):
        choose(
            MODEL, get_target(TARGET), calibration=CALIBRATION, evaluate=wrong,
            progress=lambda stage, done, total: stages.append(stage),
        )  # fmt: skip
    assert "calibrate" not in stages
    with pytest.raises(UsageError, match="a limit on the drop needs something that measures it"):
        qcompiler.compile("nowhere.onnx", budget=Budget(max_drop=1.0))
    with pytest.raises(UsageError, match="max_slice_drop cannot be checked: nothing measures it"):
        qcompiler.compile("nowhere.onnx", budget=Budget(max_slice_drop=1.0))
    with pytest.raises(UsageError, match="evaluate is str, expected an Evaluation or a callable"):
        qcompiler.compile("nowhere.onnx", evaluate="top1")  # type: ignore[arg-type]
