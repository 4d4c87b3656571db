# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Run a model that was compiled for an NVIDIA GPU: numpy, ctypes and the driver, nothing else.

Everything is known beforehand (docs/cuda.md): one arena, the parameters, and a list of launches.
They are recorded once as a CUDA graph, together with the copies of inputs and results, so that a
run is one call of the driver. Concurrent calls get an arena and a graph each; the parameters and
the code are shared.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Sequence
from ctypes import byref, c_float, c_void_p
from typing import Any

import numpy as np

from qcompiler.artifact import Artifact
from qcompiler.cuda_driver import CudaError, Driver, compile_source, driver
from qcompiler.errors import ArtifactError, CodegenError, DataError
from qcompiler.manifest import TensorSpec, check_schema, loads
from qcompiler.types import Array

PROGRAM, FATBIN, SOURCE = "program.json", "kernels.fatbin", "kernels.cu"
_ALIGNMENT = 256
_NO_GRAPH_UPLOAD = 0
_CAPTURE_RELAXED = 2
_STATUS_BYTES = 256

_REFERENCE: dict[str, Any] = {"type": "array", "items": {"type": ["string", "integer"]}}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["arch", "arena", "format", "inputs", "kernels", "launches", "outputs"],
    "additionalProperties": False,
    "properties": {
        "format": {"type": "integer", "enum": [1]},
        "arch": {"type": "string", "pattern": "^sm_[0-9]+$"},
        "arena": _COUNT,
        "inputs": {"type": "array", "items": _REFERENCE},
        "outputs": {"type": "array", "items": _REFERENCE},
        "kernels": {"type": "object", "additionalProperties": _COUNT},
        "launches": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["arguments", "grid", "kernel", "shared", "threads"],
                "additionalProperties": False,
                "properties": {
                    "kernel": {"type": "string"},
                    "grid": {"type": "array", "items": {"type": "integer", "minimum": 1}},
                    "threads": {"type": "integer", "minimum": 1},
                    "shared": _COUNT,
                    "arguments": {"type": "array", "items": _REFERENCE},
                },
            },
        },
    },
}
"""JSON Schema of program.json, in the words that `manifest.check_schema` knows."""


def load_executor(artifact: Artifact) -> CudaExecutor:
    """Return the executor of a stored artifact.

    Raises:
        ArtifactError: The program is missing or not valid.
        UnsupportedByTargetError: No driver, no GPU, no room on it, or no NVRTC for a source.
    """
    stored = artifact.extras.get(PROGRAM)
    if stored is None:
        raise ArtifactError(f"the artifact holds no {PROGRAM}")
    program = loads(bytes(stored), PROGRAM)
    check_schema(program, SCHEMA, PROGRAM)
    found = driver()
    if FATBIN in artifact.extras:
        image = bytes(artifact.extras[FATBIN])
    elif SOURCE in artifact.extras:
        image = compile_source(bytes(artifact.extras[SOURCE]), found.capability)
    else:
        raise ArtifactError(f"the artifact holds neither {FATBIN} nor {SOURCE}")
    return CudaExecutor(
        found, program, image, artifact.params.arrays, list(artifact.inputs.values()),
        list(artifact.outputs.values()),
    )  # fmt: skip


