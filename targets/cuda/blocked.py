# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products of weights with a scale, and of a matrix a zero point, per block along K.

A product for each block (of a convolution: for each kernel position and block) on tensor cores,
exact in int32; a map scales them and adds them up in order, as `numerics_grouped` and
`numerics_dynamic` define it. Where all sums at once would take too much memory, ranges of blocks
follow each other, and each goes on from the total of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.targets.cuda.maps import THREADS, Operand, map_launch, row_major
from qcompiler.targets.cuda.products import Epilogue, Product, Window
from qcompiler.targets.cuda.program import Argument, Buffer, Launch, Temporary
from qcompiler.targets.cuda.source import KernelText, entry, literal
from qcompiler.types import Array, DType, PerGroup, QuantParams

if TYPE_CHECKING:
    from qcompiler.targets.cuda.lowering import Answer, Maker

__all__ = ["blocked_conv", "blocked_matmul", "blocked_product"]

MOST_BYTES = 1 << 26
"""Memory that the sums of blocks take at once, unless those of one block alone take more."""

_MOST_BLOCKS = 65535  # of a launch's second extent

Part = Callable[[int, int, Buffer], Product]
"""(first block, their number, where their sums go) -> the product that writes them."""


def blocked_product(
    make: Maker,
    node: Node,
    size: int,
    scale: Array,
    start: Array | None,
    total: Buffer,
    own: Value | None = None,
) -> tuple[Launch, ...]:
    """Return launches that write the float32 sums of all blocks of a matrix product.

    Args:
        make: Makes products.
        node: The product; its first two operands are 8-bit activations and constant weights.
        size: Neighbours along K that share a scale.
        scale: Multipliers, float32 [K / size, N].
        start: What sums start from, float32 [N]; None for 0.
        total: Where they go, [M, N].
        own: Scales of the activations, [..., M, K / size], if they have some.
    """
    a, b = node.input(0), node.input(1)
    assert a.qparams is not None  # the callers looked
    assert b.qparams is not None
    aq, bq = a.qparams, b.qparams
    depth, columns = b.shape
    rows, blocks = math.prod(a.shape[:-1]), depth // size
    weights = b.array().reshape(blocks, size, columns).transpose(0, 2, 1)
    zero = bq.zero_point.astype(np.int64)

    def part(first: int, count: int, sums: Buffer) -> Product:
        run = slice(first, first + count)
        return Product(
            a, None, rows, columns, size, count, a.dtype, DType.INT8,
            Epilogue(DType.FLOAT32, np.ones(1, np.float32)), sums, a_row=depth, out_row=columns,
            a_offset=_each(size, first, count), c_offset=_each(rows * columns, 0, count),
            n_offset=_each(columns, 0, count), a_zero=aq.z, b_zero=zero[run].reshape(-1),
            weights=np.ascontiguousarray(weights[run]), b_bits=_bits(bq),
        )  # fmt: skip

    return _added(make, part, rows, scale, start, total, own)


