# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of activations in blocks along what is summed, in the forms in which models bring them.

All of `CASES` have an integer form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from product_models import Net

from qcompiler.types import DType

Make = Callable[[Net], str]
CASES: dict[str, Make] = {}

STORAGES = (DType.INT8, DType.UINT8, DType.INT16, DType.UINT16)
WEIGHTS = (*STORAGES, DType.INT4, DType.UINT4)
_ZEROS = ("one", "middle", "any", "far")


def blocks(net: Net, *shape: int, axis: int = -1, size: int, **more: Any) -> str:
    """Activations in blocks; ONNX Runtime's do not saturate what lies far off."""
    x = net.input(*shape, far=False)
    return net.activations(*shape, axis=axis % len(shape), size=size, x=x, **more)


def _add(name: str, make: Make) -> None:
    assert name not in CASES
    CASES[name] = make


def _matmul(x: tuple[int, ...], run: int, **weights: Any) -> Callable[[DType, str], Make]:
    def of(storage: DType, zero: str) -> Make:
        def make(net: Net) -> str:
            left = blocks(net, *x, size=run, storage=storage, zero=zero)
            return net.node("MatMul", left, net.weights(x[-1], 9, zero=zero, **weights))

        return make

    return of


for _i, _storage in enumerate(STORAGES):
    for _j, _zero in enumerate(_ZEROS):
        for _k, _size in enumerate((2, 3, 8, 16, 20)):  # of 24: also such that do not divide it
            _other = WEIGHTS[(_i + _j + _k) % len(WEIGHTS)]
            _by: dict[str, Any] = ({}, {"axis": 1}, {"axis": 0, "size": 8})[(_i + _j + _k) % 3]
            _add(
                f"{_storage.value} in blocks of {_size} by {_other.value}, {_by}, {_zero}",
                _matmul((3, 24), _size, storage=_other, **_by)(_storage, _zero),
            )

for _i, (_size, _other_size) in enumerate(
    [(8, 8), (16, 8), (8, 16), (8, 12), (3, 4), (5, 7), (24, 3), (40, 48)]
):
    for _j, _other in enumerate((DType.INT8, DType.UINT4, DType.UINT16)):
        _zero = _ZEROS[(_i + _j) % 4]
        _add(
            f"blocks of {_size} by {_other.value} in blocks of {_other_size}, {_zero}",
            _matmul((5, 48), _size, storage=_other, axis=0, size=_other_size)(
                STORAGES[(_i + 3 * _j) % 4], _zero
            ),
        )

for _i, _x in enumerate([(1, 16), (2, 3, 16), (2, 1, 3, 16)]):
    for _storage in (DType.INT8, DType.UINT16):
        for _zero in ("one", "far"):
            _add(f"rank {len(_x)}, {_storage.value}, {_zero}", _matmul(_x, 8)(_storage, _zero))


def _turned(storage: DType, zero: str, bias: bool) -> Make:
    def make(net: Net) -> str:
        a = blocks(net, 24, 3, axis=0, size=8, storage=storage, zero=zero)
        b = net.weights(9, 24, axis=1, size=12, zero=zero)
        more = [net.floats(9)] if bias else []
        return net.node("Gemm", a, b, *more, transA=1, transB=1, alpha=0.5)

    return make


def _computed_bias(net: Net) -> str:
    a = blocks(net, 3, 24, size=8)
    return net.node("Gemm", a, net.weights(24, 9, axis=1), net.input(9))


def _reshaped(net: Net, zero: str) -> str:
    a = blocks(net, 3, 4, 8, size=4, zero=zero)
    a = net.node("Reshape", a, net.constant(np.int64([3, 32])))
    return net.node("MatMul", a, net.weights(32, 9, axis=1))


def _cut_by_reshape(net: Net, zero: str) -> str:
    a = blocks(net, 3, 16, size=8, zero=zero)
    a = net.node("Reshape", a, net.constant(np.int64([6, 8])))
    return net.node("MatMul", a, net.weights(8, 8))


def _transposed(net: Net, zero: str) -> str:
    a = blocks(net, 2, 16, 3, axis=1, size=4, zero=zero)
    a = net.node("Transpose", a, perm=[0, 2, 1])
    return net.node("MatMul", a, net.weights(16, 9, axis=1))


def _left_weights(net: Net, zero: str) -> str:
    a = blocks(net, 2, 16, 5, axis=1, size=8, zero=zero)
    return net.node("MatMul", net.weights(9, 16, axis=0), a)


def _coded(net: Net, zero: str) -> str:
    scale, point, attributes = net.grid((3, 16), DType.UINT8, 1, 8, zero, 5.0)
    codes = net.input(3, 16, kind=DType.UINT8)
    a = net.node("DequantizeLinear", codes, scale, point, **attributes)
    return net.node("MatMul", a, net.weights(16, 9, axis=1))


def _shared(net: Net, zero: str) -> str:
    a = blocks(net, 16, 16, size=8, zero=zero)
    parts = [net.node("MatMul", a, net.weights(16, 16, axis=1)) for _ in range(2)]
    parts = [net.node("Relu", parts[0]), net.node("Add", parts[1], a)]
    return net.node("Add", *parts)


def _matrices(net: Net, zero: str) -> str:
    a = blocks(net, 4, 3, 16, size=8, zero=zero)
    return net.node("MatMul", a, net.weights(4, 16, 9, axis=2, zero=zero))


