# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Build well-known architectures with seeded weights, for speed work and structural tests.

Needs numpy and onnx only. The weights are random but behave like trained ones: every convolution
and linear layer is scaled so that its output channels have a standard deviation near 1 (with a
log-normal spread from channel to channel) and a mean near 0, which is what BatchNormalization
does in a trained network. For that a small probe batch of standard normal inputs is run through
each layer, in numpy, as the layer is added. Signals neither vanish nor explode, and quantization
ranges look like those of a real network; predictions mean nothing. The same seed gives the same
weights up to rounding (the probe's sums depend on numpy's BLAS).

Usage: ``python models/builders.py resnet50 -o resnet50.onnx [--size 224] [--seed 0] ...``
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8  # the IR version that came with opset 17
BN_EPSILON = 1e-5
PROBE_SIZE = 128  # pixels; still 4 x 4 positions after the 32-fold reduction of most networks

FloatArray = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]


class GraphWriter:
    """Write an ONNX graph node by node; every tensor gets a readable, unique name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._taken: set[str] = set()

    def unique(self, hint: str) -> str:
        """Return ``hint``, with a number appended where that name is already in use."""
        name, count = hint, 1
        while name in self._taken:
            name, count = f"{hint}_{count}", count + 1
        self._taken.add(name)
        return name

    def input(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; a string in ``shape`` is a symbolic dimension."""
        self._taken.add(name)
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, value: str, name: str, shape: Sequence[int | str]) -> None:
        """Declare ``value`` as the float graph output ``name``."""
        self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}/identity"))
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def constant(self, array: npt.ArrayLike, hint: str) -> str:
        """Add an initializer and return its name."""
        name = self.unique(hint)
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op: str, inputs: Sequence[str], hint: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        name = self.unique(hint)
        self._nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def model(self) -> onnx.ModelProto:
        """Return the finished model after ``onnx.checker`` has accepted it."""
        self._drop_output_identities()
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, self._constants
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="qcompiler-models",
        )
        onnx.checker.check_model(model)
        return model

    def _drop_output_identities(self) -> None:
        """Rename the producers of the outputs, so that no Identity node is left before them."""
        outputs = {value.name for value in self._outputs}
        renames = {
            node.input[0]: node.output[0]
            for node in self._nodes
            if node.op_type == "Identity" and node.output[0] in outputs
        }
        self._nodes = [node for node in self._nodes if node.output[0] not in renames.values()]
        for node in self._nodes:
            node.input[:] = [renames.get(name, name) for name in node.input]
            node.output[:] = [renames.get(name, name) for name in node.output]


def _sigmoid6(x: FloatArray) -> FloatArray:
    return np.clip(x / 6 + 0.5, 0, 1).astype(np.float32)


_ERF = np.vectorize(math.erf, otypes=[np.float32])
ACTIVATIONS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "hard_swish": lambda x: x * _sigmoid6(x),
    "hard_sigmoid": _sigmoid6,
    "gelu": lambda x: np.float32(0.5) * x * (1 + _ERF(x * np.float32(math.sqrt(0.5)))),
}


