# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Timed runs get a real sample: random values are not valid for every model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

import qcompiler
from qcompiler.data import load_samples
from qcompiler.example import example_of
from qcompiler.manifest import TensorSpec
from qcompiler.types import DType


def specs(**inputs: tuple[tuple[int, ...], DType]) -> dict[str, TensorSpec]:
    return {n: TensorSpec(shape, dtype, 0) for n, (shape, dtype) in inputs.items()}


def test_the_first_sample_fills_the_compiled_shape() -> None:
    wanted = specs(x=((2, 3), DType.FLOAT32), ids=((1, 5), DType.INT64))
    x, ids = np.arange(12, dtype=np.float32).reshape(4, 3), np.full((4, 2), 7)
    found = example_of(wanted, load_samples({"x": x, "ids": ids, "label": np.zeros(4)}))
    assert found is not None
    assert set(found) == {"x", "ids"}
    assert np.array_equal(found["x"], x[:2])
    assert np.array_equal(found["ids"], np.full((1, 5), 7))
    stacked = example_of(specs(x=((2, 3), DType.FLOAT32)), load_samples({"x": x[None]}))
    assert stacked is not None
    assert np.array_equal(stacked["x"], x[:2])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 3), np.uint8),
        np.zeros((4,), np.float32),
        np.zeros((0, 3), np.float32),
        np.full((4, 3), np.nan, np.float32),
        np.full((4, 3), -np.inf, np.float32),
    ],
)
def test_samples_that_do_not_fit_are_passed_over(array: np.ndarray[Any, Any]) -> None:
    wanted = specs(x=((2, 3), DType.FLOAT32))
    good = np.ones((1, 3), np.float32)
    assert example_of(wanted, load_samples({"x": array})) is None
    found = example_of(wanted, None, load_samples({"x": array}), load_samples({"x": good}))
    assert found is not None
    assert np.array_equal(found["x"], np.ones((2, 3), np.float32))
    assert example_of(wanted, load_samples({"y": good})) is None
    assert example_of(wanted) is None


def one_row(kind: str) -> tuple[ModelProto, dict[str, np.ndarray[Any, Any]]]:
    """Return a model that some random inputs break, and samples of it."""
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.standard_normal((16, 16)).astype(np.float32), "w")
    value = helper.make_tensor_value_info
    if kind == "table":  # of one row, as token types of RoBERTa: 1 is no index
        table = numpy_helper.from_array(rng.standard_normal((1, 16)).astype(np.float32), "t")
        nodes = [helper.make_node("Gather", ["t", "ids"], ["f"])]
        inputs, constants = [value("ids", TensorProto.INT64, [1, 4])], [w, table]
        samples = {"ids": np.zeros((6, 4), np.int64)}
        result = [1, 4, 16]
    else:  # a divisor that is never 0 in the data
        nodes = [
            helper.make_node("Div", ["a", "b"], ["c"]),
            helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT),
        ]
        inputs = [value(n, TensorProto.INT64, [1, 16]) for n in ("a", "b")]
        constants = [w]
        samples = {"a": rng.integers(1, 99, (6, 16)), "b": rng.integers(1, 9, (6, 16))}
        result = [1, 16]
    nodes.append(helper.make_node("MatMul", ["f", "w"], ["y"]))
    outputs = [value("y", TensorProto.FLOAT, result)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    return model, samples


@pytest.mark.isa("x86-avx2")
@pytest.mark.parametrize("kind", ["table", "divisor"])
@pytest.mark.parametrize("precision", ["fp32", "w8a8", "auto"])
@pytest.mark.usefixtures("own_cache")
def test_models_are_timed_with_samples(kind: str, precision: str) -> None:
    model, samples = one_row(kind)
    compiled = qcompiler.compile(model, target="x86-avx2", calibration=samples, precision=precision)
    assert compiled.example is not None
    assert {n: a.tolist() for n, a in compiled.example.items()} == {
        n: a[:1].tolist() for n, a in samples.items()
    }
    assert compiled.report is not None
    assert compiled.report["latency_ms"]["compiled"] > 0
    assert compiled.profile()


def test_samples_that_can_be_read_once_are_kept() -> None:
    model, samples = one_row("table")

    def each() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        for i in range(6):
            yield {n: a[i : i + 1] for n, a in samples.items()}

    compiled = qcompiler.compile(model, target="reference", calibration=each())
    assert compiled.example is not None
    assert compiled.example["ids"].tolist() == [[0, 0, 0, 0]]
    assert compiled.random_inputs()["ids"].shape == (1, 4)
