# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Biases that are computed at run time are added behind convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.fallback import faster_in_float
from qcompiler.ort import Session
from qcompiler.registry import get_target
from qcompiler.types import Precision

Array = np.ndarray[Any, np.dtype[Any]]


def model(body: str, inputs: str, rng: np.random.Generator) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(f"net ({inputs}) => (float[1,24,9,9] y) {{ {body} }}")
    w = rng.standard_normal((24, 16, 3, 3)).astype(np.float32) / 12
    if " w" not in inputs:
        graph.initializer.append(numpy_helper.from_array(w, "w"))
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)


def theirs(net: onnx.ModelProto, inputs: dict[str, Array]) -> Array:
    return np.asarray(Session(net.SerializeToString()).run(inputs)["y"])


BIASED = """
  s = Constant<value_ints=[24]>()
  b = Reshape(z, s)
  c = Conv<pads=[1,1,1,1]>(x, w, b)
  y = Relu(c)
"""


@pytest.fixture
def samples(rng: np.random.Generator) -> dict[str, Array]:
    return {
        "x": rng.standard_normal((8, 16, 9, 9)).astype(np.float32),
        "z": rng.standard_normal((8, 24)).astype(np.float32),
    }


@pytest.mark.parametrize(("precision", "product"), [("fp32", "conv"), ("w8a8", "qconv")])
def test_products_keep_their_kernels(
    precision: str, product: str, samples: dict[str, Array], rng: np.random.Generator
) -> None:
    net = model(BIASED, "float[1,16,9,9] x, float[1,24] z", rng)
    given = None if precision == "fp32" else samples
    graph = quantize_model(net, precision=precision, calibration=given).graph
    (node,) = [n for n in graph.nodes if n.op.name == product]
    assert node.optional(2) is None or node.input(2).is_constant
    assert "add" in {n.op.name for n in graph.nodes}
    one = {name: a[:1] for name, a in samples.items()}
    want = theirs(net, one)
    made = qcompiler.compile(net, precision=precision, calibration=given)
    kernels = {k for n in made.report["nodes"] if product in n["ops"] for k in n["kernel"].split()}
    assert kernels
    assert not any("conv2d" in k for k in kernels)  # TVM's own
    atol = 1e-5 if precision == "fp32" else 0.1
    np.testing.assert_allclose(made(one)["y"], want, rtol=0, atol=atol)
    other = {**one, "z": one["z"] + 1}  # the bias is an input, not what calibration saw
    np.testing.assert_allclose(made(other)["y"], theirs(net, other), rtol=0, atol=atol)


def test_networks_without_an_integer_product_compile(
    samples: dict[str, Array], rng: np.random.Generator
) -> None:
    conv = "y = Conv<pads=[1,1,1,1], group=16>(x, w)"
    net = model(conv, "float[1,16,9,9] x, float[16,1,3,3] w", rng)
    net.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 16
    given = {"x": samples["x"], "w": rng.standard_normal((8, 16, 1, 3, 3)).astype(np.float32)}
    one = {"x": given["x"][:1], "w": given["w"][0]}
    made = qcompiler.compile(net, calibration=given)
    assert not any(n["precision"] == "w8a8" for n in made.report["nodes"])
    np.testing.assert_allclose(made(one)["y"], theirs(net, one), rtol=0, atol=1e-3)


def test_a_search_without_products_finds_nothing(samples: dict[str, Array]) -> None:
    graph = onnx.parser.parse_graph(
        "net (float[1,16,9,9] x) => (float[1,16,8,8] y) { y = MaxPool<kernel_shape=[2,2]>(x) }"
    )
    net = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    data = {"x": samples["x"]}
    assert faster_in_float(net, get_target("host"), Precision.W8A8, calibration=data) is None
