# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""x86-64 CPUs: one backend, one row of the ISA table per target."""

from __future__ import annotations

from qcompiler.errors import UnknownTargetError
from qcompiler.ir import Graph, Node
from qcompiler.passes.channels_last import ChannelsLast
from qcompiler.passes.contiguous_reductions import ContiguousReductions
from qcompiler.passes.split_to_slices import SplitToSlices
from qcompiler.passes.unsigned_activations import UnsignedActivations
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.records import Records
from qcompiler.targets.base import Backend, Built, Support, TargetSpec, TuningBudget
from qcompiler.targets.isa import ISA_TABLE, Isa, isa_named, runnable
from qcompiler.tuning import Tuning, TuningOutcome
from qcompiler.types import Precision

_DESCRIPTIONS = {
    "x86-64": "any x86-64 CPU (SSE2): int16 products, the slow common ground",
    "x86-avx2": "AVX2 and FMA without VNNI: exact u8 x s8, proved or widened per tile",
    "x86-avxvnni": "AVX-VNNI, 256-bit (client CPUs since Alder Lake and Zen 5)",
    "x86-avx512vnni": "AVX512-VNNI, 512-bit (servers since Cascade Lake and Zen 4)",
}


class X86Backend(Backend):
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
        """Channels-last layout and unsigned activations, as the dot instructions want them."""
        return (UnsignedActivations(), ChannelsLast(), ContiguousReductions(), SplitToSlices())

    def lower(self, graph: Graph, progress: ProgressFn = no_progress) -> object:
        """Return the IRModule and its parameters (`tvm_lower.Lowered`)."""
        from qcompiler.targets.choice import RecordedChoice
        from qcompiler.targets.cpu_lowering import CpuLowering
        from qcompiler.targets.isa import tvm_target
        from qcompiler.targets.tvm_lower import lower_graph

        target = tvm_target(self.isa)
        if self.records is None:
            return lower_graph(graph, CpuLowering(self.isa), target, progress)
        choose = RecordedChoice(self.records, self.spec.name)
        lowered = lower_graph(graph, CpuLowering(self.isa, choose), target, progress)
        lowered.notes += choose.summary()
        return lowered

    def with_records(self, records: Records) -> X86Backend:
        """Return this backend with kernel parameters chosen by tuning records."""
        return X86Backend(self.spec, self.isa, records)

    def tune(
        self,
        graph: Graph,
        tuning: Tuning,
        *,
        seed: int = 0,
        progress: ProgressFn = no_progress,
    ) -> TuningOutcome:
        """Search kernel parameters by measuring (`tvm_tune`)."""
        from qcompiler.targets.tvm_tune import tune_graph

        return tune_graph(graph, self.isa, self.spec.name, tuning, seed=seed, progress=progress)

    def build(
        self, lowered: object, tuning: TuningBudget, progress: ProgressFn = no_progress
    ) -> Built:
        """Generate machine code and link the library."""
        from qcompiler.targets.isa import tvm_target
        from qcompiler.targets.tvm_build import build_library
        from qcompiler.targets.tvm_lower import Lowered

        del tuning
        if not isinstance(lowered, Lowered):
            raise TypeError(f"expected what lower() returned, got {type(lowered).__name__}")
        target = tvm_target(self.isa)
        library = build_library(lowered.module, target, self.isa.mtriple, progress)
        return Built(
            library=library,
            parameters=tuple(lowered.parameters),
            parameter_names=tuple(lowered.parameter_names),
            graph=lowered.graph,
            regions=tuple(lowered.regions),
            tvm_target=str(target),
            notes=tuple(lowered.notes),
        )


def _precisions(isa: Isa) -> tuple[Precision, ...]:
    """Return what the row has a reason to compute in.

    4-bit weights take half the memory on every row. Where `vpmaddubsw` multiplies, fewer bits also
    let more products share one widening instruction (`kernels.depth`); the other rows take the
    same time for any 8-bit operands.
    """
    if isa.dot != "maddubs":
        return (Precision.W8A8, Precision.W4A8, Precision.FP32)
    narrow = (Precision.W8A7, Precision.W7A8, Precision.W6A8, Precision.W4A8)
    return (Precision.W8A8, *narrow, Precision.FP32)


def make(name: str) -> Backend:
    """Entry point: return the backend of a row of the ISA table.

    Raises:
        UnknownTargetError: No row of that name.
    """
    if name not in ISA_TABLE:
        raise UnknownTargetError(f"no x86 row is named {name!r}: rows are {', '.join(ISA_TABLE)}")
    isa = isa_named(name)
    spec = TargetSpec(
        name=name,
        description=_DESCRIPTIONS.get(name, name),
        precisions=_precisions(isa),
        cpu_features=isa.cpu_features,
        isa=name,
        triple=isa.mtriple,
        mcpu=isa.mcpu,
    )
    return X86Backend(spec, isa)


def host_target() -> str:
    """Return the widest row that this CPU runs.

    Raises:
        UnknownTargetError: No row runs here.
    """
    rows = [isa for isa in ISA_TABLE.values() if runnable(isa)]
    if not rows:
        raise UnknownTargetError(
            "no target runs on this CPU", hint="give a target by name to cross-compile"
        )
    return max(rows, key=lambda isa: (isa.dot == "vpdpbusd", isa.vector_bits)).name
