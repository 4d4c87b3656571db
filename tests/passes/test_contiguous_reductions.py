# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.contiguous_reductions import ContiguousReductions

TEXT = "(float[2,3,4,5] x) => (y) {{ y = {}<axes: ints = {}, keepdims: int = {}>(x) }}"


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", ["[0,2]", "[1,-1]", "[0,2,3]", "[0,3]"])
@pytest.mark.parametrize("op", ["ReduceMean", "ReduceMax"])
def test_axes_apart(load_text: Any, rewrite: Any, op: str, axes: str, keep: int) -> None:
    after = rewrite(ContiguousReductions(), load_text(TEXT.format(op, axes, keep)))
    assert after.nodes[0].op.name == "transpose"
    assert after.nodes[1].name == f"{op}_0"


@pytest.mark.parametrize("axes", ["[1]", "[2,3]", "[0,1,2,3]"])
def test_axes_together(load_text: Any, rewrite: Any, axes: str) -> None:
    graph = load_text(TEXT.format("ReduceMean", axes, 1))
    rewrite(ContiguousReductions(), graph, modified=False)


def test_axes_of_extent_one_do_not_part(load_text: Any, rewrite: Any) -> None:
    graph = load_text("(float[2,1,4,5] x) => (y) { y = ReduceMean<axes: ints = [0,2]>(x) }")
    rewrite(ContiguousReductions(), graph, modified=False)


def test_quantized_means(load_text: Any, rewrite: Any) -> None:
    from qcompiler.passes.fuse import Fuse
    from qcompiler.passmanager import PassContext, PassManager

    graph = load_text(
        """(float[2,3,4,5] x) => (y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            m = ReduceMean<axes: ints = [1,3]>(d)
            r = QuantizeLinear(m, t, z)
            y = DequantizeLinear(r, t, z)
        }""",
        s=np.float32(0.02),
        t=np.float32(0.01),
        z=np.uint8(120),
    )
    integer = PassManager([Fuse()]).run(graph, PassContext())
    assert "qreduce_mean" in [n.op.name for n in integer.nodes]
    rewrite(ContiguousReductions(), integer, atol=0)
