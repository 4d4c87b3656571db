# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Geometry of sliding windows, shared by convolution and pooling; pure numpy.

Arrays here are channels-first, [N, C, *spatial]; callers move axes for other layouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.types import Array, Shape


@dataclass(frozen=True, slots=True)
class Geometry:
    """How windows slide over spatial extents.

    Attributes:
        extents: Spatial extents of the input.
        kernel: Window extents.
        strides: Step per axis.
        pads: (begin, end) per axis.
        dilations: Distance between taps per axis.
        ceil_mode: Whether a last window may hang over the padded end (it must start inside the
            input or its begin padding).
    """

    extents: Shape
    kernel: Shape
    strides: Shape
    pads: tuple[tuple[int, int], ...]
    dilations: Shape
    ceil_mode: bool = False

    @property
    def outputs(self) -> Shape:
        """Number of windows per axis.

        Source: ONNX AveragePool-22 and MaxPool-22 (output shape formulas).
        """
        out = []
        for n, k, s, (b, e), d in zip(
            self.extents, self.kernel, self.strides, self.pads, self.dilations, strict=True
        ):
            room = n + b + e - (d * (k - 1) + 1)
            if room < 0:
                out.append(0)
            elif self.ceil_mode:
                o = -(-room // s) + 1
                out.append(o - 1 if (o - 1) * s >= n + b else o)
            else:
                out.append(room // s + 1)
        return tuple(out)

    @property
    def hang(self) -> tuple[int, ...]:
        """Elements past the padded end that the last window needs, per axis (ceil_mode)."""
        return tuple(
            max(0, (o - 1) * s + d * (k - 1) + 1 - (n + b + e))
            for n, k, s, (b, e), d, o in zip(
                self.extents,
                self.kernel,
                self.strides,
                self.pads,
                self.dilations,
                self.outputs,
                strict=True,
            )
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether a window is one element and windows tile the input exactly."""
        return (
            all(k == 1 for k in self.kernel)
            and all(s == 1 for s in self.strides)
            and not any(b or e for b, e in self.pads)
        )


def padded(x: Array, g: Geometry, value: Any) -> Array:
    """Return [N, C, *extents] with the geometry's padding, filled with `value`."""
    width = [(0, 0), (0, 0)]
    width += [(b, e + h) for (b, e), h in zip(g.pads, g.hang, strict=True)]
    if not any(b or e for b, e in width):
        return x
    return np.pad(x, width, constant_values=value)


def windows(x: Array, g: Geometry) -> Array:
    """Return a view [N, C, *outputs, *kernel] of a padded array."""
    n = len(g.kernel)
    span = tuple(d * (k - 1) + 1 for d, k in zip(g.dilations, g.kernel, strict=True))
    axes = tuple(range(2, 2 + n))
    view = np.lib.stride_tricks.sliding_window_view(x, span, axis=axes)
    pick: tuple[slice, ...] = (slice(None), slice(None))
    pick += tuple(slice(0, (o - 1) * s + 1, s) for o, s in zip(g.outputs, g.strides, strict=True))
    pick += tuple(slice(None, None, d) for d in g.dilations)
    return view[pick]


def taps(x: Array, g: Geometry) -> Sequence[tuple[tuple[int, ...], Array]]:
    """Return (kernel index, view [N, C, *outputs]) per tap of a padded array."""
    found = []
    for index in np.ndindex(*g.kernel):
        pick: tuple[slice, ...] = (slice(None), slice(None))
        pick += tuple(
            slice(i * d, i * d + (o - 1) * s + 1, s)
            for i, d, o, s in zip(index, g.dilations, g.outputs, g.strides, strict=True)
        )
        found.append((tuple(index), x[pick]))
    return found


def counts(g: Geometry, *, include_pad: bool) -> Array:
    """Return how many elements each window averages over, int64 [*outputs].

    With `include_pad` the padding counts, but never what hangs over it (ceil_mode).
    Source: ONNX AveragePool-22.
    """
    shape = tuple(g.extents)
    ones = np.ones((1, 1, *shape), np.int64)
    if include_pad:
        ones = np.pad(ones, [(0, 0), (0, 0), *g.pads], constant_values=1)
        hang = [(0, 0), (0, 0)] + [(0, h) for h in g.hang]
        ones = np.pad(ones, hang)
    else:
        ones = padded(ones, g, 0)
    total = np.zeros(g.outputs, np.int64)
    for _, view in taps(ones, g):
        total += view[0, 0]
    return total


def correlate(x: Array, w: Array, g: Geometry, group: int) -> Array:
    """Cross-correlate a padded [N, C, ...] with [O, C/group, *kernel]; dtype of the operands.

    The result is [N, O, *outputs]. Sums run in the BLAS's order, so the caller picks a dtype in
    which that order does not matter, or accepts rounding.
    """
    n, c = x.shape[:2]
    o = w.shape[0]
    outs = g.outputs
    if group > 1 and w.shape[1] == 1 and group == c:
        m = o // group
        y = np.zeros((n, c, m, *outs), x.dtype)
        kernel = w.reshape(c, m, *g.kernel)
        tail = (1,) * len(outs)
        for index, view in taps(x, g):
            at: tuple[Any, ...] = (slice(None), slice(None), *index)
            y += view[:, :, None] * kernel[at].reshape(c, m, *tail)
        return y.reshape(n, o, *outs)
    depth = (c // group) * math.prod(g.kernel)
    if g.is_pointwise:
        cols = x.reshape(n, group, depth, math.prod(outs))
    else:
        k = len(g.kernel)
        view = windows(x, g)
        order = (0, 1, *range(2 + k, 2 + 2 * k), *range(2, 2 + k))
        cols = view.transpose(order).reshape(n, group, depth, math.prod(outs))
    y = np.asarray(np.matmul(w.reshape(1, group, o // group, depth), cols))
    return y.reshape(n, o, *outs)
