# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rarer operators, written in terms of common ones, against ONNX Runtime or numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompiler.errors import ModelError, UnsupportedOpError
from qcompiler.interpreter import run
from qcompiler.onnx_import import load_onnx
from qcompiler.ort import Session
from qcompiler.types import Array

ELEMENTS = {
    np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int8): TensorProto.INT8, np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64, np.dtype(np.bool_): TensorProto.BOOL,
}  # fmt: skip


def model_of(
    op: str,
    feeds: dict[str, Array],
    constants: dict[str, Any],
    names: list[str],
    opset: int = 18,
    **attributes: Any,
) -> onnx.ModelProto:
    """One node: its operands are inputs (`feeds`) or constants; its result is `y`."""
    graph = helper.make_graph(
        [helper.make_node(op, names, ["y"], op.lower(), **attributes)],
        "one",
        [
            helper.make_tensor_value_info(n, ELEMENTS[np.dtype(a.dtype)], a.shape)
            for n, a in feeds.items()
        ],
        [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def ours(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    return run(load_onnx(model), feeds)["y"]


def theirs(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    return Session(model.SerializeToString(), optimization="disabled").run(feeds)["y"]


def same(model: onnx.ModelProto, feeds: dict[str, Array], tolerance: float = 1e-5) -> None:
    want, got = theirs(model, feeds), ours(model, feeds)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
    ("inverse", "onesided", "length"),
    [(0, 0, None), (0, 0, 9), (0, 0, 5), (1, 0, None), (0, 1, None), (0, 1, 6)],
)
@pytest.mark.parametrize("axis", [1, -2])
def test_dft(
    rng: np.random.Generator, parts: int, inverse: int, onesided: int, length: int | None, axis: int
) -> None:
    if onesided and parts == 2:
        pytest.skip("one half says all for real numbers only")
    x = rng.standard_normal((2, 7, 3, parts)).astype(np.float32)
    constants = {"axis": np.int64(axis)} | ({} if length is None else {"n": np.int64(length)})
    names = ["x", "n" if length else "", "axis"]
    model = model_of("DFT", {"x": x}, constants, names, 20, inverse=inverse, onesided=onesided)
    numbers = x[..., 0] + 1j * (x[..., 1] if parts == 2 else 0)
    at = axis if axis > 0 else 2
    found = (np.fft.ifft if inverse else np.fft.fft)(numbers, length, axis=at)
    if onesided:
        found = np.take(found, np.arange(found.shape[at] // 2 + 1), at)
    want = np.stack([found.real, found.imag], -1)
    np.testing.assert_allclose(ours(model, {"x": x}), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("points", [8, 9])
def test_the_transform_back_of_one_half_is_real(rng: np.random.Generator, points: int) -> None:
    real = rng.standard_normal((2, points)).astype(np.float32)
    half = np.fft.rfft(real)
    x = np.stack([half.real, half.imag], -1).astype(np.float32)
    model = model_of(
        "DFT", {"x": x}, {"n": np.int64(points)}, ["x", "n"], 20, inverse=1, onesided=1
    )
    np.testing.assert_allclose(ours(model, {"x": x})[..., 0], real, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("windowed", ["constant", "input", "none"])
@pytest.mark.parametrize("onesided", [0, 1])
def test_stft(rng: np.random.Generator, windowed: str, onesided: int) -> None:
    feeds = {"x": rng.standard_normal((2, 40, 1)).astype(np.float32)}
    window = np.hanning(16).astype(np.float32)
    constants: dict[str, Any] = {"step": np.int64(6)}
    if windowed == "input":
        feeds["w"] = window
    else:
        constants["w"] = window if windowed == "constant" else np.ones(16, np.float32)
    constants["n"] = np.int64(16)
    model = model_of("STFT", feeds, constants, ["x", "step", "w", "n"], 17, onesided=onesided)
    same(model, feeds)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_cumprod(rng: np.random.Generator, exclusive: int, reverse: int, n: int) -> None:
    x = rng.uniform(0.5, 2, (3, n)).astype(np.float32)
    model = model_of(
        "CumProd", {"x": x}, {"axis": np.int64(1)}, ["x", "axis"], 26,
        exclusive=exclusive, reverse=reverse,
    )  # fmt: skip
    y = x[:, ::-1] if reverse else x
    if exclusive:
        y = np.concatenate([np.ones((3, 1), np.float32), y[:, :-1]], 1)
    want = np.cumprod(y, 1)
    want = want[:, ::-1] if reverse else want
    np.testing.assert_allclose(ours(model, {"x": x}), want, rtol=1e-5)


COL2IM = [
    ([5, 5], [2, 3], {}),
    ([5, 6], [2, 2], {"strides": [2, 3], "pads": [1, 0, 1, 1]}),
    ([7, 6], [2, 3], {"dilations": [2, 1]}),
    ([9], [3], {"strides": [2]}),
]


@pytest.mark.parametrize(("image", "block", "attributes"), COL2IM)
def test_col2im(
    rng: np.random.Generator, image: list[int], block: list[int], attributes: dict[str, Any]
) -> None:
    n = len(image)
    strides, dilations = (attributes.get(k, [1] * n) for k in ("strides", "dilations"))
    pads = attributes.get("pads", [0] * (2 * n))
    count = 1
    for i in range(n):
        reach = dilations[i] * (block[i] - 1) + 1
        count *= (image[i] + pads[i] + pads[n + i] - reach) // strides[i] + 1
    x = rng.standard_normal((2, 3 * int(np.prod(block)), count)).astype(np.float32)
    constants = {"i": np.asarray(image), "b": np.asarray(block)}
    model = model_of("Col2Im", {"x": x}, constants, ["x", "i", "b"], **attributes)
    same(model, {"x": x})


@pytest.mark.parametrize("k", [-1, 0, 2])
def test_eye_like(k: int) -> None:
    x = np.zeros((3, 5), np.float32)
    model = model_of("EyeLike", {"x": x}, {}, ["x"], k=k, dtype=TensorProto.INT32)
    model.graph.node.append(helper.make_node("Add", ["y", "c"], ["z"]))
    model.graph.initializer.append(numpy_helper.from_array(np.int32([1]), "c"))
    model.graph.output[0].name = "z"
    np.testing.assert_array_equal(run(load_onnx(model), {"x": x})["z"], np.eye(3, 5, k) + 1)


def test_powers_take_the_dtype_of_the_base(rng: np.random.Generator) -> None:
    bases = (
        rng.uniform(1, 3, 4).astype(np.float32),
        np.int32([3, -2, 5, 0]),
        np.int64([2, 7, -3, 1]),
    )
    for x in bases:
        for by in (np.float32([2, 3, 1, 0]), np.int32([2, 3, 1, 0]), np.int64([3, 0, 2, 5])):
            feeds = {"x": x, "by": by}
            same(model_of("Pow", feeds, {}, ["x", "by"]), feeds)


def test_a_fill_computed_at_run_time(rng: np.random.Generator) -> None:
    feeds = {"x": rng.standard_normal((2, 3)).astype(np.float32), "fill": np.float32([0.25])[0:]}
    feeds["fill"] = np.asarray(0.25, np.float32)
    pads = {"pads": np.asarray([1, 0, 0, 2])}
    same(model_of("Pad", feeds, pads, ["x", "pads", "fill"]), feeds)


def test_extremes_of_booleans() -> None:
    x = np.asarray([[True, False], [False, False], [True, True]])
    for op, want in (("ReduceMax", [1, 0, 1]), ("ReduceMin", [0, 0, 1])):
        model = model_of(op, {"x": x}, {"a": np.asarray([1])}, ["x", "a"], 20, keepdims=0)
        np.testing.assert_array_equal(ours(model, {"x": x}), np.asarray(want, bool))


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_corners_are_aligned_with_the_size_before_rounding(mode: str) -> None:
    """Source: ONNX Resize: the extent in the formula is scale * extent, no whole number here."""
    x = np.float32([[[[1, 2, 3, 4]]]])
    model = model_of(
        "Resize", {"x": x}, {"s": np.float32([1, 1, 1, 0.6])}, ["x", "", "s"],
        mode=mode, coordinate_transformation_mode="align_corners",
    )  # fmt: skip
    got = ours(model, {"x": x}).reshape(-1)
    assert got.shape == (2,)
    assert got[0] == 1
    if mode == "linear":
        np.testing.assert_allclose(got[1], 1 + 3 / (0.6 * 4 - 1), rtol=1e-6)


def test_the_former_scatter(rng: np.random.Generator) -> None:
    feeds = {"x": rng.standard_normal((1, 5)).astype(np.float32)}
    constants = {"i": np.asarray([[1, 3]]), "u": np.float32([[1.5, 2.5]])}
    model = model_of("Scatter", feeds, constants, ["x", "i", "u"], 10, axis=1)
    names = [n.op.name for n in load_onnx(model).nodes]
    assert names == ["opaque"]
    assert b"ScatterElements" in load_onnx(model).nodes[0].attr("node")


def test_refusals(rng: np.random.Generator) -> None:
    x = {"x": rng.standard_normal((2, 6, 3)).astype(np.float32)}
    with pytest.raises(ModelError, match="should hold 1 or 2 parts of a number"):
        load_onnx(model_of("DFT", x, {}, ["x"], 17))
    x = {"x": rng.standard_normal((2, 6, 1)).astype(np.float32)}
    with pytest.raises(ModelError, match="axis is that of the real and imaginary parts"):
        load_onnx(model_of("DFT", x, {}, ["x"], 17, axis=2))
    with pytest.raises(ModelError, match="frames of 9 every 2 do not fit a signal of 6"):
        load_onnx(
            model_of("STFT", x, {"s": np.int64(2), "n": np.int64(9)}, ["x", "s", "", "n"], 17)
        )
    with pytest.raises(UnsupportedOpError, match="transforms of float16 are not supported"):
        load_onnx(model_of("DFT", {"x": x["x"].astype(np.float16)}, {}, ["x"], 17))
    constants = {"i": np.asarray([5, 5]), "b": np.asarray([2, 2])}
    blocks = {"x": np.zeros((1, 8, 4), np.float32)}
    with pytest.raises(ModelError, match="4 blocks are given, the image"):
        load_onnx(model_of("Col2Im", blocks, constants, ["x", "i", "b"]))


def old(axis: int, extent: int) -> onnx.ModelProto:
    """A sum of opset 6, where broadcasting is an attribute."""
    b = np.arange(extent, dtype=np.float32)
    feeds = {"x": np.zeros((2, 3, 4), np.float32)}
    model = model_of("Add", feeds, {"b": b}, ["x", "b"], 6, broadcast=1, axis=axis)
    info = helper.make_tensor_value_info
    model.graph.output[0].CopyFrom(info("y", TensorProto.FLOAT, [2, 3, 4]))
    model.graph.input.append(info("b", TensorProto.FLOAT, [extent]))
    model.ir_version = 3
    return model


def test_models_of_opset_6_are_converted(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 3, 4)).astype(np.float32)
    got = ours(old(2, 4), {"x": x})
    np.testing.assert_array_equal(got, x + np.arange(4, dtype=np.float32))


def test_what_onnx_does_not_convert_is_refused_for_its_opset() -> None:
    """Its converter asserts where the axis is not the last."""
    with pytest.raises(ModelError, match=r"opset 6; .* older ones where ONNX's own converter"):
        load_onnx(old(1, 3))
