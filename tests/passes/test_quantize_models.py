# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Trained models with real data: everything heavy becomes an integer kernel, accuracy stays.

The models lie outside the checkout (QCOMPILER_MODELS, or ../shared/models beside it); without them
these tests skip. Accuracy is that of the QDQ graph in ONNX Runtime with basic optimisation, whose
integers the fused graph reproduces to within one step per operator.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from outside_models import FOLDER
from scipy.stats import spearmanr

from qcompiler.data import InputSpec, load_samples
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.onnx_export import to_onnx
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.calibrate import CalibrationSet
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.insert_qdq import quantize_passes
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.plan import uniform

CALIBRATION, EVALUATION = 128, 500

Arrays = dict[str, np.ndarray]


def top1(outputs: np.ndarray, samples: Arrays) -> float:
    """Percent of samples whose greatest score is the label's."""
    return 100 * float((outputs.reshape(len(outputs), -1).argmax(1) == samples["label"]).mean())


def similarity(outputs: np.ndarray, samples: Arrays) -> float:
    """100 x Spearman correlation of the cosine of sentence pairs with their score."""
    first, second = np.split(outputs, 2)
    return 100 * float(spearmanr((first * second).sum(1), samples["score"]).statistic)


def outputs_of(model: Callable[[Arrays], Arrays], graph: Graph, samples: Arrays) -> np.ndarray:
    specs = InputSpec.of({v.name: v for v in graph.inputs})
    name = graph.outputs[0][0]
    return np.concatenate(
        [model(dict(b.inputs))[name] for b in load_samples(samples).batches(specs)]
    )


def quantized(graph: Graph, calib: Arrays) -> tuple[Graph, Graph]:
    """Return Graph[QDQ] and Graph[INTEGER] with default settings."""
    ctx = PassContext()
    plan = uniform(graph)
    ctx.put(plan)
    ctx.put(CalibrationSet.of(load_samples(calib), graph))
    *first, fuse = quantize_passes(plan)
    qdq = PassManager(first, given=tuple(ctx.artifacts)).run(graph, ctx)
    return qdq, PassManager([fuse]).run(qdq, ctx)


def products(graph: Graph) -> int:
    """Convolutions, and matrix products with constant weights."""
    return sum(
        n.op.name in ("conv", "qconv")
        or (n.op.name in ("matmul", "qmatmul") and n.input(1).is_constant)
        for n in graph.nodes
    )


MODELS = [
    pytest.param("resnet20", {}, 1.0),
    pytest.param("kws_dscnn", {}, 1.0),
    pytest.param("mnist", {}, 1.0),
    pytest.param("resnet20_raw", {}, 1.0, marks=pytest.mark.slow),
    pytest.param("resnet56", {}, 1.0, marks=pytest.mark.slow),
    pytest.param("ic_resnet8", {}, 1.0, marks=pytest.mark.slow),
    pytest.param("mobilenetv2", {}, 1.0, marks=pytest.mark.slow),
    pytest.param(
        "minilm",
        {"input_ids": (1, 64), "attention_mask": (1, 64)},
        3.0,
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("name", "shapes", "limit"), MODELS)
def test_accuracy_and_coverage(prepare, name, shapes, limit):
    file, make, _, _ = prepare.MODELS[name]
    if name == "mobilenetv2":
        pytest.importorskip("PIL")
    calib, evaluation = make(CALIBRATION, EVALUATION)
    imported = load_onnx(FOLDER / file, input_shapes=shapes or None)
    graph = PassManager(canonicalize_passes()).run(imported, PassContext())
    qdq, integer = quantized(graph, calib)

    left = [n.name for n in integer.nodes if n.op.name in ("conv", "matmul")]
    assert not left
    kernels = [n for n in integer.nodes if n.op.name in ("qconv", "qmatmul")]
    assert products(integer) == products(graph)
    assert len(kernels) >= products(graph)
    if name != "minilm":  # one quantize at the input, and nothing in between
        assert [n.op.name for n in integer.nodes].count("quantize") == 1
        assert not any(n.op.name == "dequantize" for n in integer.nodes)

    metric = similarity if name == "minilm" else top1
    float_run = Session(to_onnx(graph).SerializeToString()).run
    qdq_run = Session(to_onnx(qdq).SerializeToString(), optimization="basic").run
    before = metric(outputs_of(float_run, graph, evaluation), evaluation)
    after = metric(outputs_of(qdq_run, graph, evaluation), evaluation)
    assert before - after <= limit

    few = {k: v[:2] for k, v in evaluation.items() if k in calib}
    exact = outputs_of(lambda x: run(integer, x), graph, few)
    simulated = outputs_of(qdq_run, graph, few)
    spread = np.abs(simulated).max()
    assert np.abs(exact - simulated).max() <= (0.2 if name == "minilm" else 0.05) * spread


@pytest.mark.parametrize(
    "name",
    [
        "ic_resnet8_qdq",
        "kws_dscnn_qdq",
        pytest.param("mobilenetv2_qdq", marks=pytest.mark.slow),
    ],
)
def test_models_that_other_tools_quantized(prepare, name):
    """Islands of another tool fuse completely; results are those of ONNX Runtime."""
    file, make, _, _ = prepare.MODELS[name]
    if name == "mobilenetv2_qdq":
        pytest.importorskip("PIL")
    _, evaluation = make(1, 8)
    imported = load_onnx(FOLDER / file)
    assert imported.stage is Stage.QDQ
    graph = PassManager([*canonicalize_passes(), Fuse()]).run(imported, PassContext())
    names = [n.op.name for n in graph.nodes]
    assert not {"conv", "matmul", "add", "relu", "clip", "reduce_mean"} & set(names)
    assert names.count("quantize") == 1
    assert names.count("dequantize") == 1
    inputs = {k: v for k, v in evaluation.items() if k != "label"}
    exact = outputs_of(lambda x: run(graph, x), graph, inputs)
    theirs = outputs_of(Session(str(FOLDER / file), optimization="basic").run, graph, inputs)
    assert np.abs(exact - theirs).max() <= 0.05 * np.abs(theirs).max()
    # One code may differ at a tie; test_already_quantized.py shows that nothing else does.
    assert (exact.argmax(1) == theirs.argmax(1)).sum() >= 7
