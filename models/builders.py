# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Build well-known architectures with seeded weights, for speed work and structural tests.

Needs numpy and onnx only. The weights are random but behave like trained ones: probed_network.py
says how. The same seed gives the same weights up to rounding.

Usage: ``python models/builders.py resnet50 -o resnet50.onnx [--size 224] [--seed 0] ...``
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

sys.path.append(str(Path(__file__).resolve().parent))  # this file may be loaded by its path
from probed_network import Network, softmax


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
    mixed = softmax(probes["query"] @ probes["key"] / root) @ probes["value"]
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
