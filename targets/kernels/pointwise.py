# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Element-wise kernels: quantize, dequantize, requantize, qadd/qsub/qmul, table, clip, float ops.

Every generator takes a workload and an `Isa` and returns a PrimFunc whose buffers are the inputs in
the order of the workload, the packed constants (`table` only: the entries), and the output, with
the shapes the workload gives.

All but `table` run on one engine, `elementwise`: the shapes are collapsed to the fewest axes
that tell the operands apart (same shape: one axis; a per-channel vector against NHWC: two; a
squeeze-excite gate [N, 1, 1, C]: three), the innermost axis is vectorised and the outer ones are
shared out to threads when there is enough work.  Any numpy broadcast works.

Integer kernels equal their definition bit for bit: float32 products are rounded before they are
added (`simd.exact_mul`), quantize divides.

`table` is in `lookup`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812 (the name TVM's own scripts use)

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.fmath import FUNCTIONS
from qcompiler.targets.kernels.lookup import (
    TableWorkload,
    pack_table,
    permute_look_up,
    table,
    table_shape,
)
from qcompiler.targets.kernels.simd import (
    ITEM_BYTES,
    STORAGE_RANGE,
    exact_mul,
    loop,
    quantized,
    unravel,
    vector_spans,
    worth_threads,
)
from qcompiler.targets.kernels.tir import Expr, PrimFuncBuilder

__all__ = [
    "CastWorkload",
    "ClipWorkload",
    "DequantizeWorkload",
    "FloatBinaryWorkload",
    "FloatUnaryWorkload",
    "QBinaryWorkload",
    "QuantizeChainWorkload",
    "QuantizeWorkload",
    "RequantizeWorkload",
    "TableWorkload",
    "cast_floats",
    "clip",
    "dequantize",
    "elementwise",
    "float_binary",
    "float_unary",
    "pack_table",
    "permute_look_up",
    "qbinary",
    "quantize",
    "quantize_chain",
    "requantize",
    "table",
    "table_shape",
]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class QuantizeWorkload:
    """`clamp(rint(x / scale) + zero_point, qmin, qmax)`; buffers: x float32, y."""

    shape: Shape
    scale: float
    zero_point: int
    dtype: str
    """Storage of the output: uint8, int8 or int16."""
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class QuantizeChainWorkload:
    """`quantize` of what elementwise steps make of x; buffers: x float32, constants float32, y."""

    quantize: QuantizeWorkload
    steps: tuple[tuple[str, Shape | None], ...]
    """Operations in order: add, sub, mul or div with a constant of that shape, which broadcasts;
    round or relu without one."""


@dataclass(frozen=True, slots=True)
class DequantizeWorkload:
    """`f32(q - zero_point) * scale`; buffers: q, y float32."""

    shape: Shape
    dtype: str
    """Storage of the input: uint8, int8, int16 or int32."""
    scale: float
    zero_point: int


@dataclass(frozen=True, slots=True)
class RequantizeWorkload:
    """`clamp(rint(f32(q - in_zero_point) * multiplier) + zero_point, qmin, qmax)`; buffers q, y."""

    shape: Shape
    in_dtype: str
    in_zero_point: int
    multiplier: float
    """s_in / s_out, computed in float64 and rounded once to float32."""
    dtype: str
    zero_point: int
    qmin: int
    qmax: int


@dataclass(frozen=True, slots=True)
class QBinaryWorkload:
    """qadd, qsub or qmul of two quantized arrays with numpy broadcasting; buffers: a, b, y.

    add, sub: `clamp(rint(f32(a - za) * Ma ± f32(b - zb) * Mb) + zero_point, qmin, qmax)`;
    mul: `clamp(rint(f32((a - za) * (b - zb)) * Ma) + zero_point, qmin, qmax)`.
    With dtype "float32" nothing is rounded to an integer or clamped.
    """

    operation: str
    """"add", "sub" or "mul"."""
    a_shape: Shape
    b_shape: Shape
    a_dtype: str
    """uint8, int8 or int16, as is `b_dtype`."""
    b_dtype: str
    a_zero_point: int
    b_zero_point: int
    a_multiplier: float
    """f32(s_a / s_y); for mul f32(s_a * s_b / s_y).  Without s_y for a float32 output."""
    b_multiplier: float
    """f32(s_b / s_y); not used by mul."""
    dtype: str
    zero_point: int = 0
    qmin: int = 0
    qmax: int = 0


@dataclass(frozen=True, slots=True)
class ClipWorkload:
    """Limit to [low, high] in the storage dtype (8- or 16-bit, or a float); buffers: x, y."""

    shape: Shape
    dtype: str
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class CastWorkload:
    """float16 as float32, or float32 rounded to float16; buffers: x, y."""

    shape: Shape
    in_dtype: str
    dtype: str


@dataclass(frozen=True, slots=True)
class FloatBinaryWorkload:
    """A float32 operation with broadcasting and an optional clip; buffers: a, b, y.

    Operations: add, sub, mul, div, max, min.  Operands and result may lie in memory as float16.
    """

    operation: str
    a_shape: Shape
    b_shape: Shape
    low: float | None = None
    """Lower clip bound of the result (0 is relu); None leaves it open."""
    high: float | None = None
    a_dtype: str = "float32"
    b_dtype: str = "float32"
    dtype: str = "float32"
    """Of the result."""


@dataclass(frozen=True, slots=True)
class FloatUnaryWorkload:
    """A float32 function of `fmath.FUNCTIONS`; buffers: x, y, in memory float32 or float16."""

    function: str
    shape: Shape
    alpha: float = 0.0
    beta: float = 0.0
    in_dtype: str = "float32"
    dtype: str = "float32"


# The engine.


def broadcast_shape(a: Shape, b: Shape) -> Shape:
    """The shape of numpy's broadcast of `a` and `b`."""
    return tuple(int(d) for d in np.broadcast_shapes(a, b))


def collapse(out: Shape, shapes: Sequence[Shape]) -> tuple[list[int], list[list[int]]]:
    """The fewest axes that describe the broadcast of `shapes` to `out`.

    Returns the extents of those axes and, for each operand, its stride in elements along each of
    them (0 where it is repeated).
    """
    aligned = [(1,) * (len(out) - len(shape)) + tuple(shape) for shape in shapes]
    extents: list[int] = []
    strides: list[list[int]] = [[] for _ in shapes]
    for axis, extent in enumerate(out):
        if extent == 1:
            continue
        here = [0 if shape[axis] == 1 else prod(shape[axis + 1 :]) for shape in aligned]
        if extents and all(s[-1] == h * extent for s, h in zip(strides, here, strict=True)):
            extents[-1] *= extent
            for operand, stride in zip(strides, here, strict=True):
                operand[-1] = stride
        else:
            extents.append(extent)
            for operand, stride in zip(strides, here, strict=True):
                operand.append(stride)
    if not extents:
        extents = [1]
        strides = [[0] for _ in shapes]
    return extents, strides


def elementwise(
    name: str,
    isa: Isa,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    dtype: str,
    body: Callable[..., Expr],
    *,
    cycles: float,
    as_they_are: bool = False,
    first_shape: Shape | None = None,
) -> Any:
    """Generate `y = body(*operands)`, where `body` maps vectors to a vector of `dtype`.

    `cycles` estimates the work for each vector of `isa.vector_bits / 8` elements.  What lies in
    memory as float16, `body` sees and gives as float32, unless it takes operands `as_they_are`.
    The first operand and the result may be buffers of another shape, `first_shape`, whose elements
    lie in the same order.
    """
    out: Shape = shapes[0]
    for shape in shapes[1:]:
        out = broadcast_shape(out, shape)
    extents, strides = collapse(out, shapes)
    lanes = isa.vector_bits // 8
    threads = worth_threads(cycles * prod(extents) / lanes)
    halved = dtype == "float16" and not as_they_are
    with PrimFuncBuilder(name) as builder:
        arguments = [
            builder.argument(f"x{i}", (not i and first_shape) or shape, operand)
            for i, (shape, operand) in enumerate(zip(shapes, dtypes, strict=True))
        ]
        output = builder.argument("y", first_shape or out, dtype)
        inputs = [tir.flat(argument) for argument in arguments]
        y = tir.flat(output)

        def row(bases: Sequence[Expr], start: Expr, threads: bool) -> None:
            inner = [stride[-1] for stride in strides]
            for offset, count, width in vector_spans(extents[-1], lanes, overlap=True):
                with loop(count, threads=threads and count > 1) as j:
                    at = j * width + offset
                    values = [
                        tir.bind(
                            tir.load(x, base + at, width)
                            if step
                            else tir.splat(x[base], operand, width)
                        )
                        for x, base, step, operand in zip(inputs, bases, inner, dtypes, strict=True)
                    ]
                    if not as_they_are:
                        values = [
                            tir.bind(tir.cast(value, "float32")) if operand == "float16" else value
                            for value, operand in zip(values, dtypes, strict=True)
                        ]
                    value = body(*values)
                    tir.store(y, start + at, tir.cast(value, dtype) if halved else value)

        outer = extents[:-1]
        if not outer:
            zero = tir.splat(0, "int32", 1)
            row([zero] * len(inputs), zero, threads)
        else:
            # The thread loop takes as many axes as it needs to have work for many threads.
            split = 1
            while split < len(outer) and prod(outer[:split]) < 32:
                split += 1
            with loop(prod(outer[:split]), threads=threads) as shared:
                indices = unravel(shared, outer[:split])
                _nest(outer[split:], indices, strides, extents, row)
    return builder.finish()


def _nest(
    outer: Sequence[int],
    indices: list[Expr],
    strides: list[list[int]],
    extents: list[int],
    row: Callable[[Sequence[Expr], Expr, bool], None],
) -> None:
    """Serial loops over `outer`, then one row at the offsets the indices give."""
    if outer:
        with loop(outer[0]) as index:
            _nest(outer[1:], [*indices, index], strides, extents, row)
        return
    zero = tir.splat(0, "int32", 1)
    bases = []
    for stride in strides:
        base = zero
        for index, step in zip(indices, stride, strict=False):
            if step:
                base = base + index * step
        bases.append(tir.bind(base))
    start = zero
    for axis, index in enumerate(indices):
        start = start + index * prod(extents[axis + 1 :])
    row(bases, tir.bind(start), False)


def _centered(value: Expr, zero_point: int) -> Expr:
    """`f32(value - zero_point)` for 8- and 16-bit lanes: the difference is exact in int32."""
    wide = tir.cast(value, "int32")
    if zero_point:
        wide = wide - tir.splat(zero_point, "int32", tir.lanes_of(value))
    return tir.cast(wide, "float32")


def _reach(dtype: str) -> float:
    """A bound on |value - zero point|, with room for the rounding of what it is multiplied by."""
    return 2.0 ** (ITEM_BYTES[dtype] * 8 + 1)


def _f32(value: float) -> float:
    """`value` rounded to float32."""
    return float(np.float32(value))


# The kernels.


def quantize(workload: QuantizeWorkload, isa: Isa) -> Any:
    """Generate `quantize`."""
    w = workload

    def body(x: Expr) -> Expr:
        real = x / tir.splat(_f32(w.scale), "float32", tir.lanes_of(x))
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa)

    return elementwise("quantize", isa, [w.shape], ["float32"], w.dtype, body, cycles=40)


