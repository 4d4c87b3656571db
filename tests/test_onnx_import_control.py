# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""If, Loop and Scan: selected, unrolled or refused; against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

import qcompiler
from qcompiler.errors import ModelError, UnsupportedOpError, UsageError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.onnx_import_control import MAX_UNROLLED, OPTION, unroll_limit
from qcompiler.ort import Session
from qcompiler.types import Array

X = np.random.default_rng(4).normal(0, 1, (4, 3)).astype(np.float32)


def parse(text: str, opset: int = 17) -> onnx.ModelProto:
    header = f'<ir_version: 8, opset_import: ["": {opset}]>\n'
    return onnx.parser.parse_model(header + text)


def same(model: onnx.ModelProto, feeds: dict[str, Array]) -> Graph:
    """Interpreted and compiled, the graph agrees with ONNX Runtime."""
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    graph = load_onnx(model)
    for name, array in run(graph, feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)
    for name, array in qcompiler.compile(model, precision="fp32")(feeds).items():
        np.testing.assert_allclose(array, want[name], rtol=1e-5, atol=1e-6)
    return graph


BRANCHES = """
    net (float[4, 3] x, bool[1] flag) => (float[4, 3] y, float[4] z) {
        h = Abs(x)
        y, z = If(flag) <
            then_branch = g1 () => (float[4, 3] a, float[4] b) {
                a = Sqrt(h)
                b = ReduceMax <axes = [1], keepdims = 0> (a)
            },
            else_branch = g2 () => (float[4, 3] c, float[4] d) {
                c = Neg(h)
                d = ReduceMin <axes = [1], keepdims = 0> (x)
            }
        >
    }
"""


@pytest.mark.parametrize("taken", [True, False])
def test_a_condition_at_run_time_selects(taken: bool) -> None:
    graph = same(parse(BRANCHES), {"x": X, "flag": np.asarray([taken])})
    assert [n.op.name for n in graph.nodes].count("where") == 2


def test_branches_of_two_shapes_need_a_known_condition() -> None:
    model = parse("""
        net (float[4, 3] x, bool flag) => (float[n] y) {
            y = If(flag) <
                then_branch = g1 () => (float[n] a) {
                    a = ReduceMax <axes = [0], keepdims = 0> (x)
                },
                else_branch = g2 () => (float[n] b) {
                    b = ReduceMax <axes = [1], keepdims = 0> (x)
                }
            >
        }
    """)
    with pytest.raises(UnsupportedOpError, match=r"branches return float32\[3\] and float32\[4\]"):
        load_onnx(model)
    graph = load_onnx(model, freeze={"flag": True})
    assert [v.shape for v in graph.output_values] == [(3,)]


LOOP = """
    net (float[4, 3] x) => (float[4, 3] y, float[K, 4, 3] all)
    <int64 count = {trips}, bool yes = {{1}}, float[3] w = {{0.5, 2.0, -1.0}}> {{
        y, all = Loop(count, yes, x) <body = g (int64 i, bool c, float[4, 3] v) =>
            (bool again, float[4, 3] next, float[4, 3] out) <float[1] b = {{0.25}}> {{
                again = Identity(c)
                step = Cast <to = 1> (i)
                scaled = Mul(v, w)
                moved = Add(scaled, b)
                next = Add(moved, step)
                out = Neg(next)
            }}
        >
    }}
"""


def test_a_loop_is_unrolled() -> None:
    graph = same(parse(LOOP.format(trips="{3}")), {"x": X})
    assert [n.op.name for n in graph.nodes].count("mul") == 3
    # What does not depend on the iteration is imported once.
    assert sum(v.shape == (3,) for v in graph.constants()) == 1


def test_a_loop_beyond_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(LOOP.format(trips="{2000000000000}"))
    message = r"2000000000000 iterations of 6 nodes exceed the limit of 10000 nodes"
    with pytest.raises(UnsupportedOpError, match=message):
        load_onnx(model)
    model = parse(LOOP.format(trips="{3}"))
    with pytest.raises(UnsupportedOpError, match="limit of 17 nodes.*max_unrolled.*" + OPTION):
        load_onnx(model, max_unrolled=17)
    assert load_onnx(model, max_unrolled=18).nodes
    monkeypatch.setenv(OPTION, "17")
    with pytest.raises(UnsupportedOpError, match="limit of 17 nodes"):
        load_onnx(model)
    monkeypatch.setenv(OPTION, "many")
    with pytest.raises(UsageError, match="'many', expected an integer of 1 or more"):
        load_onnx(model)
    monkeypatch.delenv(OPTION)
    assert unroll_limit(None) == MAX_UNROLLED


def test_nested_loops_share_one_limit() -> None:
    model = parse("""
        net (float[4, 3] x) => (float[4, 3] y)
        <int64 outer = {5}, int64 inner = {7}, float one = {1.0}> {
            y = Loop(outer, , x) <body = g (int64 i, bool c, float[4, 3] v) =>
                (bool again, float[4, 3] next) {
                    again = Identity(c)
                    next = Loop(inner, , v) <body = h (int64 j, bool d, float[4, 3] u) =>
                        (bool more, float[4, 3] w) { more = Identity(d)  w = Add(u, one) }
                    >
                }
            >
        }
    """)
    graph = load_onnx(model)
    np.testing.assert_allclose(run(graph, {"x": X})["y"], X + 35, rtol=1e-5)
    with pytest.raises(UnsupportedOpError, match="7 iterations of 2 nodes exceed the limit of 60"):
        load_onnx(model, max_unrolled=60)


