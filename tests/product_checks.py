# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What imported quantized products must be: integers, exact, and as ONNX Runtime says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from product_models import Net, runtime

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.targets.isa import ISA_TABLE, runnable

Array = np.ndarray[Any, np.dtype[Any]]
Make = Callable[[Net], str]
ROWS = [isa.name for isa in ISA_TABLE.values() if runnable(isa)]
FLOATS = {"conv", "matmul", "conv_transpose"}


def compiled(model: onnx.ModelProto, feeds: dict[str, Array], target: str) -> Array:
    (found,) = qcompiler.compile(model, target=target)(feeds).values()
    return np.asarray(found)


def check(make: Make, targets: list[str], seed: int = 0, *, rounded: bool = False) -> None:
    """Integers everywhere, the same bits on every target, and ONNX Runtime's numbers."""
    net = Net(seed)
    y = make(net)
    y = net.quantized(y, 20.0) if rounded else y
    model = net.model(y)
    assert not FLOATS & {n.op.name for n in quantize_model(model).graph.nodes}
    want = compiled(model, net.samples, "reference")
    for target in targets:
        np.testing.assert_array_equal(compiled(model, net.samples, target), want, target)
    (theirs,) = runtime(model, net.samples)
    # Float sums are rounded, and biases, to half a step of 10 / 255 by 2 / 255; rounded to codes,
    # a sum near a tie may be a code off.
    span = float(np.abs(theirs).max())
    atol = 40 / 255 * 1.001 if rounded else max(4e-6 * span, 1.6e-4)
    np.testing.assert_allclose(want, theirs, rtol=0, atol=atol)


def in_turn(names: Sequence[str], every: int) -> list[Any]:
    """Every so many of the names as test parameters; the others are slow."""
    slow = pytest.mark.slow
    return [n if i % every == 0 else pytest.param(n, marks=slow) for i, n in enumerate(names)]
