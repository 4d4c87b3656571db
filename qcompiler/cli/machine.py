# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""`qcompile targets` and `qcompile doctor`: what can be compiled for, and what this machine has."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.markup import escape
from rich.table import Table

from qcompiler.cli import options, shell
from qcompiler.errors import QCompilerError

if TYPE_CHECKING:
    from qcompiler.targets.base import TargetSpec

State = Literal["ok", "missing", "broken"]


def targets(json_output: options.JsonOption = False) -> int:
    """List the targets, what they compute in, and whether this machine can run or only build."""
    from qcompiler.cpu import missing_features
    from qcompiler.registry import get_target, target_names

    rows: list[dict[str, Any]] = []
    for name in target_names():
        spec = get_target(name).spec
        missing = missing_features(spec.cpu_features)
        rows.append(
            {
                "name": name,
                "description": spec.description,
                "architecture": (spec.triple or "any").split("-")[0],
                "cpu_features": list(spec.cpu_features),
                "processor": spec.mcpu,
                "processors": list(spec.processors),
                "precisions": [p.value for p in spec.precisions],
                "multiplies_halves": spec.multiplies_halves,
                "runs_here": not _obstacle(spec),
                "obstacle": _obstacle(spec),
                "missing_cpu_features": list(missing),
                "builds_here": not _build_obstacle(spec),
                "build_obstacle": _build_obstacle(spec),
            }
        )
    host = get_target("host").spec.name
    shell.emit({"host": host, "targets": rows})
    if json_output:
        return shell.DONE
    table = Table()
    for heading in ("target", "description", "precisions", "here"):
        table.add_column(heading, no_wrap=heading == "target")
    for row in rows:
        name = f"{row['name']} (host)" if row["name"] == host else row["name"]
        table.add_row(name, _about(row), ", ".join(row["precisions"]), _here(row))
    shell.out_console().print(table)
    return shell.DONE


def _about(row: dict[str, Any]) -> str:
    """Return the description of a target, with what it needs and offers, for the table."""
    lines = [row["description"]]
    if row["cpu_features"]:
        lines.append(f"needs {', '.join(row['cpu_features'])}")
    if row["processors"]:
        others = ", ".join(p for p in row["processors"] if p != row["processor"])
        lines.append(f"for {row['processor']}; as {row['name']}:PROCESSOR for {others}")
    return "\n".join(lines)


def _here(row: dict[str, Any]) -> str:
    """Return what this machine can do with a target, for the table."""
    if row["runs_here"]:
        return "builds and runs"
    if row["builds_here"]:
        return f"builds only: {row['obstacle']}"
    return f"no: {row['build_obstacle']}"


def _build_obstacle(spec: TargetSpec) -> str:
    """Return why code for a target cannot be linked on this machine; empty where it can."""
    from qcompiler.linker import find_linker

    if spec.isa is None or spec.triple is None:
        return ""
    try:
        find_linker(spec.triple)
    except QCompilerError as error:
        return f"{error.message} ({error.hint})" if error.hint else error.message
    return ""


