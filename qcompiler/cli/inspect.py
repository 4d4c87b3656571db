# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile inspect`: what an artifact or an ONNX model holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import QCompilerError, UsageError


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An artifact (.qcm) or a model (.onnx).")
    ],
    lock: Annotated[
        Path | None,
        typer.Option(
            "--lock", metavar="LOCK.json", help="Write the artifact's lock, for compile --locked."
        ),
    ] = None,
    json_output: options.JsonOption = False,
) -> int:
    """Print what an artifact or an ONNX model holds; nothing of it is run."""
    shell.input_file(file, "file")
    with file.open("rb") as stream:
        is_archive = stream.read(2) == b"PK"
    if is_archive or file.suffix == ".qcm":
        if lock is not None:
            _write_lock(file, lock)
        _artifact(file, json_output)
    elif lock is not None:
        raise UsageError(f"--lock: {file} is not an artifact (.qcm)")
    elif file.suffix == ".onnx":
        _model(file, json_output)
    else:
        raise UsageError(f"{file} is neither an artifact (.qcm) nor a model (.onnx)")
    return shell.DONE


def _write_lock(file: Path, lock: Path) -> None:
    from qcompiler.lock import Lock

    shell.output_file(lock, "lock")
    Lock.load(file).save(lock)
    shell.say(f"wrote {lock}")


def _artifact(file: Path, json_output: bool) -> None:
    from qcompiler import report as pages
    from qcompiler.artifact import inspect_artifact
    from qcompiler.report_decisions import blocked_text

    found = inspect_artifact(file)
    report = report_beside(file, found["manifest"])
    keys = ("metric", "latency_ms", "budget", "assignment")
    found["measured"] = None if report is None else {key: report.get(key) for key in keys}
    shell.emit(found)
    if json_output:
        return
    manifest = found["manifest"]
    console = shell.out_console()
    target = manifest["target"]
    facts = {
        "artifact": f"{file}, {found['size_bytes']} bytes, format {manifest['format_version']}",
        "made by": f"qcompiler {manifest['producer']['version']}",
        "target": f"{target['name']} ({target['architecture']})",
        "parameters": f"{found['parameters_bytes']} bytes in {len(manifest['params'])} arrays",
        "digest": found["digest"],
        **{f"source {name}": digest for name, digest in manifest["sources"].items()},
    }
    if manifest.get("lock"):
        lock = manifest["lock"]
        facts["lock, versions"] = ", ".join(f"{n} {v}" for n, v in lock["versions"].items())
        facts["lock, options"] = ", ".join(f"{k} {v}" for k, v in lock["options"].items() if v)
    if report is not None:
        measured = pages.measured_facts(report)
        facts.update({f"measured, {name}": said for name, said in measured.items()})
        assigned = report.get("assignment") or {}
        if assigned.get("statement"):
            facts["plan"] = assigned["statement"]
            facts["plan, limits"] = "; ".join(pages.binding_lines(assigned))
    _facts(console, facts)
    missing = found["missing_cpu_features"]
    if missing:
        console.print(f"This machine cannot run it: its CPU lacks {', '.join(missing)}.")
    _tensors(console, "inputs", manifest["inputs"], manifest.get("dynamic"))
    _tensors(console, "outputs", manifest["outputs"], manifest.get("dynamic"))
    entries = plan_entries(found["plan"])
    order = list((report or {}).get("precision") or ())  # of the network; members are sorted
    if set(order) == set(entries):
        entries = {node: entries[node] for node in order}
    if entries:
        table = Table(title="precision of each node", title_justify="left")
        log = ((report or {}).get("assignment") or {}).get("nodes") or {}
        stopped = {n: blocked_text(e) for n, e in log.items() if e.get("options")}
        for heading in ("node", "precision", "reason", *(["stopped by"] if stopped else [])):
            table.add_column(heading, overflow="fold")
        for node, entry in entries.items():
            last = [stopped.get(node, "")] if stopped else []
            shell.add_row(table, node, *pages.precision_of(entry), *last)
        console.print(table)


