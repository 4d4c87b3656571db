# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The operator table: float rows against ONNX Runtime, integer rows against integer loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from qcompiler import numerics
from qcompiler.errors import DataError, ModelError, ShapeError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.ops import Stage, all_ops
from qcompiler.ort import Session
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

OPSET = 22


def ort_node(
    op: str,
    arrays: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any],
    *,
    constant: Sequence[int] = (),
    outputs: int = 1,
    opset: int = OPSET,
    domain: str = "",
) -> list[np.ndarray]:
    """Run one ONNX node in ONNX Runtime; operands named in `constant` are initializers."""
    names = ["" if a is None else f"i{k}" for k, a in enumerate(arrays)]
    outs = [f"o{k}" for k in range(outputs)]
    node = helper.make_node(op, names, outs, domain=domain, **attrs)
    infos, inits, feed = [], [], {}
    for k, a in enumerate(arrays):
        if a is None:
            continue
        if k in constant:
            inits.append(onnx.numpy_helper.from_array(np.asarray(a), names[k]))
        else:
            kind = helper.np_dtype_to_tensor_dtype(a.dtype)
            infos.append(helper.make_tensor_value_info(names[k], kind, a.shape))
            feed[names[k]] = a
    graph = helper.make_graph(
        [node], "g", infos, [onnx.ValueInfoProto(name=o) for o in outs], inits
    )
    opsets = [helper.make_opsetid("", opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = Session(model.SerializeToString(), optimization="disabled")
    return list(session.run(feed).values())


def ours(
    op: str,
    arrays: Sequence[np.ndarray | None],
    attrs: Mapping[str, Any] | None = None,
    *,
    qparams: Sequence[QuantParams | None] = (),
    result: TensorType | None = None,
    stage: Stage = Stage.FLOAT,
) -> list[np.ndarray]:
    """Build a one-node graph, verify it, and interpret it."""
    g = Graph("one", stage)
    values, feed = [], {}
    for k, a in enumerate(arrays):
        if a is None:
            values.append(None)
            continue
        q = qparams[k] if k < len(qparams) else None
        values.append(g.add_input(f"i{k}", TensorType(a.shape, DType.of(a.dtype), q)))
        feed[f"i{k}"] = a
    node = g.add(op, values, attrs, types=None if result is None else [result])
    g.set_outputs([(v.name, v) for v in node.outputs])
    g.verify()
    return list(run(g, feed).values())


def infer(op: str, types: Sequence[TensorType | None], **attrs: Any) -> TensorType:
    g = Graph("one", Stage.INTEGER)
    values = [None if t is None else g.add_input("x", t) for t in types]
    return g.add(op, values, attrs).outputs[0].type


def close(got: Sequence[np.ndarray], want: Sequence[np.ndarray], rtol=1e-5, atol=1e-5) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.dtype.kind == "f":
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


def fp(*shape: int) -> TensorType:
    return TensorType(shape, DType.FLOAT32)


def qp(scale: float = 0.1, zero: int = 10, storage: DType = DType.UINT8) -> QuantParams:
    return QuantParams(np.float32(scale), zero, storage, storage.min, storage.max)


def u8(*shape: int, q: QuantParams | None = None) -> TensorType:
    return TensorType(shape, DType.UINT8, q or qp())


# ------------------------------------------------------------------------------- the table


def test_rows_are_complete():
    for row in all_ops():
        assert row.stages, row.name
        assert row.min_inputs <= (row.max_inputs or row.min_inputs)
        assert row.name == row.name.lower()


# ------------------------------------------------------------------------------------ unary

UNARY = {
    "relu": ("Relu", {}, {}),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.2}, {"alpha": 0.2}),
    "sigmoid": ("Sigmoid", {}, {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, {"alpha": 0.3, "beta": 0.4}),
    "hard_swish": ("HardSwish", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "erf": ("Erf", {}, {}),
    "gelu": ("Gelu", {}, {}),
    "elu": ("Elu", {"alpha": 1.3}, {"alpha": 1.3}),
    "selu": ("Selu", {}, {}),
    "softplus": ("Softplus", {}, {}),
    "softsign": ("Softsign", {}, {}),
    "celu": ("Celu", {"alpha": 0.7}, {"alpha": 0.7}),
    "thresholded_relu": ("ThresholdedRelu", {"alpha": 0.6}, {"alpha": 0.6}),
    "mish": ("Mish", {}, {}),
    **{
        op.lower(): (op, {}, {})
        for op in [
            "Sqrt",
            "Exp",
            "Log",
            "Reciprocal",
            "Neg",
            "Abs",
            "Floor",
            "Ceil",
            "Round",
            "Sign",
            "Sin",
            "Cos",
            "Tan",
            "Sinh",
            "Cosh",
            "Asin",
            "Acos",
            "Atan",
            "Asinh",
            "Acosh",
            "Atanh",
        ]
    },
}


@pytest.mark.parametrize("name", sorted(UNARY))
def test_unary_equals_onnx_runtime(name, rng):
    op, attrs, onnx_attrs = UNARY[name]
    x = (rng.normal(size=(3, 40)) * 3).astype(np.float32)
    x[0, :6] = [0.0, -0.0, 0.5, 1.5, -2.5, 30.0]
    if name in ("asin", "acos", "atanh"):
        x = np.clip(x, -0.99, 0.99)
    if name in ("sqrt", "log", "acosh"):
        x = np.abs(x) + 1
    close(ours(name, [x], attrs), ort_node(op, [x], onnx_attrs), rtol=1e-5, atol=2e-6)


def test_gelu_tanh_form_equals_onnx_runtime(rng):
    x = (rng.normal(size=(200,)) * 3).astype(np.float32)
    want = ort_node("Gelu", [x], {"approximate": "tanh"})
    close(ours("gelu", [x], {"approximate": "tanh"}), want)


def test_silu_is_x_times_sigmoid(rng):
    x = (rng.normal(size=(200,)) * 30).astype(np.float32)
    close(ours("silu", [x]), [x * ort_node("Sigmoid", [x], {})[0]])


@pytest.mark.parametrize(("lo", "hi"), [(None, 1.0), (-0.5, None), (-1.0, 2.0), (2.0, 1.0)])
def test_clip_equals_onnx_runtime(lo, hi, rng):
    x = rng.normal(size=(50,)).astype(np.float32)
    bounds = [None if v is None else np.float32(v).reshape(()) for v in (lo, hi)]
    close(ours("clip", [x], {"min": lo, "max": hi}), ort_node("Clip", [x, *bounds], {}))


@pytest.mark.parametrize("name", ["neg", "abs", "sign", "relu"])
def test_unary_on_integers(name, rng):
    x = rng.integers(-100, 100, (30,)).astype(np.int32)
    close(ours(name, [x]), ort_node(name.capitalize(), [x], {}))


def test_predicates_equal_onnx_runtime():
    x = np.array([0, 1, np.nan, np.inf, -np.inf], np.float32)
    close(ours("isnan", [x]), ort_node("IsNaN", [x], {}, opset=20))
    for flags in ((1, 1), (0, 1), (1, 0)):
        names = {"detect_negative": flags[0], "detect_positive": flags[1]}
        close(ours("isinf", [x], names), ort_node("IsInf", [x], names, opset=20))
    b = np.array([True, False])
    close(ours("not", [b]), ort_node("Not", [b], {}))


def test_float16_stays_float16(rng):
    x = rng.normal(size=(20,)).astype(np.float16)
    for name in ("gelu", "sigmoid", "elu", "softplus", "erf"):
        assert ours(name, [x])[0].dtype == np.float16


# ----------------------------------------------------------------------------------- binary

BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "min": "Min",
    "max": "Max",
    "equal": "Equal",
    "less": "Less",
    "less_or_equal": "LessOrEqual",
    "greater": "Greater",
    "greater_or_equal": "GreaterOrEqual",
}
SHAPES = [((2, 3), (2, 3)), ((2, 1, 4), (3, 1)), ((), (2, 2)), ((5,), (1,)), ((0, 3), (1, 3))]


@pytest.mark.parametrize("name", sorted(BINARY))
@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
def test_binary_equals_onnx_runtime(name, dtype, rng):
    for sa, sb in SHAPES:
        a = np.asarray(rng.integers(-9, 9, sa)).astype(dtype)
        b = np.asarray(rng.integers(-9, 9, sb)).astype(dtype)
        if name == "div":
            b = np.where(b == 0, 2, b).astype(dtype)
        close(ours(name, [a, b]), ort_node(BINARY[name], [a, b], {}))


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod_equals_onnx_runtime(fmod, rng):
    a = rng.integers(-20, 20, (4, 5)).astype(np.int64)
    b = rng.integers(1, 7, (5,)).astype(np.int64) * np.array([1, -1, 1, -1, 1])
    close(ours("mod", [a, b], {"fmod": fmod}), ort_node("Mod", [a, b], {"fmod": fmod}))
    a, b = a.astype(np.float32), b.astype(np.float32)
    close(ours("mod", [a, b], {"fmod": 1}), ort_node("Mod", [a, b], {"fmod": 1}))


def test_pow_takes_an_exponent_of_another_dtype(rng):
    a = np.abs(rng.normal(size=(4, 3))).astype(np.float32)
    for b in (np.float32([0.5, 2, -1]), np.int64([2, 0, 3])):
        close(ours("pow", [a, b]), ort_node("Pow", [a, b], {}))
    n = np.int32([2, -3])
    close(ours("pow", [n, np.int32([3, 3])]), ort_node("Pow", [n, np.int32([3, 3])], {}))


def test_logic_where_and_prelu_equal_onnx_runtime(rng):
    a, b = rng.integers(0, 2, (2, 4, 1)).astype(bool)
    for name in ("and", "or", "xor"):
        close(ours(name, [a, b.T]), ort_node(name.capitalize(), [a, b.T], {}))
    x, y = rng.normal(size=(2, 4, 3)).astype(np.float32)
    close(ours("where", [a, x, y]), ort_node("Where", [a, x, y], {}))
    slope = np.float32([0.1, 0.2, 0.3])
    close(ours("prelu", [x, slope]), ort_node("PRelu", [x, slope], {}))


# ------------------------------------------------------------------------------ convolution


@st.composite
def windows(draw: st.DrawFn, rank: int, pad_below_kernel: bool = False):
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(draw(st.integers(1, 2)) for _ in range(rank))
    strides = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    most = [k - 1 if pad_below_kernel else 2 for k in kernel] * 2
    pads = tuple(draw(st.integers(0, m)) for m in most)
    extents = tuple(
        d * (k - 1) + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilations, strict=True)
    )
    return kernel, strides, pads, dilations, extents


