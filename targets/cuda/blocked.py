# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Matrix products of weights with a scale, and a zero point, per block along K.

A product for each block on tensor cores, exact in int32; a map scales them and adds them up in the
order of K, as `numerics_grouped` and `numerics_dynamic` define it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.targets.cuda.maps import THREADS, Operand, map_launch, row_major
from qcompiler.targets.cuda.products import Epilogue, Product
from qcompiler.targets.cuda.program import Argument, Buffer, Launch, Temporary
from qcompiler.targets.cuda.source import KernelText, entry, literal
from qcompiler.types import Array, DType, PerGroup

if TYPE_CHECKING:
    from qcompiler.targets.cuda.lowering import Answer, Maker

__all__ = ["blocked_matmul", "blocked_product"]


def blocked_product(
    make: Maker,
    node: Node,
    size: int,
    scale: Array,
    start: Array | None,
    total: Buffer,
    own: Value | None = None,
) -> tuple[Launch, ...] | str:
    """Return launches that write the float32 sums of all blocks, or why there are none.

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
    depth, columns = b.shape
    rows, blocks = math.prod(a.shape[:-1]), depth // size
    if rows * columns * blocks >= 1 << 31:
        return f"{blocks} blocks of {rows} x {columns} sums are more than kernels count to"
    sums = Temporary(rows * columns * blocks * 4)
    product = Product(
        a, None, rows, columns, size, blocks, a.dtype, DType.INT8,
        Epilogue(DType.FLOAT32, np.ones(1, np.float32)), sums, a_row=depth, out_row=columns,
        a_offset=_each(size, blocks), c_offset=_each(rows * columns, blocks),
        n_offset=_each(columns, blocks), a_zero=a.qparams.z,
        b_zero=b.qparams.zero_point.astype(np.int64).reshape(-1),
        weights=np.ascontiguousarray(b.array().reshape(blocks, size, columns).transpose(0, 2, 1)),
    )  # fmt: skip
    factor = f"scale[g * {columns} + column]"
    if own is not None:
        factor = f"__fmul_rn(own[i / {columns} * {blocks} + g], {factor})"
    body = "\n".join([
        f"  const int i = static_cast<int>(blockIdx.x * {THREADS} + threadIdx.x);",
        f"  if (i >= {rows * columns}) return;",
        f"  const int column = i % {columns};",
        "  float t = start[column];",
        f"  for (int g = 0; g < {blocks}; ++g) {{",
        f"    const float sum = sums[g * {rows * columns} + i];",
        f"    t = __fadd_rn(t, __fmul_rn(sum, {factor}));",
        "  }",
        "  out[i] = t;",
    ])  # fmt: skip
    if start is None:
        start = np.zeros(columns, np.float32)
    given: list[tuple[str, Argument]] = [
        ("sums", sums),
        ("scale", np.ascontiguousarray(scale, np.float32)),
        ("start", np.ascontiguousarray(start, np.float32).reshape(-1)),
    ]
    if own is not None:
        given.append(("own", own))
    parameters = [f"const float* __restrict__ {name}" for name, _ in given]
    text = entry(", ".join([*parameters, "float* __restrict__ out"]), THREADS, body)
    added = Launch(
        KernelText("blocks", text), (-(-rows * columns // THREADS), 1, 1), THREADS,
        tuple(argument for _, argument in given), total,
    )  # fmt: skip
    return make.product(product), added


def blocked_matmul(make: Maker, node: Node) -> Answer:
    """Return the launches of a `qmatmul` whose weights are in blocks, or why there are none."""
    a, b, out = node.input(0), node.input(1), node.output
    bias, residual = node.optional(2), node.optional(3)
    aq, bq, target = a.qparams, b.qparams, out.qparams
    assert aq is not None  # the caller looked
    assert bq is not None
    assert isinstance(bq.granularity, PerGroup)
    if bias is not None and not bias.is_constant:
        return "its bias is computed at run time"
    over = 1.0 if target is None else target.scale
    total = out if target is None else Temporary(out.type.size * 4)
    launches = blocked_product(
        make, node, bq.granularity.group_size, numerics.multiplier(aq.scale, bq.scale, over=over),
        None if bias is None else numerics.multiplier(bias.array(), over=over), total,
    )  # fmt: skip
    if isinstance(launches, str) or target is None:
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


def _each(step: int, count: int) -> str:
    """C++ text of where block z begins."""
    return f"z * {step}" if count > 1 else "0"
