# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Convolutions with computed weights are products of patches; of codes, if they were that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.ops import Stage
from qcompiler.passes import conv_to_matmul
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.conv_to_matmul import ConvToMatmul
from qcompiler.passes.fuse import Fuse
from qcompiler.passmanager import PassContext, PassManager


@pytest.mark.parametrize(
    ("x", "w", "attrs"),
    [
        ("2,6,7,5", "5,6,3,3", "pads: ints = [1,1,1,1]"),
        ("2,6,7,5", "5,6,1,1", "group: int = 1"),
        ("2,6,7,5", "5,6,7,5", "group: int = 1"),
        ("2,6,7,5", "5,6,1,1", "strides: ints = [2,1]"),
        (
            "1,6,9,5",
            "5,6,3,2",
            "strides: ints = [2,3], dilations: ints = [2,1], pads: ints = [1,0,2,1]",
        ),
        ("2,6,7,5", "9,2,3,3", "group: int = 3, pads: ints = [1,0,0,1]"),
        ("2,6,7,5", "30,2,3,3", "group: int = 3"),
        ("2,6,7", "5,6,3", "strides: ints = [2]"),
        ("1,3,4,5,6", "2,3,2,3,2", "pads: ints = [1,0,0,0,1,1]"),
    ],
)
@pytest.mark.parametrize(("bias", "places"), [("", None), (", b", None), ("", 0)])
def test_any_window(
    load_text: Any,
    rewrite: Any,
    uniform: Any,
    monkeypatch: pytest.MonkeyPatch,
    x: str,
    w: str,
    attrs: str,
    bias: str,
    places: int | None,
) -> None:
    """Also of large images, whose places make no table."""
    if places is not None:
        monkeypatch.setattr(conv_to_matmul, "MOST_PLACES", places)
    text = f"(float[{x}] x, float[{w}] w) => (y) {{ y = Conv<{attrs}>(x, w{bias}) }}"
    constants = {"b": uniform(int(w.split(",")[0]))} if bias else {}
    graph = load_text(text, **constants)
    after = rewrite(ConvToMatmul(), graph, atol=1e-4)
    (product,) = [n for n in after.nodes if n.op.name == "matmul"]
    assert product.name == graph.nodes[0].name
    assert "conv" not in [n.op.name for n in after.nodes]


def test_a_computed_bias(load_text: Any, rewrite: Any) -> None:
    text = "(float[1,2,4,4] x, float[3,2,3,3] w, float[3] b) => (y) { y = Conv(x, w, b) }"
    rewrite(ConvToMatmul(), load_text(text), atol=1e-4)


def test_what_reads_the_whole_image_moves_nothing(load_text: Any, rewrite: Any) -> None:
    text = "(float[2,3,1,1] x, float[5,3,1,1] w) => (y) { y = Conv(x, w) }"
    after = rewrite(ConvToMatmul(), load_text(text), atol=1e-5)
    assert {n.op.name for n in after.nodes} <= {"matmul", "reshape", "transpose"}


@pytest.mark.parametrize(
    "text",
    [
        "(float[1,2,3,3] x) => (y) { y = Conv(x, w) }",
        "(float[1,2,3,3] x) => (y) { h = Cast<to: int = 1>(v) y = Conv(x, h) }",
        # Depthwise floats: the patches would be all the work.
        "(float[1,2,3,3] x, float[2,1,2,2] w) => (y) { y = Conv<group: int = 2>(x, w) }",
    ],
    ids=["constant", "half", "depthwise"],
)
def test_what_stays(load_text: Any, rewrite: Any, uniform: Any, text: str) -> None:
    held = {}
    if " w)" in text and "w)" not in text.split("=>")[0]:
        held["w"] = uniform(2, 2, 1, 1)
    if "v)" in text:
        held["v"] = uniform(2, 2, 1, 1).astype(np.float16)
    rewrite(ConvToMatmul(), load_text(text, **held), modified=False)


def test_what_targets_without_another_form_ask_for(load_text: Any, rewrite: Any) -> None:
    """Depthwise floats, and what was fused into the convolution before."""
    text = """(float[1,3,4,4] x, float[3,1,3,3] w, float[1,3,2,2] r) => (y) {
        c = Conv<group: int = 3>(x, w)
        a = Add(c, r)
        y = Relu(a)
    }"""
    graph = load_text(text)
    graph.stage = Stage.QDQ
    fused = PassManager([Fuse()]).run(graph, PassContext())
    (conv,) = fused.nodes
    assert conv.attr("act_min") == 0
    after = rewrite(ConvToMatmul(depthwise=True), fused, atol=1e-5)
    names = [n.op.name for n in after.nodes]
    assert names.count("matmul") == 1
    assert names[-2:] == ["add", "clip"]


