# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The artifact file `.qcm`: one zip archive that a runtime loads without the compiler.

Members (docs/artifact.md): `manifest.json`, `plan.json`, `params.bin`, `lib.so` for compiled code,
and whatever an executor adds. They are stored, not compressed, sorted by name and free of times,
so that the same inputs give the same bytes. Measured figures stay out, in a report beside the file.

Reading trusts nothing: names, sizes, digests and the CPU are checked before any code is mapped,
and no member is ever unpickled.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import math
import mmap
import os
import re
import secrets
import stat
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import numpy as np

from qcompiler.cpu import allow_tiles, host_cpu, missing_features
from qcompiler.dynamic import Dynamic
from qcompiler.errors import ArtifactError, UnsupportedByTargetError, UsageError
from qcompiler.manifest import (
    ALIGNMENT,
    EXECUTORS,
    FORMAT,
    FORMAT_VERSION,
    MEMBER_NAME,
    SCHEMA,
    ParamEntry,
    TargetInfo,
    TensorSpec,
    check_schema,
    dumps,
    loads,
    params_from_json,
    tensors_from_json,
    tensors_to_json,
)
from qcompiler.types import Array, DType

PathLike = str | os.PathLike[str]

MANIFEST, PLAN, PARAMS, LIBRARY = "manifest.json", "plan.json", "params.bin", "lib.so"
_RESERVED = (MANIFEST, PLAN, PARAMS, LIBRARY)
_JSON_LIMIT = 64 << 20  # bytes; a plan of 10,000 nodes takes about 2 MB
_MEMBER_LIMIT = 1000
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can say
_CHUNK = 1 << 20
_ALTERED = "the file is truncated or was altered: compile or copy it again"
# What zipfile raises on archives that are damaged in one place or another.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    IndexError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)


def _private_memory(size: int) -> mmap.mmap:
    """Return anonymous memory; shared memory, the default, gets no huge pages on most systems."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)


class ParamBlock:
    """The parameters of a compiled model in one block of memory, laid out as params.bin.

    Every array starts at a multiple of 64 bytes. The block is written once, before the first run,
    and shared by every thread and VM after that.
    """

    __slots__ = ("_arrays", "_buffer", "entries", "nbytes")

    def __init__(self, entries: tuple[ParamEntry, ...], nbytes: int) -> None:
        self.entries = entries
        self.nbytes = nbytes
        # An anonymous map is page-aligned, zero-filled and costs nothing until it is touched.
        self._buffer = _private_memory(max(nbytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
                self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._arrays: dict[str, Array] = {
            e.name: np.frombuffer(
                self._buffer, e.dtype.numpy, count=math.prod(e.shape), offset=e.offset
            ).reshape(e.shape)
            for e in entries
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array] | Iterable[tuple[str, Array]]) -> ParamBlock:
        """Copy named arrays into a block, in their order.

        Raises:
            UsageError: Two arrays of one name, or a dtype that tensors cannot have.
        """
        pairs = list(arrays.items() if isinstance(arrays, Mapping) else arrays)
        entries: dict[str, ParamEntry] = {}
        offset = 0
        for name, array in pairs:
            if name in entries:
                raise UsageError(f"two parameters are named {name!r}", value=name)
            dtype = DType.of(array.dtype)
            entries[name] = ParamEntry(name, dtype, tuple(array.shape), offset, array.nbytes)
            offset = -(-(offset + array.nbytes) // ALIGNMENT) * ALIGNMENT
        block = cls(tuple(entries.values()), offset)
        for name, array in pairs:
            block._arrays[name][...] = array
        return block

    @property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays in the order of the compiled function's arguments; do not write to them."""
        return tuple(self._arrays.values())

    @property
    def by_name(self) -> Mapping[str, Array]:
        """The arrays by name."""
        return MappingProxyType(self._arrays)

    @property
    def data(self) -> memoryview:
        """The bytes of params.bin."""
        return memoryview(self._buffer)[: self.nbytes]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _own_version() -> str:
    return _version("qcompiler")


def _package_versions() -> dict[str, str]:
    """Return the versions of the packages whose change may change an artifact's bytes."""
    return {name: _version(name) for name in ("apache-tvm", "apache-tvm-ffi", "numpy")}


