# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The emulated GPU for tests: built once per session with the host's C++ compiler.

`driver_environment` makes the executor use libcuda.cpp and libnvrtc.cpp in place of NVIDIA's.
`run_graph` is the way of one graph through lowering, compilation, loading and running.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import cuda_driver
from qcompiler.cuda_executor import CudaExecutor
from qcompiler.ir import Graph
from qcompiler.manifest import TensorSpec, loads
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.cuda import backend
from qcompiler.targets.cuda.backend import CudaBackend
from qcompiler.types import Array

HERE = Path(__file__).resolve().parent


def skip_reason() -> str | None:
    """Say why there is no emulated GPU on this machine, or None where there is one."""
    if os.uname().machine != "x86_64" or sys.platform != "linux":
        return "the GPU emulator switches fibers on x86-64 Linux only"
    if shutil.which("g++") is None:
        return "no g++ to build the GPU emulator"
    return None


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="qcompiler-cuda-emulator-")
    for name in ("libcuda", "libnvrtc"):
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-o", f"{folder.name}/{name}.so"]
        subprocess.run([*command, str(HERE / f"{name}.cpp"), "-ldl"], check=True)
    return folder


def environment() -> dict[str, str]:
    """Return the variables that put the emulated driver in place of NVIDIA's."""
    folder = _folder().name
    return {
        cuda_driver.LIBCUDA: f"{folder}/libcuda.so",
        cuda_driver.LIBNVRTC: f"{folder}/libnvrtc.so",
        "QC_EMULATE_HEADER": str(HERE / "emulate.hpp"),
    }


@contextlib.contextmanager
def driver_environment(**settings: str) -> Iterator[None]:
    """Use the emulated driver inside a block; settings go without their prefix QC_EMULATE_."""
    wanted = {**environment(), **{f"QC_EMULATE_{k.upper()}": v for k, v in settings.items()}}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    cuda_driver.driver.cache_clear()
    cuda_driver._nvrtc.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        cuda_driver.driver.cache_clear()
        cuda_driver._nvrtc.cache_clear()


@contextlib.contextmanager
def without_nvcc() -> Iterator[None]:
    """Make builds keep their source, which the emulated NVRTC compiles."""
    before = backend.find_nvcc
    backend.find_nvcc = lambda: None
    try:
        yield
    finally:
        backend.find_nvcc = before


def allocated() -> int:
    """Return the bytes of the emulated device that are allocated (inside `driver_environment`)."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda_driver.driver().call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    return total.value - free.value


def executor(graph: Graph, target: str = "cuda-sm80") -> CudaExecutor:
    """Return an executor of a shaped graph on the emulated GPU (inside `driver_environment`)."""
    made = backend.make(target)
    assert isinstance(made, CudaBackend)
    with without_nvcc():
        built = made.build(made.lower(graph), TuningBudget())
    gpu = cuda_driver.driver()
    image = cuda_driver.compile_source(built.members[backend.SOURCE], gpu.capability)
    return CudaExecutor(
        gpu, loads(built.members[backend.PROGRAM], "program.json"), image, built.parameters,
        [TensorSpec(v.shape, v.dtype) for v in graph.inputs],
        [TensorSpec(v.shape, v.dtype) for v in graph.output_values],
    )  # fmt: skip


def run_graph(
    graph: Graph, feeds: Mapping[str, Array], target: str = "cuda-sm80", **settings: str
) -> dict[str, Array]:
    """Run a shaped graph on the emulated GPU."""
    with driver_environment(**settings):
        results = executor(graph, target).run([feeds[v.name] for v in graph.inputs])
    return {name: array for (name, _), array in zip(graph.outputs, results, strict=True)}


def differences(got: Mapping[str, Array], expected: Mapping[str, Array]) -> list[str]:
    """Name every result that is not equal, bit for bit."""
    found = []
    for name, want in expected.items():
        have = got[name]
        if have.dtype != want.dtype or have.shape != want.shape:
            found.append(f"{name}: {have.dtype}{have.shape}, expected {want.dtype}{want.shape}")
        elif have.tobytes() != want.tobytes():
            bad = np.argwhere(np.asarray(have != want))
            at = tuple(bad[0]) if len(bad) else ()
            found.append(
                f"{name}: {len(bad)} of {want.size} differ, at {at}: {have[at]} != {want[at]}"
            )
    return found


def far_results(
    got: Mapping[str, Array], expected: Mapping[str, Array], names: Sequence[str], rtol: float
) -> list[str]:
    """Name float results that differ by more than a relative tolerance of the greatest value."""
    found = []
    for name in names:
        want: Any = expected[name].astype(np.float64)
        have: Any = got[name].astype(np.float64)
        odd = ~np.isfinite(want)
        error = np.abs(np.where(odd, 0.0, have) - np.where(odd, 0.0, want)).max(initial=0.0)
        most = np.abs(want[~odd]).max(initial=0.0)
        same = np.array_equal(have[odd], want[odd], equal_nan=True)
        if not (same and error <= rtol * max(most, 1e-6)):
            found.append(f"{name}: error {error:.3g} of {most:.3g}")
    return found
