# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX models of one quantized product: any storage, blocks of any size, any zero points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from qcompiler.types import DType

Array = np.ndarray[Any, np.dtype[Any]]


def tensor(name: str, storage: DType, data: Array) -> onnx.TensorProto:
    kind = TensorProto.DataType.Value(storage.value.upper())
    return helper.make_tensor(name, kind, data.shape, data.reshape(-1).tolist())


def integers(rng: np.random.Generator, storage: DType, shape: tuple[int, ...]) -> Array:
    """Codes with both ends of the storage among them."""
    found = rng.integers(storage.min, storage.max + 1, shape)
    found.reshape(-1)[:2] = (storage.min, storage.max)[: found.size]
    return found


@dataclass(frozen=True)
class Case:
    """One product of quantized activations and weights.

    Attributes:
        op: Conv or MatMul.
        stored: Storage of the activations.
        kind: Storage of the weights.
        size: Extent of a block; 0: one scale per column.
        extent: How much is summed (channels of a convolution).
        zero: Where the zero points of the weights lie: "middle", "low" or "any".
        kernel: Window of a convolution.
        result: Storage of the result; None: float.
        bias: Whether it has a bias.
        groups: Groups of a convolution, of `extent` channels each.
        seed: Of the numbers.
    """

    op: str
    stored: DType
    kind: DType
    size: int
    extent: int
    zero: str = "any"
    kernel: int = 1
    result: DType | None = None
    bias: bool = False
    seed: int = 0
    groups: int = 1

    @property
    def step(self) -> float:
        """Distance of two codes of the result."""
        assert self.result is not None
        return 2 * self.extent**0.5 / (self.result.max - self.result.min)

    def made(self) -> tuple[onnx.ModelProto, Array]:
        """Return the model, from float32 x to y, and a sample that saturates."""
        rng = np.random.default_rng(self.seed)
        extent, kind, stored, columns = self.extent, self.kind, self.stored, 6
        conv = self.op == "Conv"
        w_shape = (columns, extent, *(self.kernel,) * 2) if conv else (extent, columns)
        axis = 1 if conv else 0
        blocks = -(-extent // self.size) if self.size else 1
        by = list(w_shape)
        by[axis] = blocks
        if not self.size:
            by = [columns]
            axis = 1 - axis
        codes = integers(rng, kind, w_shape)
        middle = (kind.min + kind.max + 1) // 2
        zero = {
            "middle": np.full(by, middle),
            "low": np.full(by, kind.min),
            "any": integers(rng, kind, tuple(by)),
        }[self.zero]
        if kind is DType.INT16 and self.zero == "middle":
            codes = np.maximum(codes, -32767)
        scale = (rng.uniform(0.5, 1, by) / kind.max).astype(np.float32)
        point = int(rng.integers(stored.min, stored.max + 1))
        step = np.float32(6 / (stored.max - stored.min))
        attributes: dict[str, Any] = {"axis": axis}
        if self.size:
            attributes["block_size"] = self.size
        tensors = [
            tensor("w", kind, codes), numpy_helper.from_array(scale, "s"), tensor("z", kind, zero),
            numpy_helper.from_array(step, "t"), tensor("p", stored, np.asarray(point)),
        ]  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "t", "p"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "t", "p"], ["a"]),
            helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], **attributes),
        ]
        inputs = ["a", "f"]
        window: dict[str, Any] = {}
        if self.bias:
            bias = rng.standard_normal(columns).astype(np.float32)
            tensors.append(numpy_helper.from_array(bias, "c"))
        if conv:
            inputs += ["c"] * self.bias
            window = {"pads": [self.kernel // 2] * 4, "strides": [1 + self.seed % 2] * 2}
            window["group"] = self.groups
        last = "u" if self.bias and not conv else "m"
        nodes.append(helper.make_node(self.op, inputs, [last], **window))
        if last == "u":
            nodes.append(helper.make_node("Add", ["u", "c"], ["m"]))
        if self.result is None:
            nodes[-1].output[0] = "y"
        else:
            span = self.result.max - self.result.min
            tensors += [
                numpy_helper.from_array(np.float32(self.step), "ys"),
                tensor("yz", self.result, np.asarray(self.result.min + span // 3)),
            ]
            nodes.append(helper.make_node("QuantizeLinear", ["m", "ys", "yz"], ["v"]))
            nodes.append(helper.make_node("DequantizeLinear", ["v", "ys", "yz"], ["y"]))
        shape = [2, extent * self.groups, 5, 4] if conv else [3, extent]
        graph = helper.make_graph(
            nodes,
            "blocks",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            tensors,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        x = (rng.standard_normal(shape) * 3).astype(np.float32)
        x.reshape(-1)[:3] = 1e6, -1e6, 0
        return model, x


def runtime(model: onnx.ModelProto, x: Array) -> Array:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])
