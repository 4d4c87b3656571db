# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""When and how a convolution is computed by integer Winograd: sizes, proofs, weights; no TVM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.plan import Axis, split
from qcompiler.targets.kernels.workload import FLOATS, PATCHES, ConvWorkload, Patch

__all__ = [
    "FILTERS",
    "LINE",
    "NV",
    "Transformed",
    "WinogradPlan",
    "applies",
    "patches_by_time",
    "proved",
    "scale_of",
    "shift_of",
    "takes_pairs",
    "transform_weights",
    "winograd_plan",
]

Array = npt.NDArray[Any]

NV = 2
"""Vectors of output channels that are multiplied together."""
_CHANNELS = 16
"""Input channels are taken in multiples of this."""
_M_BYTES = 36 * 1024
"""Bytes of products of one task that stay in level 1 between multiplication and transform."""
_TASKS = 8
"""Tasks that a kernel wants before output channels are shared out too."""
_LEAST_COLUMNS = 128
"""Fewest output channels of a part.  Transforming the inputs again for each part costs one core
2 % for 256 channels in two parts and 9 % for 512 in four (F(2x2), Zen 5)."""
_V_BYTES = 512 * 1024
"""Most bytes of transformed inputs of one task: level 2 has them beside some weights."""
_NEAR_BYTES = 512 * 1024
"""Weights that level 2 keeps from one inference to the next."""
_FAR_RATE = 6.0
"""Bytes of far weights that arrive in a cycle (7.3 measured from a large level 3)."""
_STORED_BYTES = 2 * 1024 * 1024
"""Transformed weights that are worth their memory: larger ones are transformed by the kernel."""
_U_BYTES = 24 * 1024
"""Most bytes of a row of transformed weights: half of level 1."""
_CALL = 15.0
"""Cycles of a register tile beside its products."""
_MARGIN = 1.05
"""How much faster an estimate must be than the direct kernel's."""
LINE = 64
"""Bytes of a cache line."""

