# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The GPU generations that kernels are made for: one row each, plain data.

Sources: CUDA C++ Programming Guide 13.0, tables "Technical Specifications per Compute Capability";
the number of multiprocessors is that of the named card and only guides the choice of tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qcompiler.errors import UnknownTargetError


@dataclass(frozen=True, slots=True)
class Arch:
    """One GPU generation."""

    name: str
    """Target name."""
    sm: int
    """Compute capability times 10."""
    card: str
    """A card of that generation, for the description."""
    multiprocessors: int
    """How many the card has."""
    shared_bytes: int
    """Shared memory that one block can have."""
    shared_per_sm: int
    """Shared memory of a multiprocessor."""
    async_copies: bool
    """Whether cp.async exists: more than two buffers hide the latency of memory."""

    @property
    def isa(self) -> str:
        """Name of the instruction set, as nvcc spells it."""
        return f"sm_{self.sm}"


_ROWS = (
    Arch("cuda-sm75", 75, "Turing, such as T4", 40, 64 << 10, 64 << 10, False),
    Arch("cuda-sm80", 80, "Ampere, such as A100", 108, 163 << 10, 164 << 10, True),
    Arch("cuda-sm86", 86, "Ampere, such as A10 and RTX 30", 72, 99 << 10, 100 << 10, True),
    Arch("cuda-sm89", 89, "Ada, such as L4 and RTX 40", 58, 99 << 10, 100 << 10, True),
    Arch("cuda-sm90", 90, "Hopper, such as H100", 132, 227 << 10, 228 << 10, True),
)

ARCHES: Mapping[str, Arch] = MappingProxyType({row.name: row for row in _ROWS})
"""All rows by name."""


def arch_named(name: str) -> Arch:
    """Return the row of a target name.

    Raises:
        UnknownTargetError: No such row; the message lists the rows.
    """
    if name not in ARCHES:
        raise UnknownTargetError(f"no CUDA row is named {name!r}: rows are {', '.join(ARCHES)}")
    return ARCHES[name]
