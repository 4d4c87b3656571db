# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the importer refuses, and how: damaged files, invalid models, external data elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_onnx_import import W, X, chain, ints, make_model, uniform

from qcompiler.errors import ModelError, QCompilerError, ShapeError, UnsupportedOpError
from qcompiler.onnx_import import load_onnx, model_digest, read_model
from qcompiler.types import Array

# ------------------------------------------------------------------------------------- refusals


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    whole = chain().SerializeToString()
    files: dict[str, tuple[bytes | None, str]] = {
        "none.onnx": (None, "there is no file"),
        "empty.onnx": (b"", "is empty"),
        "text.onnx": (b"import torch\nprint('hello')\n" * 20, "not an ONNX model"),
        "random.onnx": (rng.bytes(4096), "not an ONNX model"),
        "cut.onnx": (whole[: len(whole) // 2], "truncated or damaged"),
        "lfs.onnx": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    }
    for name, (data, message) in files.items():
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ModelError, match=message):
            load_onnx(path)
    with pytest.raises(ModelError, match="is a directory"):
        load_onnx(tmp_path)


def test_damaged_files_never_end_in_a_foreign_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    whole = chain().SerializeToString()
    path = tmp_path / "m.onnx"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(int(rng.integers(1, 6))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(bytes(data[: int(rng.integers(1, len(data) + 1))]))
        try:
            load_onnx(path).verify()
        except QCompilerError as error:
            assert str(error)  # noqa: PT017  (most of the files are refused, some are harmless)


def broken(change: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    model = chain()
    change(model)
    return model


def _cycle(m: onnx.ModelProto) -> None:
    m.graph.node[0].input[0] = "y"


def _short_data(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].raw_data = m.graph.initializer[0].raw_data[:-4]


def _huge(m: onnx.ModelProto) -> None:
    m.graph.initializer[0].dims[0] = 1 << 40


def _strange(m: onnx.ModelProto) -> None:
    m.graph.node[1].attribute.append(helper.make_attribute("a", 1))


def _same_name(m: onnx.ModelProto) -> None:
    m.graph.initializer.append(m.graph.initializer[0])


def _twice(m: onnx.ModelProto) -> None:
    m.graph.node[1].output[0] = "c"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.ClearField("graph"), "holds no graph"),
        (lambda m: m.graph.ClearField("output"), "has no outputs"),
        (lambda m: m.ClearField("opset_import"), "names no opset"),
        (lambda m: setattr(m.opset_import[0], "version", 0), "opset 0; opsets 7 to 28"),
        (lambda m: setattr(m.opset_import[0], "version", 99), "opset 99; opsets 7 to 28"),
        (lambda m: setattr(m.graph.node[0], "domain", "a.b"), "domain a.b without naming an opset"),
        (_cycle, r"cycle through .*\(Conv\)|cycle through .*Relu"),
        (_twice, "'c', computed by .*Relu.*, is already defined"),
        (lambda m: m.graph.initializer.pop(), "reads 'w', which nothing defines"),
        (_same_name, "two initializers are named 'w'"),
        (lambda m: m.graph.output.append(m.graph.output[0]), "two outputs are named 'y'"),
        (lambda m: setattr(m.graph.output[0], "name", "q"), "nothing computes the output 'q'"),
        (lambda m: m.graph.node[0].input.pop(), "has input size 1 not in range"),
        (_strange, "Unrecognized attribute: a"),
        (_short_data, "holds 860 bytes, its shape .* needs 864"),
        (_huge, "at most 2147483647 are supported"),
    ],
)  # fmt: skip
def test_invalid_models_are_refused(
    change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load_onnx(broken(change))


def test_all_unsupported_operators_are_named_at_once() -> None:
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], name="one"),
        helper.make_node("NonZero", ["x"], ["b"], name="two"),
        helper.make_node("RandomNormalLike", ["x"], ["c"], name="three"),
        helper.make_node("Grumble", ["a"], ["d"], name="four"),
        helper.make_node("Relu", ["d"], ["e"], name="five"),
    ]
    with pytest.raises(UnsupportedOpError) as caught:
        load_onnx(make_model(nodes, {"x": X}, ["b", "c", "e"]))
    assert caught.value.operators == ("Frobnicate", "Grumble", "NonZero", "RandomNormalLike")
    text = str(caught.value)
    assert "Frobnicate ('one'): no operator of that name is known in opset 17" in text
    assert "NonZero ('two'): the shape of its result 0 is not known at compile time" in text
    assert "RandomNormalLike ('three'): its result is random" in text


