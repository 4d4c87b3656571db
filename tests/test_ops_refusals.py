# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What each operator refuses, and in which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from operator_cases import fp, qp, u8

from qcompiler.errors import QCompilerError, ShapeError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.types import DType, PerAxis, PerGroup, QuantParams, TensorType

CONV = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1)}
POOL = {"kernel": (3, 3), **CONV}
WEIGHT = QuantParams(
    np.array([1, 2], np.float32), np.zeros(2, int), DType.INT8, -127, 127, PerAxis(0)
)
GROUPED = QuantParams(
    np.ones((4, 2), np.float32), np.zeros((4, 2), int), DType.INT8, -127, 127, PerGroup(1, 2)
)

REFUSALS: list[tuple[str, list[TensorType | None], dict[str, Any], str]] = [
    ("relu", [u8(3)], {}, r"relu: operand 'x' is quantized"),
    ("relu", [TensorType((3,), DType.BOOL)], {}, "expected numbers"),
    ("exp", [TensorType((3,), DType.INT32)], {}, "expected a floating-point tensor"),
    ("not", [fp(3)], {}, "expected bool"),
    ("add", [fp(3), TensorType((3,), DType.INT32)], {}, "'b' is int32, expected float32"),
    ("add", [fp(2, 3), fp(2, 4)], {}, r"shapes \[2, 3\] and \[2, 4\] do not broadcast"),
    ("and", [fp(2), fp(2)], {}, "expected bool"),
    ("where", [fp(2), fp(2), fp(2)], {}, "'cond' is float32"),
    ("where", [TensorType((2,), DType.BOOL), fp(2), None], {}, "takes"),
    ("conv", [fp(1, 3), fp(2, 3)], CONV, "expected rank 3 or more"),
    ("conv", [fp(1, 3, 5, 5), fp(2, 3, 3)], CONV, "expected rank 4 like 'x'"),
    ("conv", [fp(1, 3, 5, 5), fp(2, 4, 3, 3)], CONV, "'x' has 3 channels, 'w' expects 4 x group 1"),
    ("conv", [fp(1, 4, 5, 5), fp(3, 2, 3, 3)], {**CONV, "group": 2}, "not a multiple of group 2"),
    ("conv", [fp(1, 3, 2, 2), fp(2, 3, 3, 3)], CONV, "does not fit the extents"),
    ("conv", [fp(1, 3, 5, 5), fp(2, 3, 3, 3), fp(3)], CONV, r"shape \[3\], expected \[2\]"),
    (
        "conv",
        [fp(1, 3, 5, 5), fp(2, 3, 3, 3), None, fp(1, 2, 5, 5)],
        CONV,
        r"'residual' has shape \[1, 2, 5, 5\], expected \[1, 2, 3, 3\]",
    ),
    (
        "conv",
        [fp(1, 3, 5, 5), fp(2, 3, 3, 3)],
        {**CONV, "strides": (1,)},
        "expected 2 integers >= 1",
    ),
    ("conv", [fp(1, 3, 5, 5), fp(2, 3, 3, 3)], {**CONV, "layout": "CHWN"}, "layout 'CHWN'"),
    (
        "conv_transpose",
        [fp(1, 3, 5, 5), fp(2, 3, 3, 3)],
        {**CONV, "output_padding": (0, 0)},
        "'x' has 3 channels, 'w' expects 2",
    ),
    (
        "conv_transpose",
        [fp(1, 2, 1, 1), fp(2, 3, 1, 1)],
        {**CONV, "pads": (1, 1, 0, 0), "output_padding": (0, 0)},
        "leave nothing",
    ),
    ("matmul", [fp(3, 4), fp(5, 6)], {}, "inner extents 4 and 5 differ"),
    ("matmul", [fp(), fp(5, 6)], {}, "its rank is too small"),
    ("matmul", [fp(3, 4), fp(4, 6), fp(3)], {}, r"shape \[3\], expected \[6\]"),
    ("max_pool", [fp(1, 3)], POOL, "expected rank 3 or more"),
    ("average_pool", [fp(1, 3, 2, 2)], POOL, "does not fit the extents"),
    ("reduce_sum", [fp(2, 3)], {"axes": (2,)}, "axis 2 is outside a tensor of rank 2"),
    ("reduce_sum", [fp(2, 3)], {"axes": (1, -1)}, "not distinct"),
    ("softmax", [fp(2, 3)], {"axis": 5}, "axis 5 is outside"),
    ("layer_norm", [fp(2, 3), fp(4)], {}, "expected shape|do not broadcast"),
    ("batch_norm", [fp(2, 3), fp(3), fp(3), fp(3), fp(2)], {}, r"'var' has shape \[2\]"),
    ("concat", [fp(2, 3), fp(2, 3, 1)], {"axis": 0}, "operand 1 is"),
    ("concat", [u8(2), u8(2, q=qp(0.2))], {"axis": 0}, "expected the quantization of"),
    ("concat", [u8(2), TensorType((2,), DType.UINT8)], {"axis": 0}, "all or no operands"),
    ("split", [fp(2, 3)], {"axis": 1, "sizes": (1, 1)}, "do not add up to 3"),
    (
        "slice",
        [fp(3)],
        {"starts": (0,), "ends": (1,), "axes": (0,), "steps": (0,)},
        "step of axis 0 is 0",
    ),
    ("slice", [fp(3)], {"starts": (0,), "ends": (), "axes": (0,), "steps": (1,)}, "differ in len"),
    ("pad", [fp(3)], {"pads": (1, 1), "mode": "odd"}, "mode 'odd'"),
    ("pad", [fp(3)], {"pads": (-2, -2)}, "leave the shape"),
    ("pad", [fp(3)], {"pads": (3, 0), "mode": "reflect"}, "exceed the extents"),
    ("reshape", [fp(2, 3)], {"shape": (4,)}, "has 6 elements"),
    ("transpose", [fp(2, 3)], {"perm": (0, 0)}, "is no permutation"),
    (
        "transpose",
        [TensorType((4, 4), DType.INT8, GROUPED)],
        {"perm": (1, 0)},
        r"has per_group\(1,2\) scales",
    ),
    ("reshape", [TensorType((2, 3), DType.INT8, WEIGHT)], {"shape": (3, 2)}, "expected one scale"),
    ("expand", [fp(2, 3)], {"shape": (2, 2)}, "do not broadcast"),
    ("tile", [fp(2, 3)], {"repeats": (2,)}, "expected 2 integers"),
    ("gather", [fp(2, 3), fp(1)], {}, "expected integers"),
    ("depth_to_space", [fp(1, 3, 2, 2)], {"blocksize": 2}, "does not split into blocks"),
    ("depth_to_space", [fp(1, 4, 2, 2)], {"blocksize": 2, "mode": "X"}, "expected DCR or CRD"),
    ("space_to_depth", [fp(1, 3, 3, 2)], {"blocksize": 2}, "does not split into blocks"),
    ("resize", [fp(2)], {"scales": (2.0,), "shape": (4,), "mode": "area"}, "mode 'area'"),
    ("resize", [fp(2)], {"scales": (0.0,), "shape": (4,)}, "expected 1 positive"),
    ("resize", [u8(2)], {"scales": (2.0,), "shape": (4,), "mode": "linear"}, "is quantized"),
    ("cast", [fp(2)], {"to": "string"}, "dtype 'string' is unknown"),
    ("dequantize", [fp(2)], {}, "expected a quantized tensor"),
    ("requantize", [fp(2)], {}, "expected a quantized tensor"),
    (
        "qconv",
        [u8(1, 3, 5, 5), fp(2, 3, 3, 3)],
        CONV,
        "'w' is float32.*expected a quantized tensor",
    ),
    (
        "qconv",
        [
            u8(1, 3, 5, 5),
            TensorType((2, 3, 3, 3), DType.INT8, WEIGHT),
            TensorType((2,), DType.FLOAT32),
        ],
        CONV,
        "expected int32",
    ),
    (
        "qconv",
        [u8(1, 3, 5, 5), TensorType((3, 3, 3, 3), DType.INT8, WEIGHT)],
        CONV,
        "has 2 scales for 3 channels",
    ),
    (
        "qmatmul",
        [u8(3, 2), TensorType((2, 4), DType.INT8, WEIGHT)],
        {},
        r"has per_axis\(0\) scales, expected per_tensor or per_axis\(1\)",
    ),
    ("qadd", [u8(3), fp(3)], {}, "'b' is float32"),
    (
        "qadd",
        [u8(3), TensorType((3,), DType.INT32, qp(storage=DType.INT32))],
        {},
        "16 bits or less",
    ),
    ("table", [u8(3), fp(255)], {}, r"shape \[255\], expected \[256\]"),
    ("table", [TensorType((3,), DType.INT16, qp(storage=DType.INT16)), fp(256)], {}, "8-bit"),
    ("qsoftmax", [TensorType((3,), DType.INT16, qp(storage=DType.INT16))], {}, "float32 or 8-bit"),
    ("qlayer_norm", [u8(2, 3), fp(2), fp(3)], {}, r"'scale' has shape \[2\], expected \[3\]"),
]


@pytest.mark.parametrize(("op", "types", "attrs", "message"), REFUSALS)
def test_refusals_say_what_is_wrong(op, types, attrs, message):
    g = Graph("one", Stage.INTEGER)
    values = [None if t is None else g.add_input("x", t) for t in types]
    with pytest.raises(QCompilerError, match=message) as caught:
        g.add(op, values, attrs)
    if message != "takes":
        assert isinstance(caught.value, ShapeError)
    assert len(g) == 0
