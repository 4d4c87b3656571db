# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How a depthwise convolution is tiled, and its constants packed for that.  NumPy only.

Layouts (B vectors of V channels, S steps: `Plan.steps`): `weight` `[B, S, 4, V]` int8 where four
rows make a group, or int16 `[B, S, 4, V / 2]` where two do; `bias` int32 and `multiplier` float32
`[B * V]` in packed order (`lanes.lane_channels`); eight `scalars` (`packing.SCALARS`).  The plain
form takes int16 `[KH * KW, CO]`, and bias and multipliers in the order of the channels.

`vpmaddubsw` adds two products with saturation to int16: it multiplies, groups of four, where no two
of them can leave int16 (`_pairs_fit`), which all weights of 7 bits promise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.lanes import lane_channels
from qcompiler.targets.kernels.packing import LIMITS, Facts, Packed, operand_shift
from qcompiler.targets.kernels.plan import Dot
from qcompiler.targets.kernels.workload import ConvWorkload, GemmValues

__all__ = [
    "Axis",
    "DepthwiseParams",
    "Plan",
    "default_params",
    "is_depthwise",
    "is_plain",
    "pack_depthwise",
    "space",
]

Array = npt.NDArray[Any]

STRIP_BYTES = 24 * 1024
"""Largest work area: it should stay in the first-level cache beside the weights."""
LANES = 16
"""Channels that the form by taps takes at a time."""
TILE_PRODUCTS = 400
"""Most dot instructions in one unrolled tile; above, compile time and code size suffer, and a
kernel too large for one output at a time takes the plain form."""


