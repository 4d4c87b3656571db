# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Every quantized operator of ONNX and ONNX Runtime, alone, against ONNX Runtime.

Random data with the extreme codes, scales without ties; and the operator that it becomes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from qcompiler.driver import quantize_model
from qcompiler.interpreter import run
from qcompiler.types import Array

MS = "com.microsoft"
INTEGER = frozenset(
    {"qconv", "qmatmul", "qadd", "qmul", "table", "qaverage_pool", "qreduce_mean", "requantize"}
)
Operand = tuple[str, Any] | None


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        name: For the report.
        op: Operator.
        operands: (name, array), where names of one letter are inputs; None: left out.
        domain: Of the operator.
        attrs: Of the operator.
        opset: Of ONNX.
        becomes: Some integer operator that it must become, if any.
        floats: Tolerance of float results, as a share of the greatest.
    """

    name: str
    op: str
    operands: Sequence[Operand]
    domain: str = ""
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    becomes: str = ""
    floats: float = 1e-5

    def __str__(self) -> str:
        return self.name


RNG = np.random.default_rng(11)


def f4(*values: float) -> Array:
    return np.array(values if len(values) > 1 else values[0], np.float32)


def codes(dtype: Any, *shape: int) -> Array:
    info = np.iinfo(dtype)
    made = RNG.integers(info.min, info.max + 1, shape).astype(dtype)
    made.reshape(-1)[:3] = [info.min, info.max, info.max // 2]
    return made


def cases() -> list[Case]:
    """The operators; scales are chosen so that no result lies on a tie."""
    made = []
    for dtype, shift in ((np.uint8, 0), (np.int8, -128)):
        t = np.dtype(dtype).name

        def z(v: int, dtype: Any = dtype, shift: int = shift) -> tuple[str, Array]:
            return f"z{v}", np.array(v + shift, dtype)

        a = ("x", codes(dtype, 3, 40)), ("sa", f4(0.051237)), z(131)
        b = ("w", codes(dtype, 3, 40)), ("sb", f4(0.030911)), z(100)
        y = ("sy", f4(0.071713)), z(120)
        image = (("x", codes(dtype, 2, 6, 9, 8)), *a[1:])
        for op, becomes in (("QLinearAdd", "qadd"), ("QLinearMul", "qmul")):
            vector = (("vector", b[0][1][:1]), *b[1:])
            saturating = ("sy", f4(0.0071713)), z(120)
            made += [
                Case(f"{op} {t}", op, (*a, *b, *y), MS, becomes=becomes),
                Case(f"{op} {t} vector", op, (*a, *vector, *y), MS, becomes=becomes),
                Case(f"{op} {t} saturating", op, (*a, *b, *saturating), MS, becomes=becomes),
            ]
        pool = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        over = {**pool, "ceil_mode": 1, "count_include_pad": 1}
        parts = (*y, *a, *b, ("constant", codes(dtype, 3, 5)), *y)
        shares = ("sp", f4(1 / 256)), z(0)
        made += [
            Case(f"QLinearSigmoid {t}", "QLinearSigmoid", (*a, *shares), MS, becomes="table"),
            Case(f"QLinearLeakyRelu {t}", "QLinearLeakyRelu", (*a, *y), MS, {"alpha": 0.1},
                 becomes="table"),
            Case(f"QLinearGlobalAveragePool {t}", "QLinearGlobalAveragePool", (*image, *y), MS,
                 {"channels_last": 0}, becomes="qreduce_mean"),
            Case(f"QLinearGlobalAveragePool {t} last", "QLinearGlobalAveragePool", (*image, *y), MS,
                 {"channels_last": 1}, becomes="qreduce_mean"),
            Case(f"QLinearAveragePool {t}", "QLinearAveragePool", (*image, *y), MS, pool,
                 becomes="qaverage_pool"),
            Case(f"QLinearAveragePool {t} beyond the padding", "QLinearAveragePool", (*image, *y),
                 MS, over, becomes="qaverage_pool"),
            Case(f"QLinearConcat {t}", "QLinearConcat", parts, MS, {"axis": 1},
                 becomes="requantize"),
        ]  # fmt: skip
        for weights, zero in ((np.uint8, 117), (np.int8, 0), (np.int8, 5)):
            if dtype is np.int8 and weights is np.uint8:
                continue  # ONNX Runtime has no such kernel
            name = f"{t} {np.dtype(weights).name} {zero}"
            wz = ("wz", np.array(zero, weights))
            columns = ("sc", RNG.uniform(0.01, 0.03, 16).astype(np.float32))
            zeros = ("zc", np.full(16, zero, weights))
            one = (("matrix", codes(weights, 40, 16)), ("sw", f4(0.020913)), wz)
            turned = (("matrix", codes(weights, 16, 40)), columns, zeros)
            wide = ("sy", f4(1.071713)), z(120)
            bias = ("bias", RNG.integers(-9999, 9999, 16).astype(np.int32))
            kernel = (("kernel", codes(weights, 16, 3, 3, 3)), columns, zeros)
            whole = (("kernel", codes(weights, 16, 6, 3, 3)), *one[1:])
            if weights is np.uint8 or zero == 0:
                made += [
                    Case(f"QLinearConv {name}", "QLinearConv", (*image, *whole, *wide, bias),
                         attrs={"pads": [1, 1, 1, 1]}, becomes="qconv"),
                    Case(f"QLinearConv {name} groups", "QLinearConv", (*image, *kernel, *wide),
                         attrs={"group": 2, "strides": [2, 2]}, becomes="qconv"),
                ]  # fmt: skip
            stacked = (("w", codes(weights, 2, 40, 16)), *one[1:])
            made += [
                Case(f"ConvInteger {name}", "ConvInteger",
                     (image[0], whole[0], image[2], wz), becomes="qconv"),
                Case(f"QLinearMatMul {name}", "QLinearMatMul", (*a, *one, *wide),
                     becomes="qmatmul"),
                Case(f"QLinearMatMul {name} stacked", "QLinearMatMul", (*a, *stacked, *wide),
                     becomes="qmatmul"),
                Case(f"MatMulInteger {name}", "MatMulInteger", (a[0], one[0], a[2], wz),
                     becomes="qmatmul"),
                Case(f"QGemm {name}", "QGemm", (*a, *turned, bias, *wide), MS,
                     {"transB": 1, "alpha": 0.5}, becomes="qmatmul"),
                Case(f"QGemm {name} to floats", "QGemm", (*a, *one), MS, becomes="qmatmul"),
            ]  # fmt: skip
            if dtype is np.uint8:
                made += [
                    Case(f"DynamicQuantizeMatMul {name}", "DynamicQuantizeMatMul",
                         (("x", (RNG.standard_normal((5, 40)) * 3).astype(np.float32)), one[0],
                          columns, zeros, ("add", f4(*RNG.standard_normal(16)))), MS,
                         becomes="qmatmul"),
                    Case(f"DynamicQuantizeMatMul {name} of zeros", "DynamicQuantizeMatMul",
                         (("x", np.zeros((5, 40), np.float32)), *one), MS, becomes="qmatmul"),
                    Case(f"MatMulIntegerToFloat {name}", "MatMulIntegerToFloat",
                         (a[0], one[0], a[1], columns, a[2], zeros), MS, becomes="qmatmul"),
                ]  # fmt: skip
    x = ("x", (RNG.standard_normal((6, 64)) * 9).astype(np.float32))
    made.append(Case("DynamicQuantizeLinear", "DynamicQuantizeLinear", (x,), outputs=3))
    for bits in (4, 8):
        packed = ("q", RNG.integers(0, 256, (24, 2, 32 * bits // 8)).astype(np.uint8))
        scales = ("scales", RNG.uniform(0.01, 0.1, 48).astype(np.float32))
        zeros = ("zeros", RNG.integers(0, 256, 48 * bits // 8).astype(np.uint8))
        sizes = {"K": 64, "N": 24, "bits": bits, "block_size": 32}
        packed = ("packed", packed[1])
        for last in ((), (zeros,)):
            made.append(
                Case(f"MatMulNBits {bits} {len(last)}", "MatMulNBits", (x, packed, scales, *last),
                     MS, sizes)
            )  # fmt: skip
    return [*made, *pairs(x)]


def pairs(x: tuple[str, Array]) -> list[Case]:
    """QuantizeLinear to, and DequantizeLinear from, every storage and granularity."""
    made = []
    for t in ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4"):
        dtype = helper.tensor_dtype_to_np_dtype(getattr(onnx.TensorProto, t))
        unsigned = t.startswith("U")
        limit = 1 << (int(t.lstrip("UINT")) - 1)
        middle = limit if unsigned else 0
        for name, shape, attrs in (
            ("tensor", (), {}),
            ("axis", (6,), {"axis": 0}),
            ("blocks", (6, 4), {"axis": 1, "block_size": 16}),
        ):
            scale = RNG.uniform(9, 11, shape).astype(np.float32) / np.float32(limit)
            zero = np.full(shape, middle).astype(dtype)
            grid = (("scale", scale), ("zero", zero))
            stored = RNG.integers(0, 2 * limit, (6, 64)) - (0 if unsigned else limit)
            made += [
                Case(f"QuantizeLinear {t} {name}", "QuantizeLinear", (x, *grid), attrs=attrs),
                Case(f"DequantizeLinear {t} {name}", "DequantizeLinear",
                     (("stored", stored.astype(dtype)), *grid), attrs=attrs),
            ]  # fmt: skip
            if name != "blocks" and not t.endswith("4"):
                made.append(
                    Case(f"DequantizeLinear {t} {name} of an input", "DequantizeLinear",
                         (("x", stored.astype(dtype)), *grid), attrs=attrs)
                )  # fmt: skip
    return made


def model_of(case: Case) -> tuple[onnx.ModelProto, dict[str, Array]]:
    inputs, constants, names = [], [], []
    feeds: dict[str, Array] = {}
    for i, operand in enumerate(case.operands):
        if operand is None:
            names.append("")
            continue
        name, array = operand
        if len(name) == 1:
            dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
            inputs.append(helper.make_tensor_value_info(name, dtype, array.shape))
            feeds[name] = array
        else:
            name = f"{name}_{i}"
            constants.append(numpy_helper.from_array(array, name))
        names.append(name)
    results = [f"y{i}" for i in range(case.outputs)]
    nodes = [helper.make_node(case.op, names, results, "n", domain=case.domain, **case.attrs)]
    if case.op == "QuantizeLinear" and "INT4" in case.name:  # numpy has no such results
        nodes.append(
            helper.make_node("DequantizeLinear", [*results, *names[1:]], ["z"], **case.attrs)
        )
        results = ["z"]
    outputs = [helper.make_empty_tensor_value_info(r) for r in results]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", case.opset), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), feeds


def reference(model: onnx.ModelProto, feeds: dict[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("case", cases(), ids=str)
def test_alone(case: Case) -> None:
    model, feeds = model_of(case)
    want = reference(model, feeds)
    graph = quantize_model(model, precision="fp32").graph
    found = run(graph, feeds)
    for name, expected in want.items():
        assert found[name].shape == expected.shape
        assert found[name].dtype == expected.dtype
        if expected.dtype.kind == "f":
            error = np.abs(found[name] - expected).max() / max(np.abs(expected).max(), 1e-9)
            assert error < case.floats
        else:
            np.testing.assert_array_equal(found[name], expected)
    names = [n.op.name for n in graph.nodes]
    if case.becomes:
        assert case.becomes in names
        assert not {"conv", "matmul"} & set(names)
