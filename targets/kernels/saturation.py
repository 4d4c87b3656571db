# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Compile-time proof that `vpmaddubsw` cannot saturate.

The instruction multiplies u8 by s8 and adds each pair of neighbouring products into int16 with
saturation.  With activations in [0, a_max] the pair (w0, w1) gives sums between
`a_max * (min(w0, 0) + min(w1, 0))` and `a_max * (max(w0, 0) + max(w1, 0))`: it is *safe* when both
lie within int16.  Weights are constants, so each pair is checked when the kernel is packed.

Source: Intel SDM, PMADDUBSW; shared design notes, "Below the multiply floor on x86".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["unsafe_groups"]


def unsafe_groups(
    packed: npt.NDArray[np.int8], a_max: int, tile_axes: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Which K-groups of each tile hold a pair that could saturate.

    Args:
        packed: Weights, the last axis the dot instruction's group (even).
        a_max: Largest stored activation, 0..255.
        tile_axes: Axes of `packed` (before the last) that one instruction sequence covers: a group
            is unsafe when any of their lanes is.

    Returns:
        Booleans of the shape of `packed` without `tile_axes` and the last axis.
    """
    wide = packed.astype(np.int32)
    pairs = wide.reshape(*packed.shape[:-1], packed.shape[-1] // 2, 2)
    high = np.maximum(pairs, 0).sum(-1) * a_max
    low = np.minimum(pairs, 0).sum(-1) * a_max
    unsafe = ((high > 32767) | (low < -32768)).any(-1)
    return np.asarray(unsafe.any(axis=tile_axes))