@dataclass(frozen=True)
class Artifact:
    """Everything that an artifact file holds.

    Attributes:
        target: What it was compiled for.
        inputs: Inputs by name, in the order of the compiled function's first arguments.
        outputs: Outputs by name, in the order of the compiled function's results.
        params: Parameters, in the order of the compiled function's last arguments.
        library: The shared library; None unless `executor` is "vm".
        plan: Precision and reason per node, as JSON.
        executor: "vm" runs `library`; "interpreter" runs the graph that `extras` holds, "cuda" the
            program of launches there.
        extras: Further members by name.
        sources: SHA-256 of what it was made from: "model", "calibration", "plan"...
        lock: Everything that decided its bytes (see `qcompiler.lock`), as JSON; None without.
        dynamic: Extents that a call chooses, and the code for each compiled size; `inputs`,
            `outputs` and `library` are of the greatest. None where every extent is fixed.
        versions: Versions of the packages that made it.
        producer: Version of qcompiler that made it.
    """

    target: TargetInfo
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    params: ParamBlock
    library: bytes | None
    plan: Mapping[str, Any] = field(default_factory=dict)
    executor: str = "vm"
    extras: Mapping[str, bytes] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    lock: Mapping[str, Any] | None = None
    dynamic: Dynamic | None = None
    versions: Mapping[str, str] = field(default_factory=_package_versions)
    producer: str = field(default_factory=_own_version)

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise UsageError(f"unknown executor {self.executor!r}: expected {EXECUTORS}")
        if (self.library is not None) != (self.executor == "vm"):
            raise UsageError('a library is needed by executor "vm", and by no other')
        for name in self.extras:
            if name in _RESERVED or not re.fullmatch(MEMBER_NAME, name):
                raise UsageError(f"{name!r} cannot be the name of a further member")

    def members(self) -> dict[str, bytes | memoryview]:
        """Return all members but the manifest, by name."""
        members: dict[str, bytes | memoryview] = {
            PLAN: dumps(dict(self.plan)),
            PARAMS: self.params.data,
            **self.extras,
        }
        if self.library is not None:
            members[LIBRARY] = self.library
        return dict(sorted(members.items()))

    def member(self, name: str) -> bytes:
        """Return a member that holds code."""
        if name == LIBRARY and self.library is not None:
            return self.library
        return self.extras[name]

    def manifest(self) -> dict[str, Any]:
        """Return the content of manifest.json. Reads every member once, for its digest."""
        optional = {} if self.lock is None else {"lock": dict(self.lock)}
        if self.dynamic is not None:
            optional["dynamic"] = self.dynamic.to_json()
        return {
            **optional,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "producer": {"name": "qcompiler", "version": self.producer},
            "versions": dict(self.versions),
            "executor": self.executor,
            "target": self.target.to_json(),
            "inputs": tensors_to_json(self.inputs),
            "outputs": tensors_to_json(self.outputs),
            "params": [entry.to_json() for entry in self.params.entries],
            "members": {
                name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in self.members().items()
            },
            "sources": dict(self.sources),
        }

    def digest(self) -> str:
        """Return the SHA-256 of the manifest, which names every other member by digest."""
        return hashlib.sha256(dumps(self.manifest())).hexdigest()


def report_path(path: PathLike) -> Path:
    """Return where the report of an artifact lies: `resnet.qcm` -> `resnet.report.json`."""
    return Path(path).with_suffix(".report.json")


