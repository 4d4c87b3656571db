# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Control flow inside control flow, bodies that read outer values, scans in every direction."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest

from qcompiler.driver import assemble, build_graph, quantize_model
from qcompiler.errors import UnsupportedOpError
from qcompiler.registry import get_target
from qcompiler.runtime import CompiledModel
from qcompiler.types import Array

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'
Shapes = dict[str, tuple[int, ...] | None]

MODELS: dict[str, tuple[str, Shapes]] = {
    "a branch per iteration": (
        """
agraph (float[N,4] x) => (float[N,4] y)
<int64 n={5}, bool t={1}, int64 two={2}, float c1={1.5}> {
 y = Loop(n,t,x) <
  body = b(int64 i, bool c, float[N,4] s) => (bool co, float[N,4] so) {
   co = Identity(c)
   r = Mod(i, two)
   z = Constant<value_int=0>()
   e = Equal(r, z)
   so = If(e) <
      then_branch = tb() => (float[N,4] q) { q = Mul(s, c1) },
      else_branch = eb() => (float[N,4] q2) { q2 = Sub(s, x) }>
 }>
}
""",
        {"x": (3, 4)},
    ),
    "a branch on data per iteration": (
        """
agraph (float[4] x) => (float[4] y)
<int64 n={4}, bool t={1}, float c1={1.5}> {
 y = Loop(n,t,x) <
  body = b(int64 i, bool c, float[4] s) => (bool co, float[4] so) {
   co = Identity(c)
   m = ReduceMax<keepdims=0>(s)
   e = Greater(m, c1)
   so = If(e) <
      then_branch = tb() => (float[4] q) { h = Constant<value_float=0.5>() q = Mul(s, h) },
      else_branch = eb() => (float[4] q2) { q2 = Add(s, s) }>
 }>
}
""",
        {"x": (4,)},
    ),
    "a scan backwards": (
        """
agraph (float[6,3] x, float[3] s0) => (float[3] s, float[6,3] y) {
 s, y = Scan<num_scan_inputs=1, scan_input_directions=[1], scan_output_directions=[1],
  body = b(float[3] a, float[3] e) => (float[3] ao, float[3] o) {
   ao = Add(a, e)
   o = Mul(ao, e)
 }>(s0, x)
}
""",
        {"x": (6, 3), "s0": (3,)},
    ),
    "a scan along other axes": (
        """
agraph (float[2,5,3] x, float[2,3] s0) => (float[2,3] s, float[2,3,5] y) {
 s, y = Scan<num_scan_inputs=1, scan_input_axes=[1], scan_output_axes=[-1],
  body = b(float[2,3] a, float[2,3] e) => (float[2,3] ao, float[2,3] o) {
   a2 = Add(a, e)
   ao = Tanh(a2)
   o = Identity(ao)
 }>(s0, x)
}
""",
        {"x": (2, 5, 3), "s0": (2, 3)},
    ),
    "a condition computed from constants": (
        """
agraph (float[N,4] x) => (float[N,4] y)
<bool t={1}, int64 lim={7}> {
 e = Constant<value_int=0>()
 mx = Constant<value_int=1000>()
 y, k = Loop(mx,t,x,e) <
  body = b(int64 i, bool c, float[N,4] s, int64 k0) => (bool co, float[N,4] so, int64 k1) {
   one = Constant<value_int=2>()
   k1 = Add(k0, one)
   co = Less(k1, lim)
   so = Sigmoid(s)
 }>
}
""",
        {"x": (3, 4)},
    ),
    "a condition without a count": (
        """
agraph (float[N,4] x) => (float[N,4] y)
<bool t={1}, int64 lim={7}> {
 e = Constant<value_int=0>()
 y, k = Loop(,t,x,e) <
  body = b(int64 i, bool c, float[N,4] s, int64 k0) => (bool co, float[N,4] so, int64 k1) {
   one = Constant<value_int=2>()
   k1 = Add(k0, one)
   co = Less(k1, lim)
   so = Sigmoid(s)
 }>
}
""",
        {"x": (3, 4)},
    ),
    "outer values two bodies deep": (
        """
agraph (float[N,4] x) => (float[N,4] y, float[3,N,4] z)
<int64 n={3}, bool t={1}, int64 m={2}, float w={0.5}> {
 d = Mul(x, w)
 y, z = Loop(n,t,x) <
  body = b(int64 i, bool c, float[N,4] s) => (bool co, float[N,4] so, float[N,4] zo) {
   co = Identity(c)
   f = Cast<to=1>(i)
   u = Add(s, f)
   so = Loop(m,t,u) <
  body = b2(int64 j, bool c2, float[N,4] s2) => (bool co2, float[N,4] so2) {
      co2 = Identity(c2)
      v = Add(s2, d)
      so2 = Mul(v, u)
   }>
   zo = Sub(so, x)
 }>
}
""",
        {"x": (2, 4)},
    ),
    "a count from a shape": (
        """
agraph (float[5,4] x) => (float[4] y)
<bool t={1}> {
 sh = Shape(x)
 z = Constant<value_int=0>()
 n = Gather(sh, z)
 s0 = Constant<value_floats=[0.,0.,0.,0.]>()
 y = Loop(n,t,s0) <
  body = b(int64 i, bool c, float[4] s) => (bool co, float[4] so) {
   co = Identity(c)
   r = Gather(x, i)
   so = Add(s, r)
 }>
}
""",
        {"x": (5, 4)},
    ),
    "a condition from a rank": (
        """
agraph (float[N,4] x) => (float[N,4] y) {
 s = Shape(x)
 sz = Shape(s)
 two = Constant<value_ints=[2]>()
 e = Equal(sz, two)
 y = If(e) <
      then_branch = a() => (float[N,4] q) { q = Relu(x) },
      else_branch = bb() => (float[N,1] q2) { q2 = ReduceSum(x) }>
}
""",
        {"x": (3, 4)},
    ),
    "branches that return outer values": (
        """
agraph (bool p, float[4] x) => (float[4] y, float[4] z) {
 n = Neg(x)
 y, z = If(p) <
      then_branch = a() => (float[4] q, float[4] q1) { q = Identity(x) q1 = Identity(n) },
      else_branch = bb() => (float[4] q2, float[4] q3) { q2 = Identity(n) q3 = Abs(x) }>
}
""",
        {"p": None, "x": (4,)},
    ),
    "a state that grows": (
        """
agraph (float[1,4] x) => (float[k,4] y)
<int64 n={3}, bool t={1}> {
 y = Loop(n,t,x) <
  body = b(int64 i, bool c, float[m,4] s) => (bool co, float[m2,4] so) {
   co = Identity(c)
   so = Concat<axis=0>(s, x)
 }>
}
""",
        {"x": (1, 4)},
    ),
}


