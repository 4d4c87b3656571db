# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What TVM cannot compile is refused with the operator's name, and quietly."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest

import qcompiler
from qcompiler.errors import UnsupportedByTargetError, UnsupportedOpError
from qcompiler.types import Array


def model(text: str, opset: int = 17, **constants: Array) -> onnx.ModelProto:
    """Parse `inputs => outputs { nodes }` of ONNX text."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}]> net '
    proto = onnx.parser.parse_model(head + text)
    for name, data in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(data, name))
    return proto


def ones(*shape: int) -> Array:
    return np.ones(shape, np.float32)


def test_unknown_operators_are_listed_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    proto = model(
        """(float[5,3,3] x, float[1,1,4,4] z, float[1,1,1,1] w, float[1,2,4,4] d) => (a, b) {
            h = Det(x)  i = Relu(h)
            a = Unsqueeze(i, axis)
            g = DeformConv(z, w, d)  b = Abs(g)
        }""",
        opset=19,
        axis=np.asarray([0]),
    )
    pattern = r"(?s)DeformConv \('DeformConv_0'\).*Det \('Det_0'\)|Det \('Det_0'\).*DeformConv"
    with pytest.raises(UnsupportedOpError, match=pattern) as info:
        qcompiler.compile(proto, precision="fp32")
    assert info.value.operators == ("DeformConv", "Det")
    assert capfd.readouterr() == ("", "")


def test_a_form_that_tvm_refuses_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    proto = model(
        """(float[1,2,4,4] x, float[1,3,3,2] grid) => (y) {
            g = GridSample<mode: string = "bilinear", padding_mode: string = "zeros">(x, grid)
            y = Det(g)
        }"""
    )
    with pytest.raises((UnsupportedOpError, UnsupportedByTargetError), match=r"Det \('Det_0'\)"):
        qcompiler.compile(proto, precision="fp32")
    out, err = capfd.readouterr()
    assert out == ""
    assert "BlockBuilder" not in err


def test_products_in_double_precision_are_left_to_tvm() -> None:
    proto = model("(double[3,5] x, double[5,4] z) => (y) { y = MatMul(x, z) }")
    rng = np.random.default_rng(0)
    x, z = rng.standard_normal((3, 5)), rng.standard_normal((5, 4))
    got = qcompiler.compile(proto, precision="fp32")({"x": x, "z": z})["y"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, x @ z, rtol=1e-14)
