# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Metrics of the models in the catalogue that are not built into the compiler.

Each takes the outputs and the samples, both by name with samples on the first axis, and returns
one number, higher is better. From a shell: ``PYTHONPATH=models qcompile compile ... --metric
model_metrics:pair_cosine_spearman``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

Arrays = Mapping[str, npt.NDArray[Any]]


def pair_cosine_spearman(outputs: Arrays, samples: Arrays) -> float:
    """Rank correlation of the cosine of sentence pairs with their human `score`.

    Args:
        outputs: `sentence_embedding` [2n, D]: the first sentence of every pair, then the second.
        samples: `score` [n].
    """
    embedding = np.asarray(outputs["sentence_embedding"], np.float64)
    embedding = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    first, second = np.split(embedding, 2)
    return float(spearmanr(np.sum(first * second, axis=1), samples["score"]).statistic)


def decision_agreement(outputs: Arrays, samples: Arrays) -> float:
    """Share of frames whose speech decision (`prob` above 0.5) is that of `score`."""
    decision = np.asarray(outputs["prob"]).reshape(-1) > 0.5
    return float(np.mean(decision == (np.asarray(samples["score"]).reshape(-1) > 0.5)))
