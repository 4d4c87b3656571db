# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Weights held in fewer bits than they are multiplied in: widened in registers.

A form of storage (`plan.Storage`) says what a K-group of the packed weights looks like:

* "int4": weights + 8, two to a byte.  For kinds that multiply bytes, one load serves two vectors:
  the low nibbles are the first, the high nibbles the second; a vector without a partner keeps its
  first half in the low nibbles.  For int16 pairs ("exact") a byte holds an even and an odd member
  of its group.
  Codes may have a factor for each column and each run of K-groups, in nibbles too (factor - 9):
  they become int8 weights as they are unpacked, or where `vpmaddubsw` multiplies codes, the
  int16 sums of a run are multiplied by the factors as they are widened.
* "half": the bits of float16 weights of a float32 product.
* "group8", "group4": integers of a float32 product, float32(code - zero) * scale with a scale (and
  a zero) for each column and each run of K-groups; nibbles as above.

Where a task runs few register tiles over a column tile, each unpacks as it goes (products with few
rows wait for memory, and the weights are half as many bytes).  Elsewhere the task unpacks a column
tile once into a work area (`plan.unpacks_ahead`), and the register tiles run as if weights were
plain.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.plan import Storage
from qcompiler.targets.kernels.tir import (
    Buffer,
    Expr,
    bind,
    cast,
    dtype_of,
    fence,
    lanes_of,
    load,
    reinterpret,
    shuffle,
    splat,
)

__all__ = [
    "byte_products",
    "elements_per_lane",
    "factor_pairs",
    "factor_vectors",
    "group_terms",
    "times_factor",
    "weight_vectors",
]


def elements_per_lane(storage: Storage, kind: str) -> tuple[int, int]:
    """Elements of the packed weights for one lane of a K-group, as a fraction."""
    members = {"float": 1, "smmla": 8}.get(kind, 4)
    return members, 2 if storage in ("int4", "group4") else 1


def weight_vectors(
    isa: Isa,
    storage: Storage,
    weight: Buffer,
    kind: str,
    index: Expr,
    nv: int,
    lanes: int,
    terms: Sequence[tuple[Expr, Expr | None]] = (),
) -> list[list[Expr]]:
    """The weight vectors of one K-group.

    Args:
        isa: The row.
        storage: How they lie in memory, not "plain".
        weight: The packed weights.
        kind: How they are multiplied (`plan.Dot`).
        index: First element of the K-group.
        nv: Column vectors.
        lanes: 32-bit lanes of each.
        terms: Scale and zero of each column vector, for storage in groups.

    Returns:
        For each column vector one vector of int8 or float32, or two of int16 for kind "exact".
    """
    if storage == "half":
        halves = [load(weight, index + v * lanes, lanes) for v in range(nv)]
        return [[bind(_from_half(isa, bind(half), lanes))] for half in halves]
    if kind == "exact":
        return [_pairs(load(weight, index + v * 2 * lanes, 2 * lanes), lanes) for v in range(nv)]
    if storage == "group8":
        codes = [load(weight, index + v * lanes, lanes) for v in range(nv)]
    else:
        codes = _bytes(weight, index, nv, lanes if kind == "float" else 4 * lanes)
    if kind != "float":
        return [[bind(code)] for code in codes]
    found = []
    for code, (scale, zero) in zip(codes, terms, strict=True):
        wide = cast(bind(code), "int32")
        if zero is not None:
            wide = wide - zero
        found.append([bind(fence(cast(wide, "float32") * scale))])
    return found


def group_terms(
    scales: Buffer, zeros: Buffer | None, index: Expr, nv: int, lanes: int
) -> list[tuple[Expr, Expr | None]]:
    """Scale and zero of each column vector of one run of K-groups."""
    found: list[tuple[Expr, Expr | None]] = []
    for v in range(nv):
        zero = None
        if zeros is not None:
            zero = bind(cast(load(zeros, index + v * lanes, lanes), "int32"))
        found.append((bind(load(scales, index + v * lanes, lanes)), zero))
    return found


