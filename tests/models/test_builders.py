# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

SMALL = [
    pytest.param("resnet50", {"size": 64}, marks=pytest.mark.slow),
    pytest.param("resnet18", {"size": 64}, marks=pytest.mark.slow),
    ("mobilenet_v2", {"size": 64, "width": 0.5}),
    ("mobilenet_v3_small", {"size": 64}),
    ("vgg_small", {"width": 16}),
    ("encoder", {"layers": 2, "width": 96, "heads": 4, "ffn": 192, "tokens": 32}),
    (
        "encoder",
        {"layers": 1, "width": 64, "heads": 2, "ffn": 96, "tokens": 16, "vocab": 50, "mask": True},
    ),
]


def feed_of(model: onnx.ModelProto, batch: int = 2) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)
    feed: dict[str, np.ndarray[Any, Any]] = {}
    for value in model.graph.input:
        dims = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            feed[value.name] = rng.standard_normal(dims).astype(np.float32)
        elif value.name == "attention_mask":
            feed[value.name] = np.ones(dims, np.int64)
        else:
            feed[value.name] = rng.integers(0, 50, dims)
    return feed


def run(model: onnx.ModelProto, feed: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: list[np.ndarray[Any, Any]] = session.run(None, feed)
    return result


def conv_multiplies(model: onnx.ModelProto) -> int:
    """Multiplications of the convolutions and Gemms, by ONNX shape inference."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name: v for v in [*graph.value_info, *graph.output]}
    weights = {t.name: list(t.dims) for t in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            dims = values[node.output[0]].type.tensor_type.shape.dim
            positions = math.prod(d.dim_value for d in dims[2:])
            total += math.prod(weights[node.input[1]]) * positions
    return total


@pytest.mark.parametrize(("name", "arguments"), SMALL)
def test_valid_and_well_scaled(builders: ModuleType, name: str, arguments: dict[str, Any]) -> None:
    model = builders.BUILDERS[name](batch="N", **arguments)
    onnx.checker.check_model(model, full_check=True)
    layers = [n.output[0] for n in model.graph.node if n.op_type in ("Conv", "Gemm", "Add")]
    layers = [name for name in layers if not name.startswith("embeddings")]
    known = {v.name for v in model.graph.output}
    feed = feed_of(model)
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)
        for n in layers
        if n not in known
    )
    outputs = run(model, feed)
    assert all(np.isfinite(value).all() for value in outputs)
    spreads = [float(value.std()) for value in outputs]
    assert min(spreads) > 0.1
    assert max(spreads) < 6


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small"])
def test_kept_batch_norm_computes_the_same(builders: ModuleType, name: str) -> None:
    folded = builders.BUILDERS[name](size=32, classes=10, seed=3)
    kept = builders.BUILDERS[name](size=32, classes=10, seed=3, keep_bn=True)
    assert not any(n.op_type == "BatchNormalization" for n in folded.graph.node)
    assert any(n.op_type == "BatchNormalization" for n in kept.graph.node)
    feed = feed_of(folded)
    np.testing.assert_allclose(run(kept, feed)[0], run(folded, feed)[0], rtol=1e-3, atol=1e-3)


def test_seed_decides_the_weights(builders: ModuleType) -> None:
    first, again, other = (
        builders.vgg_small(width=8, seed=seed).SerializeToString() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    ("name", "multiplies", "parameters"),
    [  # as torchvision states them
        pytest.param("resnet50", 4.09e9, 25.56e6, marks=pytest.mark.slow),
        pytest.param("resnet18", 1.814e9, 11.69e6, marks=pytest.mark.slow),
        ("mobilenet_v2", 0.301e9, 3.50e6),
        ("mobilenet_v3_small", 0.057e9, 2.54e6),
    ],
)
def test_full_size_matches_the_paper(
    builders: ModuleType, name: str, multiplies: float, parameters: float
) -> None:
    model = builders.BUILDERS[name]()
    count = sum(math.prod(tensor.dims) for tensor in model.graph.initializer)
    assert count == pytest.approx(parameters, rel=0.01)
    assert conv_multiplies(model) == pytest.approx(multiplies, rel=0.02)


def test_attention_mask_hides_tokens(builders: ModuleType) -> None:
    model = builders.encoder(
        layers=1, width=64, heads=2, ffn=96, tokens=16, vocab=50, mask=True, batch="N"
    )
    feed = feed_of(model)
    feed["attention_mask"][:, 8:] = 0
    before = run(model, feed)[0]
    feed["input_ids"][:, 8:] = (feed["input_ids"][:, 8:] + 1) % 50
    np.testing.assert_array_equal(run(model, feed)[0][:, :8], before[:, :8])


def test_encoder_writes_attention_as_pytorch_exports_it(builders: ModuleType) -> None:
    model = builders.encoder(layers=1, width=64, heads=2, ffn=96, tokens=16)
    perms = [
        list(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose"
    ]
    assert perms == [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3], [0, 2, 1, 3]]
    counts = {op: sum(n.op_type == op for n in model.graph.node) for op in ("Reshape", "MatMul")}
    assert counts == {"Reshape": 4, "MatMul": 8}


def test_command_line_writes_a_file(
    builders: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "vgg.onnx"
    builders.main(["vgg_small", "-o", str(path), "--width", "8", "--batch", "N", "--keep-bn"])
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert any(n.op_type == "BatchNormalization" for n in model.graph.node)
    assert f"wrote {path}" in capsys.readouterr().out


def test_command_line_rejects_an_unknown_name(builders: ModuleType) -> None:
    with pytest.raises(SystemExit) as stop:
        builders.main(["alexnet", "-o", "x.onnx"])
    assert stop.value.code == 2