def test_a_condition_without_a_count_may_be_constant() -> None:
    model = parse("""
        net (float[4, 3] x) => (float[4, 3] y) <bool yes = {1}, int64 end = {4}> {
            y = Loop(, yes, x) <body = g (int64 i, bool c, float[4, 3] v) =>
                (bool again, float[4, 3] next) { again = Less(i, end)  next = Tanh(v) }
            >
        }
    """)
    graph = same(model, {"x": X})
    assert [n.op.name for n in graph.nodes] == ["tanh"] * 5


WHILE = """
    net (float[4, 3] x, bool go) => (float[4, 3] y{scan})
    <int64 count = {{6}}, float top = {{9.0}}> {{
        y{names} = Loop({count}, go, x) <body = g (int64 i, bool c, float[4, 3] v) =>
            (bool again, float[4, 3] next{out}) {{
                next = Add(v, v)
                most = ReduceMax <keepdims = 0> (next)
                again = Less(most, top)
            }}
        >
    }}
"""
PLAIN = {"scan": "", "names": "", "out": "", "count": "count"}


@pytest.mark.parametrize("go", [True, False])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_a_condition_at_run_time_stops_a_counted_loop(go: bool, scale: float) -> None:
    same(parse(WHILE.format(**PLAIN)), {"x": X * np.float32(scale), "go": np.asarray(go)})


def test_loops_of_unknown_length_are_refused() -> None:
    model = parse(WHILE.format(**PLAIN | {"count": ""}))
    with pytest.raises(UnsupportedOpError, match="no trip count, and its condition is computed"):
        load_onnx(model)
    scanning = {"scan": ", float[K, 4, 3] all", "names": ", all", "out": ", float[4, 3] next"}
    with pytest.raises(UnsupportedOpError, match="decides the shape of its scan outputs"):
        load_onnx(parse(WHILE.format(**PLAIN | scanning)))
    with pytest.raises(UnsupportedOpError, match="runs no iteration, so its scan outputs"):
        load_onnx(parse(LOOP.format(trips="{0}")))
    with pytest.raises(UnsupportedOpError, match="its trip count is computed at run time"):
        load_onnx(parse(LOOP.format(trips="{3}").replace("Loop(count", "Loop(n").replace(
            "float[4, 3] x)", "float[4, 3] x, int64 n)")))  # fmt: skip


SCAN = """
    net (float[4] s, float[5, 4] x, float[3, 5] w) => (float[4] last, float[4, 5] sums, float[K] y)
    {{
        last, sums, y = Scan <num_scan_inputs = 2, scan_input_axes = [0, 1],
            scan_input_directions = [1, 0], scan_output_axes = [-1, 0],
            scan_output_directions = [0, 1],
            body = g (float[4] v, float[4] e, float[3] f) =>
                (float[4] next, float[4] out, float r) {{
                    next = Add(v, e)
                    out = Mul(next, v)
                    r = ReduceMax <keepdims = 0> (f)
                }}
        > (s, x, w)
    }}
"""


def test_a_scan_is_unrolled() -> None:
    rng = np.random.default_rng(1)
    feeds = {
        name: rng.normal(0, 1, shape).astype(np.float32)
        for name, shape in {"s": (4,), "x": (5, 4), "w": (3, 5)}.items()
    }
    graph = same(parse(SCAN.format()), feeds)
    assert [n.op.name for n in graph.nodes].count("add") == 5
    with pytest.raises(UnsupportedOpError, match="5 iterations of 3 nodes exceed the limit of 14"):
        load_onnx(parse(SCAN.format()), max_unrolled=14)


def test_malformed_control_flow() -> None:
    text = LOOP.format(trips="{3}").replace("Loop(count, yes, x)", "Loop(count, yes)")
    with pytest.raises(ModelError, match="its body has 3 inputs and 3 outputs for 0 carried"):
        load_onnx(parse(text))
    with pytest.raises(ModelError, match="scan_input_axes has 1 entries, expected 2"):
        load_onnx(parse(SCAN.format().replace("scan_input_axes = [0, 1]", "scan_input_axes = [0]")))
    with pytest.raises(ModelError, match=r"lengths \[3, 5\], expected one"):
        load_onnx(parse(SCAN.format().replace("axes = [0, 1]", "axes = [0, 0]")))
    with pytest.raises(ModelError, match="num_scan_inputs is 4, it has 3 operands"):
        load_onnx(parse(SCAN.format().replace("num_scan_inputs = 2", "num_scan_inputs = 4")))
    with pytest.raises(ModelError, match="do not fit its operands"):
        load_onnx(parse(SCAN.format().replace("(s, x, w)", "(x, w)")))
    with pytest.raises(ModelError, match=r"condition has shape \[2\], expected one element"):
        load_onnx(parse(BRANCHES.replace("bool[1]", "bool[2]")))
