# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Softmax of float scores: bit for bit the definition in numerics."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler import numerics
from qcompiler.targets.isa import ISA_TABLE, Isa, runnable
from qcompiler.targets.kernels import harness
from qcompiler.targets.kernels.scores import ScoresWorkload, softmax_scores
from qcompiler.types import DType, QuantParams

ROWS = [isa for isa in ISA_TABLE.values() if runnable(isa)]


@pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((2, 3, 7, 128), -1),
        ((5, 64), 1),
        ((3, 1), -1),
        ((2, 9, 5), 1),
        ((4, 33), -1),
        ((2, 300), 1),
    ],
)
def test_equals_the_definition(
    isa: Isa, shape: tuple[int, ...], axis: int, rng: np.random.Generator
) -> None:
    x = (rng.standard_normal(shape) * 8).astype(np.float32)
    x[rng.random(shape) < 0.2] -= np.float32(10000)
    x[rng.random(shape) < 0.1] = -np.inf
    x[rng.random(shape) < 0.1] = np.float32(-3.4e38)
    x.reshape(-1)[0] = 0.0
    q = QuantParams(1 / 255, 0, DType.UINT8, 0, 255)
    w = ScoresWorkload(shape, axis, q.s, "uint8", 0, 0, 255)
    library = harness.build(softmax_scores(w, isa), isa)
    found = harness.run(library, x, shape=shape, dtype="uint8")
    np.testing.assert_array_equal(found, numerics.softmax(x, None, axis, q))


def test_exp_is_accurate() -> None:
    x = np.linspace(-87, 0, 200001, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(numerics.exp_f32(x) / exact - 1).max() < 2e-7
