# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The whole canonicalization: order, fixed point, and what trained models look like after it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from outside_models import FOLDER, each_model, model_graph, noise

from qcompiler.interpreter import run
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager


def manager() -> PassManager:
    return PassManager(canonicalize_passes(), [ModifiedInstrument()])


def test_a_block_of_everything(load_text: Any, uniform: Any, golden: Any) -> None:
    graph = load_text(
        """(float[N,3,8,8] x) => (float[N,5] y) {
            p = Pad(x, pads)
            c = Conv(p, w)
            n = BatchNormalization(c, s, b, m, v)
            r = Relu(n)
            q = Min(r, six)
            g = AveragePool<kernel_shape: ints = [8,8]>(q)
            f = Flatten(g)
            d = MatMul(f, dense)
            e = Add(d, bias)
            t = Sigmoid(e)
            y = Mul(e, t)
        }""",
        pads=np.int64([0, 0, 1, 1, 0, 0, 1, 1]),
        w=np.full((4, 3, 3, 3), 0.1, np.float32),
        s=np.float32([1, 2, 3, 4]),
        b=np.float32([0, 1, 0, 1]),
        m=np.float32([1, 0, 1, 0]),
        v=np.float32([1, 1, 4, 4]),
        six=np.float32(6),
        dense=np.full((4, 5), 0.5, np.float32),
        bias=np.float32([1, 2, 3, 4, 5]),
    )
    after = manager().run(graph, PassContext())
    assert [n.op.name for n in after.nodes] == [
        "conv", "clip", "reduce_mean", "reshape", "matmul", "silu",
    ]  # fmt: skip
    assert after.outputs[0][1].batch_axis == 0
    assert str(after) == golden
    x = uniform(1, 3, 8, 8)
    np.testing.assert_allclose(
        run(after, {"x": x})["y"], run(graph, {"x": x})["y"], rtol=1e-4, atol=1e-5
    )


EXPECTED = {
    "resnet20_cifar10": {
        "conv": 19, "relu": 19, "add": 9, "slice": 2, "pad": 2, "reduce_mean": 1, "reshape": 1,
        "matmul": 1,
    },
    "kws_dscnn_float": {"conv": 9, "relu": 9, "reduce_mean": 1, "reshape": 1, "matmul": 1},
    "mnist": {"conv": 2, "relu": 2, "max_pool": 2, "reshape": 1, "matmul": 1},
    "minilm_l6_v2_stsb_vocab": {"layer_norm": 13, "gelu": 6, "softmax": 6, "matmul": 48},
}  # fmt: skip
"""Operators after canonicalization; for minilm those that matter."""


@each_model
def test_trained_models(path: Path, rng: np.random.Generator) -> None:
    graph = model_graph(path)
    after = manager().run(graph, PassContext())
    assert str(manager().run(after, PassContext())) == str(after), "a fixed point"
    counts = Counter(n.op.name for n in after.nodes)
    wanted = EXPECTED.get(path.stem, {})
    assert {op: counts[op] for op in wanted} == wanted
    if path.stem in EXPECTED and "minilm" not in path.stem:
        assert sum(wanted.values()) == len(after)
    if after.stage is Stage.QDQ:
        return  # the interpreter on quantized models is tested where they are imported
    feeds = noise(graph, rng)
    want = Session(path, optimization="disabled").run(feeds)
    got = run(after, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_matrix_products_of_a_transformer_have_their_bias() -> None:
    path = FOLDER / "minilm_stsb" / "minilm_l6_v2_stsb_vocab.onnx"
    graph = manager().run(model_graph(path), PassContext())
    dense = [n for n in graph.nodes if n.op.name == "matmul" and n.input(1).is_constant]
    assert len(dense) == 36
    assert all(n.optional(2) is not None and not n.attr("transpose_b") for n in dense)