def quantize_chain(workload: QuantizeChainWorkload, isa: Isa) -> Any:
    """Generate `quantize` after elementwise steps, each rounded on its own.

    Raises:
        CodegenError: a step is none of those that are known.
    """
    w = workload.quantize

    def body(x: Expr, *constants: Expr) -> Expr:
        others = iter(constants)
        for operation, shape in workload.steps:
            if operation not in CHAINED:
                known = ", ".join(sorted(CHAINED))
                raise CodegenError(f"quantize_chain: expected one of {known}, got {operation!r}")
            x = tir.bind(CHAINED[operation](x, x if shape is None else next(others)))
        real = x / tir.splat(_f32(w.scale), "float32", tir.lanes_of(x))
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa)

    shapes = [w.shape, *(shape for _, shape in workload.steps if shape is not None)]
    dtypes = ["float32"] * len(shapes)
    return elementwise("quantize", isa, shapes, dtypes, w.dtype, body, cycles=60)


CHAINED: dict[str, Callable[[Expr, Expr], Expr]] = {
    "add": lambda x, c: x + c,
    "sub": lambda x, c: x - c,
    "mul": exact_mul,
    "div": lambda x, c: x / c,
    "round": lambda x, _: FUNCTIONS["round"](x, 0.0, 0.0),
    "relu": lambda x, _: FUNCTIONS["relu"](x, 0.0, 0.0),
}
"""Steps of `quantize_chain`."""


