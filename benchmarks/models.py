# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Whole models against other runtimes, on the same work in one interleaved run.

Builds ResNet-50, MobileNetV2 and a 6-layer encoder with seeded weights (models/builders.py),
compiles each for a target, and times them beside ONNX Runtime, OpenVINO (float and static int8, per
channel, 7-bit weights) and plain TVM (float), every runner in its own process, pinned, in
interleaved rounds. Peak memory of every runner, compile time, artifact size and time to the first
result are reported too, and the slowest layers with their share of the multiply ports' peak.

On an instruction set without VNNI ours is compiled at w7a8 beside w8a8: at 7-bit weights all
runners compute the same. `--as avx2` does that on a newer CPU: the peers' processes see a CPU
without VNNI and AMX (benchmarks/masked.py), ours is compiled for x86-avx2.

Usage: ``python benchmarks/models.py [--threads 1,2] [--target host | --as avx2]
[--models resnet50,encoder] [--layers 8] [--chart FILE.png] [--json FILE] [--keep FOLDER]``. A
model may also be an ONNX file with fixed shapes but the batch. With `--keep` a second run finds
everything compiled and only measures. Needs `pip install .[bench]`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from masked import LEVELS, masked_environment

import qcompiler
from qcompiler import bench_chart, breakdown, peers, side_by_side
from qcompiler.cpu import allowed_cpus, host_cpu
from qcompiler.errors import QCompilerError
from qcompiler.registry import get_target
from qcompiler.targets.isa import ISA_TABLE

MODELS = ("resnet50", "mobilenet_v2", "encoder")
PEERS = "onnxruntime,openvino,tvm"
SAMPLES = 8

_FIRST = """
import time, sys, numpy as np
start = time.perf_counter()
import qcompiler
model = qcompiler.load(sys.argv[1])
model(dict(np.load(sys.argv[2])))
print(time.perf_counter() - start)
"""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured, and how.

    Attributes:
        target: Target of ours.
        precisions: Precisions of ours.
        peers: Runners of other runtimes.
        threads: Numbers of threads, one comparison each.
        runs: Least number of measured runs.
        records: Tuning records for ours, or None.
        environment: Variables of the peers' processes.
        processor: LLVM's name of the processor for plain TVM; None: this one.
        layers: How many of the slowest layers to list.
    """

    target: str
    precisions: tuple[str, ...]
    peers: tuple[str, ...]
    threads: tuple[int, ...]
    runs: int
    records: str | None
    environment: Mapping[str, str]
    processor: str | None
    layers: int


def builders() -> ModuleType:
    """Import models/builders.py."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
    return importlib.import_module("builders")


def bench(name: str, setup: Setup, folder: Path) -> dict[str, Any]:
    """Build (or take), compile and time one model; returns the figures."""
    given, name = Path(name), Path(name).stem
    folder = folder / name  # the peers keep their quantized models here
    folder.mkdir(exist_ok=True)
    model = folder / f"{name}.onnx"
    if given.suffix == ".onnx":
        model.write_bytes(given.read_bytes())
    elif not model.exists():
        model.write_bytes(builders().BUILDERS[name]().SerializeToString())
    calibration, inputs = folder / f"{name}_calib.npz", folder / f"{name}_in.npz"
    if not inputs.exists():
        shapes = {n: s.shape for n, s in qcompiler.compile(model, precision="fp32").inputs.items()}
        rng = np.random.default_rng(0)
        samples = {
            n: rng.standard_normal((SAMPLES, *s[1:])).astype(np.float32) for n, s in shapes.items()
        }
        np.savez(calibration, **samples)
        np.savez(inputs, **{n: a[:1] for n, a in samples.items()})
    found: dict[str, Any] = {"model": name, "ours": {}}
    artifacts = {p: folder / f"{name}_{p}_{setup.target}.qcm" for p in setup.precisions}
    for precision, artifact in artifacts.items():
        found["ours"][precision] = compiled(model, precision, setup, calibration, artifact, inputs)
    for count in setup.threads:
        found[f"threads_{count}"] = timed(model, artifacts, setup, count, folder, calibration)
        cpus = side_by_side.pick_cpus(count)
        for precision, artifact in artifacts.items():
            nodes = found["ours"][precision]["nodes"]
            parts = breakdown.of_artifact(artifact, inputs, count, cpus, nodes)
            found["ours"][precision][f"threads_{count}"] = parts.to_json()
    for figures in found["ours"].values():
        del figures["nodes"]
    return found


