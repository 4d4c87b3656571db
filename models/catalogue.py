# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What there is to compile: stored models, models built on demand, and larger external ones.

Tests, the demo and the benchmarks take their models from here. This folder is not an installed
package; load the file by path, or put the folder on ``sys.path``. Importing it makes
``model_metrics`` importable too, so that the metrics named here can be resolved.

The external models live in a folder of their own with a ``prepare.py``: the environment variable
QCOMPILER_MODELS, or ``../shared/models`` beside the repository. Where that is absent,
:func:`external` returns None and :func:`skip_reason` says why.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx

HERE = Path(__file__).resolve().parent
ENVIRONMENT = "QCOMPILER_MODELS"

Arrays = dict[str, npt.NDArray[Any]]


def _load_module(name: str, path: Path) -> ModuleType:
    """Import the file ``path`` as the module ``name``, once."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot import {path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # a module that ran in part must not be found by the next import
        del sys.modules[name]
        raise
    return module


_load_module("model_metrics", HERE / "model_metrics.py")


@dataclass(frozen=True)
class Input:
    """One input of a model."""

    name: str
    shape: tuple[int | str, ...]
    """Dimensions; a string is symbolic."""
    dtype: str = "float32"


@dataclass(frozen=True)
class StoredModel:
    """A trained model in this folder, with data."""

    name: str
    description: str
    inputs: tuple[Input, ...]
    metric: str
    float_score: float
    """The metric of the float model on the whole evaluation file, measured with ONNX Runtime."""

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return HERE / self.name / "model.onnx"

    @property
    def calibration(self) -> Path:
        """Sample file of unlabelled training data."""
        return HERE / self.name / "calib.npz"

    @property
    def evaluation(self) -> Path:
        """Sample file of labelled held-out data."""
        return HERE / self.name / "eval.npz"


@dataclass(frozen=True)
class BuiltModel:
    """An architecture with seeded weights, built on demand; it has no data and no metric."""

    name: str
    description: str
    inputs: tuple[Input, ...]
    builder: str
    """Name of a function in builders.py."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def build(self, **changes: Any) -> onnx.ModelProto:
        """Build the model, with the entry's arguments overridden by ``changes``."""
        module = _load_module("qcompiler_model_builders", HERE / "builders.py")
        function: Callable[..., onnx.ModelProto] = module.BUILDERS[self.builder]
        return function(**{**self.arguments, **changes})


@dataclass(frozen=True)
class ExternalModel:
    """A trained model outside the repository, with its data in memory."""

    name: str
    path: Path
    calibration: Arrays
    """Inputs by name, first axis = samples."""
    evaluation: Arrays
    """Inputs by name and `label` or `score`, first axis = samples."""
    metric: str
    """"top1" or "module:function"."""
    float_score: float
    """Published score of the float model on the whole evaluation split, not on this subset."""


_IMAGE = (Input("input", (1, 3, 224, 224)),)

STORED: tuple[StoredModel, ...] = (
    StoredModel(
        "digits_cnn",
        "residual and depthwise-separable CNN with BatchNormalization on 8x8 digits",
        (Input("input", ("N", 1, 8, 8)),),
        "top1",
        599 / 600,
    ),
    StoredModel(
        "digits_hybrid",
        "CNN on one digit, transformer on the rows of another; predicts their sum",
        (Input("image", ("N", 1, 8, 8)), Input("rows", ("N", 8, 8))),
        "top1",
        591 / 600,
    ),
)

BUILT: tuple[BuiltModel, ...] = (
    BuiltModel("resnet50", "ResNet-50 v1.5, 4.1 GMAC", _IMAGE, "resnet50"),
    BuiltModel("resnet18", "ResNet-18, 1.8 GMAC", _IMAGE, "resnet18"),
    BuiltModel("mobilenet_v2", "MobileNetV2, 0.30 GMAC", _IMAGE, "mobilenet_v2"),
    BuiltModel(
        "mobilenet_v3_small",
        "MobileNetV3-Small: HardSwish and squeeze-excite, 0.06 GMAC",
        _IMAGE,
        "mobilenet_v3_small",
    ),
    BuiltModel("vgg_small", "plain 3x3 CNN, 32 px", (Input("input", (1, 3, 32, 32)),), "vgg_small"),
    BuiltModel(
        "encoder",
        "6-layer, 384-wide BERT-like encoder, 128 tokens, 1.4 GMAC",
        (Input("input", (1, 128, 384)),),
        "encoder",
    ),
    BuiltModel(
        "encoder_ids",
        "the same encoder behind embedding tables and an attention mask",
        (Input("input_ids", (1, 128), "int64"), Input("attention_mask", (1, 128), "int64")),
        "encoder",
        {"vocab": 30522, "mask": True},
    ),
)

