# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Run compiled models: inputs by name in, outputs by name out.

`load` works in a process that never maps TVM's compiler library (see `vm`).
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from qcompiler.artifact import (
    Artifact,
    PathLike,
    atomic_write,
    check_runnable,
    read_artifact,
    report_path,
    write_artifact,
)
from qcompiler.benchmark import measure
from qcompiler.cpu import default_threads
from qcompiler.dynamic import DynamicExecutor, resolved
from qcompiler.errors import ArtifactError, DataError, UsageError
from qcompiler.four_bits import in_bytes, outside
from qcompiler.manifest import TargetInfo, TensorSpec, dumps, loads
from qcompiler.types import WIDENED, Array
from qcompiler.vm import VmExecutor

# Where each kind of executor but "vm" is made: a function of the artifact. The table is closed: a
# file cannot name code of its own.
_EXECUTOR_FACTORIES = {
    "interpreter": ("qcompiler.targets.reference", "load_executor"),
    "cuda": ("qcompiler.cuda_executor", "load_executor"),
}


_SMALL = 4096
"""Elements up to which BLAS works on one thread, in any case."""


class Executor(Protocol):
    """What runs the compiled function once."""

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Return the outputs for arrays of exactly the compiled shapes and dtypes.

        Called from several threads at once. The number of threads never changes the results, which
        may share memory with the inputs.
        """
        ...


class CompiledModel:
    """A compiled model, ready to run and to save.

    Call it with a mapping of input names to arrays, or with one array if it has one input. An array
    with the input's own rank is split along axis 0 into batches of the compiled size, where that
    axis is a batch axis; the last batch may be partial. An array with one axis more holds one whole
    input per entry. An input without a batch axis that is given once serves all runs. Outputs with
    a batch axis come back joined along it, the others as they are after one run, and stacked along
    a new first axis otherwise. Extents that were compiled for a range take any size in it; all runs
    of a call share it.

    Safe to call from several threads. The number of threads never changes the results.

    Attributes:
        artifact: Everything that `save` writes.
        report: Measured figures and decisions as JSON, if there are any; not part of the artifact.
        example: One batch of real inputs that timed runs get, where one is known; not saved.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        report: Mapping[str, Any] | None = None,
        threads: int | None = None,
        executor: Executor | None = None,
    ) -> None:
        """Make a model of an artifact; its code is mapped at the first call.

        Args:
            artifact: From a compilation or from `read_artifact`.
            report: See the attribute.
            threads: Threads per call where the call does not say; None: `default_threads()`.
            executor: Runs the model instead of what the artifact names.

        Raises:
            UsageError: `threads` below 1, or batch axes that contradict each other.
        """
        self.artifact = artifact
        self.report = report
        self.example: Mapping[str, Array] | None = None
        self._threads = _checked_threads(threads)
        self._executor = executor
        self._lock = threading.Lock()
        sizes = {
            spec.shape[0]
            for spec in (*artifact.inputs.values(), *artifact.outputs.values())
            if spec.batch_axis == 0
        }
        if len(sizes) > 1 or 0 in sizes:
            raise UsageError(f"batch axes must have one size of at least 1, got {sorted(sizes)}")
        self._batch = sizes.pop() if sizes else 1
        self._shapes: dict[str, tuple[tuple[int, ...], np.dtype[Any], bool]] | None = None
        if artifact.dynamic is None:
            inputs = artifact.inputs.items()
            self._shapes = {n: (s.shape, s.dtype.numpy, s.infinite) for n, s in inputs}
        self._narrow = frozenset(n for n, s in artifact.inputs.items() if s.dtype in WIDENED)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Inputs by name, with the compiled shapes."""
        return self.artifact.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Outputs by name, with the compiled shapes."""
        return self.artifact.outputs

    @property
    def plan(self) -> Mapping[str, Any]:
        """Precision and reason per node."""
        return self.artifact.plan

    @property
    def target(self) -> TargetInfo:
        """What the model was compiled for."""
        return self.artifact.target

    def __repr__(self) -> str:
        inputs = ", ".join(f"{name}: {spec}" for name, spec in self.inputs.items())
        outputs = ", ".join(f"{name}: {spec}" for name, spec in self.outputs.items())
        return f"CompiledModel({self.target.name}, ({inputs}) -> ({outputs}))"

    def __call__(
        self, inputs: Mapping[str, Array] | Array, *, threads: int | None = None
    ) -> dict[str, Array]:
        """Run the model.

        Args:
            inputs: Arrays by input name, or the array of the only input. float64 arrays serve
                float inputs, and any integers integer inputs, if no value changes: an int4 input
                takes -8 to 7, one value to a byte.
            threads: Threads for this call; at most as many as this process has CPUs.

        Raises:
            DataError: Inputs that do not fit the model, or hold NaN or infinity.
            UsageError: `threads` is no positive integer.
            UnsupportedByTargetError: This machine cannot run the model.
        """
        exact = self._exact(inputs)
        if exact is not None:
            count = self._threads if threads is None else _checked_threads(threads)
            found = self._ready().run(exact, threads=count)
            return {name: array.copy() for name, array in zip(self.outputs, found, strict=True)}
        execute = self._execute(threads)
        feeds = self._feeds(inputs)
        outputs = self._outputs_of(feeds)
        runs, samples = self._runs(feeds)
        stacked = any(feed.stacked for feed in feeds)
        if samples % self._batch:
            whole = [name for name, spec in outputs.items() if spec.batch_axis is None]
            if whole:
                raise DataError(
                    f"{samples} samples are not a multiple of the compiled batch {self._batch}, "
                    f"and output {whole[0]!r} is of a whole batch",
                    value=whole[0],
                    hint="give whole batches",
                )
        results: list[Array] = []
        for run in range(runs):
            arrays = execute([feed.batch(run, self._batch) for feed in feeds])
            if not results:
                results = [
                    np.empty(self._result_shape(spec, runs, samples, stacked), array.dtype)
                    for spec, array in zip(outputs.values(), arrays, strict=True)
                ]
            for spec, result, array in zip(outputs.values(), results, arrays, strict=True):
                if spec.batch_axis == 0:
                    part = result[run * self._batch : (run + 1) * self._batch]
                    part[...] = array[: len(part)]
                elif stacked or runs > 1:
                    result[run] = array
                else:
                    result[...] = array
        return dict(zip(outputs, results, strict=True))

    def _exact(self, inputs: Mapping[str, Array] | Array) -> list[Array] | None:
        """Return the inputs where they are one run in the compiled shapes and dtypes, else None.

        A short way for the usual call: everything else is checked, converted or refused, with its
        reasons, on the long way, whose results are the same.
        """
        if self._shapes is None or not isinstance(inputs, dict) or len(inputs) != len(self._shapes):
            return None
        arrays: list[Array] = []
        for name, (shape, dtype, infinite) in self._shapes.items():
            array = inputs.get(name)
            if type(array) is not np.ndarray or array.shape != shape or array.dtype != dtype:
                return None
            if dtype.kind == "f" and not _surely_sound(array, infinite):
                return None
            if name in self._narrow and outside(array, self.inputs[name].dtype) is not None:
                return None
            arrays.append(array)
        return arrays

    def _outputs_of(self, feeds: Sequence[_Feed]) -> Mapping[str, TensorSpec]:
        """Return the outputs with the extents that a call's inputs choose."""
        dynamic = self.artifact.dynamic
        if dynamic is None:
            return self.outputs
        sizes = dynamic.sizes({f.name: f.array for f in feeds}, self.inputs)
        return resolved(self.outputs, dynamic.outputs, sizes)

    def save(self, path: PathLike) -> None:
        """Write the artifact, and the report beside it as `NAME.report.json` if there is one.

        Raises:
            ArtifactError: A file cannot be written.
        """
        write_artifact(self.artifact, path)
        if self.report is not None:
            with atomic_write(report_path(path)) as stream:
                stream.write(dumps(dict(self.report)))

    def benchmark(
        self,
        runs: int = 30,
        warmup: int = 3,
        threads: int | None = None,
        *,
        inputs: Mapping[str, Array] | None = None,
    ) -> dict[str, float | int]:
        """Time runs of one batch.

        Args:
            runs: Measured runs.
            warmup: Runs before them.
            threads: As in a call.
            inputs: One batch of inputs; None: `timed_inputs`.

        Returns:
            median_ms, min_ms, spread (distance of the quartiles over the median), runs, threads.

        Raises:
            DataError: Inputs that do not fit.
            UsageError: `runs`, `warmup` or `threads` out of range.
        """
        execute = self._execute(threads)
        feeds = self._feeds(self.timed_inputs() if inputs is None else inputs)
        self._runs(feeds)
        arrays = [feed.batch(0, self._batch) for feed in feeds]
        timing = measure(
            {"model": lambda: execute(arrays)},
            runs=runs,
            warmup=warmup,
            threads=self._threads if threads is None else threads,
        )
        return timing["model"].to_json()

    def profile(
        self, inputs: Mapping[str, Array] | None = None, *, runs: int = 5
    ) -> list[tuple[str, float]]:
        """Return (kernel symbol, seconds) of each kernel call of one run, in order.

        Empty where the executor cannot tell (the interpreter).

        Args:
            inputs: As in a call; None: `timed_inputs`. Their first batch is run.
            runs: Runs; each kernel's least time counts.

        Raises:
            DataError: Inputs that do not fit the model, or hold NaN or infinity.
            UnsupportedByTargetError: This machine cannot run the model.
        """
        executor = self._ready()
        own = isinstance(executor, (VmExecutor, DynamicExecutor))
        if not own and self.artifact.executor != "cuda":
            return []
        feeds = self._feeds(self.timed_inputs() if inputs is None else inputs)
        arrays = [feed.batch(0, self._batch) for feed in feeds]
        if isinstance(executor, (VmExecutor, DynamicExecutor)):
            return executor.profile(arrays, runs=runs, threads=self._threads)
        timed: list[tuple[str, float]] = cast(Any, executor).profile(arrays, runs=runs)
        return timed

    def timed_inputs(self) -> dict[str, Array]:
        """Return one batch to time the model with: a sample where one is known, else random."""
        return self.random_inputs() if self.example is None else dict(self.example)

    def random_inputs(self, seed: int = 0) -> dict[str, Array]:
        """Return one batch of seeded random inputs.

        Floats are normal, integers of 8 bits or less uniform over their range; wider ones are 0 or
        1, which nearly every use as an index allows.
        """
        rng = np.random.default_rng(seed)
        arrays: dict[str, Array] = {}
        for name, spec in self.inputs.items():
            if spec.dtype.is_float:
                arrays[name] = rng.standard_normal(spec.shape).astype(spec.dtype.numpy)
            elif spec.dtype.bits <= 8 and spec.dtype.is_integer:
                arrays[name] = rng.integers(
                    spec.dtype.min, spec.dtype.max, spec.shape, spec.dtype.numpy, endpoint=True
                )
            else:
                arrays[name] = rng.integers(0, 2, spec.shape).astype(spec.dtype.numpy)
        return arrays

    def _ready(self) -> Executor:
        """Return the executor; the first call makes it."""
        if self._executor is None:
            with self._lock:
                if self._executor is None:
                    self._executor = _make_executor(self.artifact)
        return self._executor

    def _execute(self, threads: int | None) -> Callable[[Sequence[Array]], list[Array]]:
        """Return what runs one batch with so many threads."""
        count = self._threads if threads is None else _checked_threads(threads)
        return functools.partial(self._ready().run, threads=count)

    def _feeds(self, inputs: Mapping[str, Array] | Array) -> list[_Feed]:
        """Check the inputs and return them in the compiled order."""
        expected = ", ".join(f"{name} {spec}" for name, spec in self.inputs.items())
        if not isinstance(inputs, Mapping):
            if len(self.inputs) != 1:
                raise DataError(
                    f"the model has {len(self.inputs)} inputs, got one array: expected a mapping "
                    f"with {expected}"
                )
            inputs = {next(iter(self.inputs)): inputs}
        missing = [name for name in self.inputs if name not in inputs]
        unknown = [str(name) for name in inputs if name not in self.inputs]
        if missing or unknown:
            problems = [f"missing {', '.join(missing)}"] if missing else []
            problems += [f"unknown {', '.join(unknown)}"] if unknown else []
            raise DataError(f"inputs do not fit: {'; '.join(problems)}: expected {expected}")
        specs = self.inputs
        dynamic = self.artifact.dynamic
        if dynamic is not None:
            specs = resolved(specs, dynamic.inputs, dynamic.sizes(inputs, specs))
        return [_Feed(name, spec, inputs[name]) for name, spec in specs.items()]

    def _runs(self, feeds: Sequence[_Feed]) -> tuple[int, int]:
        """Return the number of runs and of samples that the inputs make.

        Raises:
            DataError: Inputs of different numbers of samples.
        """
        counts = {
            feed.name: len(feed.array) * (self._batch if feed.stacked else 1)
            for feed in feeds
            if feed.stacked or feed.spec.batch_axis == 0
        }
        if len(set(counts.values())) > 1:
            listing = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"inputs hold different numbers of samples: {listing}")
        samples = next(iter(counts.values())) if counts else self._batch
        return -(-samples // self._batch), samples

    def _result_shape(
        self, spec: TensorSpec, runs: int, samples: int, stacked: bool
    ) -> tuple[int, ...]:
        if spec.batch_axis == 0:
            return (samples, *spec.shape[1:])
        return (runs, *spec.shape) if stacked or runs > 1 else spec.shape


class _Feed:
    """The values of one input for all runs of a call, checked.

    Attributes:
        name: Name of the input.
        spec: What one run takes.
        array: The values, of the input's dtype.
        stacked: Whether the array has one axis more: one whole input per entry.
    """

    __slots__ = ("array", "name", "spec", "stacked")

    def __init__(self, name: str, spec: TensorSpec, values: Array) -> None:
        array = np.asarray(values)
        self.name = name
        self.spec = spec
        self.stacked = array.ndim == len(spec.shape) + 1
        fits = array.shape[1:] == spec.shape if self.stacked else array.shape == spec.shape
        if spec.batch_axis == 0 and not self.stacked:
            fits = array.ndim == len(spec.shape) and array.shape[1:] == spec.shape[1:]
        if not fits:
            raise DataError(
                f"input {name!r} has shape {list(array.shape)}: expected {_wanted(spec)}",
                value=name,
            )
        if (self.stacked or spec.batch_axis == 0) and not len(array):
            raise DataError(f"input {name!r} holds no samples: expected at least one", value=name)
        self.array = _converted(name, array, spec)

    def batch(self, run: int, size: int) -> Array:
        """Return the input of one run; a partial batch is filled up with its last sample."""
        if self.stacked:
            return cast(Array, self.array[run])[...]
        if self.spec.batch_axis is None:
            return self.array
        part = self.array[run * size : (run + 1) * size]
        if len(part) < size:
            part = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        return part


def _wanted(spec: TensorSpec) -> str:
    shape = list(spec.shape)
    if spec.batch_axis == 0:
        return f"[N, {', '.join(map(str, shape[1:]))}]" if shape[1:] else "[N]"
    return f"{shape}, or one more axis in front with one whole input per entry"


_ONLY_MASKS = (
    "infinities are taken where only a softmax or a comparison reads them in the end, as of an "
    "attention mask"
)


def _converted(name: str, array: Array, spec: TensorSpec) -> Array:
    """Return the array in the input's dtype; no value ever changes.

    Raises:
        DataError: A dtype of another kind, values that do not fit, NaN or infinity.
    """
    wanted, array = spec.dtype.numpy, in_bytes(array)
    if array.dtype != wanted:
        kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}[wanted.kind]
        if array.dtype.kind not in kinds:
            raise DataError(
                f"input {name!r} has dtype {array.dtype.name}: expected {wanted.name}",
                value=name,
                hint=f"convert it as the model's preprocessing says, then .astype('{wanted.name}')",
            )
        with np.errstate(over="ignore", invalid="ignore"):
            converted = array.astype(wanted)
        same = converted == array
        if wanted.kind == "f":
            same |= np.isnan(array)  # reported as NaN below
        if not same.all():
            raise DataError(
                f"input {name!r} has dtype {array.dtype.name} and values that {wanted.name} "
                f"cannot hold, such as {array[~same].flat[0]!r}",
                value=name,
                hint=f"convert it yourself with .astype('{wanted.name}')",
            )
        array = converted
    found = outside(array, spec.dtype)
    if found is not None:
        raise DataError(
            f"input {name!r} is {spec.dtype.value} and holds {found[0]} at index {list(found[1])}: "
            f"expected {spec.dtype.min} to {spec.dtype.max}",
            value=name,
            hint="one value to a byte: unpack two that share one",
        )
    if wanted.kind == "f":
        with np.errstate(over="ignore", invalid="ignore"):
            # A sum is faster than isfinite; it may overflow where every value is finite.
            suspicious = not np.isfinite(array.sum(dtype=max(wanted, np.dtype(np.float32))))
        if suspicious and not np.isfinite(array).all():
            bad = np.argwhere(np.isnan(array) if spec.infinite else ~np.isfinite(array))
            if len(bad):
                kinds = "NaN" if spec.infinite else "NaN or infinite"
                raise DataError(
                    f"input {name!r} holds {len(bad)} values that are {kinds}, the first at "
                    f"index {[int(i) for i in bad[0]]}",
                    value=name,
                    hint=None if spec.infinite else _ONLY_MASKS,
                )
    return array


