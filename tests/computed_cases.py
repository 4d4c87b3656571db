# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized products of what is computed at run time, by name: weights, zero points and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from product_cases import EIGHT, Make
from product_models import Net

from qcompiler.types import DType

COMPUTED: dict[str, Make] = {}

_MS = "com.microsoft"

# ------------------------------------------------------------------- convolutions of activations

# Per form: operator, shapes of activations and weights, attributes.
_CONVS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ("Conv", (2, 16, 6, 6), (8, 16, 3, 3), {"pads": [1] * 4}),
    "strides": (
        "Conv",
        (2, 16, 9, 8),
        (8, 16, 3, 2),
        {"pads": [1, 0, 2, 1], "strides": [2, 3], "dilations": [2, 1]},
    ),
    "one by one": ("Conv", (2, 16, 5, 6), (8, 16, 1, 1), {}),
    "whole image": ("Conv", (2, 16, 3, 4), (8, 16, 3, 4), {}),
    "groups of few columns": ("Conv", (2, 16, 6, 5), (8, 4, 3, 3), {"group": 4, "pads": [1] * 4}),
    "groups of many columns": ("Conv", (2, 16, 6, 5), (40, 4, 3, 3), {"group": 4}),
    "depthwise": ("Conv", (2, 16, 6, 5), (16, 1, 3, 3), {"group": 16, "pads": [1, 0, 1, 1]}),
    "1-D": ("Conv", (2, 16, 9), (8, 16, 3), {"strides": [2]}),
    "3-D": ("Conv", (1, 8, 4, 5, 5), (8, 8, 3, 3, 2), {"pads": [1, 0, 0, 1, 1, 1]}),
    "transposed": (
        "ConvTranspose",
        (2, 16, 6, 6),
        (16, 4, 3, 3),
        {"strides": [2, 2], "output_padding": [1, 0]},
    ),
    "transposed, dilations": (
        "ConvTranspose",
        (1, 16, 6, 6),
        (16, 4, 3, 3),
        {"strides": [2, 3], "dilations": [2, 1], "pads": [1, 0, 1, 1]},
    ),
    "transposed, groups": (
        "ConvTranspose",
        (1, 16, 6, 6),
        (16, 4, 3, 3),
        {"group": 2, "strides": [2, 2]},
    ),
    "transposed, 1-D": ("ConvTranspose", (1, 16, 6), (16, 4, 4), {"strides": [2]}),
    "transposed, 3-D": ("ConvTranspose", (1, 8, 3, 3, 3), (8, 4, 2, 2, 2), {"strides": [2, 1, 2]}),
}


def _conv(form: str, storage: DType, zero: str, by_column: bool) -> Make:
    op, x, w, attributes = _CONVS[form]
    turned = op != "Conv"

    def make(net: Net) -> str:
        left = net.activations(*x)
        axis = int(turned) if by_column else None
        right = net.activations(*w, storage=storage, axis=axis, zero=zero)
        columns = w[1] * attributes.get("group", 1) if turned else w[0]
        return net.node(op, left, right, net.floats(columns), **attributes)

    return make


_STORAGES = (DType.INT8, DType.UINT8, DType.INT16, DType.INT4, DType.UINT16)
for _i, _form in enumerate(_CONVS):
    for _j, _zero in enumerate(("middle", "one", "far")):
        for _by in (False, True):
            _storage = _STORAGES[(_i + _j) % len(_STORAGES)]
            if _by and _zero == "far" and _storage.bits > 8:
                _storage = DType.UINT8
            _name = f"{_form}, {_storage.value}, {_zero}, {'columns' if _by else 'tensor'}"
            COMPUTED[_name] = _conv(_form, _storage, _zero, _by)

COMPUTED["a scale per image"] = lambda net: net.node(
    "Conv",
    net.activations(3, 8, 5, 5, axis=0, zero="far"),
    net.activations(8, 8, 3, 3, axis=0, zero="far"),
    net.floats(8),
    pads=[1] * 4,
)

# ------------------------------------------------------------------------ operators on the codes


def _operator(op: str, storage: DType, computed: frozenset[str]) -> Make:
    """An operator on codes of which weights, zero points, scales or biases are computed."""
    conv = "Conv" in op
    x = (1, 16, 6, 6) if conv else (3, 16)
    w = (8, 16, 3, 3) if conv else (8, 16) if op == "QGemm" else (16, 8)

    def make(net: Net) -> str:
        def codes(kind: DType, shape: tuple[int, ...], what: str) -> str:
            if kind is DType.INT32:  # sums stay within 32 bits
                held = net.input(*shape, kind=DType.INT16) if what in computed else (
                    net.constant(net.rng.integers(-9999, 9999, shape), DType.INT16))  # fmt: skip
                return net.node("Cast", held, to=6)
            if what in computed:
                return net.input(*shape, kind=kind)
            return net.constant(net.rng.integers(kind.min, kind.max + 1, shape), kind)

        def scale(reach: float) -> str:
            if "scales" not in computed:
                return net.constant(np.asarray(reach, np.float32))
            return _scale(net, reach=reach)

        right, zw = codes(storage, w, "weights"), codes(storage, (), "zero points")
        if op == "DynamicQuantizeMatMul":
            return net.node(op, net.input(*x, far=False), right, scale(0.02), zw, domain=_MS)
        left, zx = net.input(*x, kind=DType.UINT8), codes(DType.UINT8, (), "zero points")
        if op.endswith("Integer"):
            return net.node("Cast", net.node(op, left, right, zx, zw), to=1)
        sx, sw = scale(0.05), scale(0.02)
        operands = [left, sx, zx, right, sw, zw]
        if op == "QGemm":
            bias = codes(DType.INT32, (8,), "bias")
            return net.node(op, *operands, bias, domain=_MS, alpha=0.5, transB=1)
        sy, zy = scale(3.0), codes(DType.UINT8, (), "zero points")
        bias = [codes(DType.INT32, (8,), "bias")] if conv else []
        return net.node("DequantizeLinear", net.node(op, *operands, sy, zy, *bias), sy, zy)

    return make


