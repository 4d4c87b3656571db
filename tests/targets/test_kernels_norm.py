# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler import numerics
from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.harness import assembly, build, run
from qcompiler.targets.kernels.norm import (
    FloatInstanceNormWorkload,
    FloatLayerNormWorkload,
    FloatSoftmaxWorkload,
    QLayerNormWorkload,
    QSoftmaxWorkload,
    float_instance_norm,
    float_layer_norm,
    float_softmax,
    pack_softmax,
    qlayer_norm,
    qsoftmax,
)
from qcompiler.types import DType, QuantParams

# The AVX-VNNI row adds only a dot product, so here it makes the code of the AVX2 row.
ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
X86 = [row for row in ISA_TABLE.values() if row.architecture == "x86_64"]
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
F = np.float32
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
seeds = st.integers(0, 2**31)
depths = st.sampled_from([1, 5, 30, 64, 100, 128, 200, 384, 2500])


def inputs(seed: int, shape: tuple[int, ...], dtype: str, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low, high = LIMITS[dtype]
    if kind == "equal":
        return np.full(shape, rng.integers(low, high, endpoint=True), dtype)
    if kind == "ends":
        return rng.choice([low, high], shape).astype(dtype)
    return rng.integers(low, high, shape, endpoint=True).astype(dtype)


kinds = st.sampled_from(["any", "any", "equal", "ends"])


def target_of(seed: int, dtype: str, scale: float) -> QuantParams | None:
    if dtype == "float32":
        return None
    low, high = LIMITS[dtype]
    zero = int(np.random.default_rng(seed).integers(low, high, endpoint=True))
    return QuantParams(F(scale), zero, DType(dtype), low, high)


@rows
@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 40),
    depth=depths,
    inner=st.sampled_from([1, 1, 1, 3]),
    in_dtype=st.sampled_from(["uint8", "int8"]),
    out=st.sampled_from(["uint8", "int8", "int16", "float32"]),
    scale=st.sampled_from([1e-4, 0.02, 0.1, 0.5]),
    kind=kinds,
    seed=seeds,
)
def test_qsoftmax_equals_the_definition(isa, count, depth, inner, in_dtype, out, scale, kind, seed):
    shape = (count, depth, inner) if inner > 1 else (count, depth)
    x = inputs(seed, shape, in_dtype, kind)
    source = QuantParams(F(scale), 0, DType(in_dtype), *LIMITS[in_dtype])
    target = target_of(seed, out, 1 / 256 if out != "int16" else 1 / 30000)
    extra = () if target is None else (target.z, target.qmin, target.qmax)
    w = QSoftmaxWorkload(shape, 1, in_dtype, 1.0 if target is None else target.s, out, *extra)
    table = pack_softmax(numerics.softmax_table(source.s), w, isa)
    got = run(build(qsoftmax(w, isa), isa), x, table, shape=shape, dtype=out)
    np.testing.assert_array_equal(got, numerics.softmax(x, source, 1, target))


@rows
@settings(max_examples=8, deadline=None)
@given(
    count=st.integers(1, 20),
    depth=depths,
    in_dtype=st.sampled_from(["uint8", "int8", "int16"]),
    out=st.sampled_from(["uint8", "int8", "int16", "float32"]),
    epsilon=st.sampled_from([1e-5, 1e-12]),
    kind=kinds,
    seed=seeds,
)
def test_qlayer_norm_equals_the_definition(isa, count, depth, in_dtype, out, epsilon, kind, seed):
    rng = np.random.default_rng(seed)
    x = inputs(seed, (count, depth), in_dtype, kind)
    gamma, beta = (rng.normal(size=depth).astype(F) for _ in range(2))
    source = QuantParams(F(rng.uniform(1e-4, 0.1)), 0, DType(in_dtype), *LIMITS[in_dtype])
    target = target_of(seed, out, 0.03 if out != "int16" else 1e-4)
    extra = () if target is None else (target.s, target.z, target.qmin, target.qmax)
    w = QLayerNormWorkload(x.shape, in_dtype, source.s, epsilon, out, *extra)
    got = run(build(qlayer_norm(w, isa), isa), x, gamma, beta, shape=x.shape, dtype=out)
    want = numerics.layer_norm(x, source, gamma, beta, epsilon, target)
    np.testing.assert_array_equal(got, want)


@rows
@settings(max_examples=4, deadline=None)
@given(count=st.integers(1, 9), depth=depths, inner=st.sampled_from([1, 1, 5, 40]), seed=seeds)
def test_float_softmax_is_close(isa, count, depth, inner, seed):
    x = (np.random.default_rng(seed).normal(size=(count, depth, inner)) * 8).astype(F)
    x[0, 0, 0] = -np.inf if depth > 1 else 0
    w = FloatSoftmaxWorkload(x.shape, 1)
    got = run(build(float_softmax(w, isa), isa), x, shape=x.shape, dtype="float32")
    powers = np.exp(x.astype(np.float64) - x.max(axis=1, keepdims=True))
    want = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-37)


@rows
@pytest.mark.parametrize("depth", [1, 30, 128, 384, 1000])
def test_float_layer_norm_is_close(isa, depth):
    rng = np.random.default_rng(depth)
    x = (rng.normal(size=(5, depth)) * 4 + 3).astype(F)
    gamma, beta = (rng.normal(size=depth).astype(F) for _ in range(2))
    w = FloatLayerNormWorkload(x.shape, 1e-5)
    library = build(float_layer_norm(w, isa), isa)
    got = run(library, x, gamma, beta, shape=x.shape, dtype="float32")
    wide = x.astype(np.float64)
    want = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(got, want * gamma + beta, rtol=1e-4, atol=1e-4)


@rows
@pytest.mark.parametrize("plane", [(1, 1), (5, 3), (8, 16), (31, 9)])
def test_float_instance_norm_is_close(isa, plane):
    rng = np.random.default_rng(plane[0])
    x = (rng.normal(size=(2, 3, *plane)) * 4 + 3).astype(F)
    scale, bias = (rng.normal(size=3).astype(F) for _ in range(2))
    library = build(float_instance_norm(FloatInstanceNormWorkload(x.shape, 1e-5), isa), isa)
    got = run(library, x, scale, bias, shape=x.shape, dtype="float32")
    wide, axes = x.astype(np.float64), (2, 3)
    spread = np.sqrt(wide.var(axes, keepdims=True) + 1e-5)
    want = (wide - wide.mean(axes, keepdims=True)) / spread
    want = want * scale[:, None, None] + bias[:, None, None]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", X86, ids=lambda row: row.name)
def test_qlayer_norm_rounds_each_step(isa):
    """The only fused operation allowed is D * q - c1, which is exact; int16 has none at all."""
    w = QLayerNormWorkload((8, 256), "int16", 0.01, 1e-5, "uint8", 0.03, 3, 0, 255)
    text = assembly(build(qlayer_norm(w, isa), isa))
    assert "fmadd" not in text
    assert "divps" in text
    assert "rsqrt" not in text


def test_pack_softmax_rejects_another_length():
    w = QSoftmaxWorkload((4, 4), 1, "uint8", 1.0, "float32")
    with pytest.raises(CodegenError, match=r"expected 256 entries, got shape \(255,\)"):
        pack_softmax(np.zeros(255, np.int32), w, ISA_TABLE["x86-64"])
