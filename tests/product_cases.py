# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized products in all the forms in which models bring them, by name.

`INTEGER` have an integer form; `FLOAT` have none, for the reason beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from block_models import integers
from product_models import Net

from qcompiler.types import DType

Make = Callable[[Net], str]
INTEGER: dict[str, Make] = {}
FLOAT: dict[str, tuple[Make, str]] = {}

EIGHT = (DType.INT8, DType.UINT8)
SIXTEEN = (DType.INT16, DType.UINT16)
STORAGES = (*EIGHT, *SIXTEEN, DType.INT4, DType.UINT4)
_MS = "com.microsoft"


def _named(name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        INTEGER[name] = make
        return make

    return add


def _add(name: str, make: Make) -> None:
    assert name not in INTEGER
    INTEGER[name] = make


def _float(name: str, reason: str, make: Make) -> None:
    FLOAT[name] = make, reason


# --------------------------------------------------------------------------- weights of all kinds

# Per operator: shapes of activations and weights, axis of columns, axis of blocks, attributes.
_SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int, dict[str, Any]]] = {
    "Conv": ((1, 20, 6, 6), (8, 20, 3, 3), 0, 1, {"pads": [1] * 4}),
    "Conv 1-D": ((1, 20, 9), (8, 20, 3), 0, 1, {}),
    "Conv 3-D": ((1, 20, 4, 5, 5), (8, 20, 3, 3, 3), 0, 1, {"pads": [1, 0, 0, 1, 1, 1]}),
    "Conv of groups": ((1, 40, 5, 5), (8, 10, 3, 3), 0, 1, {"group": 4}),
    "ConvTranspose": ((1, 20, 6, 6), (20, 4, 3, 3), 1, 0, {"strides": [2, 2]}),
    "ConvTranspose of groups": ((1, 20, 6, 6), (20, 4, 3, 3), 1, 0, {"group": 2}),
    "ConvTranspose 1-D": ((1, 20, 6), (20, 4, 4), 1, 0, {"strides": [2]}),
    "MatMul": ((3, 20), (20, 8), 1, 0, {}),
    "MatMul of matrices": ((4, 3, 20), (4, 20, 8), 2, 1, {}),
    "MatMul of matrices that share": ((3, 20), (2, 2, 20, 8), 3, 2, {}),
    "Gemm": ((20, 3), (8, 20), 0, 1, {"transA": 1, "transB": 1, "alpha": 0.5}),
}


def _weights(op: str, storage: DType, scales: str, zero: str) -> Make:
    x, w, columns, blocks, attributes = _SHAPES[op]
    axis = {"tensor": None, "columns": columns}.get(scales, blocks)
    size = int(scales) if scales.isdigit() else 0

    def make(net: Net) -> str:
        right = net.weights(*w, storage=storage, axis=axis, size=size, zero=zero)
        return net.node(op.split()[0], net.activations(*x), right, **attributes)

    return make


for _i, _op in enumerate(_SHAPES):
    for _j, _storage in enumerate(STORAGES):
        for _k, _scales in enumerate(("tensor", "columns", "3", "4", "8")):
            _zero = ("middle", "any", "far")[(_i + _j + _k) % 3]
            _add(f"{_op}, {_storage.value}, {_scales}", _weights(_op, _storage, _scales, _zero))

for _zero in ("middle", "any"):
    for _scales in ("columns", "4"):
        _add(
            f"more groups than columns, {_scales}, {_zero}",
            lambda net, a=0 if _scales == "columns" else 1, s=0 if _scales == "columns" else 4,
            z=_zero: net.node(
                "Conv", net.activations(1, 320, 4, 4), net.weights(80, 8, 3, 3, axis=a, size=s,
                zero=z), group=40
            ),
        )  # fmt: skip
    _add(
        f"depthwise, blocks of one, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv", net.activations(1, 40, 5, 5), net.weights(40, 1, 1, 1, axis=1, size=1, zero=z),
            group=40,
        ),
    )  # fmt: skip
    _add(
        f"a scale per matrix, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.activations(4, 3, 16), net.weights(4, 16, 8, axis=0, zero=z)
        ),
    )
    _add(
        f"more matrices than products, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.activations(70, 2, 8), net.weights(70, 8, 5, axis=1, size=8, zero=z)
        ),
    )
    for _depth in (8, 300):
        _add(
            f"zero points of many matrices of {_depth}, {_zero}",
            lambda net, z="far" if _zero == "any" else _zero, k=_depth: net.node(
                "MatMul",
                net.activations(70, 2, k),
                net.weights(70, k, 5, storage=SIXTEEN[k > 8], axis=0, zero=z),
            ),
        )
    for _size in (2, 3, 4):
        _add(
            f"many matrices in blocks of {_size}, {_zero}",
            lambda net, z=_zero, b=_size: net.node(
                "MatMul", net.activations(70, 2, 8), net.weights(70, 8, 5, axis=1, size=b, zero=z)
            ),
        )
    _add(
        f"a prime number of groups, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv",
            net.activations(1, 2 * 67, 3, 3),
            net.weights(67, 2, 3, 3, axis=1, size=1, zero=z),
            group=67,
        ),
    )
    _add(
        f"one matrix in axes of its own, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.activations(3, 2, 16), net.weights(1, 1, 16, 8, axis=2, size=4, zero=z)
        ),
    )

