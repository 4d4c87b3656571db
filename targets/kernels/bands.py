# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Runs of elements, and rows of an image with its padding, written to a work area."""

from __future__ import annotations

from dataclasses import dataclass

from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    load,
    maximum,
    minimum,
    reinterpret,
    serial,
    splat,
    store,
    when,
)

__all__ = [
    "CHUNK",
    "PaddedRow",
    "copy_elements",
    "copy_padded_row",
    "fill_elements",
    "widen_elements",
]

CHUNK = 64


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """Sizes of a row of NHWC images, and of its padded copy."""

    h: int
    """Rows of an image."""
    w: int
    """Pixels of a row."""
    c: int
    left: int
    """Pixels of padding on the left."""
    width: int
    """Pixels of the padded row."""

    @property
    def pitch(self) -> int:
        """Elements of the padded row."""
        return self.width * self.c


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


def widen_elements(target: Buffer, to: Expr, source: Buffer, start: Expr, count: int) -> None:
    """Copy `count` elements into a wider type."""
    whole, rest = _chunks(count)
    if whole:
        with serial(whole) as chunk:
            at = chunk * CHUNK
            store(target, to + at, cast(load(source, start + at, CHUNK), str(target.dtype)))
    for at, size in rest:
        store(target, to + at, cast(load(source, start + at, size), str(target.dtype)))


def copy_padded_row(
    sizes: PaddedRow, image: Expr, row: Expr, fill: Expr, source: Buffer, target: Buffer, to: Expr
) -> None:
    """Copy a row of an image with its padding on both sides.

    Args:
        sizes: Of the images and of the padded row.
        image: Which image of the batch.
        row: Which row of it; outside of the image, all is padding.
        fill: Element of the padding.
        source: The images.
        target: The work area.
        to: Where the padded row starts in it.
    """
    pitch = sizes.pitch
    left = min(sizes.left, sizes.width) * sizes.c
    inside = max(0, min(sizes.w, sizes.width - sizes.left)) * sizes.c
    with when(row < 0):
        fill_elements(target, to, fill, pitch)
    with when(row >= sizes.h):
        fill_elements(target, to, fill, pitch)
    with when(maximum(0, row) == minimum(row, sizes.h - 1)):
        fill_elements(target, to, fill, left)
        start = bind((image * sizes.h + row) * (sizes.w * sizes.c))
        copy_elements(target, to + left, source, start, inside)
        fill_elements(target, to + (left + inside), fill, pitch - left - inside)
