# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Every operator that is imported as one of ours, against ONNX Runtime over the opsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.interpreter import run
from qcompiler.onnx_import import load_onnx
from qcompiler.ort import Session
from qcompiler.types import Array


def uniform(*shape: int) -> Array:
    return np.random.default_rng(sum(shape) + len(shape)).uniform(-2, 2, shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.asarray(values, np.int64)


@dataclass
class Case:
    """One node: operands in order (None = omitted), of which `given` are run-time inputs."""

    op: str
    operands: Sequence[Array | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    opsets: tuple[int, ...] = (7, 9, 11, 13, 17, 21)
    given: tuple[int, ...] = (0,)
    outputs: int = 1
    ops: tuple[str, ...] = ()  # operators expected in the graph; () = do not look
    id: str = ""


X = uniform(2, 6, 7, 5)
W = uniform(4, 6, 3, 3)
POSITIVE = np.abs(X) + 0.1
INFINITE = np.where(X > 1, np.float32(np.inf), np.where(X < -1, np.float32(-np.inf), X))
MODERN = (11, 13, 17, 21)

CASES = [
    # elementwise
    *(
        Case(op, [X], ops=(row,))
        for op, row in {
            **{n: n.lower() for n in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Exp")},
            **{n: n.lower() for n in ("Neg", "Abs", "Floor", "Ceil", "Sin", "Cos", "Tan", "Atan")},
        }.items()
    ),
    *(Case(op, [X], opsets=(9, 13, 17), ops=(op.lower(),)) for op in ("Erf", "Sign", "Sinh")),
    *(Case(op, [POSITIVE], ops=(op.lower(),)) for op in ("Sqrt", "Log", "Reciprocal")),
    Case("Round", [X], opsets=MODERN, ops=("round",)),
    Case("LeakyRelu", [X], {"alpha": 0.2}, ops=("leaky_relu",)),
    Case("LeakyRelu", [X], ops=("leaky_relu",), id="default"),
    Case("HardSigmoid", [X], {"alpha": 0.3, "beta": 0.4}, ops=("hard_sigmoid",)),
    Case("HardSwish", [X], opsets=(14, 17, 22), ops=("hard_swish",)),
    Case("Elu", [X], {"alpha": 0.7}, ops=("elu",)),
    Case("Selu", [X], ops=("selu",)),
    Case("Celu", [X], {"alpha": 0.6}, opsets=(12, 17), ops=("celu",)),
    Case("ThresholdedRelu", [X], {"alpha": 0.5}, opsets=(10, 17), ops=("thresholded_relu",)),
    Case("Mish", [X], opsets=(18, 22), ops=("mish",)),
    Case("Gelu", [X], opsets=(20,), ops=("gelu",)),
    Case("Gelu", [X], {"approximate": "tanh"}, opsets=(20,), ops=("gelu",), id="tanh"),
    Case("Clip", [X], {"min": -0.5, "max": 1.0}, opsets=(7, 10), ops=("clip",)),
    Case("Clip", [X], opsets=(7, 17), ops=(), id="unbounded"),
    Case("Clip", [X, np.float32(-0.5), np.float32(1)], opsets=MODERN, ops=("clip",), id="operands"),
    Case("Clip", [X, np.float32(0)], opsets=MODERN, ops=("relu",), id="relu"),
    Case("Clip", [X, None, np.float32(1)], opsets=MODERN, ops=("clip",), id="max-only"),
    Case("Clip", [X, np.float32(0), np.float32(1)], opsets=MODERN, given=(0, 1, 2),
         ops=("max", "min"), id="computed"),
    Case("IsNaN", [np.where(X > 0, X, np.float32(np.nan))], opsets=(9, 13), ops=("isnan",)),

            Case("IsInf", [INFINITE], {"detect_negative": 0}, opsets=(10, 20), ops=("isinf",)),
    *(
        Case(op, [X, uniform(6, 1, 1)], given=(0, 1), ops=(row,))
        for op, row in {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}.items()
    ),
    Case("PRelu", [X, uniform(6, 1, 1)], ops=("prelu",)),
    Case("Pow", [POSITIVE, np.float32(1.5)], ops=("pow",)),
    Case("Pow", [X, np.asarray(2, np.int64)], opsets=(13, 17), ops=("pow",), id="int-exponent"),
    Case("Mod", [X, POSITIVE], {"fmod": 1}, opsets=(10, 13), given=(0, 1), ops=("mod",)),
    *(Case(op, [X, X[:1]], given=(0, 1), opsets=(9, 13, 17)) for op in ("Less", "Greater")),
    *(Case(op, [X, X[:1]], given=(0, 1), opsets=(12, 16))
      for op in ("LessOrEqual", "GreaterOrEqual")),
    Case("Equal", [np.rint(X), np.rint(X[:1])], given=(0, 1), opsets=(11, 19), ops=("equal",)),
    *(Case(op, [X > 0, X > 1], given=(0, 1), opsets=(7, 17)) for op in ("And", "Or", "Xor")),
    Case("Not", [X > 0], opsets=(7, 17), ops=("not",)),
    Case("Where", [X > 0, X, uniform(6, 7, 1)], opsets=(9, 16), given=(0, 1, 2), ops=("where",)),
    *(Case(op, [X, X[:1], uniform(5)], given=(0, 1, 2), opsets=(8, 13))
      for op in ("Sum", "Min", "Max", "Mean")),
    Case("Sum", [X], opsets=(8, 13), id="one"),
    Case("Cast", [X], {"to": TensorProto.INT32}, opsets=(9, 13, 19), ops=("cast",)),
    Case("Cast", [X], {"to": TensorProto.FLOAT}, opsets=(13,), id="same"),
    Case("CastLike", [X, np.int64([1])], opsets=(15, 19), ops=("cast",)),
    # linear
    Case("Conv", [X, W, uniform(4)], {"pads": [1, 0, 2, 1], "strides": [2, 1]}, ops=("conv",)),
    Case("Conv", [X, W], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, ops=("conv",), id="upper"),
    Case("Conv", [X, W], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, ops=("conv",), id="lower"),
    Case("Conv", [X, W], {"auto_pad": "VALID"}, ops=("conv",), id="valid"),
    Case("Conv", [X, W], {"dilations": [2, 1], "pads": [2, 1, 2, 1]}, id="dilated"),
    Case("Conv", [X, uniform(6, 1, 3, 3)], {"group": 6, "kernel_shape": [3, 3]}, id="depthwise"),
    Case("Conv", [X, uniform(4, 3, 2, 2)], {"group": 2}, id="grouped"),
    Case("Conv", [X[:, :, :, 0], uniform(4, 6, 3)], {"strides": [2]}, id="1d"),
    Case("Conv", [uniform(1, 2, 4, 5, 6), uniform(3, 2, 2, 2, 2)], id="3d"),
    Case("Conv", [X, W, uniform(4)], given=(0, 1, 2), id="computed-weight"),
    Case("ConvTranspose", [X, uniform(6, 4, 3, 3), uniform(4)], {"strides": [2, 2]}),
    Case("ConvTranspose", [X, uniform(6, 4, 3, 3)],
         {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]}, id="padding"),
    Case("ConvTranspose", [X, uniform(6, 2, 3, 3)], {"strides": [2, 3], "group": 2}, id="grouped"),
    Case("ConvTranspose", [X, uniform(6, 4, 3, 3)],
         {"strides": [2, 2], "output_shape": [13, 10]}, id="output-shape"),
    Case("ConvTranspose", [X, uniform(6, 4, 3, 3)],
         {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, opsets=(11, 17), id="upper"),
    Case("MatMul", [uniform(3, 4), uniform(4, 5)], ops=("matmul",)),
    Case("MatMul", [uniform(2, 3, 4), uniform(4, 5)], ops=("matmul",), id="3d"),
    Case("MatMul", [uniform(2, 3, 4), uniform(2, 4, 5)], given=(0, 1), ops=("matmul",), id="batch"),
    Case("MatMul", [uniform(4), uniform(4, 5)], given=(0, 1), id="vector-matrix"),
    Case("MatMul", [uniform(2, 3, 4), uniform(4)], given=(0, 1), id="matrix-vector"),
    Case("MatMul", [uniform(4), uniform(4)], given=(0, 1), id="vectors"),
    Case("MatMul", [np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((3, 2), np.int32)],
         opsets=(9, 13), ops=("opaque",), id="int32"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5), uniform(5)], ops=("matmul",)),
    Case("Gemm", [uniform(4, 3), uniform(5, 4), uniform(5)], {"transA": 1, "transB": 1},
         id="turned"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5), uniform(1, 5)],
         {"alpha": 0.5, "beta": 2.0}, ops=("matmul",), id="factors"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5), uniform(3, 5)], {"beta": 0.5}, given=(0, 1, 2),
         ops=("mul", "matmul", "add"), id="full-c"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5), np.float32([0.5])], ops=("matmul",), id="scalar-c"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5)], opsets=(11, 13), ops=("matmul",), id="no-c"),
    Case("Gemm", [uniform(3, 4), uniform(4, 5), uniform(5)], {"alpha": 3.0}, given=(0, 1, 2),
         id="computed"),
    # pooling
    Case("MaxPool", [X], {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}),
    Case("MaxPool", [X], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
         opsets=(10, 11, 17), id="ceil"),
    Case("MaxPool", [X], {"kernel_shape": [2, 2], "dilations": [2, 2]},
         opsets=(10, 17), id="dilated"),
    Case("MaxPool", [X], {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]},
         id="lower"),
    Case("MaxPool", [X], {"kernel_shape": [2, 2]}, outputs=2, opsets=(8, 12), ops=("opaque",),
         id="indices"),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
         id="include"),
    Case("AveragePool", [X], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1},
         opsets=(10, 11, 17), id="ceil"),
    Case("AveragePool", [X], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]},
         id="upper"),
    Case("GlobalAveragePool", [X], ops=("reduce_mean",)),
    Case("GlobalMaxPool", [X], ops=("reduce_max",)),
    # norms
    Case("BatchNormalization",
         [X, uniform(6), uniform(6)[::-1].copy(), uniform(6), np.abs(uniform(6)) + 0.5],
         {"epsilon": 1e-3}, ops=("batch_norm",)),
    Case("InstanceNormalization", [X, uniform(6), uniform(6)], ops=("instance_norm",)),
    Case("LayerNormalization", [uniform(2, 3, 8), uniform(8), uniform(8)], opsets=(17, 21),
         ops=("layer_norm",)),
    Case("LayerNormalization", [uniform(2, 3, 8), uniform(3, 8)], {"axis": 1},
         opsets=(17,), id="axis"),
    Case("LayerNormalization", [uniform(2, 3, 8), uniform(1)], opsets=(17,), id="broadcast"),
    Case("GroupNormalization", [X, uniform(6), uniform(6)], {"num_groups": 3}, opsets=(21, 25),
         ops=("reshape", "layer_norm", "reshape", "mul", "add")),
    Case("LpNormalization", [X], {"axis": 1}, opsets=(9, 17)),
    Case("LpNormalization", [X], {"axis": 1, "p": 1}, opsets=(9,), id="l1"),
    Case("MeanVarianceNormalization", [X], opsets=(9, 13), id="mvn"),
    Case("LRN", [X], {"size": 3}, opsets=(7, 13), ops=("opaque",)),
    *(Case(op, [X], {"axis": axis}, id=str(axis), opsets=(7, 11, 13, 17))
      for op in ("Softmax", "LogSoftmax") for axis in (0, 1, 2, 3)),
    *(Case(op, [X], id="default", opsets=(7, 11, 13, 17)) for op in ("Softmax", "LogSoftmax")),
    # reductions
    *(
        Case(op, [POSITIVE], attrs, opsets=(7, 11, 13, 17), id=f"{i}")
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
                   "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp")
        for i, attrs in enumerate(
            ({"axes": [1, -1]}, {"axes": [2], "keepdims": 0}, {"keepdims": 0})
        )
    ),
    *(Case(op, [POSITIVE, ints(1, -1)], {"keepdims": 0}, opsets=(18, 21), id="operand")
      for op in ("ReduceMean", "ReduceMax", "ReduceL2")),
    Case("ReduceSum", [X], {"axes": [1]}, opsets=(7, 11), ops=("reduce_sum",)),
    Case("ReduceSum", [X, ints(1)], {"keepdims": 0}, opsets=(13, 17, 21), id="operand"),
    Case("ReduceSum", [X, ints()], {"noop_with_empty_axes": 1}, opsets=(13, 21), id="noop"),
    Case("ReduceSum", [X], opsets=(13, 21), id="all"),
    *(Case(op, [X], attrs, opsets=(12, 13, 17), id=str(i), ops=(op.lower(),))
      for op in ("ArgMax", "ArgMin")
      for i, attrs in enumerate(({"axis": 1}, {"keepdims": 0, "select_last_index": 1}))),
    Case("CumSum", [X, np.asarray(1)], {"exclusive": 1, "reverse": 1},
         opsets=(11, 14), ops=("cumsum",)),
    # movement
    Case("Identity", [X], opsets=(7, 17)),
    Case("Dropout", [X], {"ratio": 0.3}, opsets=(7, 10)),
    Case("Dropout", [X, np.float32(0.3)], opsets=(12, 13), id="operand"),
    Case("Dropout", [X], outputs=2, opsets=(13,), id="mask"),
    Case("Reshape", [X, ints(0, -1, 5)], opsets=(7, 13, 21), ops=("reshape",)),
    Case("Reshape", [X, ints(-1)], {"allowzero": 1}, opsets=(14, 21), ops=("reshape",), id="zero"),
    *(Case("Flatten", [X], {"axis": a}, opsets=(9, 11, 13), id=str(a)) for a in (0, 1, 2, 4)),
    Case("Flatten", [X], {"axis": -1}, opsets=(11, 13), id="negative"),
    Case("Squeeze", [X[:1, :1]], {"axes": [0]}, opsets=(7, 11), ops=("reshape",)),
    Case("Squeeze", [X[:1, :1], ints(-3)], opsets=(13, 21), ops=("reshape",), id="operand"),
    Case("Squeeze", [X[:1, :1]], opsets=(7, 13), ops=("reshape",), id="all"),
    Case("Unsqueeze", [X], {"axes": [0, 3]}, opsets=(7, 11), ops=("reshape",)),
    Case("Unsqueeze", [X, ints(0, -1)], opsets=(13, 21), ops=("reshape",), id="operand"),
    Case("Transpose", [X], {"perm": [0, 2, 3, 1]}, ops=("transpose",)),
    Case("Transpose", [X], ops=("transpose",), id="reverse"),
    Case("Expand", [X[:, :1], ints(6, 1, 5)], opsets=(8, 13), ops=("expand",)),
    Case("Tile", [X, ints(1, 2, 1, 3)], opsets=(7, 13), ops=("tile",)),
    Case("Concat", [X, X[:, :2], X], {"axis": 1}, given=(0, 1, 2), ops=("concat",)),
    Case("Concat", [X, X], {"axis": -1}, given=(0, 1), opsets=(11, 13), id="negative"),
    Case("Split", [X], {"axis": 1}, outputs=3, opsets=(7, 11, 13), ops=("split",)),
    Case("Split", [X], {"axis": 1, "split": [1, 5]}, outputs=2, opsets=(7, 11), id="sizes"),
    Case("Split", [X, ints(1, 5)], {"axis": 1}, outputs=2, opsets=(13, 21), id="operand"),
    Case("Split", [X], {"axis": 2, "num_outputs": 3}, outputs=3, opsets=(18, 21), id="uneven"),
    Case("Slice", [X], {"starts": [1, -3], "ends": [9, -1], "axes": [1, 2]}, opsets=(7, 9),
         ops=("slice",)),
    Case("Slice", [X, ints(1), ints(2**62), ints(-1), ints(2)], opsets=(10, 13), id="step"),
    Case("Slice", [X, ints(-1), ints(-(2**62)), ints(2), ints(-2)],
         opsets=(10, 13), id="backwards"),
    Case("Slice", [X, ints(0), ints(2**62), ints(1)], opsets=(10, 13), id="nothing"),
    Case("Gather", [X, ints(0, -1, 2)], {"axis": 1}, opsets=(7, 11, 13), ops=("gather",)),
    Case("Gather", [X, np.asarray(-2)], {"axis": 1}, ops=("slice", "reshape"), opsets=(11, 13),
         id="one"),
    Case("Gather", [uniform(10, 4), ints(3, 1, 7)], given=(1,), ops=("gather",), id="embedding"),
    *(Case("Pad", [X], {"pads": [0, 0, 1, 2, 0, 1, 0, 1], "mode": m}, opsets=(7, 10), id=m)
      for m in ("constant", "reflect", "edge")),
    Case("Pad", [X, ints(0, 0, 1, 2, 0, 1, 0, 1), np.float32(1.5)],
         opsets=(11, 13, 18), id="operand"),
    Case("Pad", [X, ints(0, 0, -1, 2, 0, 0, 1, -2)],
         opsets=(11, 18), ops=("slice", "pad"), id="crop"),
    Case("Pad", [X, ints(1, 2), None, ints(-1)], opsets=(18, 21), ops=("pad",), id="axes"),
    Case("Pad", [X, ints(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "wrap"}, opsets=(19, 21), id="wrap"),
    # images
    Case("DepthToSpace", [uniform(1, 8, 2, 3)], {"blocksize": 2}, ops=("depth_to_space",)),
    Case("DepthToSpace", [uniform(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}, opsets=(11, 13),
         id="crd"),
    Case("SpaceToDepth", [uniform(1, 2, 4, 6)], {"blocksize": 2}, ops=("space_to_depth",)),
    *(Case("Upsample", [X], {"scales": [1, 1, 2, 1.5], "mode": m}, opsets=(7, 8), id=m)
      for m in ("nearest", "linear")),
    Case("Upsample", [X, np.float32([1, 1, 2, 3])], opsets=(9,), ops=("resize",), id="operand"),
    Case("Resize", [X, np.float32([1, 1, 2, 0.6])], opsets=(10,), ops=("resize", "resize")),
    *(
        # Aligned corners: with whole sizes only; else ONNX Runtime departs from ONNX's formula.
        Case("Resize", [X, np.float32([]), np.float32([1, 1, 2, 3] if c == "align_corners" else
                                                [1, 1, 1.5, 2.4])],
             {"mode": m, "coordinate_transformation_mode": c}, opsets=(11, 13, 18), id=f"{m}-{c}")
        for m in ("nearest", "linear", "cubic")
        for c in ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
    ),
    Case("Resize", [X, None, None, ints(2, 6, 3, 11)], {"mode": "linear"},
         opsets=(13, 19), id="sizes"),
    *(Case("Resize", [X, None, np.float32([2.5, 1.7])], {"nearest_mode": m, "axes": [2, 3]},
           opsets=(18, 19), id=m)
      for m in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")),
    # index notation
    *(
        Case("Einsum", [uniform(*("abhijke".index(c) + 1 for c in t))
                        for t in e.replace(" ", "").split("->")[0].split(",")],
             {"equation": e}, given=(0, 1, 2), opsets=(12, 17), id=e)
        for e in ("bij,bjk->bik", "bih, hje -> bjie", "ij,kj->ik", "ij,k->kji", "bij,bij->b", "ji",
                  "bhij,bhje,hek->bik", "ij,j", "ijk->j", "bi,bj->bij", "b,bij,j->bi", "i,i->")
    ),
    *(Case("OneHot", [ints(0, 3, -1, -4, 7, 2).reshape(2, 3), np.int64(4), np.float32([2, 5])],
           {"axis": axis}, opsets=(9, 11, 17), id=str(axis)) for axis in (-1, 0, 1)),
    Case("OneHot", [np.float32([1, 0]), ints(3), ints(0, 1)], opsets=(11,), id="other-dtypes"),
    # opaque
    Case("TopK", [X, ints(2)], {"axis": 1}, outputs=2, opsets=(11, 17), ops=("opaque",)),
    Case("Einsum", [uniform(2, 3, 3), uniform(2, 3, 3)], {"equation": "...ij,...jk->...ik"},
         given=(0, 1), opsets=(12, 17), ops=("opaque",)),
    Case("GatherElements", [X, np.zeros((2, 6, 7, 1), np.int64)], {"axis": 3}, opsets=(11, 13),
         ops=("opaque",)),
]  # fmt: skip


def model_of(case: Case, opset: int) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return the one-node model and its run-time inputs."""
    feeds, constants = {}, {}
    for i, a in enumerate(case.operands):
        if a is not None:
            (feeds if i in case.given else constants)[f"x{i}"] = np.asarray(a)
    names = ["" if a is None else f"x{i}" for i, a in enumerate(case.operands)]
    outputs = [f"y{i}" for i in range(case.outputs)]
    graph = helper.make_graph(
        [helper.make_node(case.op, names, outputs, **case.attrs)],
        "net",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in feeds.items()
        ],
        [helper.make_empty_tensor_value_info(o) for o in outputs],
        [numpy_helper.from_array(a, n) for n, a in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, 10)
    return model, feeds


@pytest.mark.parametrize(
    ("case", "opset"),
    [
        pytest.param(c, o, id=f"{c.op}{'-' if c.id else ''}{c.id}-{o}")
        for c in CASES
        for o in c.opsets
    ],
)
def test_operator(case: Case, opset: int) -> None:
    model, feeds = model_of(case, opset)
    graph = load_onnx(model)
    graph.verify()
    want = Session(model.SerializeToString(), optimization="disabled").run(feeds)
    got = run(graph, feeds)
    assert list(got) == list(want)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=2e-5)
    if case.ops:
        assert tuple(n.op.name for n in graph.nodes) == case.ops
