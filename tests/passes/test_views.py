# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Views of pictures: windows magnified to the picture's extents, and mirrors."""

from __future__ import annotations

import numpy as np
import pytest

from qcompiler.data import Batch
from qcompiler.passes.views import default_views, is_picture, magnified, mirrored, stretched, view
from qcompiler.types import DType, TensorType

PICTURES = TensorType((2, 3, 12, 10), DType.FLOAT32)


def test_what_is_a_picture() -> None:
    assert is_picture(PICTURES)
    assert not is_picture(TensorType((2, 4, 12, 10), DType.FLOAT32))
    assert not is_picture(TensorType((2, 3, 12), DType.FLOAT32))


@pytest.mark.parametrize(
    ("shape", "dtype", "views"),
    [
        ((1, 3, 65, 65), DType.FLOAT32, 4),
        ((8, 3, 224, 224), DType.FLOAT32, 4),
        ((1, 3, 32, 32), DType.FLOAT32, 0),
        ((1, 3, 64, 224), DType.FLOAT32, 0),
        ((1, 3, 224, 64), DType.FLOAT32, 0),
        ((1, 1, 224, 224), DType.FLOAT32, 0),
        ((1, 3, 224, 224), DType.UINT8, 0),
        ((1, 224), DType.FLOAT32, 0),
    ],
)
def test_only_large_pictures_get_views(shape: tuple[int, ...], dtype: DType, views: int) -> None:
    others = [TensorType((1, 7), DType.FLOAT32), TensorType((1, 3, 32, 32), DType.FLOAT32)]
    assert default_views([*others, TensorType(shape, dtype)]) == views
    assert default_views([]) == 0


@pytest.mark.parametrize("extent", [2, 5, 8, 13])
def test_a_line_stays_a_line_when_it_is_stretched(extent: int) -> None:
    x = np.linspace(0, 7, 8, dtype=np.float32)[None, :, None]
    got = stretched(x, 1, extent)
    places = np.clip((np.arange(extent) + 0.5) * 8 / extent - 0.5, 0, 7)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0, :, 0], places, atol=1e-6)
    np.testing.assert_array_equal(stretched(x, 1, 8), x)


def test_a_window_is_part_of_the_picture(rng: np.random.Generator) -> None:
    """Of a plane with two slopes a window shows a flatter one, between the same bounds."""
    rows, columns = np.mgrid[0:24, 0:24]
    x = np.broadcast_to((rows + 100 * columns).astype(np.float32), (1, 3, 24, 24))
    seen = set()
    for _ in range(20):
        got = magnified(x, rng)
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        assert x.min() <= got.min() < got.max() <= x.max()
        down = np.diff(got[0, 0], axis=0)[2:-2].mean()
        right = np.diff(got[0, 0], axis=1)[:, 2:-2].mean() / 100
        assert 0.5 < down <= 1.02
        assert 0.5 < right <= 1.02
        seen.add(float(got[0, 0, 0, 0]))
    assert len(seen) > 10


def test_a_view_turns_pictures_only(rng: np.random.Generator) -> None:
    flat = np.broadcast_to(np.arange(10, dtype=np.float32), PICTURES.shape)
    other = rng.standard_normal((2, 7)).astype(np.float32)
    batch = Batch({"x": flat, "other": other}, 2, 2)
    types = {"x": PICTURES, "other": TensorType((2, 7), DType.FLOAT32)}
    directions = set()
    for _ in range(20):
        got = view(batch, types, rng)
        assert got.samples == 2
        np.testing.assert_array_equal(got.inputs["other"], other)
        directions.add(bool(got.inputs["x"][0, 0, 0, 0] > got.inputs["x"][0, 0, 0, -1]))
    assert directions == {False, True}
    np.testing.assert_array_equal(mirrored(mirrored(flat)), flat)
    np.testing.assert_array_equal(batch.inputs["x"], flat)


def test_one_seed_gives_one_view() -> None:
    x = np.random.default_rng(3).standard_normal(PICTURES.shape).astype(np.float32)
    first, second = (magnified(x, np.random.default_rng(0)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
