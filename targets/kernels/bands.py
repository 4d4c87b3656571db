# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Runs of elements, and rows of an image with its padding, written to a work area."""

from __future__ import annotations

from qcompiler.targets.kernels.plan import Geometry
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    load,
    maximum,
    minimum,
    reinterpret,
    serial,
    splat,
    store,
    when,
)

__all__ = ["CHUNK", "copy_elements", "copy_padded_row", "fill_elements"]

CHUNK = 64


def _chunks(count: int) -> tuple[int, list[tuple[int, int]]]:
    """Whole chunks of `CHUNK` elements, and (offset, length) of the pieces that remain."""
    whole = count // CHUNK
    rest = []
    at, size = whole * CHUNK, CHUNK
    while at < count:
        while size > count - at:
            size //= 2
        rest.append((at, size))
        at += size
    return whole, rest


def fill_elements(buffer: Buffer, start: Expr, value: Expr, count: int) -> None:
    """Set `count` elements to a scalar."""
    dtype = str(buffer.dtype)
    whole, rest = _chunks(count)
    if whole:
        with serial(whole) as chunk:
            store(buffer, start + chunk * CHUNK, splat(value, dtype, CHUNK))
    for at, size in rest:
        store(buffer, start + at, splat(value, dtype, size))


def copy_elements(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int) -> None:
    """Copy `count` elements; s8 becomes u8 by adding 128, and u8 becomes s8."""
    flip = source.dtype != target.dtype

    def piece(at: Expr, size: int) -> None:
        value = load(source, start + at, size)
        if flip:
            value = reinterpret(value, "uint8", size) ^ splat(128, "uint8", size)
            value = reinterpret(value, str(target.dtype), size)
        store(target, to + at, value)

    whole, rest = _chunks(count)
    if whole:
        with serial(whole) as chunk:
            piece(chunk * CHUNK, CHUNK)
    for at, size in rest:
        piece(at, size)


def copy_padded_row(
    g: Geometry, image: Expr, row: Expr, fill: Expr, source: Buffer, target: Buffer, to: Expr
) -> None:
    """Copy a row of an image with its padding on both sides.

    Args:
        g: Geometry of the convolution.
        image: Which image of the batch.
        row: Which row of it; outside of the image, all is padding.
        fill: Element of the padding.
        source: The images.
        target: The work area.
        to: Where the padded row starts in it.
    """
    pitch = g.band_width * g.c
    left = min(g.pl, g.band_width) * g.c
    inside = max(0, min(g.w, g.band_width - g.pl)) * g.c
    with when(row < 0):
        fill_elements(target, to, fill, pitch)
    with when(row >= g.h):
        fill_elements(target, to, fill, pitch)
    with when(maximum(0, row) == minimum(row, g.h - 1)):
        fill_elements(target, to, fill, left)
        start = bind((image * g.h + row) * (g.w * g.c))
        copy_elements(target, to + left, source, start, inside)
        fill_elements(target, to + (left + inside), fill, pitch - left - inside)