# --------------------------------------------------------------- activations with several scales


def _acts(op: str, x: tuple[int, ...], w: tuple[int, ...], axis: int, **more: Any) -> None:
    for i, storage in enumerate((*EIGHT, *SIXTEEN)):
        for zero in ("one", ("middle", "far", "any")[i % 3]):
            name = f"{op} of {list(x)} along {axis} by {list(w)}, {storage.value}, {zero}"

            def make(net: Net, storage: DType = storage, zero: str = zero) -> str:
                left = net.activations(*x, storage=storage, axis=axis, zero=zero)
                columns = len(w) - 1 if op == "MatMul" else 0
                right = net.weights(*w, axis=columns)
                bias = [net.floats(w[0])] if op == "Conv" else []
                return net.node(op, left, right, *bias, **more)

            _add(name, make)


_acts("MatMul", (2, 3, 16), (16, 8), 1)
_acts("MatMul", (2, 3, 16), (16, 8), 0)
_acts("MatMul", (2, 3, 16), (2, 16, 8), 1)
_acts("Conv", (3, 16, 5, 6), (8, 16, 3, 3), 0, pads=[1, 0, 1, 1])
_acts("Conv", (1, 16, 5, 6), (16, 1, 3, 3), 1, group=16, pads=[1, 0, 1, 1])
_acts("Conv", (2, 8, 5, 6), (16, 1, 3, 3), 1, group=8)
_acts("Conv", (3, 8, 7), (8, 1, 3), 1, group=8, pads=[1, 1])


def _coded(zero: str, turned: bool) -> Make:
    def make(net: Net) -> str:
        shape = (16, 3) if turned else (3, 16)
        scale, point, attributes = net.grid(shape, DType.UINT8, int(turned), 0, zero, 5.0)
        codes = net.input(*shape, kind=DType.UINT8)
        a = net.node("DequantizeLinear", codes, scale, point, **attributes)
        a = net.node("Transpose", a, perm=[1, 0]) if turned else a
        return net.node("MatMul", a, net.weights(16, 8, axis=1))

    return make


for _zero in ("one", "far"):
    _add(
        f"rows that a reshape joins, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.node(
                "Reshape",
                net.activations(2, 3, 16, axis=0, zero=z),
                net.constant(np.int64([6, 16])),
            ),
            net.weights(16, 8, axis=1),
        ),
    )
    _add(
        f"a depthwise convolution of channels, bias beyond int32, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv",
            net.activations(1, 8, 5, 5, axis=1, zero=z),
            net.weights(8, 1, 3, 3, axis=0),
            net.constant(np.full(8, 1e8, np.float32)),
            group=8,
            pads=[1] * 4,
        ),
    )
    _add(f"codes by row, {_zero}", _coded(_zero, False))
    _add(f"codes by row, transposed, {_zero}", _coded(_zero, True))

