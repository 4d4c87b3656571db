# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""With `QCOMPILER_EMULATE=arm-neon,arm-i8mm` the tests here run those rows under emulation."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

for _name in ("emulation", "machine_code"):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(
            _name, Path(__file__).with_name(f"{_name}.py")
        )
        assert _spec is not None
        assert _spec.loader is not None
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_name] = _module
        _spec.loader.exec_module(_module)

if os.environ.get("QCOMPILER_EMULATE"):
    sys.modules["emulation"].emulate_rows(os.environ["QCOMPILER_EMULATE"].split(","))
