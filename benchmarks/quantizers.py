# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Quantize the same models on the same samples with several tools, score them, print one table.

Every tool runs in a process of its own on one core, with its documented defaults: 8-bit weights per
channel, 8-bit activations, 128 unlabelled calibration samples. Seconds are processor time of the
calibration and quantization alone, imports left out, so that a busy machine changes them little.
Every result is a QDQ model, scored by ONNX Runtime with basic graph optimisation (its default
int8 kernels saturate on x86 without VNNI) on the first 500 labelled samples.

The tools pin versions of their own: ``--peer-python`` names the interpreter of an environment with
``onnx``, ``onnxruntime`` and ``nncf``, apart from the compiler's. Models and samples come from the
``prepare.py`` of a folder of models.

Usage: ``python benchmarks/quantizers.py --models DIR --peer-python PYTHON [--names resnet20,...]
[--tools ours,nncf,...] [--json OUT.json]``
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

CALIBRATION, EVALUATION = 128, 500
NAMES = ("resnet20", "resnet56", "mobilenetv2", "kws_dscnn", "ic_resnet8", "mnist", "minilm")
TITLES = {
    "float": "float",
    "ours": "qcompiler",
    "ort-minmax": "ONNX Runtime, min-max",
    "ort-percentile": "ONNX Runtime, percentile",
    "ort-entropy": "ONNX Runtime, entropy",
    "nncf": "NNCF",
}
LIMIT = 3600
"""Seconds that one tool may take for one model."""

Feeds = list[dict[str, Any]]
Arrays = Mapping[str, npt.NDArray[Any]]


# ------------------------------------------------------------------------- in the tool's process


def with_ours(model: Path, out: Path, feeds: Feeds) -> None:
    """Quantize as `qcompile export` does."""
    from qcompiler.driver import quantize_model
    from qcompiler.onnx_export import to_onnx
    from qcompiler.ops import Stage

    samples = {name: np.concatenate([f[name] for f in feeds]) for name in feeds[0]}
    found = quantize_model(model, calibration=samples, precision="w8a8", stage=Stage.QDQ)
    out.write_bytes(to_onnx(found.graph).SerializeToString())


def with_onnxruntime(model: Path, out: Path, feeds: Feeds, method: str) -> None:
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


def with_nncf(model: Path, out: Path, feeds: Feeds) -> None:
    """Quantize with NNCF's defaults on all the samples; transformers by its model type."""
    import nncf
    import onnx

    proto = onnx.load(model)
    kind = nncf.ModelType.TRANSFORMER if "minilm" in model.stem else None
    data = nncf.Dataset(feeds)
    onnx.save(nncf.quantize(proto, data, subset_size=len(feeds), model_type=kind), out)


def _ort(method: str) -> Callable[[Path, Path, Feeds], None]:
    return lambda model, out, feeds: with_onnxruntime(model, out, feeds, method)


TOOLS: Mapping[str, Callable[[Path, Path, Feeds], None]] = {
    "ours": with_ours,
    "ort-minmax": _ort("MinMax"),
    "ort-percentile": _ort("Percentile"),
    "ort-entropy": _ort("Entropy"),
    "nncf": with_nncf,
}


def child(tool: str, model: Path, calibration: Path, out: Path) -> None:
    """Quantize and print the seconds of processor time as JSON in the last line."""
    import onnxruntime  # noqa: F401 - imported before the clock starts, like the tool itself

    modules = {"ours": ("qcompiler.driver", "qcompiler.onnx_export"), "nncf": ("nncf", "onnx")}
    for name in modules.get(tool, ("onnxruntime.quantization",)):
        importlib.import_module(name)
    with np.load(calibration) as file:
        samples = {name: file[name][:CALIBRATION] for name in file.files}
    count = min(len(a) for a in samples.values())
    feeds = [{n: a[i : i + 1] for n, a in samples.items()} for i in range(count)]
    cpu, wall = time.process_time(), time.perf_counter()
    TOOLS[tool](model, out, feeds)
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    print(json.dumps(spent))


# --------------------------------------------------------------------------------- the parent


def run(tool: str, python: str, model: Path, calibration: Path, out: Path) -> dict[str, Any]:
    """Quantize in a child on one core; return its seconds, or the reason for having none."""
    core = min(os.sched_getaffinity(0))
    command = [python, __file__, "--child", tool, str(model), str(calibration), str(out)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    except subprocess.TimeoutExpired:
        return {"refused": f"more than {LIMIT} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"refused": lines[-1] if lines else f"status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def outputs(model: Path, samples: Arrays) -> dict[str, npt.NDArray[Any]]:
    """Return the outputs for every sample, run one by one."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    count = len(next(iter(samples.values())))
    rows = [session.run(names, {n: a[i : i + 1] for n, a in samples.items()}) for i in range(count)]
    return {n: np.concatenate([r[k] for r in rows]) for k, n in enumerate(names)}


def score(model: Path, evaluation: Arrays) -> float:
    """Return top-1 in %, or the rank correlation where the samples have human scores."""
    inputs = {n: a for n, a in evaluation.items() if n not in ("label", "score")}
    found = outputs(model, inputs)
    if "score" in evaluation:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
        metric = importlib.import_module("model_metrics").pair_cosine_spearman
        return float(metric(found, evaluation))
    scores = next(iter(found.values())).reshape(len(evaluation["label"]), -1)
    return 100 * float(np.mean(scores.argmax(1) == evaluation["label"]))


def rows(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was found for each model: tool -> score and seconds."""
    spec = importlib.util.spec_from_file_location("prepare_models", args.models / "prepare.py")
    if spec is None or spec.loader is None:
        sys.exit(f"no prepare.py in {args.models}")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    for name in args.names.split(","):
        file, make, _, _ = prepare.MODELS[name]
        model = args.models / file
        calibration, evaluation = make(CALIBRATION, EVALUATION)
        samples = folder / f"{name}.npz"
        np.savez(samples, **calibration)
        found: dict[str, Any] = {"float": {"score": score(model, evaluation)}}
        for tool in args.tools.split(","):
            out = folder / f"{name}.{tool}.onnx"
            python = sys.executable if tool == "ours" else args.peer_python
            result = run(tool, python, model, samples, out)
            if "refused" not in result:
                result["score"] = score(out, evaluation)
            found[tool] = result
            print(f"{name} {tool}: {json.dumps(result)}", file=sys.stderr, flush=True)
        yield name, found


def table(found: Mapping[str, Mapping[str, Any]], tools: list[str]) -> str:
    """Return accuracy and seconds of every model and tool as Markdown."""
    lines = ["| model | " + " | ".join(TITLES[t] for t in tools) + " |", "|---" * (len(tools) + 1)]
    lines[1] += "|"
    for name, by_tool in found.items():
        cells = []
        for tool in tools:
            r = by_tool.get(tool, {})
            if "score" not in r:
                cells.append("refused" if "refused" in r else "")
                continue
            text = f"{r['score']:.4f}" if r["score"] <= 1 else f"{r['score']:.1f}"
            cells.append(text + (f" ({r['cpu']:.2g} s)" if "cpu" in r else ""))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run every tool on every model and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--models", type=Path, required=True, help="folder with prepare.py")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter of the others")
    parser.add_argument("--names", default=",".join(NAMES), help="models, by prepare.py's names")
    parser.add_argument("--tools", default=",".join(TOOLS), help="tools")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, row in rows(args, Path(folder)):
            found[name] = row
            if args.json is not None:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, ["float", *args.tools.split(",")]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], *map(Path, sys.argv[3:]))
    else:
        main()
