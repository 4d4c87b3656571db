# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Energy counters: found, wrapped, refused, absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qcompiler import energy


def zone(folder: Path, name: str, kind: str, micro: int, wraps: int = 1_000_000) -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(f"{kind}\n")
    (path / "energy_uj").write_text(f"{micro}\n")
    (path / "max_energy_range_uj").write_text(f"{wraps}\n")
    return path / "energy_uj"


def test_packages_are_counted_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:1", "psys", 1)
    zone(tmp_path, "intel-rapl:2", "package-1", 1)
    found, why = energy.counters(tmp_path)
    assert [c.path.parent.name for c in found] == ["intel-rapl:0", "intel-rapl:2"]
    assert why == ""


def test_energy_per_call(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 0)
    calls = {"a": 0, "b": 0}

    def runner(name: str, micro: int) -> Any:
        def call() -> None:
            calls[name] += 1
            counter.write_text(str((int(counter.read_text()) + micro) % 1_000_001))

        return call

    found = energy.measure_energy(
        {"a": runner("a", 1500), "b": runner("b", 4000)}, folder=tmp_path, seconds=0.02
    )
    assert calls["a"] > 2
    assert found["a"] == pytest.approx(1.5)
    assert found["b"] == pytest.approx(4.0)
    assert "1 package (RAPL)" in found["note"]


def test_a_counter_wraps_to_zero(tmp_path: Path) -> None:
    counter = energy.Counter(tmp_path, 1001)
    assert counter.between(990, 10) == 21
    assert counter.between(10, 990) == 980


def test_nothing_is_invented_without_counters(tmp_path: Path) -> None:
    found = energy.measure_energy({"compiled": lambda: None}, folder=tmp_path / "none")
    assert found["compiled"] is None
    assert found["note"].startswith("not measured: this machine has no energy counters in")


def test_counters_for_root_only_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0)

    def refuse(self: energy.Counter) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(energy.Counter, "read", refuse)
    found, why = energy.counters(tmp_path)
    assert found == []
    assert "may be read by root only" in why


def test_a_damaged_counter_is_left_out(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 0).write_text("what?")
    assert energy.counters(tmp_path)[0] == []
