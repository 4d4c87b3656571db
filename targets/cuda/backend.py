# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""NVIDIA GPUs: one backend, one row of the table of generations per target."""

from __future__ import annotations

import hashlib

from qcompiler.ir import Graph, Node
from qcompiler.manifest import dumps
from qcompiler.passes.channels_last import ChannelsLast
from qcompiler.passes.contiguous_reductions import ContiguousReductions
from qcompiler.passes.conv_to_matmul import ConvToMatmul
from qcompiler.passes.split_to_slices import SplitToSlices
from qcompiler.passmanager import Pass, ProgressFn, no_progress
from qcompiler.plan import precision_of
from qcompiler.records import Records
from qcompiler.targets.base import (
    Backend,
    Built,
    Region,
    Support,
    TargetSpec,
    TuningBudget,
    is_view,
)
from qcompiler.targets.cuda.arch import Arch, arch_named
from qcompiler.targets.cuda.lowering import Lowered, Maker, lower_graph, lower_node
from qcompiler.targets.cuda.nvcc import compile_fatbin, find_nvcc
from qcompiler.targets.cuda.program import Parameters, program_json
from qcompiler.targets.cuda.source import module_source
from qcompiler.tuning import Tuning, TuningOutcome
from qcompiler.types import Precision

PROGRAM, FATBIN, SOURCE = "program.json", "kernels.fatbin", "kernels.cu"


class CudaBackend(Backend):
    """Generates CUDA C++ kernels and a program of launches; the driver runs it."""

    def __init__(self, spec: TargetSpec, arch: Arch, records: Records | None = None) -> None:
        super().__init__(spec)
        self.arch = arch
        self.records = records

    def supports(self, node: Node) -> Support:
        """Say whether a CUDA kernel serves the node; there is no fallback."""
        if is_view(node):
            return Support(True)
        answer = lower_node(Maker(self.arch), node)
        return Support(False, answer) if isinstance(answer, str) else Support(True)

    def passes(self) -> tuple[Pass, ...]:
        """Channels last; the tensor cores take signed and unsigned bytes alike.

        No kernel of a convolution takes computed weights, depthwise ones included.
        """
        return (
            ConvToMatmul(depthwise=True),
            ChannelsLast(),
            ContiguousReductions(),
            SplitToSlices(),
        )

    def lower(self, graph: Graph, progress: ProgressFn = no_progress) -> Lowered:
        """Turn the shaped graph into launches."""
        if self.records is None:
            return lower_graph(graph, self.arch, progress)
        from qcompiler.targets.cuda.tune import RecordedTiles

        choose = RecordedTiles(self.records, self.spec.name)
        lowered = lower_graph(graph, self.arch, progress, choose)
        lowered.notes += choose.summary()
        return lowered

    def with_records(self, records: Records) -> CudaBackend:
        """Return this backend with tiles chosen by tuning records."""
        return CudaBackend(self.spec, self.arch, records)

    def tune(
        self,
        graph: Graph,
        tuning: Tuning,
        *,
        seed: int = 0,
        progress: ProgressFn = no_progress,
    ) -> TuningOutcome:
        """Search the tiles of products by measuring on the GPU of this machine (`tune`)."""
        from qcompiler.targets.cuda.tune import tune_graph

        return tune_graph(graph, self.arch, self.spec.name, tuning, seed=seed, progress=progress)

    def build(
        self, lowered: Lowered, tuning: TuningBudget, progress: ProgressFn = no_progress
    ) -> Built:
        """Compile the kernels with nvcc, or keep their source where there is none."""
        del tuning
        progress("build", 0, 1)
        parameters = Parameters()
        program = program_json(
            lowered.lowered, lowered.views, lowered.steps, parameters, self.arch.isa
        )
        source = module_source(lowered.kernels)
        notes = list(lowered.notes)
        members = {PROGRAM: dumps(program)}
        nvcc = find_nvcc()
        problem = "no nvcc was found" if nvcc is None else nvcc.problem(self.arch.sm)
        if nvcc is None or problem:
            members[SOURCE] = source.encode()
            notes.append(
                f"{problem}: the kernels stay source, which NVRTC compiles when the model is loaded"
            )
        else:
            members[FATBIN], _ = compile_fatbin(nvcc, source, self.arch.sm)
        progress("build", 1, 1)
        return Built(
            library=None,
            parameters=tuple(parameters.arrays),
            parameter_names=tuple(parameters.names),
            graph=lowered.graph,
            regions=_regions(lowered),
            members=members,
            executor="cuda",
            notes=tuple(notes),
            workloads={
                name: hashlib.sha256(f"{self.arch.isa} {text.text}".encode()).hexdigest()[:32]
                for name, text in lowered.kernels.items()
            },
            memory=int(program["arena"]),
        )


def _regions(lowered: Lowered) -> tuple[Region, ...]:
    # What a node computes in is said by the graph as it was given.
    nodes = {node.name: node for g in (lowered.lowered, lowered.graph) for node in g.nodes}
    return tuple(
        Region(
            step.name, (nodes[step.name].op.name,), nodes[step.name].sources,
            precision_of(nodes[step.name]), tuple(step.kernels), step.macs,
        )
        for step in lowered.steps
    )  # fmt: skip


def make(name: str) -> Backend:
    """Entry point: return the backend of a row of the table.

    Raises:
        UnknownTargetError: No row of that name.
    """
    arch = arch_named(name)
    spec = TargetSpec(
        name=name,
        description=f"NVIDIA GPUs of compute capability {arch.sm / 10:.1f} and later ({arch.card})",
        precisions=(
            Precision.W8A8,
            Precision.W4A8,
            Precision.W4A8_GROUP,
            Precision.FP32,
            Precision.FP16,
            Precision.W8A8_DYNAMIC,
            Precision.W8A8_DYNAMIC_TENSOR,
        ),
        isa=arch.isa,
        multiplies_halves=True,
    )
    return CudaBackend(spec, arch)
