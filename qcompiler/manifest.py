# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The manifest of an artifact: what it holds, as typed values and as JSON.

`SCHEMA` is the one description of the JSON: the loader checks a manifest against it, and
docs/artifact.md prints it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.errors import ArtifactError, UsageError
from qcompiler.types import (
    DType,
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QuantParams,
    Shape,
)

FORMAT = "qcm"
FORMAT_VERSION = 1
ALIGNMENT = 64
"""Alignment of every parameter in params.bin, bytes: TVM's kernels use aligned vector loads."""

EXECUTORS = ("vm", "interpreter", "cuda")
MEMBER_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$"
_DTYPES = [dtype.value for dtype in DType]
_SHA256 = r"^[0-9a-f]{64}$"

_QPARAMS: dict[str, Any] = {
    "type": ["object", "null"],
    "required": ["granularity", "qmax", "qmin", "scale", "storage", "zero_point"],
    "additionalProperties": False,
    "properties": {
        "scale": {"type": "array", "items": {"type": "number"}},
        "zero_point": {"type": "array", "items": {"type": "integer"}},
        "storage": {"type": "string", "enum": _DTYPES},
        "qmin": {"type": "integer"},
        "qmax": {"type": "integer"},
        "granularity": {
            "type": "object",
            "required": ["kind"],
            "additionalProperties": False,
            "properties": {
                "kind": {"type": "string", "enum": ["per_tensor", "per_axis", "per_group"]},
                "axis": {"type": "integer"},
                "group_size": {"type": "integer", "minimum": 1},
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
            },
        },
    },
}

_TENSORS: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["batch_axis", "dtype", "name", "qparams", "shape"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string"},
            "dtype": {"type": "string", "enum": _DTYPES},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "batch_axis": {"type": ["integer", "null"], "enum": [0, None]},
            "infinite": {"type": "boolean"},
            "qparams": _QPARAMS,
        },
    },
}

_STRINGS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}