def _integer_groups(group: int, channels: int, computed: bool) -> Make:
    """ConvInteger, of channels of which float32 cannot hold the sums in one part."""

    def make(net: Net) -> str:
        shape = (2 * group, channels, 3, 3)
        w = net.input(*shape, kind=DType.UINT8) if computed else net.constant(
            net.rng.integers(0, 256, shape), DType.UINT8)  # fmt: skip
        x = net.input(1, group * channels, 5, 5, kind=DType.UINT8)
        points = [net.constant(np.asarray(n), DType.UINT8) for n in (9, 200)]
        y = net.node("ConvInteger", x, w, *points, group=group, pads=[1] * 4)
        return net.node("Cast", y, to=1)

    return make


for _computed_weights in (False, True):
    for _group, _channels in ((5, 1), (3, 60), (1, 70)):
        COMPUTED[f"ConvInteger in {_group} groups of {_channels}, {_computed_weights}"] = (
            _integer_groups(_group, _channels, _computed_weights)
        )

_OPERATORS = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
)
for _op in _OPERATORS:
    for _kind in EIGHT:
        for _what in (
            {"weights"},
            {"zero points"},
            {"scales"},
            {"bias"},
            {"weights", "zero points"},
            {"weights", "zero points", "scales", "bias"},
        ):
            COMPUTED[f"{_op}, {_kind.value}, computed {', '.join(sorted(_what))}"] = _operator(
                _op, _kind, frozenset(_what)
            )


# ------------------------------------------------- quantization with numbers from the run itself


def _computed(net: Net, kind: DType, *shape: int, by: int | None = None, zero: bool = False) -> str:
    """Floats in codes and back, by scales that are computed; zero points too, or none."""
    scale = _scale(net, *(() if by is None else (shape[by],)), reach=0.02)
    given = [scale, net.input(kind=kind)] if zero else [scale]
    more = {} if by is None else {"axis": by}
    if not zero and kind is DType.INT8:
        more["output_dtype"] = 3
    codes = net.node("QuantizeLinear", net.input(*shape, far=False), *given, **more)
    more.pop("output_dtype", None)
    return net.node("DequantizeLinear", codes, *given, **more)


def _scale(net: Net, *shape: int, reach: float) -> str:
    """A scale that is computed: all that makes it is exact on every target."""
    size = net.node(
        "Min", net.node("Abs", net.input(*shape, far=False)), net.constant(np.float32(2))
    )
    more = net.node("Add", size, net.constant(np.float32(0.5)))
    return net.node("Mul", more, net.constant(np.float32(reach)))


def _dynamic(net: Net, *shape: int) -> str:
    """DynamicQuantizeLinear and back."""
    codes = net.node("DynamicQuantizeLinear", net.input(*shape, far=False))
    node = net.nodes[-1]
    node.output.extend([f"{codes}_scale", f"{codes}_zero"])
    return net.node("DequantizeLinear", codes, f"{codes}_scale", f"{codes}_zero")


COMPUTED["dynamic by constants"] = lambda net: net.node(
    "Gemm", _dynamic(net, 3, 16), net.weights(8, 16, axis=0), net.floats(8), transB=1
)
COMPUTED["dynamic by dynamic"] = lambda net: net.node(
    "MatMul",
    _dynamic(net, 2, 3, 16),
    net.node("Transpose", _dynamic(net, 2, 5, 16), perm=[0, 2, 1]),
)
COMPUTED["dynamic, convolution"] = lambda net: net.node(
    "Conv", _dynamic(net, 1, 8, 5, 5), net.weights(8, 8, 3, 3, axis=0), net.floats(8), pads=[1] * 4
)
COMPUTED["computed scales by column"] = lambda net: net.node(
    "MatMul", net.activations(3, 16), _computed(net, DType.INT8, 16, 5, by=1)
)
for _zero_point in (False, True):
    COMPUTED[f"computed scales, zero points {_zero_point}"] = lambda net, z=_zero_point: net.node(
        "MatMul", net.activations(3, 16), _computed(net, DType.INT8, 16, 5, zero=z)
    )
    COMPUTED[f"computed scales of a convolution, zero points {_zero_point}"] = (
        lambda net, z=_zero_point: net.node(
            "Conv",
            _computed(net, DType.UINT8, 1, 8, 5, 5, zero=z),
            net.weights(8, 8, 3, 3, axis=0),
            net.floats(8),
        )
    )
    COMPUTED[f"computed scales of a transposed convolution, zero points {_zero_point}"] = (
        lambda net, z=_zero_point: net.node(
            "ConvTranspose",
            _computed(net, DType.UINT8, 1, 8, 5, 5, zero=z),
            net.activations(8, 4, 3, 3),
            net.floats(4),
            strides=[2, 2],
        )
    )
