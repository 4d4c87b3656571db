# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Small convolutional models of many families: exact, accurate, and with every product in integers.

Each is written the way some exporter writes it. What each may leave in float is listed with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from built_models import executor, show_integers
from onnx import TensorProto, helper, numpy_helper

from qcompiler.driver import build_graph, quantize_model
from qcompiler.interpreter import run
from qcompiler.ort import Session
from qcompiler.registry import get_target
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.types import Array, Precision

SAMPLES, SEEN = 14, 12
ROWS = sorted({"host", *(n for n in ("x86-avx2",) if runnable(ISA_TABLE[n]))})
ONES = [1, 1, 1, 1]
TO_FIRST, TO_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


class Net:
    """Writes a model node by node, with seeded weights and smooth seeded samples."""

    def __init__(self, *shape: int, opset: int = 13, dtype: npt.DTypeLike = np.float32) -> None:
        self.rng = np.random.default_rng(0)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        data = self.rng.standard_normal((SAMPLES, *shape[1:]))
        for axis in range(1, len(shape)):
            data = data + np.roll(data, 1, axis)
        if dtype == np.uint8:
            data = np.clip(128 + 40 * data, 0, 255)
        self.samples = data.astype(dtype)
        kind = helper.np_dtype_to_tensor_dtype(self.samples.dtype)
        self.input = helper.make_tensor_value_info("x", kind, list(shape))

    def const(self, data: npt.ArrayLike) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(data), name))
        return name

    def weight(self, *shape: int) -> str:
        std = np.sqrt(2 / np.prod(shape[1:]))
        return self.const((self.rng.standard_normal(shape) * std).astype(np.float32))

    def vector(self, *shape: int, low: float = -0.3, high: float = 0.3) -> str:
        return self.const(self.rng.uniform(low, high, shape).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.const(np.int64(values))

    def op(self, kind: str, *inputs: str, count: int = 1, **attrs: object) -> str:
        base = f"{kind}_{len(self.nodes)}"
        outputs = [base, *(f"{base}:{i}" for i in range(1, count))]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, base, **attrs))
        return base

    def conv(self, x: str, m: int, c: int, *kernel: int, **attrs: object) -> str:
        """Convolution with a bias that keeps the extents unless `attrs` says otherwise."""
        attrs = {"pads": [k // 2 for k in kernel] * 2, **attrs}
        return self.op("Conv", x, self.weight(m, c, *kernel), self.vector(m), **attrs)

    def norm(self, x: str, c: int) -> str:
        scale, var = (self.vector(c, low=0.6, high=1.4) for _ in range(2))
        return self.op("BatchNormalization", x, scale, self.vector(c), self.vector(c), var)

    def relu(self, x: str) -> str:
        return self.op("Relu", x)

    def swish(self, x: str) -> str:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def turn(self, x: str, perm: list[int]) -> str:
        return self.op("Transpose", x, perm=perm)

    def head(self, x: str, c: int, n: int) -> str:
        x = self.op("Flatten", self.op("GlobalAveragePool", x))
        return self.op("Gemm", x, self.weight(n, c), self.vector(n), transB=1)

    def done(self, *outputs: str) -> tuple[onnx.ModelProto, Array]:
        infos = [helper.make_empty_tensor_value_info(o) for o in outputs]
        graph = helper.make_graph(self.nodes, "net", [self.input], infos, self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8), self.samples


Model = tuple[onnx.ModelProto, Array]


def grouped_residual() -> Model:
    """ResNeXt, RegNet: grouped convolutions, squeeze and excitation, projected shortcut."""
    net = Net(1, 3, 24, 24)
    x = net.relu(net.conv("x", 16, 3, 3, 3, strides=[2, 2]))
    y = net.relu(net.norm(net.conv(x, 24, 16, 1, 1), 24))
    y = net.relu(net.norm(net.conv(y, 24, 3, 3, 3, group=8), 24))
    s = net.op("ReduceMean", y, axes=[2, 3])
    s = net.op("Sigmoid", net.conv(net.relu(net.conv(s, 6, 24, 1, 1)), 24, 6, 1, 1))
    y = net.norm(net.conv(net.op("Mul", y, s), 32, 24, 1, 1), 32)
    y = net.relu(net.op("Add", y, net.conv(x, 32, 16, 1, 1)))
    return net.done(net.head(y, 32, 10))


def dense() -> Model:
    """DenseNet: normalization before the convolution, concatenation, average pooling."""
    net = Net(1, 3, 24, 24)
    x, c = net.conv("x", 16, 3, 3, 3, strides=[2, 2]), 16
    for _ in range(3):
        y = net.conv(net.relu(net.norm(x, c)), 8, c, 3, 3)
        x, c = net.op("Concat", x, y, axis=1), c + 8
    x = net.conv(net.relu(net.norm(x, c)), 20, c, 1, 1)
    x = net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.done(net.head(net.relu(net.norm(x, 20)), 20, 10))


def inception() -> Model:
    """Inception: kernels of one row or column, pooling branch, odd channel counts, ceil mode."""
    net = Net(1, 3, 21, 17)
    x = net.relu(net.conv("x", 17, 3, 3, 3, strides=[2, 2], pads=[0] * 4))
    a = net.relu(net.conv(net.relu(net.conv(x, 7, 17, 1, 7)), 9, 7, 7, 1))
    b = net.op("AveragePool", x, kernel_shape=[3, 3], pads=ONES, count_include_pad=0)
    y = net.op("Concat", net.relu(net.conv(x, 5, 17, 1, 1)), a, net.conv(b, 3, 17, 1, 1), axis=1)
    y = net.op("MaxPool", y, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
    y = net.op("Softmax", net.head(net.relu(net.conv(y, 8, 17, 3, 3)), 8, 6), axis=1)
    return net.done(y, net.op("ArgMax", y, axis=1))


def channels_last() -> Model:
    """MobileNet as tf2onnx writes it: transposes around each convolution, loose bias, Clip."""
    net = Net(1, 24, 24, 3, dtype=np.uint8)

    def layer(x: str, m: int, c: int, k: int, group: int = 1) -> str:
        x = net.op("Pad", x, net.ints(0, 0, 0, 0, 0, k - 1, k - 1, 0))
        x = net.op("Conv", net.turn(x, TO_FIRST), net.weight(m, c, k, k), group=group)
        x = net.op("Add", net.turn(x, TO_LAST), net.vector(m))
        x = net.op("Mul", x, net.vector(m, low=0.6, high=1.4))
        return net.op("Clip", x, net.const(np.float32(0)), net.const(np.float32(6)))

    x = net.op("Cast", "x", to=TensorProto.FLOAT)
    x = net.op("Sub", net.op("Div", x, net.const(np.float32(127.5))), net.const(np.float32(1)))
    x = layer(x, 16, 3, 3)
    x = net.op("Add", layer(layer(x, 16, 1, 3, 16), 16, 16, 1), x)
    x = net.op("ReduceMean", x, axes=[1, 2], keepdims=0)
    return net.done(net.op("Add", net.op("MatMul", x, net.weight(16, 5)), net.vector(5)))


def mobile_v3() -> Model:
    """MobileNetV3: hard swish and hard sigmoid written out, 5 x 5 depthwise."""
    net = Net(1, 3, 24, 24)

    def gate(x: str) -> str:
        x = net.op("Add", x, net.const(np.float32(3)))
        x = net.op("Clip", x, net.const(np.float32(0)), net.const(np.float32(6)))
        return net.op("Div", x, net.const(np.float32(6)))

    x = net.norm(net.conv("x", 16, 3, 3, 3, strides=[2, 2]), 16)
    x = net.op("Mul", x, gate(x))
    y = net.norm(net.conv(x, 16, 1, 5, 5, group=16), 16)
    y = net.op("Mul", y, gate(y))
    s = net.op("GlobalAveragePool", y)
    s = gate(net.conv(net.relu(net.conv(s, 8, 16, 1, 1)), 16, 8, 1, 1))
    y = net.op("Add", net.conv(net.op("Mul", y, s), 16, 16, 1, 1), x)
    return net.done(net.head(y, 16, 10))


def shuffle() -> Model:
    """ShuffleNet: channel split and shuffle."""
    net = Net(1, 3, 24, 24)
    x = net.relu(net.conv("x", 24, 3, 3, 3, strides=[2, 2]))
    for _ in range(2):
        a = net.op("Split", x, net.ints(12, 12), axis=1, count=2)
        b = net.conv(net.relu(net.conv(f"{a}:1", 12, 12, 1, 1)), 12, 1, 3, 3, group=12)
        x = net.op("Concat", a, net.relu(net.conv(b, 12, 12, 1, 1)), axis=1)
        x = net.op("Reshape", x, net.ints(1, 2, 12, 12, 12))
        x = net.op("Reshape", net.turn(x, [0, 2, 1, 3, 4]), net.ints(1, 24, 12, 12))
    return net.done(net.head(x, 24, 10))


def segmentation() -> Model:
    """U-Net: transposed convolution, linear upsampling, skips, dilation, few classes."""
    net = Net(1, 3, 24, 24)
    a = net.relu(net.conv("x", 8, 3, 3, 3))
    b = net.op("MaxPool", a, kernel_shape=[2, 2], strides=[2, 2])
    b = net.relu(net.conv(b, 16, 8, 3, 3, dilations=[2, 2], pads=[2, 2, 2, 2]))
    up = {"strides": [2, 2], "pads": ONES}
    u = net.relu(net.norm(net.op("ConvTranspose", b, net.weight(16, 8, 4, 4), **up), 8))
    x = net.relu(net.conv(net.op("Concat", u, a, axis=1), 8, 16, 3, 3))
    twice = net.const(np.float32([1, 1, 2, 2]))
    y = net.op("Resize", net.conv(x, 2, 8, 1, 1), "", twice, mode="linear")
    return net.done(net.op("Sigmoid", y))


def detection() -> Model:
    """YOLO: focus slices, SiLU, pyramid pooling, nearest upsampling, boxes from two scales."""
    net = Net(1, 3, 24, 24)

    def part(row: int, column: int) -> str:
        starts, ends = net.ints(row, column), net.ints(2**31, 2**31)
        return net.op("Slice", "x", starts, ends, net.ints(2, 3), net.ints(2, 2))

    x = net.op("Concat", part(0, 0), part(1, 0), part(0, 1), part(1, 1), axis=1)
    a = net.swish(net.conv(x, 16, 12, 3, 3))
    b = net.swish(net.conv(a, 16, 16, 3, 3, strides=[2, 2]))
    pools = [b]
    for _ in range(2):
        pools.append(net.op("MaxPool", pools[-1], kernel_shape=[5, 5], pads=[2] * 4))
    b = net.swish(net.conv(net.op("Concat", *pools, axis=1), 16, 48, 1, 1))
    twice = net.const(np.float32([1, 1, 2, 2]))
    nearest = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    u = net.op("Concat", net.op("Resize", b, "", twice, mode="nearest", **nearest), a, axis=1)
    outs = []
    for y, c, size in ((u, 32, 12), (b, 16, 6)):
        y = net.op("Reshape", net.conv(y, 21, c, 1, 1), net.ints(1, 3, 7, size, size))
        y = net.op("Sigmoid", net.turn(y, [0, 1, 3, 4, 2]))
        outs.append(net.op("Reshape", y, net.ints(1, -1, 7)))
    return net.done(net.op("Concat", *outs, axis=1), outs[0])


def video() -> Model:
    """Three spatial axes: convolution, depthwise convolution, pooling."""
    net = Net(1, 3, 6, 12, 12)
    x = net.relu(net.norm(net.conv("x", 8, 3, 3, 3, 3, strides=[1, 2, 2]), 8))
    x = net.op("MaxPool", x, kernel_shape=[2, 2, 2], strides=[2, 2, 2])
    x = net.conv(x, 8, 1, 3, 3, 3, group=8)
    x = net.op("AveragePool", net.relu(net.conv(x, 12, 8, 1, 1, 1)), kernel_shape=[2, 1, 1])
    return net.done(net.head(x, 12, 5))


def audio() -> Model:
    """One axis: long kernel, causal padding, gates, transposed convolution."""
    net = Net(1, 1, 256)
    x = net.relu(net.conv("x", 16, 1, 32, strides=[4], pads=[14, 14]))
    for d in (1, 2):
        y = net.op("Pad", x, net.ints(0, 0, d, 0, 0, 0))
        y = net.conv(y, 32, 16, 2, dilations=[d], pads=[0, 0])
        y = net.op("Split", y, axis=1, count=2)
        y = net.op("Mul", net.op("Tanh", y), net.op("Sigmoid", f"{y}:1"))
        x = net.op("Add", x, net.conv(y, 16, 16, 1))
    x = net.op("ConvTranspose", x, net.weight(16, 8, 8), strides=[4], pads=[2, 2])
    return net.done(net.conv(net.op("LeakyRelu", x, alpha=0.1), 1, 8, 7))


def styled() -> Model:
    """Instance and group normalization, reflected padding, pixel shuffle, tanh."""
    net = Net(1, 3, 16, 16, opset=18)
    x = net.op("Pad", "x", net.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect")
    x = net.conv(x, 8, 3, 3, 3, pads=[0] * 4)
    scale = net.vector(8, low=0.6, high=1.4)
    x = net.conv(net.relu(net.op("InstanceNormalization", x, scale, net.vector(8))), 8, 8, 3, 3)
    one, zero = (net.const(np.full(2, v, np.float32)) for v in (1, 0))
    g = net.op("InstanceNormalization", net.op("Reshape", x, net.ints(0, 2, -1)), one, zero)
    x = net.op("Mul", net.op("Reshape", g, net.ints(1, 8, 16, 16)), net.vector(8, 1, 1, high=1.4))
    x = net.relu(net.conv(net.swish(x), 12, 8, 3, 3))
    x = net.relu(net.op("DepthToSpace", net.conv(x, 12, 12, 3, 3), blocksize=2, mode="CRD"))
    return net.done(net.op("Tanh", net.conv(x, 3, 3, 3, 3)))


def functions() -> Model:
    """Activations of every sort, means over odd sets of axes."""
    net = Net(1, 3, 12, 10)
    x = net.conv("x", 8, 3, 3, 3)
    for kind, attrs in (("Elu", {"alpha": 0.7}), ("HardSigmoid", {}), ("Softplus", {})):
        x = net.conv(net.op(kind, x, **attrs), 8, 8, 1, 1)
    x = net.conv(net.op("Mul", x, net.op("Tanh", net.op("Softplus", x))), 8, 8, 1, 1)
    for axes in ([1], [1, 2], [1, 3], [2, 3]):
        x = net.conv(net.op("Add", x, net.op("ReduceMean", x, axes=axes)), 8, 8, 1, 1)
    return net.done(net.conv(net.op("Sub", x, net.op("Abs", x)), 3, 8, 3, 3))


# What each model may compute in float besides casts of its inputs and results.
MODELS: dict[Callable[[], Model], set[str]] = {
    grouped_residual: set(),
    dense: set(),
    inception: {"softmax", "argmax"},
    channels_last: {"cast", "div", "sub", "mul", "add"},
    mobile_v3: set(),
    shuffle: set(),
    segmentation: {"resize", "sigmoid"},
    detection: {"sigmoid", "concat", "reshape", "slice"},
    video: {"slice", "concat", "pad", "reshape"},
    audio: {"reshape"},
    styled: {"pad", "instance_norm", "reshape", "mul", "silu", "relu", "tanh"},
    functions: set(),
}
_CASTS = {"quantize", "dequantize", "transpose"}


def decibels(want: list[Array], got: list[Array]) -> float:
    noise = sum(
        float(((w - g).astype(np.float64) ** 2).sum()) for w, g in zip(want, got, strict=True)
    )
    return 10 * float(np.log10(sum(float((w.astype(np.float64) ** 2).sum()) for w in want) / noise))


@pytest.mark.parametrize("build", MODELS, ids=lambda f: f.__name__)
def test_integers(build: Callable[[], Model]) -> None:
    proto, samples = build()
    reference = Session(proto.SerializeToString(), optimization="disabled")
    for row in ROWS:
        graph = quantize_model(proto, calibration={"x": samples[:SEEN]}).graph
        returned = len(graph.outputs)
        show_integers(graph)
        built = build_graph(graph, get_target(row))
        floats = {op for r in built.regions if r.precision is Precision.FP32 for op in r.ops}
        assert floats - _CASTS <= MODELS[build]
        vm = executor(built)
        want, got = [], []
        for i in range(SEEN, SAMPLES):
            feeds = {"x": samples[i : i + 1]}
            expected = run(built.graph, feeds)
            found = vm.run([feeds["x"]], threads=1 + i % 2)
            for (name, v), array in zip(built.graph.outputs, found, strict=True):
                if v.type.is_quantized and build is styled:
                    # Float sums in another order may tip the rounding of what is quantized next.
                    assert (array != expected[name]).mean() < 0.02
                elif v.type.is_quantized:
                    np.testing.assert_array_equal(array, expected[name], err_msg=name)
                elif v.dtype.is_float and build is not styled:
                    np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4)
            want += list(reference.run(feeds).values())[:1]
            got += found[:returned][:1]
        assert decibels(want, got) > 20


@pytest.mark.parametrize(
    "build", [channels_last, segmentation, video, styled], ids=lambda f: f.__name__
)
def test_float32(build: Callable[[], Model]) -> None:
    proto, samples = build()
    built = build_graph(quantize_model(proto, precision="fp32").graph, get_target("host"))
    feeds = {"x": samples[-1:]}
    found = executor(built).run([feeds["x"]], threads=1)
    want = Session(proto.SerializeToString(), optimization="disabled").run(feeds).values()
    for w, g in zip(want, found, strict=True):
        assert np.abs(w - g).max() <= 1e-4 * np.abs(w).max()