def compiled(
    model: Path, precision: str, setup: Setup, calibration: Path, artifact: Path, inputs: Path
) -> dict[str, Any]:
    """Compile a model unless that is done already; returns what is known of it."""
    notes = artifact.with_suffix(".json")
    if not notes.exists():
        start = time.perf_counter()
        model_of_ours = qcompiler.compile(
            model,
            target=setup.target,
            precision=precision,
            calibration=calibration,
            tuning=qcompiler.Tuning(records=setup.records) if setup.records else None,
        )
        model_of_ours.save(artifact)
        report = model_of_ours.report or {}
        figures = {
            "compile_s": time.perf_counter() - start,
            "artifact_mb": artifact.stat().st_size / 1e6,
            "parameters_mb": len(model_of_ours.artifact.params.data) / 1e6,
            "nodes": report.get("nodes"),
        }
        notes.write_text(json.dumps(figures))
    found: dict[str, Any] = json.loads(notes.read_text())
    command = [sys.executable, "-c", _FIRST, str(artifact), str(inputs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found["load_and_first_run_s"] = float(done.stdout)
    return found


def timed(
    model: Path,
    artifacts: Mapping[str, Path],
    setup: Setup,
    count: int,
    folder: Path,
    calibration: Path,
) -> dict[str, Any]:
    """Time everything with one number of threads; returns the figures of each runner."""
    inputs = folder / f"{model.stem}_in.npz"
    ours = [
        dataclasses.replace(
            peers.compiled_runner(artifact, inputs, count), name=f"qcompiler {precision}"
        )
        for precision, artifact in artifacts.items()
    ]
    others = [
        peers.peer_runner(
            runner,
            model,
            inputs,
            count,
            folder,
            calibration,
            environment=setup.environment,
            processor=setup.processor,
        )
        for runner in setup.peers
    ]
    outcomes = side_by_side.measure([*ours, *others], threads=count, runs=setup.runs)
    return {
        runner: {"problem": o.problem}
        if o.timing is None
        else {**o.timing.to_json(), "peak_memory_mb": o.peak_memory_mb, "note": o.note}
        for runner, o in outcomes.items()
    }


def ratios(times: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return per precision of ours the best peer's median over ours, like against like."""
    medians = {n: t["median_ms"] for n, t in times.items() if "median_ms" in t}
    found = {}
    for name, median in medians.items():
        first, _, precision = name.partition(" ")
        if first != peers.OURS:
            continue
        is_int8 = precision != "fp32"
        rivals = [
            m
            for n, m in medians.items()
            if not n.startswith(peers.OURS) and n.endswith("-int8") == is_int8
        ]
        if rivals:
            found[precision] = min(rivals) / median
    return found


def table(rows: list[dict[str, Any]], count: int) -> str:
    """Return a Markdown table of medians in ms; a ratio is the best peer's median over ours."""
    names = list(dict.fromkeys(n for row in rows for n in row[f"threads_{count}"]))
    precisions = [n.partition(" ")[2] for n in names if n.startswith(peers.OURS)]
    heads = [*names, *(f"ratio {p}" for p in precisions)]
    lines = [f"| model, threads: {count} | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for row in rows:
        times = row[f"threads_{count}"]
        found = ratios(times)
        cells = []
        for n in names:
            t = times.get(n, {})
            cells.append(f"{t['median_ms']:.2f} (±{t['spread']:.0%})" if "median_ms" in t else "-")
        cells += [f"{found[p]:.2f}" if p in found else "-" for p in precisions]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows: list[dict[str, Any]], count: int) -> str:
    """Return a Markdown table of the minima in ms and the peak memory in MB of each runner."""
    names = list(dict.fromkeys(n for row in rows for n in row[f"threads_{count}"]))
    lines = [f"| minimum, peak memory; threads: {count} | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in rows:
        cells = []
        for n in names:
            t = row[f"threads_{count}"].get(n, {})
            memory = t.get("peak_memory_mb")
            cells.append(
                (f"{t['min_ms']:.2f} ms" if "min_ms" in t else t.get("problem", "-"))
                + (f", {memory:.0f} MB" if memory else "")
            )
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def layers_table(row: Mapping[str, Any], precision: str, count: int, slowest: int) -> str:
    """Return a Markdown table of the slowest layers of one model."""
    parts = row["ours"][precision][f"threads_{count}"]
    layers = sorted(parts["layers"], key=lambda layer: -layer["ms"])[:slowest]
    peak = parts["peaks"].get("float32" if precision == "fp32" else "int8")
    whole = parts["share_of_peak"]
    said = (
        f", {whole:.0%} of the peak of {peak['gmacs']:.0f} GMAC/s ({peak['instruction']})"
        if peak and whole is not None
        else ""
    )
    lines = [
        f"{row['model']} {precision}, threads: {count}: "
        f"{parts['kernels_ms']:.2f} ms in kernels{said}",
        "",
        "| layer | kernel | us | of the time | GMAC/s | of the peak |",
        "|---|---|---|---|---|---|",
    ]
    for layer in layers:
        speed = "-" if layer["gmacs"] is None else f"{layer['gmacs']:.0f}"
        share = "-" if layer["share_of_peak"] is None else f"{layer['share_of_peak']:.0%}"
        lines.append(
            f"| {layer['name']} | {layer['kernel']} | {layer['ms'] * 1e3:.0f} "
            f"| {layer['share_of_time']:.0%} | {speed} | {share} |"
        )
    return "\n".join(lines)


def chart(path: Path, title: str, rows: list[dict[str, Any]], count: int) -> None:
    """Draw every model's runners as bars."""
    panels = [bench_chart.runners_panel(row["model"], row[f"threads_{count}"]) for row in rows]
    bench_chart.draw(path, f"{title}, threads: {count}", panels)


def report(rows: list[dict[str, Any]], setup: Setup) -> None:
    """Print everything as Markdown."""
    for count in setup.threads:
        print(table(rows, count), end="\n\n")
        print(memory_table(rows, count), end="\n\n")
    for row in rows:
        for precision, f in row["ours"].items():
            print(
                f"{row['model']} {precision}: compiled in {f['compile_s']:.1f} s, artifact "
                f"{f['artifact_mb']:.1f} MB (parameters {f['parameters_mb']:.1f} MB), "
                f"load and first run {f['load_and_first_run_s']:.2f} s"
            )
    for row in rows if setup.layers else ():
        for precision in setup.precisions:
            print("\n" + layers_table(row, precision, setup.threads[0], setup.layers))


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    everything = f"1,{len(allowed_cpus())}" if len(allowed_cpus()) > 1 else "1"
    parser.add_argument("--threads", default=everything, help="numbers of threads")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--target", default="host", help="target of ours")
    which.add_argument(
        "--as", dest="level", choices=tuple(LEVELS), help="the CPU that everyone is to use"
    )
    parser.add_argument(
        "--models", default=",".join(MODELS), help="of models/builders.py, or .onnx"
    )
    parser.add_argument("--precisions", help="of ours; w8a8 (and w7a8 without VNNI), fp32")
    parser.add_argument("--peers", default=PEERS, help=f"default {PEERS}")
    parser.add_argument("--runs", type=int, default=30, help="least number of runs")
    parser.add_argument("--records", help="tuning records for ours")
    parser.add_argument("--layers", type=int, default=5, help="slowest layers to list; 0: none")
    parser.add_argument("--chart", type=Path, help="draw the medians: .png, .svg or .pdf")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--keep", type=Path, help="keep, and take from here, what is compiled")
    return parser.parse_args()


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Measure what the options say."""
    target, processor = LEVELS[options.level] if options.level else (options.target, None)
    if options.chart:
        bench_chart.check(options.chart)
    target = get_target(target).spec.name
    isa = ISA_TABLE.get(target)
    exact = ("w8a8", "w7a8") if isa is not None and isa.dot == "maddubs" else ("w8a8",)
    setup = Setup(
        target=target,
        precisions=tuple((options.precisions or ",".join([*exact, "fp32"])).split(",")),
        peers=peers.expand(options.peers),
        threads=tuple(int(t) for t in options.threads.split(",")),
        runs=options.runs,
        records=options.records,
        environment=masked_environment(options.level, scratch) if options.level else {},
        processor=processor,
        layers=options.layers,
    )
    folder = options.keep or scratch
    folder.mkdir(exist_ok=True)
    rows = [bench(name, setup, folder) for name in options.models.split(",")]
    seen = f", peers see a CPU with {options.level} only" if options.level else ""
    title = f"{host_cpu().name}, target {target}{seen}"
    print(f"{title}\n")
    report(rows, setup)
    if options.json:
        head = {"cpu": host_cpu().name, "target": target, "seen_by_peers": options.level}
        options.json.write_text(json.dumps({**head, "models": rows}, indent=1) + "\n")
    if options.chart:
        for count in setup.threads:
            path = options.chart
            if len(setup.threads) > 1:
                path = path.with_stem(f"{path.stem}_{count}")
            chart(path, title, rows, count)


def main() -> int:
    """Run the benchmark and print tables."""
    options = parsed()
    # Workers get this path: cuda.py here is not the package of that name that libraries look for.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [entry for entry in sys.path if str(Path(entry).resolve()) != here]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            run(options, Path(scratch))
    except QCompilerError as error:
        print(f"models.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
