# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Elementwise kernels: every result element is an expression of one element of each operand.

Where an operand's element lies is affine in the result's coordinates (broadcast, transpose, slice)
or goes through a table per axis (resize, padding, tiling). So most operators that are not products
are one of these kernels, differing in the expression and the strides alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qcompiler.targets.cuda.program import Argument, Buffer, Launch
from qcompiler.targets.cuda.source import KernelText, c_type, entry
from qcompiler.types import Array, DType, Shape

THREADS = 256
_WIDEST = 16  # bytes that one instruction moves


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand, or the result, of a map.

    Attributes:
        source: What is read or written.
        dtype: Its elements.
        strides: Elements between neighbours along each axis of the map.
        offset: Where the first element lies.
        tables: Axis -> offset of each coordinate, in place of the stride; -1: there is no element.
        fill: C++ text of the value where a table says that there is no element.
    """

    source: Argument
    dtype: DType
    strides: tuple[int, ...]
    offset: int = 0
    tables: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    fill: str = "0"


def row_major(shape: Shape) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def broadcast_strides(shape: Shape, out: Shape) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor broadcast to a shape."""
    own = row_major(shape)
    missing = len(out) - len(shape)
    kept = [0 if e == 1 else s for e, s in zip(shape, own, strict=True)]
    return (*[0] * missing, *kept)


def _collapsed(shape: Shape, operands: Sequence[Operand]) -> tuple[Shape, list[Operand]]:
    """Drop axes of one element and join neighbours that every operand steps through as one."""
    axes: list[list[int]] = []
    tabled = {a for o in operands for a in o.tables}
    for axis, extent in enumerate(shape):
        if extent == 1 and axis not in tabled:
            continue
        if axes and axis not in tabled and axes[-1][-1] not in tabled:
            before = axes[-1][-1]
            if all(o.strides[before] == o.strides[axis] * extent for o in operands):
                axes[-1].append(axis)
                continue
        axes.append([axis])
    if not axes:
        axes = [[0]] if shape else []
    extents = tuple(math.prod(shape[a] for a in run) for run in axes)
    new = [
        replace(
            o,
            strides=tuple(o.strides[run[-1]] for run in axes),
            tables={i: o.tables[run[0]] for i, run in enumerate(axes) if run[0] in o.tables},
        )
        for o in operands
    ]
    if not axes:
        return (1,), [replace(o, strides=(0,)) for o in new]
    return extents, new