@settings(max_examples=40)
@given(data=st.data(), rank=st.sampled_from([1, 2, 2, 3]), seed=st.integers(0, 10**6))
def test_conv_equals_onnx_runtime_in_both_layouts(data, rank, seed):
    kernel, strides, pads, dilations, extents = data.draw(windows(rank))
    group = data.draw(st.sampled_from([1, 1, 2, 4]))
    chans, outs = group * data.draw(st.integers(1, 2)), group * data.draw(st.integers(1, 2))
    r = np.random.default_rng(seed)
    x = r.normal(size=(2, chans, *extents)).astype(np.float32)
    w = r.normal(size=(outs, chans // group, *kernel)).astype(np.float32)
    bias = r.normal(size=outs).astype(np.float32) if seed % 2 else None
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    want = ort_node("Conv", [x, w, bias], attrs)
    close(ours("conv", [x, w, bias], attrs), want)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    got = ours("conv", [last, w, bias], {**attrs, "layout": "NHWC"})
    close([np.ascontiguousarray(np.moveaxis(got[0], -1, 1))], want)


def test_conv_fuses_residual_then_clamp(rng):
    x = rng.normal(size=(1, 3, 5, 5)).astype(np.float32)
    w = rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    r = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
    attrs = {"strides": (1, 1), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    plain = ours("conv", [x, w], attrs)[0]
    fused = ours(
        "conv", [x, w, None, r], {**attrs, "act_min": 0.0, "act_max": 1.0}, stage=Stage.INTEGER
    )
    close(fused, [np.clip(plain + r, 0, 1)])


@settings(max_examples=30)
@given(data=st.data(), rank=st.sampled_from([1, 2]), seed=st.integers(0, 10**6))
def test_conv_transpose_equals_onnx_runtime(data, rank, seed):
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    dilations = tuple(data.draw(st.integers(1, 2)) for _ in range(rank))
    strides = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    extra = tuple(data.draw(st.integers(0, s - 1)) for s in strides)
    pads = tuple(data.draw(st.integers(0, 1)) for _ in range(2 * rank))
    extents = tuple(data.draw(st.integers(2, 5)) for _ in range(rank))
    full = [
        (e - 1) * s + o + (k - 1) * d + 1
        for e, s, o, k, d in zip(extents, strides, extra, kernel, dilations, strict=True)
    ]
    assume(all(f > pads[i] + pads[rank + i] for i, f in enumerate(full)))
    group = data.draw(st.sampled_from([1, 2]))
    r = np.random.default_rng(seed)
    x = r.normal(size=(2, 2 * group, *extents)).astype(np.float32)
    w = r.normal(size=(2 * group, 3, *kernel)).astype(np.float32)
    bias = r.normal(size=3 * group).astype(np.float32) if seed % 2 else None
    attrs = {
        "strides": strides,
        "pads": pads,
        "dilations": dilations,
        "group": group,
        "output_padding": extra,
    }
    want = ort_node("ConvTranspose", [x, w, bias], attrs)
    close(ours("conv_transpose", [x, w, bias], attrs), want)


# --------------------------------------------------------------------------- matrix product


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (3, 4, 5)),
        ((4,), (4, 5)),
        ((2, 3, 4), (4,)),
        ((4,), (4,)),
    ],
)
def test_matmul_equals_onnx_runtime(a, b, rng):
    x, y = rng.normal(size=a).astype(np.float32), rng.normal(size=b).astype(np.float32)
    close(ours("matmul", [x, y]), ort_node("MatMul", [x, y], {}))


