# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models that ONNX Runtime's quantizer makes of the stored, the built and the external models.

Both formats (QDQ, QOperator), static and dynamic, per tensor and per channel, unsigned and signed
activations.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnxruntime import quantization

from qcompiler.types import Array

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import catalogue

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Attributes:
        form: `QDQ`, `QOperator` or `dynamic`.
        activation: Storage of activations, `u8` or `s8` (dynamic: u8 always).
        weight: Storage of weights.
        per_channel: Whether weights have a scale per output channel.
    """

    form: str
    activation: str
    weight: str
    per_channel: bool

    def __str__(self) -> str:
        channel = "channel" if self.per_channel else "tensor"
        return f"{self.form}-{self.activation}{self.weight}-{channel}"


STATIC = tuple(
    Variant(form, activation, "s8", per_channel)
    for form in ("QDQ", "QOperator")
    for activation in ("u8", "s8")
    for per_channel in (False, True)
)
VARIANTS = (
    *STATIC,
    Variant("QDQ", "u8", "u8", False),
    Variant("QOperator", "u8", "u8", False),
    Variant("dynamic", "u8", "s8", False),
    Variant("dynamic", "u8", "s8", True),
    Variant("dynamic", "u8", "u8", False),
)
_TYPES = {"u8": quantization.QuantType.QUInt8, "s8": quantization.QuantType.QInt8}


@dataclass(frozen=True)
class Source:
    """A float model with data."""

    name: str
    model: onnx.ModelProto
    calibration: Arrays
    evaluation: Arrays
    decision: str
    """`top1`, `threshold` or `values`."""


NAMES = (
    *("digits_cnn", "digits_hybrid", "vgg_small", "mobilenet_v3_small", "mobilenet_v2"),
    *("resnet18", "resnet50", "encoder", "encoder_ids"),
    *("resnet20", "resnet20_raw", "resnet56", "ic_resnet8", "kws_dscnn", "mnist", "mobilenetv2"),
    *("minilm", "silero_vad", "ad_autoencoder", "vww_mobilenet"),
)
QUANTIZED = (
    *("ic_resnet8_qdq", "kws_dscnn_qdq", "mobilenetv2_qdq"),
    *("ad_autoencoder_qdq", "vww_mobilenet_qdq"),
)
"""External models that are quantized already."""
LARGE = (
    *("mobilenet_v3_small", "mobilenet_v2", "resnet18", "resnet50", "encoder", "encoder_ids"),
    *("resnet56", "mobilenetv2", "minilm", "silero_vad"),
)
"""Models with fewer variants: each format, dtype and granularity once."""
CASES: tuple[tuple[str, Variant | None], ...] = (
    *(
        (name, variant)
        for name in NAMES
        for variant in VARIANTS
        if name not in LARGE or variant in (STATIC[3], STATIC[4], STATIC[1], VARIANTS[11])
    ),
    *((name, None) for name in QUANTIZED),
)
UNLABELLED = {
    f"{name}{suffix}": f"mlperf_tiny/{name}_{kind}.onnx"
    for name in ("ad_autoencoder", "vww_mobilenet")
    for suffix, kind in (("", "float"), ("_qdq", "qdq_int8"))
}
"""External models that come without data: noise shows whether the integers agree."""
FEW = {"minilm": 8, "resnet56": 16, "mobilenetv2": 8, "mobilenetv2_qdq": 8}
"""Samples of the large external models."""


def source(name: str, count: int = 64) -> Source | None:
    """Load a model by name; None where the external models are absent."""
    count = min(count, FEW.get(name, count))
    if name in UNLABELLED:
        return _unlabelled(name)
    if name in {m.name for m in catalogue.STORED}:
        stored = catalogue.stored(name)
        data = [dict(np.load(p)) for p in (stored.calibration, stored.evaluation)]
        inputs = [i.name for i in stored.inputs]
        calibration, evaluation = ({k: d[k][:count] for k in inputs} for d in data)
        return Source(name, onnx.load(stored.path), calibration, evaluation, "top1")
    if name in {m.name for m in catalogue.BUILT}:
        entry = catalogue.built(name)
        rng = np.random.default_rng(3)
        few = 2 if entry.inputs[0].shape[-1] == 224 else 4
        made = {i.name: _random(rng, i, few) for i in entry.inputs}
        return Source(name, entry.build(), made, made, "values")
    found = catalogue.external(name, 16, count)
    if found is None:
        return None
    model = onnx.load(found.path)
    stored = {t.name for t in model.graph.initializer}
    inputs = [i.name for i in model.graph.input if i.name not in stored]
    calibration, evaluation = (
        {k: d[k] for k in inputs} for d in (found.calibration, found.evaluation)
    )
    if name == "silero_vad":  # one sequence of `count` frames beside the states: already a sample
        decision = "threshold"
        calibration, evaluation = ({k: v[0][None] for k, v in d.items()} for d in
                                   (calibration, evaluation))  # fmt: skip
    else:
        decision = "top1" if found.metric == "top1" else "values"
    return Source(name, model, calibration, evaluation, decision)


def _unlabelled(name: str) -> Source | None:
    root = catalogue.external_root()
    if root is None or not (root / UNLABELLED[name]).is_file():
        return None
    model = onnx.load(root / UNLABELLED[name])
    info = model.graph.input[0]
    shape = (8, *(d.dim_value for d in info.type.tensor_type.shape.dim[1:]))
    made = {info.name: np.random.default_rng(3).standard_normal(shape).astype(np.float32)}
    return Source(name, model, made, made, "values")


def _random(rng: np.random.Generator, info: Any, count: int) -> Array:
    shape = (count, *(1 if isinstance(d, str) else d for d in info.shape[1:]))
    if info.dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(1 if info.name == "attention_mask" else 0, 2, shape).astype(info.dtype)


def rows(samples: Arrays, name: str) -> Iterator[Arrays]:
    """Yield the feeds of one call each."""
    count = len(next(iter(samples.values())))
    for i in range(count):
        keep = slice(i, i + 1)
        yield {k: v[i] if name == "silero_vad" else v[keep] for k, v in samples.items()}


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self.feeds = feeds

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


def quantized(made_from: Source, variant: Variant) -> onnx.ModelProto:
    """Return the model that ONNX Runtime's quantizer makes."""
    logging.disable(logging.WARNING)
    model = onnx.ModelProto()
    model.CopyFrom(made_from.model)  # the quantizer moves weights out of what it is given
    if variant.per_channel and model.opset_import[0].version < 13:
        # Scales per channel came with opset 13: what the quantizer makes of less is no valid model.
        model = onnx.version_converter.convert_version(model, 13)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = Path(folder, "quantized.onnx")
            if variant.form == "dynamic":
                quantization.quantize_dynamic(
                    model,
                    target,
                    weight_type=_TYPES[variant.weight],
                    per_channel=variant.per_channel,
                )
            else:
                feeds = list(rows(made_from.calibration, made_from.name))[:16]
                quantization.quantize_static(
                    model,
                    target,
                    _Reader(iter(feeds)),
                    quant_format=quantization.QuantFormat[variant.form],
                    activation_type=_TYPES[variant.activation],
                    weight_type=_TYPES[variant.weight],
                    per_channel=variant.per_channel,
                )
            return onnx.load(target)
    finally:
        logging.disable(logging.NOTSET)
