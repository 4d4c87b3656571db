# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler import bench_chart, breakdown
from qcompiler.bench_chart import Panel, draw, layers_panel, runners_panel
from qcompiler.breakdown import Breakdown, Layer, join
from qcompiler.errors import TargetError, UsageError
from qcompiler.side_by_side import pick_cpus
from qcompiler.targets.isa import ISA_TABLE, runnable

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"


def node(name: str, kernel: str, macs: int, precision: str = "w8a8") -> dict[str, Any]:
    return {"name": name, "ops": ["qconv"], "kernel": kernel, "macs": macs, "precision": precision}


def test_join_gives_calls_to_their_regions() -> None:
    nodes = [
        node("a", "k0", 2_000_000),
        node("none", "interpreter", 0),
        node("b", "k1 k2", 1_000_000, "fp32"),
        node("c", "k0", 2_000_000),
    ]
    calls = [("k0", 1e-3), ("k1", 2e-3), ("k2", 3e-3), ("k0", 4e-3)]
    a, b, c = join(calls, nodes)
    assert [layer.name for layer in (a, b, c)] == ["a", "b", "c"]
    assert [layer.seconds for layer in (a, b, c)] == pytest.approx([1e-3, 5e-3, 4e-3])
    assert b.kernels == ("k1", "k2")
    assert a.gmacs == pytest.approx(2.0)
    assert not a.in_float
    assert b.in_float


@pytest.mark.parametrize("kernel", ["k9", "k0 k1"])
def test_join_leaves_a_report_out_that_is_not_of_what_ran(kernel: str) -> None:
    found = join([("k0", 1e-3), ("k2", 2e-3)], [node("a", kernel, 5)])
    assert [(layer.name, layer.macs) for layer in found] == [("k0", 0), ("k2", 0)]
    assert join([("k0", 1e-3)], None)[0].gmacs is None


def test_shares_are_of_the_peak_of_the_right_kind() -> None:
    integer = Layer("i", ("qconv",), "w8a8", ("k",), 1e-3, 50_000_000)
    floating = Layer("f", ("conv",), "fp32", ("k",), 1e-3, 5_000_000)
    idle = Layer("n", ("quantize",), "w8a8", ("k",), 2e-3)
    parts = Breakdown((integer, floating, idle), 1, {"int8": ("x", 100.0), "float32": ("y", 10.0)})
    assert parts.share(integer) == pytest.approx(0.5)
    assert parts.share(floating) == pytest.approx(0.5)
    assert parts.share(idle) is None
    assert parts.whole_share() == pytest.approx(0.25)
    assert [layer.name for layer in parts.slowest(1)] == ["n"]
    assert Breakdown((integer,), 1, {}).whole_share() is None


def test_an_artifact_is_measured_in_its_parts(tmp_path: Path) -> None:
    model = qcompiler.compile(MODELS / "model.onnx", calibration=MODELS / "calib.npz")
    model.save(tmp_path / "net.qcm")
    np.savez(tmp_path / "in.npz", **model.random_inputs())  # type: ignore[arg-type]
    nodes = (model.report or {})["nodes"]
    parts = breakdown.of_artifact(tmp_path / "net.qcm", tmp_path / "in.npz", 1, pick_cpus(1), nodes)
    assert [layer.name for layer in parts.layers] == [n["name"] for n in nodes]
    assert sum(layer.macs for layer in parts.layers) == sum(n["macs"] for n in nodes) > 0
    assert parts.peaks["int8"][1] > parts.peaks["float32"][1] > 1
    share = parts.whole_share()
    assert share is not None
    assert 0 < share < 1
    found = parts.to_json()
    assert sum(layer["share_of_time"] for layer in found["layers"]) == pytest.approx(1)


@pytest.mark.parametrize("name", [n for n in ISA_TABLE if n.startswith("x86")])
def test_peaks_are_in_the_order_of_the_instructions(name: str) -> None:
    from qcompiler.targets.kernels.peak import measured_peak

    isa = ISA_TABLE[name]
    if not runnable(isa):
        with pytest.raises(TargetError, match=f"the peak of {name} cannot be measured"):
            measured_peak(isa)
        return
    integer, floating = measured_peak(isa), measured_peak(isa, "float32")
    # Twice the products per instruction at least; a clock between 0.5 and 8 GHz on 1 to 4 ports.
    assert integer.gmacs > 1.4 * floating.gmacs
    assert 0.5 * isa.lanes() < floating.gmacs < 4 * 8 * isa.lanes()


def test_the_peak_of_another_architecture_cannot_be_measured() -> None:
    from qcompiler.targets.kernels.peak import measured_peak

    with pytest.raises(TargetError, match="the peak of arm-neon cannot be measured on this"):
        measured_peak(ISA_TABLE["arm-neon"])


RUNNERS = {
    "qcompiler": {"median_ms": 1.0, "peak_memory_mb": 60.0},
    "onnxruntime": {"median_ms": 2.0, "peak_memory_mb": None},
    "openvino-int8": {"problem": "not installed"},
    "tvm": {"median_ms": 500.0},
}


def test_panels_hold_what_was_measured() -> None:
    panel = runners_panel("net", RUNNERS)
    assert [bar.label for bar in panel.bars] == ["qcompiler", "onnxruntime", "tvm"]
    assert panel.bars[0].text == "1.00 ms, 60 MB"
    layer = Layer("first", ("qconv",), "w8a8", ("k",), 1e-3, 50_000_000)
    other = Layer("other", ("add",), "w8a8", ("k",), 3e-3)
    parts = Breakdown((layer, other), 1, {"int8": ("vpdpbusd", 100.0)})
    bars = layers_panel(parts.to_json(), 2).bars
    assert [bar.label for bar in bars] == ["other", "first"]
    assert bars[1].text == "25% of the time, 50 GMAC/s (50% of peak)"


@pytest.mark.parametrize("ending", bench_chart.FORMATS)
def test_charts_are_drawn(tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"chart{ending}"
    draw(path, "all", [runners_panel("net", RUNNERS), Panel("empty", "ms")])
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)


def test_a_bar_far_beyond_the_others_is_cut(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.svg"
    draw(path, "all", [runners_panel("net", RUNNERS)])
    assert "→ 500. ms" in path.read_text()


def test_charts_that_cannot_be_drawn_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"chart x.gif: the file must end in .png, .svg, .pdf"):
        bench_chart.check(Path("x.gif"))
    monkeypatch.setattr(bench_chart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="a chart needs matplotlib, which is not installed"):
        bench_chart.check(tmp_path / "x.png")
