# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tune a model: quantize and shape it as `compile` does, and let the target measure its kernels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qcompiler.data import SampleSource
from qcompiler.driver import quantize_model
from qcompiler.interrupts import interruptible
from qcompiler.ir import Graph
from qcompiler.passmanager import PassContext, PassManager, ProgressFn, no_progress
from qcompiler.plan import PrecisionPlan
from qcompiler.registry import get_target
from qcompiler.targets.base import TargetSpec
from qcompiler.tuning import Tuning, TuningOutcome
from qcompiler.types import Array

if TYPE_CHECKING:
    from qcompiler.onnx_import import ModelSource

_STAND_INS = 4


def tune_model(
    model: ModelSource,
    tuning: Tuning,
    *,
    target: str | TargetSpec = "host",
    calibration: SampleSource | None = None,
    precision: str | PrecisionPlan | os.PathLike[str] = "w8a8",
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    freeze: Mapping[str, Array | float | bool] | None = None,
    seed: int = 0,
    progress: ProgressFn | None = None,
) -> TuningOutcome:
    """Search the kernel parameters of a model by measuring; the records hold what is found.

    Args and errors: as `qcompiler.compile`, for one size of every input. Without calibration
    samples, random ones stand in: the shapes of kernels do not depend on them, and only a few of
    the facts that their code depends on do.
    """
    from qcompiler.onnx_import import load_onnx

    report = progress or no_progress
    backend = get_target(target)
    if calibration is None:
        graph = load_onnx(model, input_shapes=input_shapes, freeze=freeze)
        calibration = _stand_in(graph, seed)
    result = quantize_model(
        model,
        spec=backend.spec,
        calibration=calibration,
        precision=precision,
        input_shapes=input_shapes,
        freeze=freeze,
        seed=seed,
        progress=report,
    )
    with interruptible():
        shaped = PassManager(backend.passes()).run(result.graph, PassContext(progress=report))
        return backend.tune(shaped, tuning, seed=seed, progress=report)


def _stand_in(graph: Graph, seed: int) -> list[dict[str, Array]]:
    """Return a few random samples that fit a graph's inputs."""
    rng = np.random.default_rng(seed)
    samples: list[dict[str, Array]] = [{} for _ in range(_STAND_INS)]
    for v in graph.inputs:
        for sample in samples:
            if v.dtype.is_float:
                sample[v.name] = rng.standard_normal(v.shape).astype(v.dtype.numpy)
            else:  # 0 and 1 are valid as indices and flags alike
                sample[v.name] = rng.integers(0, 2, v.shape).astype(v.dtype.numpy)
    return samples
