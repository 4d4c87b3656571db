# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.data import Evaluation, SampleSet, load_samples
from qcompiler.errors import UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.metrics import SQNR_CEILING
from qcompiler.numerics import fake_quantize
from qcompiler.passes import sensitivity
from qcompiler.passes.calibrate import Calibrate, CalibrationSet, CalibrationTable
from qcompiler.passes.sensitivity import (
    Sensitivity,
    Settings,
    activation_qparams,
    measure_sensitivity,
    weight_grid,
)
from qcompiler.passes.sensitivity_report import (
    Effect,
    NodeSensitivity,
    SensitivityReport,
    first_jump,
)
from qcompiler.passes.sensitivity_trial import Head, Sums, product
from qcompiler.passes.single_node import OPERANDS, Feed, Unit, Walker, suffix_of, units
from qcompiler.passmanager import PassContext, PassManager

TEXT = """(float[1,3,6,6] x) => (float[1,5] y) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r = Relu(a)
  c = Conv <pads = [1,1,1,1]> (r, w2)
  s = Add(c, r)
  t = Relu(s)
  p = GlobalAveragePool(t)
  f = Flatten(p)
  y = Gemm(f, w3, b3)
}"""


BRANCHES = """(float[1,3,6,6] x) => (float[1,5] y, float[1,4,6,6] z) {
  a = Conv <pads = [1,1,1,1]> (x, w1, b1)
  r = Relu(a)
  c = Conv <pads = [1,1,1,1]> (r, w2)
  d = Conv <pads = [1,1,1,1]> (x, w1, b1)
  s = Add(c, d)
  e = Conv <pads = [1,1,1,1]> (d, w2)
  z = Relu(e)
  m = Mul(s, z)
  p = GlobalAveragePool(m)
  f = Flatten(p)
  y = Gemm(f, w3, b3)
}"""


@pytest.fixture
def net(
    load_text: Callable[..., Graph], rng: np.random.Generator, request: pytest.FixtureRequest
) -> Graph:
    def w(*shape: int) -> np.ndarray:
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    text = getattr(request, "param", TEXT)
    return load_text(text, w1=w(4, 3, 3, 3), b1=w(4), w2=w(4, 4, 3, 3), w3=w(4, 5), b3=w(5))


@pytest.fixture
def samples(rng: np.random.Generator) -> SampleSet:
    return load_samples({"x": rng.standard_normal((12, 3, 6, 6)).astype(np.float32)})


@pytest.fixture
def table(net: Graph, samples: SampleSet) -> CalibrationTable:
    ctx = PassContext()
    ctx.put(CalibrationSet.of(samples, net))
    PassManager([Calibrate()], given=tuple(ctx.artifacts)).run(net, ctx)
    return ctx.get(CalibrationTable)


SMALL = Settings(samples=8, fisher_samples=4)


def test_units_are_products_with_what_fuses(net: Graph) -> None:
    found = units(net)
    assert [u.op for u in found] == ["conv", "conv", "matmul"]
    assert [len(u.members) for u in found] == [2, 3, 1]
    assert found[1].result == "t"


@pytest.mark.parametrize("net", [TEXT, BRANCHES], indirect=True)
def test_a_suffix_gives_what_the_whole_gives(
    net: Graph, samples: SampleSet, table: CalibrationTable
) -> None:
    """From every cut, kept or recomputed prefixes, with the float operands and with others."""
    batches = CalibrationSet.of(samples, net)
    for memory in (0.0, 3000.0, 1e9):
        walker = Walker(net, lambda: iter(batches), memory)
        for unit in units(net):
            suffix = suffix_of(net, unit)
            models = [m.session() for m in (suffix.side, suffix.kernel, suffix.tail) if m]
            node = net.node(unit.node)
            q = weight_grid(node, 4, activation_qparams(node.input(0), table, signed=False))
            changed = net.clone()
            w = changed.constant(fake_quantize(node.input(1).array(), q), "rounded")
            changed.set_input(changed.node(unit.node), 1, w)
            feeds = list(walker.feeds(unit))
            assert len(feeds) == 12
            kept = sum(f.prefix is None for f in feeds)
            assert kept == 12 or memory < 1e9
            for feed, batch in list(zip(feeds, batches, strict=True))[::5]:
                live = dict(feed.arrays)
                if feed.prefix is not None:
                    live.update(feed.prefix.session().run(batch.inputs))
                for graph in (net, changed):
                    weight = graph.node(unit.node).input(1).array()
                    got = {**live, OPERANDS[0]: live[suffix.x], OPERANDS[1]: weight}
                    for session in models:
                        got.update(session.run({n: got[n] for n in session.input_names}))
                    want = run(graph, dict(batch.inputs))["y"]
                    np.testing.assert_allclose(
                        got[dict(suffix.outputs)["y"]], want, rtol=1e-4, atol=1e-4
                    )


