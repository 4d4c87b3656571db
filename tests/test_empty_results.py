# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Results without elements: TVM and numpy write their strides differently."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import qcompiler

TEXT = """<ir_version: 10, opset_import: ["" : 17]>
net (float[2] x) => (y, e) { y = Relu(x) e = Identity(c) }"""


@pytest.mark.parametrize("shape", [(0,), (0, 4), (1, 0, 32), (3, 0), (0, 0), (2, 3, 0)])
def test_constants_without_elements_are_returned(shape: tuple[int, ...]) -> None:
    model = onnx.parser.parse_model(TEXT)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.float32), "c"))
    found = qcompiler.compile(model, precision="fp32")({"x": np.float32([1, -1])})
    assert found["e"].shape == shape
    assert found["y"].tolist() == [1, 0]
