# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Shapes of the model's inputs: symbolic extents, frozen inputs, and which axis counts samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from qcompiler.errors import ShapeError, UsageError
from qcompiler.four_bits import in_bytes, outside
from qcompiler.ir import Graph
from qcompiler.onnx_import_tensors import element_count
from qcompiler.types import Array, DType, Shape

Extent = int | str | None
"""A known extent, the name of a symbolic one, or None for one without a name."""


@dataclass(frozen=True, slots=True)
class Declared:
    """An input as the model declares it; `shape` is None where even the rank is open."""

    name: str
    shape: tuple[Extent, ...] | None
    dtype: DType


@dataclass(frozen=True, slots=True)
class Bound:
    """Static shapes of the inputs, and the elements of frozen ones."""

    shapes: dict[str, Shape]
    frozen: dict[str, Array]


def declared_shape(info: onnx.ValueInfoProto) -> tuple[Extent, ...] | None:
    """Return the declared shape of an input or output."""
    type = info.type.tensor_type
    if not type.HasField("shape"):
        return None
    # Exporters write 0 or -1 for an extent that they leave open.
    return tuple(
        int(d.dim_value) if d.dim_value > 0 else (d.dim_param or None) for d in type.shape.dim
    )


def _text(shape: Sequence[Extent] | None) -> str:
    if shape is None:
        return "of unknown rank"
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"


def bind_inputs(
    inputs: Sequence[Declared],
    shapes: Mapping[str, Sequence[int]],
    freeze: Mapping[str, object],
    optional: Sequence[str],
    sample_shapes: Mapping[str, Shape] | None = None,
) -> Bound:
    """Give every input a static shape.

    Symbols take their values from `shapes`, from frozen inputs, then from `sample_shapes`; a
    symbolic first extent that is still open is the batch and becomes 1.

    Args:
        inputs: Inputs without a default value.
        shapes: Shapes by input name.
        freeze: Constants by input name.
        optional: Inputs with a default value, which may be frozen to another.
        sample_shapes: Shape of the array of samples per input; consulted for open extents only.

    Raises:
        UsageError: Names that are not inputs; shapes or values that contradict the model.
        ShapeError: Extents left open, all of them at once.
    """
    names = [d.name for d in inputs]
    for what, given, known in (
        ("input_shapes", shapes, names),
        ("freeze", freeze, [*names, *optional]),
    ):
        unknown = [n for n in given if n not in known]
        if unknown:
            raise UsageError(
                f"{what} names {', '.join(map(repr, unknown))}: the model's inputs are"
                f" {', '.join(map(repr, known)) or 'none'}"
            )
    symbols: dict[str, int] = {}
    given_shapes: dict[str, Shape] = {}
    frozen: dict[str, Array] = {}
    for d in inputs:
        if d.name in freeze:
            frozen[d.name] = _frozen(d, freeze[d.name])
            given_shapes[d.name] = frozen[d.name].shape
        elif d.name in shapes:
            given_shapes[d.name] = tuple(_extent(d.name, n) for n in shapes[d.name])
            if any(n < 1 for n in given_shapes[d.name]):
                raise UsageError(
                    f"input {d.name!r} cannot have the shape {list(given_shapes[d.name])}",
                    hint="give one positive extent per axis",
                )
        if d.name in given_shapes:
            _bind(d, given_shapes[d.name], symbols)
    for d in inputs:
        found = _from_samples(d, (sample_shapes or {}).get(d.name))
        if d.name not in given_shapes and found is not None:
            given_shapes[d.name] = found = tuple(
                symbols.get(want, n) if isinstance(want, str) else n
                for want, n in zip(d.shape or found, found, strict=True)
            )
            _bind(d, found, symbols)
    for d in inputs:
        first = d.shape[0] if d.shape and d.name not in given_shapes else None
        if isinstance(first, str):
            symbols.setdefault(first, 1)
    return Bound(_close(inputs, given_shapes, symbols), frozen)


def _extent(name: str, given: object) -> int:
    """Return one extent; a pair of equal ends, which stands for a range, is that size."""
    if isinstance(given, tuple | list) and len(given) == 2:
        least, greatest = (int(end) for end in given)
        if least != greatest:
            raise UsageError(
                f"input {name!r} is given the range {least} to {greatest}: one size is needed here",
                hint="give one extent per axis; compile makes artifacts for ranges",
            )
        return least
    return int(given)  # type: ignore[call-overload, no-any-return]


def _from_samples(d: Declared, samples: Shape | None) -> Shape | None:
    """Return the shape of one run that an array of samples suggests, or None where it says nothing.

    An array of the input's own rank holds samples along axis 0, which becomes 1 where it is open;
    with one axis more, each entry is a whole input.
    """
    if d.shape is None or samples is None or all(isinstance(n, int) for n in d.shape):
        return None
    if len(samples) == len(d.shape) + 1:
        one = samples[1:]
    elif len(samples) == len(d.shape) > 1:
        one = (1, *samples[1:])
    else:
        return None
    shape = tuple(
        want if isinstance(want, int) else n for want, n in zip(d.shape, one, strict=True)
    )
    return shape if all(n > 0 for n in shape) else None