def report_beside(file: Path, manifest: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the report that lies beside an artifact and is about it, or None."""
    from qcompiler.artifact import report_path

    try:
        report = json.loads(report_path(file).read_bytes())
    except (OSError, ValueError):
        return None
    digests = report.get("digests") if isinstance(report, Mapping) else None
    if not isinstance(digests, Mapping):
        return None
    same = digests.get("artifact", shell.sha256(file)) == shell.sha256(file)
    made = all(digests.get(name) == found for name, found in manifest["sources"].items())
    return report if same and made else None


def plan_entries(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return node -> {precision, reason} of a plan member, wherever in it the nodes lie."""
    nodes = plan.get("nodes", plan.get("precision", plan))
    return nodes if isinstance(nodes, Mapping) else {}


def _model(file: Path, json_output: bool) -> None:
    found = describe_model(file)
    shell.emit(found)
    if json_output:
        return
    console = shell.out_console()
    opsets = ", ".join(f"{domain or 'ai.onnx'} {v}" for domain, v in found["opsets"].items())
    facts = {"model": f"{file}, {found['size_bytes']} bytes", "opset": opsets}
    if found["problem"] is None:
        facts["stage"] = found["stage"]
        facts["parameters"] = f"{found['parameters']} elements"
    facts["digest"] = found["digest"]
    _facts(console, facts)
    _tensors(console, "inputs", found["inputs"])
    _tensors(console, "outputs", found["outputs"])
    table = Table(title="operators", title_justify="left")
    for heading in ("operator", "nodes", "compiled"):
        table.add_column(heading)
    for row in found["operators"]:
        shell.add_row(table, row["name"], str(row["nodes"]), row["compiled"])
    console.print(table)
    if found["problem"] is not None:
        console.print(f"It cannot be compiled as it is: {found['problem']}", markup=False)


def describe_model(file: Path) -> dict[str, Any]:
    """Return what an ONNX model holds, as `inspect --json` prints it.

    A model that can be read but not imported is described as far as possible, with the problem.

    Raises:
        ModelError: Not a readable ONNX model.
    """
    from qcompiler.onnx_import import load_onnx, read_model
    from qcompiler.onnx_import_context import CONVERTERS

    source = read_model(file)
    counts = Counter((node.domain, node.op_type) for node in source.proto.graph.node)
    found: dict[str, Any] = {
        "path": str(file),
        "size_bytes": file.stat().st_size,
        "digest": source.digest,
        "opsets": source.opsets,
        "operators": [
            {
                "name": f"{domain}.{name}" if domain not in ("", "ai.onnx") else name,
                "nodes": count,
                "compiled": "yes"
                if ("" if domain == "ai.onnx" else domain, name) in CONVERTERS
                else "float, through TVM's importer",
            }
            for (domain, name), count in counts.most_common()
        ],
        "inputs": [],
        "outputs": [],
        "problem": None,
    }
    try:
        graph = load_onnx(source)
    except QCompilerError as error:
        found["problem"] = str(error)
        return found
    found["stage"] = graph.stage.value
    found["parameters"] = sum(math.prod(value.shape) for value in graph.constants())
    for key, pairs in (("inputs", [(v.name, v) for v in graph.inputs]), ("outputs", graph.outputs)):
        found[key] = [
            {"name": name, "dtype": value.dtype.value, "shape": list(value.shape)}
            for name, value in pairs
        ]
    return found


def _facts(console: Console, facts: Mapping[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)


def _tensors(
    console: Console,
    title: str,
    tensors: Sequence[Mapping[str, Any]],
    dynamic: Mapping[str, Any] | None = None,
) -> None:
    for tensor in tensors:
        extents = list(map(str, tensor["shape"]))
        for axis, symbol in (dynamic or {}).get(title, {}).get(tensor["name"], {}).items():
            lo, hi = dynamic["symbols"][symbol] if dynamic else (0, 0)
            extents[int(axis)] = f"{lo}..{hi}"
        shape = ", ".join(extents)
        console.print(
            f"{title[:-1]:<7} {tensor['name']}: {tensor['dtype']}[{shape}]",
            markup=False,
            soft_wrap=True,
        )
