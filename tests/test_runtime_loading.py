# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Loading artifacts: what is read, what is refused, and what a fresh process needs."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import types

import numpy as np
import pytest
from dense_artifact import BATCH, COLS, T5, dense_artifact, samples

from qcompiler import runtime, vm
from qcompiler.artifact import Artifact, ParamBlock, report_path, write_artifact
from qcompiler.errors import (
    ArtifactError,
    CodegenError,
    UnsupportedByTargetError,
)
from qcompiler.manifest import TargetInfo, TensorSpec
from qcompiler.runtime import CompiledModel, load
from qcompiler.types import DType

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tvm") is None, reason="apache-tvm is not installed"
)


@pytest.fixture(scope="module")
def artifact():
    return dense_artifact()


@pytest.fixture(scope="module")
def path(artifact, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "m.qcm"
    write_artifact(artifact, path)
    return path


@pytest.fixture(scope="module")
def model(path):
    return load(path)


def test_load_save_load_is_exact(model, path, tmp_path):
    again = tmp_path / "again.qcm"
    model.save(again)
    assert again.read_bytes() == path.read_bytes()
    x = samples(BATCH)
    np.testing.assert_array_equal(
        load(again, threads=1)({"x": x, "t": T5})["y"], model({"x": x, "t": T5})["y"]
    )


def test_report_is_saved_beside_and_loaded(artifact, tmp_path):
    path = tmp_path / "m.qcm"
    model = CompiledModel(artifact, report={"latency_ms": 1.25})
    model.save(path)
    assert json.loads(report_path(path).read_text()) == {"latency_ms": 1.25}
    assert load(path).report == {"latency_ms": 1.25}
    report_path(path).write_text("{")
    assert load(path).report is None


def test_many_loads_leave_nothing_open(path):
    x = samples(BATCH)
    load(path)({"x": x, "t": T5})
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with open("/proc/self/maps") as maps:
        mapped = sum("qcompiler-lib" in line for line in maps)
    for _ in range(40):
        load(path)({"x": x, "t": T5})
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert sum("qcompiler-lib" in line for line in maps) <= mapped


def test_two_models_loaded_in_turn_are_not_confused(artifact, path):
    # dlopen knows a library by its path; both loads use the same descriptor number.
    first = vm._load_library(artifact.library)
    assert first["vm_load_executable"]() is not None
    other = vm._load_library(artifact.library[:-1] + b"\0")
    assert not other.same_as(first)
    assert load(path)({"x": samples(4), "t": T5})["u"][0] == 1


def test_library_on_disk_where_memory_files_are_refused(artifact, monkeypatch, tmp_path):
    def refuse(name, flags):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(vm.tempfile, "tempdir", str(tmp_path))
    out = CompiledModel(artifact)({"x": samples(4), "t": T5})
    assert out["u"][0] == 1
    assert list(tmp_path.iterdir()) == []


def test_library_of_another_kind_is_one_clear_error():
    # (A cut library would crash in dlopen itself: the digest in the manifest keeps those away.)
    with pytest.raises(ArtifactError, match="cannot load the compiled library"):
        vm.VmExecutor(b"not a library", [])


def test_failure_inside_the_compiled_code(artifact):
    executor = vm.VmExecutor(artifact.library, artifact.params.arrays)
    with pytest.raises(CodegenError, match="the compiled code failed"):
        executor.run([samples(BATCH)])
    out = executor.run([samples(BATCH), T5])  # and the next call works
    np.testing.assert_array_equal(out[1], T5 + 1)


def test_model_for_another_machine_can_be_saved_not_run(artifact, tmp_path):
    fields = {f: getattr(artifact, f) for f in artifact.__dataclass_fields__}
    target = TargetInfo("x86-future", cpu_features=("avx4096",))
    model = CompiledModel(Artifact(**{**fields, "target": target}))
    model.save(tmp_path / "m.qcm")
    with pytest.raises(UnsupportedByTargetError, match="avx4096"):
        model({"x": samples(4), "t": T5})
    with pytest.raises(UnsupportedByTargetError, match="avx4096"):
        load(tmp_path / "m.qcm")


def test_interpreted_models_find_their_executor(monkeypatch, tmp_path):
    class Double:
        def run(self, inputs, *, threads=1):
            return [inputs[0] * 2]

    seen = {}

    def load_executor(artifact):
        seen.update(members=dict(artifact.extras), parameters=len(artifact.params.arrays))
        return Double()

    module = types.ModuleType("fake_reference")
    module.load_executor = load_executor
    monkeypatch.setitem(sys.modules, "fake_reference", module)
    monkeypatch.setitem(
        runtime._EXECUTOR_FACTORIES, "interpreter", ("fake_reference", "load_executor")
    )
    spec = TensorSpec((1, 2), DType.FLOAT32, 0)
    artifact = Artifact(
        TargetInfo("reference"),
        {"x": spec},
        {"y": spec},
        ParamBlock.from_arrays({"w": np.zeros(3)}),
        None,
        executor="interpreter",
        extras={"graph.json": b"{}"},
    )
    write_artifact(artifact, tmp_path / "m.qcm")
    model = load(tmp_path / "m.qcm")
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(model(x)["y"], x * 2)  # one input: a bare array will do
    assert seen == {"members": {"graph.json": b"{}"}, "parameters": 1}


def _python(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


_LOAD_AND_RUN = f"""
    import json, sys, time
    import numpy as np
    start = time.perf_counter()
    from qcompiler.runtime import load
    model = load(sys.argv[1])
    x = np.ones(({BATCH}, {COLS}), np.float32)
    t = np.arange(5)
    y = model({{"x": x, "t": t}})["y"]
    seconds = time.perf_counter() - start
    maps = open("/proc/self/maps").read()
"""


def test_fresh_process_loads_the_runtime_and_nothing_else(path, model):
    found = _python(
        _LOAD_AND_RUN
        + """
    heavy = [m for m in ("tvm", "torch", "onnx", "onnxruntime") if m in sys.modules]
    print(json.dumps({"runtime": "libtvm_runtime.so" in maps, "heavy": heavy,
                      "compiler": "libtvm_compiler" in maps, "y": float(y[0, 0]),
                      "seconds": seconds}))
    """,
        path,
    )
    expected = model({"x": np.ones((BATCH, COLS), np.float32), "t": T5})["y"]
    assert found["runtime"]
    assert not found["compiler"]
    assert found["heavy"] == []
    assert found["y"] == float(expected[0, 0])
    assert found["seconds"] < 5


def test_compiler_can_be_imported_after_loading(path):
    found = _python(
        _LOAD_AND_RUN
        + """
    import tvm
    from tvm.script import ir_builder
    runtimes = {line.split()[-1] for line in open("/proc/self/maps") if "libtvm_runtime.so" in line}
    import numpy
    doubled = tvm.runtime.tensor(x).numpy() * 2
    n = tvm.te.var("n")
    a = tvm.te.placeholder((8,), name="a")
    b = tvm.te.compute((8,), lambda i: a[i] + 1.0)
    f = tvm.compile(tvm.te.create_prim_func([a, b]), target="llvm")
    p, q = tvm.runtime.tensor(x[0, :8].copy()), tvm.runtime.tensor(np.zeros(8, "f4"))
    f(p, q)
    z = model({"x": x, "t": t})["y"]
    print(json.dumps({"runtimes": len(runtimes), "same": bool((y == z).all()),
                      "added": float(q.numpy()[0])}))
    """,
        path,
    )
    assert found == {"runtimes": 1, "same": True, "added": 2.0}
