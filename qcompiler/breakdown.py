# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Where the time of a compiled model goes: each layer's share of it, and of the machine's peak."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompiler.errors import TargetError

__all__ = ["Breakdown", "Layer", "join", "of_artifact"]

_IN_FLOAT = ("fp32", "fp16", "w8", "w4")
"""Precisions whose products are float32: weights alone are narrow."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One region of a model: a kernel call, or the few that belong together.

    Attributes:
        name: Name of the region in the model; the kernel's where no report tells.
        ops: Operators in it.
        precision: Its precision, "" where no report tells.
        kernels: Symbols of its kernels.
        seconds: Their time in one run, the least of some.
        macs: Multiply-accumulates of the layer as the model says it, 0 where that means nothing.
    """

    name: str
    ops: tuple[str, ...]
    precision: str
    kernels: tuple[str, ...]
    seconds: float
    macs: int = 0

    @property
    def gmacs(self) -> float | None:
        """Thousand millions of multiply-accumulates per second; None without products."""
        return self.macs / self.seconds / 1e9 if self.macs and self.seconds > 0 else None

    @property
    def in_float(self) -> bool:
        """Whether its products are of float32."""
        return self.precision in _IN_FLOAT


@dataclass(frozen=True, slots=True)
class Breakdown:
    """The layers of a model in order, and the peaks that they are compared with.

    Attributes:
        layers: In the order they run.
        threads: Threads that they ran with.
        peaks: For "int8" and "float32": (instruction, GMAC/s of all threads). Empty where the
            peak cannot be measured.
    """

    layers: tuple[Layer, ...]
    threads: int
    peaks: Mapping[str, tuple[str, float]]

    @property
    def seconds(self) -> float:
        """Time in kernels of one run."""
        return sum(layer.seconds for layer in self.layers)

    def share(self, layer: Layer) -> float | None:
        """Return which part of the multiply ports' peak a layer reaches, None without products."""
        peak = self.peaks.get("float32" if layer.in_float else "int8")
        return layer.gmacs / peak[1] if peak and layer.gmacs is not None else None

    def whole_share(self) -> float | None:
        """Return the time that all products take at their peaks over the time in kernels."""
        if not self.peaks or not self.seconds:
            return None
        needed = sum(
            layer.macs / self.peaks["float32" if layer.in_float else "int8"][1] / 1e9
            for layer in self.layers
        )
        return needed / self.seconds

    def slowest(self, count: int) -> list[Layer]:
        """Return the layers that take longest, longest first."""
        return sorted(self.layers, key=lambda layer: -layer.seconds)[:count]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON."""
        return {
            "threads": self.threads,
            "peaks": {
                kind: {"instruction": instruction, "gmacs": gmacs}
                for kind, (instruction, gmacs) in self.peaks.items()
            },
            "share_of_peak": self.whole_share(),
            "kernels_ms": self.seconds * 1e3,
            "layers": [
                {
                    "name": layer.name,
                    "ops": list(layer.ops),
                    "precision": layer.precision,
                    "kernel": " ".join(layer.kernels),
                    "ms": layer.seconds * 1e3,
                    "share_of_time": layer.seconds / self.seconds if self.seconds else None,
                    "macs": layer.macs,
                    "gmacs": layer.gmacs,
                    "share_of_peak": self.share(layer),
                }
                for layer in self.layers
            ],
        }


def join(
    calls: Sequence[tuple[str, float]], nodes: Sequence[Mapping[str, Any]] | None
) -> tuple[Layer, ...]:
    """Put measured kernel calls together to the regions of a report.

    Args:
        calls: (symbol, seconds) in the order of the calls (`CompiledModel.profile`).
        nodes: The report's `nodes`, in the same order; None where there is no report.

    Returns:
        One layer per region that calls a kernel. Where the report's kernels are not those that
        ran, one per call, named after its kernel.
    """
    layers: list[Layer] = []
    at = 0
    for node in nodes or ():
        symbols = tuple(s for s in str(node["kernel"]).split() if s != "interpreter")
        found = calls[at : at + len(symbols)]
        if tuple(symbol for symbol, _ in found) != symbols:
            layers.clear()
            break
        at += len(symbols)
        if symbols:
            layers.append(
                Layer(
                    str(node["name"]),
                    tuple(node["ops"]),
                    str(node["precision"]),
                    symbols,
                    sum(seconds for _, seconds in found),
                    int(node["macs"]),
                )
            )
    if at == len(calls) and layers:
        return tuple(layers)
    return tuple(Layer(symbol, (), "", (symbol,), seconds) for symbol, seconds in calls)


def of_artifact(
    artifact: Path,
    inputs: Path,
    threads: int,
    cpus: Sequence[int],
    nodes: Sequence[Mapping[str, Any]] | None,
) -> Breakdown:
    """Measure an artifact in a process of its own, pinned to some CPUs.

    Args:
        artifact: The `.qcm` file.
        inputs: `.npz` with one batch per input.
        threads: Threads.
        cpus: What to pin to.
        nodes: `nodes` of the artifact's report, for the names and sizes of its layers.
    """
    from qcompiler.peers import apart

    found = apart(f"{__name__}:measured", str(artifact), str(inputs), threads, list(cpus))
    calls = [(str(symbol), float(seconds)) for symbol, seconds in found["calls"]]
    peaks = {kind: (str(name), float(gmacs)) for kind, (name, gmacs) in found["peaks"].items()}
    return Breakdown(join(calls, nodes), threads, peaks)


def measured(artifact: str, inputs: str, threads: int, cpus: list[int]) -> dict[str, Any]:
    """Return as JSON the kernel calls of an artifact ("calls") and the CPU's peaks ("peaks")."""
    import numpy as np

    from qcompiler.runtime import load

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
    model = load(artifact, threads=threads)
    with np.load(inputs, allow_pickle=False) as file:
        calls = model.profile({name: file[name] for name in file.files}, runs=15)
    return {"calls": calls, "peaks": _peaks(model.target.isa, threads)}


def _peaks(name: str, threads: int) -> dict[str, tuple[str, float]]:
    """Measure the peaks of one core and multiply them; empty where they cannot be measured."""
    from qcompiler.targets.isa import ISA_TABLE

    isa = ISA_TABLE.get(name)
    if isa is None:
        return {}
    from qcompiler.targets.kernels.peak import measured_peak

    try:
        found = {kind: measured_peak(isa, kind) for kind in ("int8", "float32")}
    except TargetError:
        return {}
    return {kind: (peak.instruction, peak.gmacs * threads) for kind, peak in found.items()}