def _many_matrices(net: Net, zero: str) -> str:
    a = blocks(net, 70, 2, 16, size=8, zero=zero)
    return net.node("MatMul", a, net.weights(70, 16, 5, zero=zero))


def _sliced(net: Net, zero: str) -> str:
    a = blocks(net, 4, 2, 32, size=8, zero=zero)
    a = net.node("Slice", a, *(net.constant(np.int64([i])) for i in (4, 28, 2)))
    a = net.node("Gather", a, net.constant(np.int64([2, 0, 3])), axis=0)
    return net.node("MatMul", a, net.weights(24, 9, axis=1))


def _joined_columns(net: Net, zero: str) -> str:
    a = net.activations(2, 6, 8, axis=1, zero=zero)
    a = net.node("Reshape", a, net.constant(np.int64([2, 48])))
    return net.node("MatMul", a, net.weights(48, 9, axis=0, size=12))


def _attention(net: Net, zero: str) -> str:
    a, b = (blocks(net, 1, 2, 5, 16, size=4, zero=zero) for _ in range(2))
    return net.node("MatMul", a, net.node("Transpose", b, perm=[0, 1, 3, 2]))


_FORMS: dict[str, Callable[[Net, str], str]] = {
    "reshaped": _reshaped,
    "rows that a reshape makes of blocks": _cut_by_reshape,
    "transposed": _transposed,
    "sliced and gathered": _sliced,
    "columns that a reshape joins": _joined_columns,
    "attention": _attention,
    "left weights": _left_weights,
    "codes": _coded,
    "shared, and read as floats": _shared,
    "several matrices": _matrices,
    "more matrices than products": _many_matrices,
}

for _zero in ("one", "far"):
    for _name, _form in _FORMS.items():
        _add(f"{_name}, {_zero}", lambda net, f=_form, z=_zero: f(net, z))
    for _storage in (DType.UINT8, DType.INT16):
        for _bias in (False, True):
            _add(
                f"Gemm, {'bias, ' if _bias else ''}{_storage.value}, {_zero}",
                _turned(_storage, _zero, _bias),
            )
_add("Gemm, computed bias", _computed_bias)


def _computed(
    left: DType, right: DType, right_size: int, zero: str, batch: tuple[int, ...]
) -> Make:
    def make(net: Net) -> str:
        a = blocks(net, *batch, 3, 24, size=8, storage=left, zero=zero)
        if right_size:
            b = blocks(net, *batch, 24, 5, axis=-2, size=right_size, storage=right, zero=zero)
        else:
            b = net.activations(*batch, 24, 5, storage=right, zero=zero)
        return net.node("MatMul", a, b)

    return make


for _i, _storage in enumerate(STORAGES):
    for _j, _right in enumerate((0, 8, 12, 5)):
        _zero = _ZEROS[(_i + _j) % 3]  # far ones of 16 bits exceed what float32 holds
        _add(
            f"{_storage.value} by computed ones in blocks of {_right}, {_zero}",
            _computed(_storage, STORAGES[(_i + _j) % 2], _right, _zero, ((), (2,), (2, 3))[_j % 3]),
        )
_add(
    "computed ones in blocks alone",
    lambda net: net.node(
        "MatMul", net.activations(3, 24), blocks(net, 24, 5, axis=0, size=8, zero="far")
    ),
)
_add(
    "computed columns",
    lambda net: net.node(
        "MatMul", blocks(net, 3, 24, size=8), net.activations(24, 5, axis=1, zero="far")
    ),
)


def _number(net: Net) -> str:
    a = blocks(net, 1, 80, size=8, zero="far")
    return net.node("MatMul", a, blocks(net, 80, 1, axis=0, size=8))


_add("blocks of one row by one column", _number)


# ------------------------------------------------------------------------------------- windows

# Per form: shapes of activations and weights, axis and size of blocks, attributes.
_WINDOWS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, int, dict[str, Any]]] = {
    "a pixel": ((2, 24, 4, 5), (8, 24, 1, 1), 1, 8, {}),
    "a window": ((2, 24, 6, 5), (8, 24, 3, 3), 1, 8, {"pads": [1, 0, 1, 1]}),
    "a window of blocks that end early": ((1, 20, 6, 5), (8, 20, 3, 2), 1, 8, {"strides": [2, 1]}),
    "a scale per row": ((1, 16, 6, 5), (8, 16, 3, 3), 2, 0, {}),
    "groups": ((1, 24, 6, 5), (6, 12, 3, 3), 1, 4, {"group": 2}),
    "one axis": ((2, 16, 9), (8, 16, 3), 1, 4, {"pads": [1, 1]}),
}


def _window(form: str, kind: DType, zero: str, **weights: Any) -> Make:
    x, w, axis, size, attributes = _WINDOWS[form]

    def make(net: Net) -> str:
        left = blocks(net, *x, axis=axis, size=size, storage=kind, zero=zero)
        right = net.weights(*w, zero=zero, **weights)
        return net.node("Conv", left, right, net.floats(w[0]), **attributes)

    return make


for _i, _form in enumerate(_WINDOWS):
    for _j, _zero in enumerate(_ZEROS):
        _storage = STORAGES[(_i + _j) % 4]
        _by = ({}, {"axis": 0}, {"axis": 0, "storage": DType.UINT4}, {"axis": 1, "size": 4})[_j]
        _add(f"{_form}, {_storage.value}, {_by}, {_zero}", _window(_form, _storage, _zero, **_by))
