# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""With `QCOMPILER_EMULATE=arm-neon,arm-i8mm` the tests here run those rows under emulation."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # the modules beside the tests, by their names

if os.environ.get("QCOMPILER_EMULATE"):
    import emulation

    emulation.emulate_rows(os.environ["QCOMPILER_EMULATE"].split(","))
