# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Run compiled code with TVM's runtime library alone.

Neither TVM's Python package nor `libtvm_compiler.so` (259 MB) is loaded: the small `tvm_ffi`
package calls into `libtvm_runtime.so`. A process may use both: the search below is TVM's own, so
that an `import tvm` before or after finds the very same library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.abc
import importlib.util
import itertools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from qcompiler.cpu import allowed_cpus, default_threads
from qcompiler.errors import ArtifactError, CodegenError, UnsupportedByTargetError
from qcompiler.manifest import ALIGNMENT
from qcompiler.types import Array

_CPU = 1  # DLPack's kDLCPU
_POOLED = 2  # TVM's pooled allocator: buffers of one run are reused by the next
_SHARE_ALL_CPUS = -3  # TVM's affinity mode kSpecifyThreadShareAllCore

# tvm::runtime::threading::SetMaxConcurrency(int): at 1, the calling thread runs every parallel loop
# by itself and no pool is made. Nothing registered as a packed function can say that.
_SET_MAX_CONCURRENCY = "_ZN3tvm7runtime9threading17SetMaxConcurrencyEi"


class _HideTorch(importlib.abc.MetaPathFinder):
    """Makes `import torch` fail in one thread.

    tvm_ffi imports torch where it is installed, to convert its tensors faster: 0.8 s at every
    start, and with older versions a C++ compilation. Nothing here converts torch tensors.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("hidden from tvm_ffi", name="torch")


@dataclass(frozen=True, slots=True)
class _Runtime:
    """TVM's runtime, loaded.

    Attributes:
        ffi: The `tvm_ffi` module.
        load_library: path, format -> Module.
        configure_pool: affinity mode, threads, CPUs -> None; for the calling thread.
        set_max_concurrency: Number of threads of the calling thread's parallel loops; 0: default.
    """

    ffi: ModuleType
    load_library: Any
    configure_pool: Any
    set_max_concurrency: Any


@functools.cache
def _runtime() -> _Runtime:
    """Load TVM's runtime, once per process.

    Raises:
        UnsupportedByTargetError: apache-tvm or apache-tvm-ffi is missing or of another version.
    """
    hint = "install the pinned pair with 'pip install qcompiler'"
    finder = _HideTorch()
    if "torch" not in sys.modules:
        sys.meta_path.insert(0, finder)
    try:
        import tvm_ffi
        from tvm_ffi.libinfo import load_lib_ctypes
    except ImportError as error:
        raise UnsupportedByTargetError(
            f"cannot import apache-tvm-ffi, which runs compiled models: {error}", hint=hint
        ) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(finder)
    spec = importlib.util.find_spec("tvm")  # finds, does not import
    if spec is None or spec.origin is None:
        raise UnsupportedByTargetError(
            "cannot find apache-tvm, whose runtime library runs compiled models", hint=hint
        )
    package = Path(spec.origin).parent
    folders = [package / "lib", package.parent / "build" / "lib", package.parent / "lib"]
    if os.environ.get("TVM_LIBRARY_PATH"):
        folders.insert(0, Path(os.environ["TVM_LIBRARY_PATH"]))
    try:
        library = load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
        # Sorting and other library functions that operators we do not model may call.
        with contextlib.suppress(OSError, RuntimeError):
            load_lib_ctypes(
                "tvm",
                "tvm_runtime_extra",
                "RTLD_LOCAL",
                extra_lib_paths=[Path(library._name).resolve().parent],
            )
        set_max_concurrency = getattr(library, _SET_MAX_CONCURRENCY)
        set_max_concurrency.argtypes = [ctypes.c_int]
        set_max_concurrency.restype = None
        return _Runtime(
            ffi=tvm_ffi,
            load_library=tvm_ffi.get_global_func("ffi.Module.load_from_file.so"),
            configure_pool=tvm_ffi.get_global_func("runtime.config_threadpool"),
            set_max_concurrency=set_max_concurrency,
        )
    except (OSError, RuntimeError, AttributeError, ValueError) as error:
        raise UnsupportedByTargetError(
            f"cannot use the TVM runtime library under {package}: {error}", hint=hint
        ) from error


# --- threads ---


class _PoolState(threading.local):
    """What is known about the calling thread's TVM thread pool (TVM has one per thread)."""

    threads: int = 0  # what parallel loops use now; 0: never configured
    workers: int = 0  # size of the pool, fixed when it is made; 0: none yet
    pid: int = 0  # the process that made it


_POOL = _PoolState()


def use_threads(threads: int) -> int:
    """Make parallel loops that this thread starts use `threads` threads; return how many they get.

    TVM keeps a pool per calling thread and fixes its size when the pool is made: the default
    number of threads, or `threads` if that is more. Later calls get at most that many, and a forked
    child, which has its parent's pool without the threads in it, gets one. TVM also binds the
    caller and its workers to the first CPUs of the machine, `taskset` notwithstanding; here they
    keep the CPUs that the caller was allowed.
    """
    if _POOL.workers:
        threads = min(threads, _POOL.workers) if _POOL.pid == os.getpid() else 1
    if threads == _POOL.threads:
        return threads
    runtime = _runtime()
    if threads == 1:
        runtime.set_max_concurrency(1)
    else:
        workers = _POOL.workers or max(threads, default_threads())
        cpus = allowed_cpus()
        ids = [str(cpu) for cpu in itertools.islice(itertools.cycle(cpus), workers)]
        try:
            runtime.configure_pool(_SHARE_ALL_CPUS, threads, ids)
        finally:
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, cpus)
        _POOL.workers, _POOL.pid = workers, os.getpid()
    _POOL.threads = threads
    return threads


# --- the library ---

_LOADS = itertools.count(1)


