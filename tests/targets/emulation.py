# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Run code for 64-bit ARM under qemu's user mode, on the processor of each row.

What it takes, all found or made once and kept in a cache folder:

* `qemu-aarch64-static` (or `qemu-aarch64`), and a C++ compiler for aarch64 with its libraries:
  Debian's packages qemu-user-static and g++-aarch64-linux-gnu;
* TVM's runtime for aarch64: the wheels of the very versions that are installed here, from
  `QCOMPILER_ARM_SITE` (a folder with the packages tvm and tvm_ffi unpacked), or downloaded;
* the two programs that run models and kernels, compiled from `examples/cpp` and this folder.

The processors are real ones, so an instruction beyond the row faults: qemu's cortex-a72 has no
`sdot`, its neoverse-n1 no `smmla`; for i8mm qemu has only "max".
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np

from qcompiler.linker import export_library

Array = np.ndarray[Any, np.dtype[Any]]

ROOT = Path(__file__).resolve().parent.parent.parent
PROCESSORS = {"arm-neon": "cortex-a72", "arm-dotprod": "neoverse-n1", "arm-i8mm": "max"}
"""What qemu emulates for each row: the least that has its instructions."""
_PACKAGES = ("apache-tvm", "apache-tvm-ffi")
_PLATFORMS = tuple(
    f"manylinux{suffix}_aarch64" for suffix in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")
)
_COMPILER = "aarch64-linux-gnu-g++"
_SYSROOT = Path("/usr/aarch64-linux-gnu")


class MissingError(Exception):
    """Something that emulation needs is not here; the message says what."""


class DiedError(AssertionError):
    """The emulated program was killed.

    Attributes:
        signal: What killed it: SIGILL where an instruction is not the processor's.
    """

    def __init__(self, what: str, status: int) -> None:
        super().__init__(f"{what}: died with status {status}")
        self.signal = signal.Signals(-status) if status < 0 else None


def cache_folder() -> Path:
    """Return the folder that keeps the wheels and the compiled programs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qcompiler-test" / "aarch64"


@dataclass
class Rig:
    """Programs under emulation."""

    emulator: str
    site: Path
    model_program: Path
    kernel_program: Path
    _servers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _answer: str = ""

    def command(self, row: str, program: Path, *arguments: str) -> list[str]:
        """Return the command that runs a program on a row's processor."""
        cpu = ["-cpu", PROCESSORS[row], "-L", str(_SYSROOT)]
        return [self.emulator, *cpu, str(program), *arguments]

    def run_model(self, row: str, artifact: Path, inputs: Sequence[Array]) -> list[bytes]:
        """Run a `.qcm` on one batch; return the bytes of each output."""
        listing = self._run(row, self.model_program, str(artifact))
        count = sum(line.startswith("output ") for line in listing.splitlines())
        with tempfile.TemporaryDirectory(prefix="qcompiler-arm-") as folder:
            files = [Path(folder) / f"in{i}" for i in range(len(inputs))]
            for file, array in zip(files, inputs, strict=True):
                file.write_bytes(np.ascontiguousarray(array).tobytes())
            outputs = [Path(folder) / f"out{i}" for i in range(count)]
            self._run(row, self.model_program, str(artifact), *map(str, [*files, *outputs]))
            return [file.read_bytes() for file in outputs]

    def _run(self, row: str, program: Path, *arguments: str) -> str:
        done = subprocess.run(
            self.command(row, program, *arguments),
            capture_output=True,
            text=True,
            env={**os.environ, "TVM_NUM_THREADS": "1"},
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, f"status {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def call(self, row: str, library: bytes, function: str, arrays: Sequence[Array]) -> Array:
        """Call a function of a shared library; return the last array, which it writes."""
        return self.call_all(row, library, function, arrays)[-1]

    def call_all(
        self, row: str, library: bytes, function: str, arrays: Sequence[Array]
    ) -> list[Array]:
        """Call a function of a shared library; return all arrays as it leaves them."""
        with self._lock, _file(library) as path:
            stream = self._asked(row, path, function, arrays)
            return [np.frombuffer(stream.read(a.nbytes), a.dtype).reshape(a.shape) for a in arrays]

    def call_main(self, row: str, library: Path, arrays: Sequence[Array]) -> list[Array]:
        """Run `main` of a model's library on its inputs and parameters; return the results."""
        with self._lock:
            stream = self._asked(row, library, "vm:main", arrays)
            found = []
            for _ in range(int(self._answer.split()[1])):
                dtype, _, *shape = stream.readline().decode().split()
                count = int(np.prod([int(e) for e in shape], dtype=np.int64))
                data = stream.read(count * np.dtype(dtype).itemsize)
                found.append(np.frombuffer(data, dtype).reshape([int(e) for e in shape]))
            return found

    def _asked(self, row: str, library: Path, function: str, arrays: Sequence[Array]) -> IO[bytes]:
        """Send a request; return the stream with what follows the line "ok"."""
        server = self._servers.get(row)
        if server is None or server.poll() is not None:
            server = self._servers[row] = subprocess.Popen(
                self.command(row, self.kernel_program),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "TVM_NUM_THREADS": "1"},
            )
        assert server.stdin is not None
        assert server.stdout is not None
        parts = [f"{library} {function} {len(arrays)}\n".encode()]
        for array in arrays:
            shape = " ".join(map(str, array.shape))
            parts.append(f"{array.dtype.name} {array.ndim} {shape}\n".encode())
            parts.append(array.tobytes())
        try:
            server.stdin.write(b"".join(parts))
            server.stdin.flush()
        except BrokenPipeError:
            pass  # it died; its status says of what
        self._answer = server.stdout.readline().decode().strip()
        if not self._answer:
            raise DiedError(f"{function} on {PROCESSORS[row]}", server.wait())
        assert self._answer.startswith("ok"), self._answer
        return server.stdout


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(suffix=".so", prefix="qcompiler-arm-")
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        yield path
    finally:
        path.unlink()


