# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""When and how a float32 convolution is computed by Winograd: sizes, weights, costs; no TVM.

F(m x m, 3 x 3) makes m x m outputs of a channel from (m + 2) x (m + 2) products in place of
9 m x m: 2.25 times fewer for m = 2 and 4 times fewer for m = 4.

The transforms evaluate polynomials at points.  m = 2 takes 0, 1, -1 and infinity, whose
coefficients are exact (1 and 1/2); its sums are shorter, and its results nearer to the exact ones
than those of a direct float32 sum.  m = 4 takes 0, the square roots of 2 and of 1/2 with both
signs, and infinity: twice the error of a direct sum, where the usual points 0, 1, -1, 2, -2 have
six times.  Largest error against float64, relative to the largest output, 256 channels of normal
values: 1.6e-6 direct, 0.5e-6 for m = 2, 2.5e-6 for m = 4, 1.0e-5 for m = 4 with the usual points.

Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks" (2016); B. Barabasz
et al., "Error Analysis and Improving the Accuracy of Winograd Convolution" (2020), for the points.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.plan import Axis, split
from qcompiler.targets.kernels.workload import Algorithm, ConvWorkload, GemmParams

__all__ = [
    "FAR_RATE",
    "NEAR_BYTES",
    "FloatWinogradPlan",
    "candidates",
    "float_winograd_plan",
    "is_float_winograd",
    "takes_float_winograd",
    "transform_float_weights",
]

_LEAST_CHANNELS = 16
"""Fewest input and output channels: with fewer, the transforms cost more than they save."""
NEAR_BYTES = 1024 * 1024
"""What stays in level 2 from one use to the next, beside what passes through."""
FAR_RATE = 4.5
"""Bytes in a cycle that come from beyond level 2, in time that products do not hide."""
_TASKS = 8
"""Tasks that a kernel wants before output channels are shared out too."""
_ROOT = float(np.sqrt(2.0))

