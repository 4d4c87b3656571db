# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Loading and running on a GPU: what goes wrong is said, and several threads may call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulator import emulator

from qcompiler import cuda_driver
from qcompiler.artifact import Artifact, ParamBlock, write_artifact
from qcompiler.cuda_executor import load_executor
from qcompiler.errors import ArtifactError, CodegenError, UnsupportedByTargetError
from qcompiler.interpreter import run
from qcompiler.ir import Graph
from qcompiler.manifest import TargetInfo, TensorSpec
from qcompiler.ops import Stage
from qcompiler.runtime import CompiledModel, load
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.cuda import backend
from qcompiler.targets.cuda.program import Launch, Plan, Temporary, nbytes
from qcompiler.types import DType, TensorType

needs_emulator = pytest.mark.skipif(
    emulator.skip_reason() is not None, reason=emulator.skip_reason() or "emulator"
)
F32 = DType.FLOAT32


def chain(length: int = 6, size: int = 100) -> Graph:
    """A chain with a skip: x -> neg -> ... -> + x, and the input itself among the results."""
    graph = Graph("chain", Stage.INTEGER)
    x = v = graph.add_input("x", TensorType((4, size), F32))
    for i in range(length):
        v = graph.add("neg" if i % 2 else "relu", [v]).output
    total = graph.add("add", [v, x]).output
    flat = graph.add("reshape", [total], {"shape": (4 * size,)}).output
    constant = graph.constant(np.arange(3, dtype=np.float32), "three")
    graph.set_outputs([("sum", flat), ("x_again", x), ("three", constant)])
    return graph


def artifact_of(graph: Graph, target: str = "cuda-sm80") -> Artifact:
    made = backend.make(target)
    with emulator.without_nvcc():
        built = made.build(made.lower(graph), TuningBudget())
    return Artifact(
        target=TargetInfo(name=target, isa=made.spec.isa or ""),
        inputs={v.name: TensorSpec(v.shape, v.dtype) for v in graph.inputs},
        outputs={name: TensorSpec(v.shape, v.dtype) for name, v in graph.outputs},
        params=ParamBlock.from_arrays(
            dict(zip(map(str, range(len(built.parameters))), built.parameters, strict=True))
        ),
        library=None,
        executor="cuda",
        extras=dict(built.members),
    )


def feed(graph: Graph, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {v.name: rng.standard_normal(v.shape).astype(np.float32) for v in graph.inputs}


@needs_emulator
def test_saved_and_loaded(tmp_path: Path) -> None:
    graph = chain()
    with emulator.driver_environment():
        write_artifact(artifact_of(graph), tmp_path / "m.qcm")
        model = load(tmp_path / "m.qcm")
        got = model(feed(graph))
        times = model.profile()
    assert emulator.differences(got, run(graph, feed(graph))) == []
    assert [name.split("_")[0] for name, _ in times] == ["relu", "neg"] * 3 + ["add"]
    assert all(seconds > 0 for _, seconds in times)


@needs_emulator
def test_calls_from_several_threads(tmp_path: Path) -> None:
    graph = chain()
    with emulator.driver_environment(), ThreadPoolExecutor(4) as pool:
        model = CompiledModel(artifact_of(graph))
        results = list(pool.map(lambda seed: model(feed(graph, seed)), range(12)))
    for seed, got in enumerate(results):
        expected = run(graph, feed(graph, seed))
        assert emulator.differences(got, {"sum": expected["sum"]}) == []


@needs_emulator
def test_a_gpu_without_room(tmp_path: Path) -> None:
    with (
        emulator.driver_environment(memory="100000"),
        pytest.raises(
            UnsupportedByTargetError,
            match=r"emulated GPU\) has no room for the activations: \d+\.\d MB needed, 0\.1 of",
        ),
    ):
        CompiledModel(artifact_of(chain(size=100_000)))(feed(chain(size=100_000)))


@needs_emulator
def test_a_machine_without_a_gpu() -> None:
    with (
        emulator.driver_environment(devices="0"),
        pytest.raises(UnsupportedByTargetError, match="finds no GPU here: CUDA_ERROR_NO_DEVICE"),
    ):
        cuda_driver.check_device("sm_80", "the model")


def test_a_machine_without_a_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cuda_driver.LIBCUDA, str(tmp_path / "libcuda.so.1"))
    cuda_driver.driver.cache_clear()
    write_artifact(artifact_of(chain()), tmp_path / "m.qcm")
    with pytest.raises(UnsupportedByTargetError, match="there is no NVIDIA driver on this machine"):
        load(tmp_path / "m.qcm")


