# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What is promised for recurrent models, on a voice detector and a minute of speech.

Slow. The model is not part of the project: the tests skip, saying so, where it is absent.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from outside_models import FOLDER

import qcompiler
from qcompiler.runtime import CompiledModel
from qcompiler.types import Array

MODEL = FOLDER / "silero_vad" / "silero_vad_16k_seq.onnx"
SAMPLES = FOLDER / "silero_vad" / "vad_test.npz"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(not SAMPLES.is_file(), reason=f"{SAMPLES} is missing"),
]
STATE = np.zeros((1, 1, 128), np.float32)
CALIBRATION = 128


@pytest.fixture(scope="module")
def speech() -> tuple[Array, Array]:
    """Frames [1875, 576] of one sequence, and the probabilities of the official model."""
    with np.load(SAMPLES) as z:
        pcm, score = z["pcm16"].astype(np.float32) / 32768, z["ref_prob"]
    padded = np.concatenate([np.zeros(64, np.float32), pcm])
    return np.stack([padded[512 * i : 512 * i + 576] for i in range(len(score))]), score


def compiled(
    frames: Array, precision: str, target: str = "host", samples: Array | None = None
) -> CompiledModel:
    """Compile for the sequence, calibrated with its first frames or with other samples."""
    taken = frames[:CALIBRATION] if samples is None else samples
    calibration = {"frames": taken, "h0": STATE, "c0": STATE}
    return qcompiler.compile(
        str(MODEL),
        target=target,
        precision=precision,
        calibration=None if precision == "fp32" else calibration,
        input_shapes={"frames": frames.shape},
    )


def probabilities(model: CompiledModel, frames: Array) -> Array:
    found = model({"frames": frames, "h0": STATE, "c0": STATE})
    return found["prob"][:, 0]


def test_float_agrees_with_the_official_model(speech: tuple[Array, Array]) -> None:
    frames, score = speech
    np.testing.assert_allclose(probabilities(compiled(frames, "fp32"), frames), score, atol=2e-5)


@pytest.mark.parametrize("steps", [500, 1875])
@pytest.mark.parametrize("calibration", ["64", "first", "tiled", "500", "all"])
def test_w8a8_decides_like_float(speech: tuple[Array, Array], calibration: str, steps: int) -> None:
    """Whatever it is calibrated with; 99 % is promised."""
    frames, score = speech
    first = frames[:CALIBRATION]
    samples = {
        "64": frames[:64],
        "first": first,
        "tiled": np.resize(first, (steps, *first.shape[1:])),
        "500": frames[:500],
        "all": frames,
    }[calibration]
    model = compiled(frames[:steps], "w8a8", samples=samples)
    found = probabilities(model, frames[:steps])
    assert np.mean((found > 0.5) == (score[:steps] > 0.5)) >= 0.993
    assert model.report is not None
    assert "qlstm" in {op for node in model.report["nodes"] for op in node["ops"]}
    plan = model.report["precision"]
    floats = {n for n, d in plan.items() if "alone in 8 bits" in d["reason"]}
    assert floats == {"/stft/Conv", "/c.0/Conv"}
    for name in ("/c.1/Conv", "/c.2/Conv", "/c.3/Conv", "/l/LSTM/matmul", "/f/Gemm"):
        assert plan[name]["precision"] == "w8a8"


def test_states_carry_a_sequence_from_call_to_call(speech: tuple[Array, Array]) -> None:
    """A stream in pieces gives what the whole sequence gives, but for the 8-bit hidden state."""
    frames, _ = speech
    piece = compiled(frames[:125], "fp32")
    h, c, parts = STATE, STATE, []
    for k in range(3):
        found = piece({"frames": frames[125 * k : 125 * (k + 1)], "h0": h, "c0": c})
        parts.append(found["prob"][:, 0])
        h, c = found["hn"], found["cn"]
    whole = probabilities(compiled(frames[:375], "fp32"), frames[:375])
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-5)


@pytest.mark.timed
def test_w8a8_is_faster_than_float_onnx_runtime(speech: tuple[Array, Array]) -> None:
    """One core, interleaved; the promise is 1.5 times."""
    ort = pytest.importorskip("onnxruntime")
    frames, _ = speech
    frames = frames[:500]
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    feeds = {"frames": frames, "h0": STATE, "c0": STATE}
    model = compiled(frames, "w8a8")
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    calls = {"ours": lambda: model(feeds), "theirs": lambda: session.run(None, feeds)}
    for k in range(12):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if k >= 2:
                seconds[name].append(time.perf_counter() - start)
    ratio = np.median(seconds["theirs"]) / np.median(seconds["ours"])
    assert ratio >= 1.5
