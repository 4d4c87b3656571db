# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""When and how a convolution is computed by Winograd F(2x2, 3x3): sizes and weights, no TVM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.workload import ConvWorkload

__all__ = [
    "NV",
    "WinogradPlan",
    "applies",
    "prefers_winograd",
    "takes_pairs",
    "transform_weights",
    "winograd_plan",
]

NV = 2
"""Vectors of output channels that are multiplied together."""
_CHANNELS = 16
_MOST_CHANNELS = (2**31 - 1) // (4 * 255 * 128 * 9)
"""Input channels up to which 4 * conv fits int32, whatever the values."""
_PATCHES = 32
"""2x2 patches of outputs that one task wants."""
_TASKS = 8
"""Tasks that a kernel wants before output channels are shared out too."""
_LEAST_COLUMNS = 128
"""Fewest output channels of a part.  Transforming the inputs again for each part costs one core
2 % for 256 channels in two parts and 9 % for 512 in four (Zen 5)."""
_V_BYTES = 256 * 1024
"""Most bytes of transformed inputs of one task: half of a level-2 cache of 512 KiB."""

_G2 = np.asarray([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32)
"""Twice the filter transform G."""


@dataclass(frozen=True, slots=True)
class WinogradPlan:
    """The sizes of one kernel."""

    lanes: int
    mt: int
    """Patches in a register tile."""
    rows: int
    """Rows of patches of one task."""
    patch_rows: int
    patch_cols: int
    splits: int
    """Parts of the output channels, each a task of its own that transforms its inputs again."""
    blocks: int
    """Blocks of output channels of one part."""

    @property
    def tasks(self) -> int:
        """Tasks of one image and one part of the output channels."""
        return -(-self.patch_rows // self.rows)

    @property
    def patches(self) -> int:
        """Patches of one task, rounded up to whole register tiles."""
        return -(-self.rows * self.patch_cols // self.mt) * self.mt

    @property
    def columns(self) -> int:
        """Output channels of a block."""
        return NV * self.lanes

    @property
    def band_width(self) -> int:
        """Pixels in one row of the padded input."""
        return 2 * self.patch_cols + 2


def takes_pairs(isa: Isa) -> bool:
    """Whether one instruction adds the products of pairs of channels."""
    return isa.intrinsic("madd_i16", isa.vector_bits) is not None


def applies(workload: ConvWorkload, isa: Isa) -> bool:
    """Whether the kernel can compute a convolution exactly."""
    return (
        workload.a_dtype != "float32"
        and not workload.epilogue.group
        and (takes_pairs(isa) or isa.dot == "smlal")
        and workload.groups == 1
        and (workload.kh, workload.kw) == (3, 3)
        and workload.strides == (1, 1)
        and workload.dilations == (1, 1)
        and workload.c % _CHANNELS == 0
        and workload.co % (NV * isa.lanes()) == 0
        and workload.c <= _MOST_CHANNELS
    )


def winograd_plan(workload: ConvWorkload, isa: Isa) -> WinogradPlan:
    """Choose the rows of a task and the register tile: little waste, work areas in level 2."""
    patch_rows, patch_cols = -(-workload.oh // 2), -(-workload.ow // 2)
    fits = _V_BYTES // (16 * 2 * workload.c * patch_cols)
    rows = max(1, min(patch_rows, fits, -(-_PATCHES // patch_cols)))
    tasks = -(-patch_rows // rows)
    rows = -(-patch_rows // tasks)
    most = min((isa.vector_registers - 4) // NV, 6) if isa.fma else 4
    count = rows * patch_cols
    sizes = range(min(most, count), max(0, min(most, count) - 3), -1)
    mt = min(sizes, key=lambda size: -(-count // size) * (size + 0.5))
    blocks = workload.co // (NV * isa.lanes())
    splits = min(max(1, workload.co // _LEAST_COLUMNS), -(-_TASKS // (workload.n * tasks)))
    part = -(-blocks // splits)
    return WinogradPlan(isa.lanes(), mt, rows, patch_rows, patch_cols, -(-blocks // part), part)


def transform_weights(
    weight: npt.NDArray[np.int8], lanes: int, *, pairs: bool = True
) -> npt.NDArray[Any]:
    """2G g (2G)t of OIHW weights, int16 [blocks, 16, C / 2, NV, lanes, 2] (channel pairs last).

    Without `pairs` [blocks, 16, C, NV, lanes].
    """
    co, c = weight.shape[:2]
    wide = weight.astype(np.int32)
    u = np.einsum("ai,ocij,bj->oabc", _G2, wide, _G2, optimize=True).astype(np.int16)
    if not pairs:
        single = u.reshape(co // (NV * lanes), NV, lanes, 16, c)
        return np.ascontiguousarray(single.transpose(0, 3, 4, 1, 2))
    split = u.reshape(co // (NV * lanes), NV, lanes, 16, c // 2, 2)
    return np.ascontiguousarray(split.transpose(0, 3, 4, 1, 2, 5))


def prefers_winograd(workload: ConvWorkload, isa: Isa, direct: float) -> bool:
    """Whether Winograd is estimated faster than the direct kernel; never with VNNI.

    The estimates count cycles of the multiplication ports for one patch: products, transforms, the
    weights where they come from beyond level 2, and the direct kernel's cost of a pixel.  Measured
    on one Zen 5 core, GMAC/s as if direct, Winograd against direct at depth 1 (at most 144): 253
    to 124 for 56x56x64, 262 to 126 for 28x28x128, 246 to 130 for 14x14x256, 187 to 134 for
    7x7x512, 189 to 110 for 32x32x16, 254 to 117 for 8x8x64, 42 to 103 for 1x1x64.

    Args:
        workload: The convolution.
        isa: The instruction set's row.
        direct: Time of the direct kernel's K-groups, relative to one `vpmaddubsw` and `vpmaddwd`
            for every 32 products.
    """
    if isa.dot == "vpdpbusd" or not applies(workload, isa):
        return False
    plan = winograd_plan(workload, isa)
    c, co = workload.c, workload.co
    task = plan.rows * plan.patch_cols
    pixels = workload.oh * workload.ow / (plan.patch_rows * plan.patch_cols)
    products = c * co / 2 * plan.patches / task
    # 3.6 times the direct kernel's weights: beyond level 2 they must be worth their memory too.
    # ResNet-50's two layers of 512 channels at 7x7 gain 1 % of the model for 11 MB: not taken.
    streamed = 0.0 if 32 * c * co <= 2 * _V_BYTES else 5.0 * c * co / task
    winograd = products + streamed + 2 * c * plan.splits + 4 * co
    return 1.05 * winograd < pixels * (c * co * 9 / 32 * direct + co)