def test_scales_per_column_leave_codes_on_one_grid(load_text: Any, rewrite: Any) -> None:
    """Codes less zero points that differ have 16 bits; the scales multiply the result."""
    text = """(float[1,4,5,5] x, float[6,2,3,3] w) => (y) {
        q = QuantizeLinear(x, s, z)
        d = DequantizeLinear(q, s, z)
        p = QuantizeLinear<axis: int = 0>(w, sw, zw)
        v = DequantizeLinear<axis: int = 0>(p, sw, zw)
        y = Conv<group: int = 2>(d, v, b)
    }"""
    graph = load_text(
        text,
        s=np.float32(0.02),
        z=np.uint8(120),
        sw=np.float32([0.01, 0.02, 0.015, 0.03, 0.01, 0.005]),
        zw=np.int8([0, 1, -90, 3, 100, -5]),
        b=np.arange(6).astype(np.float32),
    )
    after = rewrite(ConvToMatmul(), graph, atol=1e-5)
    grids = [n.output.qparams for n in after.nodes if n.op.name == "quantize"]
    assert all(q is not None for q in grids)
    assert [q.storage.value for q in grids if q is not None][-1] == "int16"
    (product,) = [n for n in after.nodes if n.op.name == "matmul"]
    assert product.output.users


def test_canonical_graphs_have_no_computed_window(load_text: Any) -> None:
    text = """(float[1,4,5,5] x, float[4,2,3,3] w, float[1,4,5] s, float[4,4,3] t) => (y, z) {
        y = ConvTranspose<strides: ints = [2,2], group: int = 2>(x, v)
        v = Relu(w)
        z = Conv(s, t)
    }""".replace("y = ConvTranspose", "v = Relu(w) y = ConvTranspose").replace(
        "        v = Relu(w)\n", ""
    )
    graph = load_text(text)
    after = PassManager(canonicalize_passes()).run(graph, PassContext())
    assert after.stage is Stage.FLOAT
    assert [n.op.name for n in after.nodes if "conv" in n.op.name] == []


def test_compiled(load_text: Any, rng: np.random.Generator) -> None:
    """The kernel of a matrix product takes it: TVM's own loops are forty times as slow."""
    from onnx import parser

    text = """<ir_version: 10, opset_import: ["" : 21]>
        net (float[1,64,12,12] x, float[64,64,3,3] w) => (float[1,64,10,10] y) { y = Conv(x, w) }"""
    compiled = qcompiler.compile(parser.parse_model(text), precision="fp32", target="host")
    feeds = {
        "x": rng.normal(size=(1, 64, 12, 12)).astype(np.float32),
        "w": rng.normal(size=(64, 64, 3, 3)).astype(np.float32),
    }
    (found,) = compiled(feeds).values()
    want = np.einsum(
        "nchwrs,mcrs->nmhw",
        np.lib.stride_tricks.sliding_window_view(feeds["x"], (3, 3), axis=(2, 3)),
        feeds["w"],
    )
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-3)
    assert any(name.startswith("matmul") for name, _ in compiled.profile(feeds))


def test_a_float_network_is_quantized(rng: np.random.Generator) -> None:
    """Weights that another branch computes are activations like others."""
    from onnx import parser

    text = """<ir_version: 10, opset_import: ["" : 21]>
        net (float[1,16,12,12] x, float[1,8] c) => (float[1,24,10,10] y) {
            k = MatMul(c, m)
            w = Reshape(k, s)
            y = Conv(x, w)
        }"""
    model = parser.parse_model(text)
    held = {"m": rng.normal(size=(8, 24 * 16 * 9)).astype(np.float32) / 30}
    held["s"] = np.asarray([24, 16, 3, 3], np.int64)  # type: ignore[assignment]
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in held.items())
    samples = {
        "x": rng.normal(size=(16, 16, 12, 12)).astype(np.float32),
        "c": rng.normal(size=(16, 8)).astype(np.float32),
    }
    one = {n: a[:1] for n, a in samples.items()}
    floats = qcompiler.compile(model, precision="fp32")(one)["y"]
    result = quantize_model(model, calibration=samples)
    products = {n.op.name for n in result.graph.nodes if "matmul" in n.op.name}
    assert products == {"qmatmul"}
    found = qcompiler.compile(model, target="reference", calibration=samples)(one)["y"]
    assert np.abs(found - floats).max() < 0.03 * np.abs(floats).max()