def _added(
    make: Maker,
    part: Part,
    rows: int,
    scale: Array,
    start: Array | None,
    total: Buffer,
    own: Value | None = None,
) -> tuple[Launch, ...]:
    """Return the launches of all blocks, [blocks, N] by their multipliers, range by range."""
    blocks, columns = scale.shape
    most = min(_MOST_BLOCKS, max(1, MOST_BYTES // (rows * columns * 4)))
    begin: Argument = np.zeros(columns, np.float32)
    if start is not None:
        begin = np.ascontiguousarray(start, np.float32).reshape(-1)
    launches: list[Launch] = []
    for first in range(0, blocks, most):
        count = min(most, blocks - first)
        sums = Temporary(rows * columns * count * 4)
        result = total if first + count == blocks else Temporary(rows * columns * 4)
        factor = f"scale[g * {columns} + column]"
        if own is not None:
            factor = f"__fmul_rn(own[i / {columns} * {blocks} + {first} + g], {factor})"
        body = "\n".join([
            f"  const int i = static_cast<int>(blockIdx.x * {THREADS} + threadIdx.x);",
            f"  if (i >= {rows * columns}) return;",
            f"  const int column = i % {columns};",
            f"  float t = start[{'i' if first else 'column'}];",
            f"  for (int g = 0; g < {count}; ++g) {{",
            f"    const float sum = sums[g * {rows * columns} + i];",
            f"    t = __fadd_rn(t, __fmul_rn(sum, {factor}));",
            "  }",
            "  out[i] = t;",
        ])  # fmt: skip
        given: list[tuple[str, Argument]] = [
            ("sums", sums),
            ("scale", np.ascontiguousarray(scale[first : first + count], np.float32)),
            ("start", begin),
        ]
        if own is not None:
            given.append(("own", own))
        parameters = [f"const float* __restrict__ {name}" for name, _ in given]
        text = entry(", ".join([*parameters, "float* __restrict__ out"]), THREADS, body)
        added = Launch(
            KernelText("blocks", text), (-(-rows * columns // THREADS), 1, 1), THREADS,
            tuple(argument for _, argument in given), result,
        )  # fmt: skip
        launches += [make.product(part(first, count, sums)), added]
        begin = result
    return tuple(launches)


def blocked_matmul(make: Maker, node: Node) -> Answer:
    """Return the launches of a `qmatmul` whose weights are in blocks, or why there are none."""
    b, bias = node.input(1), node.optional(2)
    assert b.qparams is not None  # the caller looked
    by = b.qparams.granularity
    assert isinstance(by, PerGroup)
    if bias is not None and not bias.is_constant:
        return "its bias is computed at run time"
    total = _total(node)
    launches = blocked_product(
        make, node, by.group_size, _multipliers(node, b.qparams.scale), _start(node), total
    )
    return _finished(node, launches, total)


def blocked_conv(make: Maker, node: Node, window: Window) -> Answer:
    """Return the launches of a `qconv` whose weights are in blocks, or why there are none.

    Args:
        make: Makes products.
        node: The convolution, channels last, of one group.
        window: Its geometry.
    """
    x, w, bias = node.input(0), node.input(1), node.optional(2)
    xq, wq = x.qparams, w.qparams
    assert xq is not None  # the caller looked
    assert wq is not None
    by = wq.granularity
    assert isinstance(by, PerGroup)
    if bias is not None and not bias.is_constant:
        return "its bias is computed at run time"
    size, columns, kw = by.group_size, w.shape[0], window.kw
    blocks, taps = w.shape[1] // size, window.kh * window.kw
    rows = window.batch * window.oh * window.ow
    # [O, I, KH, KW] -> [KH * KW * blocks, O, size]: a pair for each kernel position and block.
    split = w.array().reshape(columns, blocks, size, taps).transpose(3, 1, 0, 2)
    weights = split.reshape(taps * blocks, columns, size)
    scale = wq.scale.reshape(columns, blocks, taps).transpose(2, 1, 0)
    one = Window(
        window.batch, window.ih, window.iw, window.channels, window.oh, window.ow, 1, 1,
        window.strides, window.pads, (1, 1),
    )  # fmt: skip

    def part(first: int, count: int, sums: Buffer) -> Product:
        at = f"(z + {first})"
        return Product(
            x, None, rows, columns, size, count, x.dtype, DType.INT8,
            Epilogue(DType.FLOAT32, np.ones(1, np.float32)), sums, window=one,
            a_row=window.channels, out_row=columns,
            a_offset=f"{at} % {blocks} * {size}" if blocks > 1 else "0",
            c_offset=_each(rows * columns, 0, count), n_offset=_each(columns, 0, count),
            y_offset=_step(f"{at} / {blocks * kw}", window.dilations[0], window.kh),
            x_offset=_step(f"{at} / {blocks} % {kw}", window.dilations[1], kw),
            weights=np.ascontiguousarray(weights[first : first + count]), b_bits=_bits(wq),
            a_zero=xq.z,
        )  # fmt: skip

    total = _total(node)
    multipliers = _multipliers(node, scale.reshape(taps * blocks, columns))
    return _finished(node, _added(make, part, rows, multipliers, _start(node), total), total)


def _over(node: Node) -> Array | float:
    target = node.output.qparams
    return 1.0 if target is None else target.scale


def _multipliers(node: Node, scale: Array) -> Array:
    x = node.input(0).qparams
    assert x is not None  # the callers looked
    return numerics.multiplier(x.scale, scale, over=_over(node))


def _start(node: Node) -> Array | None:
    bias = node.optional(2)
    return None if bias is None else numerics.multiplier(bias.array(), over=_over(node))


def _total(node: Node) -> Buffer:
    """Return where the float32 sums of all blocks go."""
    out = node.output
    return out if out.qparams is None else Temporary(out.type.size * 4)


def _finished(node: Node, launches: tuple[Launch, ...], total: Buffer) -> Answer:
    """Return the launches, and the one that quantizes their sums, if the result is quantized."""
    out, residual = node.output, node.optional(3)
    target = out.qparams
    if target is None:
        return launches
    if not target.is_per_tensor:
        return f"its result {out.type} has several scales"
    operands, text = [Operand(total, DType.FLOAT32, row_major(out.shape))], "a"
    if residual is not None:
        r = residual.qparams
        if r is None or not r.is_per_tensor or residual.shape != out.shape:
            return f"its residual {residual.type} does not fit the result {out.type}"
        factor = float(numerics.multiplier(r.scale, over=target.scale))
        text = f"__fadd_rn(a, __fmul_rn(static_cast<float>(int(b) - {r.z}), {literal(factor)}))"
        operands.append(Operand(residual, residual.dtype, row_major(out.shape)))
    low, high = literal(target.qmin - target.z), literal(target.qmax - target.z)
    result = Operand(out, out.dtype, row_major(out.shape))
    text = f"qc_quantized({text}, {low}, {high}, {target.z})"
    return (*launches, map_launch("blocks_quantized", out.shape, out, result, operands, text))


def _bits(q: QuantParams) -> int:
    """Return the width of the codes."""
    return int(q.qmax - q.qmin).bit_length()


def _each(step: int, first: int, count: int) -> str:
    """Return C++ text of where block z begins, counted from the first of the range."""
    if first:
        return f"(z + {first}) * {step}"
    return f"z * {step}" if count > 1 else "0"


def _step(at: str, distance: int, count: int) -> str:
    """Return C++ text of how far from a window's begin a kernel position lies."""
    return f"{at} * {distance}" if count > 1 else "0"
