# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Size and time of ONNX Runtime's MatMulNBits, there and compiled, on one core.

    python benchmarks/matmul_nbits.py

Prints, for each product, bytes of the weights and scales in the model and in the artifact, medians
and minima of interleaved runs (ONNX Runtime at accuracy_level 0 and 4), and the greatest difference
from ONNX Runtime at accuracy_level 0, by the greatest element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from taking_turns import in_turns, session_of

import qcompiler

Array = np.ndarray[Any, np.dtype[Any]]
CASES = ((4096, 4096, 4, 32, 1), (4096, 4096, 4, 32, 8), (4096, 4096, 4, 32, 128),
         (1024, 4096, 4, 32, 1), (4096, 4096, 4, 128, 1), (4096, 4096, 8, 32, 1))  # fmt: skip
"""K, N, bits, block size, rows."""


def product(k: int, n: int, bits: int, block: int, rows: int, level: int) -> onnx.ModelProto:
    """A product of random weights."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (n, k // block, block * bits // 8)).astype(np.uint8)
    scales = rng.uniform(0.001, 0.01, n * (k // block)).astype(np.float32)
    held = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **held)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, n])],
        [numpy_helper.from_array(codes, "b"), numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def theirs(model: onnx.ModelProto, x: Array) -> Callable[[], Array]:
    """What runs a model in ONNX Runtime."""
    session = session_of(model)
    return lambda: np.asarray(session.run(None, {"x": x})[0])


def measure(case: tuple[int, int, int, int, int]) -> None:
    """Print the figures of one product."""
    k, rows = case[0], case[-1]
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    model = product(*case, 0)
    compiled, coarse = qcompiler.compile(model), qcompiler.compile(product(*case, 4))
    calls: dict[str, Callable[[], Array]] = {
        "compiled at 0": lambda: np.asarray(compiled({"x": x})["y"]),
        "compiled at 4": lambda: np.asarray(coarse({"x": x})["y"]),
        "level 0": theirs(model, x),
        "level 4": theirs(product(*case, 4), x),
    }
    found = {name: call() for name, call in calls.items()}
    took = in_turns(calls)
    sizes = (
        sum(t.ByteSize() for t in model.graph.initializer),
        sum(a.nbytes for a in compiled.artifact.params.arrays),
    )
    print(f"K {k}, N {case[1]}, {case[2]} bits by {case[3]}, {rows} rows: "
          f"{sizes[0] / 1e6:.2f} MB, packed {sizes[1] / 1e6:.2f} MB")  # fmt: skip
    greatest = float(np.abs(found["level 0"]).max())
    for name, times in took.items():
        off = float(np.abs(found[name] - found["level 0"]).max()) / greatest
        print(f"  {name:9} {np.median(times):8.3f} ms, least {min(times):8.3f}; off by {off:.1e}")


def main() -> None:
    """Measure every product."""
    for case in CASES:
        measure(case)


if __name__ == "__main__":
    main()
