# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Inputs that timed runs get: a real sample, for no random value is one that every model takes.

Random indices may lie outside of a table, random divisors may be 0, and what a model of pictures
makes of noise may be slower or faster than what it makes of pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qcompiler.data import SampleSet
from qcompiler.manifest import TensorSpec
from qcompiler.types import Array

__all__ = ["example_of"]


def example_of(
    inputs: Mapping[str, TensorSpec], *sources: SampleSet | None
) -> dict[str, Array] | None:
    """Return one batch for a model from the first samples that have all of its inputs, or None.

    Values are repeated where the samples are smaller than the compiled shape, as those of a range
    of sizes may be. Only the first chunk is read.

    Args:
        inputs: Of the model, by name.
        sources: Samples, the best first.
    """
    for samples in sources:
        chunk = None if samples is None else next(samples.chunks(), None)
        if chunk is None:
            continue
        found = {n: _filled(chunk[n], spec) for n, spec in inputs.items() if n in chunk}
        if len(found) == len(inputs) and all(a is not None for a in found.values()):
            return {n: a for n, a in found.items() if a is not None}
    return None


def _filled(values: Any, spec: TensorSpec) -> Array | None:
    """Return the start of some samples in a shape; None where they do not fit."""
    array = np.asarray(values)
    if array.ndim == len(spec.shape) + 1 and len(array):
        array = array[0]
    if array.ndim != len(spec.shape) or not array.size or array.dtype != spec.dtype.numpy:
        return None
    made: Array = np.resize(array, spec.shape)
    if spec.dtype.is_float and not np.isfinite(made).all() and not spec.infinite:
        return None
    return made
