# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Train the small digits CNN and write model, calibration and evaluation data to digits_cnn/.

Data: the 1,797 handwritten digits (8x8, 16 grey levels) that ship with scikit-learn. The network
has a residual block, two depthwise-separable blocks, max and global average pooling, and is
written with its BatchNormalization nodes. Needs torch 2.13.0 (CPU) and scikit-learn; takes a
few minutes on one core. Same versions and machine, same files: everything is seeded.

Usage: ``python models/train_digits_cnn.py [--epochs 40] [--output DIR]``
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from digits import augment, load_split
from graph_writer import GraphWriter
from torch import nn

HERE = Path(__file__).resolve().parent
CALIBRATION_SAMPLES = 256
WIDTH = 96


class ConvBn(nn.Sequential):  # type: ignore[misc]
    """Convolution without bias, BatchNormalization, and an optional activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        groups: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), activation or nn.Identity())


class DigitsCnn(nn.Module):  # type: ignore[misc]
    """[N, 1, 8, 8] to logits [N, 10]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = ConvBn(1, width, 3, activation=nn.ReLU())
        self.res1 = ConvBn(width, width, 3, activation=nn.ReLU())
        self.res2 = ConvBn(width, width, 3)
        self.depthwise1 = ConvBn(width, width, 3, groups=width, activation=nn.ReLU6())
        self.pointwise1 = ConvBn(width, 2 * width, 1, activation=nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.depthwise2 = ConvBn(2 * width, 2 * width, 3, groups=2 * width, activation=nn.ReLU6())
        self.pointwise2 = ConvBn(2 * width, 4 * width, 1, activation=nn.ReLU())
        self.fc = nn.Linear(4 * width, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return features [N, 4 * width] of images [N, 1, 8, 8]."""
        x = self.stem(x)
        x = torch.relu(x + self.res2(self.res1(x)))
        x = self.pool(self.pointwise1(self.depthwise1(x)))
        return self.pointwise2(self.depthwise2(x)).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits [N, 10] of images [N, 1, 8, 8]."""
        return self.fc(self.features(x))


def write_conv_bn(graph: GraphWriter, x: str, layer: ConvBn, name: str) -> str:
    """Write a ConvBn as Conv, BatchNormalization and Relu or Clip."""
    conv: Any = layer[0]
    norm: Any = layer[1]
    kernel = int(conv.kernel_size[0])
    weight = graph.constant(conv.weight.detach().numpy(), f"{name}.weight")
    x = graph.node(
        "Conv",
        (x, weight),
        name,
        kernel_shape=[kernel, kernel],
        strides=[1, 1],
        pads=[kernel // 2] * 4,
        dilations=[1, 1],
        group=conv.groups,
    )
    parameters = [
        graph.constant(tensor.detach().numpy(), f"{name}.bn.{key}")
        for key, tensor in (
            ("scale", norm.weight),
            ("bias", norm.bias),
            ("mean", norm.running_mean),
            ("var", norm.running_var),
        )
    ]
    x = graph.node(
        "BatchNormalization", (x, *parameters), f"{name}.bn", epsilon=norm.eps, momentum=0.9
    )
    if isinstance(layer[2], nn.ReLU6):
        bounds = [graph.constant(np.float32(v), f"{name}.bound{v}") for v in (0, 6)]
        return graph.node("Clip", (x, *bounds), f"{name}.relu6")
    return graph.node("Relu", (x,), f"{name}.relu") if isinstance(layer[2], nn.ReLU) else x


def write_linear(graph: GraphWriter, x: str, layer: nn.Linear, name: str) -> str:
    """Write a linear layer on [N, K] as Gemm."""
    weight = graph.constant(layer.weight.detach().numpy(), f"{name}.weight")
    bias = graph.constant(layer.bias.detach().numpy(), f"{name}.bias")
    return graph.node("Gemm", (x, weight, bias), name, transB=1)


def write_features(graph: GraphWriter, x: str, net: DigitsCnn, prefix: str = "") -> str:
    """Write the network up to its features [N, 4 * width]."""
    x = write_conv_bn(graph, x, net.stem, f"{prefix}stem")
    y = write_conv_bn(graph, x, net.res1, f"{prefix}res1")
    y = write_conv_bn(graph, y, net.res2, f"{prefix}res2")
    x = graph.node("Add", (x, y), f"{prefix}res.add")
    x = graph.node("Relu", (x,), f"{prefix}res.relu")
    x = write_conv_bn(graph, x, net.depthwise1, f"{prefix}depthwise1")
    x = write_conv_bn(graph, x, net.pointwise1, f"{prefix}pointwise1")
    x = graph.node("MaxPool", (x,), f"{prefix}pool", kernel_shape=[2, 2], strides=[2, 2])
    x = write_conv_bn(graph, x, net.depthwise2, f"{prefix}depthwise2")
    x = write_conv_bn(graph, x, net.pointwise2, f"{prefix}pointwise2")
    x = graph.node("GlobalAveragePool", (x,), f"{prefix}average")
    return graph.node("Flatten", (x,), f"{prefix}flatten", axis=1)


def export(net: DigitsCnn) -> onnx.ModelProto:
    """Return the ONNX model: `input` [N, 1, 8, 8] to `logits` [N, 10]."""
    graph = GraphWriter("digits_cnn")
    x = write_features(graph, graph.input("input", ("N", 1, 8, 8)), net)
    graph.output(write_linear(graph, x, net.fc, "fc"), "logits", ("N", 10))
    return graph.model()


def train(
    images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], epochs: int, seed: int
) -> DigitsCnn:
    """Train on images [N, 8, 8] in 0..1 with shifted copies; AdamW, one-cycle learning rate."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net, batch = DigitsCnn(WIDTH), 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - batch + 1, batch):
            rows = order[start : start + batch]
            x = torch.from_numpy(augment(images[rows], rng)[:, None])
            loss = loss_of(net(x), torch.from_numpy(labels[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()
    return net


def main() -> None:
    """Train, export, check the export against torch, and write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "digits_cnn")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, so that a rerun gives the same weights
    torch.use_deterministic_algorithms(True)
    split = load_split()
    net = train(split.train_images, split.train_labels, options.epochs, options.seed)
    model = export(net)
    options.output.mkdir(parents=True, exist_ok=True)
    onnx.save(model, options.output / "model.onnx")
    calibration = split.train_images[:CALIBRATION_SAMPLES, None]
    evaluation = split.test_images[:, None]
    np.savez_compressed(options.output / "calib.npz", input=calibration)
    np.savez_compressed(options.output / "eval.npz", input=evaluation, label=split.test_labels)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"input": evaluation})[0]
    with torch.no_grad():
        gap = float(np.abs(logits - net(torch.from_numpy(evaluation)).numpy()).max())
    accuracy = float(np.mean(logits.argmax(axis=1) == split.test_labels))
    print(f"held-out top-1 {accuracy:.4f} on {len(logits)} samples; max |onnx - torch| {gap:.1e}")


if __name__ == "__main__":
    main()