# --- writing ---


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at `path` complete or not at all.

    The bytes go to a temporary file in the same folder, which replaces `path` in one step when the
    block ends without an exception and is removed otherwise (Ctrl-C and a full disk included).

    Raises:
        ArtifactError: The folder does not exist, `path` is not a regular file, or the system
            refuses to write.
    """
    final = Path(os.path.realpath(path))  # write through a link, do not replace it
    if not final.parent.is_dir():
        raise ArtifactError(
            f"cannot write {path}: folder {final.parent} does not exist", hint="create it first"
        )
    if final.exists() and not final.is_file():
        raise ArtifactError(f"cannot write {path}: it exists and is not a regular file")
    temporary = final.parent / f".{final.name[:64]}.{secrets.token_hex(8)}.tmp"
    created = False
    try:
        # The system applies the umask to 0o666; a file that is replaced keeps its own mode.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        created = True
        with os.fdopen(handle, "w+b") as stream:
            if final.exists():
                os.chmod(temporary, stat.S_IMODE(final.stat().st_mode))
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, final)
        created = False
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(
            f"cannot write {path}: {reason}", hint="choose another place, or make room"
        ) from error
    finally:
        if created:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_artifact(artifact: Artifact, path: PathLike) -> None:
    """Write an artifact file, atomically. The same artifact always gives the same bytes.

    Raises:
        ArtifactError: The file cannot be written.
    """
    members = {MANIFEST: dumps(artifact.manifest()), **artifact.members()}
    with (
        atomic_write(path) as stream,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive,
    ):
        for name in sorted(members):
            info = zipfile.ZipInfo(name, _EPOCH)
            info.create_system = 3  # Unix, whatever the system: the bytes must not depend on it
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            info.file_size = len(members[name])  # lets zipfile decide about zip64
            with archive.open(info, "w") as member:
                member.write(members[name])


# --- reading ---


def read_artifact(path: PathLike, *, check_cpu: bool = True) -> Artifact:
    """Read an artifact file and check all of it.

    Raises:
        ArtifactError: No such file, not an artifact, truncated, altered, or of an unknown version.
        UnsupportedByTargetError: With `check_cpu`, this machine cannot run it.
    """
    with _opened(path) as reader:
        manifest = reader.manifest()
        target = TargetInfo.from_json(manifest["target"])
        if check_cpu:
            check_runnable(target, os.fspath(path))
        plan = loads(reader.read(PLAN), f"{path}: {PLAN}")
        entries = params_from_json(
            manifest["params"], manifest["members"][PARAMS]["size"], f"{path}: {MANIFEST}"
        )
        params = ParamBlock(entries, manifest["members"][PARAMS]["size"])
        reader.read_into(PARAMS, params.data)
        library = reader.read(LIBRARY) if LIBRARY in manifest["members"] else None
        extras = {name: reader.read(name) for name in manifest["members"] if name not in _RESERVED}
        try:
            return Artifact(
                target=target,
                inputs=tensors_from_json(manifest["inputs"], f"{path}: {MANIFEST}: inputs"),
                outputs=tensors_from_json(manifest["outputs"], f"{path}: {MANIFEST}: outputs"),
                params=params,
                library=library,
                plan=plan,
                executor=manifest["executor"],
                extras=extras,
                sources=manifest["sources"],
                lock=manifest.get("lock"),
                dynamic=_dynamic(manifest, {LIBRARY, *extras}, f"{path}: {MANIFEST}"),
                versions=manifest["versions"],
                producer=manifest["producer"]["version"],
            )
        except UsageError as error:
            raise ArtifactError(f"{path}: {MANIFEST}: {error}", hint=_ALTERED) from error


def _dynamic(manifest: Mapping[str, Any], members: set[str], where: str) -> Dynamic | None:
    if "dynamic" not in manifest:
        return None
    made = Dynamic.from_json(manifest["dynamic"], len(manifest["params"]), where)
    for kind, axes in (("inputs", made.inputs), ("outputs", made.outputs)):
        ranks = {t["name"]: len(t["shape"]) for t in manifest[kind]}
        if any(not 0 <= a < ranks.get(name, 0) for name, found in axes.items() for a in found):
            raise ArtifactError(f"{where}: dynamic extents of {kind} that there are not")
    if any(v.library not in members for v in made.variants):
        raise ArtifactError(f"{where}: the code of a compiled size is missing", hint=_ALTERED)
    return made


def inspect_artifact(path: PathLike) -> dict[str, Any]:
    """Return the manifest and a summary of the plan; runs nothing and asks nothing of the CPU.

    The result holds `path`, `size_bytes`, `digest`, `manifest`, `plan`, `parameters_bytes` and
    `missing_cpu_features` (of this machine).

    Raises:
        ArtifactError: As `read_artifact`; every digest is checked.
    """
    with _opened(path) as reader:
        manifest = reader.manifest()
        raw = reader.read_manifest()
        for name in manifest["members"]:
            reader.check(name)
        return {
            "path": os.fspath(path),
            "size_bytes": reader.size,
            "digest": hashlib.sha256(raw).hexdigest(),
            "manifest": manifest,
            "plan": loads(reader.read(PLAN), f"{path}: {PLAN}"),
            "parameters_bytes": manifest["members"][PARAMS]["size"],
            "missing_cpu_features": list(
                missing_features(tuple(manifest["target"]["cpu_features"]))
            ),
        }


def check_runnable(target: TargetInfo, what: str) -> None:
    """Check that this machine can run code compiled for `target`.

    Raises:
        UnsupportedByTargetError: Other architecture, or CPU features missing; all are listed.
    """
    cpu = host_cpu()
    if target.architecture not in ("any", cpu.architecture):
        raise UnsupportedByTargetError(
            f"{what} was compiled for {target.name} ({target.architecture}), this machine is "
            f"{cpu.architecture}",
            hint="compile for this machine with target 'host'",
        )
    if target.isa.startswith("sm_"):
        from qcompiler.cuda_driver import check_device  # only a GPU's model needs the driver

        check_device(target.isa, what)
    missing = missing_features(target.cpu_features)
    if missing:
        raise UnsupportedByTargetError(
            f"{what} was compiled for {target.name} and needs the CPU features "
            f"{', '.join(missing)}, which this CPU ({cpu.name}) lacks",
            hint="compile for this machine with target 'host'",
        )
    if "amx_tile" in target.cpu_features and not allow_tiles():
        raise UnsupportedByTargetError(
            f"{what} was compiled for {target.name}, and the system refuses this process the AMX "
            f"tile registers",
            hint="Linux 5.16 or later gives them; else compile for target 'x86-avx512vnni'",
        )


class _Reader:
    """Checked access to the members of an opened artifact."""

    def __init__(self, path: PathLike, archive: zipfile.ZipFile, size: int) -> None:
        self.path = path
        self.size = size
        self._archive = archive
        self._infos = self._checked_infos()
        self._digests: dict[str, str] = {}

    def _checked_infos(self) -> dict[str, zipfile.ZipInfo]:
        """Check names and sizes of the archive's directory before reading any member."""
        infos: dict[str, zipfile.ZipInfo] = {}
        members = self._archive.infolist()
        if len(members) > _MEMBER_LIMIT:
            raise self.error(f"it has {len(members)} members, at most {_MEMBER_LIMIT} expected")
        for info in members:
            name = info.filename
            if not re.fullmatch(MEMBER_NAME, name):
                raise self.error(f"member name {name!r} is not allowed")
            if name in infos:
                raise self.error(f"member {name} is there twice")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise self.error(f"member {name} is compressed, expected it stored")
            infos[name] = info
        if sum(info.file_size for info in infos.values()) > self.size:
            raise self.error("its members claim to be larger than the file")
        for name in (MANIFEST, PLAN, PARAMS):
            if name not in infos:
                raise self.error(f"member {name} is missing")
        for name in (MANIFEST, PLAN):
            if infos[name].file_size > _JSON_LIMIT:
                raise self.error(f"member {name} has {infos[name].file_size} bytes, too many")
        return infos

    def error(self, problem: str) -> ArtifactError:
        return ArtifactError(f"{self.path} is not a valid artifact: {problem}", hint=_ALTERED)

    def read_manifest(self) -> bytes:
        """Return manifest.json; nothing says its digest, the archive's CRC-32 guards it."""
        return self._archive.read(self._infos[MANIFEST])

    def manifest(self) -> dict[str, Any]:
        """Return the manifest, checked against the schema and the archive's directory."""
        where = f"{self.path}: {MANIFEST}"
        manifest = loads(self.read_manifest(), where)
        if manifest.get("format") != FORMAT:
            raise ArtifactError(f"{where}: format is {manifest.get('format')!r}, not {FORMAT!r}")
        version = manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise ArtifactError(
                f"{where}: format version is {version!r}, this qcompiler reads {FORMAT_VERSION}",
                hint="use the qcompiler version that made it, or compile again",
            )
        check_schema(manifest, SCHEMA, where)
        declared = manifest["members"]
        if {MANIFEST, *declared} != set(self._infos):
            difference = sorted({MANIFEST, *declared} ^ set(self._infos))
            raise self.error(f"archive and manifest differ about {', '.join(difference)}")
        for name, member in declared.items():
            if member["size"] != self._infos[name].file_size:
                raise self.error(
                    f"member {name} has {self._infos[name].file_size} bytes, the manifest says "
                    f"{member['size']}"
                )
            self._digests[name] = member["sha256"]
        return manifest

    def read(self, name: str) -> bytes:
        """Return the bytes of a member whose digest fits."""
        data = self._archive.read(self._infos[name])
        self._compare(name, hashlib.sha256(data).hexdigest())
        return data

    def read_into(self, name: str, target: memoryview) -> None:
        """Read a member into memory of its size and check its digest."""
        digest = hashlib.sha256()
        position = 0
        for chunk in self._chunks(name):
            target[position : position + len(chunk)] = chunk
            position += len(chunk)
            digest.update(chunk)
        self._compare(name, digest.hexdigest())

    def check(self, name: str) -> None:
        """Check the digest of a member without keeping it."""
        digest = hashlib.sha256()
        for chunk in self._chunks(name):
            digest.update(chunk)
        self._compare(name, digest.hexdigest())

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._archive.open(self._infos[name]) as member:
            yield from iter(functools.partial(member.read, _CHUNK), b"")

    def _compare(self, name: str, digest: str) -> None:
        if digest != self._digests[name]:
            raise self.error(
                f"member {name} has SHA-256 {digest[:16]}..., the manifest says "
                f"{self._digests[name][:16]}..."
            )


@contextlib.contextmanager
def _opened(path: PathLike) -> Iterator[_Reader]:
    """Open an artifact; whatever damage zipfile finds becomes one ArtifactError."""
    try:
        with open(path, "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise ArtifactError(f"cannot read {path}: not a regular file")
            size = os.fstat(stream.fileno()).st_size
            try:
                with zipfile.ZipFile(stream) as archive:
                    yield _Reader(path, archive, size)
            except _ZIP_ERRORS as error:
                raise ArtifactError(
                    f"{path} is not a valid artifact: {error or type(error).__name__}",
                    hint=_ALTERED,
                ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise ArtifactError(f"cannot read {path}: {reason}") from error