@pytest.mark.parametrize("ta", [False, True])
@pytest.mark.parametrize("tb", [False, True])
def test_matmul_transposes_and_bias_equal_gemm(ta, tb, rng):
    a = rng.normal(size=(4, 3) if ta else (3, 4)).astype(np.float32)
    b = rng.normal(size=(5, 4) if tb else (4, 5)).astype(np.float32)
    bias = rng.normal(size=5).astype(np.float32)
    want = ort_node("Gemm", [a, b, bias], {"transA": int(ta), "transB": int(tb)})
    close(ours("matmul", [a, b, bias], {"transpose_a": ta, "transpose_b": tb}), want)


# ------------------------------------------------------------------------ pooling, reductions


@settings(max_examples=60)
@given(
    data=st.data(),
    rank=st.sampled_from([1, 2, 2, 3]),
    ceil=st.booleans(),
    include=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_pooling_equals_onnx_runtime_in_both_layouts(data, rank, ceil, include, seed):
    kernel, strides, pads, dilations, extents = data.draw(windows(rank, pad_below_kernel=True))
    x = np.random.default_rng(seed).normal(size=(2, 3, *extents)).astype(np.float32)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "ceil_mode": int(ceil)}
    for name, op, extra in (
        ("max_pool", "MaxPool", {}),
        ("average_pool", "AveragePool", {"count_include_pad": int(include)}),
    ):
        want = ort_node(op, [x], {"kernel_shape": kernel, **attrs, **extra})
        close(ours(name, [x], {"kernel": kernel, **attrs, **extra}), want)
        got = ours(name, [last], {"kernel": kernel, **attrs, **extra, "layout": "NHWC"})
        close([np.ascontiguousarray(np.moveaxis(got[0], -1, 1))], want)


REDUCE = {
    "reduce_mean": "ReduceMean",
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
    "reduce_l1": "ReduceL1",
    "reduce_l2": "ReduceL2",
    "reduce_sum_square": "ReduceSumSquare",
    "reduce_log_sum": "ReduceLogSum",
    "reduce_log_sum_exp": "ReduceLogSumExp",
}


@pytest.mark.parametrize("name", sorted(REDUCE))
@pytest.mark.parametrize("keepdims", [False, True])
def test_reductions_equal_onnx_runtime(name, keepdims, rng):
    x = (np.abs(rng.normal(size=(2, 3, 4, 5))) + 0.1).astype(np.float32)
    for axes in ((1,), (-1,), (2, 3), (0, 2), (0, 1, 2, 3)):
        want = ort_node(REDUCE[name], [x, np.int64(axes)], {"keepdims": int(keepdims)})
        close(ours(name, [x], {"axes": axes, "keepdims": keepdims}), want)


def test_integer_reductions_equal_onnx_runtime(rng):
    x = rng.integers(-50, 50, (3, 4)).astype(np.int32)
    for name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_mean", "reduce_prod"):
        want = ort_node(REDUCE[name], [x, np.int64([1])], {"keepdims": 0})
        close(ours(name, [x], {"axes": (1,), "keepdims": False}), want)


