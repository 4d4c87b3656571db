# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Calibration reads samples as a stream: its memory does not grow with their number."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, sys
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qcompiler.driver import quantize_model

rng = np.random.default_rng(0)
count = int(sys.argv[1])
w = [rng.standard_normal(s).astype(np.float32) for s in ((16, 3, 3, 3), (16, 16, 3, 3), (16, 10))]
nodes = [
    helper.make_node("Conv", ["x", "w0"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["a"], ["r"]),
    helper.make_node("Conv", ["r", "w1"], ["b"], strides=[2, 2], pads=[1, 1, 1, 1]),
    helper.make_node("GlobalAveragePool", ["b"], ["p"]),
    helper.make_node("Flatten", ["p"], ["f"]),
    helper.make_node("MatMul", ["f", "w2"], ["y"]),
]
graph = helper.make_graph(
    nodes,
    "net",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 224, 224])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 10])],
    [numpy_helper.from_array(a, f"w{i}") for i, a in enumerate(w)],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Samples:
    def __iter__(self):
        chooser = np.random.default_rng(1)
        for _ in range(count):
            yield {"x": chooser.standard_normal((1, 3, 224, 224)).astype(np.float32)}


found = quantize_model(model, calibration=Samples())
assert found.samples == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(samples: int) -> float:
    """Return the peak memory, in MB, of a process that calibrates on so many samples."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(samples)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1024


@pytest.mark.slow
def test_peak_memory_of_1000_samples_is_that_of_50() -> None:
    """1,000 pictures of 224 x 224 are 600 MB; the histograms and one run are all that is held."""
    few, many = peak(50), peak(1000)
    assert many - few < 100, f"{few:.0f} MB with 50 samples, {many:.0f} MB with 1000"