def _vector(shape: Shape, out: Operand, operands: Sequence[Operand]) -> int:
    """Return how many neighbouring elements a thread computes."""
    widest = max(o.dtype.numpy.itemsize for o in (out, *operands))
    v = max(1, _WIDEST // widest)
    last = len(shape) - 1
    while v > 1:
        fits = shape[last] % v == 0 and _packed(out, last, v)
        if fits:
            break
        v //= 2
    return v


def _packed(o: Operand, last: int, v: int) -> bool:
    """Whether V neighbours along the last axis lie side by side at a multiple of V."""
    return (
        o.strides[last] == 1
        and not o.tables
        and o.offset % v == 0
        and all(s % v == 0 for s in o.strides[:last])
    )


def map_launch(
    kind: str,
    shape: Shape,
    result: Buffer,
    out: Operand,
    operands: Sequence[Operand],
    expression: str,
    extra: Sequence[tuple[str, Argument]] = (),
) -> Launch:
    """Return the launch of a map.

    Args:
        kind: Name of the operator, for reports.
        shape: Coordinates, one thread (or V of them) each.
        result: Buffer that `out` writes to.
        out: Where results go.
        operands: What is read; the expression knows them as a, b, c, ...
        expression: C++ expression of one result element, already of its type.
        extra: (C++ pointer type, argument) of arrays that the expression indexes, as e0, e1, ...
    """
    extents, everything = _collapsed(shape, [out, *operands])
    out, operands = everything[0], everything[1:]
    last = len(extents) - 1
    v = _vector(extents, out, operands)
    total = math.prod(extents)
    parameters: list[str] = []
    arguments: list[Argument] = []
    lines = [f"  int r = static_cast<int>(blockIdx.x * {THREADS} + threadIdx.x) * {v};"]
    lines.append(f"  if (r >= {total}) return;")
    for axis in range(last, -1, -1):
        if axis == 0:
            lines.append("  const int i0 = r;")
        else:
            lines.append(f"  const int i{axis} = r % {extents[axis]}; r /= {extents[axis]};")
    for n, operand in enumerate(operands):
        name = chr(ord("a") + n)
        ctype = c_type(operand.dtype)
        parameters.append(f"const {ctype}* __restrict__ p{name}")
        arguments.append(operand.source)
        if operand.tables:
            parameters.append(f"const int* __restrict__ t{name}")
            arguments.append(_table(operand))
        lines += _loads(operand, name, ctype, extents, v)
    for n, (pointer, argument) in enumerate(extra):
        parameters.append(f"{pointer} __restrict__ e{n}")
        arguments.append(argument)
    ctype = c_type(out.dtype)
    parameters.append(f"{ctype}* __restrict__ y")
    where = " + ".join([str(out.offset), *(f"i{d} * {s}" for d, s in enumerate(out.strides) if s)])
    lines.append(f"  qc_pack<{ctype}, {v}> result;")
    lines.append("#pragma unroll")
    lines.append(f"  for (int j = 0; j < {v}; ++j) {{")
    for n, operand in enumerate(operands):
        name = chr(ord("a") + n)
        each = f"v{name}.at[j]"
        value = f"qc_real({each})" if operand.dtype is DType.FLOAT16 else each
        lines.append(f"    const auto {name} = {value};")
    lines.append(f"    result.at[j] = qc_as<{ctype}>::of({expression});")
    lines.append("  }")
    lines.append(f"  qc_store<{v}>(y + ({where}), result);")
    text = entry(", ".join(parameters), THREADS, "\n".join(lines))
    blocks = -(-total // (THREADS * v))
    return Launch(KernelText(kind, text), (blocks, 1, 1), THREADS, tuple(arguments), result)


def _table(operand: Operand) -> Array:
    """Return the tables of an operand, one after the other."""
    parts = [np.asarray(operand.tables[axis], np.int32) for axis in sorted(operand.tables)]
    return np.concatenate(parts)


def _loads(operand: Operand, name: str, ctype: str, extents: Shape, v: int) -> list[str]:
    """Return the lines that bring V elements of an operand into v<name>."""
    last = len(extents) - 1
    terms = [str(operand.offset)]
    terms += [
        f"i{d} * {s}"
        for d, s in enumerate(operand.strides)
        if s and d not in operand.tables and (d != last or v == 1)
    ]
    lines = [f"  qc_pack<{ctype}, {v}> v{name};"]
    if not operand.tables and v > 1 and _packed(operand, last, v):
        terms.append(f"i{last}")
        return [f"  const auto v{name} = qc_load<{v}>(p{name} + ({' + '.join(terms)}));"]
    inner = operand.strides[last] if last not in operand.tables else 0
    start = 0
    here: list[str] = []  # table entries per element
    guards: list[str] = []
    for axis in sorted(operand.tables):
        at = f"i{axis} + j" if axis == last and v > 1 else f"i{axis}"
        here.append(f"    const int t{axis} = t{name}[{start} + {at}];")
        guards.append(f"t{axis} >= 0")
        start += len(operand.tables[axis])
    parts = [*terms, *(f"t{axis}" for axis in sorted(operand.tables))]
    if inner and v > 1:
        parts.append(f"(i{last} + j) * {inner}")
    lines += ["#pragma unroll", f"  for (int j = 0; j < {v}; ++j) {{", *here]
    load = f"p{name}[{' + '.join(parts)}]"
    if guards and any(-1 in t for t in operand.tables.values()):
        load = f"{' && '.join(guards)} ? {load} : {ctype}({operand.fill})"
    lines += [f"    v{name}.at[j] = {load};", "  }"]
    return lines