@pytest.mark.parametrize("last", [False, True])
def test_argmax_and_argmin_equal_onnx_runtime(last, rng):
    x = rng.integers(0, 4, (3, 5, 4)).astype(np.float32)
    for axis in (0, 1, -1):
        for keep in (False, True):
            attrs = {"axis": axis, "keepdims": int(keep), "select_last_index": int(last)}
            close(ours("argmax", [x], attrs), ort_node("ArgMax", [x], attrs))
            close(ours("argmin", [x], attrs), ort_node("ArgMin", [x], attrs))


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumsum_equals_onnx_runtime(exclusive, reverse, rng):
    x = rng.normal(size=(3, 5)).astype(np.float32)
    flags = {"exclusive": exclusive, "reverse": reverse}
    for axis in (0, 1):
        want = ort_node("CumSum", [x, np.array(axis, np.int64)], flags)
        close(ours("cumsum", [x], {"axis": axis, **flags}), want)


# ------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmax_equals_onnx_runtime(axis, rng):
    x = (rng.normal(size=(3, 4, 5)) * 20).astype(np.float32)
    close(ours("softmax", [x], {"axis": axis}), ort_node("Softmax", [x], {"axis": axis}))
    want = ort_node("LogSoftmax", [x], {"axis": axis})
    close(ours("log_softmax", [x], {"axis": axis}), want)


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_layer_norm_equals_onnx_runtime(axis, rng):
    x = (rng.normal(size=(2, 4, 6)) * 3 + 1).astype(np.float32)
    scale = rng.normal(size=x.shape[axis:]).astype(np.float32)
    bias = rng.normal(size=x.shape[axis:]).astype(np.float32)
    attrs = {"axis": axis, "epsilon": 1e-3}
    for b in (bias, None):
        want = ort_node("LayerNormalization", [x, scale, b], attrs)
        close(ours("layer_norm", [x, scale, b], attrs), want, atol=1e-5)
    close(ours("layer_norm", [x], attrs), ours("layer_norm", [x, np.ones_like(scale)], attrs))


def test_instance_and_batch_norm_equal_onnx_runtime(rng):
    x = (rng.normal(size=(2, 4, 6, 5)) * 3 + 1).astype(np.float32)
    scale, bias, mean = rng.normal(size=(3, 4)).astype(np.float32)
    var = np.abs(rng.normal(size=4)).astype(np.float32)
    want = ort_node("InstanceNormalization", [x, scale, bias], {"epsilon": 1e-3})
    close(ours("instance_norm", [x, scale, bias], {"epsilon": 1e-3}), want, atol=1e-5)
    operands = [x, scale, bias, mean, var]
    want = ort_node("BatchNormalization", operands, {"epsilon": 1e-3})
    close(ours("batch_norm", operands, {"epsilon": 1e-3}), want)


# ---------------------------------------------------------------------------------- movement


def test_concat_and_split_equal_onnx_runtime(rng):
    x, y = rng.normal(size=(2, 3, 4)).astype(np.float32), rng.normal(size=(2, 1, 4))
    y = y.astype(np.float32)
    close(ours("concat", [x, y], {"axis": 1}), ort_node("Concat", [x, y], {"axis": 1}))
    want = ort_node("Split", [x, np.int64([1, 3, 0])], {"axis": -1}, outputs=3)
    close(ours("split", [x], {"axis": -1, "sizes": (1, 3, 0)}), want)


@settings(max_examples=60)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_slice_equals_onnx_runtime(data, seed):
    x = np.random.default_rng(seed).normal(size=(5, 4, 3)).astype(np.float32)
    axes = data.draw(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=3, unique=True))
    n = len(axes)
    bound = st.one_of(st.integers(-8, 8), st.sampled_from([2**62, -(2**62)]))
    starts = tuple(data.draw(bound) for _ in range(n))
    ends = tuple(data.draw(bound) for _ in range(n))
    steps = tuple(data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3])) for _ in range(n))
    want = ort_node("Slice", [x, *(np.int64(v) for v in (starts, ends, axes, steps))], {})
    attrs = {"starts": starts, "ends": ends, "axes": tuple(axes), "steps": steps}
    close(ours("slice", [x], attrs), want)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
def test_pad_equals_onnx_runtime(mode, rng):
    x = rng.normal(size=(3, 4)).astype(np.float32)
    for pads in ((1, 2, 0, 3), (0, 0, 0, 0), (2, 0, 1, 1), (-1, 0, 0, -2)):
        if mode != "constant" and min(pads) < 0:
            continue
        value = np.float32(1.5) if mode == "constant" else None
        want = ort_node("Pad", [x, np.int64(pads), value], {"mode": mode})
        close(ours("pad", [x], {"pads": pads, "mode": mode, "value": 1.5}), want)


def test_shape_movements_equal_onnx_runtime(rng):
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    want = ort_node("Reshape", [x, np.int64([4, 6])], {})
    close(ours("reshape", [x], {"shape": (4, 6)}), want)
    want = ort_node("Transpose", [x], {"perm": (2, 0, 1)})
    close(ours("transpose", [x], {"perm": (2, 0, 1)}), want)
    y = x[:, :1]
    want = ort_node("Expand", [y, np.int64([5, 1, 3, 1])], {})
    close(ours("expand", [y], {"shape": (5, 1, 3, 1)}), want)
    want = ort_node("Tile", [x, np.int64([2, 1, 3])], {})
    close(ours("tile", [x], {"repeats": (2, 1, 3)}), want)


def test_gather_equals_onnx_runtime(rng):
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    indices = np.int64([[0, -1], [2, 3]])
    for axis in (0, 1, -2):
        want = ort_node("Gather", [x, indices], {"axis": axis})
        close(ours("gather", [x, indices], {"axis": axis}), want)


