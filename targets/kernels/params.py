# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Tiling parameters of the matrix kernels: analytic defaults and the space a tuner searches.

The default minimises a small cost model: the cycles of one K-group of every register tile, from the
number of dot instructions, of loads and the latency of one accumulator's chain, plus the epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels import amx_plan, winograd_float_plan
from qcompiler.targets.kernels.plan import Geometry, TilePlan, geometry_of, tile_plan
from qcompiler.targets.kernels.winograd_plan import applies
from qcompiler.targets.kernels.workload import (
    FLOATS,
    PATCHES,
    ConvWorkload,
    GemmParams,
    MatmulWorkload,
)

__all__ = ["default_params", "fitted", "plain_weights", "space"]

_L2_BYTES = 256 * 1024
"""Half of the level-2 cache of the smallest machines we expect (Zen 3: 512 KiB)."""
_NEAR_BYTES = 28 * 1024
"""Activations that stay in level 1 (32 KiB or more) while column tiles pass."""
_FAR_BYTES = 4 * _L2_BYTES
"""Constants that no level 2 keeps from one use to the next."""
_UNPACKED_FOR = 64
"""Pixels that a task multiplies by weights with factors, at least: unpacking these takes about as
long as multiplying ten."""
_GAIN = 0.95
"""Share of the direct kernel's time that a Winograd kernel must stay within to be the default."""
_TASKS = 32
"""Tasks wanted, so that up to 16 threads share them evenly."""


