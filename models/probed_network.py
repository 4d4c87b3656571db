# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Networks with random weights that behave like trained ones. Needs numpy and onnx only.

Every convolution and linear layer is scaled so that its output channels have a standard deviation
near 1 (with a log-normal spread from channel to channel) and a mean near 0, which is what
BatchNormalization does in a trained network. For that a small probe batch of standard normal
inputs is run through each layer, in numpy, as the layer is added. Signals neither vanish nor
explode, and quantization ranges look like those of a real network; predictions mean nothing. The
same seed gives the same weights up to rounding (the probe's sums depend on numpy's BLAS).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from graph_writer import GraphWriter

BN_EPSILON = 1e-5
PROBE_SIZE = 128  # pixels; still 4 x 4 positions after the 32-fold reduction of most networks

FloatArray = npt.NDArray[np.float32]
Vector = npt.NDArray[np.float64]


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


def softmax(x: FloatArray) -> FloatArray:
    """Return the softmax over the last axis."""
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