def test_gather_refuses_indices_outside(rng):
    x = rng.normal(size=(4, 3)).astype(np.float32)
    with pytest.raises(DataError, match=r"indices 0\.\.4 are outside the 4 entries of axis 0"):
        ours("gather", [x, np.int64([0, 4])])


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space_equals_onnx_runtime(mode, rng):
    x = rng.normal(size=(2, 12, 3, 5)).astype(np.float32)
    want = ort_node("DepthToSpace", [x], {"blocksize": 2, "mode": mode})
    close(ours("depth_to_space", [x], {"blocksize": 2, "mode": mode}), want)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    got = ours("depth_to_space", [last], {"blocksize": 2, "mode": mode, "layout": "NHWC"})[0]
    close([np.ascontiguousarray(got.transpose(0, 3, 1, 2))], want)


def test_space_to_depth_equals_onnx_runtime(rng):
    x = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    want = ort_node("SpaceToDepth", [x], {"blocksize": 2})
    close(ours("space_to_depth", [x], {"blocksize": 2}), want)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    got = ours("space_to_depth", [last], {"blocksize": 2, "layout": "NHWC"})[0]
    close([np.ascontiguousarray(got.transpose(0, 3, 1, 2))], want)


COORDINATES = [
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
]


def resize_attrs(x: np.ndarray, mode: str, coordinate: str, scales, **extra: Any):
    shape = tuple(int(np.floor(n * s)) for n, s in zip(x.shape, scales, strict=True))
    given = {"mode": mode, "coordinate_mode": coordinate, "scales": scales, "shape": shape}
    return {**given, **extra}


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
def test_resize_nearest_equals_onnx_runtime(coordinate, nearest, rng):
    x = rng.normal(size=(1, 2, 5, 6)).astype(np.float32)
    # Scales that are exact in binary: at ties the rounding of the coordinate would decide.
    for scales in ((1.0, 1.0, 2.0, 2.0), (1.0, 1.0, 0.5, 1.5), (1.0, 1.0, 3.0, 0.25)):
        attrs = resize_attrs(x, "nearest", coordinate, scales, nearest_mode=nearest)
        want = ort_node(
            "Resize",
            [x, None, np.float32(scales)],
            {
                "mode": "nearest",
                "coordinate_transformation_mode": coordinate,
                "nearest_mode": nearest,
            },
        )
        close(ours("resize", [x], attrs), want)


@pytest.mark.parametrize("coordinate", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1])
def test_resize_interpolation_equals_onnx_runtime(coordinate, mode, antialias, rng):
    x = rng.normal(size=(1, 2, 7, 6)).astype(np.float32)
    for scales in ((1.0, 1.0, 2.0, 2.0), (1.0, 1.0, 0.5, 1.5), (1.0, 1.0, 2.6, 0.4)):
        attrs = resize_attrs(x, mode, coordinate, scales, antialias=bool(antialias))
        want = ort_node(
            "Resize",
            [x, None, np.float32(scales)],
            {
                "mode": mode,
                "coordinate_transformation_mode": coordinate,
                "antialias": antialias,
            },
        )
        close(ours("resize", [x], attrs), want, atol=1e-4)


def test_resize_by_sizes_and_exclude_outside_equal_onnx_runtime(rng):
    x = rng.normal(size=(1, 2, 7, 6)).astype(np.float32)
    shape = (1, 2, 10, 9)
    scales = tuple(o / n for o, n in zip(shape, x.shape, strict=True))
    for mode, exclude in (("linear", 0), ("cubic", 0), ("cubic", 1)):
        attrs = {
            "mode": mode,
            "scales": scales,
            "shape": shape,
            "exclude_outside": bool(exclude),
            "cubic_coeff_a": -0.5,
        }
        want = ort_node(
            "Resize",
            [x, None, None, np.int64(shape)],
            {"mode": mode, "exclude_outside": exclude, "cubic_coeff_a": -0.5},
        )
        close(ours("resize", [x], attrs), want, atol=1e-4)


# -------------------------------------------------------------------------------------- cast


@pytest.mark.parametrize("to", ["float16", "float64", "int8", "uint8", "int32", "int64", "bool"])
def test_cast_equals_onnx_runtime(to, rng):
    x = (rng.normal(size=(40,)) * 20).astype(np.float32)
    if to == "uint8":
        x = np.abs(x)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(to))
    close(ours("cast", [x], {"to": to}), ort_node("Cast", [x], {"to": kind}))


def test_cast_to_bfloat16_rounds_to_even():
    one = 1.0
    x = np.float32(
        [one, one + 2.0**-8, one + 3 * 2.0**-8, one + 2.0**-8 + 2.0**-20, np.inf, np.nan]
    )
    got = ours("cast", [x], {"to": "bfloat16"})[0]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(
        got, np.float32([one, one, one + 2.0**-6, one + 2.0**-7, np.inf, np.nan])
    )


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), signed=st.booleans())
def test_quantize_and_dequantize_equal_onnx_runtime(seed, signed):
    r = np.random.default_rng(seed)
    storage = DType.INT8 if signed else DType.UINT8
    q = qp(float(r.uniform(0.001, 0.5)), int(r.integers(storage.min, storage.max)), storage)
    x = (r.normal(size=200) * 20).astype(np.float32)
    zero = np.asarray(q.z, storage.numpy)
    want = ort_node("QuantizeLinear", [x, q.scale, zero], {})
    got = ours("quantize", [x], result=TensorType(x.shape, storage, q), stage=Stage.QDQ)
    close(got, want)
    back = ort_node("DequantizeLinear", [want[0], q.scale, zero], {})
    close(ours("dequantize", want, qparams=[q], stage=Stage.QDQ), back, rtol=0, atol=0)


