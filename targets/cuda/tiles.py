# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How a product is cut into tiles: the candidates, and the analytic choice among them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qcompiler.targets.cuda.arch import Arch


@dataclass(frozen=True, slots=True)
class Tile:
    """A cut of a product; see kernels/product.cuh."""

    bm: int
    """Rows of a block."""
    bn: int
    """Columns of a block."""
    bk: int
    """Bytes along K per step."""
    wm: int
    """Rows of a warp."""
    wn: int
    """Columns of a warp."""
    stages: int
    """Buffers in shared memory."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * (self.bm // self.wm) * (self.bn // self.wn)

    def shared(self, *, packed4: bool, out_bytes: int) -> int:
        """Return the bytes of shared memory (as qc_tile::SHARED)."""
        stage = self.bm * self.bk + self.bn * self.bk // (2 if packed4 else 1)
        result = self.bm * (self.bn * out_bytes + 16) if out_bytes <= 2 else 0
        return max(self.stages * stage, result)


# (bm, bn, wm, wn, rate): the rate is how much of the tensor cores' peak a full multiprocessor can
# reach with such tiles, relative to the best: larger tiles load less per product.
_SHAPES = (
    (128, 256, 64, 64, 1.0),
    (128, 128, 64, 32, 0.93),
    (128, 64, 32, 32, 0.78),
    (64, 128, 32, 32, 0.78),
    (64, 64, 32, 32, 0.66),
    (64, 32, 32, 16, 0.48),
    (32, 64, 16, 32, 0.48),
    (32, 32, 16, 16, 0.36),
)
_RATES = {shape[:4]: shape[4] for shape in _SHAPES}
_STEP_OVERHEAD = 600.0  # cycles-like units of a block's start and end, against bm * bn * steps


def candidates(
    arch: Arch, k_bytes: int, *, packed4: bool, out_bytes: int, sums: bool = False
) -> tuple[Tile, ...]:
    """Return every tile that fits, the order says nothing.

    Args:
        arch: The GPU.
        k_bytes: Bytes along K.
        packed4: Whether B holds 4-bit weights.
        out_bytes: Size of a result element.
        sums: Whether sums of rows and columns take registers beside the accumulators.
    """
    found = []
    depths = (32,) if k_bytes <= 32 else (64,) if k_bytes <= 64 else (64, 128)
    for bm, bn, wm, wn, _ in _SHAPES:
        if sums and wm * wn > 2048:
            continue  # the registers of a thread would not hold them
        for bk in depths:
            for stages in (4, 3, 2) if arch.async_copies else (2,):
                tile = Tile(bm, bn, bk, wm, wn, stages)
                pieces = bm * bk // 16
                if pieces % tile.threads:
                    continue
                if tile.shared(packed4=packed4, out_bytes=out_bytes) <= arch.shared_bytes:
                    found.append(tile)
    return tuple(found)


def choose(
    arch: Arch,
    rows: int,
    columns: int,
    k_bytes: int,
    batch: int,
    *,
    packed4: bool,
    out_bytes: int,
    sums: bool = False,
) -> Tile:
    """Return the tile with the least estimated time.

    Blocks run in waves over the multiprocessors; a wave takes as long as one tile's products at the
    rate of its shape. Among equal ones more buffers win, then shorter steps.
    """
    best: tuple[float, Tile] | None = None
    for tile in candidates(arch, k_bytes, packed4=packed4, out_bytes=out_bytes, sums=sums):
        blocks = -(-rows // tile.bm) * -(-columns // tile.bn) * batch
        waves = math.ceil(blocks / arch.multiprocessors)
        steps = -(-k_bytes // tile.bk)
        work = tile.bm * tile.bn * steps * tile.bk / 64
        rate = _RATES[(tile.bm, tile.bn, tile.wm, tile.wn)]
        cost = waves * (work / rate + _STEP_OVERHEAD * (tile.bm + tile.bn) / 64)
        # More buffers than steps only cost shared memory.
        cost *= 1.0 + 0.01 * abs(min(tile.stages, steps + 1) - (4 if arch.async_copies else 2))
        cost *= (
            1.0 + (0.005 if tile.bk == 128 else 0.0) + (0.02 if tile.stages > steps + 1 else 0.0)
        )
        if best is None or cost < best[0]:
            best = cost, tile
    assert best is not None  # the smallest tile fits every row of the table
    return best[1]
