# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Every error that qcompiler raises on purpose, in one hierarchy.

A message says what failed, where, what was found, what was expected, and what to do next.
The structured fields let a tool show the same without parsing text. `exit_code` is the exit
status of the `qcompile` command for an error that reaches it.
"""

from __future__ import annotations

from typing import Any, ClassVar

MESSAGE_CHARACTERS = 3000
"""Longer messages lose their middle: a damaged model holds lists of any length."""


def _bounded(text: str) -> str:
    if len(text) <= MESSAGE_CHARACTERS:
        return text
    head, tail = MESSAGE_CHARACTERS * 2 // 3, MESSAGE_CHARACTERS // 4
    return f"{text[:head]} ... ({len(text) - head - tail} more characters) ... {text[-tail:]}"


class QCompilerError(Exception):
    """Root of all errors.

    Attributes:
        node: Name of the graph node the error is about, if any.
        value: Name of the tensor the error is about, if any.
        hint: What the user can do next, as one sentence.
    """

    exit_code: ClassVar[int] = 2

    def __init__(
        self,
        message: str,
        *,
        node: str | None = None,
        value: str | None = None,
        hint: str | None = None,
    ) -> None:
        message = _bounded(message)
        super().__init__(message)
        self.message = message
        self.node = node
        self.value = value
        self.hint = hint

    def __str__(self) -> str:
        """Return the message followed by the hint."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(QCompilerError):
    """An argument or option that makes no sense: unknown name, conflicting options."""


class ModelError(QCompilerError):
    """The model cannot be read or is not valid ONNX."""


class UnsupportedOpError(ModelError):
    """Operators that cannot be compiled; all of them are collected into one message."""

    def __init__(self, message: str, *, operators: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.operators = operators


class ShapeError(ModelError):
    """Shapes or dtypes of an operator's operands do not fit together."""


class DataError(QCompilerError):
    """Samples (calibration, evaluation, run inputs) that do not fit the model."""


class CalibrationError(DataError):
    """The calibration set is empty or holds NaN or infinity."""


class AssignmentError(QCompilerError):
    """No precision plan could be made."""


class InfeasibleBudgetError(AssignmentError):
    """The budget cannot be kept.

    Attributes:
        least: The least feasible budget, as a mapping of budget field to value.
        best: The best plan or compiled model found, if any.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        least: dict[str, float] | None = None,
        best: object | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.least = least or {}
        self.best = best


class CheckFailedError(QCompilerError):
    """A check of `qcompile check` is not met."""

    exit_code: ClassVar[int] = 1


class TargetError(QCompilerError):
    """Something about the target."""


class UnknownTargetError(TargetError):
    """No target of that name; the message lists the known ones."""


class UnsupportedByTargetError(TargetError):
    """The target cannot do what was asked, or cannot run on this machine."""


class TuningError(TargetError):
    """Tuning failed: tracker unreachable, no device answered, records unreadable."""


class CodegenError(TargetError):
    """TVM or the linker refused generated code."""

    exit_code: ClassVar[int] = 3


class ArtifactError(QCompilerError):
    """A .qcm file is truncated, altered, of an unknown version, or cannot be written."""


class LockError(QCompilerError):
    """A locked compilation differs from its lock, or a lock cannot be read.

    Attributes:
        differences: One sentence per difference: what was found, what is locked.
    """

    def __init__(self, message: str, *, differences: tuple[str, ...] = (), **fields: Any) -> None:
        super().__init__(message, **fields)
        self.differences = differences


class PassError(QCompilerError):
    """A pass failed.

    Attributes:
        pass_spec: Text form of the pass that failed.
        previous: Text forms of the passes that had run before it.
        reproducer: Folder with the printed graph and the remaining passes, if written.
    """

    exit_code: ClassVar[int] = 3

    def __init__(
        self,
        message: str,
        *,
        pass_spec: str = "",
        previous: tuple[str, ...] = (),
        reproducer: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(message, **fields)
        self.pass_spec = pass_spec
        self.previous = previous
        self.reproducer = reproducer


class VerificationError(QCompilerError):
    """A graph broke the rules of its stage: a defect of qcompiler."""

    exit_code: ClassVar[int] = 3


class InterruptedCompileError(QCompilerError):
    """Ctrl-C; what was computed so far is kept and named in the message."""

    exit_code: ClassVar[int] = 130
