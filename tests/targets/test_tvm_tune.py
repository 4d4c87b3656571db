# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Choosing kernel parameters: by records, and by search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompiler import driver
from qcompiler.ir import Graph
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.records import Record, Records
from qcompiler.registry import get_target
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.choice import (
    RecordedChoice,
    Tunable,
    default_choice,
    params_dict,
    params_from,
    workload_key,
)
from qcompiler.targets.cpu_lowering import CpuLowering
from qcompiler.targets.isa import isa_named, tvm_target
from qcompiler.targets.tvm_lower import lower_graph

MODELS = Path(__file__).parents[2] / "models"
ISA = isa_named("x86-avx2")


@pytest.fixture(scope="module")
def quantized() -> driver.Quantized:
    digits = MODELS / "digits_cnn"
    return driver.quantize_model(digits / "model.onnx", calibration=digits / "calib.npz")


@pytest.fixture(scope="module")
def graph(quantized: driver.Quantized) -> Graph:
    """The bundled model, shaped for x86-avx2."""
    return PassManager(get_target("x86-avx2").passes()).run(quantized.graph, PassContext())


def lower_with(graph: Graph, choose: Any) -> Any:
    return lower_graph(graph, CpuLowering(ISA, choose), tvm_target(ISA))


def tunables(graph: Graph) -> list[Tunable]:
    """The kernels with parameters, one for each node."""
    found: dict[str, Tunable] = {}

    def collect(tunable: Tunable) -> Any:
        found[tunable.node.name] = tunable
        return default_choice(tunable)

    lower_with(graph, collect)
    return list(found.values())


def choice_record(tunable: Tunable, **changes: Any) -> Record:
    """A record that chooses the last candidate of a kernel's space."""
    key = workload_key(tunable, ISA.name, tunable.pack(tunable.default()))
    params = params_dict(tunable.space()[-1])
    return Record(key, "choice", {**params, **changes}, "ok", 1e-3, 0.5, "cpu", 1)


# --- records choose ------------------------------------------------------------------------------


def test_every_candidate_has_a_name_in_a_record(graph: Graph) -> None:
    for tunable in tunables(graph):
        space = tunable.space()
        assert space[0] == tunable.default()
        assert [params_from(tunable, params_dict(p)) for p in space] == list(space)


@pytest.mark.isa("x86-avx2")
def test_recorded_parameters_are_built_and_change_no_result(
    graph: Graph, quantized: driver.Quantized
) -> None:
    kernels = tunables(graph)
    records = Records([choice_record(t) for t in kernels])
    choose = RecordedChoice(records, ISA.name)
    backend = get_target("x86-avx2")
    models = []
    for choice in (default_choice, choose):
        lowered = lower_with(graph, choice)
        built = backend.build(lowered, TuningBudget())
        models.append(driver.assemble(built, backend.spec, quantized))
    assert choose.used == len(kernels) > 2
    assert choose.missing == 0
    assert models[0].artifact.library != models[1].artifact.library
    inputs = models[0].random_inputs()
    for name, expected in models[0](inputs).items():
        np.testing.assert_array_equal(models[1](inputs)[name], expected)


def test_records_outside_of_the_space_are_refused_with_a_note(graph: Graph) -> None:
    first, second = tunables(graph)[:2]
    wild = choice_record(first, mt=1000) if first.kernel != "depthwise" else choice_record(first)
    choose = RecordedChoice(Records([wild]), ISA.name)
    assert choose(first)[0] == first.default()
    assert "not among the kernel's candidates" in choose.notes[0]
    assert choose(second)[0] == second.default()
    assert (choose.used, choose.missing) == (0, 2)


def test_keys_name_all_that_changes_the_code(graph: Graph) -> None:
    kernels = tunables(graph)
    keys = {workload_key(t, ISA.name, t.pack(t.default())) for t in kernels}
    assert len(keys) > 1
    for key in keys:
        assert "Workload(" in key.workload
        assert "Facts(" in key.workload
        assert "\n" not in key.workload
