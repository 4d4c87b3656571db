# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models of ONNX Runtime's quantizer agree with ONNX Runtime; the criterion is onnx_quantizer's."""

from __future__ import annotations

import numpy as np
import onnx_quantizer_layers
import pytest
from onnx_quantizer import MARGIN, TIE, run_one
from onnx_quantizer_layers import compare_layers
from onnx_quantizer_models import CASES, STATIC, Source, Variant, quantized, rows, source

from qcompiler.driver import quantize_model

SAMPLE = (
    ("digits_cnn", Variant("QDQ", "s8", "s8", True)),
    ("digits_cnn", Variant("QOperator", "u8", "u8", False)),
)
"""What the default suite compiles."""


def agrees(name: str, variant: Variant | None) -> None:
    outcome = run_one(name, variant)
    if outcome.status == "absent":
        pytest.skip(f"{name}: the external models are absent")
    assert outcome.status == "agrees"
    assert outcome.layers is not None
    assert outcome.layers.nodes > 2
    assert outcome.layers.integers > 100
    assert outcome.layers.codes <= 1
    assert outcome.layers.tie <= TIE
    assert not outcome.turned or outcome.margin <= MARGIN
    integer, every = outcome.products
    # Static quantization of a network without recurrence leaves no product in floats.
    if variant in STATIC and name in ("digits_cnn", "resnet20", "kws_dscnn", "mnist"):
        assert integer == every > 0
    else:
        assert integer > 0


@pytest.mark.parametrize(("name", "variant"), SAMPLE, ids=str)
def test_sample(name: str, variant: Variant) -> None:
    agrees(name, variant)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=str)
def test_all(name: str, variant: Variant | None) -> None:
    agrees(name, variant)


@pytest.fixture(scope="module")
def digits() -> Source:
    found = source("digits_cnn", 4)
    assert found is not None
    return found


def test_the_judge_sees_a_wrong_code(digits: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """One code off, far from a tie, in one result of one node."""
    model = quantized(digits, STATIC[0])
    graph = quantize_model(model).graph
    feeds = next(rows(digits.evaluation, "digits_cnn"))
    assert compare_layers(model, graph, feeds).apart == 0
    sound = onnx_quantizer_layers.evaluate

    def off(node, operands):  # type: ignore[no-untyped-def]
        results = sound(node, operands)
        if node.op.name != "qconv" or results[0].dtype != np.uint8:
            return results
        wrong = results[0].copy()
        wrong.reshape(-1)[0] ^= 1
        return (wrong,)

    monkeypatch.setattr(onnx_quantizer_layers, "evaluate", off)
    found = compare_layers(model, graph, feeds)
    assert found.apart > 0
    assert found.tie > TIE
    assert "qconv" in found.worst