@functools.cache
def _found() -> Rig | str:
    try:
        return _make()
    except MissingError as error:
        return str(error)


def why_not() -> str:
    """Return why nothing can be emulated here, or ""."""
    found = _found()
    return found if isinstance(found, str) else ""


def rig() -> Rig:
    """Return the rig.

    Raises:
        MissingError: Something is missing.
    """
    found = _found()
    if isinstance(found, str):
        raise MissingError(found)
    return found


def _make() -> Rig:
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        raise MissingError("no qemu-aarch64: install qemu-user-static")
    if shutil.which(_COMPILER) is None or not (_SYSROOT / "lib/libstdc++.so.6").exists():
        raise MissingError(f"no {_COMPILER} with its libraries: install g++-aarch64-linux-gnu")
    site = _site()
    sources = (ROOT / "examples/cpp/qcm_run.cpp", Path(__file__).with_name("kernel_server.cpp"))
    programs = [compiled_program(source, site) for source in sources]
    return Rig(emulator, site, *programs)


def _site() -> Path:
    """Return a folder with TVM's packages for aarch64, of the installed versions."""
    given = os.environ.get("QCOMPILER_ARM_SITE")
    if given:
        if not Path(given, "tvm/lib/libtvm_runtime.so").exists():
            raise MissingError(f"QCOMPILER_ARM_SITE ({given}) holds no package tvm")
        return Path(given)
    return unpacked(_PACKAGES, "site", _is_wanted)


def unpacked(packages: Sequence[str], kind: str, is_wanted: Callable[[str], bool]) -> Path:
    """Return a folder with files of wheels for aarch64, of the versions that are installed here.

    Args:
        packages: Their distributions.
        kind: Folder of the cache.
        is_wanted: Which members of the wheels.

    Raises:
        MissingError: They cannot be downloaded.
    """
    pins = [f"{name}=={metadata.version(name)}" for name in packages]
    site = cache_folder() / kind / "-".join(pin.split("==")[1] for pin in pins)
    if site.exists():
        return site
    site.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=site.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--retries=1",
            "--timeout=20",
            "--dest",
            folder,
        ]
        command += [f"--platform={name}" for name in _PLATFORMS]
        command += ["--python-version=3.11", "--implementation=cp", "--only-binary=:all:"]
        command += ["--abi=cp311", "--abi=abi3", "--abi=none", *pins]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise MissingError(f"no wheels of {', '.join(pins)} for aarch64: pip said {said}")
        partial = Path(folder) / "site"
        for wheel in Path(folder).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if is_wanted(n)]
                archive.extractall(partial, wanted)
        with contextlib.suppress(OSError):  # another process was faster
            partial.rename(site)
    return site