@needs_emulator
def test_a_driver_that_lacks_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "libcuda.so"
    subprocess.run(
        ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(empty)], input=b"", check=True
    )
    monkeypatch.setenv(cuda_driver.LIBCUDA, str(empty))
    cuda_driver.driver.cache_clear()
    with pytest.raises(UnsupportedByTargetError, match=r"driver is too old: .*cuInit"):
        cuda_driver.driver()


@needs_emulator
def test_a_gpu_of_an_older_generation(tmp_path: Path) -> None:
    with emulator.driver_environment(capability="75"):
        write_artifact(artifact_of(chain(), "cuda-sm80"), tmp_path / "m.qcm")
        with pytest.raises(
            UnsupportedByTargetError,
            match=r"compiled for compute capability 8\.0, this GPU \(emulated GPU\) has 7\.5 "
            r".*'cuda-sm75' or an earlier one",
        ):
            load(tmp_path / "m.qcm")


@needs_emulator
def test_code_that_the_driver_does_not_take() -> None:
    artifact = artifact_of(chain())
    extras = {backend.PROGRAM: artifact.extras[backend.PROGRAM], backend.FATBIN: b"a fatbin" * 9}
    with (
        emulator.driver_environment(),
        pytest.raises(UnsupportedByTargetError, match="takes no kernel of this model for emulated"),
    ):
        load_executor(replace(artifact, extras=extras))


@needs_emulator
def test_source_without_nvrtc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of(chain())
    with emulator.driver_environment():
        monkeypatch.setenv(cuda_driver.LIBNVRTC, str(tmp_path / "no.so"))
        monkeypatch.setattr(cuda_driver, "NVRTC_NAMES", ())
        with pytest.raises(UnsupportedByTargetError, match="there is no NVRTC to compile it"):
            load_executor(artifact)


@needs_emulator
def test_source_that_nvrtc_refuses() -> None:
    with (
        emulator.driver_environment(),
        pytest.raises(CodegenError, match=r"(?s)NVRTC refused the kernels: .*nonsense"),
    ):
        cuda_driver.compile_source(b"nonsense;", 80)


@needs_emulator
def test_a_kernel_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = artifact_of(chain())
    source = bytes(artifact.extras[backend.SOURCE]).replace(
        b"  const auto va", b"  if (threadIdx.x == 3) return;\n  __syncthreads();\n  const auto va"
    )
    extras = {**artifact.extras, backend.SOURCE: source}
    with emulator.driver_environment():
        model = CompiledModel(replace(artifact, extras=extras))
        with pytest.raises(CodegenError, match=r"while it ran the model: .*for ever"):
            model(feed(chain()))


@needs_emulator
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: found 2, expected one of 1"),
        ({"outputs": [["arena", 1 << 40]] * 3}, "refers to nothing"),
        ({"inputs": [["parameter", 99]]}, "refers to nothing"),
        ({"kernels": {"nonsense": 0}}, "lacks the kernel nonsense"),
        ({"kernels": {}}, "no kernel 'relu_0' with such a grid"),
    ],
)
def test_a_damaged_program_is_an_error(change: dict[str, Any], message: str) -> None:
    artifact = artifact_of(chain())
    program = {**json.loads(artifact.extras[backend.PROGRAM]), **change}
    extras = {**artifact.extras, backend.PROGRAM: json.dumps(program).encode()}
    with emulator.driver_environment(), pytest.raises(ArtifactError, match=message):
        load_executor(replace(artifact, extras=extras))


@needs_emulator
@pytest.mark.parametrize(
    ("missing", "message"),
    [(backend.PROGRAM, "holds no program.json"), (backend.SOURCE, "neither kernels.fatbin nor")],
)
def test_a_missing_member_is_an_error(missing: str, message: str) -> None:
    artifact = artifact_of(chain())
    extras = {name: data for name, data in artifact.extras.items() if name != missing}
    with emulator.driver_environment(), pytest.raises(ArtifactError, match=message):
        load_executor(replace(artifact, extras=extras))