@contextlib.contextmanager
def _file_in_memory(data: bytes) -> Iterator[str]:
    """Yield a path to an unnamed file: a kill leaves nothing behind, a noexec /tmp is no matter."""
    handle = os.memfd_create("qcompiler-lib", os.MFD_CLOEXEC)
    try:
        with os.fdopen(handle, "wb", closefd=False) as stream:
            stream.write(data)
        # dlopen answers a path that it has seen with the library that it has, and descriptors are
        # used again: so every load spells its path in its own way.
        spelling = "".join("//." if bit == "1" else "/." for bit in f"{next(_LOADS):b}")
        yield f"/proc/self/fd{spelling}/{handle}"
    finally:
        os.close(handle)


@contextlib.contextmanager
def _file_on_disk(data: bytes) -> Iterator[str]:
    """Yield a path to a file in a new folder that only this user can enter."""
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        path = Path(folder) / "lib.so"
        path.write_bytes(data)
        yield str(path)


def _load_library(data: bytes) -> Any:
    """Map a shared library from its bytes and return TVM's module; no file remains.

    Raises:
        ArtifactError: The system or TVM refuses the library.
    """
    runtime = _runtime()
    problem = ""
    for file in (_file_in_memory, _file_on_disk):
        if file is _file_in_memory and not hasattr(os, "memfd_create"):
            continue
        try:
            with file(data) as path:
                return runtime.load_library(path, "so")
        except (*_FFI_ERRORS, OSError) as error:
            problem = _first_line(error)
    raise ArtifactError(
        f"cannot load the compiled library: {problem}",
        hint="compile again for this machine and this version of TVM",
    )


# What tvm_ffi raises for errors inside TVM: it maps TVM's error kinds to Python's.
_FFI_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# --- the executor ---


class VmExecutor:
    """Runs the function `main` of a compiled library in TVM's virtual machine.

    A virtual machine serves one call at a time, so there are as many as calls were ever made at
    once; the parameters are shared by all of them. Safe to use from several threads.
    """

    def __init__(self, library: bytes, params: Sequence[Array]) -> None:
        """Map the library and make the first virtual machine.

        Args:
            library: A shared library that TVM exported from a Relax executable.
            params: Last arguments of `main`, each at a multiple of 64 bytes, never written again.

        Raises:
            ArtifactError: The library cannot be loaded.
            UnsupportedByTargetError: TVM's runtime is not installed.
        """
        self._ffi = _runtime().ffi
        self._module = _load_library(library)
        self._arrays = tuple(params)  # keeps the memory alive
        self._params = tuple(self._ffi.from_dlpack(_aligned(array)) for array in params)
        self._idle: list[Any] = []
        try:
            self._idle.append(self._new_main())
        except _FFI_ERRORS as error:
            raise ArtifactError(
                f"the compiled library holds no runnable model: {_first_line(error)}",
                hint="compile again with this version of TVM",
            ) from error

    def _new_main(self) -> Any:
        machine = self._module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        return machine["main"]

    def profile(
        self, inputs: Sequence[Array], *, runs: int = 5, threads: int | None = None
    ) -> list[tuple[str, float]]:
        """Time every call of a kernel while the model runs.

        Args:
            inputs: As for `run`.
            runs: Measured runs; each call's least time counts.
            threads: As for `run`.

        Returns:
            (symbol, seconds) in the order of the calls; the VM's own work is left out.
        """
        use_threads(default_threads() if threads is None else threads)
        machine = self._module["vm_load_executable"]()
        machine["vm_initialization"](_CPU, 0, _POOLED)
        started = 0.0
        calls: list[tuple[str, float]] = []

        def observe(_function: Any, symbol: str, before: bool, _result: Any, *_args: Any) -> int:
            nonlocal started
            now = time.perf_counter()
            if not before and not symbol.startswith("vm."):
                calls.append((symbol, now - started))
            started = time.perf_counter()
            return 0

        machine["set_instrument"](self._ffi.convert(observe))
        held = [self._ffi.from_dlpack(_aligned(array)) for array in inputs]
        least: list[tuple[str, float]] = []
        for _ in range(runs + 1):  # the first one warms up
            calls.clear()
            machine["main"](*held, *self._params)
            least = [
                (symbol, min(seconds, least[i][1]) if least else seconds)
                for i, (symbol, seconds) in enumerate(calls)
            ]
        return least

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Run once; the arrays are taken as they are where they lie well, else copied.

        Args:
            inputs: First arguments of `main`.
            threads: Threads for this call.

        Raises:
            CodegenError: The compiled code reported an error.
        """
        use_threads(threads)
        try:
            main = self._idle.pop()  # list.pop and append are atomic
        except IndexError:
            main = self._new_main()
        held = [_aligned(array) for array in inputs]
        try:
            result = main(*map(self._ffi.from_dlpack, held), *self._params)
        except _FFI_ERRORS as error:
            raise CodegenError(f"the compiled code failed: {_first_line(error)}") from error
        self._idle.append(main)
        tensors = [result] if isinstance(result, self._ffi.Tensor) else list(result)
        return [np.from_dlpack(tensor) for tensor in tensors]


def _aligned(array: Array) -> Array:
    """Return the array, or a copy of it, as kernels need it: row-major, aligned, writeable."""
    flags = array.flags
    if not array.size:  # numpy takes extents of 0 for 1 in strides, TVM does not
        steps = np.cumprod((array.itemsize, *array.shape[:0:-1]))[::-1]
        return np.lib.stride_tricks.as_strided(array, array.shape, steps.tolist())
    if (
        flags.c_contiguous
        and flags.writeable  # numpy before 2.1 exports no read-only memory
        and array.__array_interface__["data"][0] % ALIGNMENT == 0
    ):
        return array
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % ALIGNMENT
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