def _is_wanted(name: str) -> bool:
    libraries = ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so")
    return name in libraries or name.startswith("tvm_ffi/include/")


def compiled_program(source: Path, site: Path) -> Path:
    """Return a program compiled for aarch64; compiled again only when its source changed.

    Raises:
        MissingError: It cannot be compiled.
    """
    header = ROOT / "examples/cpp/qcm.h"
    key = hashlib.sha256(source.read_bytes() + header.read_bytes() + str(site).encode())
    program = cache_folder() / "bin" / f"{source.stem}-{key.hexdigest()[:16]}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    folders = [site / "tvm_ffi/lib", site / "tvm/lib"]
    partial = program.with_suffix(f".{os.getpid()}")
    command = [_COMPILER, "-std=c++17", "-O1", str(source), "-o", str(partial)]
    command += [f"-I{header.parent}", "-isystem", str(site / "tvm_ffi/include")]
    command += [f"-L{f}" for f in folders] + [f"-Wl,-rpath,{f}" for f in folders]
    command += ["-Wl,--no-as-needed", "-ltvm_runtime", "-ltvm_ffi"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"{_COMPILER} cannot compile {source.name}: {done.stderr[-500:]}")
    partial.rename(program)
    return program


def library_of(compiled: Any) -> bytes:
    """Return the shared library of what `tvm.compile` made for an ARM row."""
    return export_library(compiled, triple="aarch64-unknown-linux-gnu")


class EmulatedModule:
    """What `tvm.compile` returns for a foreign row, with functions that run under emulation."""

    def __init__(self, compiled: Any, row: str) -> None:
        self._row = row
        self._compiled = compiled
        self._library: bytes | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def __getitem__(self, name: str) -> Any:
        if self._library is None:
            self._library = library_of(self._compiled)
        library = self._library

        def call(*tensors: Any) -> None:
            arrays = [tensor.numpy() for tensor in tensors]
            found = rig().call_all(self._row, library, name, arrays)
            for tensor, before, after in zip(tensors, arrays, found, strict=True):
                if before.tobytes() != after.tobytes():
                    tensor.copyfrom(after)

        return call


class EmulatedExecutor:
    """Stands in for `VmExecutor` where the library is a foreign row's."""

    row = ""

    def __init__(self, library: bytes, params: Sequence[Array]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qcompiler-arm-")
        self._library = Path(self._folder.name) / "lib.so"
        self._library.write_bytes(library)
        self._params = tuple(params)

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Run once, in one thread."""
        del threads
        return rig().call_main(self.row, self._library, [*inputs, *self._params])


@contextlib.contextmanager
def executor(row: str, library: bytes, params: Sequence[Array]) -> Iterator[EmulatedExecutor]:
    """An executor of a model's library on one row."""
    made = EmulatedExecutor(library, params)
    made.row = row
    with made._folder:
        yield made


def emulate_rows(names: Sequence[str]) -> None:
    """Make this process take the named rows for the ones that run here, and emulate them.

    For test modules that ask `runnable` for the rows to test and `tvm.compile` for their code, and
    run models by `VmExecutor`.
    """
    import tvm

    from qcompiler import vm
    from qcompiler.targets import isa as table

    rig()
    compile_native = tvm.compile
    rows = {str(table.tvm_target(table.ISA_TABLE[name])): name for name in names}

    def compiled(module: Any, target: Any = None, **options: Any) -> Any:
        built = compile_native(module, target=target, **options)
        row = rows.get(str(target))
        return built if row is None else EmulatedModule(built, row)

    tvm.compile = compiled
    if len(names) == 1:
        EmulatedExecutor.row = names[0]
        vm.VmExecutor = EmulatedExecutor
    table.runnable = lambda isa: isa.name in names