def dequantize(workload: DequantizeWorkload, isa: Isa) -> Any:
    """Generate `dequantize`."""
    w = workload

    def body(q: Expr) -> Expr:
        return _centered(q, w.zero_point) * tir.splat(_f32(w.scale), "float32", tir.lanes_of(q))

    return elementwise("dequantize", isa, [w.shape], [w.dtype], "float32", body, cycles=16)


def requantize(workload: RequantizeWorkload, isa: Isa) -> Any:
    """Generate `requantize`."""
    w = workload
    bound = _reach(w.in_dtype) * abs(w.multiplier)

    def body(q: Expr) -> Expr:
        factor = tir.splat(_f32(w.multiplier), "float32", tir.lanes_of(q))
        real = exact_mul(_centered(q, w.in_zero_point), factor)
        return quantized(real, w.zero_point, w.qmin, w.qmax, w.dtype, isa, bound)

    return elementwise("requantize", isa, [w.shape], [w.in_dtype], w.dtype, body, cycles=16)


def qbinary(workload: QBinaryWorkload, isa: Isa) -> Any:
    """Generate `qadd`, `qsub` or `qmul`.

    Raises:
        CodegenError: the operation is not one of the three.
    """
    w = workload
    if w.operation not in ("add", "sub", "mul"):
        raise CodegenError(f"qbinary: expected operation add, sub or mul, got {w.operation!r}")
    a_reach, b_reach = _reach(w.a_dtype), _reach(w.b_dtype)
    if w.operation == "mul":
        bound = a_reach * b_reach * abs(w.a_multiplier)
    else:
        bound = a_reach * abs(w.a_multiplier) + b_reach * abs(w.b_multiplier)
    # Products of centred 8-bit values are below 2**24, hence exact in float32.
    narrow = "int16" not in (w.a_dtype, w.b_dtype)

    def real(a: Expr, b: Expr) -> Expr:
        lanes = tir.lanes_of(a)
        a_factor = tir.splat(_f32(w.a_multiplier), "float32", lanes)
        b_factor = tir.splat(_f32(w.b_multiplier), "float32", lanes)
        if w.operation == "mul" and narrow:
            product = exact_mul(_centered(a, w.a_zero_point), _centered(b, w.b_zero_point))
            return exact_mul(product, a_factor)
        if w.operation == "mul":
            wide_a = tir.cast(a, "int32") - tir.splat(w.a_zero_point, "int32", lanes)
            wide_b = tir.cast(b, "int32") - tir.splat(w.b_zero_point, "int32", lanes)
            return exact_mul(tir.cast(wide_a * wide_b, "float32"), a_factor)
        left = exact_mul(_centered(a, w.a_zero_point), a_factor)
        right = exact_mul(_centered(b, w.b_zero_point), b_factor)
        return left + right if w.operation == "add" else left - right

    def body(a: Expr, b: Expr) -> Expr:
        if w.dtype == "float32":
            return real(a, b)
        return quantized(real(a, b), w.zero_point, w.qmin, w.qmax, w.dtype, isa, bound)

    return elementwise(
        f"q{w.operation}",
        isa,
        [w.a_shape, w.b_shape],
        [w.a_dtype, w.b_dtype],
        w.dtype,
        body,
        cycles=24,
    )


