# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The trained models outside the repository: tests skip, saying so, where they are absent."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from by_path import imported

from qcompiler.ir import Graph
from qcompiler.onnx_import import load_onnx
from qcompiler.types import Array

FOLDER = Path(
    os.environ.get("QCOMPILER_MODELS") or Path(__file__).resolve().parents[2] / "shared" / "models"
)

TRAINED = (
    "mobilenetv2",
    "resnet20",
    "resnet20_raw",
    "resnet56",
    "ic_resnet8",
    "kws_dscnn",
    "mnist",
    "minilm",
)
"""Trained networks by their names in the catalogue."""

each_model = pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/*.onnx")) or [None], ids=lambda p: p.stem if p else "none"
)
"""Parametrizes a test by `path`; `model_graph` skips where there is none."""


def skip() -> None:
    pytest.skip(f"no models in {FOLDER} (set QCOMPILER_MODELS)")


def model_graph(path: Path | None) -> Graph:
    """Import a model, with 32 tokens where their number is open."""
    if path is None or not path.exists():
        skip()
    shapes = {"input_ids": (1, 32)} if "minilm" in str(path) else None
    return load_onnx(str(path), input_shapes=shapes)


def noise(graph: Graph, rng: np.random.Generator) -> dict[str, Array]:
    """Return inputs that the model takes: normal floats, token ids, masks of 0 and 1."""
    feeds: dict[str, Array] = {}
    for v in graph.inputs:
        if v.dtype.is_float:
            feeds[v.name] = rng.standard_normal(v.shape).astype(np.float32)
        else:
            high = 2 if "mask" in v.name else 1000
            feeds[v.name] = rng.integers(0, high, v.shape).astype(v.dtype.numpy)
    return feeds


def prepare() -> ModuleType:
    """Import the script that makes samples of the models."""
    script = FOLDER / "prepare.py"
    if not script.is_file():
        skip()
    return imported("prepare_models", script)