def test_requantize_moves_to_the_declared_grid(rng):
    x = rng.integers(0, 256, 50).astype(np.uint8)
    a, b = qp(0.1, 10), qp(0.07, -3, DType.INT8)
    got = ours(
        "requantize", [x], qparams=[a], result=TensorType(x.shape, DType.INT8, b), stage=Stage.QDQ
    )
    close(got, [numerics.rescale(x, a, b)])


def test_quantize_needs_a_declared_quantization():
    with pytest.raises(ShapeError, match="expected a quantized type"):
        ours("quantize", [np.zeros(2, np.float32)], stage=Stage.QDQ)


# ------------------------------------------------------------- movement of quantized tensors


def test_movements_move_codes_and_keep_the_quantization(rng):
    x = rng.integers(0, 256, (1, 4, 6, 6)).astype(np.uint8)
    q = qp(0.1, 37)
    window = {"kernel": (3, 3), "strides": (2, 2), "pads": (1, 1, 1, 1), "dilations": (1, 1)}
    cases: list[tuple[str, dict[str, Any]]] = [
        ("max_pool", window),
        ("reshape", {"shape": (4, 36)}),
        ("transpose", {"perm": (0, 2, 3, 1)}),
        ("slice", {"starts": (1,), "ends": (3,), "axes": (1,), "steps": (1,)}),
        ("expand", {"shape": (2, 4, 6, 6)}),
        ("tile", {"repeats": (1, 1, 2, 1)}),
        ("depth_to_space", {"blocksize": 2}),
        ("space_to_depth", {"blocksize": 2}),
        ("split", {"axis": 1, "sizes": (1, 3)}),
        ("resize", {"scales": (1.0, 1.0, 2.0, 2.0), "shape": (1, 4, 12, 12)}),
        ("reduce_max", {"axes": (2, 3), "keepdims": True}),
    ]
    for name, attrs in cases:
        reals = numerics.dequantize(x, q)
        expected = ours(name, [reals], attrs)
        got = ours(name, [x], attrs, qparams=[q], stage=Stage.INTEGER)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == np.uint8
            np.testing.assert_array_equal(numerics.dequantize(a, q), b)


def test_quantized_pad_fills_with_the_zero_point(rng):
    x = rng.integers(0, 256, (2, 2)).astype(np.uint8)
    got = ours("pad", [x], {"pads": (1, 0, 0, 1)}, qparams=[qp(0.1, 37)], stage=Stage.QDQ)[0]
    assert got[0].tolist() == [37, 37, 37]
    assert got[:, 2].tolist() == [37, 37, 37]
    low = ours(
        "pad",
        [x],
        {"pads": (1, 0, 0, 0), "value": -np.inf},
        qparams=[qp(0.1, 37)],
        stage=Stage.QDQ,
    )
    assert low[0][0].tolist() == [0, 0]


def test_quantized_gather_and_argmax(rng):
    x = rng.integers(-128, 128, (5, 3)).astype(np.int8)
    q = qp(0.1, 3, DType.INT8)
    indices = np.int64([4, 0])
    got = ours("gather", [x, indices], qparams=[q], stage=Stage.QDQ)
    np.testing.assert_array_equal(got[0], x[[4, 0]])
    top = ours("argmax", [x], {"axis": 1}, qparams=[q], stage=Stage.INTEGER)
    np.testing.assert_array_equal(top[0][:, 0], x.argmax(axis=1))


def test_concat_unites_clamp_ranges_of_one_grid(rng):
    a, b = rng.integers(20, 60, (2, 2, 3)).astype(np.uint8)
    qa, qb = qp().clamped(10, 60), qp().clamped(20, 255)
    g = Graph("g", Stage.INTEGER)
    xs = [g.add_input("x", u8(2, 3, q=q)) for q in (qa, qb)]
    t = g.add("concat", xs, {"axis": 0}).output.type
    assert t == u8(4, 3, q=qp().clamped(10, 255))
    got = ours("concat", [a, b], {"axis": 0}, qparams=[qa, qb], stage=Stage.INTEGER)
    np.testing.assert_array_equal(got[0], np.concatenate([a, b]))


def test_transpose_moves_the_axis_of_per_axis_scales():
    q = QuantParams(np.ones(3, np.float32), np.zeros(3, int), DType.INT8, -127, 127, PerAxis(0))
    t = infer("transpose", [TensorType((3, 4, 5), DType.INT8, q)], perm=(2, 0, 1))
    assert t.shape == (5, 3, 4)
    assert t.qparams is not None
    assert t.qparams.granularity == PerAxis(1)


# ------------------------------------------------------------------------- integer operators


