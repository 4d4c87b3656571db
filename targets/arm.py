# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""64-bit ARM CPUs: the rows of the ISA table that compile for aarch64 Linux from any host."""

from __future__ import annotations

from qcompiler.targets.base import Backend
from qcompiler.targets.cpu import backend_of_row
from qcompiler.types import UNCALIBRATED, Precision

_DESCRIPTIONS = {
    "arm-neon": "any 64-bit ARM CPU (cortex-a72 and older): s8 x s8 into int16, proved or widened",
    "arm-dotprod": "ARM with SDOT (cortex-a76, neoverse-n1 and later): s8 x s8 into int32",
    "arm-i8mm": "ARM with I8MM (neoverse-v1 and -n2, cortex-a710): 2x8 by 8x2 matrix products",
}
_PRECISIONS = (
    Precision.W8A8, Precision.W4A8, Precision.W4A8_GROUP, Precision.FP32, *UNCALIBRATED
)  # fmt: skip


def make(name: str) -> Backend:
    """Entry point: return the backend of an ARM row of the ISA table.

    Raises:
        UnknownTargetError: No ARM row of that name.
    """
    return backend_of_row(name, _DESCRIPTIONS, _PRECISIONS)
