# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Score each accuracy method on the real models, and print the tables of docs/accuracy.md.

Quantizes with 128 unlabelled calibration samples (or `--calibration` many), default settings and
seed 0, runs the QDQ model in ONNX Runtime with basic optimisation on the first 500 evaluation
samples, and prints top-1 in percent as Markdown. "undone": held-out samples did not approve of the
method, so the result is that of rounding to nearest. With a file of results, cells that it holds
are not measured again.

Usage: ``python benchmarks/accuracy_table.py [--results FILE.json] [--precision w4a8]
[--models resnet20,...] [--methods none:equalize:...] [--calibration 200]``
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from qcompiler.driver import quantize_model
from qcompiler.onnx_export import to_onnx
from qcompiler.ops import Stage
from qcompiler.ort import Session
from qcompiler.passes.methods import default_methods

CALIBRATION, EVALUATION = 128, 500
MODELS = {
    "resnet20": "resnet20 (CIFAR-10)",
    "resnet56": "resnet56 (CIFAR-10)",
    "mobilenetv2": "mobilenetv2 (ImageNet)",
}
ALONE = (
    "equalize",
    "correct_bias",
    "correct_bias{form=analytic}",
    "adaround",
    "gptq",
    "brecq",
    "distill",
)
"""Methods that each get a column."""
PER_CHANNEL = ("adaround", "brecq")
"""Those that leave weights in groups alone."""
TOGETHER = ("equalize,gptq", "equalize,gptq,distill")
"""What gives the best accuracy with one scale per channel; the last takes longest."""


def catalogue() -> ModuleType:
    """Import models/catalogue.py."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
    return importlib.import_module("catalogue")


def top1(model: bytes, samples: dict[str, Any]) -> float:
    """Return the percentage of samples whose greatest score is the label's."""
    session = Session(model)
    (name,) = session.input_names
    hits = 0
    for x, label in zip(samples[name], samples["label"], strict=True):
        scores = session.run({name: x[None]})[session.output_names[0]]
        hits += int(scores.reshape(-1).argmax() == label)
    return 100 * hits / len(samples["label"])


def measured(model: Any, precision: str, methods: str) -> dict[str, Any]:
    """Return the score of a model quantized with methods, the seconds it took, and the log."""
    started = time.perf_counter()
    result = quantize_model(
        model.path,
        calibration=model.calibration,
        precision=precision,
        methods=methods,
        stage=Stage.QDQ if precision != "fp32" else Stage.FLOAT,
    )
    seconds = time.perf_counter() - started
    score = top1(to_onnx(result.graph).SerializeToString(), model.evaluation)
    return {"top1": score, "seconds": round(seconds, 1), "log": result.log}


def columns(precision: str) -> list[str]:
    """Return the methods to measure at a precision, "none" for rounding to nearest."""
    default = default_methods(precision)
    alone: tuple[str, ...] = ("equalize", "correct_bias")
    if precision.startswith("w4"):
        alone = tuple(m for m in ALONE if precision == "w4a8" or m not in PER_CHANNEL)
    together = TOGETHER if precision.startswith("w4") else ()
    return list(dict.fromkeys(["none", *alone, *together, *([default] if default else [])]))


def cell(found: dict[str, Any]) -> str:
    """Return the text of a cell."""
    verdicts = [line for line in found["log"] if "relative error held out" in line]
    undone = verdicts and all("discarded" in line for line in verdicts)
    return "undone" if undone else f"{found['top1']:.1f}"


def table(results: dict[str, Any], precision: str, models: list[str]) -> str:
    """Return the table of a precision as Markdown, from what was measured."""
    methods, default = columns(precision), default_methods(precision)
    names = ["nearest" if m == "none" else m for m in methods]
    heads = [f"{n} (default)" if n == default else n for n in names]
    lines = [
        f"| model | float | {' | '.join(heads)} |",
        "|" + "---|" * (len(heads) + 2),
    ]
    for model in models:
        row = [results.get(f"{model} {precision} {m}") for m in methods]
        known = results.get(f"{model} fp32 none")
        cells = ["" if c is None else cell(c) for c in (known, *row)]
        lines.append(f"| {MODELS[model]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="JSON file of cells, added to")
    parser.add_argument("--precision", default="w8a8,w4a8,w4a8-group")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--methods", help="only these columns, separated by colons")
    parser.add_argument("--calibration", type=int, default=CALIBRATION, help="samples")
    args = parser.parse_args()
    models, precisions = args.models.split(","), args.precision.split(",")
    results: dict[str, Any] = {}
    if args.results is not None and args.results.is_file():
        results = json.loads(args.results.read_text())
    external = catalogue()
    for name in models:
        model = external.external(name, args.calibration, EVALUATION)
        if model is None:
            raise SystemExit(external.skip_reason(name))
        wanted = [("fp32", "none")]
        for p in precisions:
            chosen = columns(p) if args.methods is None else args.methods.split(":")
            wanted += [(p, m) for m in chosen]
        for precision, methods in wanted:
            key = f"{name} {precision} {methods}"
            if key in results:
                continue
            results[key] = measured(model, precision, methods)
            print(f"{key}: {results[key]}", file=sys.stderr, flush=True)
            if args.results is not None:
                args.results.write_text(json.dumps(results, indent=1) + "\n")
    for precision in precisions:
        print(f"{precision.upper()}:\n\n{table(results, precision, models)}\n")


if __name__ == "__main__":
    main()
