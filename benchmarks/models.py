# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Whole models against other runtimes, on the same work in one interleaved run.

Builds ResNet-50, MobileNetV2 and a 6-layer encoder with seeded weights (models/builders.py),
compiles each at w8a8 and fp32 for a target, and times them beside ONNX Runtime and OpenVINO (float
and static int8, per channel), every runner in its own process, pinned, in interleaved rounds.
Compile time, peak memory, artifact size and time to the first result are reported too.

Usage: ``python benchmarks/models.py [--threads 1,2] [--target host] [--models resnet50,encoder]
[--json FILE]``. A model may also be an ONNX file with fixed shapes but the batch. Needs
`pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import qcompiler
from qcompiler import peers, side_by_side
from qcompiler.cpu import allowed_cpus, host_cpu

MODELS = ("resnet50", "mobilenet_v2", "encoder")
RUNNERS = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")
SAMPLES = 8

_FIRST = """
import time, sys, numpy as np
start = time.perf_counter()
import qcompiler
model = qcompiler.load(sys.argv[1])
model(dict(np.load(sys.argv[2])))
print(time.perf_counter() - start)
"""


def builders() -> ModuleType:
    """Import models/builders.py by its path."""
    path = Path(__file__).parents[1] / "models" / "builders.py"
    spec = importlib.util.spec_from_file_location("builders", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"cannot import {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["builders"] = module
    spec.loader.exec_module(module)
    return module


def bench(name: str, target: str, threads: list[int], folder: Path) -> dict[str, Any]:
    """Build (or take), compile and time one model; returns the figures."""
    given, name = Path(name), Path(name).stem
    folder = folder / name  # the peers keep their quantized models here
    folder.mkdir()
    model = folder / f"{name}.onnx"
    if given.suffix == ".onnx":
        model.write_bytes(given.read_bytes())
    else:
        model.write_bytes(builders().BUILDERS[name]().SerializeToString())
    shapes = {n: s.shape for n, s in qcompiler.compile(model, precision="fp32").inputs.items()}
    rng = np.random.default_rng(0)
    samples = {
        n: rng.standard_normal((SAMPLES, *s[1:])).astype(np.float32) for n, s in shapes.items()
    }
    calibration, inputs = folder / f"{name}_calib.npz", folder / f"{name}_in.npz"
    np.savez(calibration, **samples)
    np.savez(inputs, **{n: a[:1] for n, a in samples.items()})
    found: dict[str, Any] = {"model": name}
    artifacts = {}
    for precision in ("w8a8", "fp32"):
        start = time.perf_counter()
        compiled = qcompiler.compile(
            model, target=target, precision=precision, calibration=calibration
        )
        artifacts[precision] = folder / f"{name}_{precision}.qcm"
        compiled.save(artifacts[precision])
        size = artifacts[precision].stat().st_size
        found[precision] = {
            "compile_s": time.perf_counter() - start,
            "artifact_mb": size / 1e6,
            "parameters_mb": len(compiled.artifact.params.data) / 1e6,
        }
    found["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    command = [sys.executable, "-c", _FIRST, str(artifacts["w8a8"]), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found["load_and_first_run_s"] = float(done.stdout)
    for count in threads:
        ours = [
            dataclasses.replace(
                peers.compiled_runner(artifact, inputs, count), name=f"qcompiler {precision}"
            )
            for precision, artifact in artifacts.items()
        ]
        others = [peers.peer_runner(r, model, inputs, count, folder, calibration) for r in RUNNERS]
        outcomes = side_by_side.measure([*ours, *others], threads=count, runs=30)
        found[f"threads_{count}"] = {
            runner: {"problem": o.problem} if o.timing is None else o.timing.to_json()
            for runner, o in outcomes.items()
        }
    return found


def table(rows: list[dict[str, Any]], count: int) -> str:
    """Return a Markdown table of medians in ms; the ratio is the best peer's median over ours."""
    names = ["qcompiler w8a8", "onnxruntime-int8", "openvino-int8", "qcompiler fp32",
             "onnxruntime", "openvino"]  # fmt: skip
    lines = [f"| model, {count} threads | " + " | ".join(names) + " | ratio int8 | ratio fp32 |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for row in rows:
        times = row[f"threads_{count}"]
        medians = {n: times.get(n, {}).get("median_ms") for n in names}
        cells = []
        for n in names:
            t = times.get(n, {})
            cells.append(f"{t['median_ms']:.2f} (±{t['spread']:.0%})" if "median_ms" in t else "-")
        for group in (names[:3], names[3:]):
            rivals = [m for n in group[1:] if (m := medians[n]) is not None]
            mine = medians[group[0]]
            cells.append(f"{min(rivals) / mine:.2f}" if rivals and mine else "-")
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    everything = f"1,{len(allowed_cpus())}" if len(allowed_cpus()) > 1 else "1"
    parser.add_argument("--threads", default=everything)
    parser.add_argument("--target", default="host")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    threads = [int(t) for t in options.threads.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            bench(name, options.target, threads, Path(folder)) for name in options.models.split(",")
        ]
    print(f"{host_cpu().name}, target {options.target}\n")
    for count in threads:
        print(table(rows, count), end="\n\n")
    for row in rows:
        for precision in ("w8a8", "fp32"):
            f = row[precision]
            print(
                f"{row['model']} {precision}: compiled in {f['compile_s']:.1f} s, artifact "
                f"{f['artifact_mb']:.1f} MB (parameters {f['parameters_mb']:.1f} MB)"
            )
        print(
            f"{row['model']}: load and first run {row['load_and_first_run_s']:.2f} s, "
            f"peak memory so far {row['peak_memory_gb']:.2f} GB"
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