def clip(workload: ClipWorkload, isa: Isa) -> Any:
    """Generate `clip`."""
    w = workload
    integer = w.dtype in STORAGE_RANGE

    def bound(value: float | None) -> float | None:
        if value is None or not integer:
            return value
        low, high = STORAGE_RANGE[w.dtype]
        return int(min(max(value, low), high))

    def body(x: Expr) -> Expr:
        return tir.clamp(x, bound(w.low), bound(w.high))

    return elementwise("clip", isa, [w.shape], [w.dtype], w.dtype, body, cycles=3, as_they_are=True)


def cast_floats(workload: CastWorkload, isa: Isa) -> Any:
    """Generate a conversion between float widths."""
    w = workload
    return elementwise("cast", isa, [w.shape], [w.in_dtype], w.dtype, lambda x: x, cycles=8)


def float_binary(workload: FloatBinaryWorkload, isa: Isa) -> Any:
    """Generate a float32 operation of two arrays.

    Raises:
        CodegenError: the operation is not known.
    """
    w = workload
    table: dict[str, Callable[[Expr, Expr], Expr]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "div": lambda a, b: a / b,
        "max": T.max,
        "min": T.min,
    }
    if w.operation not in table:
        raise CodegenError(f"float_binary: expected one of {', '.join(table)}, got {w.operation!r}")

    def body(a: Expr, b: Expr) -> Expr:
        return tir.clamp(table[w.operation](a, b), w.low, w.high)

    return elementwise(
        f"float_{w.operation}",
        isa,
        [w.a_shape, w.b_shape],
        [w.a_dtype, w.b_dtype],
        w.dtype,
        body,
        cycles=20,
    )


def float_unary(workload: FloatUnaryWorkload, isa: Isa) -> Any:
    """Generate a float32 function of one array.

    Raises:
        CodegenError: the function is not in `fmath.FUNCTIONS`.
    """
    w = workload
    if w.function not in FUNCTIONS:
        raise CodegenError(
            f"float_unary: expected one of {', '.join(FUNCTIONS)}, got {w.function!r}"
        )

    def body(x: Expr) -> Expr:
        return FUNCTIONS[w.function](x, w.alpha, w.beta)

    return elementwise(w.function, isa, [w.shape], [w.in_dtype], w.dtype, body, cycles=60)
