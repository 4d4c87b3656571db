# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qcompiler.passes.recognize_global_pool import RecognizeGlobalPool

PASS = RecognizeGlobalPool()


def test_one_window_over_the_whole_image(load_text: Any, rewrite: Any, golden: Any) -> None:
    graph = load_text(
        """(float[N,4,6,5] x) => (float[N,4,1,1] y) {
            y = AveragePool<kernel_shape: ints = [6,5]>(x)
        }"""
    )
    after = rewrite(PASS, graph)
    assert after.outputs[0][1].batch_axis == 0
    assert str(after) == golden


@pytest.mark.parametrize(
    "attrs",
    [
        "kernel_shape: ints = [6,4]",
        "kernel_shape: ints = [6,5], pads: ints = [1,0,1,0], strides: ints = [9,9]",
    ],
)
def test_smaller_windows_and_padding_stay(load_text: Any, rewrite: Any, attrs: str) -> None:
    graph = load_text(f"(float[1,4,6,5] x) => (y) {{ y = AveragePool<{attrs}>(x) }}")
    rewrite(PASS, graph, modified=False)


def test_other_poolings_stay(load_text: Any, rewrite: Any) -> None:
    graph = load_text("(float[1,4,6,5] x) => (y) { y = MaxPool<kernel_shape: ints = [6,5]>(x) }")
    rewrite(PASS, graph, modified=False)
    assert np.prod(graph.nodes[0].attr("kernel")) == 30