def _bind(d: Declared, shape: Shape, symbols: dict[str, int]) -> None:
    """Check a given shape against the declared one and bind its symbols."""
    if d.shape is None:
        return
    problem = f"input {d.name!r} is declared {_text(d.shape)}, given {list(shape)}"
    if len(shape) != len(d.shape):
        raise UsageError(problem, hint="give one extent per axis")
    for want, n in zip(d.shape, shape, strict=True):
        if isinstance(want, int) and want != n:
            raise UsageError(problem, hint="fixed extents cannot be changed")
        if isinstance(want, str) and symbols.setdefault(want, n) != n:
            raise UsageError(f"{problem}: {want!r} is {symbols[want]} in another input")


def _close(
    inputs: Sequence[Declared], given: Mapping[str, Shape], symbols: Mapping[str, int]
) -> dict[str, Shape]:
    """Return all shapes; complain once about every extent that is still open."""
    closed: dict[str, Shape] = {}
    open_axes: list[str] = []
    examples: list[str] = []
    for d in inputs:
        if d.name in given:
            closed[d.name] = given[d.name]
        elif d.shape is None:
            open_axes.append(f"{d.name!r} has no declared rank")
            examples.append(f"--input-shape {d.name}:1x...")
        else:
            full = [symbols.get(n, n) if isinstance(n, str) else n for n in d.shape]
            if full and full[0] is None:
                full[0] = 1
            missing = [(i, n) for i, n in enumerate(full) if not isinstance(n, int)]
            for i, n in missing:
                open_axes.append(f"axis {i} of {d.name!r}" + (f" ({n!r})" if n else ""))
            if missing:
                text = "x".join(str(n) if isinstance(n, int) else (n or "?").upper() for n in full)
                examples.append(f"--input-shape {d.name}:{text}")
            closed[d.name] = tuple(n for n in full if isinstance(n, int))
        element_count(closed.get(d.name, ()), f"input {d.name!r}")
    if open_axes:
        raise ShapeError(
            f"the model leaves extents open: {', '.join(open_axes)}",
            hint=f"give them, as in {' '.join(examples)} with numbers",
        )
    return closed


def _frozen(d: Declared, value: object) -> Array:
    """Return a frozen input's elements in its dtype and shape.

    Raises:
        UsageError: A value that the dtype or the shape cannot hold.
    """
    raw = in_bytes(np.asarray(value))
    if raw.dtype.kind not in "biuf":
        raise UsageError(f"the value to freeze input {d.name!r} to is not a number or array")
    data = raw.astype(d.dtype.numpy)
    fits = np.array_equal(data, raw) and outside(data, d.dtype) is None
    if d.dtype.is_integer and not fits:
        raise UsageError(f"input {d.name!r} is {d.dtype.value}; {value!r} does not fit")
    if d.shape is None or data.ndim == len(d.shape):
        return data
    fixed = tuple(n for n in d.shape if isinstance(n, int))
    if data.size == 1:
        # A scalar fills the declared shape; open extents count as 1.
        return np.full([n if isinstance(n, int) else 1 for n in d.shape], data.reshape(-1)[0])
    if len(fixed) == len(d.shape) and int(np.prod(fixed)) == data.size:
        return data.reshape(fixed)
    raise UsageError(
        f"input {d.name!r} is declared {_text(d.shape)}; a value of shape {list(data.shape)}"
        " cannot be frozen into it"
    )


def mark_batch(
    graph: Graph, inputs: Sequence[Declared], outputs: Mapping[str, tuple[Extent, ...] | None]
) -> None:
    """Note which inputs and outputs count samples along axis 0.

    Where the model names the batch (a symbolic first extent) the name decides; otherwise all
    inputs and outputs must agree on the first extent.
    """
    declared = {d.name: d for d in inputs}
    symbolic = []
    for v in graph.inputs:
        shape = declared[v.name].shape
        if v.type.rank and (shape is None or not isinstance(shape[0], int)):
            symbolic.append(v)
    if symbolic:
        extents = {v.shape[0] for v in symbolic}
        for v in symbolic:
            v.batch_axis = 0
        for name, v in graph.outputs:
            shape = outputs[name]
            open_first = shape is None or (len(shape) > 0 and not isinstance(shape[0], int))
            if open_first and v.type.rank and v.shape[0] in extents:
                v.batch_axis = 0
        return
    values = [*graph.inputs, *graph.output_values]
    if not graph.inputs or any(v.type.rank < 2 for v in graph.inputs):
        return
    if len({v.shape[0] if v.type.rank else -1 for v in values}) == 1:
        for v in values:
            v.batch_axis = 0
