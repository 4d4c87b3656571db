# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The 1,797 digits of scikit-learn: one fixed split, and the augmentation used in training."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

SPLIT_SEED = 2024
TEST_SAMPLES = 600

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


class Split(NamedTuple):
    """Images [N, 8, 8] in 0..1 (grey level / 16) and labels [N]; no digit is in both halves."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


def load_split() -> Split:
    """Return the seeded split: 1,197 digits to train (and calibrate) with, 600 held out."""
    data = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(data.target))
    images = (data.images[order] / 16).astype(np.float32)
    labels = data.target[order].astype(np.int64)
    return Split(
        images[TEST_SAMPLES:], labels[TEST_SAMPLES:], images[:TEST_SAMPLES], labels[:TEST_SAMPLES]
    )


def augment(images: Images, rng: np.random.Generator) -> Images:
    """Return a copy of images [N, 8, 8], each moved, turned and stretched a little.

    Bilinear sampling. Standard deviations: shift 0.4 pixels, turn and shear 0.1 (6 degrees),
    stretch 6 %.
    """
    count = len(images)
    angle = rng.normal(0, 0.1, count)
    shear = rng.normal(0, 0.1, count)
    scale = rng.normal(1, 0.06, (count, 2))
    shift = rng.normal(0, 0.4, (count, 2))
    rows, columns = np.meshgrid(np.arange(8) - 3.5, np.arange(8) - 3.5, indexing="ij")
    cos, sin = (f(angle)[:, None, None] for f in (np.cos, np.sin))
    y = (cos * rows - sin * columns) * scale[:, 0, None, None] + shift[:, 0, None, None] + 3.5
    x = sin * rows + (cos + shear[:, None, None]) * columns
    x = x * scale[:, 1, None, None] + shift[:, 1, None, None] + 3.5
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    y, x = np.clip(y + 2, 0, 10.999), np.clip(x + 2, 0, 10.999)
    y0, x0 = y.astype(np.int64), x.astype(np.int64)
    fy, fx = y - y0, x - x0
    index = np.arange(count)[:, None, None]
    top = padded[index, y0, x0] * (1 - fx) + padded[index, y0, x0 + 1] * fx
    bottom = padded[index, y0 + 1, x0] * (1 - fx) + padded[index, y0 + 1, x0 + 1] * fx
    result: Images = (top * (1 - fy) + bottom * fy).astype(np.float32)
    return result
