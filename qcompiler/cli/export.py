# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile export`: the quantized model as QDQ ONNX, for other runtimes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompiler.cli import options, shell


def export(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="Q.onnx", help="The ONNX model to write.")
    ],
    calibration: options.CalibrationOption = None,
    precision: options.ExportPrecisionOption = "w8a8",
    methods: options.MethodsOption = "",
    input_shape: options.FixedShapeOption = None,
    freeze: options.FreezeOption = None,
    seed: options.SeedOption = 0,
    progress: options.ProgressOption = None,
    json_output: options.JsonOption = False,
) -> int:
    """Quantize MODEL and write it with QuantizeLinear and DequantizeLinear nodes."""
    shapes = options.parse_shapes(input_shape or ())
    constants = options.parse_constants(freeze or ())
    shell.input_file(model, "model")
    shell.output_file(output, "model")

    from qcompiler.artifact import atomic_write
    from qcompiler.driver import quantize_model
    from qcompiler.onnx_export import to_onnx
    from qcompiler.ops import Stage
    from qcompiler.passes.methods import default_methods

    with shell.ProgressBars(progress) as bars:
        result = quantize_model(
            model,
            calibration=calibration,
            precision=precision,
            methods=methods or default_methods(precision),
            input_shapes=shapes,
            freeze=constants,
            seed=seed,
            progress=bars,
            stage=Stage.QDQ,
        )
    proto = to_onnx(result.graph)
    with atomic_write(output) as file:
        file.write(proto.SerializeToString())
    pairs = sum(node.op.name == "quantize" for node in result.graph.nodes)
    found = {
        "output": str(output),
        "size_bytes": {"model": model.stat().st_size, "output": output.stat().st_size},
        "opset": max(o.version for o in proto.opset_import if o.domain == ""),
        "quantize_nodes": pairs,
        "precision": result.plan.to_json()["nodes"],
        "sources": result.sources,
        "notes": list(result.log),
    }
    for line in result.log:
        shell.say(line)
    shell.emit(found)
    if not json_output:
        shell.say(f"wrote {output}: {output.stat().st_size} bytes, {pairs} tensors quantized")
    return shell.DONE
