# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The decision log of a real model, from recorded latencies and sensitivities.

The search, the program and the log are the real ones; building and measuring a joint model is
replaced by arithmetic: its losses add up to 1.3 times their sum, a loss of 0.001 is a drop of one
point, and a run takes 4 % more than its kernels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qcompiler import search as searching
from qcompiler.assign import is_allowed, totals
from qcompiler.assignment_log import assignment_log, reasons_of
from qcompiler.data import Budget
from qcompiler.decisions import Network, network_of
from qcompiler.ir import Graph
from qcompiler.latency import LatencyTable
from qcompiler.onnx_import import load_onnx
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.sensitivity_report import SensitivityReport
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import PrecisionPlan, uniform
from qcompiler.search import GAIN, search
from qcompiler.search_regions import Regional
from qcompiler.types import Precision
from qcompiler.workshop import Figures, Trial

RECORDED = json.loads((Path(__file__).parent / "golden" / "digits_assignment.json").read_text())
PRECISIONS = [Precision.W8A8, Precision.W6A8, Precision.W4A8, Precision.FP32]
MODEL = Path(__file__).parents[1] / "models" / "digits_cnn" / "model.onnx"


@pytest.fixture(scope="module")
def graph() -> Graph:
    return PassManager(canonicalize_passes()).run(load_onnx(MODEL), PassContext())


class Scripted:
    """A workshop and a judge whose joint models are sums."""

    metric, kind = "top1", "kl"

    def __init__(self, graph: Graph, network: Network) -> None:
        self.graph, self.network = graph, network
        self.trials: dict[str, Trial] = {}

    def make(self, plan: PrecisionPlan) -> Trial:
        key = json.dumps({n: plan.precision(n).value for n in plan})
        if key not in self.trials:
            found = totals(self.network.problem, self.network.choices(plan))
            loss = 1.3 * found.loss
            figures = Figures(
                loss, 1e3 * loss, 1.04 * found.latency, found.size, 2e3 * loss,
                1.06 * found.latency, found.memory,
            )  # fmt: skip
            nothing: Any = SimpleNamespace()
            self.trials[key] = Trial(plan, nothing, nothing, nothing, figures)
        return self.trials[key]

    def uniform(self, precision: Precision) -> Trial:
        return self.make(uniform(self.graph, precision))

    def judge(self, trial: Trial) -> Figures:
        return trial.figures


_KNOWN: dict[str, tuple[dict[str, Any], searching.Outcome]] = {}


def log_of(
    graph: Graph,
    monkeypatch: pytest.MonkeyPatch,
    budget: Budget,
    *,
    fixed: dict[str, str] | None = None,
    regional: Regional | None = None,
) -> tuple[dict[str, Any], searching.Outcome]:
    """Search under a budget and return the log and the outcome."""
    key = repr((budget, fixed, regional))
    if key not in _KNOWN:
        _KNOWN[key] = _log_of(graph, monkeypatch, budget, fixed or {}, regional or Regional())
    return _KNOWN[key]


def _log_of(
    graph: Graph,
    monkeypatch: pytest.MonkeyPatch,
    budget: Budget,
    fixed: dict[str, str],
    regional: Regional,
) -> tuple[dict[str, Any], searching.Outcome]:
    table = LatencyTable.from_json(RECORDED["table"])
    sensitivity = SensitivityReport.from_json(RECORDED["sensitivity"])
    network = network_of(graph, table, PRECISIONS, sensitivity).with_fixed(fixed)
    if budget.max_memory_mb is not None:
        network = network.with_memory()
    network = network.with_groups(regional.nodes)
    scripted: Any = Scripted(graph, network)

    def race(trials: dict[str, Trial], **_: Any) -> dict[str, float]:
        return {name: float(t.figures.seconds or 0.0) for name, t in trials.items()}

    monkeypatch.setattr(searching, "race", race)
    monkeypatch.setattr(searching, "runs_here", lambda _: True)
    trials = {p.value: scripted.uniform(p) for p in PRECISIONS}
    outcome = search(network, scripted, scripted, budget, uniform=trials, regional=regional)
    return assignment_log(outcome, table, budget, scripted, trials, False, {}), outcome