_SIZES: dict[Algorithm, int] = {"winograd-2x2": 2, "winograd-4x4": 4}
_FILTERS: dict[int, Any] = {
    2: np.asarray([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float64),
    # Row p of a point p: (1, p, p * p) over the product of its distances to the others.
    4: np.asarray(
        [
            [1, 0, 0],
            [1 / 6, _ROOT / 6, 1 / 3],
            [1 / 6, -_ROOT / 6, 1 / 3],
            [-2 / 3, -_ROOT / 3, -1 / 3],
            [-2 / 3, _ROOT / 3, -1 / 3],
            [0, 0, 1],
        ],
        np.float64,
    ),
}
"""The filter transforms G."""


@dataclass(frozen=True)
class FloatWinogradPlan:
    """The sizes of one kernel."""

    size: int
    """Outputs of a patch along an axis."""
    lanes: int
    nv: int
    mt: int
    """Patches in a register tile."""
    task_rows: Axis
    """Rows of patches, cut into tasks."""
    patch_rows: int
    patch_cols: int
    tiles: int
    """Column tiles."""
    col_block: int
    """Column tiles of one task."""
    pitch: int
    """Elements from one transformed patch to the next."""

    @property
    def taps(self) -> int:
        """Inputs of a patch along an axis."""
        return self.size + 2

    @property
    def positions(self) -> int:
        """Products of a patch and a pair of channels."""
        return self.taps * self.taps

    @property
    def columns(self) -> int:
        """Output channels of a column tile."""
        return self.nv * self.lanes

    @property
    def col_tasks(self) -> int:
        """Parts of the output channels, each a task of its own."""
        return -(-self.tiles // self.col_block)

    @property
    def patches(self) -> int:
        """Most patches of one task."""
        return self.task_rows.size * self.patch_cols

    def weight_bytes(self, channels: int) -> int:
        """Bytes of the transformed weights of some input channels."""
        return 4 * self.positions * channels * self.tiles * self.columns

    @cached_property
    def fewest(self) -> int:
        """Fewest patches of one task."""
        return (self.task_rows.size - (self.task_rows.small > 0)) * self.patch_cols


def is_float_winograd(params: GemmParams) -> bool:
    """Whether parameters of a float32 convolution ask for Winograd."""
    return params.algorithm in _SIZES


def takes_float_winograd(workload: ConvWorkload, isa: Isa) -> bool:
    """Whether the kernel can compute a convolution."""
    return (
        workload.a_dtype == "float32"
        and workload.groups == 1
        and (workload.kh, workload.kw) == (3, 3)
        and workload.strides == (1, 1)
        and workload.dilations == (1, 1)
        and workload.c >= max(_LEAST_CHANNELS, isa.lanes())
        and workload.co >= max(_LEAST_CHANNELS, isa.lanes())
    )


def float_winograd_plan(workload: ConvWorkload, params: GemmParams) -> FloatWinogradPlan:
    """Cut a convolution as `params` say: `m_block` rows of patches, `n_block` column tiles."""
    size = _SIZES[params.algorithm]
    patch_rows, patch_cols = -(-workload.oh // size), -(-workload.ow // size)
    rows = split(patch_rows, min(params.m_block, patch_rows))
    tiles = -(-workload.co // (params.nv * params.lanes))
    fewest = (rows.size - (rows.small > 0)) * patch_cols
    return FloatWinogradPlan(
        size=size,
        lanes=params.lanes,
        nv=params.nv,
        mt=min(params.mt, fewest),
        task_rows=rows,
        patch_rows=patch_rows,
        patch_cols=patch_cols,
        tiles=tiles,
        col_block=min(params.n_block, tiles),
        # No power of two, so that the positions of a patch do not share a set of the cache.
        pitch=-(-workload.c // 16) * 16 + 16,
    )


def transform_float_weights(
    weight: npt.NDArray[np.float32], plan: FloatWinogradPlan, columns: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """G g Gt of OIHW weights, float32 `[T, positions, C, V, L]`.

    Args:
        weight: The weights.
        plan: Sizes.
        columns: Output channel of each lane, `[T, V, L]` (`plan.column_index`).
    """
    g = _FILTERS[plan.size]
    u = np.einsum("ai,ocij,bj->aboc", g, weight.astype(np.float64), g, optimize=True)
    u = u.reshape(plan.positions, *u.shape[2:])[:, columns]  # [positions, T, V, L, C]
    return np.ascontiguousarray(u.transpose(1, 0, 4, 2, 3), np.float32)


def candidates(
    workload: ConvWorkload, isa: Isa, registers: list[tuple[int, int, int]]
) -> list[tuple[float, GemmParams]]:
    """(estimated cycles, parameters) of the kernels worth considering, the fastest first.

    Args:
        workload: The convolution.
        isa: The instruction set's row.
        registers: (lanes, mt, nv) of the register tiles that fit.
    """
    if not takes_float_winograd(workload, isa):
        return []
    found: list[tuple[float, GemmParams]] = []
    for algorithm, size in _SIZES.items():
        patch_rows = -(-workload.oh // size)
        for lanes, mt, nv in registers:
            tiles = -(-workload.co // (lanes * nv))
            if nv > 4 or mt * nv < 8 or lanes != isa.lanes():
                continue
            for rows in sorted({split(patch_rows, r).size for r in range(1, patch_rows + 1)}):
                tasks = workload.n * -(-patch_rows // rows)
                parts = min(tiles, -(-_TASKS // tasks))
                block = -(-tiles // parts)
                params = GemmParams(lanes, mt, nv, rows, block, algorithm=algorithm)
                found.append((_cycles(workload, isa, params), params))
    found.sort(key=lambda pair: pair[0])
    return found


def _cycles(workload: ConvWorkload, isa: Isa, params: GemmParams) -> float:
    """Estimated cycles of a kernel on one core that starts two FMAs a cycle."""
    plan = float_winograd_plan(workload, params)
    c, mt, nv = workload.c, plan.mt, plan.nv
    flops = 0.5 if isa.fma else 1.5
    step = max(mt * nv * flops, (mt * nv + mt + 2 * nv + 3) / 4, 4.0)
    tile = plan.positions * (c * step + 20 + mt * nv * 1.5)
    tiles = sum(-(-(n * plan.patch_cols) // mt) * k for _, k, n in plan.task_rows.kinds)
    # Loads, arithmetic and stores of a vector of inputs, and of one of outputs.
    into, out = (24.0, 24.0) if plan.size == 2 else (110.0, 90.0)
    if isa.vector_registers < 32 and plan.size == 4:  # temporaries go through memory
        into, out = 1.3 * into, 1.3 * out
    patches = plan.patch_rows * plan.patch_cols
    transforms = patches * (-(-c // plan.lanes) * into + plan.tiles * nv * out)
    weights = plan.weight_bytes(c)
    inputs = 4.0 * plan.positions * plan.pitch * plan.patches
    far = weights / FAR_RATE * (plan.task_rows.tiles if weights > NEAR_BYTES else 1)
    if inputs + 4.0 * plan.positions * c * plan.columns > 1.5 * NEAR_BYTES:
        far += inputs / FAR_RATE * (plan.tiles - 1) * plan.task_rows.tiles
    return workload.n * (tiles * plan.tiles * tile + transforms + far)
