# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The comparisons of the emulator's tests on a real GPU: `pytest -m gpu`.

They need NVIDIA's driver, a GPU of compute capability 7.5 or later, and nvcc or NVRTC.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from by_path import imported
from cuda_emulator import emulator

import qcompiler
from qcompiler import cuda_driver
from qcompiler.cuda_executor import CudaExecutor, load_executor
from qcompiler.driver import assemble, build_graph, quantize_model
from qcompiler.errors import UnsupportedByTargetError
from qcompiler.ir import Graph
from qcompiler.manifest import TensorSpec, loads
from qcompiler.passmanager import PassContext, PassManager
from qcompiler.records import RecordFile
from qcompiler.registry import get_target
from qcompiler.runtime import CompiledModel
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.cuda import backend, nvcc
from qcompiler.targets.cuda.arch import ARCHES
from qcompiler.targets.cuda.tiles import Tile, candidates
from qcompiler.targets.reference import GraphExecutor
from qcompiler.tuning import Tuning

HERE = Path(__file__).parent


def _problem() -> str | None:
    try:
        capability = cuda_driver.driver().capability
    except UnsupportedByTargetError as error:
        return error.message
    return None if capability >= 75 else f"compute capability {capability} is too old"


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_problem() is not None, reason=_problem() or "no GPU"),
]
catalogue = imported("qcompiler_model_catalogue", HERE.parents[1] / "models" / "catalogue.py")


def own_target() -> str:
    """Return the widest target that this GPU runs."""
    capability = cuda_driver.driver().capability
    return [name for name, arch in ARCHES.items() if arch.sm <= capability][-1]


def run_graph(graph: Graph, feeds: Any, target: str = "", **settings: str) -> dict[str, Any]:
    """Run a shaped graph on this GPU; takes the place of the emulator's function."""
    del target, settings
    made = get_target(own_target())
    built = made.build(made.lower(graph), TuningBudget())
    gpu = cuda_driver.driver()
    image = built.members.get(backend.FATBIN) or cuda_driver.compile_source(
        built.members[backend.SOURCE], gpu.capability
    )
    executor = CudaExecutor(
        gpu, loads(built.members[backend.PROGRAM], "program.json"), image, built.parameters,
        [TensorSpec(v.shape, v.dtype) for v in graph.inputs],
        [TensorSpec(v.shape, v.dtype) for v in graph.output_values],
    )  # fmt: skip
    results = executor.run([feeds[v.name] for v in graph.inputs])
    return {name: array for (name, _), array in zip(graph.outputs, results, strict=True)}


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests of the emulator run on the GPU instead."""
    monkeypatch.setattr(emulator, "run_graph", run_graph)


SHARED = {
    "test_cuda_products": (
        "test_depthwise_convolutions", "test_four_bit_weights", "test_half_precision_products",
        "test_float_products", "test_accumulators_wrap_like_the_interpreter",
    ),
    "test_cuda_operators": (
        "test_quantize_rounds_ties_to_even_and_saturates", "test_pooling", "test_reductions",
        "test_softmax_and_norms", "test_float_rows", "test_float_elementwise",
        "test_integers_and_flags",
    ),
}  # fmt: skip
ORDERED = {
    "test_cuda_products": ("test_matrix_products",),
    "test_cuda_operators": ("test_integer_elementwise", "test_movement"),
}


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in SHARED.items() for n in names])
def test_kernels(on_gpu: None, rng: np.random.Generator, file: str, name: str) -> None:
    getattr(imported(f"{file}_on_gpu", HERE / f"{file}.py"), name)(rng)


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in ORDERED.items() for n in names])
def test_more_kernels(on_gpu: None, rng: np.random.Generator, file: str, name: str) -> None:
    getattr(imported(f"{file}_on_gpu", HERE / f"{file}.py"), name)(rng, "0")


def test_convolutions(on_gpu: None, rng: np.random.Generator) -> None:
    module = imported("test_cuda_products_on_gpu", HERE / "test_cuda_products.py")
    module.test_convolutions(rng, own_target(), "0")


def test_every_tile(
    on_gpu: None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = imported("test_cuda_products_on_gpu", HERE / "test_cuda_products.py")
    arch = ARCHES[own_target()]
    tiles: tuple[Tile, ...] = candidates(arch, 300, packed4=False, out_bytes=1)
    module.run_with_tiles(rng, list(tiles), monkeypatch)


def test_tuning(tmp_path: Path) -> None:
    models = imported("test_cuda_models_on_gpu", HERE / "test_cuda_models.py")
    model, calibration, evaluation = models.model_of("digits_cnn")
    made = get_target(own_target())
    result = quantize_model(model, calibration=calibration, precision="w8a8")
    shaped = PassManager(made.passes()).run(result.graph, PassContext())
    outcome = made.tune(shaped, Tuning(records=tmp_path / "records.jsonl", trials=40))
    assert sum(t.trials for t in outcome.tasks) == 40
    assert not any(t.failures for t in outcome.tasks)
    records = RecordFile(tmp_path / "records.jsonl", own_target()).read()
    built = build_graph(result.graph, made.with_records(records))
    compiled = assemble(built, made.spec, result)
    inputs = {k: evaluation[k][:16] for k in compiled.inputs}
    reference = CompiledModel(compiled.artifact, executor=GraphExecutor(result.graph))
    assert emulator.differences(compiled(inputs), reference(inputs)) == []


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", ["digits_cnn", "digits_hybrid", "resnet20", "kws_dscnn", "mobilenetv2", "ic_resnet8"]
)
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a8-group"])
def test_models(name: str, precision: str, tmp_path: Path) -> None:
    models = imported("test_cuda_models_on_gpu", HERE / "test_cuda_models.py")
    model, calibration, evaluation = models.model_of(name)
    result = quantize_model(model, calibration=calibration, precision=precision)
    made = get_target(own_target())
    compiled = assemble(build_graph(result.graph, made), made.spec, result)
    compiled.save(tmp_path / "model.qcm")
    loaded = qcompiler.load(tmp_path / "model.qcm")
    inputs = {k: evaluation[k][:16] for k in loaded.inputs}
    reference = CompiledModel(loaded.artifact, executor=GraphExecutor(result.graph))
    assert emulator.differences(loaded(inputs), reference(inputs)) == []
    assert all(seconds > 0 for _, seconds in loaded.profile())


@pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc on this machine")
def test_a_model_for_an_earlier_gpu_runs_through_its_ptx(rng: np.random.Generator) -> None:
    if own_target() == "cuda-sm75":
        pytest.skip("this GPU is of the first generation")
    runtime = imported("test_cuda_runtime_on_gpu", HERE / "test_cuda_runtime.py")
    graph = runtime.chain()
    made = backend.make("cuda-sm75")
    built = made.build(made.lower(graph), TuningBudget())
    artifact = runtime.artifact_of(graph, "cuda-sm75")
    object.__setattr__(artifact, "extras", dict(built.members))
    x = rng.standard_normal((4, 100)).astype(np.float32)
    results = load_executor(artifact).run([x])
    np.testing.assert_array_equal(results[1], x)
