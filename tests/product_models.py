# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX models of quantized products, put together step by step: any scales, on either side."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from block_models import integers, tensor
from onnx import TensorProto, helper, numpy_helper

from qcompiler.types import DType

Array = np.ndarray[Any, np.dtype[Any]]
_MS = "com.microsoft"


class Net:
    """Writes a model; every method returns the name of what it made."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.samples: dict[str, Array] = {}
        self._count = 0

    def _name(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def constant(self, data: Any, storage: DType | None = None) -> str:
        """A constant: floats, or codes of a storage."""
        name = self._name("c")
        held = np.asarray(data)
        made = numpy_helper.from_array(held, name)
        self.tensors.append(made if storage is None else tensor(name, storage, held))
        return name

    def input(self, *shape: int, kind: DType = DType.FLOAT32, far: bool = True) -> str:
        """An input, with a sample: of floats, some of them `far` off, or of all codes."""
        name = self._name("x")
        if kind is DType.FLOAT32:
            sample = np.asarray(self.rng.standard_normal(shape) * 2, np.float32)
            if far:
                sample.reshape(-1)[:3] = (1e6, -1e6, 0)[: sample.size]
        else:
            sample = np.asarray(integers(self.rng, kind, shape), kind.numpy)
        what = TensorProto.DataType.Value("FLOAT" if kind is DType.FLOAT32 else kind.value.upper())
        self.inputs.append(helper.make_tensor_value_info(name, what, list(shape)))
        self.samples[name] = sample
        return name

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = self._name("v")
        made = helper.make_node(op, list(inputs), [name], domain=domain, name=f"{op}_{name}")
        made.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
        self.nodes.append(made)
        return name

    def grid(
        self,
        shape: tuple[int, ...],
        storage: DType,
        axis: int | None,
        size: int,
        zero: str,
        reach: float,
    ) -> tuple[str, str, dict[str, int]]:
        """Scales and zero points (of `reach` to either side), and the attributes that say so."""
        by: tuple[int, ...] = ()
        attributes: dict[str, int] = {}
        if axis is not None and size:
            at = axis % len(shape)
            by = (*shape[:at], -(-shape[at] // size), *shape[at + 1 :])
            attributes = {"axis": axis, "block_size": size}
        elif axis is not None:
            by, attributes = (shape[axis],), {"axis": axis}
        span = storage.max - storage.min
        scale = self.rng.uniform(0.3, 1, by) * 2 * reach / span
        middle = (storage.min + storage.max + 1) // 2
        near = np.asarray(middle + self.rng.integers(-span // 8, span // 8 + 1, by))
        points = {
            "middle": np.full(by, middle),
            "one": np.full(by, near.reshape(-1)[0]),
            "any": near,
            "far": self.rng.integers(storage.min, storage.max + 1, by),
        }[zero]
        names = self.constant(np.asarray(scale, np.float32)), self.constant(points, storage)
        return *names, attributes

    def activations(
        self,
        *shape: int,
        storage: DType = DType.UINT8,
        axis: int | None = None,
        size: int = 0,
        zero: str = "any",
        x: str | None = None,
    ) -> str:
        """A float input (or `x`), quantized and back; with scales along an axis or in blocks."""
        scale, point, attributes = self.grid(shape, storage, axis, size, zero, 5.0)
        held = x or self.input(*shape)
        codes = self.node("QuantizeLinear", held, scale, point, **attributes)
        return self.node("DequantizeLinear", codes, scale, point, **attributes)

    def weights(
        self,
        *shape: int,
        storage: DType = DType.INT8,
        axis: int | None = None,
        size: int = 0,
        zero: str = "any",
    ) -> str:
        """Constant codes behind DequantizeLinear."""
        scale, point, attributes = self.grid(shape, storage, axis, size, zero, 1.0)
        codes = self.constant(integers(self.rng, storage, shape), storage)
        return self.node("DequantizeLinear", codes, scale, point, **attributes)

    def floats(self, *shape: int) -> str:
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def quantized(self, v: str, reach: float, storage: DType = DType.UINT8) -> str:
        """Quantized per tensor, and back."""
        scale, point, _ = self.grid((), storage, None, 0, "one", reach)
        codes = self.node("QuantizeLinear", v, scale, point)
        return self.node("DequantizeLinear", codes, scale, point)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "products",
            self.inputs,
            [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def runtime(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    """What ONNX Runtime computes, operator by operator."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(a) for a in session.run(None, feeds)]
