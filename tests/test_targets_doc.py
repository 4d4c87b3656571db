# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""docs/targets.md: the target it shows works from another distribution; its table is complete."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qcompiler
from qcompiler.cpu import host_cpu, missing_features
from qcompiler.errors import QCompilerError, UnknownTargetError, UnsupportedByTargetError
from qcompiler.linker import find_linker
from qcompiler.registry import get_target
from qcompiler.targets.arm import make
from qcompiler.targets.isa import ISA_TABLE, isa_named

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/targets.md").read_text(encoding="utf-8")
DIGITS = ROOT / "models/digits_cnn"

PROGRAM = """
import numpy as np, qcompiler
from qcompiler.registry import target_names
assert "acme-ssse3" in target_names()
folder = {folder!r}
options = dict(calibration=folder + "/calib.npz")
model = qcompiler.compile(folder + "/model.onnx", target="acme-ssse3", **options)
want = qcompiler.compile(folder + "/model.onnx", target="reference", **options)
assert model.target.mcpu == "core2" and model.target.cpu_features == ("sse2", "ssse3")
x = np.load(folder + "/eval.npz")["input"][:40]
(a,), (b,) = model(x).values(), want(x).values()
assert (a == b).all()
print("equal", len(x), not any(k["kernel"] == "interpreter" for k in model.report["nodes"]))
"""


@pytest.mark.skipif(bool(missing_features(("ssse3",))), reason="the CPU lacks ssse3")
def test_the_target_of_the_page_compiles_and_is_exact(tmp_path: Path) -> None:
    code = re.search(r'^```python\n("""acme_target\.py""".*?)^```$', TEXT, re.DOTALL | re.MULTILINE)
    points = re.search(r"^```toml\n\[project\.(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    assert code is not None
    assert points is not None
    (tmp_path / "acme_target.py").write_text(code.group(1))
    info = tmp_path / "acme_target-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-target\nVersion: 1.0\n")
    entry = points.group(1).replace('entry-points."qcompiler.targets"', "qcompiler.targets")
    (info / "entry_points.txt").write_text("[" + entry.replace('"', ""))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(folder=str(DIGITS))],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["equal", "40", "True"], done.stderr


def _cannot_build() -> str:
    if host_cpu().architecture == "aarch64":
        return "this machine runs it"
    try:
        find_linker("aarch64-unknown-linux-gnu")
    except QCompilerError as error:
        return error.message
    return ""


@pytest.mark.skipif(bool(_cannot_build()), reason=_cannot_build() or "builds")
def test_a_model_for_another_machine_is_scored_and_not_timed() -> None:
    samples = dict(np.load(DIGITS / "eval.npz"))
    model = qcompiler.compile(
        DIGITS / "model.onnx",
        target="arm-dotprod:neoverse-n1",
        calibration=DIGITS / "calib.npz",
        evaluate=qcompiler.Evaluation({k: v[:50] for k, v in samples.items()}, metric="top1"),
    )
    assert model.target.architecture == "aarch64"
    assert model.target.mcpu == "neoverse-n1"
    assert model.report is not None
    assert model.report["latency_ms"]["compiled"] is None
    assert model.report["metric"]["compiled"] > 0.9
    assert any(
        "(aarch64), this machine is" in note and "accuracy is the interpreter's" in note
        for note in model.report["notes"]
    )
    with pytest.raises(UnsupportedByTargetError, match=r"compiled for arm-dotprod \(aarch64\)"):
        model(model.random_inputs())


def test_the_table_has_every_row() -> None:
    for name in ISA_TABLE:
        assert f"| `{name}` |" in TEXT


def test_a_processor_may_follow_the_target() -> None:
    chosen = get_target("arm-dotprod:neoverse-n1")
    assert chosen.spec.name == "arm-dotprod"
    assert chosen.spec.mcpu == "neoverse-n1"
    assert get_target(chosen.spec).spec == chosen.spec
    assert get_target(get_target("arm-neon").spec).spec == get_target("arm-neon").spec
    with pytest.raises(UnknownTargetError, match=r"'cortex-a72': known are .*neoverse-n1"):
        get_target("arm-dotprod:cortex-a72")
    with pytest.raises(UnknownTargetError, match=r"reference .* 'fast': it offers none"):
        get_target("reference:fast")
    with pytest.raises(UnknownTargetError, match="no row of these is named 'arm-sve'"):
        make("arm-sve")
    assert isa_named("arm-dotprod").mcpu == "cortex-a76"
