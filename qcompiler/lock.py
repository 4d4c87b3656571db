# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The lock of an artifact: everything that decided its bytes, to make it again or refuse to.

Its first part lies in the artifact's manifest: digests of the model, the data, the tuning records
that were used and the plan; versions of what decides numbers or code; the options. A lock file
adds the plan itself and the digests of the artifact's members, so that it stands alone beside a
project's sources and its changes can be reviewed like those of code.

A locked compilation first compares what it is given; then it takes the plan from the lock instead
of searching one anew (a search measures, and measurements differ); at last it compares the bytes
that it made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import LockError
from qcompiler.plan import PrecisionPlan

if TYPE_CHECKING:
    from qcompiler.artifact import Artifact
    from qcompiler.passmanager import Pass

FORMAT = "qcompiler-lock"
FORMAT_VERSION = 1
PACKAGES = ("qcompiler", "apache-tvm", "apache-tvm-ffi", "numpy", "onnx", "onnxruntime")
"""What decides numbers or code: calibration runs in ONNX Runtime, which rounds by version."""
_NAMES = {
    "model": "the model",
    "graph": "the network after simplification",
    "calibration": "the calibration data",
    "evaluation": "the evaluation data",
    "records": "the tuning records in use",
    "plan": "the precision plan",
}
_SHOWN = 8
_HINT = (
    "give what the lock names, or compile without --locked to make a new artifact, whose lock "
    "replaces this one"
)


