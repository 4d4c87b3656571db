# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Sample sets for calibration and evaluation: reading, checking, batching and their digest.

A set is a sequence of chunks; a chunk is what one `.npz` file or one dict holds: one array per
model input, by name, and any further arrays (`label`, `score`) that a metric reads. An array with
the input's own rank is split along its first axis into batches of the compiled size; the last batch
is filled up with its own samples, over and over, and the results for the filled rows are cut off.
An array with one axis more holds one whole input per entry. An input whose first axis is not a
batch may also be given once, in exactly its shape: it then serves every run.
"""

from __future__ import annotations

import hashlib
import math
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from qcompiler.errors import DataError, UsageError
from qcompiler.four_bits import in_bytes, outside
from qcompiler.metrics import Metric, labels_of, metric_of
from qcompiler.slices import MINIMUM, check_slices, score_slices, worst
from qcompiler.types import Array, DType, Shape

if TYPE_CHECKING:
    from qcompiler.ir import Graph

Chunk = Mapping[str, Array]

SampleSource: TypeAlias = (
    "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Mapping[str, Any]] | SampleSet"
)
"""A .npz file, a folder of them, a dict of arrays, or an iterable of such dicts."""


class _Input(Protocol):
    """What a graph input and an input of a compiled model have in common."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> DType: ...

    @property
    def batch_axis(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Name, compiled shape, dtype and batch axis of a model input; whether it takes infinities."""

    name: str
    shape: Shape
    dtype: DType
    batch_axis: int | None = 0
    infinite: bool = False

    @classmethod
    def of(cls, inputs: Mapping[str, _Input]) -> tuple[InputSpec, ...]:
        """Return the specs of a compiled model's `inputs`."""
        return tuple(
            cls(n, v.shape, v.dtype, v.batch_axis, getattr(v, "infinite", False))
            for n, v in inputs.items()
        )

    @classmethod
    def of_graph(cls, graph: Graph) -> tuple[InputSpec, ...]:
        """Return the specs of a FLOAT graph's inputs; those that are masks take infinities."""
        from qcompiler.infinite import mask_values, names_of

        masks = names_of(mask_values(graph), graph)
        return tuple(
            cls(v.name, v.shape, v.dtype, v.batch_axis, v.name in masks) for v in graph.inputs
        )

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.value}{list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one run.

    Attributes:
        inputs: One array per input, of exactly its compiled shape and dtype.
        samples: Samples in it that are real; the rest repeats them.
        size: Samples that the arrays have room for.
        filled: Input that was filled up along its first axis, be that a batch or the steps of a
            sequence -> (entries that are real, entries in all).
    """

    inputs: Mapping[str, Array]
    samples: int
    size: int
    filled: Mapping[str, tuple[int, int]] = field(default_factory=dict)


class SampleSet:
    """A repeatable stream of chunks.

    Attributes:
        origin: What it was made from, for messages.
    """

    def __init__(self, origin: str, chunks: Callable[[], Iterator[Chunk]]) -> None:
        self.origin = origin
        self._chunks = chunks

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks from the start.

        Raises:
            DataError: A file cannot be read, or an element is not a dict of arrays.
        """
        return self._chunks()

    def shapes(self) -> dict[str, Shape]:
        """Return the shapes of the first chunk's arrays, by name; empty where there is none."""
        first = next(self.chunks(), None)
        return {} if first is None else {name: tuple(a.shape) for name, a in first.items()}

    def batches(
        self, inputs: Sequence[InputSpec], error: type[DataError] = DataError
    ) -> Iterator[Batch]:
        """Yield the runs that the samples make for a model, checked.

        Args:
            inputs: The model's inputs.
            error: Class of the errors about the samples.

        Raises:
            DataError: (of class `error`) Missing or misnamed inputs, wrong shape or dtype, NaN or
                infinity, different numbers of samples, no samples at all.
        """
        none = True
        for chunk in self.chunks():
            for batch in _split(chunk, inputs, self.origin, error):
                none = False
                yield batch
        if none:
            raise error(
                f"{self.origin} holds no samples", hint="give at least one sample per input"
            )

    def extras(self, inputs: Sequence[InputSpec]) -> dict[str, Array]:
        """Return the arrays that are not inputs (labels, scores), joined over the chunks."""
        names = {i.name for i in inputs}
        parts: dict[str, list[Array]] = {}
        for chunk in self.chunks():
            for name in chunk:
                if name not in names:
                    parts.setdefault(name, []).append(chunk[name])
        return {
            name: a[0] if len(a) == 1 else np.concatenate([np.atleast_1d(p) for p in a])
            for name, a in parts.items()
        }

    def digest(self) -> str:
        """Return the sha256 of all names, dtypes, shapes and elements, as hex."""
        h = hashlib.sha256()
        for chunk in self.chunks():
            for name in sorted(chunk):
                a = np.ascontiguousarray(chunk[name])
                h.update(f"{name}:{a.dtype.str}:{a.shape};".encode())
                h.update(a.tobytes())
            h.update(b"\n")
        return h.hexdigest()


def load_samples(source: SampleSource | SampleSet) -> SampleSet:
    """Return the sample set that a source describes; files are read when iterated.

    An iterator that can run only once (a generator) is written to temporary files first, so that
    the set can be read again; a list or a class with `__iter__` is iterated anew each time.

    Raises:
        DataError: No such file or folder, a folder without .npz files, or another type.
    """
    if isinstance(source, SampleSet):
        return source
    if isinstance(source, (str, os.PathLike)):
        return _from_path(pathlib.Path(source))
    if isinstance(source, Mapping):
        held = _chunk(source, "the samples")
        return SampleSet("the samples", lambda: iter([held]))
    if isinstance(source, Iterator):
        return _spooled(source)
    if isinstance(source, Iterable):
        return SampleSet("the samples", lambda: (_chunk(s, "the samples") for s in source))
    raise DataError(
        f"samples cannot be read from a {type(source).__name__}",
        hint="give a .npz file, a folder of them, a dict of arrays, or an iterable of dicts",
    )


def _from_path(path: pathlib.Path) -> SampleSet:
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if not files:
            raise DataError(f"folder {str(path)!r} holds no .npz files")
        return SampleSet(str(path), lambda: (_npz(f) for f in files))
    if not path.is_file():
        raise DataError(
            f"no sample file {str(path)!r}", hint="give a .npz file or a folder of them"
        )
    return SampleSet(str(path), lambda: iter([_npz(path)]))


def _npz(path: pathlib.Path) -> Chunk:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise DataError(
                f"{str(path)!r} is a single array",
                hint="save a .npz file with one array per input, by name",
            )
        with loaded as z:
            return {name: z[name] for name in z.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        what = error if zipfile.is_zipfile(path) else "it is no .npz file, or it is damaged"
        raise DataError(
            f"cannot read the samples {str(path)!r}: {what}",
            hint="expected a .npz file of plain arrays, as numpy.savez writes",
        ) from None


def _chunk(sample: object, where: str) -> Chunk:
    if not isinstance(sample, Mapping):
        raise DataError(f"{where}: expected dicts of arrays, got a {type(sample).__name__}")
    arrays = {}
    for name, value in sample.items():
        a = in_bytes(np.asarray(value))
        if a.dtype.kind not in "biufSU":
            raise DataError(f"{where}: {name!r} is not a numeric array", value=str(name))
        arrays[str(name)] = a
    return arrays


def _spooled(source: Iterator[Mapping[str, Any]]) -> SampleSet:
    folder = tempfile.TemporaryDirectory(prefix="qcompiler-samples-")
    files = []
    for i, sample in enumerate(source):
        files.append(pathlib.Path(folder.name) / f"{i:08d}.npz")
        arrays: dict[str, Any] = dict(_chunk(sample, "the samples"))
        np.savez(files[-1], **arrays)

    def chunks(keep: object = folder) -> Iterator[Chunk]:  # the folder lives as long as the set
        return (_npz(f) for f in files)

    return SampleSet("the samples", chunks)


# --------------------------------------------------------------------------------- batching


@dataclass(slots=True)
class _Feed:
    """One input of one chunk: how many runs it makes and what it gives each."""

    spec: InputSpec
    array: Array
    stacked: bool
    constant: bool = False
    runs: int = 0
    samples: int = field(default=0)

    def at(self, run: int) -> tuple[Array, int]:
        """Return the array of one run and how many of its samples are real."""
        size = self.spec.shape[0] if self.spec.shape else 1
        if self.constant:
            return self.array, size
        if self.stacked:
            return self.array[run], size
        part = self.array[run * size : (run + 1) * size]
        real = len(part)
        if real < size:
            part = part[np.arange(size) % real]
        return part, real


def _split(
    chunk: Chunk, inputs: Sequence[InputSpec], origin: str, error: type[DataError]
) -> Iterator[Batch]:
    missing = [i.name for i in inputs if i.name not in chunk]
    if missing:
        raise error(
            f"{origin} lacks the model input{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"it holds {', '.join(chunk) or 'nothing'}",
            value=missing[0],
            hint=f"the model takes {'; '.join(map(str, inputs))}. Name the arrays like the inputs, "
            "or freeze an input that never changes",
        )
    feeds = [_feed(spec, chunk[spec.name], origin, error) for spec in inputs]
    varying = [f for f in feeds if not f.constant]
    if len({f.runs for f in varying}) > 1 or len({f.samples for f in varying if not f.stacked}) > 1:
        listing = ", ".join(
            f"{f.spec.name} {f.samples if not f.stacked else f.runs}" for f in varying
        )
        raise error(f"{origin}: the inputs hold different numbers of samples: {listing}")
    for run in range(varying[0].runs if varying else 1):
        arrays: dict[str, Array] = {}
        real, size = 1, 1
        filled: dict[str, tuple[int, int]] = {}
        for f in feeds:
            part, samples = f.at(run)
            if f in varying and not f.stacked and samples < f.spec.shape[0]:
                filled[f.spec.name] = (samples, f.spec.shape[0])
            arrays[f.spec.name] = np.ascontiguousarray(part).reshape(np.shape(part))
            if f in varying and f.spec.shape and f.spec.batch_axis == 0:
                real, size = samples, f.spec.shape[0]
        yield Batch(arrays, real, size, filled)


def _feed(spec: InputSpec, array: Array, origin: str, error: type[DataError]) -> _Feed:
    array = _typed(spec, array, origin, error)
    shape = spec.shape
    if array.ndim == len(shape) + 1 and array.shape[1:] == shape:
        feed = _Feed(spec, array, True, runs=len(array), samples=len(array))
    elif array.shape == shape and spec.batch_axis is None:
        feed = _Feed(spec, array, False, constant=True)
    elif array.ndim == len(shape) and shape and array.shape[1:] == shape[1:]:
        runs = -(-len(array) // shape[0]) if shape[0] else 0
        feed = _Feed(spec, array, False, runs=runs, samples=len(array))
    else:
        own = f"[N, {', '.join(map(str, shape[1:]))}]" if len(shape) > 1 else "[N]"
        raise error(
            f"{origin}: {spec.name!r} has shape {list(array.shape)}, expected {own} "
            f"(samples along the first axis), or [N, {', '.join(map(str, shape))}] with one whole "
            "input per entry",
            value=spec.name,
        )
    return feed


def _typed(spec: InputSpec, array: Array, origin: str, error: type[DataError]) -> Array:
    """Return the array in the input's dtype where that changes no value.

    NaN is rejected, and infinities too where the input is no mask.
    """
    want, array = spec.dtype.numpy, in_bytes(array)
    kinds = (array.dtype.kind, want.kind)
    if array.dtype != want:
        lossless = kinds[0] in "biu" and kinds[1] in "iu" and _fits(array, want)
        if not (kinds == ("f", "f") or lossless):
            raise error(
                f"{origin}: {spec.name!r} is {array.dtype}, the model takes {spec.dtype.value}",
                value=spec.name,
                hint="convert and scale it as in training; nothing is converted silently",
            )
    found = outside(array, spec.dtype)
    if found is not None:
        raise error(
            f"{origin}: {spec.name!r} is {spec.dtype.value} and holds {found[0]} at index "
            f"{list(found[1])}, expected {spec.dtype.min} to {spec.dtype.max}",
            value=spec.name,
            hint="one value to a byte: unpack two that share one",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.isnan(array) if spec.infinite else ~np.isfinite(array)
        if bad.any():
            kinds_found = "NaN" if spec.infinite else "NaN or infinity"
            where = np.argwhere(bad)[0].tolist()
            raise error(
                f"{origin}: {spec.name!r} holds {kinds_found}, first at index {where}",
                value=spec.name,
            )
    return array.astype(want, copy=False)


def _fits(array: Array, want: np.dtype[Any]) -> bool:
    info = np.iinfo(want)
    return not array.size or bool(info.min <= array.min() and array.max() <= info.max)


# ------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Evaluation:
    """Samples and the metric that scores a model on them.

    Attributes:
        samples: Anything that `load_samples` takes.
        metric: "top1", "top5" (without labels, against the float model's first choice), "mse",
            "cosine", "sqnr", "kl" (against the float model's outputs), or "module:function".

    Raises:
        UsageError: No such metric.
    """

    samples: SampleSource | SampleSet
    metric: str = "top1"

    def __post_init__(self) -> None:
        metric_of(self.metric)
        if isinstance(self.samples, Iterator):  # evaluated several times
            object.__setattr__(self, "samples", load_samples(self.samples))


BUDGET_LIMITS = ("max_drop", "max_latency_ms", "max_size_mb", "max_slice_drop", "max_memory_mb")
"""Names of the limits of a budget."""


@dataclass(frozen=True)
class Budget:
    """Limits that a compiled model must keep; None = no limit.

    Attributes:
        max_drop: Greatest loss against the float model, in points of the metric: percentage points
            for top1 and top5, the metric's own unit otherwise.
        max_latency_ms: Greatest median latency of one run, ms.
        max_size_mb: Greatest size of the artifact, in millions of bytes.
        max_slice_drop: Greatest loss of any one class or named slice of at least
            `qcompiler.slices.MINIMUM` samples, in points of the metric.
        max_memory_mb: Greatest memory of the tensors between kernels during a run, in millions of
            bytes; inputs, parameters and work areas inside kernels are not counted.

    Raises:
        UsageError: A limit that is no finite number, is negative, or is 0 where nothing can be.
    """

    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mb: float | None = None
    max_slice_drop: float | None = None
    max_memory_mb: float | None = None

    def __post_init__(self) -> None:
        for name in BUDGET_LIMITS:
            value = getattr(self, name)
            if value is None:
                continue
            if not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UsageError(f"budget {name} is {value!r}, expected a finite number")
            if value < 0 or (value == 0 and not name.endswith("_drop")):
                raise UsageError(f"budget {name} is {value!r}, expected a number above 0")


Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Runs one batch: arrays by input name -> arrays by output name."""


def check_evaluation(evaluation: Evaluation, inputs: Sequence[InputSpec]) -> None:
    """Check that evaluation samples fit a model before time is spent on compiling it.

    Only the first chunk is read (a file holds one): a mistake is usually in all of them.

    Raises:
        DataError: The samples do not fit the model, or labels and slices do not fit the samples.
    """
    samples = load_samples(evaluation.samples)
    chunk = next(samples.chunks(), None)
    if chunk is None:
        raise DataError(f"{samples.origin} holds no samples")
    first = SampleSet(samples.origin, lambda: iter([chunk]))
    count = sum(batch.samples for batch in first.batches(inputs))
    metric = metric_of(evaluation.metric)
    extras = first.extras(inputs)
    check_slices(metric, extras, count)
    if metric.name in ("top1", "top5") and "label" in extras:
        labels_of(extras["label"], count)


def evaluate(
    model: Runner,
    evaluation: Evaluation,
    reference: Runner | None = None,
    *,
    inputs: Sequence[InputSpec] | None = None,
) -> float:
    """Return the score of a model.

    Args:
        model: A compiled model, or any function of one batch.
        evaluation: Samples and metric.
        reference: The float model, for metrics that compare with it.
        inputs: The model's inputs; default: what `model.inputs` says.

    Raises:
        DataError: The samples do not fit the model or the metric.
        UsageError: The metric needs a reference and there is none.
    """
    metric, extras, found = _outputs(evaluation, (model, reference), inputs)
    first = found[0]
    if first is None:
        raise UsageError("there is no model to evaluate")
    return metric.score(first, extras, found[1])


def compare(
    compiled: Runner,
    reference: Runner | None,
    evaluation: Evaluation,
    *,
    inputs: Sequence[InputSpec] | None = None,
) -> dict[str, Any]:
    """Score a compiled model and the float model on the same samples.

    Returns:
        `name` of the metric, scores `float` and `compiled`, `drop` in points, and `samples`;
        `float` and `drop` are None without a reference. `slices` has the same per group of
        samples (see `qcompiler.slices`), `worst_slice` the one with the largest drop, or None.

    Raises:
        DataError, UsageError: As `evaluate`.
    """
    metric, extras, (ours, theirs) = _outputs(evaluation, (compiled, reference), inputs)
    if ours is None:
        raise UsageError("there is no model to evaluate")
    after = metric.score(ours, extras, theirs)
    before = None if theirs is None else metric.score(theirs, extras, theirs)
    slices = score_slices(metric, extras, ours, theirs)
    least = worst(slices)
    return {
        "name": metric.name,
        "float": before,
        "compiled": after,
        "drop": None if before is None else metric.drop(before, after),
        "samples": max((len(a) for a in ours.values() if a.ndim), default=0),
        "slices": [s.to_json() for s in slices],
        "worst_slice": None if least is None else least.to_json(),
        "slice_minimum": MINIMUM,
    }


def _outputs(
    evaluation: Evaluation,
    models: tuple[Runner | None, Runner | None],
    inputs: Sequence[InputSpec] | None,
) -> tuple[Metric, dict[str, Array], tuple[dict[str, Array] | None, dict[str, Array] | None]]:
    """Run the models over the samples in one pass; return metric, extra arrays, joined outputs."""
    metric = metric_of(evaluation.metric)
    samples = load_samples(evaluation.samples)
    specs = tuple(inputs) if inputs is not None else _specs_of(models[0])
    axes = {n: s.batch_axis for n, s in getattr(models[0], "outputs", {}).items()}
    joins = tuple(None if m is None else _Join(axes) for m in models)
    for batch in samples.batches(specs):
        for model, join in zip(models, joins, strict=True):
            if model is not None and join is not None:
                join.add(model(batch.inputs), batch)
    first, second = (None if j is None else j.result() for j in joins)
    return metric, samples.extras(specs), (first, second)


def _specs_of(model: object) -> tuple[InputSpec, ...]:
    found = getattr(model, "inputs", None)
    if not isinstance(found, Mapping):
        raise UsageError("the model does not say what inputs it takes", hint="give inputs=...")
    return InputSpec.of(found)


class _Join:
    """Joins the outputs of batches: along axis 0 where that counts samples, else on a new axis."""

    def __init__(self, axes: Mapping[str, int | None]) -> None:
        self.axes = axes
        self.parts: dict[str, list[Array]] = {}
        self.joined: dict[str, bool] = {}

    def add(self, outputs: Mapping[str, Array], batch: Batch) -> None:
        for name, value in outputs.items():
            a = np.asarray(value)
            along = a.ndim > 0 and len(a) == batch.size
            if name in self.axes:
                along = self.axes[name] == 0
            self.joined[name] = along
            self.parts.setdefault(name, []).append(a[: batch.samples] if along else a)

    def result(self) -> dict[str, Array]:
        return {
            name: np.concatenate(parts) if self.joined[name] else np.stack(parts)
            for name, parts in self.parts.items()
        }
