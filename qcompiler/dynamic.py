# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One artifact for a range of sizes: what it says about them, and how it runs.

The artifact holds one library per compiled size and one set of parameters. A call takes the least
size that its inputs fit in, fills them up with zeros, tells the code which part is in use, and cuts
the results; what is computed for the used part does not depend on the filling
(`passes.dynamic_axes`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.errors import ArtifactError, DataError, UsageError
from qcompiler.manifest import TensorSpec
from qcompiler.types import Array
from qcompiler.vm import VmExecutor

if TYPE_CHECKING:
    from qcompiler.artifact import Artifact

FILL = -1e30
"""What the code is told beyond the used part (`passes.dynamic_axes.FILL`)."""

Axes = Mapping[str, Mapping[int, str]]
"""Input or output -> axis -> symbol."""


@dataclass(frozen=True)
class Variant:
    """The code for one size of every symbol.

    Attributes:
        sizes: Symbol -> extent that it was compiled for.
        library: Member of the artifact that holds it.
        params: Which of the artifact's parameters it takes, in order.
    """

    sizes: Mapping[str, int]
    library: str
    params: tuple[int, ...]


@dataclass(frozen=True)
class Dynamic:
    """What an artifact says about extents that a call chooses.

    Attributes:
        symbols: Symbol -> (least, greatest) extent.
        inputs: Which axes of the inputs follow which symbol.
        outputs: Likewise of the outputs.
        tails: Symbols whose used part the code is told, in the order of its further inputs.
        variants: Compiled sizes, the smallest first; the last one is the greatest.
    """

    symbols: Mapping[str, tuple[int, int]]
    inputs: Axes
    outputs: Axes
    tails: tuple[str, ...]
    variants: tuple[Variant, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's `dynamic`."""
        return {
            "symbols": {s: list(bounds) for s, bounds in self.symbols.items()},
            "inputs": _axes_to_json(self.inputs),
            "outputs": _axes_to_json(self.outputs),
            "tails": list(self.tails),
            "variants": [
                {"sizes": dict(v.sizes), "library": v.library, "params": list(v.params)}
                for v in self.variants
            ],
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any], params: int, where: str) -> Dynamic:
        """Return what a manifest that passed the schema says.

        Raises:
            ArtifactError: Values that contradict each other.
        """
        symbols = {s: (int(b[0]), int(b[1])) for s, b in doc["symbols"].items() if len(b) == 2}
        variants = tuple(
            Variant(dict(v["sizes"]), v["library"], tuple(v["params"])) for v in doc["variants"]
        )
        made = cls(
            symbols,
            _axes_from_json(doc["inputs"]),
            _axes_from_json(doc["outputs"]),
            tuple(doc["tails"]),
            variants,
        )
        both = [*made.inputs.values(), *made.outputs.values()]
        named = {symbol for axes in both for symbol in axes.values()}
        sound = (
            bool(variants)
            and {*named, *made.tails} <= set(symbols) == set(doc["symbols"])
            and all(1 <= lo <= hi for lo, hi in symbols.values())
            and all(set(v.sizes) == set(symbols) for v in variants)
            and all(0 <= i < params for v in variants for i in v.params)
            and all(variants[-1].sizes[s] >= hi for s, (_, hi) in symbols.items())
        )
        if not sound:
            raise ArtifactError(f"{where}: what it says about dynamic extents contradicts itself")
        return made

    def sizes(self, arrays: Mapping[str, Array], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
        """Return the extent of every symbol in a call.

        Raises:
            DataError: Inputs that disagree, or an extent out of its range.
        """
        found: dict[str, tuple[int, str]] = {}
        for name, axes in self.inputs.items():
            shape = np.shape(arrays.get(name, ()))
            rank = len(specs[name].shape)
            if len(shape) not in (rank, rank + 1):
                continue  # refused with the other shapes that do not fit
            for axis, symbol in axes.items():
                extent = shape[len(shape) - rank + axis]
                before = found.setdefault(symbol, (extent, name))
                if before[0] != extent:
                    raise DataError(
                        f"input {name!r} has {extent} along axis {axis} ({symbol}), input "
                        f"{before[1]!r} has {before[0]}: expected one extent",
                        value=name,
                    )
                lo, hi = self.symbols[symbol]
                if not lo <= extent <= hi:
                    raise DataError(
                        f"input {name!r} has {extent} along axis {axis} ({symbol}): the model was "
                        f"compiled for {lo} to {hi}",
                        value=name,
                        hint="cut the input, or compile for a larger range",
                    )
        return {s: found[s][0] if s in found else hi for s, (_, hi) in self.symbols.items()}

    def variant(self, sizes: Mapping[str, int]) -> int:
        """Return the index of the smallest variant that sizes fit in."""
        for i, v in enumerate(self.variants):
            if all(n <= v.sizes[s] for s, n in sizes.items()):
                return i
        raise UsageError(f"no variant serves {dict(sizes)}")


def resolved(
    specs: Mapping[str, TensorSpec], axes: Axes, sizes: Mapping[str, int]
) -> dict[str, TensorSpec]:
    """Return tensors with the extents of a call."""
    out = dict(specs)
    for name, follows in axes.items():
        shape = list(out[name].shape)
        for axis, symbol in follows.items():
            shape[axis] = sizes[symbol]
        out[name] = replace(out[name], shape=tuple(shape))
    return out


class DynamicExecutor:
    """Runs the variant that inputs fit in; safe to use from several threads."""

    def __init__(self, artifact: Artifact) -> None:
        """Map the libraries at their first use."""
        if artifact.dynamic is None or artifact.library is None:
            raise UsageError("the artifact has no dynamic extents")
        self.dynamic = artifact.dynamic
        self._artifact = artifact
        self._inputs = tuple(artifact.inputs)
        self._outputs = tuple(artifact.outputs)
        self._made: dict[int, VmExecutor] = {}
        self._lock = threading.Lock()
        self.executor(len(self.dynamic.variants) - 1)

    def executor(self, index: int) -> VmExecutor:
        """Return what runs a variant; its parameters are those of all others."""
        with self._lock:
            if index not in self._made:
                v = self.dynamic.variants[index]
                library = self._artifact.member(v.library)
                arrays = self._artifact.params.arrays
                self._made[index] = VmExecutor(library, [arrays[i] for i in v.params])
            return self._made[index]

    def run(self, inputs: Sequence[Array], *, threads: int = 1) -> list[Array]:
        """Run once, on arrays of any extents in the ranges."""
        named = dict(zip(self._inputs, inputs, strict=True))
        sizes = self.dynamic.sizes(named, self._artifact.inputs)
        index = self.dynamic.variant(sizes)
        feeds = self.filled(inputs, sizes, index)
        results = self.executor(index).run(feeds, threads=threads)
        return [
            self._cut(name, array, sizes)
            for name, array in zip(self._outputs, results, strict=True)
        ]

    def filled(self, inputs: Sequence[Array], sizes: Mapping[str, int], index: int) -> list[Array]:
        """Return the inputs of a variant: filled up with zeros, and what says how far."""
        variant = self.dynamic.variants[index]
        feeds: list[Array] = []
        for name, array in zip(self._inputs, inputs, strict=True):
            shape = list(array.shape)
            for axis, symbol in self.dynamic.inputs.get(name, {}).items():
                shape[axis] = variant.sizes[symbol]
            if tuple(shape) == array.shape:
                feeds.append(array)
                continue
            full = np.zeros(shape, array.dtype)
            full[tuple(slice(n) for n in array.shape)] = array
            feeds.append(full)
        for symbol in self.dynamic.tails:
            tail = np.zeros(variant.sizes[symbol], np.float32)
            tail[sizes[symbol] :] = FILL
            feeds.append(tail)
        return feeds

    def profile(
        self, inputs: Sequence[Array], *, runs: int = 5, threads: int | None = None
    ) -> list[tuple[str, float]]:
        """Time the kernels of the variant that serves the inputs."""
        named = dict(zip(self._inputs, inputs, strict=True))
        sizes = self.dynamic.sizes(named, self._artifact.inputs)
        index = self.dynamic.variant(sizes)
        feeds = self.filled(inputs, sizes, index)
        return self.executor(index).profile(feeds, runs=runs, threads=threads)

    def _cut(self, name: str, array: Array, sizes: Mapping[str, int]) -> Array:
        parts = [slice(None)] * array.ndim
        for axis, symbol in self.dynamic.outputs.get(name, {}).items():
            parts[axis] = slice(sizes[symbol])
        return np.asarray(array[tuple(parts)])


def _axes_to_json(axes: Axes) -> dict[str, dict[str, str]]:
    return {name: {str(a): s for a, s in found.items()} for name, found in axes.items()}


def _axes_from_json(doc: Mapping[str, Mapping[str, str]]) -> dict[str, dict[int, str]]:
    return {name: {int(a): s for a, s in found.items()} for name, found in doc.items()}