@pytest.mark.parametrize("net", [BRANCHES], indirect=True)
def test_only_what_a_change_reaches_runs_again(net: Graph) -> None:
    """The other branch of a sum runs once; an output beside the product is not run."""
    first = suffix_of(net, units(net)[0])  # a: the branch of d and the gate e are beside it
    assert first.side is not None
    assert set(first.side.session().output_names) >= {"d", "z"}
    assert first.kernel.session().input_names == OPERANDS
    assert [name for name, _ in first.outputs] == ["y"]
    last = suffix_of(net, units(net)[-1])
    assert last.side is None
    assert last.tail is None  # its result is the output


def test_large_constants_are_not_copied_into_the_models(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    w = rng.standard_normal((64, 64)).astype(np.float32)
    text = "(float[1,64] x) => (float[1,64] y) { h = MatMul(x, w) r = Relu(h) y = MatMul(r, v) }"
    graph = load_text(text, w=w, v=w[::-1].copy())
    first, second = units(graph)
    tail = suffix_of(graph, first).tail
    assert tail is not None
    assert len(tail.model) < 1000
    (held,) = tail.constants.values()
    assert held is graph.node(second.node).input(1).data
    x = rng.standard_normal((1, 64)).astype(np.float32)
    for level in ("basic", "all"):
        session = tail.session(level)
        found = session.run({session.input_names[0]: x})
        np.testing.assert_allclose(found["y"], x @ held, rtol=1e-4, atol=1e-4)


def test_kept_values_stay_within_the_memory_and_join_as_the_network_narrows(
    net: Graph, samples: SampleSet
) -> None:
    batches = CalibrationSet.of(samples, net)
    size = {u.node: sum(a.nbytes for a in f[0].arrays.values()) for u, f in _walk(net, batches)}
    largest, last = max(size.values()), min(size.values())
    assert last < largest / 4
    room = 5 * largest + 1
    joined = []
    for _, feeds in _walk(net, batches, room):
        kept = [f for f in feeds if f.prefix is None]
        made = [a for f in kept for name, a in f.arrays.items() if name != "x"]
        assert sum(a.nbytes for a in made) <= room
        joined.append(len(kept))
        assert all(f.prefix is None or set(f.arrays) == {"x"} for f in feeds)
    assert joined[1] == 5
    assert joined[-1] == 12


def _walk(
    net: Graph, batches: CalibrationSet, memory: float = 1e9
) -> Iterator[tuple[Unit, list[Feed]]]:
    walker = Walker(net, lambda: iter(batches), memory)
    for unit in units(net):
        yield unit, list(walker.feeds(unit))


def test_figures(net: Graph, samples: SampleSet, table: CalibrationTable) -> None:
    found = measure_sensitivity(net, table, samples, settings=SMALL)
    assert found.losses == {"y": "logits"}
    assert found.samples == 8
    for n in found.nodes:
        sqnr = [n.weight[b].sqnr for b in ("8", "6", "4")]
        losses = [n.weight[b].loss for b in ("8", "6", "4")]
        assert sqnr == sorted(sqnr, reverse=True)
        assert losses == sorted(losses)
        assert sqnr[0] - sqnr[2] > 15
        assert n.activation["8"].sqnr > 30
        assert 0.99 < n.weight["8"].cosine <= 1
        assert n.weight["8"].drop is None
        assert n.along_sqnr is not None
        assert n.along_sqnr <= max(n.weight["8"].sqnr, n.activation["8"].sqnr) + 3
        predicted = n.predicted("6")
        assert predicted is not None
        assert 0.05 < predicted / n.weight["6"].loss < 20
    assert set(found.tensors) == {"x", "r"} | {net.node(units(net)[2].node).input(0).name}
    assert SensitivityReport.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_narrower_activations_cost_more(
    net: Graph, samples: SampleSet, table: CalibrationTable
) -> None:
    how = Settings(weight_bits=(8,), samples=8, fisher_samples=0, activation_bits=(8, 7, 5))
    for n in measure_sensitivity(net, table, samples, settings=how).nodes:
        levels = [n.activation[b].sqnr for b in ("8", "7", "5")]
        assert levels[0] - levels[1] == pytest.approx(6, abs=4)  # one bit
        assert levels[1] - levels[2] == pytest.approx(12, abs=5)
    with pytest.raises(UsageError, match="activation bits"):
        Settings(activation_bits=(1,))


def test_own_result_equals_a_direct_computation(
    net: Graph, samples: SampleSet, table: CalibrationTable
) -> None:
    found = measure_sensitivity(net, table, samples, settings=SMALL).nodes[1]
    node = net.node(found.node)
    xq = activation_qparams(node.input(0), table, signed=False)
    changed = net.clone()
    held = fake_quantize(node.input(1).array(), weight_grid(node, 4, xq))
    changed.set_input(changed.node(found.node), 1, changed.constant(held, "rounded"))
    signal = noise = 0.0
    for batch in list(CalibrationSet.of(samples, net))[:8]:
        t = [next(v for v in g.values() if v.name == "t") for g in (net, changed)]
        a = run(net, dict(batch.inputs), keep=[t[0]])["t"].astype(np.float64)
        b = run(changed, dict(batch.inputs), keep=[t[1]])["t"].astype(np.float64)
        signal += float((a * a).sum())
        noise += float(((a - b) ** 2).sum())
    assert found.weight["4"].sqnr == pytest.approx(10 * np.log10(signal / noise), abs=0.01)


def test_labels_give_a_drop(net: Graph, samples: SampleSet, table: CalibrationTable) -> None:
    x = next(samples.chunks())["x"]
    label = np.array([int(run(net, {"x": x[i : i + 1]})["y"].argmax()) for i in range(12)])
    evaluation = Evaluation({"x": x, "label": label}, "top1")
    found = measure_sensitivity(net, table, samples, evaluation=evaluation, settings=SMALL)
    assert found.score == 1.0
    assert found.joint_score is not None
    drops = [e.drop for n in found.nodes for e in (*n.weight.values(), *n.activation.values())]
    assert all(d is not None and 0 <= d <= 100 for d in drops)


def test_workers_and_memory_change_nothing(
    net: Graph, samples: SampleSet, table: CalibrationTable
) -> None:
    alone = measure_sensitivity(net, table, samples, settings=SMALL)
    with ThreadPoolExecutor(2) as pool:
        several = measure_sensitivity(net, table, samples, settings=SMALL, executor=pool, workers=2)
    assert several == alone
    for memory in (4000.0, 0.0):
        tight = Settings(samples=8, fisher_samples=4, memory=memory)
        assert measure_sensitivity(net, table, samples, settings=tight) == alone


class Elsewhere:
    """All that joblib, Dask or Ray need to look like: tasks and results go over a wire."""

    def __init__(self) -> None:
        self.at_once = self.most = self.sent = 0

    class Pending:
        def __init__(self, owner: Elsewhere, call: bytes) -> None:
            self._owner, self._call = owner, call

        def result(self) -> Any:
            fn, task = pickle.loads(self._call)
            self._owner.at_once -= 1
            return pickle.loads(pickle.dumps(fn(task)))

    def submit(self, fn: Callable[[Any], Any], task: Any, /) -> Pending:
        call = pickle.dumps((fn, task))
        self.sent += len(call)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        return self.Pending(self, call)


def test_any_object_that_submits_is_an_executor(
    net: Graph, samples: SampleSet, table: CalibrationTable
) -> None:
    alone = measure_sensitivity(net, table, samples, settings=SMALL)
    wire = Elsewhere()
    assert alone == measure_sensitivity(
        net, table, samples, settings=SMALL, executor=wire, workers=2
    )
    assert (wire.at_once, wire.most) == (0, 3)  # one more waits
    light = Elsewhere()
    far = Settings(samples=8, fisher_samples=4, memory=0)  # inputs travel, not what is kept
    assert alone == measure_sensitivity(
        net, table, samples, settings=far, executor=light, workers=2
    )


@pytest.mark.slow
def test_processes(net: Graph, samples: SampleSet, table: CalibrationTable) -> None:
    alone = measure_sensitivity(net, table, samples, settings=SMALL)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        several = measure_sensitivity(net, table, samples, settings=SMALL, executor=pool, workers=2)
    assert several == alone


def test_large_outputs_are_made_anew_by_each_task(
    net: Graph, samples: SampleSet, table: CalibrationTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = measure_sensitivity(net, table, samples, settings=SMALL)
    monkeypatch.setattr(sensitivity, "SMALL_OUTPUTS", 0)
    anew = measure_sensitivity(net, table, samples, settings=SMALL)
    for a, b in zip(kept.nodes, anew.nodes, strict=True):
        assert a.weight["4"].loss == pytest.approx(b.weight["4"].loss, rel=1e-3)
        assert a.fisher == pytest.approx(b.fisher, rel=1e-3)


def test_a_change_that_changes_nothing_costs_nothing(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    w = rng.integers(-7, 8, (6, 4)).astype(np.float32)
    w[0] = 7  # on a grid of 4 bits, whole as it is
    graph = load_text("(float[1,6] x) => (float[1,4] y) { h = MatMul(x, w) y = Relu(h) }", w=w)
    samples = load_samples({"x": rng.standard_normal((8, 6)).astype(np.float32)})
    ctx = PassContext()
    ctx.put(CalibrationSet.of(samples, graph))
    PassManager([Calibrate()], given=tuple(ctx.artifacts)).run(graph, ctx)
    (found,) = measure_sensitivity(graph, ctx.get(CalibrationTable), samples, settings=SMALL).nodes
    assert found.weight["4"] == Effect(SQNR_CEILING, 1.0, 0.0, 0.0)
    assert found.activation["8"].loss > 0


def test_sums_of_products(rng: np.random.Generator) -> None:
    for size in (7, 1024, 5000):
        a, b = (rng.standard_normal(size).astype(np.float32) for _ in range(2))
        exact = float((a.astype(np.float64) * b).sum())
        assert product(a, b) == pytest.approx(exact, abs=1e-6 * size)
        assert product(a, a) == pytest.approx(float((a.astype(np.float64) ** 2).sum()), rel=1e-6)
    tiny, huge = np.full(2048, 1e-30, np.float32), np.full(2048, 1e30, np.float32)
    assert product(tiny, tiny) == pytest.approx(2048e-60, rel=1e-5)
    assert product(huge, huge) == pytest.approx(2048e60, rel=1e-5)


def test_cosine() -> None:
    sums = Sums()
    y, z = np.float32([3.0, 4.0]), np.float32([4.0, 3.0])
    assert sums.add(y, z, product(y, y))
    assert sums.cosine == pytest.approx(24 / 25)
    still = Sums()
    assert not still.add(y, y, product(y, y))
    assert still.cosine == 1.0


def test_it_goes_on_after_an_interruption(
    net: Graph, samples: SampleSet, table: CalibrationTable, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"

    def stop(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(net, table, samples, settings=SMALL, state=state, progress=stop)
    assert len(json.loads(state.read_text())["nodes"]) == 2
    resumed = measure_sensitivity(net, table, samples, settings=SMALL, state=state)
    assert resumed == measure_sensitivity(net, table, samples, settings=SMALL)
    with pytest.raises(UsageError, match="another model, data or settings"):
        measure_sensitivity(net, table, samples, settings=Settings(seed=1), state=state)


def test_the_fisher_trace_of_a_linear_classifier(
    load_text: Callable[..., Graph], rng: np.random.Generator
) -> None:
    """For y = x W + b: Tr(F) = E[|x|^2 * sum_c p_c (1 - p_c)]."""
    w = rng.standard_normal((6, 4)).astype(np.float32)
    b = rng.standard_normal(4).astype(np.float32)
    graph = load_text("(float[1,6] x) => (float[1,4] y) { y = Gemm(x, w, b) }", w=w, b=b)
    x = rng.standard_normal((256, 6)).astype(np.float32)
    samples = load_samples({"x": x})
    ctx = PassContext()
    ctx.put(CalibrationSet.of(samples, graph))
    p = Sensitivity(weight_bits=(8,), samples=256, fisher_samples=256)
    PassManager([Calibrate(), p], given=tuple(ctx.artifacts)).run(graph, ctx)
    y = x @ w + b
    q = np.exp(y - y.max(1, keepdims=True))
    q /= q.sum(1, keepdims=True)
    exact = ((x**2).sum(1) * (q * (1 - q)).sum(1)).mean()
    assert ctx.get(SensitivityReport).nodes[0].fisher == pytest.approx(exact, rel=0.15)


def test_heads() -> None:
    a, b = np.float32([[1.0, 2.0]]), np.float32([[2.0, 1.0]])
    p = np.exp([1.0, 2.0]) / np.exp([1.0, 2.0]).sum()
    kl = float((p * np.log(p / p[::-1])).sum())
    assert Head("logits", -1).loss(a, b) == pytest.approx(kl)
    assert Head("probabilities", -1).loss(p[None], p[None, ::-1]) == pytest.approx(kl)
    logs = np.log(p)[None]
    assert Head("log_probabilities", -1).loss(logs, logs[:, ::-1]) == pytest.approx(kl)
    assert Head("mse", -1).loss(a, b) == 1.0
    assert Head("logits", -1).loss(a, a) == 0.0


def test_first_jump() -> None:
    def node(name: str, along: float | None) -> NodeSensitivity:
        return NodeSensitivity(name, "conv", (name,), "x", "y", 1, {}, {}, {}, None, along)

    levels = [("a", 40.0), ("b", None), ("c", 36.0), ("d", 29.0), ("e", 10.0)]
    assert first_jump([node(*v) for v in levels]) == "d"
    assert first_jump([node("a", 40.0), node("b", 35.0)]) is None


def test_refusals() -> None:
    with pytest.raises(UsageError, match="widths from 2 to 8"):
        Settings(weight_bits=(9,))
    with pytest.raises(UsageError, match="at least 1"):
        Settings(samples=0)
    with pytest.raises(UsageError, match="format 1"):
        SensitivityReport.from_json({"format": 0})
