# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Checks and shape rules that several rows of the operator table share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qcompiler.errors import ShapeError
from qcompiler.ops._base import Attrs
from qcompiler.types import DType, Granularity, PerAxis, QuantParams, Shape, TensorType
from qcompiler.windows import Geometry

Types = Sequence["TensorType | None"]

LAYOUTS = ("NCHW", "NHWC")


def fail(op: str, problem: str, hint: str | None = None) -> ShapeError:
    """Return the error for an operator whose operands or attributes do not fit."""
    return ShapeError(f"{op}: {problem}", hint=hint)


def given(op: str, types: Types, i: int, name: str) -> TensorType:
    """Return the type of operand `i`, which must be present."""
    t = types[i] if i < len(types) else None
    if t is None:
        raise fail(op, f"operand {name!r} is missing")
    return t


def optional(types: Types, i: int) -> TensorType | None:
    """Return the type of operand `i`, or None where it is omitted."""
    return types[i] if i < len(types) else None


def plain(op: str, t: TensorType, name: str) -> TensorType:
    """Require a tensor without quantization."""
    if t.qparams is not None:
        raise fail(op, f"operand {name!r} is quantized ({t}), expected a plain tensor")
    return t


def floating(op: str, t: TensorType, name: str) -> TensorType:
    """Require a plain floating-point tensor."""
    if not plain(op, t, name).dtype.is_float:
        raise fail(op, f"operand {name!r} is {t}, expected a floating-point tensor")
    return t


def numeric(op: str, t: TensorType, name: str) -> TensorType:
    """Require a plain tensor of numbers (not bool)."""
    if plain(op, t, name).dtype is DType.BOOL:
        raise fail(op, f"operand {name!r} is {t}, expected numbers")
    return t


def quantized(op: str, t: TensorType, name: str) -> QuantParams:
    """Require a quantized tensor; return its parameters."""
    if t.qparams is None:
        raise fail(op, f"operand {name!r} is {t}, expected a quantized tensor")
    return t.qparams


def quantized_per_tensor(op: str, t: TensorType, name: str) -> QuantParams:
    """Require a tensor with one scale; return its parameters."""
    q = quantized(op, t, name)
    if not q.is_per_tensor:
        raise fail(op, f"operand {name!r} has {q.granularity} scales, expected one scale")
    return q


def quantized_weight(op: str, t: TensorType, name: str, axis: int) -> QuantParams:
    """Require one scale, or one per index of `axis`; return the parameters."""
    q = quantized(op, t, name)
    want: Granularity = PerAxis(axis)
    if not q.is_per_tensor and q.granularity != want:
        raise fail(
            op, f"operand {name!r} has {q.granularity} scales, expected per_tensor or {want}"
        )
    if not q.is_per_tensor and q.scale.shape != (t.shape[axis],):
        raise fail(op, f"operand {name!r} has {q.scale.size} scales for {t.shape[axis]} channels")
    return q


def same_dtype(op: str, first: TensorType, other: TensorType, name: str) -> None:
    """Require that an operand has the first operand's dtype."""
    if first.dtype is not other.dtype:
        raise fail(op, f"operand {name!r} is {other.dtype.value}, expected {first.dtype.value}")


def has_shape(op: str, t: TensorType, shape: Shape, name: str) -> None:
    """Require an exact shape."""
    if t.shape != shape:
        raise fail(op, f"operand {name!r} has shape {list(t.shape)}, expected {list(shape)}")


def axis_of(op: str, axis: Any, rank: int, what: str = "axis") -> int:
    """Return an axis counted from the front."""
    a = int(axis)
    if not -rank <= a < rank:
        raise fail(op, f"{what} {a} is outside a tensor of rank {rank}")
    return a % rank


def axes_of(op: str, axes: Any, rank: int) -> tuple[int, ...]:
    """Return distinct axes counted from the front, in the order given."""
    found = tuple(axis_of(op, a, rank) for a in axes)
    if len(set(found)) != len(found):
        raise fail(op, f"axes {list(axes)} are not distinct")
    return found


def broadcast(op: str, *shapes: Shape) -> Shape:
    """Return the numpy broadcast of shapes."""
    rank = max(len(s) for s in shapes)
    out = []
    for i in range(rank):
        extents = {s[len(s) - rank + i] for s in shapes if len(s) - rank + i >= 0} - {1}
        if len(extents) > 1:
            raise fail(op, f"shapes {' and '.join(str(list(s)) for s in shapes)} do not broadcast")
        out.append(extents.pop() if extents else 1)
    return tuple(out)


def layout_of(op: str, attrs: Attrs) -> str:
    """Return the checked `layout` attribute."""
    layout = attrs["layout"]
    if layout not in LAYOUTS:
        raise fail(op, f"layout {layout!r} is unknown, expected one of {', '.join(LAYOUTS)}")
    return str(layout)


def spatial(shape: Shape, layout: str) -> Shape:
    """Return the spatial extents of a batched image."""
    return shape[2:] if layout == "NCHW" else shape[1:-1]


def channels(shape: Shape, layout: str) -> int:
    """Return the number of channels of a batched image."""
    return shape[1] if layout == "NCHW" else shape[-1]


def image_shape(batch: int, chans: int, extents: Shape, layout: str) -> Shape:
    """Return the shape of a batched image in a layout."""
    return (batch, chans, *extents) if layout == "NCHW" else (batch, *extents, chans)


def ints(op: str, attrs: Attrs, name: str, count: int, least: int) -> tuple[int, ...]:
    """Return a tuple attribute of `count` integers that are at least `least`."""
    value: Any = attrs[name]
    out = tuple(int(v) for v in value) if isinstance(value, tuple | list) else ()
    if len(out) != count or any(v < least for v in out):
        raise fail(op, f"{name} is {value!r}, expected {count} integers >= {least}")
    return out


def geometry(op: str, attrs: Attrs, extents: Shape, kernel: Shape) -> Geometry:
    """Return the checked window geometry of a convolution or pooling."""
    n = len(extents)
    pads = ints(op, attrs, "pads", 2 * n, 0)
    g = Geometry(
        extents=extents,
        kernel=kernel,
        strides=ints(op, attrs, "strides", n, 1),
        pads=tuple((pads[i], pads[n + i]) for i in range(n)),
        dilations=ints(op, attrs, "dilations", n, 1),
        ceil_mode=bool(attrs.get("ceil_mode", False)),
    )
    if any(o < 1 for o in g.outputs):
        raise fail(
            op,
            f"window {list(kernel)} with dilations {list(g.dilations)} and pads {list(pads)} "
            f"does not fit the extents {list(extents)}",
        )
    return g


def reduced(op: str, shape: Shape, axes: Any, keepdims: Any) -> Shape:
    """Return the shape after reducing axes."""
    gone = set(axes_of(op, axes, len(shape)))
    if keepdims:
        return tuple(1 if i in gone else d for i, d in enumerate(shape))
    return tuple(d for i, d in enumerate(shape) if i not in gone)
