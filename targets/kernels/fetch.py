# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What a register tile asks of far caches while it multiplies, ahead of its use.

Layers whose operands fit no level 2 otherwise wait for memory before and after their products: the
residual and the lines of the output (read before they are written) at a tile's end, activations at
the next one's start.  Asked for evenly over the tile's own K-groups they arrive in that time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcompiler.targets.kernels.tir import Buffer, Expr, bind, prefetch

if TYPE_CHECKING:
    from qcompiler.targets.kernels.macro import MacroKernel, Source

__all__ = ["FAR_BYTES", "NEAR_GROUPS", "Ahead", "ahead_of"]

FAR_BYTES = 512 * 1024
"""Weights of a kernel from which they are fetched ahead."""
_LINE = 64
NEAR_GROUPS = 16
"""K-groups by which weights are asked for before they are multiplied: 100 to 200 cycles."""
_LEAST_GROUPS = 4
"""Fewest K-groups for each pixel of a tile over which its outputs are asked for."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What one register tile fetches."""

    weights: tuple[Buffer, Expr, list[int], int] | None
    """Of the next column tile: (buffer, first element, further ones, step of a K-group)."""
    activations: tuple[Buffer, Expr, int] | None
    """Of the next tile of pixels: (buffer, first element, step of a K-group)."""
    outputs: tuple[list[Buffer], list[Expr], int] | None
    """Of this tile: (buffers, first element of each line of a pixel, step of a pixel)."""
    pixels: int
    near: tuple[Buffer, Expr, int] | None = None
    """This tile's weights, into level 1: (buffer, first element, step of a K-group)."""
    groups: int = 0
    """K-groups for each pixel over which its outputs are asked for; 0: not at all."""

    def operands(self, k: Expr) -> None:
        """Ask for the operands of others, as part of K-group `k`."""
        if self.weights is not None:
            buffer, first, lines, step = self.weights
            for line in lines:
                prefetch(buffer, first + (k * step + line))
        if self.near is not None:
            buffer, first, step = self.near
            for line in range(0, step, _LINE // 4):
                prefetch(buffer, first + ((k + NEAR_GROUPS) * step + line), near=True)
        if self.activations is not None:
            buffer, first, step = self.activations
            prefetch(buffer, first + k * step, near=True)

    def results(self, pixel: Expr) -> None:
        """Ask for what the epilogue of a pixel reads or writes."""
        if self.outputs is not None:
            buffers, lines, step = self.outputs
            at = bind(pixel * step)
            for buffer in buffers:
                for line in lines:
                    prefetch(buffer, line + at, near=True)


def ahead_of(
    kernel: MacroKernel,
    source: Source,
    a_index: Expr,
    at: tuple[Expr, Expr],
    pixels: int,
    weight_tile: Expr,
    outputs: list[Expr],
) -> Ahead:
    """What a tile of `pixels` pixels from pixel `at` fetches.

    Args:
        kernel: The kernel.
        source: Where it reads activations.
        a_index: Element of the tile's first activation.
        at: Row and column of the first pixel.
        pixels: Pixels of the tile.
        weight_tile: Which column tile of the weights it multiplies.
        outputs: Element of the first pixel's first output, of each run of vectors; empty where
            they are not whole vectors.
    """
    g, plan = kernel.geometry, kernel.plan
    if kernel.facts.dot != "float" or kernel.facts.storage != "plain":
        return Ahead(_weights(kernel, at, pixels, weight_tile), None, None, pixels)
    activations = None
    if g.direct and g.k_rows * g.k_cols == 1 and (g.sh, g.w) == (1, 1):  # rows follow each other
        tile = pixels * g.c
        activations = (source.buffer, bind(a_index + tile), -(-tile // g.k_groups))
    groups = g.k_groups // pixels
    if not outputs or groups < _LEAST_GROUPS:
        found, groups = None, 0
    else:
        run = plan.nt if len(outputs) == 1 else plan.lanes
        lines = [bind(start + i) for start in outputs for i in range(0, run, _LINE // 4)]
        buffers = [b for b in (kernel.writer.residual, kernel.writer.out) if b is not None]
        found = (buffers, lines, g.groups * g.n)
    weight = kernel.constants["weight"]
    near = (weight, bind(weight_tile * (g.k_groups * plan.nt)), plan.nt)
    weights = _weights(kernel, at, pixels, weight_tile)
    return Ahead(weights, activations, found, pixels, near, groups)


def _weights(
    kernel: MacroKernel, at: tuple[Expr, Expr], pixels: int, tile: Expr
) -> tuple[Buffer, Expr, list[int], int] | None:
    """What to fetch of the next column tile's weights.

    Large weights come from level 3 or memory, once for each column tile.  Fetched evenly by all
    register tiles of the column tile before, they arrive while others are multiplied.
    """
    g, facts = kernel.geometry, kernel.facts
    per_group = kernel.plan.nt * (1 if facts.dot == "float" else 4)
    line = _LINE // (4 if facts.dot == "float" else 1)
    panel = g.k_groups * per_group
    far = panel * kernel.plan.tiles // line * _LINE >= FAR_BYTES
    known = facts.dot in ("float", "vpdpbusd") and facts.storage == "plain"
    wide = kernel.isa.vector_bits == 512
    if not (far and known and wide and kernel.params.order == "n") or pixels >= g.oh * g.ow:
        return None
    share = -(-panel // (g.oh * g.ow))  # of one pixel
    step = -(-pixels * share // g.k_groups)
    row, col = at
    first = bind((tile + 1) * panel + (row * g.ow + col) * share)
    return kernel.constants["weight"], first, list(range(0, min(step, 4 * line), line)), step