EXTERNAL: tuple[str, ...] = (
    "mobilenetv2",
    "mobilenetv2_qdq",
    "resnet20",
    "resnet20_raw",
    "resnet56",
    "ic_resnet8",
    "ic_resnet8_qdq",
    "kws_dscnn",
    "kws_dscnn_qdq",
    "mnist",
    "minilm",
    "silero_vad",
)
"""Names that :func:`external` knows."""

_METRICS = {
    "top1": "top1",
    "spearman of pair cosine": "model_metrics:pair_cosine_spearman",
    "agreement with score at 0.5": "model_metrics:decision_agreement",
}
"""Metric as prepare.py words it -> metric as the compiler takes it."""


Entry = TypeVar("Entry", StoredModel, BuiltModel)


def stored(name: str) -> StoredModel:
    """Return a stored model by name; KeyError lists the names."""
    return _find(STORED, name)


def built(name: str) -> BuiltModel:
    """Return a built-on-demand model by name; KeyError lists the names."""
    return _find(BUILT, name)


def _find(entries: tuple[Entry, ...], name: str) -> Entry:
    by_name = {entry.name: entry for entry in entries}
    if name not in by_name:
        raise KeyError(f"no model named {name!r}; known: {', '.join(by_name)}")
    return by_name[name]


def external_root() -> Path | None:
    """Return the folder of external models, or None where there is none."""
    named = os.environ.get(ENVIRONMENT)
    root = Path(named) if named else HERE.parent.parent / "shared" / "models"
    return root if (root / "prepare.py").is_file() else None


def skip_reason(name: str) -> str | None:
    """Say why :func:`external` cannot give ``name``; None where it can."""
    root = external_root()
    if root is None:
        return f"no external models: set {ENVIRONMENT} to a folder with prepare.py"
    if name.startswith("mobilenetv2") and importlib.util.find_spec("PIL") is None:
        return f"{name} needs Pillow to decode its pictures (pip install pillow)"
    path = root / _prepare(root).MODELS[name][0]
    return None if path.is_file() else f"{name}: {path} is missing"


def external(name: str, calib: int = 128, eval: int = 500) -> ExternalModel | None:
    """Load an external model with ``calib`` calibration and ``eval`` evaluation samples.

    minilm: samples are sentence pairs, so the inputs have twice as many rows. silero_vad: the
    frames are one sequence, given with one axis more, beside zero states; use the same number of
    calibration and evaluation frames for a fixed sequence length.

    Args:
        name: one of :data:`EXTERNAL`.
        calib: number of calibration samples.
        eval: number of evaluation samples, the first ones of the split.

    Returns:
        The model and its data, or None where :func:`skip_reason` gives a reason.

    Raises:
        KeyError: ``name`` is not one of :data:`EXTERNAL`.
    """
    if name not in EXTERNAL:
        raise KeyError(f"no external model named {name!r}; known: {', '.join(EXTERNAL)}")
    root = external_root()
    if root is None or skip_reason(name) is not None:
        return None
    file, make, metric, score = _prepare(root).MODELS[name]
    calibration, evaluation = make(calib, eval)
    if name == "silero_vad":
        calibration, evaluation = _with_states(calibration), _with_states(evaluation)
    return ExternalModel(name, root / file, calibration, evaluation, _METRICS[metric], float(score))


def _prepare(root: Path) -> ModuleType:
    return _load_module(f"qcompiler_external_models:{root}", root / "prepare.py")


def _with_states(samples: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Turn frames [T, 576] into one whole-sequence sample, with zero recurrent states."""
    state = np.zeros((1, 1, 1, 128), np.float32)
    whole = {key: value[None] for key, value in samples.items()}
    return {**whole, "h0": state, "c0": state}
