# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The wall around ONNX Runtime, and the model edits it needs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qcompiler.errors import DataError, ModelError, ShapeError
from qcompiler.onnx_export_node import single_node_model, with_outputs
from qcompiler.ort import Session, run_node
from qcompiler.types import DType

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
two (float[N, 3] x) => (float[N, 3] y) {
  a = Relu(x)
  b = Exp(a)
  y = Neg(b)
}
"""


@pytest.fixture
def model() -> bytes:
    return onnx.parser.parse_model(TEXT).SerializeToString()


@pytest.mark.parametrize("optimization", ["disabled", "basic", "all"])
def test_session_runs_by_name_at_every_level(model, optimization, rng):
    session = Session(model, optimization=optimization, threads=1)
    assert session.input_names == ("x",)
    assert session.output_names == ("y",)
    x = rng.normal(size=(4, 3)).astype(np.float32)
    np.testing.assert_allclose(session.run({"x": x})["y"], -np.exp(np.maximum(x, 0)), rtol=1e-6)


def test_session_takes_a_path_and_arrays_of_any_strides(model, tmp_path, rng):
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    x = rng.normal(size=(3, 4)).astype(np.float32).T
    for source in (path, str(path)):
        np.testing.assert_array_equal(
            Session(source).run({"x": x})["y"], Session(model).run({"x": x})["y"]
        )


def test_extra_outputs_are_inner_values(model, tmp_path, rng):
    x = rng.normal(size=(2, 3)).astype(np.float32)
    session = Session(model, extra_outputs=["b", "a", "a", "y"])
    assert session.output_names == ("y", "b", "a")
    got = session.run({"x": x})
    np.testing.assert_array_equal(got["a"], np.maximum(x, 0))
    assert list(session.run({"x": x}, ["a"])) == ["a"]
    path = tmp_path / "model.onnx"
    path.write_bytes(model)
    assert Session(path, extra_outputs=["a"]).output_names == ("y", "a")
    # The given bytes are not changed.
    assert Session(model).output_names == ("y",)


def test_session_refuses_what_is_no_model(model, tmp_path):
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        Session(b"not a model")
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        Session(tmp_path / "absent.onnx")
    with pytest.raises(ModelError, match=r"cannot read the model: .*absent"):
        Session(tmp_path / "absent.onnx", extra_outputs=["a"])
    with pytest.raises(ModelError, match="the bytes are no ONNX model"):
        with_outputs(b"not a model", ["a"])
    with pytest.raises(ModelError, match="the model has no value nope, zip"):
        with_outputs(model, ["zip", "nope"])


def test_session_refuses_inputs_that_do_not_fit(model):
    session = Session(model)
    for feed in ({}, {"x": np.zeros((2, 4), np.float32)}, {"x": np.zeros((2, 3))}):
        with pytest.raises(DataError, match="ONNX Runtime cannot run the model"):
            session.run(feed)


def test_run_node_reuses_a_session_and_knows_other_domains(rng):
    node = onnx.helper.make_node("FusedMatMul", ["a", "b"], ["y"], domain="com.microsoft", transB=1)
    a, b = rng.normal(size=(2, 3, 4)).astype(np.float32)
    for _ in range(2):
        (y,) = run_node(node.SerializeToString(), "com.microsoft", 1, [a, b])
        np.testing.assert_allclose(y, a @ b.T, rtol=1e-5, atol=1e-6)


def test_single_node_model_refuses_bytes_and_dtypes_that_onnx_lacks():
    with pytest.raises(ModelError, match="its bytes are no ONNX node"):
        single_node_model(b"\xff\xff\xff", "", 17, [])
    node = onnx.helper.make_node("Relu", ["x"], ["y"]).SerializeToString()
    with pytest.raises(ShapeError, match="operand 0 has dtype bfloat16"):
        single_node_model(node, "", 17, [(DType.BFLOAT16, (2,))])
