# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The order of channels that unpack instructions make.  NumPy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["lane_channels"]


def lane_channels(lanes: int) -> npt.NDArray[np.int64]:
    """Channel in each 32-bit lane of the four parts: shape [4, lanes / 4]."""
    lane = np.arange(lanes // 4)
    part = np.arange(4)[:, None]
    return lane // 4 * 16 + part * 4 + lane % 4
