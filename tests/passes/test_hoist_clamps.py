# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest

from qcompiler.passes.hoist_clamps import HoistClamps

ONE = "(float[1,3,6,6] x) => (y) {{ c = Conv(x, w) {} }}"
POOL = "MaxPool<kernel_shape: ints = [2,2], strides: ints = [2,2]>"


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (f"p = {POOL}(c) y = Relu(p)", ["conv", "relu", "max_pool"]),
        (
            "p = DepthToSpace<blocksize: int = 2>(c) t = Transpose<perm: ints = [0,2,3,1]>(p)"
            " y = Clip(t, low, high)",
            ["conv", "clip", "depth_to_space", "transpose"],
        ),
    ],
)
def test_past_movements(
    load_text: Any, rewrite: Any, uniform: Any, text: str, ops: list[str]
) -> None:
    graph = load_text(ONE.format(text), w=uniform(4, 3, 3, 3), low=-0.5, high=1.0)
    after = rewrite(HoistClamps(), graph)
    assert [n.op.name for n in after.nodes] == ops
    assert after.outputs[0][1].name == "y"


@pytest.mark.parametrize(
    "text",
    [
        "y = Relu(c)",
        "p = AveragePool<kernel_shape: ints = [2,2]>(c) y = Relu(p)",
        f"p = {POOL}(c) r = Relu(p) y = Add(r, p)",
        f"p = {POOL}(c) r = Relu(p) q = {POOL}(c) y = Add(r, q)",
    ],
)
def test_what_must_stay(load_text: Any, rewrite: Any, uniform: Any, text: str) -> None:
    rewrite(HoistClamps(), load_text(ONE.format(text), w=uniform(4, 3, 3, 3)), modified=False)


def test_not_past_a_graph_output(load_text: Any, rewrite: Any, uniform: Any) -> None:
    text = f"(float[1,3,6,6] x) => (p, y) {{ c = Conv(x, w) p = {POOL}(c) y = Relu(p) }}"
    rewrite(HoistClamps(), load_text(text, w=uniform(4, 3, 3, 3)), modified=False)