def factor_vectors(factors: Buffer, index: Expr, nv: int, lanes: int) -> list[Expr]:
    """The factors of one run of K-groups: for each column vector one vector of int32."""
    nine = splat(9, "int32", lanes)
    return [bind(cast(bind(code), "int32") + nine) for code in _bytes(factors, index, nv, lanes)]


def times_factor(weights: list[Expr], factor: Expr, kind: str, lanes: int) -> list[Expr]:
    """The registers of one column vector's weights, each code times its column's factor."""
    if kind == "vpdpbusd":
        return [bind(byte_products(code, factor, lanes)) for code in weights]
    if kind == "smmla":  # two columns to a register, eight members of each
        whole = bind(factor * splat(0x01010101, "int32", lanes))
        spread = [shuffle([whole], [2 * h, 2 * h, 2 * h + 1, 2 * h + 1]) for h in range(2)]
        factors = [reinterpret(bind(part), "int8", 4 * lanes) for part in spread]
    elif dtype_of(weights[0]) == "int16":
        factors = [factor_pairs(factor, lanes)] * len(weights)
    elif lanes_of(weights[0]) == 2 * lanes:  # two members of each column to a register
        pairs = bind(cast(factor * splat(0x0101, "int32", lanes), "int16"))
        factors = [reinterpret(pairs, "int8", 2 * lanes)] * len(weights)
    else:
        whole = bind(factor * splat(0x01010101, "int32", lanes))
        factors = [reinterpret(whole, "int8", 4 * lanes)]
    return [bind(w * f) for w, f in zip(weights, factors, strict=True)]


def byte_products(codes: Expr, factor: Expr, lanes: int) -> Expr:
    """int8 codes of 4 bits times factors, four codes to each int32 factor, by 16-bit products.

    Codes plus 8 times factors stay below 256, so that two of them in 16 bits keep apart.
    """
    biased = reinterpret(codes, "uint8", 4 * lanes) + splat(8, "uint8", 4 * lanes)
    whole = bind(factor * splat(0x00010001, "int32", lanes))
    twice = bind(reinterpret(whole, "uint16", 2 * lanes))
    found = bind(reinterpret(bind(biased), "uint16", 2 * lanes) * twice)
    eights = bind(twice * splat(0x0808, "uint16", 2 * lanes))
    return reinterpret(found, "int8", 4 * lanes) - reinterpret(eights, "int8", 4 * lanes)


def factor_pairs(factor: Expr, lanes: int) -> Expr:
    """Each factor twice, as int16."""
    return reinterpret(bind(factor * splat(0x00010001, "int32", lanes)), "int16", 2 * lanes)


def _bytes(weight: Buffer, index: Expr, nv: int, size: int) -> list[Expr]:
    """Vectors of `size` int8 from nibbles."""
    found = []
    for v in range(0, nv - 1, 2):
        low, high = _nibbles(load(weight, index + v * (size // 2), size), size)
        found += [reinterpret(half, "int8", size) for half in (low, high)]
    if nv % 2:
        half = size // 2
        parts = _nibbles(load(weight, index + (nv - 1) * half, half), half)
        whole = shuffle([bind(part) for part in parts], range(size))
        found.append(reinterpret(whole, "int8", size))
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


def _from_half(isa: Isa, bits: Expr, lanes: int) -> Expr:
    """float16 bits as float32: by the conversion instruction, or in integers where there is none.

    Exponent and mantissa moved into place are the number times 2**-112, subnormal or not; the
    product with 2**112 is exact.  Infinities and NaN are never stored.
    """
    if "f16c" in isa.cpu_features or isa.mtriple.startswith("aarch64"):
        return cast(reinterpret(bits, "float16", lanes), "float32")
    wide = bind(cast(bits, "int32"))
    magnitude = (wide & splat(0x7FFF, "int32", lanes)) << splat(13, "int32", lanes)
    scaled = reinterpret(magnitude, "float32", lanes) * splat(2.0**112, "float32", lanes)
    sign = (wide & splat(0x8000, "int32", lanes)) << splat(16, "int32", lanes)
    return reinterpret(bind(reinterpret(scaled, "int32", lanes)) | sign, "float32", lanes)
