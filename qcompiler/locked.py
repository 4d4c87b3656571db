# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The lock of one compilation: what decides it, and what is refused before it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qcompiler.data import Evaluation, SampleSource, load_samples
from qcompiler.errors import UsageError
from qcompiler.lock import Lock, options, versions
from qcompiler.passmanager import Pass
from qcompiler.regional import RegionOptions
from qcompiler.regional import to_json as calibrated
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import TargetSpec
from qcompiler.tuning import Tuning
from qcompiler.types import Array

if TYPE_CHECKING:
    from qcompiler.onnx_import import ModelSource


def decided_by(
    spec: TargetSpec,
    methods: str | Sequence[Pass],
    input_shapes: Mapping[str, Sequence[int]] | None,
    freeze: Mapping[str, Array | float | bool] | None,
    seed: int,
    regions: Mapping[str, RegionOptions] | None = None,
) -> Lock:
    """Return the lock of a compilation as far as it is known before any work."""
    tools: dict[str, str] = {}
    if spec.triple is not None:
        from qcompiler.targets.toolchain import toolchain

        tools = toolchain(spec.triple)
    elif (spec.isa or "").startswith("sm_"):
        from qcompiler.targets.cuda.nvcc import nvcc_version

        tools = {"nvcc": nvcc_version()}
    chosen = options(
        target=spec.name, methods=methods, input_shapes=input_shapes, freeze=freeze, seed=seed
    )
    observers = calibrated(regions or {})
    if observers:
        chosen["regions"] = observers
    return Lock({}, versions(tools), chosen)


def note_search(compiled: CompiledModel, precision: str) -> None:
    """Note in the lock that measurements chose the plan where `precision` was asked for."""
    lock = dict(compiled.artifact.lock or {})
    lock["options"] = {**lock.get("options", {}), "precision": precision}
    compiled.artifact = dataclasses.replace(compiled.artifact, lock=lock)
    compiled.report = {**(compiled.report or {}), "lock": lock}


def check_given(
    lock: Lock,
    decided: Lock,
    model: ModelSource,
    calibration: SampleSource | None,
    evaluate: Evaluation | Callable[[CompiledModel], float] | None,
    tuning: Tuning | None,
) -> None:
    """Refuse what differs from the lock before any work is done.

    Raises:
        LockError: The model, the data, an option or a version differs.
        UsageError: Tuning was asked for.
    """
    from qcompiler.onnx_import import model_digest

    if tuning is not None and tuning.searches:
        raise UsageError(
            "a locked compilation cannot tune: what tuning finds would differ from the lock",
            hint="give the records without a limit, or leave `locked` out",
        )
    digests = {"model": model_digest(model)}
    if calibration is not None:
        digests["calibration"] = load_samples(calibration).digest()
    if isinstance(evaluate, Evaluation):
        digests["evaluation"] = load_samples(evaluate.samples).digest()
    lock.check_inputs(dataclasses.replace(decided, digests=digests))
