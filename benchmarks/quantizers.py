# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantize a model with another tool and score it, for docs/comparison.md.

Run with an interpreter that has onnxruntime and the tool: the tools pin versions of their own, so
an environment apart from the compiler's is best. Prints top-1 of the result in ONNX Runtime with
basic graph optimisation (its default int8 kernels saturate on x86 without VNNI), and the seconds
that quantization took.

Usage: ``python benchmarks/quantizers.py {ort,ort-percentile,nncf} MODEL.onnx CALIB.npz EVAL.npz``
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

CALIBRATION, EVALUATION = 128, 500


def with_onnxruntime(model: Path, out: Path, feeds: list[dict[str, Any]], method: str) -> None:
    """Quantize statically: uint8 activations, int8 weights per channel, QDQ."""
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._feeds = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    q.quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        calibrate_method=getattr(q.CalibrationMethod, method),
    )


def with_nncf(model: Path, out: Path, feeds: list[dict[str, Any]]) -> None:
    """Quantize with NNCF's defaults on all the samples."""
    import nncf

    found = nncf.quantize(onnx.load(model), nncf.Dataset(feeds), subset_size=len(feeds))
    onnx.save(found, out)


def top1(model: Path, name: str, inputs: Any, labels: Any) -> float:
    """Return the percentage of samples whose greatest score is the label's."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    hits = 0
    for i, label in enumerate(labels):
        scores = session.run(None, {name: inputs[i : i + 1]})[0]
        hits += int(scores.reshape(-1).argmax() == label)
    return 100 * hits / len(labels)


def main(tool: str, model: Path, calibration: Path, evaluation: Path) -> None:
    """Quantize, score and print."""
    samples, labelled = np.load(calibration), np.load(evaluation)
    name = next(k for k in labelled.files if k != "label")
    feeds = [{name: x[None]} for x in samples[name][:CALIBRATION]]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "quantized.onnx"
        started = time.perf_counter()
        if tool == "nncf":
            with_nncf(model, out, feeds)
        else:
            method = {"ort": "MinMax", "ort-percentile": "Percentile"}[tool]
            with_onnxruntime(model, out, feeds, method)
        seconds = time.perf_counter() - started
        score = top1(out, name, labelled[name][:EVALUATION], labelled["label"][:EVALUATION])
    print(f"{model.stem} {tool}: top-1 {score:.1f} %, {seconds:.1f} s")


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__)
    main(sys.argv[1], *map(Path, sys.argv[2:]))