@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_qconv_is_the_accumulator_and_the_epilogue(data, seed):
    kernel, strides, pads, dilations, extents = data.draw(windows(2))
    group = data.draw(st.sampled_from([1, 2]))
    r = np.random.default_rng(seed)
    chans, outs = 2 * group, 3 * group
    x = r.integers(0, 256, (2, chans, *extents)).astype(np.uint8)
    w = r.integers(-128, 128, (outs, chans // group, *kernel)).astype(np.int8)
    bias = r.integers(-(10**5), 10**5, outs).astype(np.int32)
    xq = qp(0.02, 131)
    sw = r.uniform(0.001, 0.1, outs).astype(np.float32)
    wq = QuantParams(sw, r.integers(-3, 4, outs), DType.INT8, -128, 127, PerAxis(0))
    attrs = {"strides": strides, "pads": pads, "dilations": dilations, "group": group}
    # The same accumulators from a float64 convolution, exact at this size.
    reals = x.astype(np.float64) - xq.z, w - wq.zero_point.reshape(-1, 1, 1, 1).astype(np.float64)
    acc = ours("conv", list(reals), attrs)[0] + bias.reshape(-1, 1, 1)
    res = r.integers(0, 256, acc.shape).astype(np.uint8)
    rq, yq = qp(0.3, 77), qp(0.5, 100).clamped(100, 220)
    m = (np.float64(xq.s) * sw.astype(np.float64) / yq.s).astype(np.float32).reshape(-1, 1, 1)
    t = acc.astype(np.int32).astype(np.float32) * m
    tr = (res.astype(np.int32) - 77).astype(np.float32) * np.float32(np.float64(rq.s) / yq.s)
    expected = np.clip(np.rint(t + tr).astype(np.int64) + 100, 100, 220).astype(np.uint8)
    types = [xq, wq, None, rq]
    got = ours(
        "qconv",
        [x, w, bias, res],
        attrs,
        qparams=types,
        result=u8(*acc.shape, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], expected)
    last = np.ascontiguousarray(np.moveaxis(x, 1, -1))
    expected = np.ascontiguousarray(np.moveaxis(expected, 1, -1))
    got = ours(
        "qconv",
        [last, w, bias, np.ascontiguousarray(np.moveaxis(res, 1, -1))],
        {**attrs, "layout": "NHWC"},
        qparams=types,
        result=u8(*expected.shape, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], expected)
    real = ours("qconv", [x, w, bias], attrs, qparams=types, stage=Stage.INTEGER)[0]
    factor = (np.float64(xq.s) * sw.astype(np.float64)).astype(np.float32).reshape(-1, 1, 1)
    np.testing.assert_array_equal(real, acc.astype(np.float32) * factor)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_qmatmul_with_constant_weights(transpose, signed, rng):
    storage = DType.INT8 if signed else DType.UINT8
    a = rng.integers(storage.min, storage.max + 1, (2, 3, 40)).astype(storage.numpy)
    b = rng.integers(-128, 128, (40, 5)).astype(np.int8)
    bias = rng.integers(-1000, 1000, 5).astype(np.int32)
    aq, yq = qp(0.02, storage.min + 100, storage), qp(0.4, 128)
    sw = rng.uniform(0.001, 0.1, 5).astype(np.float32)
    axis = 0 if transpose else 1
    bq = QuantParams(sw, np.zeros(5, int), DType.INT8, -128, 127, PerAxis(axis))
    acc = (a.astype(np.int64) - aq.z) @ b.astype(np.int64) + bias
    m = (np.float64(aq.s) * sw.astype(np.float64) / yq.s).astype(np.float32)
    t = np.rint(acc.astype(np.int32).astype(np.float32) * m).astype(np.int64)
    weights = np.ascontiguousarray(b.T) if transpose else b
    got = ours(
        "qmatmul",
        [a, weights, bias],
        {"transpose_b": transpose},
        qparams=[aq, bq],
        result=u8(2, 3, 5, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], np.clip(t + 128, 0, 255).astype(np.uint8))


def test_qmatmul_of_two_activations_broadcasts(rng):
    a = rng.integers(0, 256, (2, 1, 3, 16)).astype(np.uint8)
    b = rng.integers(0, 256, (4, 5, 16)).astype(np.uint8)
    aq, bq, yq = qp(0.02, 128), qp(0.03, 99), qp(0.2, 111)
    acc = (a.astype(np.int64) - 128) @ (np.swapaxes(b, 1, 2).astype(np.int64) - 99)
    m = np.float32(np.float64(aq.s) * np.float64(bq.s) / yq.s)
    t = np.rint(acc.astype(np.float32) * m).astype(np.int64) + 111
    got = ours(
        "qmatmul",
        [a, b],
        {"transpose_b": True},
        qparams=[aq, bq],
        result=u8(2, 4, 3, 5, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], np.clip(t, 0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", ["qadd", "qsub", "qmul"])
def test_integer_binary_operators_broadcast(name, rng):
    a = rng.integers(0, 256, (2, 3, 4)).astype(np.uint8)
    b = rng.integers(-(2**15), 2**15, (3, 1)).astype(np.int16)
    aq, bq, yq = qp(0.02, 128), qp(0.0003, 5, DType.INT16), qp(0.05, 128)
    if name == "qmul":
        want = numerics.mul(a, aq, b, bq, yq)
    else:
        want = numerics.add(a, aq, b, bq, yq, subtract=name == "qsub")
    got = ours(name, [a, b], qparams=[aq, bq], result=u8(2, 3, 4, q=yq), stage=Stage.INTEGER)
    np.testing.assert_array_equal(got[0], want)
    fa, fb = numerics.dequantize(a, aq), numerics.dequantize(b, bq)
    real = {"qadd": fa + fb, "qsub": fa - fb, "qmul": fa * fb}[name]
    inside = np.abs(real) < 6
    assert np.abs(numerics.dequantize(got[0], yq) - real)[inside].max() <= 0.0251


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT8])
def test_table_looks_every_code_up(storage, rng):
    xq, yq = qp(0.05, storage.min + 128, storage), qp(0.01, 10)
    x = numerics.codes(storage)
    for entries, result in (
        (rng.integers(0, 256, 256).astype(np.uint8), TensorType((256,), DType.UINT8, yq)),
        (rng.normal(size=256).astype(np.float32), TensorType((256,), DType.FLOAT32)),
    ):
        got = ours("table", [x, entries], qparams=[xq, None], result=result, stage=Stage.INTEGER)
        np.testing.assert_array_equal(got[0], entries)


def test_integer_pooling_equals_numerics_in_both_layouts(rng):
    x = rng.integers(0, 256, (2, 3, 7, 6)).astype(np.uint8)
    xq, yq = qp(0.05, 30), qp(0.06, 40)
    attrs = {
        "kernel": (3, 2),
        "strides": (2, 2),
        "pads": (1, 1, 1, 0),
        "dilations": (1, 1),
        "ceil_mode": True,
        "count_include_pad": False,
    }
    real = ours("average_pool", [numerics.dequantize(x, xq)], attrs)[0]
    shape = real.shape
    first = ours(
        "qaverage_pool", [x], attrs, qparams=[xq], result=u8(*shape, q=yq), stage=Stage.INTEGER
    )[0]
    assert np.abs(numerics.dequantize(first, yq) - real).max() <= 0.0301
    last = ours(
        "qaverage_pool",
        [np.ascontiguousarray(x.transpose(0, 2, 3, 1))],
        {**attrs, "layout": "NHWC"},
        qparams=[xq],
        result=u8(shape[0], *shape[2:], shape[1], q=yq),
        stage=Stage.INTEGER,
    )[0]
    np.testing.assert_array_equal(last.transpose(0, 3, 1, 2), first)
    mean = ours(
        "qreduce_mean",
        [x],
        {"axes": (2, 3), "keepdims": False},
        qparams=[xq],
        result=u8(2, 3, q=yq),
        stage=Stage.INTEGER,
    )[0]
    np.testing.assert_array_equal(mean, numerics.reduce_mean(x, xq, (2, 3), yq, keepdims=False))


def test_integer_softmax_and_layer_norm_call_numerics(rng):
    x = rng.integers(0, 256, (2, 5, 8)).astype(np.uint8)
    xq, yq = qp(0.05, 30), qp(1 / 256, 0)
    got = ours(
        "qsoftmax", [x], {"axis": 1}, qparams=[xq], result=u8(2, 5, 8, q=yq), stage=Stage.INTEGER
    )
    np.testing.assert_array_equal(got[0], numerics.softmax(x, xq, 1, yq))
    gamma, beta = rng.normal(size=(2, 8)).astype(np.float32)
    yq = qp(0.03, 120)
    got = ours(
        "qlayer_norm",
        [x, gamma, beta],
        {"epsilon": 1e-3},
        qparams=[xq],
        result=u8(2, 5, 8, q=yq),
        stage=Stage.INTEGER,
    )
    np.testing.assert_array_equal(got[0], numerics.layer_norm(x, xq, gamma, beta, 1e-3, yq))


# ------------------------------------------------------------------------------------ opaque


def opaque(node: onnx.NodeProto, arrays, results, opset=OPSET, domain="") -> list[np.ndarray]:
    g = Graph("g")
    values, feed = [], {}
    for k, a in enumerate(arrays):
        if a is None:
            values.append(None)
            continue
        values.append(g.add_input(f"i{k}", TensorType(a.shape, DType.of(a.dtype))))
        feed[f"i{k}"] = a
    attrs = {"node": node.SerializeToString(), "domain": domain, "opset": opset}
    n = g.add("opaque", values, attrs, types=results)
    g.set_outputs([(v.name, v) for v in n.outputs])
    g.verify()
    return list(run(g, feed).values())


def test_opaque_runs_the_node(rng):
    x = rng.normal(size=(1, 3, 4, 4)).astype(np.float32)
    node = helper.make_node("LRN", ["some/x"], ["y"], size=3)
    close(opaque(node, [x], [fp(1, 3, 4, 4)]), ort_node("LRN", [x], {"size": 3}))


def test_opaque_with_several_results_and_repeated_operands(rng):
    x = rng.normal(size=(2, 9)).astype(np.float32)
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], axis=1)
    types = [fp(2, 3), TensorType((2, 3), DType.INT64)]
    values, indices = opaque(node, [x, np.int64([3])], types)
    np.testing.assert_array_equal(values, -np.sort(-x, axis=1)[:, :3])
    np.testing.assert_array_equal(np.take_along_axis(x, indices, 1), values)
    node = helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ik")
    close(opaque(node, [x, x], [fp(2, 2)]), [x @ x.T])


