# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""x86-64 CPUs: one row of the ISA table per target."""

from __future__ import annotations

from qcompiler.targets.base import Backend
from qcompiler.targets.cpu import backend_of_row
from qcompiler.targets.isa import Isa, isa_named
from qcompiler.types import UNCALIBRATED, Precision

_DESCRIPTIONS = {
    "x86-64": "any x86-64 CPU (SSE2): int16 products, the slow common ground",
    "x86-avx2": "AVX2 and FMA without VNNI: exact u8 x s8, proved or widened per tile",
    "x86-avxvnni": "AVX-VNNI, 256-bit (client CPUs since Alder Lake and Zen 5)",
    "x86-avx512vnni": "AVX512-VNNI, 512-bit (servers since Cascade Lake and Zen 4)",
    "x86-amx": "AMX-INT8 tiles beside AVX512-VNNI (servers since Sapphire Rapids)",
}


def _precisions(isa: Isa) -> tuple[Precision, ...]:
    """Return what the row has a reason to compute in.

    4-bit weights take half the memory on every row. Where `vpmaddubsw` multiplies, fewer bits also
    let more products share one widening instruction (`kernels.depth`); the other rows take the
    same time for any 8-bit operands. What needs no calibration comes last.
    """
    narrow: tuple[Precision, ...]
    if isa.dot != "maddubs":
        narrow = (Precision.W4A8, Precision.W4A8_GROUP)
    else:
        narrow = (
            Precision.W8A7, Precision.W7A8, Precision.W6A8, Precision.W4A8, Precision.W4A8_GROUP,
        )  # fmt: skip
    return (Precision.W8A8, *narrow, Precision.FP32, *UNCALIBRATED)


def make(name: str) -> Backend:
    """Entry point: return the backend of an x86 row of the ISA table.

    Raises:
        UnknownTargetError: No x86 row of that name.
    """
    precisions = _precisions(isa_named(name)) if name in _DESCRIPTIONS else ()
    return backend_of_row(name, _DESCRIPTIONS, precisions)
