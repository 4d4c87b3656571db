# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""An ONNX model whose inputs, results and values in between are of 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from block_models import Array, integers, tensor
from onnx import TensorProto, helper, numpy_helper

from qcompiler.onnx_import_tensors import elem_type_of
from qcompiler.types import DType

SHAPE = (2, 6, 8, 8)


def network(four: DType, rng: np.random.Generator) -> onnx.ModelProto:
    """A convolution and a sum on codes, scales per axis and in blocks, and casts both ways."""
    constants: dict[str, Any] = {
        "s": np.float32(0.13), "t": np.float32(0.6), "z": tensor("z", four, np.asarray(4)),
        "w": tensor("w", DType.INT4, integers(rng, DType.INT4, (6, 6, 3, 3))),
        "ws": rng.uniform(0.01, 0.1, 6).astype(np.float32),
        "as": rng.uniform(0.2, 0.9, 8).astype(np.float32),
        "az": tensor("az", four, integers(rng, four, (8,))),
        "bs": rng.uniform(0.2, 0.9, (2, 2, 8, 8)).astype(np.float32),
        "bz": tensor("bz", four, integers(rng, four, (2, 2, 8, 8))),
        "i": np.array([3, 0, 0, 5]),
    }  # fmt: skip
    node, blocks = helper.make_node, {"axis": 1, "block_size": 3}
    nodes = [
        node("DequantizeLinear", ["x", "s", "z"], ["a"]),
        node("DequantizeLinear", ["w", "ws"], ["b"], axis=0),
        node("Conv", ["a", "b"], ["c"], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("QuantizeLinear", ["r", "t", "z"], ["q"]),
        node("DequantizeLinear", ["q", "t", "z"], ["d"]),
        node("Add", ["d", "a"], ["e"]),
        node("QuantizeLinear", ["e", "t", "z"], ["y"]),
        node("QuantizeLinear", ["f", "as", "az"], ["per_axis"], axis=2),
        node("DequantizeLinear", ["per_axis", "as", "az"], ["axis_reals"], axis=2),
        node("QuantizeLinear", ["f", "bs", "bz"], ["blocks"], **blocks),
        node("DequantizeLinear", ["blocks", "bs", "bz"], ["block_reals"], **blocks),
        node("Cast", ["f"], ["low"], to=elem_type_of(four)),
        node("Gather", ["low", "i"], ["picked"], axis=1),
        node("Cast", ["picked"], ["wide"], to=TensorProto.INT32),
    ]
    results = {
        "y": four, "q": four, "per_axis": four, "blocks": four, "low": four, "picked": four,
        "axis_reals": DType.FLOAT32, "block_reals": DType.FLOAT32, "wide": DType.INT32,
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "four_bits",
        [
            helper.make_tensor_value_info("x", elem_type_of(four), SHAPE),
            helper.make_tensor_value_info("f", TensorProto.FLOAT, SHAPE),
        ],
        [helper.make_tensor_value_info(n, elem_type_of(d), None) for n, d in results.items()],
        [
            a if isinstance(a, onnx.TensorProto) else numpy_helper.from_array(np.asarray(a), n)
            for n, a in constants.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def feeds(four: DType, rng: np.random.Generator) -> dict[str, Array]:
    """Codes with both ends, and floats far beyond 4 bits."""
    x = integers(rng, four, SHAPE).astype(four.numpy)
    return {"x": x, "f": (rng.standard_normal(SHAPE) * 9).astype(np.float32)}