@dataclass(frozen=True)
class Lock:
    """What decided an artifact.

    Attributes:
        digests: SHA-256 by what was read: "model", "graph", "calibration", "records", "plan", and
            "evaluation" where it steered decisions.
        versions: Version of each package and tool that decides numbers or code.
        options: Options that decide the result, as JSON.
        plan: Precision and reason per node as JSON; None within a manifest.
        members: Digests of the artifact's members; None within a manifest.
        origin: Where it was read, for messages.
    """

    digests: Mapping[str, str]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    plan: Mapping[str, Any] | None = None
    members: Mapping[str, str] | None = None
    origin: str = field(default="the lock", compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the section of a manifest, or with the plan the content of a lock file."""
        doc: dict[str, Any] = {
            "digests": dict(self.digests),
            "versions": dict(self.versions),
            "options": dict(self.options),
        }
        if self.plan is not None:
            doc.update(format=FORMAT, format_version=FORMAT_VERSION, plan=dict(self.plan))
            doc["members"] = dict(self.members or {})
        return doc

    @classmethod
    def from_json(cls, doc: object, origin: str) -> Lock:
        """Return the lock that a lock file holds.

        Raises:
            LockError: Not such a document, or one of another version.
        """
        if not isinstance(doc, Mapping) or doc.get("format") != FORMAT:
            raise LockError(
                f"{origin} is no lock: expected a JSON object with format {FORMAT!r}",
                hint="`qcompile inspect ART.qcm --lock LOCK.json` writes one",
            )
        if doc.get("format_version") != FORMAT_VERSION:
            raise LockError(
                f"{origin} is a lock of version {doc.get('format_version')!r}, expected "
                f"{FORMAT_VERSION}"
            )
        parts = {name: doc.get(name) for name in ("digests", "versions", "options", "plan")}
        for name, part in {**parts, "members": doc.get("members")}.items():
            if not isinstance(part, Mapping):
                raise LockError(f"{origin}: {name} is {type(part).__name__}, expected an object")
        return cls(**parts, members=doc["members"], origin=origin)  # type: ignore[arg-type]

    @classmethod
    def of(cls, artifact: Artifact, origin: str = "the artifact") -> Lock:
        """Return the whole lock of an artifact.

        Raises:
            LockError: The artifact has none.
        """
        if artifact.lock is None:
            raise LockError(f"{origin} has no lock", hint="compile it once more, without --locked")
        members = {
            name: hashlib.sha256(data).hexdigest() for name, data in artifact.members().items()
        }
        return cls(
            **{name: artifact.lock[name] for name in ("digests", "versions", "options")},
            plan=dict(artifact.plan),
            members=members,
            origin=origin,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Lock:
        """Read the lock of an artifact, or a lock file.

        Raises:
            LockError: The file cannot be read, or holds no lock.
            ArtifactError: The artifact is damaged.
        """
        origin = os.fspath(path)
        try:
            data = Path(path).read_bytes()
            if data.startswith(b"PK") or origin.endswith(".qcm"):
                from qcompiler.artifact import read_artifact

                return cls.of(read_artifact(path, check_cpu=False), origin)
            doc = json.loads(data)
        except OSError as error:
            raise LockError(f"cannot read the lock {origin}: {error.strerror}") from None
        except ValueError:
            raise LockError(
                f"{origin} is neither an artifact nor a lock file, which is JSON",
                hint="`qcompile inspect ART.qcm --lock LOCK.json` writes one",
            ) from None
        return cls.from_json(doc, origin)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a lock file, atomically.

        Raises:
            ArtifactError: The file cannot be written.
        """
        from qcompiler.artifact import atomic_write
        from qcompiler.manifest import dumps

        with atomic_write(path) as file:
            file.write(dumps(self.to_json()))

    def precision_plan(self) -> PrecisionPlan:
        """Return the plan.

        Raises:
            LockError: The lock holds no plan that can be read.
        """
        from qcompiler.errors import UsageError

        try:
            return PrecisionPlan.from_json(self.plan)
        except UsageError as error:
            raise LockError(f"{self.origin}: {error.message}") from error

    def searched(self, precision: str | None, evaluation: str | None = None) -> Lock:
        """Return the lock of a plan that measurements chose: no second search need find it.

        Args:
            precision: What was asked for when they did; None for a plan that nothing measured.
            evaluation: Digest of the evaluation data that steered the choice.
        """
        more = {} if precision is None else {"precision": precision}
        read = {} if evaluation is None else {"evaluation": evaluation}
        return dataclasses.replace(
            self, options={**self.options, **more}, digests={**self.digests, **read}
        )

    def gives_plan(self, precision: object) -> bool:
        """Whether the plan is to be taken from here: measurements chose it, or would now."""
        return precision == "auto" or (
            isinstance(precision, str) and precision == self.options.get("precision")
        )

    # --- comparing ---

    def check_inputs(self, found: Lock) -> None:
        """Compare what a compilation is given, before any work: all but plan, records and graph.

        Data that the locked compilation did not read is no difference, nor is evaluation data that
        is not given: the plan of the lock needs none.

        Raises:
            LockError: Everything that differs, each with what was found and what is locked.
        """
        early = [k for k in ("model", "calibration") if k in self.digests]
        early += [k for k in ("evaluation",) if k in self.digests and k in found.digests]
        locked = {k: v for k, v in self.options.items() if k != "precision"}  # see the plan
        lines = _differences(locked, found.options, "option")
        lines += [d for k in early for d in self._digest(found, k)]
        lines += _differences(self.versions, found.versions, "version of")
        self._refuse(lines)

    def check_plan(self, found: PrecisionPlan, digest: str) -> None:
        """Compare the plan that a compilation made.

        Raises:
            LockError: The nodes that differ, each with both precisions.
        """
        if self.digests.get("plan") == digest:
            return
        locked = self.precision_plan()
        names = list(dict.fromkeys([*locked, *found]))
        lines = []
        for name in names:
            ours = found.precision(name).value if name in found.nodes else "not in the network"
            theirs = locked.precision(name).value if name in locked.nodes else "not in the plan"
            if ours != theirs:
                lines.append(f"precision of {name}: found {ours}, locked {theirs}")
        if len(lines) > _SHOWN:
            lines[_SHOWN:] = [f"precision of {len(lines) - _SHOWN} more nodes"]
        lines = (
            lines
            or [
                f"reason of {name}: found {found.reason(name)!r}, locked {locked.reason(name)!r}"
                for name in names
                if found.reason(name) != locked.reason(name)
            ][:_SHOWN]
        )
        self._refuse(lines or self._digest(Lock({"plan": digest}, {}, {}), "plan"))

    def check_result(self, artifact: Artifact) -> None:
        """Compare the artifact that a compilation made, byte by byte.

        Raises:
            LockError: What differs.
        """
        made = Lock.of(artifact)
        late = [k for k in ("graph", "records") if k in {**self.digests, **made.digests}]
        lines = [d for k in late for d in self._digest(made, k)]
        if not lines:
            lines = _differences(self.members or {}, made.members or {}, "member", short=True)
            if lines:
                lines.append(
                    "everything that was given is as locked: ONNX Runtime may round calibration "
                    "differently on another processor, and a compiler under development changes "
                    "without a new version"
                )
        self._refuse(lines)

    def _digest(self, found: Lock, key: str) -> list[str]:
        ours, theirs = found.digests.get(key), self.digests.get(key)
        if ours == theirs:
            return []
        what = _NAMES.get(key, key)
        return [f"{what}: found {_short(ours)}, locked {_short(theirs)}"]

    def _refuse(self, lines: Sequence[str]) -> None:
        if lines:
            listed = "".join(f"\n  {line}" for line in lines)
            raise LockError(
                f"the compilation differs from {self.origin}:{listed}",
                differences=tuple(lines),
                hint=_HINT,
            )


def _differences(
    locked: Mapping[str, Any], found: Mapping[str, Any], what: str, *, short: bool = False
) -> list[str]:
    show = _short if short else _plain
    return [
        f"{what} {name}: found {show(found.get(name))}, locked {show(locked.get(name))}"
        for name in sorted({*locked, *found})
        if found.get(name) != locked.get(name)
    ]


def _plain(value: object) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"SHA-256 {digest[:16]}…"


# --- what a compilation finds ---


def versions(toolchain: Mapping[str, str]) -> dict[str, str]:
    """Return the versions of the packages and tools that decide a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return {**found, **toolchain}


def options(
    *,
    target: str,
    methods: str | Iterable[Pass],
    input_shapes: Mapping[str, Sequence[Any]] | None,
    freeze: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    """Return the options that decide a result, as JSON; a frozen array by its digest.

    The precision is not among them: what was asked for ends in the plan, which is.
    """
    from qcompiler.passes.methods import parse_methods

    passes = parse_methods(methods) if isinstance(methods, str) else tuple(methods)
    shapes = {
        name: [int(d) if isinstance(d, int) else list(d) for d in shape]  # a range is a pair
        for name, shape in (input_shapes or {}).items()
    }
    return {
        "target": target,
        "methods": [p.spec() for p in passes],
        "input_shapes": shapes,
        "freeze": {name: _constant(value) for name, value in (freeze or {}).items()},
        "seed": seed,
    }


def _extent(extent: Any) -> Any:
    """Return an extent as JSON: a number, or for a range its two ends."""
    return [int(d) for d in extent] if isinstance(extent, (tuple, list)) else int(extent)


def _constant(value: Any) -> Any:
    a = np.asarray(value)
    if a.ndim == 0:
        return a.item()
    data = f"{a.dtype.str}{a.shape}".encode() + np.ascontiguousarray(a).tobytes()
    return f"{a.dtype}{list(a.shape)} SHA-256 {hashlib.sha256(data).hexdigest()}"