def _obstacle(spec: TargetSpec) -> str:
    """Return why code for a target does not run on this machine; empty where it does."""
    from qcompiler.artifact import check_runnable
    from qcompiler.cpu import host_cpu, missing_features
    from qcompiler.errors import UnsupportedByTargetError
    from qcompiler.manifest import TargetInfo

    machine = host_cpu().architecture
    if spec.isa is not None and (spec.triple or machine).split("-")[0] != machine:
        return f"this machine is {machine}"
    lacking = ", ".join(missing_features(spec.cpu_features))
    if lacking:
        return f"the CPU lacks {lacking}"
    try:
        check_runnable(TargetInfo(spec.name, spec.isa or "", triple=spec.triple or ""), "it")
    except UnsupportedByTargetError as error:
        return error.message
    return ""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's list.

    Attributes:
        name: What was looked at.
        state: "ok"; "missing" for something optional; "broken" for what the main job needs.
        detail: What was found.
        fix: What to do about it, where something is to be done.
    """

    name: str
    state: State
    detail: str
    fix: str = ""


def doctor(json_output: options.JsonOption = False) -> int:
    """Check that this machine has what qcompiler needs; exit status 1 if something is broken."""
    findings = [
        *_packages(),
        _tvm_works(),
        *_cpu(),
        _linker(),
        *_cross_linkers(),
        *_optional(),
    ]
    broken = [f for f in findings if f.state == "broken"]
    shell.emit({"ok": not broken, "findings": [asdict(f) for f in findings]})
    if not json_output:
        table = Table()
        table.add_column("")
        table.add_column("what")
        table.add_column("found", overflow="fold")
        marks = {"ok": "[green]ok[/]", "missing": "[yellow]–[/]", "broken": "[red]broken[/]"}
        for finding in findings:
            detail = f"{finding.detail}. {finding.fix}" if finding.fix else finding.detail
            table.add_row(marks[finding.state], finding.name, escape(detail))
        shell.out_console().print(table)
        verdict = "Something is broken; see above." if broken else "Everything needed is here."
        shell.out_console().print(verdict)
    return shell.NOT_MET if broken else shell.DONE


def required_pins() -> dict[str, str]:
    """Return the exact versions that this distribution requires, by package."""
    import importlib.metadata

    pins = {}
    for requirement in importlib.metadata.requires("qcompiler") or ():
        match = re.match(r"([A-Za-z0-9._-]+)==([^\s;,]+)$", requirement.split(";")[0].strip())
        if match:
            pins[match.group(1)] = match.group(2)
    return pins


def _packages() -> list[Finding]:
    findings = []
    pins = required_pins()
    for package, version in shell.versions().items():
        wanted = pins.get(package)
        if version == "not installed":
            fix = f"pip install {package}" + (f"=={wanted}" if wanted else "")
            findings.append(Finding(package, "broken", version, fix))
        elif wanted is not None and version != wanted:
            fix = f"pip install {package}=={wanted}"
            findings.append(Finding(package, "broken", f"{version}, expected {wanted}", fix))
        else:
            detail = f"{version} (pinned)" if wanted else version
            findings.append(Finding(package, "ok", detail))
    return findings


def _tvm_works() -> Finding:
    from qcompiler import vm

    try:
        vm._runtime()
    except QCompilerError as error:
        return Finding("TVM runtime", "broken", error.message, error.hint or "")
    return Finding("TVM runtime", "ok", "loads")


def _cpu() -> list[Finding]:
    from qcompiler.cpu import host_cpu, missing_features, physical_cores
    from qcompiler.targets.isa import ISA_TABLE

    cpu = host_cpu()
    cores = f"{physical_cores()} cores for this process"
    findings = [Finding("CPU", "ok", f"{cpu.name}, {cpu.architecture}, {cores}")]
    for name, isa in ISA_TABLE.items():
        missing = missing_features(isa.cpu_features)
        state: State = "missing" if missing else "ok"
        detail = f"lacks {', '.join(missing)}; can be compiled for" if missing else "runs here"
        findings.append(Finding(f"target {name}", state, detail))
    return findings


def _linker() -> Finding:
    from qcompiler.linker import find_linker

    try:
        command = find_linker()
    except QCompilerError as error:
        return Finding("C compiler", "broken", error.message, error.hint or "")
    return Finding(
        "C compiler", "ok", f"{' '.join(command)}: {_first_line([*command, '--version'])}"
    )


def _cross_linkers() -> list[Finding]:
    """What links for the other architectures, and what to install where nothing does."""
    from qcompiler.cpu import host_cpu
    from qcompiler.linker import find_linker
    from qcompiler.targets.isa import ISA_TABLE

    findings = []
    for triple in dict.fromkeys(isa.mtriple for isa in ISA_TABLE.values()):
        architecture = triple.split("-")[0]
        if architecture == host_cpu().architecture:
            continue
        name = f"linker for {architecture}"
        try:
            command = find_linker(triple)
        except QCompilerError as error:
            findings.append(Finding(name, "missing", error.message, error.hint or ""))
            continue
        said = _first_line([*command, "--version"])
        findings.append(Finding(name, "ok", f"{' '.join(command)}: {said}"))
    return findings


def _optional() -> list[Finding]:
    findings = []
    openvino = shell.package_version("openvino")
    findings.append(
        Finding("openvino", "ok", openvino)
        if openvino
        else Finding("openvino", "missing", "not installed; a peer of `bench`")
    )
    for command, what in (
        ("qemu-aarch64-static", "runs code for ARM in the tests"),
        ("nvcc", "compiles CUDA kernels"),
    ):
        path = shutil.which(command)
        if path is None:
            findings.append(Finding(command, "missing", f"not found; {what}"))
        else:
            findings.append(Finding(command, "ok", f"{path}: {_first_line([path, '--version'])}"))
    findings.append(_gpu())
    return findings


def _gpu() -> Finding:
    from qcompiler import cuda_driver

    try:
        found = cuda_driver.driver()
    except QCompilerError as error:
        return Finding("GPU", "missing", f"{error.message}; models for it can be compiled")
    capability = f"compute capability {found.capability / 10:.1f}"
    return Finding("GPU", "ok", f"{found.name}, {capability}")


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False, errors="replace"
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else f"exit status {done.returncode}"