def test_tensors_that_are_no_numbers_are_refused() -> None:
    model = make_model(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": (TensorProto.STRING, [2]), "z": (TensorProto.FLOAT8E4M3FN, [2])},
        ["y"],
    )
    with pytest.raises(UnsupportedOpError) as caught:
        load_onnx(model)
    assert "element type string" in str(caught.value)
    assert "element type float8e4m3fn" in str(caught.value)


@pytest.mark.parametrize(
    ("op", "constants", "attrs", "message"),
    [
        (
            "Reshape",
            {"b": ints(11, -1)},
            {},
            r"cannot reshape \[2, 6, 7, 5\] to \[11, -1\]",
        ),
        ("Reshape", {"b": ints(8, 8)}, {}, r"cannot reshape .* \(420 elements\) to \[8, 8\]"),
        ("Add", {"b": uniform(4)}, {}, "do not broadcast"),
        ("MatMul", {"b": uniform(4, 4)}, {}, "inner extents 5 and 4 differ"),
        ("Conv", {"b": uniform(4, 5, 3, 3)}, {}, "'x' has 6 channels, 'w' expects 5"),
        ("Conv", {"b": W}, {"kernel_shape": [2, 2]}, "differs from the weight's"),
        ("Conv", {"b": uniform(4, 6, 9, 9)}, {}, "does not fit the extents"),
        ("Concat", {"b": uniform(2, 6, 7, 4)}, {"axis": 1}, "expected .* but for axis 1"),
        ("Expand", {"b": ints(3, 1)}, {}, r"cannot expand \[2, 6, 7, 5\] to \[3, 1\]"),
        ("Gather", {"b": np.asarray(9)}, {"axis": 1}, "index 9 is outside axis 1"),
        ("Softmax", {}, {"axis": 4}, "axis 4 is outside a tensor of rank 4"),
        ("Transpose", {}, {"perm": [0, 1, 1, 2]}, "no permutation"),
        ("Squeeze", {"b": ints(1)}, {}, "cannot squeeze"),
    ],
)
def test_shapes_that_do_not_fit_name_the_node(
    op: str, constants: dict[str, Array], attrs: dict[str, Any], message: str
) -> None:
    node = helper.make_node(op, ["x", *constants], ["y"], name="here", **attrs)
    with pytest.raises(ShapeError, match=message) as caught:
        load_onnx(make_model([node], {"x": X}, ["y"], constants))
    assert "node 'here'" in str(caught.value)
    assert caught.value.node == "here"


def test_steering_operands_must_be_constant() -> None:
    node = helper.make_node("Reshape", ["x", "s"], ["y"], name="here")
    model = make_model([node], {"x": X, "s": ints(2, -1)}, ["y"])
    with pytest.raises(
        UnsupportedOpError, match=r"Reshape \('here'\): its shape is computed at run"
    ):
        load_onnx(model)


# -------------------------------------------------------------------------------- external data


def external(tmp_path: Path, **entries: str) -> Path:
    model = chain()
    weight = model.graph.initializer[0]
    (tmp_path / "weights.bin").write_bytes(b"\0" * 16 + weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    known = {"location": "weights.bin", "offset": "16", "length": "864"}
    for key, value in {**known, **entries}.items():
        weight.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_is_read(tmp_path: Path) -> None:
    graph = load_onnx(external(tmp_path))
    np.testing.assert_array_equal(graph.nodes[0].input(1).array(), W)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"location": "../weights.bin"}, "not inside the model's folder"),
        ({"location": "/etc/passwd"}, "not inside the model's folder"),
        ({"location": ""}, "not inside the model's folder"),
        ({"location": "other.bin"}, "'other.bin', which is missing"),
        ({"offset": "17"}, "does not fit the file"),
        ({"offset": "-1"}, "does not fit the file"),
        ({"length": "860"}, "the 864 bytes that the tensor needs"),
        ({"offset": "x"}, "is not a number"),
    ],
)
def test_external_data_is_confined(tmp_path: Path, entries: dict[str, str], message: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    with pytest.raises(ModelError, match=message):
        load_onnx(external(inside, **entries))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = external(inside)
    (inside / "weights.bin").rename(tmp_path / "outside.bin")
    (inside / "weights.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ModelError, match="not inside the model's folder"):
        load_onnx(path)


def test_a_model_in_memory_has_no_external_data(tmp_path: Path) -> None:
    model = onnx.ModelProto.FromString(external(tmp_path).read_bytes())
    with pytest.raises(ModelError, match=r"give the path of the \.onnx file instead"):
        load_onnx(model)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(chain().SerializeToString())
    source = read_model(path)
    assert source.digest == hashlib.sha256(path.read_bytes()).hexdigest() == model_digest(path)
    assert load_onnx(source).outputs[0][0] == "y"