def compiled(text: str, shapes: Shapes) -> tuple[onnx.ModelProto, CompiledModel]:
    model = onnx.parser.parse_model(HEADER + text)
    backend = get_target("host")
    given = {k: v for k, v in shapes.items() if v is not None}
    result = quantize_model(model, spec=backend.spec, precision="fp32", input_shapes=given)
    return model, assemble(build_graph(result.graph, backend), backend.spec, result)


@pytest.mark.parametrize("name", MODELS)
def test_agrees(name: str) -> None:
    text, shapes = MODELS[name]
    model, artifact = compiled(text, shapes)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    names = [o.name for o in session.get_outputs()]
    rng = np.random.default_rng(3)
    for taken in (False, True):
        feeds: dict[str, Array] = {
            k: np.array(taken) if v is None else rng.standard_normal(v).astype(np.float32)
            for k, v in shapes.items()
        }
        found = artifact({k: feeds[k] for k in artifact.inputs})
        for output, want in zip(names, session.run(None, feeds), strict=True):
            assert found[output].shape == want.shape
            np.testing.assert_allclose(found[output], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "message"),
    [
        ("1000000000", r"1000000000 iterations of 3 nodes exceed the limit of 10000 nodes"),
        ("0", "it runs no iteration, so its scan outputs are empty"),
    ],
)
def test_counts_that_are_refused(count: str, message: str) -> None:
    text = """g (float[4] x) => (float[4] y, float[k,4] z)
<int64 n={%s}, bool t={1}> {
  y, z = Loop(n, t, x) <
    body = b(int64 i, bool c, float[4] s) => (bool co, float[4] so, float[4] zo) {
      co = Identity(c)
      so = Add(s, x)
      zo = Identity(so)
    }
  >
}"""
    with pytest.raises(UnsupportedOpError, match=message):
        compiled(text % count, {"x": (4,)})