def _taps(
    x: FloatArray, kernel: int, stride: int, pad: int, fill: float
) -> Iterator[tuple[int, int, FloatArray]]:
    """Yield (row, column, values `[N, C, OH, OW]`) of each position under a sliding window."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=fill)
    height, width = ((extent - kernel) // stride + 1 for extent in x.shape[2:])
    for row in range(kernel):
        for column in range(kernel):
            rows = slice(row, row + stride * (height - 1) + 1, stride)
            columns = slice(column, column + stride * (width - 1) + 1, stride)
            yield row, column, x[:, :, rows, columns]


def _convolve(x: FloatArray, weight: FloatArray, stride: int, groups: int) -> FloatArray:
    """Convolve `[N, C, H, W]` with `[O, C / groups, K, K]`, padded to keep the size at stride 1."""
    outputs, per_group, kernel, _ = weight.shape
    total: Any = 0
    for row, column, tap in _taps(x, kernel, stride, kernel // 2, 0.0):
        batch, _, height, width = tap.shape
        matrix = weight[:, :, row, column].reshape(groups, outputs // groups, per_group)
        total = total + matrix @ tap.reshape(batch, groups, per_group, height * width)
    result: FloatArray = total.reshape(batch, outputs, height, width)
    return result


def _softmax(x: FloatArray) -> FloatArray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    result: FloatArray = powers / powers.sum(axis=-1, keepdims=True)
    return result


class Network(GraphWriter):
    """A graph writer that draws weights and runs a probe batch through each layer it adds.

    Args:
        name: graph name.
        seed: seed of the weights and of the probe.
        keep_bn: write convolutions as Conv + BatchNormalization (as a framework stores them)
            instead of a Conv with the normalisation folded into weight and bias. Both forms
            compute the same function.
    """

    def __init__(self, name: str, seed: int, keep_bn: bool = False) -> None:
        super().__init__(name)
        self.rng = np.random.default_rng(seed)
        self._bn_rng = np.random.default_rng([seed, 1])
        self.keep_bn = keep_bn
        self.probe: dict[str, FloatArray] = {}
        """Value of each tensor for the probe batch."""

    def image(
        self, batch: int | str, channels: int, size: int, probe_size: int = PROBE_SIZE
    ) -> str:
        """Declare the input `[batch, channels, size, size]`; the probe is standard normal."""
        name = self.input("input", (batch, channels, size, size))
        extent = min(size, probe_size)
        # Small images: more of them, as the statistics of the last layers have few positions.
        samples = 8 * max(1, min(16, (PROBE_SIZE // extent) ** 2))
        shape = (samples, channels, extent, extent)
        self.probe[name] = self.rng.standard_normal(shape, dtype=np.float32)
        return name

    def channels(self, x: str) -> int:
        """Return the channels of an image-like tensor, or the features of any other."""
        value = self.probe[x]
        return int(value.shape[1 if value.ndim == 4 else -1])

    def spread(self, channels: int, std: float) -> tuple[Vector, Vector]:
        """Draw the wanted std `[C]` (log-normal, rms ``std``) and mean `[C]` of a layer's output.

        The spread (sigma 0.35: most channels within a factor of 2) is that of the
        BatchNormalization scales of trained ImageNet models, roughly.
        """
        scale = np.exp(0.35 * self.rng.standard_normal(channels))
        scale *= std / math.sqrt(float(np.mean(scale**2)))
        return scale, 0.2 * std * self.rng.standard_normal(channels)

    def _normaliser(
        self, raw: FloatArray, axis: int, std: float, mean: Vector | float, centred: bool
    ) -> tuple[FloatArray, FloatArray]:
        """Slope and bias `[C]` that give ``raw`` about the wanted std and mean on ``axis``.

        ``centred`` does what BatchNormalization does: each channel's own mean and variance.
        Layers that have none in trained networks (Gemm, attention, squeeze-excite) are scaled by
        their power as a whole: their probe may hold few different values, of which a variance
        would only make the network amplify small differences.
        """
        others = tuple(i for i in range(raw.ndim) if i != axis % raw.ndim)
        centre = raw.mean(axis=others, dtype=np.float64)
        power = np.square(raw, dtype=np.float64).mean(axis=others)
        target_std, target_mean = self.spread(len(centre), std)
        if centred:
            # The floor guards channels that are near constant over the probe.
            slope = target_std / np.sqrt(power - centre**2 + 1e-3 * power.mean())
            bias = target_mean + mean - slope * centre
        else:
            slope = target_std / math.sqrt(float(power.mean()))
            bias = target_mean + mean
        return slope.astype(np.float32), bias.astype(np.float32)

    def conv(
        self,
        x: str,
        channels: int,
        kernel: int,
        name: str,
        *,
        stride: int = 1,
        groups: int = 1,
        std: float = 1.0,
        mean: Vector | float = 0.0,
        batch_norm: bool = True,
    ) -> str:
        """Add a "same"-padded convolution whose output has about the given mean and std.

        Args:
            x: input tensor name.
            channels: output channels.
            kernel: kernel height and width (odd).
            name: layer name, prefix of its tensors.
            stride: stride of both axes.
            groups: convolution groups; the input's channel count makes it depthwise.
            std: root mean square over channels of the wanted standard deviation.
            mean: wanted mean, per channel or one for all.
            batch_norm: False for layers that have a bias and no normalisation by design.
        """
        per_group = self.channels(x) // groups
        shape = (channels, per_group, kernel, kernel)
        weight = self.rng.standard_normal(shape, dtype=np.float32)
        weight *= np.float32(1 / math.sqrt(per_group * kernel * kernel))
        raw = _convolve(self.probe[x], weight, stride, groups)
        slope, bias = self._normaliser(raw, 1, std, mean, batch_norm)
        weight *= slope[:, None, None, None]
        attributes: dict[str, Any] = {
            "kernel_shape": [kernel, kernel],
            "strides": [stride, stride],
            "pads": [kernel // 2] * 4,
            "dilations": [1, 1],
            "group": groups,
        }
        if self.keep_bn and batch_norm:
            y = self._conv_bn(x, weight, bias, name, attributes)
        else:
            w = self.constant(weight, f"{name}.weight")
            y = self.node("Conv", (x, w, self.constant(bias, f"{name}.bias")), name, **attributes)
        self.probe[y] = raw * slope[:, None, None] + bias[:, None, None]
        return y

    def _conv_bn(
        self, x: str, weight: FloatArray, bias: FloatArray, name: str, attributes: dict[str, Any]
    ) -> str:
        """Write ``weight * x + bias`` as a Conv without bias and a BatchNormalization."""
        channels = len(bias)
        # Draws of their own, so that both forms of a model have the same weights.
        draw = self._bn_rng.standard_normal((3, channels))
        scale, running_mean, running_var = np.exp(0.3 * draw[0]), draw[1], np.exp(0.5 * draw[2])
        slope = scale / np.sqrt(running_var + BN_EPSILON)
        raw = (weight / slope[:, None, None, None]).astype(np.float32)
        y = self.node("Conv", (x, self.constant(raw, f"{name}.weight")), name, **attributes)
        rows = {
            "scale": scale,
            "bias": bias + running_mean * slope,
            "mean": running_mean,
            "var": running_var,
        }
        parameters = [
            self.constant(row.astype(np.float32), f"{name}.bn.{key}") for key, row in rows.items()
        ]
        return self.node(
            "BatchNormalization", (y, *parameters), f"{name}.bn", epsilon=BN_EPSILON, momentum=0.9
        )

    def _dense(
        self, x: str, features: int, std: float
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Weight `[K, features]`, bias `[features]` and probe value of a fully connected layer."""
        inputs = self.channels(x)
        weight = self.rng.standard_normal((inputs, features), dtype=np.float32)
        weight *= np.float32(1 / math.sqrt(inputs))
        raw = self.probe[x] @ weight
        slope, bias = self._normaliser(raw, -1, std, 0.0, centred=False)
        return weight * slope, bias, raw * slope + bias

    def gemm(self, x: str, features: int, name: str, *, std: float = 1.0) -> str:
        """Add a fully connected layer on `[N, K]`: Gemm, its weight stored `[features, K]`."""
        weight, bias, value = self._dense(x, features, std)
        w = self.constant(weight.T, f"{name}.weight")
        y = self.node("Gemm", (x, w, self.constant(bias, f"{name}.bias")), name, transB=1)
        self.probe[y] = value
        return y

    def linear(self, x: str, features: int, name: str, *, std: float = 1.0) -> str:
        """Add a linear layer on `[..., K]` as MatMul (weight `[K, features]`) and Add (bias first).

        This is how PyTorch exports ``nn.Linear`` on a tensor of rank 3.
        """
        weight, bias, value = self._dense(x, features, std)
        w = self.constant(weight, f"{name}.weight")
        product = self.node("MatMul", (x, w), f"{name}/MatMul")
        y = self.node("Add", (self.constant(bias, f"{name}.bias"), product), f"{name}/Add")
        self.probe[y] = value
        return y

    def activation(self, x: str, kind: str, name: str) -> str:
        """Add an activation of :data:`ACTIVATIONS`; "gelu" is written out with Erf."""
        if kind == "relu":
            y = self.node("Relu", (x,), name)
        elif kind == "relu6":
            low = self.constant(np.float32(0), f"{name}.min")
            high = self.constant(np.float32(6), f"{name}.max")
            y = self.node("Clip", (x, low, high), name)
        elif kind == "hard_swish":
            y = self.node("HardSwish", (x,), name)
        elif kind == "hard_sigmoid":
            y = self.node("HardSigmoid", (x,), name, alpha=1 / 6, beta=0.5)
        else:
            y = self._gelu(x, name)
        self.probe[y] = ACTIVATIONS[kind](self.probe[x])
        return y

    def _gelu(self, x: str, name: str) -> str:
        scalars = [
            self.constant(np.float32(value), f"{name}.{key}")
            for key, value in (("sqrt2", math.sqrt(2)), ("one", 1), ("half", 0.5))
        ]
        erf = self.node("Erf", (self.node("Div", (x, scalars[0]), f"{name}/Div"),), f"{name}/Erf")
        gate = self.node("Add", (erf, scalars[1]), f"{name}/Add")
        product = self.node("Mul", (x, gate), f"{name}/Mul")
        return self.node("Mul", (product, scalars[2]), f"{name}/Mul_half")

    def add(self, a: str, b: str, name: str) -> str:
        """Add a residual addition."""
        y = self.node("Add", (a, b), name)
        self.probe[y] = self.probe[a] + self.probe[b]
        return y

    def scale(self, x: str, gate: str, name: str) -> str:
        """Multiply `[N, C, H, W]` by a gate `[N, C, 1, 1]` (squeeze-excite)."""
        y = self.node("Mul", (x, gate), name)
        self.probe[y] = self.probe[x] * self.probe[gate]
        return y

    def max_pool(self, x: str, kernel: int, stride: int, name: str, *, pad: int = 0) -> str:
        """Add max pooling."""
        y = self.node(
            "MaxPool",
            (x,),
            name,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pad] * 4,
        )
        taps = [tap for *_, tap in _taps(self.probe[x], kernel, stride, pad, -math.inf)]
        self.probe[y] = np.maximum.reduce(taps)
        return y

    def global_average_pool(self, x: str, name: str) -> str:
        """Add global average pooling, `[N, C, H, W]` -> `[N, C, 1, 1]`."""
        y = self.node("GlobalAveragePool", (x,), name)
        self.probe[y] = self.probe[x].mean(axis=(2, 3), keepdims=True)
        return y

    def flatten(self, x: str, name: str) -> str:
        """Flatten `[N, ...]` to `[N, K]`."""
        y = self.node("Flatten", (x,), name, axis=1)
        self.probe[y] = self.probe[x].reshape(len(self.probe[x]), -1)
        return y

    def layer_norm(self, x: str, name: str, epsilon: float = 1e-12) -> str:
        """Add LayerNormalization over the last axis."""
        gamma, beta = (row.astype(np.float32) for row in self.spread(self.channels(x), 1.0))
        scale, bias = self.constant(gamma, f"{name}.weight"), self.constant(beta, f"{name}.bias")
        y = self.node("LayerNormalization", (x, scale, bias), name, axis=-1, epsilon=epsilon)
        value = self.probe[x] - self.probe[x].mean(axis=-1, keepdims=True)
        root = np.sqrt(np.square(value).mean(axis=-1, keepdims=True) + np.float32(epsilon))
        self.probe[y] = value / root * gamma + beta
        return y

    def classifier(self, x: str, batch: int | str, classes: int, name: str) -> onnx.ModelProto:
        """End the network in a fully connected layer with output `logits` `[batch, classes]`."""
        self.output(self.gemm(x, classes, name, std=2.0), "logits", (batch, classes))
        return self.model()


