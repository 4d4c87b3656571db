# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Bytes of several vectors interleaved into 32-bit lanes, and the way back.

Unpack instructions interleave within 128-bit lanes.  Four vectors of V bytes so become four vectors
of V / 4 lanes of 32 bits in *packed order*: lane `l` of part `p` holds channel
`l // 4 * 16 + p * 4 + l % 4` (`lane_channels`).  The saturating pack instructions undo exactly this
permutation, so results narrow back to bytes in order, with no shuffle across lanes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import tir
from qcompiler.targets.kernels.lanes import lane_channels
from qcompiler.targets.kernels.tir import Expr

__all__ = ["in_order", "interleave", "narrowed", "scattered"]


def interleave(rows: Sequence[Expr]) -> list[Expr]:
    """Interleave four vectors of bytes, or two widened to int16: four parts of int32 lanes."""
    lanes = tir.lanes_of(rows[0])
    low = [_unpack(rows[0], rows[1], high) for high in (0, 1)]
    top = [_unpack(rows[2], rows[3], high) for high in (0, 1)] if len(rows) == 4 else []
    out = []
    for half in range(2):
        for high in range(2):
            if top:
                words = [tir.reinterpret(v[half], "int16", lanes // 2) for v in (low, top)]
                words = [tir.bind(word) for word in words]
                merged = _unpack(words[0], words[1], high)
            else:
                merged = _unpack(low[half], tir.splat(0, "uint8", lanes), high)
            out.append(tir.bind(tir.reinterpret(merged, "int32", lanes // 4)))
    return out


def _unpack(a: Expr, b: Expr, high: int) -> Expr:
    """Interleave the low or high halves of the 128-bit lanes of `a` and `b`."""
    count = tir.lanes_of(a)
    per_lane = 16 if tir.dtype_of(a).endswith("int8") else 8
    indices: list[int] = []
    for start in range(0, count, per_lane):
        for k in range(per_lane // 2):
            lane = start + high * (per_lane // 2) + k
            indices += [lane, count + lane]
    return tir.bind(tir.shuffle([a, b], indices))


def in_order(parts: Sequence[Expr]) -> Expr:
    """Four parts in packed order as one vector in channel order."""
    lanes = 4 * tir.lanes_of(parts[0])
    position = np.argsort(lane_channels(lanes).reshape(-1))
    return tir.shuffle([tir.bind(part) for part in parts], position.tolist())


def scattered(value: Expr) -> list[Expr]:
    """A vector in channel order as four parts in packed order, widened to int32."""
    value = tir.bind(value)
    order = lane_channels(tir.lanes_of(value))
    return [tir.cast(tir.shuffle([value], part.tolist()), "int32") for part in order]


def narrowed(isa: Isa, parts: Sequence[Expr], zero_point: Expr | None, dtype: str) -> Expr:
    """Four int32 parts in packed order, plus `zero_point`, saturated to `dtype`, in channel order.

    `zero_point` is a scalar int32 or None.  For 8-bit results it is added between the packs:
    saturating to int16 before and after it changes nothing.
    """
    lanes = 4 * tir.lanes_of(parts[0])
    half = tir.vector("int16", lanes // 2)
    if zero_point is not None and dtype == "int16":
        parts = [part + tir.splat(zero_point, "int32", lanes // 4) for part in parts]
    parts = [tir.bind(part) for part in parts]
    words = [tir.saturated(isa, parts[i], parts[i + 1], "int16") for i in (0, 2)]
    if zero_point is not None and dtype != "int16":
        shift = tir.splat(tir.cast(zero_point, "int16"), "int16", lanes // 2)
        words = [tir.intrinsic(half, "llvm.sadd.sat", word, shift) for word in words]
    words = [tir.bind(word) for word in words]
    if dtype == "int16":
        channels = lane_channels(lanes).reshape(2, 2, -1, 4)  # pair, member, 128-bit lane, word
        position = np.argsort(channels.transpose(0, 2, 1, 3).reshape(-1))
        return tir.shuffle(words, position.tolist())
    return tir.saturated(isa, words[0], words[1], dtype)
