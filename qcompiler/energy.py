# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Energy of one call, from the processor's own counters (RAPL, through Linux's powercap).

The counters cover whole packages: cores, caches, memory controller, and whatever else runs on the
machine meanwhile. So a figure is an upper bound, and good for comparing two runners measured in
turn. Where there are no counters, or they may not be read, nothing is estimated.

Source: Linux, Documentation/power/powercap/powercap.rst; `energy_uj` counts microjoules and wraps
at `max_energy_range_uj`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
SECONDS = 0.4
"""Wall time per runner: counters move every millisecond, so this is good to about 0.3 %."""


@dataclass(frozen=True, slots=True)
class Counter:
    """One package's counter."""

    path: Path
    wraps: int

    def read(self) -> int:
        """Return the microjoules counted so far.

        Raises:
            OSError: It may not be read (newer kernels: by root only).
        """
        return int(self.path.read_text())

    def between(self, before: int, after: int) -> int:
        """Return the microjoules between two readings, at most one wrap apart."""
        return after - before if after >= before else after - before + self.wraps


def counters(folder: Path | None = None) -> tuple[list[Counter], str]:
    """Return the packages' counters, and why there are none that can be read."""
    root = POWERCAP if folder is None else folder
    found: list[Counter] = []
    why = f"not measured: this machine has no energy counters in {root}"
    for zone in sorted(root.glob("*:[0-9]*")) if root.is_dir() else ():
        if zone.name.count(":") != 1:  # a part of a package is counted in the package already
            continue
        try:
            if not (zone / "name").read_text().startswith("package"):
                continue
            counter = Counter(
                zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1
            )
            counter.read()
        except PermissionError:
            why = f"not measured: the energy counters in {root} may be read by root only"
        except (OSError, ValueError):
            continue
        else:
            found.append(counter)
    return found, "" if found else why


def measure_energy(
    runners: Mapping[str, Callable[[], object]],
    *,
    folder: Path | None = None,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Run each runner for a while and return its energy per call.

    Args:
        runners: Name -> one call.
        folder: Where the counters are; default: Linux's place.
        seconds: Wall time per runner.

    Returns:
        Name -> millijoules per call, None where not measured; and `note`: what was measured, or
        why nothing was.
    """
    packages, why = counters(folder)
    if not packages:
        return {**dict.fromkeys(runners), "note": why}
    found: dict[str, Any] = {}
    for name, call in runners.items():
        call()
        before = [p.read() for p in packages]
        started, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - started < seconds:
            call()
            calls += 1
        used = sum(p.between(b, p.read()) for p, b in zip(packages, before, strict=True))
        found[name] = used / calls / 1e3
    noun = "package" if len(packages) == 1 else "packages"
    found["note"] = (
        f"whole processor, {len(packages)} {noun} (RAPL), with whatever else ran on it meanwhile"
    )
    return found
