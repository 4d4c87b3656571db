# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The operator table: float rows against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper
from operator_cases import OPSET, close, fp, ort_node, ours, qp, windows

from qcompiler import numerics
from qcompiler.errors import ModelError, ShapeError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.ops import Stage, all_ops
from qcompiler.types import DType, TensorType

# ---------------------------------------------------------------------------------------- the table


def test_rows_are_complete():
    for row in all_ops():
        assert row.stages, row.name
        assert row.min_inputs <= (row.max_inputs or row.min_inputs)
        assert row.name == row.name.lower()


# -------------------------------------------------------------------------------------------- unary


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


# ------------------------------------------------------------------------------------------- binary


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


# -------------------------------------------------------------------------------------- convolution


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


# ----------------------------------------------------------------------------------- matrix product


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


# ------------------------------------------------------------------------------ pooling, reductions


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


# -------------------------------------------------------------------------------------------- norms


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


# --------------------------------------------------------------------------------------------- cast


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


# ------------------------------------------------------------------------------------------- opaque


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
