# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights stored in fewer bits than they are multiplied in: unpacked in registers.

A form of storage (`plan.Storage`) says what a K-group of the packed weights looks like:

* "int4": weights + 8, two to a byte.  For kinds that multiply bytes, one load serves two vectors:
  the low nibbles are the first, the high nibbles the second; a vector without a partner keeps its
  first half in the low nibbles.  For int16 pairs ("exact") a byte holds an even and an odd member
  of its group.

Where a task runs few register tiles over a column tile, each unpacks as it goes (products with few
rows wait for memory, and the weights are half as many bytes).  Elsewhere the task unpacks a column
tile once into a work area (`unpacks_ahead`), and the register tiles run as if weights were plain.
"""

from __future__ import annotations

from qcompiler.targets.kernels.plan import Storage, TilePlan
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    load,
    reinterpret,
    shuffle,
    splat,
)

__all__ = ["unpacks_ahead", "weight_vectors"]

_FEW = 3
"""Register tiles of a task over one column tile from which unpacking ahead pays."""


def unpacks_ahead(storage: Storage, plan: TilePlan, order: str) -> bool:
    """Whether a task unpacks each column tile once, before its register tiles."""
    tiles = min(plan.row_block, plan.rows.tiles) * plan.cols.tiles
    return storage != "plain" and order == "n" and tiles >= _FEW


def weight_vectors(weight: Buffer, kind: str, index: Expr, nv: int, lanes: int) -> list[list[Expr]]:
    """The weight vectors of one K-group stored as "int4".

    Args:
        weight: The packed weights, bytes.
        kind: How they are multiplied (`plan.Dot`).
        index: First byte of the K-group.
        nv: Column vectors.
        lanes: 32-bit lanes of each.

    Returns:
        For each column vector one vector of int8, or two of int16 for kind "exact".
    """
    if kind == "exact":
        return [_pairs(load(weight, index + v * 2 * lanes, 2 * lanes), lanes) for v in range(nv)]
    size, found = 4 * lanes, []
    for v in range(0, nv - 1, 2):
        low, high = _nibbles(load(weight, index + v * (size // 2), size), size)
        found += [[bind(reinterpret(half, "int8", size))] for half in (low, high)]
    if nv % 2:
        half = size // 2
        parts = _nibbles(load(weight, index + (nv - 1) * half, half), half)
        whole = shuffle([bind(part) for part in parts], range(size))
        found.append([bind(reinterpret(whole, "int8", size))])
    return found


def _nibbles(value: Expr, size: int) -> tuple[Expr, Expr]:
    """The low and the high nibbles of bytes, minus 8."""
    value = bind(value)
    eight = splat(8, "uint8", size)
    low = (value & splat(15, "uint8", size)) - eight
    return low, (value >> splat(4, "uint8", size)) - eight


def _pairs(value: Expr, lanes: int) -> list[Expr]:
    """The even and the odd members of groups as int16 pairs."""
    wide = bind(cast(value, "int16"))
    eight = splat(8, "int16", 2 * lanes)
    even = (wide & splat(15, "int16", 2 * lanes)) - eight
    return [bind(even), bind((wide >> splat(4, "int16", 2 * lanes)) - eight)]
