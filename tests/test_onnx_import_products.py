# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantized products of every form are integer kernels wherever integers can say the same.

Their results agree with ONNX Runtime's, which multiplies floats, and every target gives the same
bits. What has no integer form says why.
"""

from __future__ import annotations

import numpy as np
import pytest
from computed_cases import COMPUTED
from hypothesis import given, settings
from hypothesis import strategies as st
from product_cases import FLOAT, INTEGER
from product_checks import FLOATS, ROWS, check, compiled, in_turn
from product_models import Net, runtime

from qcompiler.driver import quantize_model
from qcompiler.types import DType

FORMS = {**INTEGER, **COMPUTED}
NAMES = list(FORMS)


@pytest.mark.parametrize("name", in_turn(NAMES, 3))
def test_every_form_is_integers(name: str) -> None:
    net = Net()
    model = net.model(FORMS[name](net))
    assert not FLOATS & {n.op.name for n in quantize_model(model).graph.nodes}


@pytest.mark.parametrize("name", in_turn(NAMES, 6))
def test_forms_agree_with_onnx_runtime(name: str) -> None:
    check(FORMS[name], [], rounded=len(name) % 2 == 0)


@pytest.mark.parametrize("name", NAMES[:: len(NAMES) // 30])
def test_kernels_give_the_same_bits(name: str) -> None:
    check(FORMS[name], ["host"], seed=1)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    row=st.sampled_from(ROWS),
    seed=st.integers(0, 10**6),
    rounded=st.booleans(),
)
def test_any_form_on_any_row(name: str, row: str, seed: int, rounded: bool) -> None:
    check(FORMS[name], [row], seed, rounded=rounded)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "MatMul of matrices, uint8, 8",
        "Conv of groups, uint4, 3",
        "Conv of [1, 16, 5, 6] along 1 by [16, 1, 3, 3], uint8, far",
        "MatMul of [2, 3, 16] along 1 by [16, 8], uint8, far",
        "attention by head, far",
        "strides, int4, far, columns",
        "depthwise, int16, one, tensor",
        "transposed, groups, int4, far, columns",
        "ConvInteger, uint8, computed weights, zero points",
        "dynamic by dynamic",
    ],
)
def test_every_row_gives_the_same_bits(name: str, rounded: bool) -> None:
    check(FORMS[name], ROWS, rounded=rounded)


@pytest.mark.parametrize("name", FLOAT)
def test_what_has_no_integer_form_says_why(name: str) -> None:
    make, reason = FLOAT[name]
    net = Net()
    model = net.model(make(net))
    result = quantize_model(model)
    (product,) = [n for n in result.graph.nodes if n.op.name in FLOATS]
    assert product.name == model.graph.node[-1].name
    decision = result.plan.nodes[product.name]
    assert decision.reason.startswith(f"no integer form of {product.op.name}: its ")
    assert reason in decision.reason
    (line,) = result.log
    assert line.startswith(f"{product.name} stays float: its ")
    assert reason in line
    want = compiled(model, net.samples, "reference")
    (theirs,) = runtime(model, net.samples)
    for found in (want, compiled(model, net.samples, "host")):
        np.testing.assert_allclose(found, theirs, rtol=0, atol=4e-6 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("storage", [DType.UINT8, DType.INT16, DType.INT4])
@pytest.mark.parametrize(("axis", "size"), [(0, 0), (1, 0), (1, 4), (2, 3)])
@pytest.mark.parametrize("zero", ["one", "far"])
def test_several_scales_with_no_product(storage: DType, axis: int, size: int, zero: str) -> None:
    """Codes that are read as floats: the same ones, and the same reals, on every target."""
    net = Net()
    # ONNX Runtime's blocks do not saturate what lies far off.
    x = net.input(3, 6, 5, far=size == 0)
    a = net.activations(3, 6, 5, storage=storage, axis=axis, size=size, zero=zero, x=x)
    model = net.model(net.node("Add", a, a))
    want = compiled(model, net.samples, "reference")
    np.testing.assert_array_equal(compiled(model, net.samples, "host"), want)
    (theirs,) = runtime(model, net.samples)
    np.testing.assert_array_equal(want, theirs)


def test_weights_alone_say_no_reason() -> None:
    """The model quantizes no activations: it is not that integers could not do it."""
    net = Net()
    result = quantize_model(net.model(net.node("MatMul", net.input(3, 16), net.weights(16, 8))))
    assert result.log == []
    assert "no integer form" not in str([d.reason for d in result.plan.nodes.values()])
