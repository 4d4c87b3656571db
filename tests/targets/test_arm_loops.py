# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The inner loops of the ARM kernels, on LLVM's models of the processors."""

from __future__ import annotations

from pathlib import Path

import pytest
from by_path import imported

from qcompiler.targets.isa import isa_named, with_processor

ROOT = Path(__file__).resolve().parents[2]
_NEOVERSE = 18
"""The first LLVM with models of Neoverse N1, N2 and V1."""


loops = imported("arm_loops", ROOT / "benchmarks/arm_loops.py")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sdot\tv1.4s, v2.16b, v3.4b[1]", 16),
        ("smmla\tv1.4s, v2.16b, v3.16b", 32),
        ("smull\tv1.8h, v2.8b, v3.8b", 8),
        ("smlal2\tv1.8h, v2.16b, v3.16b", 8),
        ("smlal\tv1.4s, v2.4h, v3.h[1]", 4),
        ("fmla\tv1.4s, v2.4s, v3.s[1]", 4),
        ("fmla\tv1.8h, v2.8h, v3.h[1]", 8),
        ("sadalp\tv1.4s, v2.8h", 0),
        ("ldr\tq1, [x2]", 0),
    ],
)
def test_products_of_an_instruction(line: str, expected: int) -> None:
    assert loops.products(line) == expected


@pytest.mark.parametrize(
    ("row", "processor", "kernel", "least"),
    [
        ("arm-neon", "cortex-a72", "1x1, 192 to 64 channels", 0.95),
        ("arm-dotprod", "neoverse-n1", "1x1, 192 to 64 channels", 0.95),
        ("arm-dotprod", "neoverse-n1", "3x3, float32", 0.9),
        ("arm-dotprod", "neoverse-n1", "3x3, float16", 0.95),
        ("arm-i8mm", "neoverse-v1", "3x3, float16", 0.95),
        ("arm-i8mm", "neoverse-n2", "1x1, 192 to 64 channels", 0.85),
        ("arm-i8mm", "neoverse-v1", "3x3, 64 to 64 channels", 0.85),
    ],
)
def test_loops_keep_the_multipliers_busy(
    row: str, processor: str, kernel: str, least: float
) -> None:
    mca = loops.find_mca()
    if mca is None or loops.version(mca) < _NEOVERSE:
        pytest.skip(f"needs llvm-mca {_NEOVERSE} or later: install llvm-19")
    isa = with_processor(isa_named(row), processor)
    found = loops.model(loops.hot_loop(loops.SHAPES[kernel], isa), isa, mca)
    assert least <= found.share <= 1.02, found
