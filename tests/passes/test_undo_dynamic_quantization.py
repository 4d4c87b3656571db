# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.undo_dynamic_quantization import UndoDynamicQuantization

PASS = UndoDynamicQuantization()
TEXT = """(float[2,4] x) => (y) {{
    q, s, z = DynamicQuantizeLinear(x)
    i = MatMulInteger(q, w, z{zero})
    f = Cast<to: int = 1>(i)
    t = Mul({scales})
    y = Mul({factors})
}}"""
X = np.float32([[0, 255, 3, 7], [1, 2, 3, 4]])  # its dynamic scale is 1, so nothing is rounded


@pytest.mark.parametrize("zero", ["", ", zw"])
@pytest.mark.parametrize(("scales", "factors"), [("s, sw", "f, t"), ("sw, s", "t, f")])
@pytest.mark.parametrize("per_column", [False, True])
def test_a_product(
    load_text: Any, rewrite: Any, zero: str, scales: str, factors: str, per_column: bool
) -> None:
    text = TEXT.format(zero=zero, scales=scales, factors=factors)
    constants = {
        "w": np.arange(12, dtype=np.int8).reshape(4, 3),
        "zw": np.int8([3, 2, 1]) if per_column else np.int8(3),
        "sw": np.float32([0.5, 0.25, 2]) if per_column else np.float32(0.5),
    }
    (node,) = rewrite(PASS, load_text(text, **constants), {"x": X}).nodes
    assert node.op.name == "matmul"
    assert node.input(1).is_constant


def test_other_products_stay(load_text: Any, rewrite: Any) -> None:
    text = """(float[2,4] x, int8[4,3] w) => (y) {
        q, s, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z)
        f = Cast<to: int = 1>(i)  y = Mul(f, s)
    }"""
    feeds = {"w": np.ones((4, 3), np.int8)}
    rewrite(PASS, load_text(text), feeds, modified=False)
