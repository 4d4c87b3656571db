# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""A small artifact, compiled without our pipeline: one input with a batch axis, one without."""

from __future__ import annotations

from functools import cache

import numpy as np

from qcompiler.artifact import Artifact, ParamBlock
from qcompiler.linker import export_library
from qcompiler.manifest import TargetInfo, TensorSpec
from qcompiler.types import DType

BATCH, ROWS, COLS = 4, 4096, 32
WEIGHT = np.random.default_rng(0).standard_normal((ROWS, COLS)).astype(np.float32)
T5 = np.arange(5)


def samples(count, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, COLS)).astype(np.float32)


def _library() -> bytes:
    """Compile main(x f32[4, 32], t i64[5], w f32[4096, 32]) -> (y f32[4, 4096], u i64[5]).

    y = x @ w.T summed in order, in parallel over the rows of w; u = t + 1.
    """
    import tvm
    from tvm import relax
    from tvm.script import tirx as T  # noqa: N812

    @T.prim_func(private=True)
    def dense(
        x: T.Buffer((BATCH, COLS), "float32"),
        w: T.Buffer((ROWS, COLS), "float32"),
        y: T.Buffer((BATCH, ROWS), "float32"),
    ):
        for j in T.parallel(ROWS):
            for i in range(BATCH):
                y[i, j] = T.float32(0)
                for k in range(COLS):
                    y[i, j] = y[i, j] + x[i, k] * w[j, k]

    @T.prim_func(private=True)
    def add_one(t: T.Buffer((5,), "int64"), u: T.Buffer((5,), "int64")):
        for i in range(5):
            u[i] = t[i] + T.int64(1)

    def tensor(*arguments):
        return getattr(relax, "TensorStructInfo", relax.TensorType)(*arguments)

    builder = relax.BlockBuilder()
    x = relax.Var("x", tensor((BATCH, COLS), "float32"))
    t = relax.Var("t", tensor((5,), "int64"))
    w = relax.Var("w", tensor((ROWS, COLS), "float32"))
    dense_var, add_var = builder.add_func(dense, "dense"), builder.add_func(add_one, "add_one")
    with builder.function("main", [x, t, w]):  # no dataflow block: it wants TIR made of blocks
        y = builder.emit(relax.call_tir(dense_var, [x, w], tensor((BATCH, ROWS), "float32")))
        u = builder.emit(relax.call_tir(add_var, [t], tensor((5,), "int64")))
        builder.emit_func_output(relax.Tuple([y, u]))
    executable = tvm.compile(builder.get(), target=tvm.target.Target({"kind": "llvm"}))
    return export_library(executable)


@cache
def dense_artifact() -> Artifact:
    """Return the artifact of `y = x @ w.T`, `u = t + 1`, compiled once in a process."""
    return Artifact(
        target=TargetInfo("x86", "plain"),
        inputs={
            "x": TensorSpec((BATCH, COLS), DType.FLOAT32, 0),
            "t": TensorSpec((5,), DType.INT64),
        },
        outputs={
            "y": TensorSpec((BATCH, ROWS), DType.FLOAT32, 0),
            "u": TensorSpec((5,), DType.INT64),
        },
        params=ParamBlock.from_arrays({"w": WEIGHT}),
        library=_library(),
        plan={"nodes": {}},
    )
