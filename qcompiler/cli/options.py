# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and the text forms of shapes and constants."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompiler.errors import UsageError

ArtifactArgument = Annotated[
    Path, typer.Argument(metavar="ART.qcm", help="Artifact that `qcompile compile` wrote.")
]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model.")]
CalibrationOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="C",
        help="Representative inputs: .npz with one array per model input, or a folder of them.",
    ),
]
EvaluateOption = Annotated[
    Path | None,
    typer.Option(
        "--evaluate",
        metavar="E",
        help="Samples to measure accuracy on: .npz or a folder, with label or score if needed.",
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="M",
        help="top1, top5, mse, cosine, sqnr, kl (these four against the float model) or "
        "module:function.",
    ),
]
MaxDropOption = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="X",
        help="Largest drop of the metric; percentage points for top1 and top5.",
    ),
]
MaxSliceDropOption = Annotated[
    float | None,
    typer.Option(
        "--max-slice-drop",
        metavar="X",
        help="Largest drop of any class (array 'label') or named group (array 'slice') of at "
        "least 10 samples.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output.")
]
ProgressOption = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress on standard error. Default: only on a terminal.",
        show_default=False,
    ),
]
_FIXED = (
    "w8a8, w4a8, w4a8-group (and w8a7, w7a8, w6a8); without calibration: fp32, fp16, w8, w4, "
    "w8a8-dynamic, w8a8-dynamic-tensor; `qcompile targets` lists what each target has."
)
FixedPrecisionOption = Annotated[
    str,
    typer.Option("--precision", metavar="P", help=f"{_FIXED} Or the path of a saved plan (.json)."),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="P",
        help=f"{_FIXED} auto: the fastest plan that keeps the budget. Or the path of a saved plan "
        "(.json).",
    ),
]
ExportPrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="P",
        help="w8a8, w4a8, w4a8-group, w8a7, w7a8, w6a8 or fp32: what a QDQ model can say. Or the "
        "path of a saved plan (.json).",
    ),
]
OverrideOption = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="SELECTOR=P",
        help="Force a precision: SELECTOR is a node name, a pattern over node names, op:NAME, "
        "or a region (input:NAME, fusion); repeatable, later ones win.",
    ),
]
RegionOption = Annotated[
    list[str] | None,
    typer.Option(
        "--region",
        metavar="SELECTOR=P,KEY=VALUE...",
        help="What is asked of a region of a model with several inputs (input:NAME, fusion): a "
        "precision, observer=, percentile=, max-drop=, max-latency=, max-size=; repeatable.",
    ),
]
MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        metavar="M,M",
        help="Post-training methods that keep accuracy: groups, equalize, smooth, gptq, brecq, "
        "distill, adaround, correct_bias; options in braces, as in adaround{iterations=2000}. "
        "Default: groups,equalize,gptq for w4a8, equalize,gptq for w4a8-group, for a saved plan "
        "those it was made with, else none.",
    ),
]
FixedShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME:1x3x224x224",
        help="Shape of a dynamic input; repeatable.",
    ),
]
InputShapeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME:1x3x224x224",
        help="Shape of a dynamic input, or a range (ids:1x1..128); repeatable.",
    ),
]
FreezeOption = Annotated[
    list[str] | None,
    typer.Option("--freeze", metavar="NAME=VALUE", help="Bind an input to a constant; repeatable."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of everything random.")]

_SHAPE = re.compile(r"\d+(\.\.\d+)?(x\d+(\.\.\d+)?)*")


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]] | None:
    """Return the shapes that NAME:1x3x224x224 options give, or None without any.

    An extent LEAST..GREATEST becomes a pair.

    Raises:
        UsageError: Malformed text, an extent of 0, or a name given twice.
    """
    shapes: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, separator, shape = text.rpartition(":")
        if not separator or not name or not _SHAPE.fullmatch(shape):
            raise UsageError(
                f"--input-shape {text!r}: expected NAME:1x3x224x224, or NAME:1x1..128 for a range"
            )
        extents = tuple(
            tuple(int(e) for e in d.split("..")) if ".." in d else int(d) for d in shape.split("x")
        )
        if 0 in extents:
            raise UsageError(f"--input-shape {text!r}: every extent must be at least 1")
        if name in shapes:
            raise UsageError(f"--input-shape: {name!r} is given twice")
        shapes[name] = extents
    return shapes or None


def parse_constants(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the arrays that NAME=VALUE options give, or None without any.

    A value is a number, true or false, a list as in JSON, or the path of an .npy file.

    Raises:
        UsageError: Malformed text, an unreadable file, or a name given twice.
    """
    import numpy as np

    constants: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise UsageError(f"--freeze {text!r}: expected NAME=VALUE")
        if name in constants:
            raise UsageError(f"--freeze: {name!r} is given twice")
        try:
            if value.endswith(".npy"):
                constants[name] = np.load(value, allow_pickle=False)
                continue
            parsed = np.asarray(json.loads(value))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--freeze {text!r}: expected a number, true, false, a list as in JSON, or an "
                f".npy file: {error}"
            ) from error
        if parsed.dtype.kind not in "bif":
            raise UsageError(f"--freeze {text!r}: expected numbers, got {parsed.dtype}")
        constants[name] = parsed
    return constants or None


def parse_overrides(texts: Sequence[str]) -> dict[str, str] | None:
    """Return selector -> precision of SELECTOR=PRECISION options, or None without any.

    Raises:
        UsageError: Malformed text, or a selector given twice.
    """
    rules: dict[str, str] = {}
    for text in texts:
        selector, separator, precision = text.rpartition("=")
        if not separator or not selector or not precision:
            raise UsageError(
                f"--override {text!r}: expected SELECTOR=PRECISION",
                hint="for example --override 'layer1.*=w8a8' or --override op:matmul=fp32",
            )
        if selector in rules:
            raise UsageError(f"--override: {selector!r} is given twice")
        rules[selector] = precision
    return rules or None


def require_metric(
    evaluate: Path | None,
    metric: str | None,
    max_drop: float | None,
    max_slice_drop: float | None = None,
) -> None:
    """Check that the accuracy options come together.

    Raises:
        UsageError: Samples without a metric, a metric or a budget without samples.
    """
    if evaluate is not None and metric is None:
        raise UsageError("--evaluate needs --metric", hint="for labelled classes: --metric top1")
    limits = {"--max-drop": max_drop, "--max-slice-drop": max_slice_drop}
    for given, value in {"--metric": metric, **limits}.items():
        if evaluate is None and value is not None:
            raise UsageError(f"{given} needs --evaluate with the samples to measure on")
    for given, limit in limits.items():
        if limit is not None and not 0 <= limit < float("inf"):
            raise UsageError(f"{given} {limit}: expected a number that is not negative")