FILTERS: dict[int, Array] = {
    2: np.asarray([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32),
    4: np.asarray([[6, 0, 0], [4, 4, 4], [4, -4, 4], [1, 2, 4], [1, -2, 4], [0, 0, 12]], np.int32),
}
"""The filter transform G of F(m, 3) in integers: G times `scale_of(m)`, except that the last row
of F(4, 3) has half of that.  So all products of two rows with int8 weights fit int16 (12 * 12 *
128 = 18432), and the output transform scales nothing but the last value, by 2."""


def scale_of(outputs: int) -> int:
    """What the integer transforms of F(outputs, 3) multiply a one-dimensional result by."""
    return {2: 2, 4: 24}[outputs]


@dataclass(frozen=True, slots=True)
class WinogradPlan:
    """The sizes of one kernel."""

    patch: Patch
    """Output rows and columns of a patch."""
    channels: int
    lanes: int
    tiles: Axis
    """Register tiles of the patches of one task."""
    rows: int
    """Rows of patches of one task."""
    patch_rows: int
    patch_cols: int
    splits: int
    """Parts of the output channels, each a task of its own that transforms its inputs again."""
    blocks: int
    """Blocks of output channels of one part."""
    far: bool
    """Whether the transformed weights would come from beyond level 2."""
    late: bool
    """Whether the kernel transforms the weights, which are then held as they are."""
    chunk: int
    """Input channels that are multiplied at a time: all, or as many as `late` transforms."""

    @property
    def positions(self) -> int:
        """Products that a patch takes for each pair of channels."""
        return (self.patch[0] + 2) * (self.patch[1] + 2)

    @property
    def tasks(self) -> int:
        """Tasks of one image and one part of the output channels."""
        return -(-self.patch_rows // self.rows)

    @property
    def patches(self) -> int:
        """Patches of one task; the last task may have fewer."""
        return self.rows * self.patch_cols

    @property
    def columns(self) -> int:
        """Output channels of a block."""
        return NV * self.lanes

    @property
    def band_rows(self) -> int:
        """Rows of the padded input that a task reads."""
        return self.patch[0] * self.rows + 2

    @property
    def band_width(self) -> int:
        """Pixels in one row of the padded input."""
        return self.patch[1] * self.patch_cols + 2

    @property
    def v_step(self) -> int:
        """int16 elements of the transformed inputs from one position to the next.

        A cache line more than they take, or the stores of a patch's positions would fall into few
        sets of the cache; and so for the products.
        """
        return self.patches * self.channels + LINE // 2

    @property
    def u_step(self) -> int:
        """int16 elements of the transformed weights from one position to the next."""
        return self.chunk * self.columns + (LINE // 2 if self.late else 0)

    @property
    def u_size(self) -> int:
        """int16 elements of the weights that are transformed at a time: a row of positions."""
        return (self.patch[1] + 2) * self.u_step

    @property
    def m_step(self) -> int:
        """int32 elements of the products from one position to the next."""
        return self.patches * self.columns + LINE // 4


def takes_pairs(isa: Isa) -> bool:
    """Whether one instruction adds the products of pairs of channels."""
    return isa.intrinsic("madd_i16", isa.vector_bits) is not None


def applies(workload: ConvWorkload, isa: Isa) -> bool:
    """Whether there is a Winograd kernel for a convolution; `proved` says for which weights."""
    return (
        workload.a_dtype not in FLOATS
        and not workload.epilogue.group
        and (takes_pairs(isa) or isa.dot == "smlal")
        and workload.groups == 1
        and (workload.kh, workload.kw) == (3, 3)
        and workload.strides == (1, 1)
        and workload.dilations == (1, 1)
        and workload.c % _CHANNELS == 0
        and workload.co % (NV * isa.lanes()) == 0
    )


def proved(
    weight: npt.NDArray[np.int8], bias: Array, a_range: tuple[int, int], patch: Patch
) -> bool:
    """Whether the sums of a layer stay exact in patches of a size.

    The kernel has the sum times 4, 16 or 64 in int32, modulo 2**32, and shifts it right: that is
    exact where no sum can leave int32 by that factor.

    Args:
        weight: `[CO, C, 3, 3]`.
        bias: `[CO]`, int64.
        a_range: Least and largest activation minus the zero point; 0 (the padding) lies between.
        patch: Output rows and columns of a patch.
    """
    wide = weight.reshape(len(weight), -1).astype(np.int64)
    ups, downs = np.maximum(wide, 0).sum(1), np.minimum(wide, 0).sum(1)
    low, high = a_range
    most = (ups * high + downs * low + bias).max()
    least = (ups * low + downs * high + bias).min()
    limit = 1 << (31 - shift_of(patch))
    return bool(-limit <= least and most < limit)


def shift_of(patch: Patch) -> int:
    """The power of two in what the kernel multiplies a sum by."""
    scale = scale_of(patch[0]) * scale_of(patch[1])
    return (scale & -scale).bit_length() - 1


def winograd_plan(workload: ConvWorkload, isa: Isa, patch: Patch, rows: int = 0) -> WinogradPlan:
    """Choose the rows of a task and the register tile: little waste, work areas in the caches.

    Args:
        workload: The convolution.
        isa: The instruction set's row.
        patch: Output rows and columns of a patch.
        rows: Most rows of patches of a task; 0 for as many as the caches should get.
    """
    patch_rows, patch_cols = -(-workload.oh // patch[0]), -(-workload.ow // patch[1])
    lanes = isa.lanes()
    positions = (patch[0] + 2) * (patch[1] + 2)
    if rows == 0:
        near = _M_BYTES // (positions * NV * 4 * min(lanes, 8))
        fits = _V_BYTES // (positions * 2 * workload.c)
        rows = min(-(-near // patch_cols), fits // patch_cols)
    rows = max(1, min(patch_rows, rows))
    tasks = -(-patch_rows // rows)
    rows = -(-patch_rows // tasks)
    most = 6 if isa.fma else 4  # two-operand instructions need copies
    if takes_pairs(isa) and isa.vector_registers > 16:
        most = 12
    blocks = workload.co // (NV * lanes)
    splits = min(max(1, workload.co // _LEAST_COLUMNS), -(-_TASKS // (workload.n * tasks)))
    part = -(-blocks // splits)
    size = _weight_bytes(workload, patch)
    late = size > _STORED_BYTES and takes_pairs(isa)
    return WinogradPlan(
        patch=patch,
        channels=workload.c,
        lanes=lanes,
        tiles=split(rows * patch_cols, most),
        rows=rows,
        patch_rows=patch_rows,
        patch_cols=patch_cols,
        splits=-(-blocks // part),
        blocks=part,
        far=size > _NEAR_BYTES,
        late=late,
        chunk=_chunk(workload.c, (patch[1] + 2) * NV * lanes * 2) if late else workload.c,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Transformed:
    """The weights of a Winograd kernel."""

    weight: Array
    """int16 `[blocks, positions, C / 2, NV, lanes, 2]` (channel pairs last), or without pairs
    `[blocks, positions, C, NV, lanes]`; for the kernel to transform, int8 `[blocks, C / 2, NV, 9,
    lanes, 2]`."""
    patch: Patch

    @property
    def shift(self) -> int:
        """The power of two in what the kernel multiplies a sum, and so the bias, by."""
        return shift_of(self.patch)


def transform_weights(
    workload: ConvWorkload, isa: Isa, weight: npt.NDArray[np.int8], patch: Patch
) -> Transformed:
    """Transform OIHW weights, or lay them out for a kernel that does."""
    co, c = weight.shape[:2]
    lanes = isa.lanes()
    if winograd_plan(workload, isa, patch).late:
        split = weight.reshape(co // (NV * lanes), NV, lanes, c // 2, 2, 9)
        return Transformed(np.ascontiguousarray(split.transpose(0, 3, 1, 5, 2, 4)), patch)
    rows, cols = FILTERS[patch[0]], FILTERS[patch[1]]
    wide = weight.astype(np.int32)
    u = np.einsum("ai,ocij,bj->oabc", rows, wide, cols, optimize=True).astype(np.int16)
    u = u.reshape(co // (NV * lanes), NV, lanes, len(rows) * len(cols), c)
    if not takes_pairs(isa):
        return Transformed(np.ascontiguousarray(u.transpose(0, 3, 4, 1, 2)), patch)
    pairs = u.reshape(*u.shape[:4], c // 2, 2)
    return Transformed(np.ascontiguousarray(pairs.transpose(0, 3, 4, 1, 2, 5)), patch)


def _product(isa: Isa) -> float:
    """Cycles of 16 products and their addition: two ports of three take both, or one at once."""
    return 0.5 if isa.dot == "vpdpbusd" else 0.6


_INPUT = {2: 4, 4: 17}
_OUTPUT = {2: 4, 4: 14}
"""Additions and shifts of the one-dimensional transforms."""


def _chunk(channels: int, step: int) -> int:
    """Input channels, of `step` bytes, to transform at a time: a divisor of all of them."""
    sizes = range(_CHANNELS, max(_CHANNELS, _U_BYTES // step) + 1, _CHANNELS)
    return max(size for size in sizes if channels % size == 0)


def _weight_bytes(workload: ConvWorkload, patch: Patch) -> int:
    return (patch[0] + 2) * (patch[1] + 2) * workload.c * workload.co * 2


def _time(workload: ConvWorkload, isa: Isa, patch: Patch) -> float:
    """Estimated cycles of a kernel on one core; weights arrive while others are multiplied."""
    plan = winograd_plan(workload, isa, patch)
    c, co = workload.c, workload.co
    (m, n), positions = patch, plan.positions
    vectors = isa.vector_bits / 256
    ports = 2 if vectors > 1 else 3
    multiplied = sum(count * size for _, count, size in plan.tiles.kinds)
    products = multiplied * positions * c * co / 16 * _product(isa) / vectors
    calls = plan.tiles.tiles * positions * (c // plan.chunk) * (co // plan.columns)
    tiles = plan.tasks * (products + calls * (_CALL + 2 * NV * plan.tiles.size))
    streamed = _weight_bytes(workload, patch) / _FAR_RATE if plan.far and not plan.late else 0.0
    patches = plan.patch_rows * plan.patch_cols
    inputs = (n + 2) * _INPUT[m] + (m + 2) * _INPUT[n] + 2 * positions
    outputs = (n + 2) * _OUTPUT[m] + m * _OUTPUT[n] + positions + 12 * m * n
    operations = patches * (inputs * c / 16 * plan.splits + outputs * co / 8)
    if plan.late:
        operations += plan.tasks * c * co / 16 * (m + 2) * (21 + 3 * n + (n + 2))
    return workload.n * (max(tiles, streamed) + operations / ports / vectors)


def patches_by_time(workload: ConvWorkload, isa: Isa, direct: float) -> tuple[Patch, ...]:
    """The patches estimated faster than the direct kernel, the fastest first.

    Args:
        workload: The convolution.
        isa: The instruction set's row.
        direct: Time of the direct kernel's K-groups, relative to one `vpmaddubsw` and `vpmaddwd`
            for every 32 products (or one `vpdpbusd`).
    """
    if not applies(workload, isa):
        return ()
    c, co = workload.c, workload.co
    vectors = isa.vector_bits / 256
    step = 1.0
    if isa.dot == "vpdpbusd":  # wider vectors leave more time for loads
        step = 0.5 if vectors > 1 else 0.58
    width = workload.ow
    if isa.dot == "maddubs" and width > 4:  # tiles of four pixels, and a ragged one in each row
        width = -(-width // 4) * 4
    pixels = workload.n * workload.oh * width
    limit = pixels * co * (c * 9 / 32 * step * direct + 0.6) / vectors
    times = sorted((_MARGIN * _time(workload, isa, patch), patch) for patch in PATCHES.values())
    return tuple(patch for time, patch in times if time < limit)
