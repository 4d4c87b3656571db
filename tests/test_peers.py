# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompiler import peers
from qcompiler.errors import QCompilerError, UsageError
from qcompiler.side_by_side import measure

pytestmark = pytest.mark.timed

MODELS = Path(__file__).resolve().parent.parent / "models" / "digits_cnn"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    path = tmp_path / "inputs.npz"
    np.savez(path, input=np.zeros((1, 1, 8, 8), np.float32))
    return path


def test_expand_gives_each_runner_once() -> None:
    assert peers.expand("") == ()
    assert peers.expand("onnxruntime") == ("onnxruntime", "onnxruntime-int8")
    assert peers.expand("onnxruntime-int8, onnxruntime,tvm") == (
        "onnxruntime-int8",
        "onnxruntime",
        "tvm",
    )


def test_expand_refuses_unknown_names() -> None:
    with pytest.raises(UsageError, match="unknown peer 'tensorrt': known are onnxruntime, openv"):
        peers.expand("onnxruntime,tensorrt")


def test_onnxruntime_float_and_int8_run_the_bundled_model(tmp_path: Path, inputs: Path) -> None:
    names = peers.expand("onnxruntime")
    runners = [
        peers.peer_runner(name, MODELS / "model.onnx", inputs, 1, tmp_path, MODELS / "calib.npz")
        for name in names
    ]
    found = measure(runners, runs=5)
    for name in names:
        assert found[name].problem == ""
        assert found[name].timing is not None
    assert "per channel, 7-bit weights" in found["onnxruntime-int8"].note
    assert "random" not in found["onnxruntime-int8"].note
    assert (tmp_path / "QDQ.onnx").exists()
    assert (tmp_path / "QOperator.onnx").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed"
)
def test_openvino_float_and_int8_run_the_bundled_model(tmp_path: Path, inputs: Path) -> None:
    names = peers.expand("openvino")
    runners = [
        peers.peer_runner(name, MODELS / "model.onnx", inputs, 1, tmp_path, None) for name in names
    ]
    found = measure(runners, runs=5)
    assert [found[name].problem for name in names] == ["", ""]


def test_peers_multiply_by_weights_of_7_bits(tmp_path: Path, inputs: Path) -> None:
    """With 8 bits the peers' kernels saturate where there is no VNNI: other work, and wrong."""
    found = peers._qdq_model(str(MODELS / "model.onnx"), str(inputs), str(tmp_path), None)
    graph = onnx.load(found["path"]).graph
    codes = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(codes) >= 4
    assert all(np.abs(w.astype(int)).max() <= 64 for w in codes)
    assert any(np.abs(w.astype(int)).max() >= 63 for w in codes)


def test_what_is_apart_reports_its_problem(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, other=np.zeros((1, 1, 8, 8), np.float32))
    arguments = (str(MODELS / "model.onnx"), str(path), str(tmp_path), None)
    with pytest.raises(QCompilerError, match="the artifact has no input input"):
        peers.apart("qcompiler.peers:_tvm_library", *arguments)
    with pytest.raises(QCompilerError, match="preparing the peer failed, status 1: AttributeErr"):
        peers.apart("qcompiler.peers:there_is_no_such")


def test_plain_tvm_runs_the_bundled_model(tmp_path: Path, inputs: Path) -> None:
    runner = peers.peer_runner("tvm", MODELS / "model.onnx", inputs, 1, tmp_path, None)
    found = measure([runner], runs=2)["tvm"]
    assert found.problem == ""
    assert "float32, default pipeline, untuned" in found.note


def test_a_missing_peer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QCompilerError, match="openvino is not installed"):
        peers.openvino_int8("m", "i", 1, "f", None)


def test_a_peer_with_other_inputs_says_so(tmp_path: Path) -> None:
    path = tmp_path / "inputs.npz"
    np.savez(path, other=np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(QCompilerError, match="the artifact has no input input"):
        peers.onnxruntime_float(str(MODELS / "model.onnx"), str(path), 1)


def test_calibration_batches_have_the_compiled_size(tmp_path: Path) -> None:
    path = tmp_path / "calibration.npz"
    np.savez(path, x=np.arange(5 * 3).reshape(5, 3), h=np.arange(5 * 2 * 4).reshape(5, 2, 4))
    feeds = {"x": np.zeros((2, 3)), "h": np.zeros((2, 4))}
    batches = list(peers._batches(feeds, str(path)))
    assert len(batches) == 2  # the fifth sample is half a batch
    assert batches[1]["x"].tolist() == [[6, 7, 8], [9, 10, 11]]
    assert batches[1]["h"].tolist() == np.arange(8, 16).reshape(2, 4).tolist()