def _surely_sound(array: Array, infinite: bool) -> bool:
    """Whether no value is NaN or, unless it may be, infinite; False also where that is not sure."""
    if array.dtype == np.float32 and array.size <= _SMALL:
        squares = np.vdot(array, array)  # checks no flags, unlike a sum
        return not math.isnan(squares) if infinite else math.isfinite(squares)
    # Both propagate NaN, and are twice as fast as a sum, which may overflow besides.
    highest = array.max()
    if infinite:
        return not math.isnan(highest)
    return math.isfinite(highest) and math.isfinite(array.min())


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise UsageError(f"threads must be a positive integer, got {threads!r}")
    return threads


def _make_executor(artifact: Artifact) -> Executor:
    check_runnable(artifact.target, "the model")
    if artifact.dynamic is not None:
        return DynamicExecutor(artifact)
    if artifact.library is not None:
        return VmExecutor(artifact.library, artifact.params.arrays)
    module, function = _EXECUTOR_FACTORIES[artifact.executor]
    make = getattr(importlib.import_module(module), function)
    return cast(Executor, make(artifact))


def load(path: PathLike, *, threads: int | None = None) -> CompiledModel:
    """Load a compiled model; everything is checked and mapped before this returns.

    Args:
        path: A `.qcm` file.
        threads: Threads per call where the call does not say; None: one per physical core that
            this process may use (or `TVM_NUM_THREADS`).

    Raises:
        ArtifactError: No such file, not an artifact, truncated, altered, or of an unknown version.
        UnsupportedByTargetError: This machine lacks what the artifact needs.
    """
    artifact = read_artifact(path)
    model = CompiledModel(artifact, report=_read_report(path), threads=threads)
    model._ready()
    return model


def _read_report(path: PathLike) -> Mapping[str, Any] | None:
    """Return the report beside an artifact, if there is one that can be read."""
    beside: Path = report_path(path)
    try:
        return loads(beside.read_bytes(), str(beside))
    except (OSError, ArtifactError):
        return None  # the model runs as well without it