class _Code:
    """The code and the parameters on the GPU, shared by every call."""

    def __init__(
        self,
        gpu: Driver,
        program: dict[str, Any],
        image: bytes,
        parameters: Sequence[Array],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        self.gpu = gpu
        self.program = program
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._addresses: list[int] = []
        held: list[tuple[str, int]] = []
        weakref.finalize(self, _let_go, gpu, held)
        module, self.functions = gpu.load_module(image, program["kernels"])
        held.append(("cuModuleUnload", module))
        base = gpu.allocate(sum(_rounded(a.nbytes) for a in parameters), "the parameters")
        held.append(("cuMemFree_v2", base))
        for array in parameters:
            if array.nbytes:
                source = np.ascontiguousarray(array)
                gpu.call("cuMemcpyHtoD_v2", base, source.ctypes.data, source.nbytes)
            self._addresses.append(base)
            base += _rounded(array.nbytes)

    def address(self, reference: list[Any], arena: int, status: int) -> int:
        """Return what a reference of the program points at.

        Raises:
            ArtifactError: Nothing.
        """
        kind, value = reference if len(reference) == 2 else ("", 0)
        if kind == "arena" and 0 <= value < self.program["arena"]:
            return arena + int(value)
        if kind == "parameter" and 0 <= value < len(self._addresses):
            return self._addresses[value]
        if kind == "status":
            return status
        raise ArtifactError(f"program.json: {reference} refers to nothing")


class CudaExecutor:
    """Runs a program of launches; safe to use from several threads."""

    def __init__(
        self,
        gpu: Driver,
        program: dict[str, Any],
        image: bytes,
        parameters: Sequence[Array],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
    ) -> None:
        """Load the code and the parameters, and record the first graph.

        Raises:
            ArtifactError: The program refers to what is not there.
            UnsupportedByTargetError: The GPU does not take the code, or has no room.
        """
        self.gpu = gpu
        with gpu.current():
            self._code = _Code(gpu, program, image, parameters, inputs, outputs)
            self._idle = [_Machine(self._code)]

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Run once.

        Raises:
            CodegenError: A kernel failed.
            DataError: An index in the inputs is outside of the table that it points into.
        """
        del threads
        with self.gpu.current():
            try:
                machine = self._idle.pop()  # list.pop and append are atomic
            except IndexError:
                machine = _Machine(self._code)
            try:
                results = machine.run(inputs)
            except CudaError as error:
                raise CodegenError(
                    f"the GPU failed while it ran the model: {error.message}",
                    hint="this is a defect of qcompiler; please report it with the model",
                ) from error
            self._idle.append(machine)
            return results

    def profile(self, inputs: Sequence[Array], *, runs: int = 5) -> list[tuple[str, float]]:
        """Return (kernel, seconds) of every launch in order, the least of some runs."""
        with self.gpu.current():
            return _Machine(self._code, record=False).profile(inputs, runs)

    def device_times(self, inputs: Sequence[Array], *, runs: int = 20) -> list[float]:
        """Return the seconds of some runs on the device alone: no copies of inputs and results."""
        with self.gpu.current():
            return _Machine(self._code, record=False).device_times(inputs, runs)


def _rounded(nbytes: int) -> int:
    return -(-max(nbytes, 1) // _ALIGNMENT) * _ALIGNMENT


class _Machine:
    """An arena, staging memory and a recorded graph: what one call at a time uses."""

    def __init__(self, code: _Code, *, record: bool = True) -> None:
        gpu = self.gpu = code.gpu
        self.code = code
        program = code.program
        self.held: list[tuple[str, int]] = []
        weakref.finalize(self, _let_go, gpu, self.held)
        self.arena = gpu.allocate(program["arena"] + _STATUS_BYTES, "the activations")
        self.held.append(("cuMemFree_v2", self.arena))
        self.status = self.arena + program["arena"]
        self.stream = self._keep("cuStreamDestroy_v2", gpu.get("cuStreamCreate", c_void_p, 1).value)
        self.sources = [self._staging(s) for s in code.inputs]
        self.results = [self._staging(s) for s in code.outputs]
        status = self._keep(
            "cuMemFreeHost", gpu.get("cuMemHostAlloc", c_void_p, _STATUS_BYTES, 0).value
        )
        self.status_word = (ctypes.c_int * 1).from_address(status)
        self._launches = [self._prepared(entry) for entry in program["launches"]]
        self.graph = self._record() if record else 0

    def _keep(self, how: str, handle: int | None) -> int:
        self.held.append((how, int(handle or 0)))
        return int(handle or 0)

    def _staging(self, spec: TensorSpec) -> Array:
        """Return an array in memory that the GPU copies from and to by itself."""
        size = max(spec.nbytes, 1)
        address = self._keep(
            "cuMemFreeHost", self.gpu.get("cuMemHostAlloc", c_void_p, size, 0).value
        )
        raw = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
        flat: Array = np.frombuffer(raw, spec.dtype.numpy, count=math.prod(spec.shape))
        return flat.reshape(spec.shape)

    def _prepared(self, entry: dict[str, Any]) -> tuple[str, list[Any], Any]:
        """Return a launch's kernel and the arguments of cuLaunchKernel."""
        code = self.code
        if entry["kernel"] not in code.functions or len(entry["grid"]) != 3:
            raise ArtifactError(f"program.json: no kernel {entry['kernel']!r} with such a grid")
        addresses = [code.address(r, self.arena, self.status) for r in entry["arguments"]]
        values = [c_void_p(a) for a in addresses]
        # One pointer per argument, to where its value lies; a null one ends the list.
        pointers = (c_void_p * (len(values) + 1))(*(ctypes.addressof(v) for v in values), None)
        call = [code.functions[entry["kernel"]], *entry["grid"], entry["threads"], 1, 1,
                entry["shared"], self.stream, pointers, None]  # fmt: skip
        return entry["kernel"], call, values

    def _copies_in(self) -> None:
        gpu, code = self.gpu, self.code
        gpu.call("cuMemsetD8Async", self.status, 0, _STATUS_BYTES, self.stream)
        for reference, array in zip(code.program["inputs"], self.sources, strict=True):
            if array.nbytes:
                to = code.address(reference, self.arena, self.status)
                gpu.call("cuMemcpyHtoDAsync_v2", to, array.ctypes.data, array.nbytes, self.stream)

    def _copies_out(self) -> None:
        gpu, code = self.gpu, self.code
        for reference, array in zip(code.program["outputs"], self.results, strict=True):
            if array.nbytes:
                source = code.address(reference, self.arena, self.status)
                gpu.call(
                    "cuMemcpyDtoHAsync_v2", array.ctypes.data, source, array.nbytes, self.stream
                )
        gpu.call(
            "cuMemcpyDtoHAsync_v2", ctypes.addressof(self.status_word), self.status, 4, self.stream
        )

    def _record(self, *, copies: bool = True) -> int:
        gpu = self.gpu
        gpu.call("cuStreamBeginCapture_v2", self.stream, _CAPTURE_RELAXED)
        try:
            if copies:
                self._copies_in()
            for _, call, _ in self._launches:
                gpu.call("cuLaunchKernel", *call)
            if copies:
                self._copies_out()
        finally:
            recorded = c_void_p()  # a capture has to end, whatever happened in it
            gpu.call("cuStreamEndCapture", self.stream, byref(recorded))
        graph = recorded.value
        try:
            made = gpu.get("cuGraphInstantiateWithFlags", c_void_p, graph, _NO_GRAPH_UPLOAD).value
        finally:
            gpu.call("cuGraphDestroy", graph)
        return self._keep("cuGraphExecDestroy", made)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run the graph on some inputs; the results are copies."""
        for to, array in zip(self.sources, inputs, strict=True):
            to[...] = array
        self.gpu.call("cuGraphLaunch", self.graph, self.stream)
        self.gpu.call("cuStreamSynchronize", self.stream)
        if self.status_word[0]:
            raise DataError("an index in the inputs is outside of the table that it points into")
        return [array.copy() for array in self.results]

    def _events(self, count: int) -> list[int]:
        made = (self.gpu.get("cuEventCreate", c_void_p, 0).value for _ in range(count))
        return [self._keep("cuEventDestroy_v2", event) for event in made]

    def _seconds(self, start: int, end: int) -> float:
        milliseconds = c_float()
        self.gpu.call("cuEventElapsedTime", byref(milliseconds), start, end)
        return milliseconds.value * 1e-3

    def device_times(self, inputs: Sequence[Array], runs: int) -> list[float]:
        """Time runs of the launches alone, as one graph each."""
        gpu = self.gpu
        graph = self._record(copies=False)
        for to, array in zip(self.sources, inputs, strict=True):
            to[...] = array
        self._copies_in()
        start, end = self._events(2)
        found = []
        for _ in range(runs + 1):  # the first one warms up
            gpu.call("cuEventRecord", start, self.stream)
            gpu.call("cuGraphLaunch", graph, self.stream)
            gpu.call("cuEventRecord", end, self.stream)
            gpu.call("cuStreamSynchronize", self.stream)
            found.append(self._seconds(start, end))
        return found[1:]

    def profile(self, inputs: Sequence[Array], runs: int) -> list[tuple[str, float]]:
        """Time every launch between two events."""
        gpu = self.gpu
        for to, array in zip(self.sources, inputs, strict=True):
            to[...] = array
        events = self._events(len(self._launches) + 1)
        best = [math.inf] * len(self._launches)
        for _ in range(runs + 1):  # the first one warms up
            self._copies_in()
            gpu.call("cuEventRecord", events[0], self.stream)
            for (_, call, _), event in zip(self._launches, events[1:], strict=True):
                gpu.call("cuLaunchKernel", *call)
                gpu.call("cuEventRecord", event, self.stream)
            gpu.call("cuStreamSynchronize", self.stream)
            for i in range(len(best)):
                best[i] = min(best[i], self._seconds(events[i], events[i + 1]))
        names = [name for name, _, _ in self._launches]
        return list(zip(names, best, strict=True))


def _let_go(gpu: Driver, held: list[tuple[str, int]]) -> None:
    with contextlib.suppress(CudaError), gpu.current():
        for how, handle in reversed(held):
            if handle:
                gpu.call(how, handle)