def default_params(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> GemmParams:
    """The tiling used without tuning."""
    if amx_plan.worthwhile(workload, isa):
        return amx_plan.candidates(workload, isa)[0]
    direct = _tilings(workload, isa)[0]
    transformed = _transformed(workload, isa)
    if not isinstance(workload, ConvWorkload):
        return direct
    if transformed and transformed[0][0] < _GAIN * _direct_cycles(workload, isa, direct):
        return transformed[0][1]
    return direct


def space(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> tuple[GemmParams, ...]:
    """Candidates for a tuner, the default first, without duplicates."""
    geometry = geometry_of(workload, isa)
    if amx_plan.applies(workload, isa):
        tiles = amx_plan.candidates(workload, isa)
        vectors = _tilings(workload, isa)[:2]
        preferred = amx_plan.worthwhile(workload, isa)
        return tuple(dict.fromkeys([*tiles, *vectors] if preferred else [*vectors, *tiles]))
    found = dict.fromkeys(_tilings(workload, isa)[:9])
    orders: tuple[Literal["n", "m"], ...] = ("n", "m")
    for base in list(found)[:3]:
        rows = tile_plan(geometry, base).rows.tiles
        for m_block in (base.m_block // 2, base.m_block * 2, rows):
            for order in orders:
                found[replace(base, m_block=max(1, min(m_block, rows)), order=order)] = None
    if transformed := _transformed(workload, isa):
        best = [params for _, params in transformed[:8]]
        for algorithm in PATCHES:
            best += [p for _, p in transformed if p.algorithm == algorithm][:4]
        return tuple(dict.fromkeys([default_params(workload, isa), *best, *found]))
    if isinstance(workload, ConvWorkload) and applies(workload, isa):
        base, *others = found
        patches = [replace(base, algorithm=name, m_block=0) for name in PATCHES]
        others = [replace(params, algorithm="direct") for params in (base, *others)]
        return (base, *patches, *others)
    return tuple(found)


def fitted(
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: GemmParams,
    depths: Sequence[int],
    factors: bool = False,
) -> GemmParams:
    """The tiling for what packing found: sums as deep as `depths` in int16, factors of weights.

    Deep sums need a register for int16 beside each accumulator, so the tile gets fewer pixels: on
    16 registers three of two vectors, or two from depth 4 on, where LLVM spills with three (2 to
    8 % slower).  Without deep sums four pixels share more of the fixed cost of a tile (4 % for 64
    input channels).  Measured on Zen 5.

    A task unpacks each column tile with its factors once, so tasks get enough pixels to pay for it.
    """
    deep, grouped = max(depths) > 1, workload.epilogue.group > 0
    beside = 4 if max(depths) < 4 else 8
    # Weights in groups need float32 totals beside the accumulators.
    most = max(1, (isa.vector_registers - beside) // (1 + deep + grouped) // params.nv)
    if grouped and isa.dot == "smmla" and most > 1:
        most -= most % 2  # whole pairs of pixels
    geometry = geometry_of(workload, isa)
    if (deep or grouped) and params.mt > most:
        before = tile_plan(geometry, params)
        smaller = replace(params, mt=most)
        rows = tile_plan(geometry, smaller).rows
        blocks = -(-before.rows.tiles // before.row_block)
        params = replace(smaller, m_block=-(-rows.tiles // blocks))
    if factors:
        plan = tile_plan(geometry, params)
        pixels = plan.rows.size * geometry.ow
        least = min(plan.rows.tiles, -(-_UNPACKED_FOR // pixels))
        params = replace(params, m_block=max(params.m_block, least))
    return params


def plain_weights(
    workload: ConvWorkload | MatmulWorkload, isa: Isa, params: GemmParams, plain: bool
) -> GemmParams:
    """The parameters to pack with: weights in fewer bits than float32 are never transformed."""
    if plain or not winograd_float_plan.is_float_winograd(params):
        return params
    return _tilings(workload, isa)[0] if workload.a_dtype == "float32" else params


def _transformed(
    workload: ConvWorkload | MatmulWorkload, isa: Isa
) -> list[tuple[float, GemmParams]]:
    """(cycles, parameters) of float32 Winograd kernels, the best first."""
    if not isinstance(workload, ConvWorkload) or workload.a_dtype != "float32":
        return []
    geometry = geometry_of(workload, isa)
    registers = _register_tiles(geometry, isa, _step_cost(geometry, isa, packs_b=False))
    return winograd_float_plan.candidates(workload, isa, registers)


def _direct_cycles(workload: ConvWorkload, isa: Isa, params: GemmParams) -> float:
    """Estimated cycles of a direct float32 kernel, with those in which weights stream by."""
    geometry = geometry_of(workload, isa)
    cost = _step_cost(geometry, isa, packs_b=False)
    cycles = _cost(geometry, cost, params.lanes, params.mt, params.nv)
    plan = tile_plan(geometry, params)
    weights = 4 * geometry.k_groups * plan.nt * plan.tiles
    again = plan.row_blocks - 1 if weights > winograd_float_plan.NEAR_BYTES else 0
    far = weights / winograd_float_plan.FAR_RATE * (1 + 0.5 * again)
    return cycles + far * geometry.batch


def _tilings(workload: ConvWorkload | MatmulWorkload, isa: Isa) -> list[GemmParams]:
    """All register tiles with their blocks, the best by the cost model first."""
    geometry = geometry_of(workload, isa)
    packs_b = isinstance(workload, MatmulWorkload) and not workload.b_constant
    cost = _step_cost(geometry, isa, packs_b)
    tiles = sorted(
        _register_tiles(geometry, isa, cost),
        key=lambda tile: (_cost(geometry, cost, *tile), -tile[1], tile[2]),
    )
    if isinstance(workload, MatmulWorkload) and packs_b:
        images = math.prod(workload.batch_shape)
        return [_blocked_packing(geometry, images, *tile) for tile in tiles]
    return [_blocked(geometry, *tile) for tile in tiles]


def _lanes(geometry: Geometry, isa: Isa) -> int:
    """The widest vector that the output columns fill, at least 128 bits, of halves 64."""
    lanes = isa.lanes() * (2 if geometry.a_dtype == "float16" else 1)
    while lanes > 4 and lanes > geometry.n:
        lanes //= 2
    return lanes


@dataclass(frozen=True, slots=True)
class _StepCost:
    """What one K-group costs on a row: registers beside the accumulators, and instructions."""

    registers_per_vector: int
    """Registers for each weight vector."""
    registers: int
    """Other registers: activations, products, constants."""
    per_product: int
    """Instructions for each accumulator."""
    per_pixel: float
    """Instructions for each pixel's activations."""
    cycles: float
    """Cycles of the multiplication ports for each accumulator (two ports)."""
    latency: float
    """Cycles from one addition to an accumulator to the next."""
    held: int = 0
    """Registers for each pixel's activations, held over several K-groups."""
    alone: float = 0.0
    """Cycles to narrow a vector of outputs that has no neighbour to be packed with."""
    folded: float = 0.0
    """Instructions to add an accumulator to its total, as a share of each K-group."""


def _step_cost(geometry: Geometry, isa: Isa, packs_b: bool) -> _StepCost:
    if geometry.a_dtype == "float16":
        # Eight members of each pixel are multiplied by element; every 64 are added to totals that
        # registers rarely hold: loaded, widened, added and stored.
        return _StepCost(1, 6, 1, 0.125, 0.5, 4.0, held=1, folded=8 / 64)
    if geometry.a_dtype == "float32" and isa.architecture == "aarch64":
        # Loaded and multiplied by element; with fewer to spare LLVM spills or moves accumulators
        # about on some processors (Neoverse N1: 42 moves for 28 products).
        return _StepCost(1, 3, 1, 1, 0.5, 4.0)
    if geometry.a_dtype == "float32":
        return _StepCost(1, 1, 1, 1, 0.5, 4.0) if isa.fma else _StepCost(1, 2, 3, 1, 0.5, 4.0)
    if isa.dot == "vpdpbusd":
        return _StepCost(1, 1, 1, 1, 0.5, 5.0)
    if isa.dot == "smlal":
        # Weights come in pairs; what is multiplied takes registers of its own.
        return _StepCost(2, 8, 3, 2.25, 0.75, 4.0, held=1)
    if isa.dot in ("sdot", "smmla"):
        # Sixteen bytes of each pixel serve four K-groups by element, and two of smmla.
        if isa.dot == "sdot":
            return _StepCost(1, 1, 1, 0.25, 0.5, 4.0, held=1)
        return _StepCost(0, 3, 1, 1.0, 0.5, 4.0, held=1)
    if isa.dot == "maddubs" and not packs_b:
        # The registers are those of the K-groups that are multiplied by int16 pairs.
        return _StepCost(2, 4, 3, 1, 1.0, 2.0, alone=2.0)
    # Two-operand instructions (no FMA means no AVX) need copies.
    return _StepCost(2, 4, 4, 3, 1.0, 2.0) if isa.fma else _StepCost(1, 7, 6, 8, 1.0, 2.0)


def _register_tiles(geometry: Geometry, isa: Isa, cost: _StepCost) -> list[tuple[int, int, int]]:
    """(lanes, mt, nv) whose accumulators, operands and temporaries fit the register file."""
    lanes = _lanes(geometry, isa)
    vectors = -(-geometry.n // lanes)
    pixels = geometry.oh * geometry.ow
    found: list[tuple[int, int, int]] = []
    for nv in range(1, min(8, vectors) + 1):
        others = nv * cost.registers_per_vector + cost.registers
        most = (isa.vector_registers - others) // (nv + cost.held)
        paired = isa.dot == "smmla" and geometry.a_dtype not in FLOATS
        step, limit = (2, 8) if paired else (1, 8 if cost.folded else 14)
        sizes = range(step, min(most, limit, pixels + pixels % step) + 1, step)
        found.extend((lanes, mt, nv) for mt in sizes)
    return found


def _cost(geometry: Geometry, cost: _StepCost, lanes: int, mt: int, nv: int) -> float:
    """Estimated cycles of the whole kernel on one core that issues four instructions a cycle."""
    plan = tile_plan(geometry, GemmParams(lanes, mt, nv, 1 << 30, 1 << 30))
    total = 0.0
    for _, row_count, rows in plan.rows.kinds:
        for _, col_count, cols in plan.cols.kinds:
            pixels = rows * cols
            products = pixels * nv
            issued = products * (cost.per_product + cost.folded) + pixels * cost.per_pixel + nv + 3
            step = max(products * cost.cycles, issued / 4, cost.latency)
            epilogue = 25.0 + products * 3.0 + pixels * (nv % 2) * cost.alone
            total += row_count * col_count * (step * geometry.k_groups + epilogue)
    return total * plan.tiles * geometry.batch


def _blocked(geometry: Geometry, lanes: int, mt: int, nv: int) -> GemmParams:
    """Choose the blocks: activations of a task within half of level 2, enough tasks."""
    plan = tile_plan(geometry, GemmParams(lanes, mt, nv, 1 << 30, 1 << 30))
    width = {"float32": 4, "float16": 2}.get(geometry.a_dtype, 1)
    row_bytes = plan.rows.size * geometry.sh * geometry.w * geometry.c * width
    fits = max(1, _L2_BYTES // 2 // max(row_bytes, 1))
    m_block = min(plan.rows.tiles, fits)
    # Prefer to share out rows: each task then packs its band once and reads all weights.
    wanted = -(-_TASKS // geometry.batch)
    if geometry.direct and geometry.a_dtype not in FLOATS:
        return GemmParams(lanes, mt, nv, *_shared(plan, geometry, wanted, row_bytes, fits))
    blocks = max(-(-plan.rows.tiles // m_block), min(wanted, plan.rows.tiles))
    weight_bytes = geometry.k_groups * geometry.k_group * plan.nt * plan.tiles * width
    if weight_bytes > _L2_BYTES:  # weights stream from further away: few row blocks
        blocks = -(-plan.rows.tiles // m_block)
        # One block reads them once, but all activations again for each column tile.
        read = min(geometry.kh, geometry.sh) * min(geometry.kw, geometry.sw)
        activations = plan.rows.tiles * row_bytes * read // (geometry.sh * geometry.sw)
        again = weight_bytes * (blocks - 1)
        if activations <= _FAR_BYTES < weight_bytes and activations * plan.tiles < again:
            blocks = 1
    m_block = -(-plan.rows.tiles // blocks)
    blocks = -(-plan.rows.tiles // m_block)
    col_blocks = min(plan.tiles, max(1, -(-wanted // blocks)))
    n_block = -(-plan.tiles // col_blocks)
    return GemmParams(lanes, mt, nv, m_block, n_block)


def _shared(
    plan: TilePlan, geometry: Geometry, wanted: int, row_bytes: int, fits: int
) -> tuple[int, int]:
    """Share out rows and columns so that the least is read from beyond level 1.

    Each block of rows reads all weights.  Its activations are read once for each block of columns
    where level 1 keeps them, else for each column tile.

    Args:
        plan: The register tiles, in one block.
        geometry: A product whose activations are read in place.
        wanted: Tasks of an image.
        row_bytes: Bytes of activations of a row of tiles.
        fits: Most rows of tiles of a block.

    Returns:
        Row tiles and column tiles of a block.
    """
    weights = geometry.k_groups * geometry.k_group * plan.nt * plan.tiles
    far = 3 if weights > _L2_BYTES else 1
    rows = plan.rows.tiles
    found = []
    for m_block in {-(-rows // blocks) for blocks in range(1, rows + 1)}:
        if m_block > max(fits, 1):
            continue
        blocks = -(-rows // m_block)
        n_block = -(-plan.tiles // min(plan.tiles, -(-wanted // blocks)))
        shares = -(-plan.tiles // n_block)
        missing = max(0, wanted // 2 - blocks * shares)
        again = shares if m_block * row_bytes <= _NEAR_BYTES else plan.tiles
        read = rows * row_bytes * again + weights * blocks * far
        found.append((missing, read, m_block, n_block))
    return min(found)[2:]


def _blocked_packing(geometry: Geometry, images: int, lanes: int, mt: int, nv: int) -> GemmParams:
    """Choose the blocks where each task packs its own block of B: split columns before rows."""
    plan = tile_plan(geometry, GemmParams(lanes, mt, nv, 1 << 30, 1 << 30))
    wanted = -(-_TASKS // 2 // images)
    col_blocks = min(plan.tiles, wanted)
    row_blocks = max(1, min(wanted // col_blocks, plan.rows.tiles // 8))
    m_block = -(-plan.rows.tiles // row_blocks)
    return GemmParams(lanes, mt, nv, m_block, -(-plan.tiles // col_blocks))
