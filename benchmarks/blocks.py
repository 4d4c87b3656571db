# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Time of imported products of quantized activations by weights in blocks, on one core.

    python benchmarks/blocks.py

Prints, for each product (between QuantizeLinear of a float input and DequantizeLinear of its
result), medians and minima of interleaved runs, compiled and in ONNX Runtime, which multiplies
floats, and the share of result codes that are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from taking_turns import in_turns, session_of

import qcompiler

Array = np.ndarray[Any, np.dtype[Any]]
STEP = np.float32(0.12)
LIMITS = {"int4": (-8, 7), "uint4": (0, 15)} | {
    name: (int(np.iinfo(name).min), int(np.iinfo(name).max))
    for name in ("int8", "uint8", "int16", "uint16")
}


@dataclass(frozen=True)
class Case:
    """A product.

    Attributes:
        stored: Storage of the activations.
        kind: Storage of the weights.
        block: Weights that share a scale.
        spread: Zero points are normally distributed around the middle, by this share of the range.
        extent: What is summed: channels, or K.
        kernel: Extent of a convolution's window; 0: a matrix product.
    """

    stored: str
    kind: str
    block: int
    spread: float
    extent: int
    kernel: int

    @property
    def shape(self) -> list[int]:
        """Shape of the activations."""
        return [1, self.extent, 28, 28] if self.kernel else [64, self.extent]

    def model(self) -> onnx.ModelProto:
        """The product of random weights."""
        rng = np.random.default_rng(0)
        columns, axis = (64, 1) if self.kernel else (768, 0)
        shape = (
            [columns, self.extent, *[self.kernel] * 2] if self.kernel else [self.extent, columns]
        )
        blocks = [-(-n // self.block) if i == axis else n for i, n in enumerate(shape)]
        (low, high), (least, greatest) = LIMITS[self.kind], LIMITS[self.stored]
        middle = (low + high + 1) // 2

        def around(extents: list[int], deviation: float) -> Array:
            found = middle + rng.standard_normal(extents) * deviation * (high - low)
            return np.asarray(np.clip(np.rint(found), low, high).astype(np.int64))

        def held(name: str, storage: str, data: Array) -> onnx.TensorProto:
            kind = TensorProto.DataType.Value(storage.upper())
            return helper.make_tensor(name, kind, data.shape, data.reshape(-1).tolist())

        scale = (rng.uniform(0.5, 1, blocks) / (high - low)).astype(np.float32)
        zero = around(blocks, self.spread)
        tensors = [
            held("w", self.kind, around(shape, 1 / 6)), numpy_helper.from_array(scale, "s"),
            held("z", self.kind, zero),
            numpy_helper.from_array(np.float32(6 / (greatest - least)), "t"),
            held("p", self.stored, np.asarray((least + greatest) // 2 + 5)),
            numpy_helper.from_array(STEP * np.float32(self.extent**0.5 / 8), "ys"),
            held("yz", "uint8", np.asarray(120)),
        ]  # fmt: skip
        window = {"pads": [self.kernel // 2] * 4} if self.kernel else {}
        made = helper.make_node
        nodes = [
            made("QuantizeLinear", ["x", "t", "p"], ["q"]),
            made("DequantizeLinear", ["q", "t", "p"], ["a"]),
            made("DequantizeLinear", ["w", "s", "z"], ["f"], axis=axis, block_size=self.block),
            made("Conv" if self.kernel else "MatMul", ["a", "f"], ["m"], **window),
            made("QuantizeLinear", ["m", "ys", "yz"], ["v"]),
            made("DequantizeLinear", ["v", "ys", "yz"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "blocks",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


CASES = (
    Case("uint8", "int8", 16, 0, 64, 3), Case("uint8", "uint8", 16, 0.04, 64, 3),
    Case("uint8", "uint4", 32, 0.04, 64, 3), Case("uint8", "uint8", 12, 0.04, 60, 3),
    Case("uint8", "int16", 32, 0, 64, 3), Case("uint8", "uint8", 32, 0.04, 768, 0),
    Case("uint8", "uint8", 12, 0.04, 768, 0), Case("uint8", "int16", 32, 0, 768, 0),
    Case("int16", "uint8", 32, 0.04, 768, 0),
)  # fmt: skip


def measure(case: Case) -> None:
    """Print the figures of one product."""
    model, x = case.model(), np.random.default_rng(1).standard_normal(case.shape).astype(np.float32)
    session = session_of(model, integers=False)
    compiled = qcompiler.compile(model)
    calls = {
        "compiled": lambda: np.asarray(compiled({"x": x})["y"]),
        "ONNX Runtime": lambda: np.asarray(session.run(None, {"x": x})[0]),
    }
    found = {name: call() for name, call in calls.items()}
    took = in_turns(calls)
    equal = float(np.mean(found["compiled"] == found["ONNX Runtime"]))
    text = ", ".join(f"{name} {np.median(t):.3f} ms ({min(t):.3f})" for name, t in took.items())
    print(f"{case}\n  {text}; {equal:.2%} of the codes equal", flush=True)


def main() -> None:
    """Measure every product."""
    for case in CASES:
        measure(case)


if __name__ == "__main__":
    main()
