# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Train the two-input digits network and write model and data to digits_hybrid/.

`image` [N, 1, 8, 8] is a digit seen by a CNN; `rows` [N, 8, 8] is another digit, read as a
sequence of eight rows by a two-layer transformer encoder. The target is the sum of the two
digits, 0 to 18. Pairs of the evaluation set are made of held-out digits only. In training each
branch also learns its own digit through a head that is not exported. Needs torch 2.13.0 (CPU)
and scikit-learn; takes a few minutes on one core. Everything is seeded.

Usage: ``python models/train_digits_hybrid.py [--epochs 150] [--output DIR]``
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from digits import Split, augment, load_split
from graph_writer import GraphWriter
from torch import nn
from train_digits_cnn import DigitsCnn, write_features, write_linear

HERE = Path(__file__).resolve().parent
CALIBRATION_SAMPLES = 256
WIDTH, HEADS, FFN, LAYERS, ROWS = 32, 4, 64, 2, 8
SUMS = 19

Pairs = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


class Layer(nn.Module):  # type: ignore[misc]
    """Pre-norm encoder layer on [N, 8, WIDTH] with its projections kept apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [N, 8, WIDTH]."""

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(-1, ROWS, HEADS, WIDTH // HEADS).transpose(1, 2)

        y = self.norm1(x)
        query, key, value = split(self.query(y)), split(self.key(y)), split(self.value(y))
        scores = query @ key.transpose(2, 3) / math.sqrt(WIDTH // HEADS)
        context = (scores.softmax(dim=-1) @ value).transpose(1, 2).reshape(-1, ROWS, WIDTH)
        x = x + self.output(context)
        y = self.narrow(nn.functional.gelu(self.wide(self.norm2(x))))
        return x + y


class RowEncoder(nn.Module):  # type: ignore[misc]
    """Rows [N, 8, 8] to features [N, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.position = nn.Parameter(torch.randn(ROWS, WIDTH) * 0.1)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean over positions of the normalised encoding."""
        x = self.embed(rows) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).mean(dim=1)


class Hybrid(nn.Module):  # type: ignore[misc]
    """Image branch, row branch, and a two-layer head on both features."""

    def __init__(self) -> None:
        super().__init__()
        self.image = DigitsCnn(24)
        self.rows = RowEncoder()
        self.rows_fc = nn.Linear(WIDTH, 10)
        self.fc1 = nn.Linear(96 + WIDTH, 64)
        self.fc2 = nn.Linear(64, SUMS)

    def forward(
        self, image: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of the sum [N, 19] and of each digit [N, 10]."""
        a, b = self.image.features(image), self.rows(rows)
        total = self.fc2(torch.relu(self.fc1(torch.cat([a, b], dim=1))))
        return total, self.image.fc(a), self.rows_fc(b)


def write_dense(graph: GraphWriter, x: str, layer: nn.Linear, name: str) -> str:
    """Write a linear layer on [N, 8, K] as MatMul and Add."""
    weight = graph.constant(layer.weight.detach().numpy().T, f"{name}.weight")
    x = graph.node("MatMul", (x, weight), f"{name}/MatMul")
    bias = graph.constant(layer.bias.detach().numpy(), f"{name}.bias")
    return graph.node("Add", (bias, x), f"{name}/Add")


def write_norm(graph: GraphWriter, x: str, layer: nn.LayerNorm, name: str) -> str:
    """Write a LayerNormalization over the last axis."""
    weight = graph.constant(layer.weight.detach().numpy(), f"{name}.weight")
    bias = graph.constant(layer.bias.detach().numpy(), f"{name}.bias")
    return graph.node(
        "LayerNormalization", (x, weight, bias), name, axis=-1, epsilon=float(layer.eps)
    )


def write_layer(graph: GraphWriter, x: str, layer: Layer, name: str) -> str:
    """Write one encoder layer, attention and Gelu in the primitive operators of an exporter."""
    split = graph.constant(np.array([0, ROWS, HEADS, WIDTH // HEADS], np.int64), f"{name}.split")
    merge = graph.constant(np.array([0, ROWS, WIDTH], np.int64), f"{name}.merge")
    y = write_norm(graph, x, layer.norm1, f"{name}.norm1")
    parts = {}
    for part, dense, perm in (
        ("query", layer.query, [0, 2, 1, 3]),
        ("key", layer.key, [0, 2, 3, 1]),
        ("value", layer.value, [0, 2, 1, 3]),
    ):
        projected = write_dense(graph, y, dense, f"{name}.{part}")
        shaped = graph.node("Reshape", (projected, split), f"{name}.{part}/Reshape")
        parts[part] = graph.node("Transpose", (shaped,), f"{name}.{part}/Transpose", perm=perm)
    scores = graph.node("MatMul", (parts["query"], parts["key"]), f"{name}/scores")
    root = graph.constant(np.float32(math.sqrt(WIDTH // HEADS)), f"{name}.root")
    scores = graph.node("Div", (scores, root), f"{name}/Div")
    weights = graph.node("Softmax", (scores,), f"{name}/Softmax", axis=-1)
    context = graph.node("MatMul", (weights, parts["value"]), f"{name}/context")
    context = graph.node("Transpose", (context,), f"{name}/Transpose", perm=[0, 2, 1, 3])
    context = graph.node("Reshape", (context, merge), f"{name}/Reshape")
    y = write_dense(graph, context, layer.output, f"{name}.output")
    x = graph.node("Add", (x, y), f"{name}/attention_add")
    y = write_norm(graph, x, layer.norm2, f"{name}.norm2")
    y = write_dense(graph, y, layer.wide, f"{name}.wide")
    sqrt2, one, half = (
        graph.constant(np.float32(value), f"{name}.{key}")
        for key, value in (("sqrt2", math.sqrt(2)), ("one", 1), ("half", 0.5))
    )
    erf = graph.node("Erf", (graph.node("Div", (y, sqrt2), f"{name}/gelu/Div"),), f"{name}/gelu")
    gate = graph.node("Add", (erf, one), f"{name}/gelu/Add")
    y = graph.node("Mul", (y, gate), f"{name}/gelu/Mul")
    y = graph.node("Mul", (y, half), f"{name}/gelu/Mul_half")
    y = write_dense(graph, y, layer.narrow, f"{name}.narrow")
    return graph.node("Add", (x, y), f"{name}/ffn_add")


def export(net: Hybrid) -> onnx.ModelProto:
    """Return the ONNX model: `image` [N, 1, 8, 8], `rows` [N, 8, 8] to `logits` [N, 19]."""
    graph = GraphWriter("digits_hybrid")
    image = graph.input("image", ("N", 1, 8, 8))
    rows = graph.input("rows", ("N", ROWS, 8))
    a = write_features(graph, image, net.image, "image.")
    x = write_dense(graph, rows, net.rows.embed, "rows.embed")
    position = graph.constant(net.rows.position.detach().numpy(), "rows.position")
    x = graph.node("Add", (x, position), "rows/position")
    for index, layer in enumerate(net.rows.layers):
        x = write_layer(graph, x, layer, f"rows.{index}")
    x = write_norm(graph, x, net.rows.norm, "rows.norm")
    b = graph.node("ReduceMean", (x,), "rows/mean", axes=[1], keepdims=0)
    x = graph.node("Concat", (a, b), "concat", axis=1)
    x = graph.node("Relu", (write_linear(graph, x, net.fc1, "fc1"),), "relu")
    graph.output(write_linear(graph, x, net.fc2, "fc2"), "logits", ("N", SUMS))
    return graph.model()


def pair(count: int, rng: np.random.Generator) -> Pairs:
    """Return two random orders of ``count`` digits that pair none with itself."""
    first = rng.permutation(count)
    return first, np.roll(first, 1)


def train(split: Split, epochs: int, seed: int) -> Hybrid:
    """Train on freshly drawn, augmented pairs of training digits; AdamW, one-cycle schedule."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images, labels = split.train_images, split.train_labels
    net, batch = Hybrid(), 64
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
    rounds = 2  # pairings per epoch
    steps = epochs * rounds * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for _ in range(epochs * rounds):
        first, second = pair(len(images), rng)
        for start in range(0, len(first) - batch + 1, batch):
            a, b = first[start : start + batch], second[start : start + batch]
            x = torch.from_numpy(augment(images[a], rng)[:, None])
            y = torch.from_numpy(augment(images[b], rng))
            targets = (labels[a] + labels[b], labels[a], labels[b])
            losses = [
                loss_of(logits, torch.from_numpy(target))
                for logits, target in zip(net(x, y), targets, strict=True)
            ]
            loss = losses[0] + losses[1] + losses[2]
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    net.eval()
    return net


def main() -> None:
    """Train, export, check the export against torch, and write the three files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "digits_hybrid")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, so that a rerun gives the same weights
    torch.use_deterministic_algorithms(True)
    split = load_split()
    net = train(split, options.epochs, options.seed)
    model = export(net)
    options.output.mkdir(parents=True, exist_ok=True)
    onnx.save(model, options.output / "model.onnx")
    rng = np.random.default_rng(options.seed + 1)
    a, b = (row[:CALIBRATION_SAMPLES] for row in pair(len(split.train_labels), rng))
    image, rows = split.train_images[a, None], split.train_images[b]
    np.savez_compressed(options.output / "calib.npz", image=image, rows=rows)
    a, b = pair(len(split.test_labels), rng)
    image, rows = split.test_images[a, None], split.test_images[b]
    label = split.test_labels[a] + split.test_labels[b]
    np.savez_compressed(options.output / "eval.npz", image=image, rows=rows, label=label)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"image": image, "rows": rows})[0]
    with torch.no_grad():
        reference = net(torch.from_numpy(image), torch.from_numpy(rows))[0].numpy()
    gap = float(np.abs(logits - reference).max())
    accuracy = float(np.mean(logits.argmax(axis=1) == label))
    print(f"held-out top-1 {accuracy:.4f} on {len(logits)} pairs; max |onnx - torch| {gap:.1e}")


if __name__ == "__main__":
    main()
