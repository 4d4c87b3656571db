# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Compiling for ranges of sizes: the same quantization at several sizes, in one artifact.

The model is quantized once, at the size of the samples. The scales found there hold for every
compiled size, so that each computes the integers of the exact shape (`passes.dynamic_axes`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.artifact import Artifact, ParamBlock
from qcompiler.dynamic import Axes, Dynamic, Variant
from qcompiler.errors import (
    ShapeError,
    UnsupportedByTargetError,
    UnsupportedOpError,
    UsageError,
)
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.passmanager import PassContext, PassManager, ProgressFn, no_progress
from qcompiler.plan import Decision, PrecisionPlan
from qcompiler.printer import digest
from qcompiler.types import Array, Precision

if TYPE_CHECKING:
    from qcompiler.data import SampleSet
    from qcompiler.driver import Quantized
    from qcompiler.onnx_import import ModelSource
    from qcompiler.targets.base import Backend, Built

SIZES = 4
"""Compiled sizes at most: the greatest, and halves of it."""
LEAST_SIZE = 8
"""Smaller sizes are served by the code for this one, where a range goes beyond it."""

Extent = int | tuple[int, int]
Shapes = Mapping[str, Sequence[Extent]]


@dataclass(frozen=True)
class Ranges:
    """Extents that calls choose.

    Attributes:
        axes: Input -> axis -> symbol.
        symbols: Symbol -> (least, greatest) extent.
        shapes: Shapes as given; extents that are ranges have their greatest value.
    """

    axes: dict[str, dict[int, str]]
    symbols: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]

    def at(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the inputs at one size of every symbol."""
        out = {name: list(shape) for name, shape in self.shapes.items()}
        for name, axes in self.axes.items():
            for axis, symbol in axes.items():
                out[name][axis] = sizes[symbol]
        return {name: tuple(shape) for name, shape in out.items()}

    def shapes_of(self, samples: SampleSet | None) -> dict[str, tuple[int, ...]]:
        """Return the shapes that samples have; the greatest where they say nothing."""
        sizes = {s: hi for s, (_, hi) in self.symbols.items()}
        for name, shape in (samples.shapes() if samples is not None else {}).items():
            extra = len(shape) - len(self.shapes.get(name, shape))
            for axis, symbol in self.axes.get(name, {}).items():
                lo, hi = self.symbols[symbol]
                if 0 <= extra <= 1 and (extra or axis):
                    sizes[symbol] = min(hi, max(lo, shape[axis + extra]))
        return self.at(sizes)

    def ladder(self) -> list[dict[str, int]]:
        """Return the sizes to compile, the smallest first."""
        steps: list[dict[str, int]] = []
        for k in range(SIZES):
            at = {s: _step(lo, hi, k) for s, (lo, hi) in self.symbols.items()}
            if at not in steps:
                steps.append(at)
        return steps[::-1]

    def probe(self) -> dict[str, int]:
        """Return sizes that differ from the greatest ones, each symbol by another amount."""
        out: dict[str, int] = {}
        taken: set[tuple[int, int]] = set()
        for symbol, (_, hi) in self.symbols.items():
            size = hi - 1
            while size > 2 and (hi, size) in taken:
                size -= 1
            if size < 2 or (hi, size) in taken:
                size = hi + 1
                while (hi, size) in taken:
                    size += 1
            taken.add((hi, size))
            out[symbol] = size
        return out


def _step(lo: int, hi: int, k: int) -> int:
    if hi <= LEAST_SIZE:  # a batch: every sample counts; at 1, axes look like those that broadcast
        return max(math.ceil(hi / (1 << k)), lo, min(2, hi))
    size = hi if k == 0 else math.ceil(hi / 2**k / LEAST_SIZE) * LEAST_SIZE
    return min(hi, max(size, lo, min(LEAST_SIZE, hi)))


def ranges_of(model: ModelSource, shapes: Mapping[str, Sequence[Any]] | None) -> Ranges | None:
    """Return the ranges among input shapes, or None where every extent is one number.

    Args:
        model: Its inputs name the symbols; axes of one name share their extent.
        shapes: Input -> extents, each a number or a pair (least, greatest).

    Raises:
        UsageError: A range that is none, for an extent that is fixed, or two of one symbol.
    """
    if not any(not isinstance(e, int) for shape in (shapes or {}).values() for e in shape):
        return None
    from qcompiler.onnx_import import input_shapes_of

    declared = input_shapes_of(model)
    found = Ranges({}, {}, {})
    for name, shape in (shapes or {}).items():
        fixed: list[int] = []
        for axis, extent in enumerate(shape):
            if isinstance(extent, int):
                fixed.append(extent)
                continue
            lo, hi = _pair(name, extent)
            said = declared.get(name)
            known = said[axis] if said is not None and axis < len(said) else None
            if isinstance(known, int):
                raise UsageError(f"axis {axis} of input {name!r} is always {known}: "
                                 f"it cannot be {lo} to {hi}")  # fmt: skip
            fixed.append(hi)
            if lo == hi:
                continue
            symbol = known or f"{name}.{axis}"
            if found.symbols.setdefault(symbol, (lo, hi)) != (lo, hi):
                first = found.symbols[symbol]
                raise UsageError(
                    f"{symbol!r} is given as {first[0]} to {first[1]} and as {lo} to {hi}"
                )
            found.axes.setdefault(name, {})[axis] = symbol
        found.shapes[name] = tuple(fixed)
    # Other inputs that name a symbol follow it.
    for name, said in declared.items():
        for axis, known in enumerate(said or ()):
            if isinstance(known, str) and known in found.symbols and name not in found.shapes:
                found.axes.setdefault(name, {})[axis] = known
    for name in [n for n in found.axes if n not in found.shapes]:
        shape = declared[name] or ()
        hi_shape = []
        for extent in shape:
            if isinstance(extent, str) and extent in found.symbols:
                hi_shape.append(found.symbols[extent][1])
            else:
                hi_shape.append(extent if isinstance(extent, int) else 1)
        found.shapes[name] = tuple(hi_shape)
    return found if found.symbols else None


def _pair(name: str, extent: Any) -> tuple[int, int]:
    try:
        lo, hi = (int(e) for e in extent)
    except (TypeError, ValueError):
        raise UsageError(
            f"input {name!r}: {extent!r} is no extent: expected a number or (least, greatest)"
        ) from None
    if not 1 <= lo <= hi:
        raise UsageError(f"input {name!r}: no extent is {lo} to {hi}")
    return lo, hi


def build_sizes(
    model: ModelSource,
    ranges: Ranges,
    result: Quantized,
    backend: Backend,
    build: Any,
    *,
    freeze: Mapping[str, Any] | None = None,
    progress: ProgressFn = no_progress,
) -> tuple[list[Built], Dynamic]:
    """Compile every size with the scales and the plan of a quantized model.

    Args:
        model: The model.
        ranges: What calls choose.
        result: The model, quantized at one size.
        backend: The target.
        build: Graph[INTEGER] -> Built.
        freeze: As in `compile`.
        progress: Called before every size.

    Returns:
        What the backend built, the smallest first, and what the artifact says about it; parameters
        of the variants are not numbered yet.
    """
    if backend.spec.triple is None:
        raise UnsupportedByTargetError(
            f"target {backend.spec.name} serves one size per artifact",
            hint="compile for a CPU target, or for one size",
        )
    steps = ranges.ladder()
    greatest = {s: hi for s, (_, hi) in ranges.symbols.items()}
    probe = ranges.probe()
    other = _float_graph(model, ranges.at(probe), freeze)
    built: list[Built] = []
    made: Dynamic | None = None
    for number, sizes in enumerate(steps):
        progress("sizes", number, len(steps))
        graph = _float_graph(model, ranges.at(sizes), freeze)
        integer, dynamic = _quantized_like(graph, sizes, other, probe, ranges, result)
        built.append(build(integer))
        if sizes == greatest:
            made = dynamic
    progress("sizes", len(steps), len(steps))
    if made is None:
        raise AssertionError("the ladder ends with the greatest sizes")
    variants = tuple(Variant(sizes, "", ()) for sizes in steps)
    return built, dataclasses.replace(made, variants=variants)


def _float_graph(
    model: ModelSource, shapes: Mapping[str, Sequence[int]], freeze: Mapping[str, Any] | None
) -> Graph:
    from qcompiler.onnx_import import load_onnx
    from qcompiler.passes.canonicalize import canonicalize_passes

    try:
        graph = load_onnx(model, input_shapes=shapes, freeze=freeze)
    except ShapeError as error:
        at = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ShapeError(
            f"the model does not compute at every size of the range; at {at}: {error.message}",
            node=error.node,
            hint="give a range that fits the model, or one extent per axis",
        ) from None
    if graph.stage is not Stage.FLOAT:
        raise UsageError("a model that is quantized already serves one size per artifact",
                         hint="give one extent per axis")  # fmt: skip
    return PassManager(canonicalize_passes(one_size=False)).run(graph, PassContext())


def _quantized_like(
    graph: Graph,
    sizes: Mapping[str, int],
    other: Graph,
    others: Mapping[str, int],
    ranges: Ranges,
    result: Quantized,
) -> tuple[Graph, Dynamic]:
    """Mask a FLOAT graph and quantize it as another size of it was."""
    from qcompiler.passes.calibrate import Calibrate, CalibrationTable
    from qcompiler.passes.dynamic_axes import dynamic_axes, mask_tails
    from qcompiler.passes.insert_qdq import quantize_passes

    axes = dynamic_axes(graph, sizes, other, others)
    inputs: Axes = {v.name: axes.whole(v) for v in graph.inputs if axes.of(v)}
    outputs: Axes = {name: axes.whole(v) for name, v in graph.outputs if axes.of(v)}
    merged = [name for name, v in graph.outputs if axes.of(v) != axes.whole(v)]
    if merged:
        raise UnsupportedOpError(
            f"the size is merged with another extent in output {', '.join(map(repr, merged))}",
            hint="compile it for one size; calls take any number of samples of a batch",
        )
    before = {n.name for n in graph.nodes}
    tails, like = mask_tails(graph, axes, {s: lo for s, (lo, _) in ranges.symbols.items()})
    if result.prepared is not None and result.float_graph is not None:
        _with_constants_of(graph, result.prepared[0], result.float_graph, result.methods)
    plan = dataclasses.replace(result.plan, graph="")
    plan = plan.replaced({  # movement follows its neighbours, whatever they are
        n.name: Decision(Precision.W8A8, "keeps what fills up the extent at zero")
        for n in graph.nodes
        if plan.has_integers and n.name not in before and n.op.name == "mask_tail"
    })  # fmt: skip
    ctx = PassContext()
    ctx.put(plan)
    if result.prepared is not None:
        ctx.put(result.prepared[1])
    if result.table is not None:
        known = dict(result.table.tensors)
        known.update({new: known[old] for new, old in like.items() if old in known})
        ctx.put(dataclasses.replace(result.table, tensors=known, graph=digest(graph)))
    passes = [p for p in quantize_passes(plan) if not isinstance(p, Calibrate)]
    needed = () if result.table is None else (CalibrationTable,)
    integer = PassManager(passes, given=(PrecisionPlan, *needed)).run(graph, ctx)
    order = tuple(s for name in (v.name for v in integer.inputs)
                  for s, t in tails.items() if t == name)  # fmt: skip
    return integer, Dynamic(ranges.symbols, inputs, outputs, order, ())


def _with_constants_of(
    graph: Graph, prepared: Graph, before: Graph, methods: Sequence[str]
) -> None:
    """Give one size's nodes the weights and biases that methods gave those of the samples' size.

    Raises:
        UsageError: A method changed more than constants.
    """
    first = {n.name: n for n in before.nodes}
    nodes = {n.name: n for n in graph.nodes}
    for node in prepared.nodes:
        was = first.get(node.name)
        known = nodes.get(node.name)
        for i, v in enumerate(node.inputs):
            old = was.inputs[i] if was is not None and i < len(was.inputs) else None
            if v is None or (old is not None and old.data is v.data and v.is_constant):
                continue
            if not v.is_constant:
                if was is None or old is None or old.name != v.name:
                    raise UsageError(
                        f"methods {', '.join(methods)} changed more than weights at {node.name!r}, "
                        "and a range has several sizes",
                        hint="leave that method out, or give one extent per axis",
                    )
                continue
            if known is None or known.op is not node.op:
                raise UsageError(
                    f"{node.name!r}, which methods {', '.join(methods)} changed, is not the same "
                    "at every size of the range",
                    hint="leave them out, or give one extent per axis",
                )
            graph.set_input(known, i, graph.constant(v.array(), graph.fresh(v.name)))


def joined(artifact: Artifact, built: Sequence[Built], dynamic: Dynamic) -> Artifact:
    """Return the artifact of the greatest size with the code of all others.

    Equal parameters are stored once.
    """
    tails = len(dynamic.tails)
    numbers: dict[tuple[str, tuple[int, ...], bytes], int] = {}
    arrays: list[tuple[str, Array]] = []
    variants: list[Variant] = []
    extras = dict(artifact.extras)
    for variant, part in zip(dynamic.variants, built, strict=True):
        indices = []
        for name, array in zip(part.parameter_names, part.parameters, strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(array).view(np.uint8).data).digest()
            key = (str(array.dtype), array.shape, digest)
            if key not in numbers:
                numbers[key] = len(arrays)
                arrays.append((f"{name}#{len(arrays)}", array))
            indices.append(numbers[key])
        last = variant is dynamic.variants[-1]
        size = "-".join(str(n) for n in variant.sizes.values())
        member = "lib.so" if last else f"lib-{size}.so"
        if not last and part.library is not None:
            extras[member] = part.library
        variants.append(Variant(variant.sizes, member, tuple(indices)))
    inputs = dict(list(artifact.inputs.items())[: len(artifact.inputs) - tails])
    return dataclasses.replace(
        artifact,
        inputs=inputs,
        executor="vm",
        params=ParamBlock.from_arrays(arrays),
        extras=extras,
        dynamic=dataclasses.replace(dynamic, variants=tuple(variants)),
    )
