# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The whole canonicalization: order, fixed point, and what trained models look like after it."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler.interpreter import run
from qcompiler.onnx_import import load_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passmanager import ModifiedInstrument, PassContext, PassManager
from qcompiler.types import Array

MODELS = Path(os.environ.get("QCOMPILER_MODELS", Path(__file__).parents[3] / "shared" / "models"))


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


def shared_models() -> list[Path]:
    return sorted(MODELS.glob("*/*.onnx"))


@pytest.mark.parametrize("path", shared_models() or [None], ids=lambda p: p.stem if p else "none")
def test_trained_models(path: Path | None, rng: np.random.Generator) -> None:
    if path is None:
        pytest.skip(f"no models in {MODELS} (set QCOMPILER_MODELS)")
    shapes = {"input_ids": (1, 32)} if "minilm" in path.name else None
    graph = load_onnx(path, input_shapes=shapes)
    after = manager().run(graph, PassContext())
    assert str(manager().run(after, PassContext())) == str(after), "a fixed point"
    counts = Counter(n.op.name for n in after.nodes)
    wanted = EXPECTED.get(path.stem, {})
    assert {op: counts[op] for op in wanted} == wanted
    if path.stem in EXPECTED and "minilm" not in path.stem:
        assert sum(wanted.values()) == len(after)
    if after.stage is Stage.QDQ:
        return  # the interpreter on quantized models is tested where they are imported
    feeds: dict[str, Array] = {}
    for v in graph.inputs:
        if v.dtype.is_float:
            feeds[v.name] = rng.standard_normal(v.shape).astype(np.float32)
        else:
            high = 2 if "mask" in v.name else 1000
            feeds[v.name] = rng.integers(0, high, v.shape).astype(v.dtype.numpy)
    want = Session(path, optimization="disabled").run(feeds)
    got = run(after, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_matrix_products_of_a_transformer_have_their_bias() -> None:
    path = MODELS / "minilm_stsb" / "minilm_l6_v2_stsb_vocab.onnx"
    if not path.exists():
        pytest.skip(f"no models in {MODELS} (set QCOMPILER_MODELS)")
    graph = manager().run(load_onnx(path, input_shapes={"input_ids": (1, 32)}), PassContext())
    dense = [n for n in graph.nodes if n.op.name == "matmul" and n.input(1).is_constant]
    assert len(dense) == 36
    assert all(n.optional(2) is not None and not n.attr("transpose_b") for n in dense)
