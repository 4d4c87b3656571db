# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.passes.canonicalize import canonicalize_passes
from qcompiler.passes.crop_kernels import CropKernels, touching
from qcompiler.types import DType, TensorType


def convolution(
    size: tuple[int, int], kernel: tuple[int, int], dilations: tuple[int, int],
    pads: tuple[int, ...], strides: tuple[int, int] = (1, 1), *, group: int = 1,
) -> Graph:  # fmt: skip
    """A convolution of 4 to 6 channels."""
    rng = np.random.default_rng(0)
    g = Graph("dilated")
    x = g.add_input("x", TensorType((2, 4, *size), DType.FLOAT32), 0)
    w = g.constant(rng.normal(size=(6, 4 // group, *kernel)).astype(np.float32), "w")
    attrs: dict[str, Any] = {"strides": strides, "pads": pads, "dilations": dilations}
    g.set_outputs([("y", g.add("conv", [x, w], {**attrs, "group": group}, name="c").output)])
    g.verify()
    return g


def kernel_of(graph: Graph) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of the kernel, and the pads."""
    (node,) = (n for n in graph.nodes if n.op.name == "conv")
    return node.input(1).shape[2:], node.attr("pads")


@pytest.mark.parametrize(
    ("dilation", "kernel", "pads"),
    [(24, (1, 1), (0, 0, 0, 0)), (14, (1, 1), (0, 0, 0, 0))],
)
def test_what_only_meets_padding_goes(
    rewrite: Any, dilation: int, kernel: tuple[int, int], pads: tuple[int, ...]
) -> None:
    graph = convolution((14, 14), (3, 3), (dilation, dilation), (dilation,) * 4)
    assert kernel_of(rewrite(CropKernels(), graph)) == (kernel, pads)


def test_a_tap_that_meets_one_pixel_stays(rewrite: Any) -> None:
    graph = convolution((14, 14), (3, 3), (13, 13), (13,) * 4)
    rewrite(CropKernels(), graph, modified=False)


def test_one_side_alone(rewrite: Any) -> None:
    """A causal convolution along the width that reaches before the beginning."""
    graph = convolution((1, 20), (1, 3), (1, 16), (0, 32, 0, 0))
    assert kernel_of(rewrite(CropKernels(), graph)) == ((1, 2), (0, 16, 0, 0))
    graph = convolution((1, 20), (1, 3), (1, 32), (0, 64, 0, 0))
    assert kernel_of(rewrite(CropKernels(), graph)) == ((1, 1), (0, 0, 0, 0))


def test_weights_that_are_computed_stay(rewrite: Any) -> None:
    g = Graph("computed")
    x = g.add_input("x", TensorType((1, 2, 5, 5), DType.FLOAT32), 0)
    w = g.add_input("w", TensorType((3, 2, 3, 3), DType.FLOAT32), 1)
    attrs = {"strides": (1, 1), "pads": (9,) * 4, "dilations": (9, 9), "group": 1}
    g.set_outputs([("y", g.add("conv", [x, w], attrs, name="c").output)])
    assert not CropKernels().run(g, None)  # type: ignore[arg-type]


def test_ranges_of_sizes_keep_their_kernels() -> None:
    assert any(isinstance(p, CropKernels) for p in canonicalize_passes())
    assert not any(isinstance(p, CropKernels) for p in canonicalize_passes(one_size=False))


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dilations=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 20)] * 4),
    group=st.sampled_from([1, 2]),
)
@settings(max_examples=150, deadline=None)
def test_the_result_is_the_same(
    size: tuple[int, int], kernel: tuple[int, int], dilations: tuple[int, int],
    strides: tuple[int, int], pads: tuple[int, int, int, int], group: int,
) -> None:  # fmt: skip
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    if any(size[i] + pads[i] + pads[2 + i] < reach[i] for i in range(2)):
        return
    graph = convolution(size, kernel, dilations, pads, strides, group=group)
    x = np.random.default_rng(1).normal(size=(2, 4, *size)).astype(np.float32)
    before = run(graph, {"x": x})["y"]
    CropKernels().run(graph, None)  # type: ignore[arg-type]
    graph.verify()
    np.testing.assert_allclose(run(graph, {"x": x})["y"], before, rtol=1e-5, atol=1e-5)
    # Whatever could go without a negative pad is gone.
    for i in range(2):
        (taps, all_pads) = (kernel_of(graph)[0][i], kernel_of(graph)[1])
        results = before.shape[2 + i]
        around = all_pads[i], all_pads[2 + i]
        assert touching(size[i], results, taps, strides[i], dilations[i], around) == range(taps)