for _zero in ("middle", "one", "far"):
    _add(
        f"attention by head, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(2, 4, 3, 16, axis=1, zero=z),
            net.activations(2, 4, 16, 5, axis=3, zero=z),
        ),
    )
    _add(
        f"attention by image, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(4, 3, 16, axis=0, zero=z),
            net.activations(4, 16, 5, axis=0, zero=z, storage=DType.INT8),
        ),
    )
    _add(
        f"weights in blocks too, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(3, 24, axis=0, zero=z),
            net.weights(24, 8, axis=0, size=12, zero=z),
        ),
    )
    _add(
        f"convolution in blocks too, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv",
            net.activations(3, 24, 4, 4, axis=0, zero=z),
            net.weights(8, 24, 3, 3, axis=1, size=12, zero=z),
            net.floats(8),
            pads=[1] * 4,
        ),
    )
    _add(
        f"one block of each row, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.activations(3, 16, axis=1, size=16, zero=z), net.weights(16, 8)
        ),
    )
    _add(
        f"transposed activations, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.node("Transpose", net.activations(16, 3, axis=1, zero=z), perm=[1, 0]),
            net.weights(16, 8, axis=1),
        ),
    )
    _add(
        f"reshaped activations, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.node(
                "Reshape",
                net.activations(3, 4, 4, axis=0, zero=z),
                net.constant(np.int64([3, 16])),
            ),
            net.weights(16, 8, axis=1),
        ),
    )

# ------------------------------------------------------------------------------------- biases


def _biased(name: str, op: str, bias: Callable[[Net, int], str], **more: Any) -> None:
    x, w, columns, _, attributes = _SHAPES[op]

    def make(net: Net) -> str:
        left = net.activations(*x, storage=more.get("stored", DType.UINT8))
        right = net.weights(
            *w, axis=more.get("axis", columns), size=more.get("size", 0), zero="middle"
        )
        return net.node(op.split()[0], left, right, bias(net, w[columns]), **attributes)

    _add(f"{name}, {op} {more}", make)


def _dequantized_bias(net: Net, n: int) -> str:
    codes = net.input(n, kind=DType.INT32)
    return net.node("DequantizeLinear", codes, net.constant(np.float32(1e-9)))


def _dequantized_by_column(net: Net, n: int) -> str:
    codes = net.input(n, kind=DType.INT32)
    scale = net.constant(np.linspace(1, 2, n).astype(np.float32) * 1e-9)
    return net.node("DequantizeLinear", codes, scale, axis=0)


for _op in ("Conv", "Conv 1-D", "Conv 3-D", "ConvTranspose", "Gemm"):
    _biased("computed bias", _op, lambda net, n: net.input(n))
    _biased("computed bias of integers", _op, _dequantized_bias)
    _biased("computed bias of 8 bits", _op, lambda net, n: net.activations(n))
for _op in ("Conv", "Gemm"):
    _biased("computed bias by column", _op, _dequantized_by_column)
    _biased("computed bias", _op, lambda net, n: net.input(n), stored=DType.INT16)
    _biased("computed bias", _op, lambda net, n: net.input(n), axis=1, size=8)
    _biased("bias beyond int32", _op, lambda net, n: net.constant(np.full(n, 1e9, np.float32)))

_add(
    "bias of a matrix",
    lambda net: net.node(
        "Gemm", net.activations(3, 16), net.weights(16, 8, axis=1), net.input(3, 8), beta=0.25
    ),
)
_add(
    "bias of a number",
    lambda net: net.node("Gemm", net.activations(3, 16), net.weights(16, 8, axis=1), net.floats(1)),
)

# -------------------------------------------------------------------------------- forms of weights

for _zero in ("middle", "far"):
    _add(
        f"left weights, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.weights(8, 16, axis=0, zero=z), net.activations(16, 5)
        ),
    )
    _add(
        f"left weights in blocks, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.weights(8, 16, axis=1, size=8, zero=z), net.activations(2, 16, 5)
        ),
    )
    _add(
        f"left matrices, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul", net.weights(2, 8, 16, axis=1, zero=z), net.activations(2, 16, 5)
        ),
    )
    _add(
        f"transposed weights, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(3, 16),
            net.node("Transpose", net.weights(8, 16, axis=0, zero=z), perm=[1, 0]),
        ),
    )
    _add(
        f"transposed weights in blocks, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(3, 16),
            net.node("Transpose", net.weights(8, 16, axis=1, size=4, zero=z), perm=[1, 0]),
        ),
    )
    _add(
        f"reshaped weights, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv",
            net.activations(1, 16, 4, 4),
            net.node(
                "Reshape", net.weights(8, 16, axis=0, zero=z), net.constant(np.int64([8, 16, 1, 1]))
            ),
        ),
    )
    _add(
        f"reshaped weights of columns, {_zero}",
        lambda net, z=_zero: net.node(
            "MatMul",
            net.activations(3, 16),
            net.node(
                "Reshape", net.weights(16, 2, 4, axis=2, zero=z), net.constant(np.int64([16, 8]))
            ),
        ),
    )
    _add(
        f"reshaped weights in blocks, {_zero}",
        lambda net, z=_zero: net.node(
            "Conv",
            net.activations(1, 16, 4, 4),
            net.node(
                "Unsqueeze",
                net.weights(8, 16, axis=1, size=4, zero=z),
                net.constant(np.int64([2, 3])),
            ),
        ),
    )
    _add(
        f"a vector of activations, {_zero}",
        lambda net, z=_zero: net.node("MatMul", net.activations(16), net.weights(16, 8, zero=z)),
    )
    _add(
        f"a vector of weights, {_zero}",
        lambda net, z=_zero: net.node("MatMul", net.activations(3, 16), net.weights(16, zero=z)),
    )