def _resnet(
    net: Network,
    batch: int | str,
    size: int,
    classes: int,
    block: Callable[[Network, str, int, int, str], str],
    depths: Sequence[int],
) -> onnx.ModelProto:
    x = net.conv(net.image(batch, 3, size), 64, 7, "conv1", stride=2)
    x = net.max_pool(net.activation(x, "relu", "relu1"), 3, 2, "maxpool", pad=1)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            x = block(net, x, 64 << stage, stride, f"layer{stage + 1}.{index}")
    x = net.flatten(net.global_average_pool(x, "avgpool"), "flatten")
    return net.classifier(x, batch, classes, "fc")


def _close_block(
    net: Network, x: str, y: str, channels: int, kernel: int, stride: int, name: str
) -> str:
    """Close a residual block: the branch's last convolution on ``y``, shortcut, Add, Relu."""
    shortcut = x
    if stride != 1 or net.channels(x) != channels:
        half = math.sqrt(0.5)
        shortcut = net.conv(x, channels, 1, f"{name}.downsample", stride=stride, std=half)
    # The branch is given the std and mean that make branch + shortcut about standard normal.
    value = net.probe[shortcut]
    std = math.sqrt(max(0.25, 1.0 - float(value.var(axis=(0, 2, 3)).mean())))
    mean = -value.mean(axis=(0, 2, 3), dtype=np.float64)
    last = f"{name}.conv{3 if kernel == 1 else 2}"
    y = net.conv(y, channels, kernel, last, std=std, mean=mean)
    return net.activation(net.add(y, shortcut, f"{name}.add"), "relu", f"{name}.relu_out")


