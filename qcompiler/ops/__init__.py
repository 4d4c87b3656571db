# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The operator table (see `_base`); importing the package registers every row."""

from qcompiler.ops import (  # noqa: F401  (importing a module registers its rows)
    cast,
    dynamic,
    elementwise,
    linear,
    movement,
    opaque,
    quantized,
    recurrent,
    reduce,
)
from qcompiler.ops._base import (
    REQUIRED,
    AttrValue,
    EvalContext,
    OpDef,
    OpKind,
    Stage,
    all_ops,
    op_def,
)

__all__ = [
    "REQUIRED",
    "AttrValue",
    "EvalContext",
    "OpDef",
    "OpKind",
    "Stage",
    "all_ops",
    "op_def",
]
