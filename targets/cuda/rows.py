# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Launches of operators along one axis: reductions, softmax, normalization, scans."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from qcompiler.targets.cuda.program import Argument, Buffer, Launch
from qcompiler.targets.cuda.source import NAME, KernelText, entry, struct
from qcompiler.types import Shape

_THREADS = 256


def along(shape: Shape, axis: int) -> tuple[int, int, int]:
    """Return (outer, depth, inner) extents of an axis."""
    axis %= len(shape)
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def _threads(depth: int) -> int:
    """Return the threads of a block that works on one row: a power of two, one warp at least."""
    threads = 32
    while threads < 256 and threads * 4 < depth:
        threads *= 2
    return threads


def row_launch(
    kind: str,
    template: str,
    extents: tuple[int, int, int],
    types: Mapping[str, str],
    constants: Mapping[str, object],
    functions: Sequence[str],
    arguments: Sequence[tuple[str, Argument]],
    result: tuple[str, Buffer],
    *,
    thread_per_row: bool = False,
) -> Launch:
    """Return the launch of a template of rows.cuh.

    Args:
        kind: Name of the operator.
        template: The function template.
        extents: (outer, depth, inner).
        types: Further type members of P.
        constants: Further constants of P.
        functions: Further functions of P.
        arguments: (C++ element type, argument) of each operand.
        result: (C++ element type, buffer).
        thread_per_row: Whether a thread works on a row, instead of a block.
    """
    outer, depth, inner = extents
    rows = outer * inner
    threads = _THREADS if thread_per_row else _threads(depth)
    constants = {"DEPTH": depth, "INNER": inner, "ROWS": rows, "THREADS": threads, **constants}
    text = struct("", types, constants, functions) + "\n"
    names = [f"p{i}" for i in range(len(arguments))]
    parameters = [f"const {t}* {n}" for n, (t, _) in zip(names, arguments, strict=True)]
    body = f"  {template}<{NAME}_p>({', '.join([*names, 'out'])});"
    text += entry(", ".join([*parameters, f"{result[0]}* out"]), threads, body)
    blocks = -(-rows // threads) if thread_per_row else rows
    shared = 0 if thread_per_row else threads // 32 * 8
    return Launch(
        KernelText(kind, text, ("rows.cuh",)), (blocks, 1, 1), threads,
        tuple(a for _, a in arguments), result[1], shared,
    )  # fmt: skip
