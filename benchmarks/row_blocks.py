# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Times of matrix products of activations in blocks along what is summed, on one core.

    python benchmarks/row_blocks.py [--rows 32] [--size 256] [--block 32] [--right computed]

Prints, for each product, medians and minima of interleaved runs: compiled, the same product of
floats (no quantization at all) compiled, that one in ONNX Runtime, and the quantized one there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from taking_turns import in_turns, session_of

import qcompiler

Array = np.ndarray[Any, np.dtype[Any]]


def _model(nodes: list[onnx.NodeProto], held: dict[str, Array], inputs: dict[str, Array],
           out: str) -> onnx.ModelProto:  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "product",
        [value(n, TensorProto.FLOAT, list(a.shape)) for n, a in inputs.items()],
        [value(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def products(
    rows: int, size: int, block: int, right: str, spread: int
) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Array]]:
    """The quantized product, that of floats, and their inputs."""
    rng = np.random.default_rng(0)
    feeds = {"x": rng.standard_normal((rows, size)).astype(np.float32)}
    blocks = -(-size // block)
    held: dict[str, Array] = {
        "xs": rng.uniform(0.02, 0.04, (rows, blocks)).astype(np.float32),
        "xz": (128 + rng.integers(-spread, spread + 1, (rows, blocks))).astype(np.uint8),
    }
    node = helper.make_node
    grid = {"axis": 1, "block_size": block}
    nodes = [
        node("QuantizeLinear", ["x", "xs", "xz"], ["xq"], **grid),
        node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"], **grid),
    ]
    plain = {}
    if right == "computed":
        feeds["w"] = rng.standard_normal((size, size)).astype(np.float32)
        held |= {
            "ws": rng.uniform(0.02, 0.04, (blocks, size)).astype(np.float32),
            "wz": np.full((blocks, size), 128, np.uint8),
        }
        grid = {"axis": 0, "block_size": block}
        nodes += [
            node("QuantizeLinear", ["w", "ws", "wz"], ["wq"], **grid),
            node("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], **grid),
        ]
    else:
        codes = rng.integers(-127, 128, (size, size)).astype(np.int8)
        scale = rng.uniform(0.002, 0.008, (blocks, size) if right == "blocks" else size)
        scale = scale.astype(np.float32)
        held |= {"wq": codes, "ws": scale}
        grid = {"axis": 0, "block_size": block} if right == "blocks" else {"axis": 1}
        nodes.append(node("DequantizeLinear", ["wq", "ws"], ["wd"], **grid))
        every = np.repeat(scale, block, axis=0)[:size] if right == "blocks" else scale
        plain = {"w": codes.astype(np.float32) * every}
    nodes.append(node("MatMul", ["xd", "wd"], ["y"]))
    floats = _model([node("MatMul", ["x", "w"], ["y"])], plain, feeds, "y")
    return _model(nodes, held, feeds, "y"), floats, feeds


def measure(rows: int, size: int, block: int, right: str, spread: int, seconds: float) -> None:
    """Print the figures of one product."""
    quantized, floats, feeds = products(rows, size, block, right, spread)
    ours, plain = qcompiler.compile(quantized), qcompiler.compile(floats, precision="fp32")
    there, quantized_there = session_of(floats), session_of(quantized, integers=False)
    calls: dict[str, Callable[[], Array]] = {
        "compiled": lambda: np.asarray(ours(feeds)["y"]),
        "floats": lambda: np.asarray(plain(feeds)["y"]),
        "floats, ONNX Runtime": lambda: np.asarray(there.run(None, feeds)[0]),
        "quantized, ONNX Runtime": lambda: np.asarray(quantized_there.run(None, feeds)[0]),
    }
    took = in_turns(calls, seconds, shuffled=True)
    found = ", ".join(f"{name} {np.median(t):.3f} (least {min(t):.3f})" for name, t in took.items())
    print(f"{rows} rows, K and N {size}, blocks of {block}, {right}, zero points {spread} apart:")
    print(f"  {found}", flush=True)


def main() -> None:
    """Measure the products asked for."""
    parser = argparse.ArgumentParser()
    for name, given in (
        ("rows", (1, 32, 128)),
        ("size", (256, 1024)),
        ("block", (16, 32, 64, 128)),
    ):
        parser.add_argument(f"--{name}", type=int, nargs="*", default=given)
    parser.add_argument("--right", nargs="*", default=("columns", "blocks"))
    parser.add_argument("--spread", type=int, nargs="*", default=(0,))
    parser.add_argument("--seconds", type=float, default=0.5)
    asked = parser.parse_args()
    for size in asked.size:
        for block in asked.block:
            for rows in asked.rows:
                for right in asked.right:
                    for spread in asked.spread:
                        measure(rows, size, block, right, spread, asked.seconds)


if __name__ == "__main__":
    main()