_AXES: dict[str, Any] = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "propertyNames": {"pattern": r"^[0-9]+$"},
        "additionalProperties": {"type": "string"},
    },
}

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [
        "executor",
        "format",
        "format_version",
        "inputs",
        "members",
        "outputs",
        "params",
        "producer",
        "sources",
        "target",
        "versions",
    ],
    "additionalProperties": False,
    "properties": {
        "format": {"type": "string", "enum": [FORMAT]},
        "format_version": {"type": "integer", "enum": [FORMAT_VERSION]},
        "producer": {
            "type": "object",
            "required": ["name", "version"],
            "additionalProperties": False,
            "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
        },
        "versions": _STRINGS,
        "executor": {"type": "string", "enum": list(EXECUTORS)},
        "target": {
            "type": "object",
            "required": ["architecture", "cpu_features", "isa", "mcpu", "name", "triple"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string"},
                "isa": {"type": "string"},
                "architecture": {"type": "string"},
                "cpu_features": {"type": "array", "items": {"type": "string"}},
                "triple": {"type": "string"},
                "mcpu": {"type": "string"},
            },
        },
        "inputs": _TENSORS,
        "outputs": _TENSORS,
        "params": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["dtype", "name", "nbytes", "offset", "shape"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "dtype": {"type": "string", "enum": _DTYPES},
                    "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                    "offset": {"type": "integer", "minimum": 0},
                    "nbytes": {"type": "integer", "minimum": 0},
                },
            },
        },
        "members": {
            "type": "object",
            "propertyNames": {"pattern": MEMBER_NAME},
            "additionalProperties": {
                "type": "object",
                "required": ["sha256", "size"],
                "additionalProperties": False,
                "properties": {
                    "size": {"type": "integer", "minimum": 0},
                    "sha256": {"type": "string", "pattern": _SHA256},
                },
            },
        },
        "sources": _STRINGS,
        "dynamic": {
            "type": "object",
            "required": ["inputs", "outputs", "symbols", "tails", "variants"],
            "additionalProperties": False,
            "properties": {
                "symbols": {
                    "type": "object",
                    "additionalProperties": {
                        "type": "array",
                        "items": {"type": "integer", "minimum": 1},
                    },
                },
                "inputs": _AXES,
                "outputs": _AXES,
                "tails": {"type": "array", "items": {"type": "string"}},
                "variants": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "required": ["library", "params", "sizes"],
                        "additionalProperties": False,
                        "properties": {
                            "library": {"type": "string", "pattern": MEMBER_NAME},
                            "params": {
                                "type": "array",
                                "items": {"type": "integer", "minimum": 0},
                            },
                            "sizes": {
                                "type": "object",
                                "additionalProperties": {"type": "integer", "minimum": 1},
                            },
                        },
                    },
                },
            },
        },
        "lock": {
            "type": "object",
            "required": ["digests", "options", "versions"],
            "additionalProperties": False,
            "properties": {
                "digests": _STRINGS,
                "options": {"type": "object"},
                "versions": _STRINGS,
            },
        },
    },
}
"""JSON Schema of manifest.json; `check_schema` knows the keywords that it uses."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of a compiled model.

    Attributes:
        shape: Compiled extents, in the model's own axis order.
        dtype: Element type.
        batch_axis: 0 where axis 0 counts samples; None where the first axis is something else.
        qparams: How stored integers map to reals, for a quantized tensor.
        infinite: Whether an input may hold infinities, as an attention mask does.
    """

    shape: Shape
    dtype: DType
    batch_axis: int | None = None
    qparams: QuantParams | None = None
    infinite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(d) for d in self.shape))
        if self.batch_axis not in (0, None):
            raise UsageError(f"batch axis must be 0 or None, got {self.batch_axis}")
        if self.batch_axis == 0 and not self.shape:
            raise UsageError("a scalar has no batch axis")

    @property
    def nbytes(self) -> int:
        """Size of one array of this kind in memory, bytes."""
        return math.prod(self.shape) * self.dtype.numpy.itemsize

    def __str__(self) -> str:
        return f"{self.dtype.value}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class TargetInfo:
    """What an artifact was compiled for, and what it needs from the machine that runs it.

    Attributes:
        name: Target name, such as "x86-avx2".
        isa: Name of the row of the ISA table; "" for targets without one.
        architecture: "x86_64", "aarch64", or "any"; from the triple if not given.
        cpu_features: Needed CPU features, named as in /proc/cpuinfo.
        triple: LLVM target triple; "" without code.
        mcpu: LLVM CPU name; "" without code.
    """

    name: str
    isa: str = ""
    architecture: str = ""
    cpu_features: tuple[str, ...] = ()
    triple: str = ""
    mcpu: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cpu_features", tuple(sorted(set(self.cpu_features))))
        if not self.architecture:
            object.__setattr__(self, "architecture", self.triple.split("-")[0] or "any")

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's `target`."""
        return {
            "name": self.name,
            "isa": self.isa,
            "architecture": self.architecture,
            "cpu_features": list(self.cpu_features),
            "triple": self.triple,
            "mcpu": self.mcpu,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetInfo:
        """Return the target of a checked manifest."""
        return cls(**{**data, "cpu_features": tuple(data["cpu_features"])})


@dataclass(frozen=True, slots=True)
class ParamEntry:
    """Where a parameter lies in params.bin: `nbytes` bytes from `offset`, row-major."""

    name: str
    dtype: DType
    shape: Shape
    offset: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Return one entry of the manifest's `params`."""
        return {
            "name": self.name,
            "dtype": self.dtype.value,
            "shape": list(self.shape),
            "offset": self.offset,
            "nbytes": self.nbytes,
        }


def tensors_to_json(specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    """Return the manifest's `inputs` or `outputs`."""
    return [
        {
            "name": name,
            "dtype": spec.dtype.value,
            "shape": list(spec.shape),
            "batch_axis": spec.batch_axis,
            "qparams": None if spec.qparams is None else _qparams_to_json(spec.qparams),
            **({"infinite": True} if spec.infinite else {}),
        }
        for name, spec in specs.items()
    ]


def tensors_from_json(data: Sequence[Mapping[str, Any]], where: str) -> dict[str, TensorSpec]:
    """Return the tensors of a manifest that passed `check_schema`.

    Raises:
        ArtifactError: Two tensors of one name, or values that contradict each other.
    """
    specs: dict[str, TensorSpec] = {}
    for entry in data:
        name = entry["name"]
        if name in specs:
            raise ArtifactError(f"{where} lists {name!r} twice")
        try:
            qparams = None if entry["qparams"] is None else _qparams_from_json(entry["qparams"])
            specs[name] = TensorSpec(
                tuple(entry["shape"]),
                DType(entry["dtype"]),
                entry["batch_axis"],
                qparams,
                entry.get("infinite", False),
            )
        except (UsageError, ValueError, KeyError, OverflowError) as error:
            raise ArtifactError(f"{where}: tensor {name!r}: {error}", value=name) from error
    return specs


def params_from_json(
    data: Sequence[Mapping[str, Any]], size: int, where: str
) -> tuple[ParamEntry, ...]:
    """Return the parameter index of a manifest that passed `check_schema`.

    Raises:
        ArtifactError: Two parameters of one name, one outside of the `size` bytes of params.bin,
            not aligned, overlapping the one before, or with a size that its shape contradicts.
    """
    entries = []
    end = 0
    names: set[str] = set()
    for item in data:
        entry = ParamEntry(
            item["name"], DType(item["dtype"]), tuple(item["shape"]), item["offset"], item["nbytes"]
        )
        expected = math.prod(entry.shape) * entry.dtype.numpy.itemsize
        if entry.name in names:
            problem = "is listed twice"
        elif entry.nbytes != expected:
            problem = f"says {entry.nbytes} bytes, its shape {entry.shape} makes {expected}"
        elif entry.offset % ALIGNMENT:
            problem = f"starts at byte {entry.offset}, not a multiple of {ALIGNMENT}"
        elif entry.offset < end or entry.offset + entry.nbytes > size:
            problem = (
                f"covers bytes {entry.offset} to {entry.offset + entry.nbytes}, expected inside "
                f"{end} to {size}"
            )
        else:
            end = entry.offset + entry.nbytes
            names.add(entry.name)
            entries.append(entry)
            continue
        raise ArtifactError(f"{where}: parameter {entry.name!r} {problem}", value=entry.name)
    return tuple(entries)


def _qparams_to_json(qparams: QuantParams) -> dict[str, Any]:
    granularity: dict[str, Any] = {"kind": "per_tensor"}
    if isinstance(qparams.granularity, PerAxis):
        granularity = {"kind": "per_axis", "axis": qparams.granularity.axis}
    elif isinstance(qparams.granularity, PerGroup):
        granularity = {
            "kind": "per_group",
            "axis": qparams.granularity.axis,
            "group_size": qparams.granularity.group_size,
            "shape": list(qparams.scale.shape),
        }
    return {
        # A float32 as a double prints and reads back exactly.
        "scale": [float(s) for s in qparams.scale.reshape(-1)],
        "zero_point": [int(z) for z in qparams.zero_point.reshape(-1)],
        "storage": qparams.storage.value,
        "qmin": qparams.qmin,
        "qmax": qparams.qmax,
        "granularity": granularity,
    }


def _qparams_from_json(data: Mapping[str, Any]) -> QuantParams:
    kind = data["granularity"]["kind"]
    granularity: Granularity = PerTensor()
    shape: Shape = ()
    if kind == "per_axis":
        granularity = PerAxis(data["granularity"]["axis"])
        shape = (len(data["scale"]),)
    elif kind == "per_group":
        granularity = PerGroup(data["granularity"]["axis"], data["granularity"]["group_size"])
        shape = tuple(data["granularity"]["shape"])
    with np.errstate(over="ignore"):  # QuantParams refuses infinity
        scale = np.array(data["scale"], np.float32).reshape(shape)
    zero_point = np.array(data["zero_point"], np.int32).reshape(shape)
    return QuantParams(
        scale, zero_point, DType(data["storage"]), data["qmin"], data["qmax"], granularity
    )


def dumps(data: Any) -> bytes:
    """Return JSON bytes that depend on the value alone (sorted keys, no NaN, UTF-8)."""
    text = json.dumps(data, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8")


def loads(data: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ArtifactError: Not UTF-8, not JSON, nested too deep, or not an object.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: expected a JSON object, found {_kind(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def check_schema(value: Any, schema: Mapping[str, Any], where: str, path: str = "") -> None:
    """Check a JSON value against a schema written like `SCHEMA`.

    Raises:
        ArtifactError: The first difference, with its path, what was found and what was expected.
    """

    def fail(found: str, expected: str) -> ArtifactError:
        place = f"{where}: {path or 'top level'}"
        return ArtifactError(f"{place}: found {found}, expected {expected}")

    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kind = _kind(value)
    if kind not in kinds and not (kind == "integer" and "number" in kinds):
        raise fail(kind, " or ".join(kinds))
    if "enum" in schema and value not in schema["enum"]:
        raise fail(_short(value), "one of " + ", ".join(map(_short, schema["enum"])))
    if "minimum" in schema and value < schema["minimum"]:
        raise fail(str(value), f"at least {schema['minimum']}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise fail(_short(value), f"text like {schema['pattern']}")
    if kind == "array":
        for index, item in enumerate(value):
            check_schema(item, schema["items"], where, f"{path}[{index}]")
    if kind == "object":
        _check_object(value, schema, where, path)


def _check_object(
    value: Mapping[str, Any], schema: Mapping[str, Any], where: str, path: str
) -> None:
    place = f"{where}: {path or 'top level'}"
    missing = [key for key in schema.get("required", ()) if key not in value]
    if missing:
        raise ArtifactError(f"{place}: missing {', '.join(missing)}")
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    names = schema.get("propertyNames", {}).get("pattern", "")
    for key, item in value.items():
        below = f"{path}.{key}" if path else key
        if names and not re.fullmatch(names, key):
            raise ArtifactError(f"{place}: found key {_short(key)}, expected text like {names}")
        if key in properties:
            check_schema(item, properties[key], where, below)
        elif others is False:
            raise ArtifactError(f"{place}: unknown key {_short(key)}")
        elif others is not True:
            check_schema(item, others, where, below)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    for kind, types in (
        ("boolean", bool),
        ("integer", int),
        ("number", float),
        ("string", str),
        ("array", list),
    ):
        if isinstance(value, types):
            return kind
    return "object"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
