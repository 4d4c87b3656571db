# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Time of imported products with groups, several matrices or several scales, on one core.

    python benchmarks/products.py [PART OF A NAME]

Prints, for each product (between QuantizeLinear of a float input and DequantizeLinear of its
result), medians and minima of interleaved runs: compiled, compiled as a product of floats (the
rewrites that make integers of it left out), and in ONNX Runtime, which multiplies floats.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from taking_turns import in_turns, session_of

import qcompiler
from qcompiler.passes import fuse, fuse_parts
from qcompiler.passes.conv_to_matmul import ConvToMatmul
from qcompiler.passes.factors_behind import FactorsBehind

Array = np.ndarray[Any, np.dtype[Any]]


class Net:
    """Writes a model; methods return names."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        self.inputs: dict[str, Array] = {}

    def constant(self, data: Array) -> str:
        """A constant."""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(data, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The result of an operator."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def input(self, *shape: int) -> str:
        """A float input."""
        name = f"x{len(self.inputs)}"
        self.inputs[name] = self.rng.standard_normal(shape).astype(np.float32)
        return name

    def activations(self, x: str, *scales: int, spread: int = 0, **grid: int) -> str:
        """Quantized to uint8 and back, with scales of a shape and zero points near the middle."""
        held = [
            self.constant(self.rng.uniform(0.02, 0.04, scales).astype(np.float32)),
            self.constant((128 + self.rng.integers(-spread, spread + 1, scales)).astype(np.uint8)),
        ]
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *held, **grid), *held,
                         **grid)  # fmt: skip

    def weights(self, *shape: int, axis: int, size: int = 0) -> str:
        """int8 constants around 0."""
        scales = (shape[axis],)
        grid = {"axis": axis}
        if size:
            scales = (*shape[:axis], -(-shape[axis] // size), *shape[axis + 1 :])
            grid["block_size"] = size
        codes = self.constant(self.rng.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(self.rng.uniform(0.002, 0.008, scales).astype(np.float32))
        return self.node("DequantizeLinear", codes, scale, **grid)

    def model(self, y: str) -> onnx.ModelProto:
        """The model whose result is y, quantized and back."""
        last = self.activations(y)
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "products",
            [value(n, TensorProto.FLOAT, list(a.shape)) for n, a in self.inputs.items()],
            [value(last, TensorProto.FLOAT, None)],
            self.tensors,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _groups(net: Net) -> str:
    a = net.activations(net.input(1, 256, 28, 28))
    return net.node("Conv", a, net.weights(128, 4, 3, 3, axis=1, size=2), group=64, pads=[1] * 4)


def _channels(net: Net, spread: int) -> str:
    a = net.activations(net.input(1, 64, 56, 56))
    y = net.node("Relu", net.node("Conv", a, net.weights(128, 64, 1, 1, axis=0)))
    b = net.activations(y, 128, axis=1, spread=spread)
    return net.node("Conv", b, net.weights(128, 1, 3, 3, axis=0), group=128, pads=[1] * 4)


def _rows(net: Net, spread: int) -> str:
    a = net.activations(net.input(128, 768), 128, axis=0, spread=spread)
    return net.node("MatMul", a, net.weights(768, 768, axis=1))


def _heads(net: Net, spread: int) -> str:
    a = net.activations(net.input(1, 12, 128, 64), 12, axis=1, spread=spread)
    b = net.activations(net.input(1, 12, 64, 128), 12, axis=1, spread=spread)
    return net.node("MatMul", a, b)


def _matrices(net: Net) -> str:
    a = net.activations(net.input(12, 128, 64))
    return net.node("MatMul", a, net.weights(12, 64, 64, axis=1, size=16))


def _bias(net: Net) -> str:
    a = net.activations(net.input(1, 64, 28, 28))
    return net.node("Conv", a, net.weights(64, 64, 3, 3, axis=0), net.input(64), pads=[1] * 4)


def _computed(net: Net, columns: int, group: int) -> str:
    a = net.activations(net.input(1, 64, 28, 28))
    w = net.activations(net.input(columns, 64 // group, 3, 3))
    return net.node("Conv", a, w, group=group, pads=[1] * 4)


def _blocks(net: Net, size: int, spread: int) -> str:
    a = net.activations(
        net.input(1, 64, 28, 28), 1, 64 // size, 28, 28, axis=1, block_size=size, spread=spread
    )
    return net.node("Conv", a, net.weights(64, 64, 3, 3, axis=0), pads=[1] * 4)


def _dynamic(net: Net) -> str:
    codes = net.node("DynamicQuantizeLinear", net.input(128, 768))
    numbers = [f"{codes}_{what}" for what in ("scale", "zero")]
    net.nodes[-1].output.extend(numbers)
    a = net.node("DequantizeLinear", codes, *numbers)
    return net.node("MatMul", a, net.weights(768, 768, axis=1))


CASES: dict[str, Callable[[Net], str]] = {
    "3x3, 256 to 128 channels in 64 groups, 28x28, blocks of 2": _groups,
    "pointwise 64 to 128, then depthwise, a scale per channel, 56x56": lambda n: _channels(n, 0),
    "the same, and a zero point per channel": lambda n: _channels(n, 20),
    "matrix, 128 rows with a scale each, K and N 768": lambda n: _rows(n, 0),
    "the rows again, and a zero point each": lambda n: _rows(n, 20),
    "12 heads with a scale each, 128x64 by 64x128, both activations": lambda n: _heads(n, 0),
    "the heads again, and a zero point each": lambda n: _heads(n, 20),
    "12 matrices, 128x64 by 64x64, blocks of 16": _matrices,
    "3x3, 64 to 64 channels, 28x28, a bias that is computed": _bias,
    "3x3, 64 to 64 channels, 28x28, weights that are computed": lambda n: _computed(n, 64, 1),
    "the same in 4 groups": lambda n: _computed(n, 64, 4),
    "the same, depthwise": lambda n: _computed(n, 64, 64),
    "3x3, 64 to 64 channels, 28x28, activations in blocks of 16": lambda n: _blocks(n, 16, 0),
    "3x3, 64 to 64 channels, 28x28, activations in blocks of 32": lambda n: _blocks(n, 32, 0),
    "matrix, 128 rows, K and N 768, scale and zero point of the run": _dynamic,
}  # fmt: skip


def measure(name: str, make: Callable[[Net], str]) -> None:
    """Print the figures of one product."""
    net = Net()
    model = net.model(make(net))
    feeds = net.inputs
    session = session_of(model, integers=False)
    compiled = qcompiler.compile(model)
    with (
        mock.patch.object(fuse, "move_scales", return_value=False),
        mock.patch.object(fuse, "free_bias", return_value=False),
        mock.patch.object(fuse, "move_row_blocks", return_value=False),
        mock.patch.object(fuse_parts, "MOST_PARTS", 0),
        mock.patch.object(ConvToMatmul, "run", return_value=False),
        mock.patch.object(FactorsBehind, "run", return_value=False),
    ):
        floats = qcompiler.compile(model)
    calls: dict[str, Callable[[], object]] = {
        "compiled": lambda: compiled(feeds),
        "in floats": lambda: floats(feeds),
        "ONNX Runtime": lambda: session.run(None, feeds),
    }
    took = in_turns(calls)
    text = ", ".join(f"{n} {np.median(t):.3f} ms ({min(t):.3f})" for n, t in took.items())
    print(f"{name}\n  {text}", flush=True)


def main() -> None:
    """Measure every product, or those whose names have a text in them."""
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, make in CASES.items():
        if only in name:
            measure(name, make)


if __name__ == "__main__":
    main()