@dataclass(frozen=True, slots=True)
class DepthwiseParams:
    """How a depthwise kernel is tiled.  Any value is correct; speed differs."""

    gather: str
    """Axis whose taps are interleaved: "h" or "w"."""
    rows: int
    """Outputs along the gathered axis that share the interleaved rows."""
    cols: int
    """Outputs along the strip axis in a register tile."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    pad: int
    step: int
    """Distance between neighbours in the input, in elements."""
    out_step: int


@dataclass(frozen=True)
class Plan:
    """Everything about a kernel that follows from the workload, the row and the parameters."""

    workload: ConvWorkload
    isa: Isa
    params: DepthwiseParams
    by_bytes: bool = False
    """Whether `vpmaddubsw` multiplies, on a row that cannot add products to int32."""

    @cached_property
    def group(self) -> int:
        """Rows interleaved in one 32-bit lane."""
        return 4 if self.isa.adds_to_int32 or self.by_bytes else 2

    @cached_property
    def per_product(self) -> int:
        """Instructions to multiply a group and add it."""
        return 1 if self.isa.adds_to_int32 else 3 if self.by_bytes else 2

    @cached_property
    def multiplier(self) -> int:
        """Output channels for each input channel."""
        return self.workload.co // self.workload.c

    @cached_property
    def axes(self) -> tuple[Axis, Axis]:
        """The gathered and the strip axis."""
        w = self.workload
        h = Axis(w.h, w.oh, w.kh, w.strides[0], w.dilations[0], w.pads[0], w.w * w.c, w.ow * w.co)
        v = Axis(w.w, w.ow, w.kw, w.strides[1], w.dilations[1], w.pads[1], w.c, w.co)
        return (h, v) if self.params.gather == "h" else (v, h)

    @cached_property
    def rows(self) -> int:
        """Outputs along the gathered axis in a tile."""
        return min(self.params.rows, self.axes[0].out)

    @cached_property
    def cols(self) -> int:
        """Outputs along the strip axis in a register tile."""
        return min(self.params.cols, self.strip)

    @cached_property
    def offsets(self) -> list[int]:
        """Offsets along the gathered axis of the input rows that a tile reads, ascending."""
        a = self.axes[0]
        taps = {r * a.stride + k * a.dilation for r in range(self.rows) for k in range(a.kernel)}
        return sorted(taps)

    @cached_property
    def groups(self) -> int:
        """Groups of interleaved rows."""
        return -(-len(self.offsets) // self.group)

    def tap(self, row: int, slot: int) -> int | None:
        """Which tap of output `row` the input row in `slot` is; None where it is none."""
        a = self.axes[0]
        if slot >= len(self.offsets):
            return None
        tap, rest = divmod(self.offsets[slot] - row * a.stride, a.dilation)
        return tap if rest == 0 and 0 <= tap < a.kernel else None

    @cached_property
    def steps(self) -> list[tuple[int, int, int]]:
        """(strip tap, row, group) of the products of a tile that can be non-zero."""
        slots = range(self.group)
        return [
            (k, row, g)
            for k in range(self.axes[1].kernel)
            for row in range(self.rows)
            for g in range(self.groups)
            if any(self.tap(row, g * self.group + s) is not None for s in slots)
        ]

    @cached_property
    def products(self) -> int:
        """Dot instructions in a tile."""
        return len(self.steps) * 4 * self.params.cols

    def columns(self, outputs: int) -> int:
        """Input columns that `outputs` neighbouring outputs along the strip axis read."""
        b = self.axes[1]
        return (outputs - 1) * b.stride + (b.kernel - 1) * b.dilation + 1

    @cached_property
    def column_bytes(self) -> int:
        """Bytes of the work area for one input column."""
        return self.groups * 4 * self.lanes

    @cached_property
    def strip(self) -> int:
        """Outputs along the strip axis that share one filling of the work area."""
        out = self.axes[1].out
        parts = 1
        while self.columns(-(-out // parts)) * self.column_bytes > STRIP_BYTES and parts < out:
            parts += 1
        return -(-out // parts)

    @cached_property
    def lanes(self) -> int:
        """Channels in a vector."""
        return min(self.isa.vector_bits // 8, 1 << (self.workload.co.bit_length() - 1))

    @cached_property
    def starts(self) -> list[int]:
        """First channel of each vector; the last vector may overlap the one before."""
        count = self.workload.co
        return [min(first, count - self.lanes) for first in range(0, count, self.lanes)]

    @cached_property
    def cost(self) -> float:
        """Estimated instructions for one tile column of V channels, for each output."""
        b = self.axes[1]
        products = len(self.steps) * 4 * self.per_product
        fill = len(self.offsets) + self.groups * (12 if self.group == 4 else 10)
        columns = self.columns(self.strip) / self.strip if b.kernel > b.stride else b.kernel
        loads = self.groups * 4 * self.columns(self.cols) / self.cols
        return (products + fill * columns + loads) / self.rows + 24


def is_depthwise(workload: ConvWorkload) -> bool:
    """Whether the convolution is depthwise and of 8-bit activations."""
    return workload.groups == workload.c and workload.a_dtype in ("uint8", "int8")


def by_taps(workload: ConvWorkload, isa: Isa) -> bool:
    """Whether the workload is computed tap by tap, from products in int16.

    Up to nine taps that takes fewer instructions than to interleave four rows for `sdot`: 72 for
    16 results of a 3x3 kernel, epilogue included, where there are 85.
    """
    if isa.intrinsic("mul_s8", 128) is None or workload.co != workload.c or workload.co < LANES:
        return False
    return isa.dot == "smlal" or workload.kh * workload.kw <= 9


def is_plain(workload: ConvWorkload, isa: Isa, params: DepthwiseParams) -> bool:
    """Whether the workload needs the plain form."""
    multiplier = workload.co // workload.c
    if by_taps(workload, isa):
        return False
    if workload.co < 16 or multiplier not in (1, 2, 4, 8, 16):
        return True
    if isa.dot == "smlal":
        return True  # nothing multiplies and adds neighbours
    return Plan(workload, isa, params).products > TILE_PRODUCTS


def space(workload: ConvWorkload, isa: Isa) -> tuple[DepthwiseParams, ...]:
    """Parameters worth trying, the default first."""
    found = [default_params(workload, isa)]
    if by_taps(workload, isa):
        return tuple(found)  # it has no parameters
    for gather in ("h", "w"):
        for rows in (1, 2, 3, 4):
            for cols in (1, 2, 3, 4):
                params = DepthwiseParams(gather, rows, cols)
                plan = Plan(workload, isa, params)
                outputs = plan.axes[0].out >= rows and plan.axes[1].out >= cols
                if rows * cols <= 6 and outputs and plan.products <= TILE_PRODUCTS:
                    found.append(params)
    return tuple(dict.fromkeys(found))


def default_params(workload: ConvWorkload, isa: Isa) -> DepthwiseParams:
    """The analytic choice.

    Small tiles win (measured): with a 3 x 3 kernel and `vpdpbusd` the weights of one or two rows
    stay in registers, which is worth more than sharing them over columns.  Rows share what is
    interleaved only at stride 1.
    """
    if by_taps(workload, isa):
        return DepthwiseParams("h", 1, 1)
    best: list[tuple[float, str, DepthwiseParams]] = []
    for gather in ("h", "w"):
        one = Plan(workload, isa, DepthwiseParams(gather, 1, 1))
        a, b = one.axes
        if one.group == 4 and max(a.kernel, b.kernel) <= 3:
            tiles = [(2 if a.stride == 1 else 1, 1)]
        else:
            tiles = [(2, 2), (1, 2)] if a.stride == 1 else [(1, 2)]
        for rows, cols in [*tiles, (1, 1)]:
            params = DepthwiseParams(gather, min(rows, a.out), min(cols, b.out))
            plan = Plan(workload, isa, params)
            if plan.products <= TILE_PRODUCTS:
                best.append((plan.cost, gather, params))
                break
    return min(best)[2] if best else DepthwiseParams("h", 1, 1)


# Packing.


def pack_depthwise(
    workload: ConvWorkload,
    isa: Isa,
    params: DepthwiseParams,
    weight: Array,
    values: GemmValues,
) -> Packed:
    """Pack a depthwise convolution's constants.

    Args:
        workload: Shapes and dtypes.
        isa: The instruction set's row.
        params: The tiling the kernel will be built with.
        weight: `[CO, 1, KH, KW]` (OIHW), int8 with zero point 0.
        values: The layer's other numbers.

    Raises:
        CodegenError: an array has another shape or dtype than the workload says.
    """
    if weight.shape != workload.weight_shape or weight.dtype != np.int8:
        raise CodegenError(
            f"depthwise weights are {weight.dtype}{weight.shape}, expected "
            f"int8{workload.weight_shape}"
        )
    count = workload.co
    plain, by_bytes = is_plain(workload, isa, params), False
    # The plain form reads all bytes as uint8, the others as the dot instruction wants them.
    multiplied = "uint8" if plain else isa.a_dtype
    zero = values.a_zero_point + operand_shift(workload.a_dtype, multiplied)
    flat = weight.reshape(count, -1).astype(np.int64)
    bias = np.zeros(count, np.int64) if values.bias is None else values.bias.astype(np.int64)
    if bias.shape != (count,):
        raise CodegenError(f"bias has shape {bias.shape}, expected ({count},)")
    multiplier = np.broadcast_to(
        np.asarray(1.0 if values.multiplier is None else values.multiplier, np.float32), (count,)
    )
    scalars, saturating = _scalars(workload, values, flat, bias, multiplier)
    scalars[0] = zero
    if plain:
        arrays = {"weight": np.ascontiguousarray(weight.reshape(count, -1).T.astype(np.int16))}
        corrected = bias
        order = np.arange(count)
    elif by_taps(workload, isa):
        arrays = {"weight": np.ascontiguousarray(weight.reshape(count, -1).T)}
        arrays["corrected"] = _wrapped(bias - zero * flat.sum(1))
        corrected, order = bias, np.arange(count)
    else:
        top = LIMITS[workload.a_dtype][1] if values.a_qmax is None else values.a_qmax
        top += operand_shift(workload.a_dtype, multiplied)
        plan = Plan(workload, isa, params, by_bytes=isa.dot == "maddubs")
        if plan.by_bytes and not _pairs_fit(plan, weight[:, 0], top):
            plan = Plan(workload, isa, params)
        by_bytes = plan.by_bytes
        arrays = {"weight": _pack_weights(plan, weight[:, 0])}
        corrected = bias - zero * flat.sum(1)
        order = np.concatenate(
            [first + lane_channels(plan.lanes).reshape(-1) for first in plan.starts]
        )
    arrays["bias"] = _wrapped(corrected[order])
    arrays["multiplier"] = np.ascontiguousarray(multiplier[order])
    arrays["scalars"] = scalars
    dot: Dot = "maddubs" if by_bytes else "exact"
    if isa.adds_to_int32 and not plain:
        dot = "vpdpbusd" if isa.dot == "vpdpbusd" else "sdot"
    depths: tuple[int, ...] = (1,)
    if by_taps(workload, isa):
        # Products of two neighbouring taps fit int16 together, unless both weights are -128.
        dot = "smlal"
        taps = np.abs(flat)
        both = taps[:, 0::2][:, : taps.shape[1] // 2] + taps[:, 1::2]
        depths = (2 if both.size and both.max() * 128 < 2**15 else 1,)
    facts = Facts(dot, saturating, values.zero_point != 0, clip=False, depths=depths)
    return Packed(tuple(arrays.values()), tuple(arrays), facts)


def _wrapped(values: Array) -> Array:
    """int64 modulo 2**32 as int32."""
    wrapped: Array = values.astype(np.uint64).astype(np.uint32).view(np.int32)
    return wrapped


def _scalars(
    workload: ConvWorkload, values: GemmValues, weight: Array, bias: Array, multiplier: Array
) -> tuple[Array, bool]:
    """The eight scalars of `packing.SCALARS`, and whether the narrowing may do the clamp."""
    scalars = np.zeros(8, np.float32)
    dtype = workload.epilogue.out_dtype
    if dtype not in LIMITS:
        return scalars, False
    low, high = LIMITS[dtype]
    qmin = low if values.qmin is None else values.qmin
    qmax = high if values.qmax is None else values.qmax
    bound = np.abs(weight).sum(1) * 255 + np.abs(bias)
    reach = float((bound * np.abs(multiplier).astype(np.float64)).max())
    if workload.epilogue.residual_dtype is not None:
        reach += 2.0**17 * abs(float(values.residual_multiplier))
    fits = bool(bound.max() < 2**31) and reach < 2.0**30
    scalars[1:4] = values.zero_point, qmin - values.zero_point, qmax - values.zero_point
    scalars[4:6] = values.residual_multiplier, values.residual_zero_point
    return scalars, fits and (qmin, qmax) == (low, high)


def _pairs_fit(plan: Plan, weight: Array, largest: int) -> bool:
    """Whether no two neighbouring products of a group can leave int16 together.

    Args:
        plan: The plan with groups of four.
        weight: `[CO, KH, KW]`.
        largest: The largest activation as it is multiplied, 0 to 255.
    """
    taps = weight.astype(np.int64)
    if plan.params.gather == "w":
        taps = taps.transpose(0, 2, 1)
    for k, row, g in plan.steps:
        for first in (0, 2):
            found = [plan.tap(row, g * plan.group + first + member) for member in (0, 1)]
            pair = [taps[:, tap, k] for tap in found if tap is not None]
            high = sum(np.maximum(values, 0) for values in pair)
            low = sum(np.minimum(values, 0) for values in pair)
            if pair and (np.max(high) * largest > 32767 or np.min(low) * largest < -32768):
                return False
    return True


def _pack_weights(plan: Plan, weight: Array) -> Array:
    """Weights `[CO, KH, KW]` as vectors, for each block, step and accumulator.

    int8 where four rows make a group, int16 where two do; V bytes for each vector.
    """
    if plan.params.gather == "w":
        weight = weight.transpose(0, 2, 1)
    parts = []
    channels = lane_channels(plan.lanes)  # [4, L]
    for first in plan.starts:
        block = np.zeros((len(plan.steps), *channels.shape, plan.group), np.int16)
        for s, (k, row, g) in enumerate(plan.steps):
            for member in range(plan.group):
                tap = plan.tap(row, g * plan.group + member)
                if tap is not None:
                    block[s, :, :, member] = weight[first + channels, tap, k]
        parts.append(block.reshape(-1))
    packed = np.concatenate(parts)
    return packed.astype(np.int8) if plan.group == 4 else packed