def test_opaque_with_an_omitted_operand(rng):
    x = rng.normal(size=(5, 1, 3)).astype(np.float32)
    w, r = rng.normal(size=(1, 4, 3)), rng.normal(size=(1, 4, 4))
    w, r = w.astype(np.float32), r.astype(np.float32)
    h = rng.normal(size=(1, 1, 4)).astype(np.float32)
    node = helper.make_node("RNN", ["x", "w", "r", "", "", "h"], ["", "y"], hidden_size=4)
    got = opaque(node, [x, w, r, None, None, h], [fp(1, 1, 4)])
    state = h[0]
    for step in x:
        state = np.tanh(step @ w[0].T + state @ r[0].T)
    close(got, [state[None]])


def test_opaque_refuses_unknown_operators_and_bytes():
    x = np.zeros((2,), np.float32)
    node = helper.make_node("NoSuchOperator", ["x"], ["y"])
    with pytest.raises(ModelError, match="ONNX Runtime cannot load the model"):
        opaque(node, [x], [fp(2)])
    with pytest.raises(ShapeError, match=r"1 operands are given, the node has 2"):
        opaque(helper.make_node("Add", ["x", "y"], ["z"]), [x], [fp(2)])
    g = Graph("g")
    with pytest.raises(ShapeError, match="must be declared"):
        g.add("opaque", [], {"node": b"", "opset": 1})


def test_a_float_result_of_qconv_takes_no_residual(rng):
    x = np.zeros((1, 1, 2, 2), np.uint8)
    w = np.zeros((1, 1, 1, 1), np.int8)
    with pytest.raises(ShapeError, match="a float32 result takes no residual"):
        ours(
            "qconv",
            [x, w, None, x],
            {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)},
            qparams=[qp(), qp(1.0, 0, DType.INT8), None, qp()],
            stage=Stage.INTEGER,
        )