def _basic_block(net: Network, x: str, width: int, stride: int, name: str) -> str:
    y = net.activation(
        net.conv(x, width, 3, f"{name}.conv1", stride=stride), "relu", f"{name}.relu1"
    )
    return _close_block(net, x, y, width, 3, stride, name)


def _bottleneck(net: Network, x: str, width: int, stride: int, name: str) -> str:
    y = net.activation(net.conv(x, width, 1, f"{name}.conv1"), "relu", f"{name}.relu1")
    y = net.activation(
        net.conv(y, width, 3, f"{name}.conv2", stride=stride), "relu", f"{name}.relu2"
    )
    return _close_block(net, x, y, 4 * width, 1, stride, name)


def resnet50(
    batch: int | str = 1,
    size: int = 224,
    seed: int = 0,
    classes: int = 1000,
    keep_bn: bool = False,
) -> onnx.ModelProto:
    """Build ResNet-50 v1.5 (stride in the 3x3 convolution, as torchvision has it).

    Args:
        batch: batch size; a string makes it symbolic.
        size: input height and width, a multiple of 32.
        seed: seed of the weights.
        classes: number of classes.
        keep_bn: keep BatchNormalization nodes instead of folding them.

    Returns:
        A model with input `input` `[batch, 3, size, size]` and output `logits`
        `[batch, classes]`; 4.1 GMAC and 25.6 M parameters at the defaults.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1.
    """
    return _resnet(
        Network("resnet50", seed, keep_bn), batch, size, classes, _bottleneck, (3, 4, 6, 3)
    )


