# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The one place where a kernel's parameters are chosen: analytically, or from tuning records.

Lowering makes a `Tunable` for every kernel that has parameters and asks a `Choose` function for
them. Whatever it answers, the kernel computes the same numbers; only its speed differs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.ir import Node, Value
from qcompiler.records import Records, WorkloadKey, stable_text
from qcompiler.targets.isa import Isa

if TYPE_CHECKING:
    from qcompiler.targets.kernels.packing import Packed
    from qcompiler.targets.kernels.weight_forms import Weights
    from qcompiler.targets.kernels.workload import ConvWorkload, GemmValues, MatmulWorkload

__all__ = [
    "Choose",
    "RecordedChoice",
    "Tunable",
    "default_choice",
    "params_dict",
    "params_from",
    "workload_key",
]

Params = Any  # GemmParams or DepthwiseParams: a frozen dataclass of integers and short texts


@dataclass(frozen=True, slots=True, eq=False)
class Tunable:
    """One kernel of a model, its parameters still open."""

    kernel: str
    """Generator: "conv", "matmul" or "depthwise"."""
    workload: ConvWorkload | MatmulWorkload
    isa: Isa
    node: Node
    """The node whose meaning the kernel has."""
    inputs: tuple[Value, ...]
    """Values that the kernel reads at run time, in its argument order."""
    weight: Weights | None
    """Weights before packing; None where the second operand is an activation."""
    values: GemmValues

    def default(self) -> Params:
        """Return the analytic choice."""
        from qcompiler.targets.kernels import depthwise, gemm

        if self.kernel == "depthwise":
            return depthwise.default_params(_conv(self.workload), self.isa)
        return gemm.default_params(self.workload, self.isa)

    def space(self) -> tuple[Params, ...]:
        """Return all candidates, the default first, likely ones before others."""
        from qcompiler.targets.kernels import depthwise, gemm

        if self.kernel != "depthwise":
            return gemm.space(self.workload, self.isa)
        conv = _conv(self.workload)
        if depthwise.is_plain(conv, self.isa, self.default()):
            return (self.default(),)  # the plain form has no parameters
        return depthwise.space(conv, self.isa)

    def pack(self, params: Params) -> Packed:
        """Pack the constants for some parameters."""
        from qcompiler.targets.kernels import depthwise, gemm

        if self.kernel == "matmul":
            workload = _matmul(self.workload)
            return gemm.pack_matmul(workload, self.isa, params, self.weight, self.values)
        assert self.weight is not None  # a convolution's weights are constants
        conv = _conv(self.workload)
        if self.kernel == "conv":
            return gemm.pack_conv(conv, self.isa, params, self.weight, self.values)
        assert isinstance(self.weight, np.ndarray)  # by construction in the lowering table
        return depthwise.pack_depthwise(conv, self.isa, params, self.weight, self.values)

    def build(self, params: Params, packed: Packed, symbol: str) -> Any:
        """Return the PrimFunc."""
        return build_kernel(self.kernel, self.workload, self.isa, params, packed, symbol)


Choose = Callable[[Tunable], "tuple[Params, Packed]"]
"""Returns the parameters of a kernel, and its constants packed for them."""


def _conv(workload: ConvWorkload | MatmulWorkload) -> ConvWorkload:
    from qcompiler.targets.kernels.workload import ConvWorkload

    assert isinstance(workload, ConvWorkload)  # by construction in the lowering table
    return workload


def _matmul(workload: ConvWorkload | MatmulWorkload) -> MatmulWorkload:
    from qcompiler.targets.kernels.workload import MatmulWorkload

    assert isinstance(workload, MatmulWorkload)  # by construction in the lowering table
    return workload


def build_kernel(
    kernel: str,
    workload: ConvWorkload | MatmulWorkload,
    isa: Isa,
    params: Params,
    packed: Packed,
    symbol: str,
) -> Any:
    """Return the PrimFunc of a kernel; of `packed`, only facts and shapes matter."""
    from qcompiler.targets.kernels import depthwise, gemm

    if kernel == "matmul":
        return gemm.build_matmul(_matmul(workload), isa, params, packed, symbol)
    build = depthwise.build_depthwise if kernel == "depthwise" else gemm.build_conv
    return build(_conv(workload), isa, params, packed, symbol)


def default_choice(tunable: Tunable) -> tuple[Params, Packed]:
    """Choose analytically; needs no measurement."""
    params = tunable.default()
    return params, tunable.pack(params)


def workload_key(tunable: Tunable, target: str, packed: Packed) -> WorkloadKey:
    """Return the key of a kernel's records.

    Args:
        tunable: The kernel.
        target: Name of the target.
        packed: The constants as packed for the default parameters; what packing proved about the
            layer is part of the key, because it changes the code.
    """
    import tvm

    text = f"{tunable.kernel} {stable_text(tunable.workload)} {stable_text(packed.facts)}"
    return WorkloadKey(target, text, str(tvm.__version__))


def params_dict(params: Params) -> dict[str, int | str]:
    """Return parameters as a record has them."""
    return {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}


def params_from(tunable: Tunable, found: Mapping[str, int | str]) -> Params | None:
    """Return the candidate that a record names, or None where the space has no such one."""
    wanted = dict(found)
    return next((p for p in tunable.space() if params_dict(p) == wanted), None)


@dataclass
class RecordedChoice:
    """Chooses what the records say, else analytically.

    Attributes:
        records: Of the target.
        target: Name of the target.
        used: Number of kernels built with a recorded choice.
        missing: Number of kernels without a record.
        notes: Records that could not be used, one sentence each.
    """

    records: Records
    target: str
    used: int = 0
    missing: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)

    def summary(self) -> list[str]:
        """Return what happened, for the report."""
        total = self.used + self.missing
        found = f"tuning records were found for {self.used} of {total} kernels"
        return [*self.records.notes, found, *self.notes]

    def __call__(self, tunable: Tunable) -> tuple[Params, Packed]:
        """Return the parameters of a kernel, and its constants packed for them."""
        params, packed = default_choice(tunable)
        best = self.records.best(workload_key(tunable, self.target, packed))
        if best is None:
            self.missing += 1
            return params, packed
        chosen = params_from(tunable, best.params)
        if chosen is None:
            self.missing += 1
            self.notes.append(
                f"{tunable.node.name}: the recorded parameters {dict(best.params)} are not among "
                f"the kernel's candidates; the default is used"
            )
            return params, packed
        self.used += 1
        return (params, packed) if chosen == params else (chosen, tunable.pack(chosen))