_add(
    "reshaped codes",
    lambda net: net.node(
        "MatMul",
        net.node("Reshape", net.activations(3, 4, 4), net.constant(np.int64([3, 16]))),
        net.weights(16, 8),
    ),
)
_add(
    "Gemm of activations",
    lambda net: net.node(
        "Gemm", net.activations(3, 16), net.activations(16, 8), net.floats(8), alpha=0.5
    ),
)
_add(
    "Gemm of activations by row and column",
    lambda net: net.node(
        "Gemm",
        net.activations(16, 3, axis=1, zero="far"),
        net.activations(8, 16, axis=0, zero="far"),
        net.floats(8),
        transA=1,
        transB=1,
    ),
)
_add(
    "Gemm of activations by row",
    lambda net: net.node(
        "Gemm",
        net.activations(16, 3, axis=1, zero="far", storage=DType.INT16),
        net.activations(8, 16, zero="far"),
        transA=1,
        transB=1,
    ),
)
_add(
    "Gemm of blocks, plus a matrix",
    lambda net: net.node(
        "Gemm",
        net.activations(3, 16),
        net.weights(16, 8, axis=0, size=4),
        net.floats(3, 8),
        alpha=0.5,
    ),
)


@_named("shared weights")
def _shared(net: Net) -> str:
    w = net.weights(16, 16, axis=1)
    parts = [net.node("MatMul", net.activations(3, 16), w) for _ in range(2)]
    return net.node("Add", *parts)


@_named("shared weights in blocks")
def _shared_blocks(net: Net) -> str:
    w = net.weights(16, 16, axis=0, size=4)
    parts = [net.node("MatMul", net.activations(3, 16), w) for _ in range(2)]
    return net.node("Add", *parts)


@_named("activations shared by a row's and a column's product")
def _shared_activations(net: Net) -> str:
    a = net.activations(16, 16, axis=0)
    turned = net.node("Transpose", net.activations(16, 16, axis=1), perm=[1, 0])
    parts = [net.node("MatMul", x, net.weights(16, 16, axis=1)) for x in (a, a, turned)]
    return net.node("Add", net.node("Add", *parts[:2]), parts[2])


# --------------------------------------------------------------------- operators on the codes


def _qlinear(op: str, storage: DType, zero: str, by_column: bool) -> Make:
    conv = "Conv" in op
    x = (1, 16, 6, 6) if conv else (3, 16)
    w = (8, 16, 3, 3) if conv else (8, 16) if op == "QGemm" else (16, 8)
    axis = (0 if conv or op == "QGemm" else 1) if by_column else None

    def make(net: Net) -> str:
        held = net.constant(integers(net.rng, storage, w), storage)
        scale, point, _ = net.grid(w, storage, axis, 0, zero, 1.0)
        if op == "DynamicQuantizeMatMul":
            return net.node(op, net.input(*x, far=False), held, scale, point, domain=_MS)
        s, z, _ = net.grid((), DType.UINT8, None, 0, "any", 5.0)
        q = net.node("QuantizeLinear", net.input(*x), s, z)
        if op.endswith("Integer"):
            return net.node("Cast", net.node(op, q, held, z, point), to=1)
        if op == "QGemm":
            bias = net.constant(np.arange(8).astype(np.int32))
            return net.node(op, q, s, z, held, scale, point, bias, domain=_MS, alpha=0.5, transB=1)
        ys, yz = net.constant(np.float32(0.15)), net.constant(np.asarray(99), DType.UINT8)
        y = net.node(op, q, s, z, held, scale, point, ys, yz)
        return net.node("DequantizeLinear", y, ys, yz)

    return make


