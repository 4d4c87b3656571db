# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime as ort
import pytest

STORED = ["digits_cnn", "digits_hybrid"]
MEGABYTE = 1_000_000


@pytest.mark.parametrize("name", STORED)
def test_stored_score_reproduces(catalogue: ModuleType, name: str) -> None:
    entry = catalogue.stored(name)
    samples = dict(np.load(entry.evaluation))
    label = samples.pop("label")
    session = ort.InferenceSession(str(entry.path), providers=["CPUExecutionProvider"])
    logits = session.run(None, samples)[0]
    score = float(np.mean(logits.argmax(axis=1) == label))
    # One sample of slack: a near tie may fall the other way with other float kernels.
    assert abs(score - entry.float_score) <= 1.01 / len(label)
    assert score >= (0.98 if name == "digits_cnn" else 0.95)


@pytest.mark.parametrize("name", STORED)
def test_stored_files_agree_with_the_entry(catalogue: ModuleType, name: str) -> None:
    entry = catalogue.stored(name)
    model = onnx.load(entry.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    assert any(node.op_type == "BatchNormalization" for node in model.graph.node)
    shapes = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    assert shapes == {item.name: item.shape for item in entry.inputs}
    calibration, evaluation = np.load(entry.calibration), np.load(entry.evaluation)
    assert set(calibration.files) == set(shapes)
    assert set(evaluation.files) == {*shapes, "label"}
    for item in entry.inputs:
        assert calibration[item.name].shape == (256, *item.shape[1:])
        assert evaluation[item.name].shape == (600, *item.shape[1:])
        assert calibration[item.name].dtype == evaluation[item.name].dtype == np.float32
        assert 0 <= calibration[item.name].min() < calibration[item.name].max() <= 1
    files = (entry.path, entry.calibration, entry.evaluation)
    assert sum(file.stat().st_size for file in files) < 1.5 * MEGABYTE


def test_calibration_and_evaluation_digits_are_disjoint(catalogue: ModuleType) -> None:
    digits: dict[str, set[bytes]] = {"calibration": set(), "evaluation": set()}
    for name in STORED:
        entry = catalogue.stored(name)
        for split, seen in digits.items():
            data = np.load(getattr(entry, split))
            for item in entry.inputs:
                seen.update(row.tobytes() for row in data[item.name])
    assert len(digits["evaluation"]) == 600
    assert not digits["calibration"] & digits["evaluation"]


def test_every_built_entry_has_its_inputs(catalogue: ModuleType) -> None:
    small = {"encoder": {"layers": 1}, "encoder_ids": {"layers": 1, "vocab": 50}}
    for entry in catalogue.BUILT:
        if entry.name == "resnet50":
            continue  # seconds; the same code as resnet18 but for the block
        model = entry.build(**small.get(entry.name, {}))
        shapes = {
            value.name: tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
            for value in model.graph.input
        }
        assert shapes == {item.name: item.shape for item in entry.inputs}


def test_names_are_unique(catalogue: ModuleType) -> None:
    names = [entry.name for entry in (*catalogue.STORED, *catalogue.BUILT)]
    names.extend(catalogue.EXTERNAL)
    assert len(set(names)) == len(names)


def test_unknown_names_are_rejected(catalogue: ModuleType) -> None:
    with pytest.raises(KeyError, match="no model named 'nothing'; known: digits_cnn"):
        catalogue.stored("nothing")
    with pytest.raises(KeyError, match="no model named 'digits_cnn'; known: resnet50"):
        catalogue.built("digits_cnn")
    with pytest.raises(KeyError, match="no external model named 'nothing'"):
        catalogue.external("nothing")


def test_absent_external_folder_gives_a_reason(
    catalogue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPILER_MODELS", str(tmp_path))
    assert catalogue.external_root() is None
    assert catalogue.external("mnist") is None
    assert "QCOMPILER_MODELS" in catalogue.skip_reason("mnist")


def test_missing_external_file_gives_a_reason(
    catalogue: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'MODELS = {"mnist": ("mnist.onnx", None, "top1", 0.9)}\n'
    (tmp_path / "prepare.py").write_text(script)
    monkeypatch.setenv("QCOMPILER_MODELS", str(tmp_path))
    assert catalogue.external("mnist") is None
    assert catalogue.skip_reason("mnist") == f"mnist: {tmp_path / 'mnist.onnx'} is missing"


@pytest.mark.parametrize("name", ["mnist", "resnet20", "kws_dscnn"])
def test_external_model_scores_as_published(catalogue: ModuleType, name: str) -> None:
    model = catalogue.external(name, calib=8, eval=200)
    if model is None:
        pytest.skip(catalogue.skip_reason(name))
    assert all(len(array) == 8 for array in model.calibration.values())
    samples = dict(model.evaluation)
    label = samples.pop("label")
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    if isinstance(session.get_inputs()[0].shape[0], int):
        logits = np.concatenate(
            [
                session.run(None, {key: value[i : i + 1] for key, value in samples.items()})[0]
                for i in range(len(label))
            ]
        )
    else:
        logits = session.run(None, samples)[0]
    assert model.metric == "top1"
    # Four standard errors of a share of 200 samples.
    assert np.mean(logits.argmax(axis=1) == label) == pytest.approx(model.float_score, abs=0.12)


def test_external_minilm_metric(catalogue: ModuleType) -> None:
    model = catalogue.external("minilm", calib=2, eval=60)
    if model is None:
        pytest.skip(catalogue.skip_reason("minilm"))
    module, function = model.metric.split(":")
    metric = getattr(importlib.import_module(module), function)
    samples = {key: value for key, value in model.evaluation.items() if key != "score"}
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    outputs = {"sentence_embedding": session.run(["sentence_embedding"], samples)[0]}
    assert metric(outputs, model.evaluation) == pytest.approx(model.float_score, abs=0.15)


def test_external_silero_is_one_sequence(catalogue: ModuleType) -> None:
    model = catalogue.external("silero_vad", calib=64, eval=64)
    if model is None:
        pytest.skip(catalogue.skip_reason("silero_vad"))
    shapes = {key: value.shape for key, value in model.evaluation.items()}
    assert shapes == {
        "frames": (1, 64, 576),
        "score": (1, 64),
        "h0": (1, 1, 1, 128),
        "c0": (1, 1, 1, 128),
    }
    module, function = model.metric.split(":")
    metric = getattr(importlib.import_module(module), function)
    session = ort.InferenceSession(str(model.path), providers=["CPUExecutionProvider"])
    feed = {key: model.evaluation[key][0] for key in ("frames", "h0", "c0")}
    assert metric({"prob": session.run(["prob"], feed)[0]}, model.evaluation) == 1.0


def test_spearman_ranks_pairs(catalogue: ModuleType) -> None:
    assert catalogue.external_root is not None  # the catalogue makes model_metrics importable
    metric = importlib.import_module("model_metrics").pair_cosine_spearman
    angle = np.array([0.1, 0.5, 1.0, 1.5])
    first = np.tile([[2.0, 0.0]], (4, 1))
    second = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    outputs = {"sentence_embedding": np.concatenate([first, second]).astype(np.float32)}
    assert metric(outputs, {"score": np.array([5, 4, 2, 1])}) == pytest.approx(1.0)
    assert metric(outputs, {"score": np.array([1, 2, 4, 5])}) == pytest.approx(-1.0)
