# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What a target is: data (`TargetSpec`) that passes read, and a `Backend` of four methods.

Nothing here imports TVM. A new target is a `Backend` subclass and an entry point in the group
`qcompiler.targets`; `reference.py` is the template.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompiler.errors import UnknownTargetError, UnsupportedByTargetError
from qcompiler.ir import Graph, Node
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.records import Records
from qcompiler.tuning import Tuning, TuningOutcome
from qcompiler.types import WIDENED, Array, Precision

VIEWS = frozenset({"reshape"})
"""Operators that move nothing in memory: every target has them, without a kernel."""


def is_view(node: Node) -> bool:
    """Whether the result of a node lies in memory as its operand does, byte by byte.

    Besides `VIEWS` that is a cast of 4-bit integers to the bytes that hold them, and a requantize
    that changes nothing but the width of the storage.
    """
    if node.op.name in VIEWS:
        return True
    if node.op.name not in ("cast", "requantize"):
        return False
    x, y = node.input(0).type, node.output.type
    if WIDENED.get(x.dtype, x.dtype) is not WIDENED.get(y.dtype, y.dtype):
        return False
    if x.qparams is None or y.qparams is None:
        return x.dtype.bits <= y.dtype.bits
    return (
        x.qparams.same_map(y.qparams)
        and y.qparams.qmin <= x.qparams.qmin
        and x.qparams.qmax <= y.qparams.qmax
    )


@dataclass(frozen=True, slots=True)
class TargetSpec:
    """What passes may know of a target."""

    name: str
    """Name a user gives, such as "x86-avx2"."""
    description: str
    """One line for `qcompile targets`."""
    precisions: tuple[Precision, ...]
    """Precisions that kernels exist for, best first."""
    cpu_features: tuple[str, ...] = ()
    """Features that the running machine must have, spelled as in /proc/cpuinfo."""
    isa: str | None = None
    """Row of the ISA table for CPU targets."""
    triple: str | None = None
    """LLVM target triple of the library, or None where there is no library."""
    mcpu: str | None = None
    """LLVM processor name, which may be overridden per compilation ("arm-dotprod:neoverse-n1")."""
    processors: tuple[str, ...] = ()
    """Processors that may be named in place of `mcpu`."""
    multiplies_halves: bool = False
    """Whether products of float16 weights multiply halves by halves: faster than float32, and
    within a tolerance. Elsewhere the weights are widened, and only take less memory."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a target can run a node natively; falsy answers carry the reason."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True, slots=True)
class TuningBudget:
    """How much search a build may spend; `trials=0` uses the analytic defaults."""

    trials: int = 0
    seconds: float | None = None
    seed: int = 0
    records: str | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """One fused kernel call of the compiled model, for reports."""

    name: str
    ops: tuple[str, ...]
    nodes: tuple[str, ...]
    precision: Precision
    symbols: tuple[str, ...]
    """Kernels that it calls, in order."""
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled model in parts, before it becomes an artifact.

    Attributes:
        library: Bytes of the shared library, or None for interpreted targets.
        parameters: Packed constants in the order that the library's `main` takes them.
        parameter_names: Name of each packed constant.
        graph: The graph after the target's passes (what the library computes).
        regions: Kernel calls in order.
        members: Extra artifact members by name.
        executor: "vm", or "interpreter" for targets without a library.
        tvm_target: Text of the TVM target, for the manifest.
        notes: What the user should know of how it was built, one sentence each.
        records: Digest of the tuned parameters in use; None where none are.
        workloads: Kernel symbol -> digest of its code: equal digests take equal time on one
            machine. Empty where the target cannot tell.
        memory: Bytes that tensors between kernels take at once, at most; None where the target
            cannot tell.
    """

    library: bytes | None
    parameters: tuple[Array, ...]
    parameter_names: tuple[str, ...]
    graph: Graph
    regions: tuple[Region, ...] = ()
    members: Mapping[str, bytes] = field(default_factory=dict)
    executor: str = "vm"
    tvm_target: str = ""
    notes: tuple[str, ...] = ()
    records: str | None = None
    workloads: Mapping[str, str] = field(default_factory=dict)
    memory: int | None = None


class Backend(ABC):
    """Code of a target."""

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec

    @abstractmethod
    def supports(self, node: Node) -> Support:
        """Say whether the node has a native kernel; a falsy answer says why not."""

    @abstractmethod
    def passes(self) -> tuple[Pass, ...]:
        """Return the passes that shape an INTEGER graph for this target."""

    @abstractmethod
    def lower(self, graph: Graph, progress: ProgressFn = no_progress) -> Any:
        """Turn the shaped graph into what `build` takes.

        Raises:
            UnsupportedByTargetError: All nodes that cannot be lowered, in one message.
        """

    def with_processor(self, mcpu: str) -> Backend:
        """Return this backend with the scheduling model of another processor, as LLVM names it.

        Raises:
            UnknownTargetError: The target offers no choice of processors, or not this one.
        """
        raise UnknownTargetError(
            f"target {self.spec.name} cannot be built for the processor {mcpu!r}: it offers none",
            hint=f"give the target as {self.spec.name!r}",
        )

    def with_records(self, records: Records) -> Backend:
        """Return this backend with kernel parameters chosen by tuning records.

        Raises:
            UnsupportedByTargetError: The target's kernels have no parameters.
        """
        del records
        raise UnsupportedByTargetError(
            f"target {self.spec.name} has no kernels to tune", hint="leave the tuning options out"
        )

    def tune(
        self,
        graph: Graph,
        tuning: Tuning,
        *,
        seed: int = 0,
        progress: ProgressFn = no_progress,
    ) -> TuningOutcome:
        """Search kernel parameters for a shaped graph by measuring; the records hold the result.

        Raises:
            UnsupportedByTargetError: The target's kernels have no parameters, or nothing here can
                run them.
            TuningError: The records cannot be read or written.
        """
        del graph, tuning, seed, progress
        raise UnsupportedByTargetError(
            f"target {self.spec.name} has no kernels to tune", hint="leave the tuning options out"
        )

    @abstractmethod
    def build(
        self, lowered: Any, tuning: TuningBudget, progress: ProgressFn = no_progress
    ) -> Built:
        """Generate code.

        Raises:
            CodegenError: The code generator or the linker failed.
        """
