# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Scales of groups as whole multiples of one per column: what becomes int8 weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.driver import quantize_model
from qcompiler.factors import FACTORED_RANGE, folded, snapped, units
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.numerics import dequantize, quantize
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.passes.fuse import Fuse
from qcompiler.passes.narrow_products import group_qparams
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams, TensorType

MODEL = str(Path(__file__).resolve().parent.parent / "models" / "digits_cnn")


def scales(rng: np.random.Generator, columns: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Units, and scales [columns, groups] that are 1 to 16 of them."""
    unit = np.exp(rng.uniform(-60, 20, columns)).astype(np.float32)
    factors = rng.integers(1, 17, (columns, groups))
    return unit, (unit[:, None].astype(np.float64) * factors).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 40), st.booleans(), st.integers(0, 2**32 - 1))
def test_units_and_factors_give_the_scales(
    columns: int, groups: int, turned: bool, seed: int
) -> None:
    _, scale = scales(np.random.default_rng(seed), columns, groups)
    scale = np.ascontiguousarray(scale.T) if turned else scale.reshape(columns, groups, 1, 1)
    found = units(scale, 1 if turned else 0)
    assert found is not None
    unit, factors = found
    assert factors.shape == scale.shape
    assert factors.min() >= 1
    assert factors.max() <= 16
    shape = (1, -1) if turned else (-1, 1, 1, 1)
    np.testing.assert_allclose(unit.reshape(shape) * factors, scale, rtol=3e-7)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_snapped_scales_have_factors(columns: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-5, 5, (columns, groups))).astype(np.float32)
    near = snapped(scale, 0)
    assert units(near, 0) is not None
    np.testing.assert_allclose(near.max(1), scale.max(1), rtol=1e-6)
    within = scale >= scale.max(1, keepdims=True) / 32
    half_a_unit = scale.max(1, keepdims=True).repeat(groups, 1) / 31.9
    assert (np.abs(near - scale) <= half_a_unit)[within].all()
    np.testing.assert_array_equal(snapped(near, 0), near)
    assert (snapped(np.full((2, 3), 1e-38, np.float32), 0) > 0).all()


def test_scales_apart_have_no_factors() -> None:
    assert units(np.asarray([[1.0, 1.5, 2.0]], np.float32), 0) is not None  # units of a half
    for ratio in (17.0, 1.001, 1 + 1e-5, np.pi):
        assert units(np.asarray([[1.0, ratio]], np.float32), 0) is None, ratio
    assert units(np.asarray([[1.0, 1.0], [1.0, 0.99]], np.float32), 0) is None


@pytest.mark.parametrize("zero", [0, 1, -8])
def test_folded_weights_are_the_same_reals(zero: int, rng: np.random.Generator) -> None:
    _, scale = scales(rng, 6, 4)
    scale[0] = scale[0, 0] * np.asarray([1, 16, 8, 3])
    codes = rng.integers(-7, 8, (6, 32, 1, 1)).astype(np.int8)
    codes[0, 8:16] = 7 if zero <= 0 else -7  # 16 times 7 or 8 fits, twice 15 times does not
    points = np.full((6, 4, 1, 1), zero, np.int32)
    q = QuantParams(scale.reshape(6, 4, 1, 1), points, DType.INT8, -8, 7, PerGroup(1, 8))
    found = folded(codes, q, 0)
    if zero == -8:
        assert found is None
        return
    assert found is not None
    held, grid = found
    assert held.dtype == np.int8
    assert grid.granularity == PerAxis(0)
    assert ((grid.qmin, grid.qmax) == FACTORED_RANGE) == (zero == 0)
    np.testing.assert_allclose(dequantize(held, grid), dequantize(codes, q), rtol=3e-7)


@pytest.mark.parametrize("op", ["conv", "matmul"])
@pytest.mark.parametrize("factored", [True, False])
def test_products_of_folded_weights_have_one_scale_per_column(
    op: str, factored: bool, rng: np.random.Generator
) -> None:
    shape = (10, 16, 3, 3) if op == "conv" else (16, 10)
    axis = 1 if op == "conv" else 0
    w = rng.standard_normal(shape).astype(np.float32)
    q = group_qparams(w, axis, 8, 4, factored=factored)
    unit = QuantParams(np.float32(0.02), np.int32(128), DType.UINT8, 0, 255)
    graph = Graph("g", Stage.QDQ)
    extent = (1, 16, 6, 6) if op == "conv" else (5, 16)
    x = graph.add_input("x", TensorType(extent, DType.FLOAT32))
    ints = graph.add("quantize", [x], types=[TensorType(extent, DType.UINT8, unit)]).output
    grid = QuantParams(q.scale, q.zero_point, DType.INT8, -8, 7, q.granularity)
    held = graph.constant(quantize(w, grid), "w", grid)
    bias = graph.constant(rng.standard_normal(10).astype(np.float32), "b")
    attrs = {"strides": (1, 1), "pads": (1,) * 4, "dilations": (1, 1)} if op == "conv" else {}
    operands = [graph.add("dequantize", [v]).output for v in (ints, held)]
    y = graph.add(op, [*operands, bias], attrs).output
    out = QuantParams(np.float32(0.1), np.int32(128), DType.UINT8, 0, 255)
    done = graph.add("quantize", [y], types=[TensorType(y.shape, DType.UINT8, out)]).output
    graph.set_outputs([("y", done)])
    fused = PassManager([Fuse()]).run(graph, PassContext())
    product = next(n for n in fused.nodes if n.op.name == f"q{op}")
    granularity = product.input(1).qparams.granularity
    assert isinstance(granularity, PerAxis if factored else PerGroup)
    given = {"x": rng.uniform(-2.5, 2.5, extent).astype(np.float32)}
    got, want = run(fused, given)["y"], run(graph, given)["y"]
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (got == want).mean() > 0.99


def test_weights_in_groups_are_exported_as_int8_with_a_scale_per_channel(tmp_path: Path) -> None:
    """Any runtime computes them, and reading the file again gives the same integers."""
    calibration = dict(np.load(f"{MODEL}/calib.npz"))
    path = tmp_path / "model.onnx"
    kept = quantize_model(f"{MODEL}/model.onnx", calibration=calibration, precision="w4a8-group")
    stage = Stage.QDQ
    made = quantize_model(
        f"{MODEL}/model.onnx", calibration=calibration, precision="w4a8-group", stage=stage
    )
    proto = to_onnx(made.graph)
    path.write_bytes(proto.SerializeToString())
    linear = [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    assert linear
    assert not any(a.name == "block_size" and a.i for n in linear for a in n.attribute)
    again = quantize_model(path, precision="w8a8")
    for op in ("qconv", "qmatmul"):
        was, found = ([n for n in g.graph.nodes if n.op.name == op] for g in (kept, again))
        assert len(was) == len(found) > 0
        for one, other in zip(was, found, strict=True):
            np.testing.assert_array_equal(one.input(1).array(), other.input(1).array())
            assert one.input(1).dtype is DType.INT8
