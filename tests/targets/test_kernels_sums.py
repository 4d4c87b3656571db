# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Sums of what elementwise steps make: in order, every step and sum rounded by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.harness import build, run
from qcompiler.targets.kernels.sums import SumChainWorkload, sum_chain

ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
F = np.float32
FUNCTIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}


@pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
@settings(max_examples=12, deadline=None)
@given(
    names=st.lists(st.sampled_from([*FUNCTIONS, "round", "relu"]), min_size=1, max_size=4),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 70)),
    axis=st.integers(0, 2),
    repeated=st.lists(st.integers(0, 15), min_size=4, max_size=4),
    keepdims=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_steps_are_rounded_and_added_in_order(
    isa, names, shape, axis, repeated, keepdims, seed
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * 100).astype(F)
    real, others, steps = x, [], []
    for name, ones in zip(names, repeated, strict=False):
        if name not in FUNCTIONS:
            real = np.rint(real) if name == "round" else np.maximum(real, F(0))
            steps.append((name, ()))
            continue
        by = tuple(1 if ones >> i & 1 else d for i, d in enumerate(shape))
        by = by[1:] if by[0] == 1 else by  # fewer axes broadcast too
        others.append(rng.uniform(0.5, 3, by).astype(F))
        other, factors = others[-1], [by]
        if ones % 3 == 0:  # a product of two
            factors.append(shape[-1:])
            others.append(rng.uniform(0.5, 3, factors[-1]).astype(F))
            other = other * others[-1]
        steps.append((name, tuple(factors)))
        real = FUNCTIONS[name](real, other)
    want = np.zeros(np.delete(shape, axis), F)
    for k in range(shape[axis]):
        want = want + np.take(real, k, axis=axis)
    out = tuple(1 if i == axis else d for i, d in enumerate(shape)) if keepdims else want.shape
    w = SumChainWorkload(shape, axis, tuple(steps), out)
    got = run(build(sum_chain(w, isa), isa), x, *others, shape=out, dtype="float32")
    np.testing.assert_array_equal(got, want.reshape(out))


def test_what_no_kernel_sums_is_refused() -> None:
    isa = ROWS[0]
    with pytest.raises(CodegenError, match="sum_chain: expected an axis before the last of 2"):
        sum_chain(SumChainWorkload((2, 3), 1, (("relu", ()),), (2,)), isa)
    with pytest.raises(CodegenError, match=r"sum_chain: expected one of .* got 'pow'"):
        sum_chain(SumChainWorkload((2, 3), 0, (("pow", ((2, 3),)),), (3,)), isa)
