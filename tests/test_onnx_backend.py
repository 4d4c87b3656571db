# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX's backend tests: a sample always, and all of them (slow) against the committed table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_backend
import pytest

TABLE = Path(__file__).resolve().parent / "onnx_backend_table.txt"

SAMPLE = {
    "test_nllloss_NC": "pass",  # ONNX defines it as a function of its operands' types
    "test_swiglu": "pass",
    "test_rotary_embedding": "pass",
    "test_spacetodepth_crd_mode_example": "pass",
    "test_qlinearmatmul_2D_uint8_float32": "pass",  # scales computed at run time
    "test_cast_FLOAT_to_INT4": "pass",  # 4 bits, from -8 to 7, of values from -9 to 15
    "test_nonzero_example": "refused",
    "test_sequence_insert_at_back": "excluded",
}


def recorded() -> dict[str, str]:
    """Return name -> status of the table's lines."""
    rows = [r for r in TABLE.read_text().splitlines() if r and not r.startswith("#")]
    return {r.split()[1].rstrip(":"): r.split()[0] for r in rows}


@pytest.fixture(scope="module")
def worker() -> Iterator[onnx_backend.Worker]:
    held = onnx_backend.Worker(onnx_backend.load_cases())
    yield held
    held.close()


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(worker: onnx_backend.Worker, name: str) -> None:
    outcome = worker.run(name)
    assert outcome.status == SAMPLE[name], outcome.reason


def test_shares() -> None:
    """The table holds what is promised: three quarters pass, none crashes or hangs."""
    statuses = list(recorded().values())
    counted = len(statuses) - statuses.count("excluded")
    assert statuses.count("pass") >= 0.75 * counted
    assert not {"crash", "hang"} & set(statuses)


@pytest.mark.slow
def test_all(worker: onnx_backend.Worker) -> None:
    """No case falls behind its line of the table."""
    if not onnx.__version__.startswith("1.23"):
        pytest.skip("the table is that of another onnx")
    worse = {}
    for name, status in recorded().items():
        outcome = worker.run(name)
        if status in ("pass", "refused") and outcome.status not in ("pass", status):
            worse[name] = outcome
    assert not worse


def test_a_dying_process_is_a_crash(worker: onnx_backend.Worker) -> None:
    """A case that kills its process is reported, and the next one runs."""
    held = onnx_backend.Worker({"dies": None, "test_abs": worker.cases["test_abs"]})
    held.process.kill()
    assert held.run("dies").status == "crash"
    assert held.run("test_abs").status == "pass"
    held.close()