def resnet18(
    batch: int | str = 1,
    size: int = 224,
    seed: int = 0,
    classes: int = 1000,
    keep_bn: bool = False,
) -> onnx.ModelProto:
    """Build ResNet-18; arguments and result as for :func:`resnet50` (1.8 GMAC, 11.7 M parameters).

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, table 1.
    """
    return _resnet(
        Network("resnet18", seed, keep_bn), batch, size, classes, _basic_block, (2, 2, 2, 2)
    )


def _divisible(channels: float, divisor: int = 8) -> int:
    """Round to a multiple of ``divisor`` without going more than 10 % below ``channels``."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def mobilenet_v2(
    width: float = 1.0,
    batch: int | str = 1,
    size: int = 224,
    seed: int = 0,
    classes: int = 1000,
    keep_bn: bool = False,
) -> onnx.ModelProto:
    """Build MobileNetV2; ReLU6 is Clip with its bounds as initializers.

    Args:
        width: width multiplier.
        batch: batch size; a string makes it symbolic.
        size: input height and width, a multiple of 32.
        seed: seed of the weights.
        classes: number of classes.
        keep_bn: keep BatchNormalization nodes instead of folding them.

    Returns:
        A model with input `input` `[batch, 3, size, size]` and output `logits`
        `[batch, classes]`; 0.30 GMAC and 3.5 M parameters at the defaults.

    Source: Sandler et al., MobileNetV2, 2018, table 2.
    """
    net = Network("mobilenet_v2", seed, keep_bn)

    def block(
        x: str, channels: int, kernel: int, name: str, stride: int = 1, groups: int = 1
    ) -> str:
        y = net.conv(x, channels, kernel, name, stride=stride, groups=groups)
        return net.activation(y, "relu6", f"{name}.relu6")

    x = block(net.image(batch, 3, size), _divisible(32 * width), 3, "features.0", 2)
    index = 1
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1),
            (6, 160, 3, 2), (6, 320, 1, 1))  # fmt: skip
    for expand, base, depth, first_stride in rows:
        for repeat in range(depth):
            stride = first_stride if repeat == 0 else 1
            name = f"features.{index}"
            inputs, outputs = net.channels(x), _divisible(base * width)
            hidden = inputs * expand
            y = block(x, hidden, 1, f"{name}.expand") if expand != 1 else x
            y = block(y, hidden, 3, f"{name}.depthwise", stride, hidden)
            shortcut = stride == 1 and inputs == outputs
            y = net.conv(y, outputs, 1, f"{name}.project", std=0.5 if shortcut else 1.0)
            x = net.add(x, y, f"{name}.add") if shortcut else y
            index += 1
    x = block(x, _divisible(1280 * max(1.0, width)), 1, f"features.{index}")
    x = net.flatten(net.global_average_pool(x, "avgpool"), "flatten")
    return net.classifier(x, batch, classes, "classifier")


_V3_SMALL = (  # kernel, hidden, out, squeeze-excite, activation, stride (table 2 of the paper)
    (3, 16, 16, True, "relu", 2),
    (3, 72, 24, False, "relu", 2),
    (3, 88, 24, False, "relu", 1),
    (5, 96, 40, True, "hard_swish", 2),
    (5, 240, 40, True, "hard_swish", 1),
    (5, 240, 40, True, "hard_swish", 1),
    (5, 120, 48, True, "hard_swish", 1),
    (5, 144, 48, True, "hard_swish", 1),
    (5, 288, 96, True, "hard_swish", 2),
    (5, 576, 96, True, "hard_swish", 1),
    (5, 576, 96, True, "hard_swish", 1),
)


def mobilenet_v3_small(
    width: float = 1.0,
    batch: int | str = 1,
    size: int = 224,
    seed: int = 0,
    classes: int = 1000,
    keep_bn: bool = False,
) -> onnx.ModelProto:
    """Build MobileNetV3-Small with HardSwish and squeeze-excite; arguments as :func:`mobilenet_v2`.

    Source: Howard et al., Searching for MobileNetV3, 2019, table 2.
    """
    net = Network("mobilenet_v3_small", seed, keep_bn)

    def squeeze_excite(x: str, name: str) -> str:
        channels = net.channels(x)
        y = net.global_average_pool(x, f"{name}.pool")
        y = net.conv(y, _divisible(channels / 4), 1, f"{name}.fc1", batch_norm=False)
        y = net.activation(y, "relu", f"{name}.relu")
        # A small spread: gates follow the signal's size, and wide ones let it run away on outliers.
        y = net.conv(y, channels, 1, f"{name}.fc2", std=0.5, batch_norm=False)
        return net.scale(x, net.activation(y, "hard_sigmoid", f"{name}.gate"), f"{name}.mul")

    x = net.conv(net.image(batch, 3, size), _divisible(16 * width), 3, "features.0", stride=2)
    x = net.activation(x, "hard_swish", "features.0.act")
    for index, (kernel, hidden, out, squeeze, act, stride) in enumerate(_V3_SMALL, start=1):
        name = f"features.{index}"
        inputs, outputs = net.channels(x), _divisible(out * width)
        inner = _divisible(hidden * width)
        y = x
        if inner != inputs:
            y = net.conv(y, inner, 1, f"{name}.expand")
            y = net.activation(y, act, f"{name}.expand.act")
        y = net.conv(y, inner, kernel, f"{name}.depthwise", stride=stride, groups=inner)
        y = net.activation(y, act, f"{name}.depthwise.act")
        if squeeze:
            y = squeeze_excite(y, f"{name}.se")
        shortcut = stride == 1 and inputs == outputs
        y = net.conv(y, outputs, 1, f"{name}.project", std=0.5 if shortcut else 1.0)
        x = net.add(x, y, f"{name}.add") if shortcut else y
    x = net.conv(x, 6 * _divisible(96 * width), 1, "features.12")
    x = net.activation(x, "hard_swish", "features.12.act")
    x = net.flatten(net.global_average_pool(x, "avgpool"), "flatten")
    x = net.activation(net.gemm(x, 1024, "classifier.0"), "hard_swish", "classifier.1")
    return net.classifier(x, batch, classes, "classifier.3")


def vgg_small(
    batch: int | str = 1,
    size: int = 32,
    seed: int = 0,
    classes: int = 10,
    width: int = 32,
    keep_bn: bool = False,
) -> onnx.ModelProto:
    """Build a plain VGG-like network: three pairs of 3x3 convolutions, pooling, two Gemm layers.

    Args:
        batch: batch size; a string makes it symbolic.
        size: input height and width, a multiple of 8.
        seed: seed of the weights.
        classes: number of classes.
        width: channels of the first pair; doubled after each pooling.
        keep_bn: keep BatchNormalization nodes instead of folding them.
    """
    net = Network("vgg_small", seed, keep_bn)
    x = net.image(batch, 3, size, probe_size=size)  # the first Gemm depends on the size
    for stage in range(3):
        for index in range(2):
            name = f"features.{stage}.{index}"
            x = net.activation(net.conv(x, width << stage, 3, name), "relu", f"{name}.relu")
        x = net.max_pool(x, 2, 2, f"features.{stage}.pool")
    x = net.flatten(x, "flatten")
    x = net.activation(net.gemm(x, 8 * width, "classifier.0"), "relu", "classifier.1")
    return net.classifier(x, batch, classes, "classifier.2")


def _attention(
    net: Network,
    x: str,
    batch: int | str,
    tokens: int,
    heads: int,
    mask: str | None,
    name: str,
    symbolic: bool = False,
) -> str:
    """Multi-head self-attention on `[batch, tokens, width]` up to its output projection."""
    width = net.channels(x)
    depth = width // heads
    # Where both extents are open, the first one is copied (0) and the second one follows (-1).
    extents = (0, -1) if symbolic else (-1 if isinstance(batch, str) else batch, tokens)
    split = net.constant(np.array([*extents, heads, depth], np.int64), f"{name}.split")
    # Query and key have variance 2, so that scores have a standard deviation of 2 and the
    # attention is peaked as in trained encoders, not near uniform.
    query = net.linear(x, width, f"{name}.query", std=math.sqrt(2))
    key = net.linear(x, width, f"{name}.key", std=math.sqrt(2))
    value = net.linear(x, width, f"{name}.value")
    parts, probes = {}, {}
    for part, source, perm in (
        ("query", query, (0, 2, 1, 3)),
        ("key", key, (0, 2, 3, 1)),
        ("value", value, (0, 2, 1, 3)),
    ):
        shaped = net.node("Reshape", (source, split), f"{name}.{part}/Reshape")
        parts[part] = net.node("Transpose", (shaped,), f"{name}.{part}/Transpose", perm=perm)
        probes[part] = net.probe[source].reshape(-1, tokens, heads, depth).transpose(perm)
    scores = net.node("MatMul", (parts["query"], parts["key"]), f"{name}/scores")
    root = np.float32(math.sqrt(depth))
    scores = net.node("Div", (scores, net.constant(root, f"{name}.sqrt_depth")), f"{name}/Div")
    if mask is not None:
        scores = net.node("Add", (scores, mask), f"{name}/mask")
    probabilities = net.node("Softmax", (scores,), f"{name}/Softmax", axis=-1)
    context = net.node("MatMul", (probabilities, parts["value"]), f"{name}/context")
    context = net.node("Transpose", (context,), f"{name}/Transpose", perm=[0, 2, 1, 3])
    merge = net.constant(np.array([*extents, width], np.int64), f"{name}.merge")
    context = net.node("Reshape", (context, merge), f"{name}/Reshape")
    mixed = _softmax(probes["query"] @ probes["key"] / root) @ probes["value"]
    net.probe[context] = mixed.transpose(0, 2, 1, 3).reshape(-1, tokens, width)
    return net.linear(context, width, f"{name}.output", std=math.sqrt(0.5))


def _embeddings(
    net: Network, batch: int | str, tokens: int, vocab: int, width: int, symbolic: bool
) -> str:
    """Input ids to the sum of word, position and token type embeddings, normalised."""
    ids = net.input("input_ids", (batch, "tokens" if symbolic else tokens), TensorProto.INT64)
    table = 0.05 * net.rng.standard_normal((vocab, width), dtype=np.float32)
    position = 0.02 * net.rng.standard_normal((1, tokens, width), dtype=np.float32)
    kind = 0.02 * net.rng.standard_normal(width, dtype=np.float32)
    words = net.node("Gather", (net.constant(table, "embeddings.word"), ids), "embeddings/Gather")
    x = net.node("Add", (words, net.constant(kind, "embeddings.token_type")), "embeddings/Add")
    places = net.constant(position, "embeddings.position")
    if symbolic:
        one = net.constant(np.array([1], np.int64), "embeddings.one")
        none = net.constant(np.array([0], np.int64), "embeddings.none")
        shape = net.node("Shape", (ids,), "embeddings/Shape")
        count = net.node("Gather", (shape, one), "embeddings/count", axis=0)
        places = net.node("Slice", (places, none, count, one), "embeddings/Slice")
    x = net.node("Add", (x, places), "embeddings/Add_1")
    sample = net.rng.integers(0, vocab, (1, tokens))
    net.probe[x] = table[sample] + kind + position
    return net.layer_norm(x, "embeddings.LayerNorm")


def _additive_mask(net: Network, batch: int | str, tokens: int | str) -> str:
    """`attention_mask` `[batch, tokens]` of 0 and 1 to 0 and -3.4e38, `[batch, 1, 1, tokens]`."""
    mask = net.input("attention_mask", (batch, tokens), TensorProto.INT64)
    axes = net.constant(np.array([1, 2], np.int64), "mask.axes")
    wide = net.node("Unsqueeze", (mask, axes), "mask/Unsqueeze")
    real = net.node("Cast", (wide,), "mask/Cast", to=TensorProto.FLOAT)
    inverse = net.node("Sub", (net.constant(np.float32(1), "mask.one"), real), "mask/Sub")
    lowest = net.constant(np.float32(np.finfo(np.float32).min), "mask.lowest")
    return net.node("Mul", (inverse, lowest), "mask/Mul")


def encoder(
    layers: int = 6,
    width: int = 384,
    heads: int = 12,
    ffn: int = 1536,
    tokens: int = 128,
    vocab: int | None = None,
    seed: int = 0,
    batch: int | str = 1,
    mask: bool = False,
    symbolic: bool = False,
) -> onnx.ModelProto:
    """Build a BERT-like encoder (post-norm), node for node as PyTorch exports one.

    Args:
        layers: number of encoder layers.
        width: model width, a multiple of ``heads``.
        heads: attention heads.
        ffn: width of the feed-forward layer.
        tokens: sequence length.
        vocab: vocabulary size for an `input_ids` int64 `[batch, tokens]` input with embedding
            tables; None for a float `input` `[batch, tokens, width]` (already embedded).
        seed: seed of the weights.
        batch: batch size; a string makes it symbolic.
        mask: add the input `attention_mask` int64 `[batch, tokens]`.
        symbolic: leave the sequence length open; ``tokens`` is then the longest one.

    Returns:
        A model with the output `last_hidden_state` `[batch, tokens, width]`; 1.4 GMAC at the
        defaults (the size of MiniLM-L6).

    Source: Devlin et al., BERT, 2018; sizes of Wang et al., MiniLM, 2020.
    """
    net = Network("encoder", seed)
    extent = "tokens" if symbolic else tokens
    if vocab is None:
        x = net.input("input", (batch, extent, width))
        net.probe[x] = net.rng.standard_normal((1, tokens, width), dtype=np.float32)
    else:
        x = _embeddings(net, batch, tokens, vocab, width, symbolic)
    additive = _additive_mask(net, batch, extent) if mask else None
    for index in range(layers):
        name = f"layer.{index}"
        y = _attention(net, x, batch, tokens, heads, additive, f"{name}.attention", symbolic)
        x = net.layer_norm(net.add(y, x, f"{name}.attention/Add"), f"{name}.attention.LayerNorm")
        y = net.activation(net.linear(x, ffn, f"{name}.intermediate"), "gelu", f"{name}.gelu")
        y = net.linear(y, width, f"{name}.output", std=math.sqrt(0.5))
        x = net.layer_norm(net.add(y, x, f"{name}.output/residual"), f"{name}.output.LayerNorm")
    net.output(x, "last_hidden_state", (batch, extent, width))
    return net.model()


BUILDERS: Mapping[str, Callable[..., onnx.ModelProto]] = {
    builder.__name__: builder
    for builder in (resnet50, resnet18, mobilenet_v2, mobilenet_v3_small, vgg_small, encoder)
}
"""Every builder by name."""


def _batch(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def main(arguments: Sequence[str] | None = None) -> None:
    """Build one model from the command line and write it to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, builder in BUILDERS.items():
        summary = (builder.__doc__ or "").split("\n", maxsplit=1)[0]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
        for option, parameter in inspect.signature(builder).parameters.items():
            flag, default = f"--{option.replace('_', '-')}", parameter.default
            if isinstance(default, bool):
                command.add_argument(flag, action="store_true")
            else:
                kind = _batch if option == "batch" else int if default is None else type(default)
                command.add_argument(flag, type=kind, default=default, help=f"default {default}")
    options = vars(parser.parse_args(arguments))
    builder, path = BUILDERS[options.pop("name")], options.pop("output")
    onnx.save(builder(**options), path)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