def shown(log: dict[str, Any]) -> str:
    """Return what a reader wants of a log, as text with rounded figures."""
    lines = [log["statement"], log["binding"]["sentence"]]
    lines += [f"any of: {log['binding']['any_of']}", ""]
    lines += [f"{n}: {e['sentence']}" for n, e in log["limits"].items()]
    lines.append("")
    for name, e in log["nodes"].items():
        if not e["options"]:
            continue
        lines.append(f"{name} {e['precision']}: {e['reason']} [{e['blocked_by']}]")
        for precision, option in e["options"].items():
            over = ", ".join(f"{n} +{v:.3g}" for n, v in option["over"].items())
            blocked = f" {option['blocked_by']}" if option["blocked_by"] else ""
            lines.append(
                f"    {precision} {option['latency_us']:.4g} us, loss {option['loss']:.3g}"
                f"{blocked}{f' ({over})' if over else ''}"
            )
    return "\n".join(lines) + "\n"


BUDGETS = {
    "drop": Budget(max_drop=0.3),
    "drop_and_size": Budget(max_drop=0.3, max_size_mb=1.131),
    "slice": Budget(max_drop=5.0, max_slice_drop=0.1),
    "loss": Budget(max_latency_ms=0.11),
    "loss_and_size": Budget(max_latency_ms=0.11, max_size_mb=1.135),
    "memory": Budget(max_drop=0.1, max_memory_mb=0.02),
    "infeasible": Budget(max_latency_ms=0.09),
    "loose": Budget(max_drop=50.0, max_size_mb=9.0),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_log_of_a_real_model(
    name: str, graph: Graph, monkeypatch: pytest.MonkeyPatch, golden: Any
) -> None:
    log, _ = log_of(graph, monkeypatch, BUDGETS[name])
    json.dumps(log)
    assert shown(log) == golden


@pytest.mark.parametrize("name", BUDGETS)
def test_what_the_log_says_of_limits_holds(
    name: str, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give one step more of each limit to a new search: it finds what the step promised."""
    budget = BUDGETS[name]
    log, _ = log_of(graph, monkeypatch, budget)
    for limit, entry in log["limits"].items():
        assert entry["limit"] == getattr(budget, limit)
        step = entry["step"]
        assert entry["binds"] == any(limit in s for s in log["binding"]["any_of"])
        if step is None:
            assert entry["sentence"] == f"more of {limit} alone would buy nothing"
            far = dataclasses.replace(budget, **{limit: 1e3})
            again, _ = log_of(graph, monkeypatch, far)
            assert again["kept"] == log["kept"]
            key = "latency_ms" if log["objective"] == "latency" else "loss"
            assert again["predicted"][key] >= log["predicted"][key] * (1 - 2 * GAIN)
            continue
        assert step["to"] >= entry["limit"]
        more = dataclasses.replace(budget, **{limit: step["to"] * (1 + 1e-3)})
        again, _ = log_of(graph, monkeypatch, more)
        assert again["kept"]
        if not log["kept"]:
            continue
        if log["objective"] == "latency":
            saved = (log["predicted"]["latency_ms"] - again["predicted"]["latency_ms"]) * 1e3
            assert saved >= step["saves_us"] * 0.9
        else:
            assert again["predicted"]["loss"] <= log["predicted"]["loss"] + 0.9 * step["loss"]


@pytest.mark.parametrize("name", BUDGETS)
def test_what_the_log_says_of_nodes_holds(
    name: str, graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, outcome = log_of(graph, monkeypatch, BUDGETS[name])
    problem, chosen = outcome.network.problem, outcome.solution
    limits = set(log["limits"])
    seen = set()
    for node, entry in log["nodes"].items():
        for precision, option in entry["options"].items():
            if precision == entry["precision"]:
                assert option["blocked_by"] is None
                continue
            seen.add(option["blocked_by"])
            moved = {**chosen.choices, node: precision}
            own = problem.item(node).options
            alone = totals(problem, moved)
            if option["blocked_by"] == "slower":
                assert own[precision].latency >= own[entry["precision"]].latency
            elif option["blocked_by"] == "casts" and name == "drop_and_size":
                followers = {n: problem.item(n).options for n in outcome.network.followers}
                for forms in itertools.product(*followers.values()):
                    led = {**moved, **dict(zip(followers, forms, strict=True))}
                    if is_allowed(problem, led):
                        assert totals(problem, led).latency >= chosen.latency * (1 - 1e-9)
            elif option["blocked_by"] == "loss":
                assert alone.loss >= chosen.loss
            elif option["blocked_by"] in limits:
                assert option["blocked_by"] in option["over"]
                if log["objective"] == "loss":
                    assert alone.loss < chosen.loss
            for limit, by in option["over"].items():
                assert by >= 0
                if limit == "max_size_mb" and is_allowed(problem, moved):
                    least = log["limits"][limit]["limit"] * 1e6
                    least = max(least, chosen.size) if limit in outcome.broken else least
                    assert alone.size * 1e-6 == pytest.approx(least * 1e-6 + by)
        step = entry["next_step"]
        if step is not None:
            assert entry["blocked_by"] == entry["options"][step["precision"]]["blocked_by"]
            assert set(step["over"]) == set(entry["options"][step["precision"]]["over"])
    if name != "loose":
        assert seen & limits


def test_two_limits_that_both_stop_what_would_be_faster(
    graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, _ = log_of(graph, monkeypatch, Budget(max_drop=0.1))
    size = free["predicted"]["size_bytes"] * 1e-6
    log, _ = log_of(graph, monkeypatch, Budget(max_drop=0.05, max_size_mb=size * 0.99))
    assert log["binding"]["any_of"]
    assert log["bound_by"] == log["binding"]["any_of"][0][0]


def test_limits_of_a_region_are_named_by_it(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = frozenset(n.name for n in graph.nodes if n.name.startswith("res"))
    free, _ = log_of(graph, monkeypatch, Budget(max_drop=1.0))
    size = sum(
        free["nodes"][n]["options"]["w4a8"]["size_bytes"] for n in ("res1_1", "res2_1")
    ) * 1e-6  # fmt: skip
    regional = Regional({"res*": Budget(max_size_mb=size * 0.5)}, {"res*": nodes})
    monkeypatch.setattr(Regional, "measure", lambda *_, **__: {})
    log, _ = log_of(graph, monkeypatch, Budget(max_drop=1.0), regional=regional)
    assert "res* max_size_mb" in log["limits"]
    entry = log["limits"]["res* max_size_mb"]
    assert entry["unit"] == "MB"
    assert entry["limit"] == size * 0.5


def test_an_override_is_what_stops_a_node(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = log_of(graph, monkeypatch, Budget(max_drop=0.1), fixed={"fc": "w8a8"})
    entry = log["nodes"]["fc"]
    assert entry["blocked_by"] == "override"
    assert entry["next_step"] is None
    assert entry["reason"] == "asked for by an override"
    assert {o["blocked_by"] for p, o in entry["options"].items() if p != "w8a8"} == {"override"}


def test_reasons_in_plans_hold_no_figures(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _ = log_of(graph, monkeypatch, BUDGETS["drop"])
    reasons = reasons_of(log)
    assert set(reasons) == {n for n, e in log["nodes"].items() if e["options"]}
    assert any("it would exceed max_drop" in r for r in reasons.values())
    assert not any(
        " us" in r or " by " in r.replace("by an override", "") for r in reasons.values()
    )