@needs_emulator
def test_memory_is_given_back() -> None:
    graph = chain(size=1000)
    with emulator.driver_environment():
        gpu = cuda_driver.driver()
        before = emulator.allocated()
        executor = emulator.executor(graph)
        assert emulator.allocated() > before
        executor.run([feed(graph)["x"]])
        executor.profile([feed(graph)["x"]])
        del executor
        assert emulator.allocated() == before
        assert isinstance(gpu, cuda_driver.Driver)


@needs_emulator
def test_times_on_the_device_alone() -> None:
    graph = chain()
    with emulator.driver_environment():
        times = emulator.executor(graph).device_times([feed(graph)["x"]], runs=4)
    assert len(times) == 4
    assert all(t > 0 for t in times)


def test_the_benchmark_says_why_nothing_is_measured() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "cuda.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env={**os.environ, cuda_driver.LIBCUDA: "/nonexistent/libcuda.so.1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "nothing is measured: there is no NVIDIA driver" in done.stderr


@needs_emulator
def test_a_gpu_host_needs_numpy_and_the_driver_alone(tmp_path: Path) -> None:
    """Loading and running imports neither TVM, ONNX, ONNX Runtime, SciPy nor networkx."""
    graph = chain()
    path = tmp_path / "m.qcm"
    write_artifact(artifact_of(graph), path)
    code = f"""
        import sys

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {{"tvm", "tvm_ffi", "onnx", "onnxruntime", "scipy",
                                           "networkx", "matplotlib", "typer", "rich", "torch"}}:
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Refuse())
        import numpy as np
        import qcompiler

        model = qcompiler.load({str(path)!r})
        print(model(np.ones((4, 100), np.float32))["sum"].sum())
    """
    with emulator.driver_environment():
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 400.0


# ------------------------------------------------------------------------------ the memory plan


def launches_of(graph: Graph) -> tuple[list[Launch], dict[Any, Any]]:
    lowered = backend.make("cuda-sm80").lower(graph)
    return [launch for step in lowered.steps for launch in step.launches], lowered.views


def test_buffers_that_live_at_once_do_not_overlap(rng: np.random.Generator) -> None:
    graph = Graph("random", Stage.INTEGER)
    sizes = [int(n) for n in rng.integers(1, 3000, 3)]
    values = [graph.add_input(f"x{n}", TensorType((n,), F32)) for n in sizes]
    for _ in range(60):
        a = values[int(rng.integers(len(values)))]
        values.append(graph.add("neg", [a]).output)
    graph.set_outputs([("y", values[-1]), ("z", values[20])])
    launches, views = launches_of(graph)
    plan = Plan(graph, views, launches)
    last = {
        a: i
        for i, launch in enumerate(launches)
        for a in (*launch.arguments, launch.result)
        if not isinstance(a, np.ndarray)
    }
    last.update(dict.fromkeys([*graph.output_values, *graph.inputs], len(launches)))
    born = {launch.result: i for i, launch in enumerate(launches)}
    buffers = [b for b in plan.offsets if not isinstance(b, Temporary)]
    for a in buffers:
        for b in buffers:
            if a is b or born.get(a, -1) > born.get(b, -1) or last[a] < born.get(b, -1):
                continue
            apart = (
                plan.offsets[a] + nbytes(a) <= plan.offsets[b]
                or plan.offsets[b] + nbytes(b) <= plan.offsets[a]
            )
            assert apart, (a, b)


def test_a_chain_needs_few_buffers() -> None:
    graph = chain(length=40, size=1000)
    launches, views = launches_of(graph)
    assert Plan(graph, views, launches).size <= 4 * 16384
    assert Plan(graph, views, launches, reuse=False).size > 40 * 16000


@needs_emulator
def test_the_doctor_and_the_list_of_targets_see_the_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from qcompiler.cli import main

    with emulator.driver_environment(capability="86"):
        main(["doctor", "--json"])
        findings = {f["name"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
        main(["targets", "--json"])
        rows = {r["name"]: r for r in json.loads(capsys.readouterr().out)["targets"]}
    assert findings["GPU"]["state"] == "ok"
    assert findings["GPU"]["detail"] == "emulated GPU, compute capability 8.6"
    assert rows["cuda-sm86"]["runs_here"] is True
    assert rows["cuda-sm90"]["runs_here"] is False
    assert "has 8.6" in rows["cuda-sm90"]["obstacle"]
