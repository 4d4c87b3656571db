# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Compile trained ONNX models to exact integer kernels that keep an accuracy budget.

    import qcompiler
    model = qcompiler.compile("net.onnx", calibration="calib.npz")
    model.save("net.qcm")
    outputs = qcompiler.load("net.qcm")({"input": x})

Names are imported on first use: a process that only loads and runs never imports the compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompiler.data import Budget, Evaluation
    from qcompiler.driver import compile
    from qcompiler.errors import QCompilerError
    from qcompiler.plan import PrecisionPlan
    from qcompiler.regional import RegionOptions
    from qcompiler.registry import get_target, target_names
    from qcompiler.runtime import CompiledModel, load
    from qcompiler.tuning import Tuning

_HOME = {
    "Budget": "qcompiler.data",
    "CompiledModel": "qcompiler.runtime",
    "Evaluation": "qcompiler.data",
    "PrecisionPlan": "qcompiler.plan",
    "QCompilerError": "qcompiler.errors",
    "RegionOptions": "qcompiler.regional",
    "Tuning": "qcompiler.tuning",
    "compile": "qcompiler.driver",
    "get_target": "qcompiler.registry",
    "load": "qcompiler.runtime",
    "target_names": "qcompiler.registry",
}

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "CompiledModel",
    "Evaluation",
    "PrecisionPlan",
    "QCompilerError",
    "RegionOptions",
    "Tuning",
    "compile",
    "get_target",
    "load",
    "target_names",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'qcompiler' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
