# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The backend of every CPU: what differs between CPUs is data, a row of the ISA table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qcompiler.errors import UnknownTargetError
from qcompiler.ir import Graph, Node
from qcompiler.passes.channels_last import ChannelsLast
from qcompiler.passes.contiguous_reductions import ContiguousReductions
from qcompiler.passes.signed_activations import SignedActivations
from qcompiler.passes.split_to_slices import SplitToSlices
from qcompiler.passes.unsigned_activations import UnsignedActivations
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.records import Records
from qcompiler.targets.base import Backend, Built, Support, TargetSpec, TuningBudget
from qcompiler.targets.isa import ISA_TABLE, Isa, isa_named, runnable, with_processor
from qcompiler.tuning import Tuning, TuningOutcome
from qcompiler.types import Precision

__all__ = ["CpuBackend", "backend_of_row", "host_target"]


class CpuBackend(Backend):
    """Generates TIR kernels from a row of the ISA table and builds them with TVM's LLVM."""

    def __init__(self, spec: TargetSpec, isa: Isa, records: Records | None = None) -> None:
        super().__init__(spec)
        self.isa = isa
        self.records = records

    def supports(self, node: Node) -> Support:
        """Say whether one of our kernels serves the node; other float nodes go through TVM."""
        from qcompiler.targets.cpu_lowering import CpuLowering

        return CpuLowering(self.isa).supports(node)

    def passes(self) -> tuple[Pass, ...]:
        """Channels-last layout, and the signedness that the dot instruction multiplies."""
        signedness = SignedActivations() if self.isa.a_dtype == "int8" else UnsignedActivations()
        return (signedness, ChannelsLast(), ContiguousReductions(), SplitToSlices())

    def lower(self, graph: Graph, progress: ProgressFn = no_progress) -> object:
        """Return the IRModule and its parameters (`tvm_lower.Lowered`)."""
        from qcompiler.targets.choice import RecordedChoice, default_choice
        from qcompiler.targets.cpu_halves import for_row
        from qcompiler.targets.cpu_lowering import CpuLowering
        from qcompiler.targets.isa import tvm_target
        from qcompiler.targets.tvm_lower import lower_graph

        recorded = None if self.records is None else RecordedChoice(self.records, self.spec.name)
        lowering = CpuLowering(self.isa, recorded or default_choice)
        lowered = lower_graph(for_row(graph, self.isa), lowering, tvm_target(self.isa), progress)
        lowered.graph = graph
        if recorded is not None:
            lowered.notes += recorded.summary()
        return lowered

    def with_records(self, records: Records) -> CpuBackend:
        """Return this backend with kernel parameters chosen by tuning records."""
        return CpuBackend(self.spec, self.isa, records)

    def with_processor(self, mcpu: str) -> CpuBackend:
        """Return this backend with the scheduling model of another processor of the same row.

        Raises:
            UnknownTargetError: The processor is not known to have the row's features.
        """
        isa = with_processor(self.isa, mcpu)
        return CpuBackend(replace(self.spec, mcpu=mcpu), isa, self.records)

    def tune(
        self,
        graph: Graph,
        tuning: Tuning,
        *,
        seed: int = 0,
        progress: ProgressFn = no_progress,
    ) -> TuningOutcome:
        """Search kernel parameters by measuring (`tvm_tune`)."""
        from qcompiler.targets.cpu_halves import for_row
        from qcompiler.targets.tvm_tune import tune_graph

        graph = for_row(graph, self.isa)
        return tune_graph(graph, self.isa, self.spec.name, tuning, seed=seed, progress=progress)

    def build(
        self, lowered: object, tuning: TuningBudget, progress: ProgressFn = no_progress
    ) -> Built:
        """Generate machine code and link the library."""
        from qcompiler.targets.isa import tvm_target
        from qcompiler.targets.tvm_build import build_library, workload_digests
        from qcompiler.targets.tvm_lower import Lowered

        del tuning
        if not isinstance(lowered, Lowered):
            raise TypeError(f"expected what lower() returned, got {type(lowered).__name__}")
        target = tvm_target(self.isa)
        workloads = workload_digests(lowered.module, target)
        memory: list[int] = []
        library = build_library(
            lowered.module, target, self.isa.mtriple, progress, note_memory=memory.append
        )
        return Built(
            library=library,
            parameters=tuple(lowered.parameters),
            parameter_names=tuple(lowered.parameter_names),
            graph=lowered.graph,
            regions=tuple(lowered.regions),
            tvm_target=str(target),
            notes=tuple(lowered.notes),
            workloads=workloads,
            memory=memory[-1] if memory else None,
        )


def backend_of_row(
    name: str, descriptions: Mapping[str, str], precisions: tuple[Precision, ...]
) -> CpuBackend:
    """Return the backend of a row of the ISA table.

    Args:
        name: The row.
        descriptions: One line for each of the rows that an entry point serves.
        precisions: What the row has a reason to compute in, best first.

    Raises:
        UnknownTargetError: No row of that name among those described.
    """
    if name not in descriptions or name not in ISA_TABLE:
        rows = ", ".join(descriptions)
        raise UnknownTargetError(f"no row of these is named {name!r}: rows are {rows}")
    isa = isa_named(name)
    spec = TargetSpec(
        name=name,
        description=descriptions[name],
        precisions=precisions,
        cpu_features=isa.cpu_features,
        isa=name,
        triple=isa.mtriple,
        mcpu=isa.mcpu,
        processors=isa.mcpus,
        multiplies_halves=isa.halves,
    )
    return CpuBackend(spec, isa)


def host_target() -> str:
    """Return the most capable row that this CPU runs.

    Raises:
        UnknownTargetError: No row runs here.
    """
    rows = [isa for isa in ISA_TABLE.values() if runnable(isa)]
    if not rows:
        raise UnknownTargetError(
            "no target runs on this CPU", hint="give a target by name to cross-compile"
        )
    return rows[-1].name