for _op in (
    "QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "ConvInteger",
    "DynamicQuantizeMatMul",
):  # fmt: skip
    for _storage in EIGHT:
        for _zero in ("middle", "any", "far"):
            for _by in (False, True):
                if _op == "ConvInteger" and _by:
                    continue  # ONNX Runtime refuses
                _name = f"{_op}, {_storage.value}, {'columns' if _by else 'tensor'}, {_zero}"
                _add(_name, _qlinear(_op, _storage, _zero, _by))

# ----------------------------------------------------------------------------- no integer form

_NO_ONE = "what is summed has no one scale"
_float(
    "weights by row",
    f"weights have scales along axis 0: {_NO_ONE}",
    lambda net: net.node("MatMul", net.activations(3, 16), net.weights(16, 8, axis=0)),
)
_float(
    "weights by channel",
    f"weights have scales along axis 1: {_NO_ONE}",
    lambda net: net.node("Conv", net.activations(1, 16, 6, 6), net.weights(8, 16, 3, 3, axis=1)),
)
_float(
    "transposed by column",
    f"scales along axis 0: {_NO_ONE}",
    lambda net: net.node(
        "ConvTranspose", net.activations(1, 16, 6, 6), net.weights(16, 8, 3, 3, axis=0)
    ),
)
_float(
    "blocks of columns",
    f"blocks along axis 1: {_NO_ONE}",
    lambda net: net.node("MatMul", net.activations(3, 16), net.weights(16, 8, axis=1, size=4)),
)
_float(
    "blocks of channels",
    f"blocks along axis 0: {_NO_ONE}",
    lambda net: net.node(
        "Conv", net.activations(1, 16, 5, 5), net.weights(8, 16, 3, 3, axis=0, size=4)
    ),
)
_float(
    "blocks of a window",
    f"blocks along axis 3: {_NO_ONE}",
    lambda net: net.node(
        "Conv", net.activations(1, 16, 5, 5), net.weights(8, 16, 4, 4, axis=3, size=2)
    ),
)
_float(
    "activations in blocks of one",
    f"activations have scales in blocks along axis 1: {_NO_ONE}",
    lambda net: net.node("MatMul", net.activations(3, 16, axis=1, size=1), net.weights(16, 8)),
)
_float(
    "activations by column",
    f"activations have scales along axis 1: {_NO_ONE}",
    lambda net: net.node("MatMul", net.activations(3, 16, axis=1), net.weights(16, 8)),
)
_float(
    "activations by channel",
    f"activations have scales along axis 1: {_NO_ONE}",
    lambda net: net.node(
        "Conv", net.activations(1, 16, 6, 6, axis=1), net.weights(8, 16, 3, 3, axis=0)
    ),
)
_float(
    "left by column",
    f"left operand has scales along axis 1: {_NO_ONE}",
    lambda net: net.node("MatMul", net.activations(3, 16, axis=1), net.activations(16, 8)),
)
_float(
    "blocks that a concat joins",
    "left operand has scales in blocks along axis 1, which lie along none after a concat",
    lambda net: net.node(
        "MatMul",
        net.node("Concat", *(net.activations(3, 16, axis=1, size=8) for _ in range(2)), axis=0),
        net.weights(16, 8),
    ),
)
_float(
    "zero points of many deep matrices",
    "its weights exceed 16 bits when their zero points are taken off",
    lambda net: net.node(
        "MatMul",
        net.activations(70, 2, 300, storage=DType.UINT16),
        net.weights(70, 300, 5, storage=DType.UINT16, axis=0, zero="far"),
    ),
)
_float(
    "depthwise, a scale per weight",
    "its weights have a scale each: no integers are summed",
    lambda net: net.node(
        "Conv",
        net.activations(1, 40, 5, 5),
        net.weights(40, 1, 3, 3, axis=1, size=1),
        net.floats(40),
        group=40,
    ),
)
_float(
    "float weights",
    "its right operand is float",
    lambda net: net.node("MatMul", net.activations(3, 16), net.floats(16, 8)),
)
