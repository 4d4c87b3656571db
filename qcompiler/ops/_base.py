# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The operator table: one `OpDef` row per operator.

A row says what the operator takes, at which stages it is legal, how its result types follow from
its operands (`infer`) and what it computes (`evaluate`, numpy; exact for integers). Everything
that must know operators (verifier, interpreter, importer, passes, lowering) reads the rows.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qcompiler.errors import QCompilerError
from qcompiler.types import Array, TensorType


class Stage(enum.Enum):
    """Stage of a graph: what operators and types it may hold."""

    FLOAT = "float"
    QDQ = "qdq"
    INTEGER = "integer"


ALL_STAGES = frozenset(Stage)
INTEGER_ONLY = frozenset({Stage.INTEGER})
QUANTIZED_STAGES = frozenset({Stage.QDQ, Stage.INTEGER})

AttrValue = int | float | str | bytes | bool | tuple[int, ...] | tuple[float, ...] | None
Attrs = Mapping[str, AttrValue]

REQUIRED: Any = object()
"""Default of an attribute that every node must give."""

InferFn = Callable[[Sequence["TensorType | None"], Attrs], tuple[TensorType, ...]]
EvalFn = Callable[[Sequence["Array | None"], Attrs, "EvalContext"], tuple[Array, ...]]


@dataclass(frozen=True, slots=True)
class EvalContext:
    """Types of one node's operands and results while it is evaluated.

    Attributes:
        inputs: Type of each operand (None for an omitted optional one).
        outputs: Declared type of each result; integer operators read their qparams from it.
    """

    inputs: tuple[TensorType | None, ...]
    outputs: tuple[TensorType, ...]


class OpKind(enum.Enum):
    """How a quantizer sees an operator.

    COMPUTE: multiplies operands (conv, matmul): the reason to quantize.
    UNARY: elementwise function of one operand: an 8-bit chain of them is one table.
    BINARY: elementwise with two operands.
    MOVEMENT: moves or selects elements (reshape, concat, max_pool): operand 0 (all operands for
        concat) and results share one quantization.
    NORM: softmax and normalizations.
    REDUCE: sums and means (pooling included).
    CAST: quantize, dequantize, requantize, cast.
    RECURRENT: a loop over time (lstm, gru, rnn) around a product with constant weights.
    OTHER: everything else; stays float.
    """

    COMPUTE = "compute"
    UNARY = "unary"
    BINARY = "binary"
    MOVEMENT = "movement"
    NORM = "norm"
    REDUCE = "reduce"
    CAST = "cast"
    RECURRENT = "recurrent"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class OpDef:
    """One operator.

    Attributes:
        name: Lower-case name as printed.
        inputs: Operand names in order; a trailing `?` marks an optional one (given as None when
            omitted before a later one), a trailing `*` any number (last only).
        attrs: Attribute name -> default; `REQUIRED` where there is none.
        infer: Result types from operand types and attributes; raises ShapeError. For operators
            whose results carry qparams or a dtype that operands do not determine, the verifier
            checks only the shape (`declared=True`).
        evaluate: Numpy meaning.
        stages: Stages in which the operator is legal.
        kind: See `OpKind`.
        declared: Result dtype and qparams are declared by the node's value, not inferred.
        outputs: Number of results; 0 = given by the node (split, opaque).
    """

    name: str
    inputs: tuple[str, ...]
    infer: InferFn
    evaluate: EvalFn
    attrs: Mapping[str, Any] = field(default_factory=dict)
    stages: frozenset[Stage] = ALL_STAGES
    kind: OpKind = OpKind.OTHER
    declared: bool = False
    outputs: int = 1

    @property
    def min_inputs(self) -> int:
        """Number of operands that must be given."""
        return sum(1 for n in self.inputs if not n.endswith(("?", "*")))

    @property
    def max_inputs(self) -> int | None:
        """Greatest number of operands; None = any."""
        return None if self.inputs and self.inputs[-1].endswith("*") else len(self.inputs)


_TABLE: dict[str, OpDef] = {}


def register(op: OpDef) -> OpDef:
    """Add a row to the table.

    Raises:
        QCompilerError: The name is taken.
    """
    if op.name in _TABLE:
        raise QCompilerError(f"operator {op.name!r} is registered twice")
    _TABLE[op.name] = op
    return op


def op_def(name: str) -> OpDef:
    """Return the row of an operator.

    Raises:
        QCompilerError: No such operator.
    """
    try:
        return _TABLE[name]
    except KeyError:
        raise QCompilerError(f"unknown operator {name!r}") from None


def all_ops() -> tuple[OpDef, ...]:
    """All rows, by name."""
    return tuple(_TABLE[k] for k in sorted(_TABLE))
