# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Pack a layer's constants in the order in which its kernel reads them.  NumPy only.

Layouts (T column tiles, Q K-groups, V vectors, L lanes, G the dot instruction's group):

* float32: `[T, Q, V, L]`, and float16 the same, as bits, divided by powers of two (see `halves`);
* one 8-bit dot kind: int8 `[T, Q, V, L, G]`;
* smlal: int8 `[T, Q, 2, V, L, 2]`: the first two, then the last two members of each group, and
  exact too where products are made from s8 by s8;
* exact: int16 `[T, Q, 2, V, L, 2]`, pairs for `vpmaddwd`: first the even, then the odd members of
  each group, because the kernel splits a group of activation bytes into even and odd bytes; or,
  for `wide` activations, the first two members, then the last two;
* mixed: each tile has its own order of K-groups, in sections by the depth of the int16 sums (see
  `depth`); all but the exact section as int8 `[groups, V, L, G]`, that one as int16
  `[groups, 2, V, L, 2]`; `offsets` int32 `[T, Q]` of the activations in that order; `spans` int32
  `[T, sections + 2]` (blocks of each section, index of the tile's first K-group in the int8 and
  in the int16 weights);
  where activations are split (see `near_plan`), `places` int32 `[T, Q]` of the K-groups in that
  order, `compress` (`near_plan.compress_table`) and, by blocks, `rows` int8 `[K]`;
* winograd: int16 `[blocks, positions, C / 2, V, L, 2]`, or int8 where the kernel transforms them
  (see `winograd_plan.Transformed`), and the bias times the power of two by which the kernel shifts
  the sums right;
* weights that all fit 4 bits, for one dot kind: bytes `[T, Q, V * L * G / 2]` (see `unpack`); the
  same of codes that factors for groups along K make int8 weights, with those factors, less 1, as
  nibbles `factors` `[T, Q / group, V * L / 2]`;
* weights in groups along K: `group_start` int32 and `group_scale` float32 `[T, Q / group, V * L]`
  (the zero point's share and the multiplier of each run of K-groups), and `group_zero` int8 where
  weights have zero points; `bias` is then float32;
* float32 products with weights in half precision: their bits, uint16 `[T, Q, V, L]`; in groups:
  int8 `[T, Q, V * L]`, or nibbles `[T, Q, V * L / 2]`, with `scales` float32 and, unless all are 0,
  `zeros` int8, both `[T, Q / group, V * L]`.

After the weights come `bias` `[T * V * L]` (with the zero point's correction), `multiplier` of the
same shape, and eight `scalars` (see `SCALARS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import Isa
from qcompiler.targets.kernels.amx_plan import tile_nibbles, tiles_constants
from qcompiler.targets.kernels.depth import EXACT, group_time
from qcompiler.targets.kernels.factored import (
    factored_tiles,
    in_nibbles,
    pack_factored,
)
from qcompiler.targets.kernels.halves import column_powers, needs_halves
from qcompiler.targets.kernels.near_plan import (
    Sides,
    Split,
    Stored,
    compress_table,
    largest_rows,
    may_split,
)
from qcompiler.targets.kernels.params import plain_weights
from qcompiler.targets.kernels.plan import (
    Dot,
    Geometry,
    Storage,
    TilePlan,
    column_index,
    geometry_of,
    tile_plan,
)
from qcompiler.targets.kernels.weight_forms import (
    FloatWeights,
    GroupedWeights,
    Weights,
    fits_int4,
    float_weights,
    laid_out,
    packed_groups,
)
from qcompiler.targets.kernels.weight_order import is_wide, k_offsets, pack_weights
from qcompiler.targets.kernels.winograd_float_plan import (
    float_winograd_plan,
    is_float_winograd,
    takes_float_winograd,
    transform_float_weights,
)
from qcompiler.targets.kernels.winograd_plan import (
    NV,
    Transformed,
    applies,
    patches_by_time,
    proved,
    transform_weights,
)
from qcompiler.targets.kernels.workload import (
    PATCHES,
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    MatmulWorkload,
    Patch,
)

__all__ = ["SCALARS", "Facts", "Packed", "operand_shift", "pack_conv", "pack_matmul"]

Array = npt.NDArray[Any]

SCALARS = (
    "fill",
    "zero_point",
    "low",
    "high",
    "residual_multiplier",
    "residual_zero_point",
    "base",
    "size",
)
"""Meaning of the scalars, float32: the stored value of a padded activation; the output's zero
point; the clamp of the requantized value before the zero point is added (or of a float32 output);
the residual's multiplier and zero point; first and size of the window of near activations."""

_SMALL = 0.95
"""Factor on the time of a kernel whose weights are 4 bits wide: Winograd holds 8 to 64 bits for
each, and is not worth that for a few percent."""

LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}


@dataclass(frozen=True, slots=True)
class Facts:
    """What packing proved about a layer and its kernel relies on."""

    dot: Dot
    saturating: bool
    """The output uses its dtype's full range and no sum can leave int32 after scaling: the
    narrowing instructions may do the clamp."""
    zero_point: bool
    """Whether the output's zero point must be added."""
    clip: bool
    """Whether a float32 output is clipped."""
    row_terms: bool = False
    """Whether an activation B's zero point calls for row sums of A."""
    residual_zero_point: bool = True
    """Whether the residual's zero point must be subtracted."""
    depths: tuple[int, ...] = (1,)
    """Dot "maddubs": the one depth to which int16 sums are proved; "mixed": those of the sections,
    from the deepest to `depth.EXACT`."""
    storage: Storage = "plain"
    """How the weights lie in memory."""
    group: int = 0
    """K-groups that share a scale, for weights in groups."""
    factor: int = 0
    """K-groups whose codes share a factor, for weights that are codes times factors."""
    patch: Patch = (1, 1)
    """Dot "winograd": the outputs that are computed together."""
    wide: bool = False
    """Whether K-groups multiplied by int16 pairs read activations that were widened beforehand."""
    far: Sides = "none"
    """How activations are split (see `near_plan`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """The packed constants of one layer."""

    arrays: tuple[Array, ...]
    """In the order of the kernel's arguments."""
    names: tuple[str, ...]
    facts: Facts

    @property
    def shapes(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """(name, shape, dtype) of each array: all that the kernel needs to know of them."""
        return tuple(
            (name, array.shape, array.dtype.name)
            for name, array in zip(self.names, self.arrays, strict=True)
        )


def pack_conv(
    workload: ConvWorkload, isa: Isa, params: GemmParams, weight: Weights, values: GemmValues
) -> Packed:
    """Pack a convolution's constants.

    Args:
        workload: Shapes and dtypes.
        isa: The instruction set's row.
        params: The tiling the kernel will be built with.
        weight: `[CO, C / groups, KH, KW]` (OIHW), int8 with zero point 0, or float32; for float32
            activations also float16 or `GroupedWeights` along C; float16 for float16 activations.
        values: The layer's other numbers.

    Raises:
        CodegenError: an array has another shape or dtype than the workload says.
    """
    if weight.shape != workload.weight_shape:
        raise CodegenError(
            f"convolution weights have shape {weight.shape}, the workload says "
            f"{workload.weight_shape}"
        )
    geometry = geometry_of(workload, isa)
    plain = isinstance(weight, np.ndarray) and weight.dtype == np.float32
    params = plain_weights(workload, isa, params, plain)
    runs = (geometry.groups, geometry.n, geometry.k_rows * geometry.k_cols, geometry.run)

    def layout(w: Array) -> Array:
        return np.asarray(w.transpose(0, 2, 3, 1).reshape(runs))

    ohwi = laid_out(weight, layout)
    if workload.epilogue.group:
        return _pack(geometry, workload.epilogue, isa, params, ohwi, _grouped(values, layout))
    if workload.a_dtype == "float32" and is_float_winograd(params):
        return _pack_float_winograd(workload, isa, params, weight, values)
    asked = PATCHES.get(params.algorithm)
    if asked is not None:
        if isinstance(weight, GroupedWeights) or not applies(workload, isa):
            raise CodegenError(f"no Winograd kernel for {workload} on {isa.name}")
        transformed = _transformed(workload, isa, weight, values, (asked, (2, 2)))
        if transformed is None:  # sums of any size: the direct kernel has no bound
            return _pack(geometry, workload.epilogue, isa, params, ohwi, values)
    else:
        packed = _pack(geometry, workload.epilogue, isa, params, ohwi, values)
        if params.algorithm != "auto" or isinstance(weight, GroupedWeights):
            return packed
        small = _SMALL if packed.facts.storage == "int4" else 1.0
        faster = patches_by_time(workload, isa, small * _time(packed, geometry.k_groups))
        transformed = _transformed(workload, isa, weight, values, faster)
        if transformed is None:
            return packed
    natural = replace(params, lanes=isa.lanes(), nv=NV)
    return _pack(geometry, workload.epilogue, isa, natural, ohwi, values, transformed)


def _pack_float_winograd(
    workload: ConvWorkload, isa: Isa, params: GemmParams, weight: Any, values: GemmValues
) -> Packed:
    """The constants of a float32 kernel with transformed weights."""
    if not takes_float_winograd(workload, isa):
        raise CodegenError(f"no Winograd kernel for {workload} on {isa.name}")
    geometry = geometry_of(workload, isa)
    columns = column_index(geometry.n, params.lanes, params.nv)
    plan = float_winograd_plan(workload, params)
    transformed = transform_float_weights(weight, plan, columns)
    packed = _float_constants(geometry, None, columns, values)
    keep = [(n, a) for n, a in zip(packed.names, packed.arrays, strict=True) if n != "offsets"]
    names, arrays = zip(*keep, strict=True)
    return Packed((transformed, *arrays), ("weight", *names), packed.facts)


def _transformed(
    workload: ConvWorkload, isa: Isa, weight: Array, values: GemmValues, patches: Sequence[Patch]
) -> Transformed | None:
    """The weights for the first of some Winograd patches with which a layer's sums are exact."""
    if not patches or weight.dtype.name != "int8":
        return None
    qmin, qmax = LIMITS[workload.a_dtype]
    low = (qmin if values.a_qmin is None else values.a_qmin) - values.a_zero_point
    high = (qmax if values.a_qmax is None else values.a_qmax) - values.a_zero_point
    bias = _bias(values, workload.co)
    a_range = min(low, 0), max(high, 0)
    exact = (patch for patch in patches if proved(weight, bias, a_range, patch))
    patch = next(exact, None)
    return None if patch is None else transform_weights(workload, isa, weight, patch)


def _time(packed: Packed, k_groups: int) -> float:
    """Estimated time of a K-group, relative to one that is multiplied by `vpmaddubsw` alone."""
    facts = packed.facts
    if facts.dot != "mixed":
        return group_time(EXACT if facts.dot == "exact" else facts.depths[0], k_groups)
    spans = packed.arrays[packed.names.index("spans")]
    counts = spans[:, : len(facts.depths)].sum(0) * np.maximum(facts.depths, 1)
    times = [group_time(depth) for depth in facts.depths]
    return float((counts * times).sum() / counts.sum())


def pack_matmul(
    workload: MatmulWorkload, isa: Isa, params: GemmParams, b: Weights | None, values: GemmValues
) -> Packed:
    """Pack the constants of a matrix product.

    Args:
        workload: Shapes and dtypes.
        isa: The instruction set's row.
        params: The tiling the kernel will be built with.
        b: The constant B of shape `b_shape` (as `pack_conv` takes weights), or None where B is an
            activation.
        values: The product's other numbers.

    Raises:
        CodegenError: `b` has another shape or dtype than the workload says.
    """
    if b is None and not workload.b_constant:
        return _pack_activations(workload, isa, params, values)
    if b is None or b.shape != workload.b_shape or not workload.b_constant:
        given = "no constant B" if b is None else f"a constant B of shape {b.shape}"
        raise CodegenError(f"matmul: {given} does not fit {workload}")
    geometry = geometry_of(workload, isa)
    turned = workload.transpose_b

    def layout(w: Array) -> Array:
        return np.asarray((w if turned else w.T)[None, :, None, :])

    values = _grouped(values, layout)
    return _pack(geometry, workload.epilogue, isa, params, laid_out(b, layout), values)


def _grouped(values: GemmValues, layout: Callable[[Array], Array]) -> GemmValues:
    """The values with the multipliers of groups laid out like the weights."""
    if values.group_multiplier is None:
        return values
    zero = None if values.group_zero is None else layout(values.group_zero)
    return replace(values, group_multiplier=layout(values.group_multiplier), group_zero=zero)


def _pack(
    geometry: Geometry,
    epilogue: Epilogue,
    isa: Isa,
    params: GemmParams,
    weight: Weights,
    values: GemmValues,
    transformed: Transformed | None = None,
) -> Packed:
    """Pack weights `[groups, n, runs, run]` and the values; `transformed` weights for Winograd."""
    plan = tile_plan(geometry, params)
    columns = column_index(geometry.n, plan.lanes, plan.nv)
    if geometry.a_dtype == "float16":
        return _half_constants(geometry, isa, plan, weight, columns, values)
    if geometry.a_dtype == "float32":
        parts = float_weights(weight, partial(_tiles, geometry, plan, columns))
        return _float_constants(geometry, parts, columns, values)
    if isinstance(weight, GroupedWeights) or weight.dtype.name != "int8":
        raise CodegenError(f"weights are {weight.dtype.name}, the kernel takes int8")

    shift = operand_shift(geometry.a_dtype, isa.a_dtype)
    qmin, qmax = LIMITS[geometry.a_dtype]
    a_min = (qmin if values.a_qmin is None else values.a_qmin) + shift
    a_max = (qmax if values.a_qmax is None else values.a_qmax) + shift
    a_zero_point = values.a_zero_point + shift
    # Padding is stored as the zero point, so it takes part in the largest stored value.
    largest = max(a_max, -a_min, abs(a_zero_point))

    count = geometry.groups * geometry.n
    flat = weight.reshape(count, -1).astype(np.int64)
    bias = _bias(values, count)
    multiplier = _multiplier(values, count)
    spread = max(abs(a_max - a_zero_point), abs(a_min - a_zero_point))
    reach = np.abs(flat).sum(1) * spread + np.abs(bias)
    arrays: dict[str, Array] = {}
    dot: Dot = "winograd"
    depths: tuple[int, ...] = (1,)
    storage: Storage = "plain"
    split: Split | None = None
    factor = 0
    if transformed is not None:
        arrays["weight"] = transformed.weight
    elif params.algorithm == "tiles":
        dot = "tiles"
        arrays |= tiles_constants(geometry, params, weight.reshape(count, -1), columns)
        if fits_int4(weight):
            storage = "int4"
            arrays["weight"] = tile_nibbles(arrays["weight"])
        elif in_tiles := factored_tiles(geometry, params, weight, columns):
            storage, factor = "int4", in_tiles[1]
            arrays |= in_tiles[0]
    else:
        cut = partial(_tiles, geometry, plan, columns)
        tiles, splits = cut(weight), None
        if not epilogue.group and may_split(isa, geometry, weight, largest):
            splits = largest_rows(weight), params.mt
        stored = Stored(a_zero_point, largest, values.a_spread)
        codes = None
        if not epilogue.group and not fits_int4(weight):
            codes = pack_factored(geometry, isa, weight, cut, stored, arrays)
        if codes is not None:
            (dot, depths, factor), storage = codes, "int4"
        else:
            dot, depths, split = pack_weights(
                geometry, isa, tiles, stored, arrays, splits, in_order=epilogue.group > 0
            )
            if dot != "mixed" and fits_int4(weight):
                storage = "int4"
                arrays["weight"] = in_nibbles(isa, tiles, arrays["weight"], dot)
    group = 0
    if epilogue.group:
        if values.group_multiplier is None or epilogue.group % isa.k_group:
            raise CodegenError(
                f"weights in groups of {epilogue.group} need a multiplier for each group, "
                f"and groups of a multiple of {isa.k_group}"
            )
        group = epilogue.group // isa.k_group
        scales = cut(values.group_multiplier)
        zeros = None
        if values.group_zero is not None and values.group_zero.any():
            zeros = cut(values.group_zero)
        arrays |= packed_groups(tiles, scales, zeros, group, (a_zero_point, values.a_zero_point))
    if split is not None:
        arrays["compress"] = compress_table()
        if split.sides == "blocks":
            arrays["rows"] = largest_rows(weight)
    if dot not in ("mixed", "winograd", "tiles") and geometry.k_rows * geometry.k_cols > 1:
        arrays["offsets"] = k_offsets(geometry).astype(np.int32)
    if group:
        addend = np.zeros(count, np.float32) if values.addend is None else values.addend
        arrays["bias"] = _per_column(addend, geometry, columns)
    else:
        base = 0 if split is None else split.base
        corrected = bias - (a_zero_point - base) * flat.sum(1)
        corrected = corrected.astype(np.uint64).astype(np.uint32)
        if transformed is not None:
            corrected = corrected << np.uint32(transformed.shift)
        arrays["bias"] = _per_column(corrected.view(np.int32), geometry, columns)
    scalars, saturating = _requantization(epilogue, values, reach, multiplier)
    scalars[0] = a_zero_point
    if split is not None:
        scalars[6:8] = split.base, split.size
    clip = _clip(values, scalars) if epilogue.row_scale is not None else False
    if group:
        saturating = False  # the sums are not bounded here
    elif values.addend is not None:
        arrays["addend"] = _per_column(values.addend, geometry, columns)
    if epilogue.out_dtype != "int32" and not group:
        arrays["multiplier"] = _per_column(multiplier, geometry, columns)
    arrays["scalars"] = scalars
    facts = Facts(
        dot,
        saturating,
        values.zero_point != 0,
        clip=clip,
        residual_zero_point=values.residual_zero_point != 0,
        depths=depths,
        storage=storage,
        group=group,
        factor=factor,
        patch=(1, 1) if transformed is None else transformed.patch,
        wide=isa.dot == "maddubs"
        and not group
        and _uses_pairs(dot, depths)
        and is_wide(plan.tiles),
        far="none" if split is None else split.sides,
    )
    return Packed(tuple(arrays.values()), tuple(arrays), facts)


def _uses_pairs(dot: Dot, depths: tuple[int, ...]) -> bool:
    """Whether some K-groups are multiplied by int16 pairs."""
    return dot == "exact" or (dot == "mixed" and EXACT in depths)


def operand_shift(stored: str, multiplied: str) -> int:
    """What a kernel adds to 8-bit values stored in one signedness to multiply them in another."""
    if stored == multiplied:
        return 0
    return 128 if multiplied == "uint8" else -128


def _clip(values: GemmValues, scalars: Array) -> bool:
    """Enter the clip of a float32 output into the scalars; whether there is one."""
    scalars[2] = -np.inf if values.act_min is None else values.act_min
    scalars[3] = np.inf if values.act_max is None else values.act_max
    return values.act_min is not None or values.act_max is not None


def _multiplier(values: GemmValues, count: int) -> npt.NDArray[np.float32]:
    """The multiplier of each of `count` columns."""
    given = 1.0 if values.multiplier is None else values.multiplier
    return np.broadcast_to(np.asarray(given, np.float32), (count,))


def _requantization(
    epilogue: Epilogue, values: GemmValues, reach: Array, multiplier: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], bool]:
    """The scalars of the epilogue, and whether the narrowing stores may do the clamp.

    `reach` bounds the magnitude of each column's sums.
    """
    scalars = np.zeros(8, np.float32)
    if epilogue.out_dtype not in LIMITS:
        return scalars, False
    low, high = LIMITS[epilogue.out_dtype]
    qmin = low if values.qmin is None else values.qmin
    qmax = high if values.qmax is None else values.qmax
    scaled = float((reach * np.abs(multiplier).astype(np.float64)).max())
    if epilogue.residual_dtype is not None:
        scaled += 2.0**17 * abs(float(values.residual_multiplier))
    fits = bool(reach.max() < 2**31) and scaled < 2.0**30
    scalars[1:4] = values.zero_point, qmin - values.zero_point, qmax - values.zero_point
    scalars[4:6] = values.residual_multiplier, values.residual_zero_point
    return scalars, fits and (qmin, qmax) == (low, high)


def _pack_activations(
    workload: MatmulWorkload, isa: Isa, params: GemmParams, values: GemmValues
) -> Packed:
    """Constants of a product of two activations: no weights, but zero points."""
    geometry = geometry_of(workload, isa)
    columns = column_index(geometry.n, params.lanes, params.nv)
    if workload.a_dtype == "float32":
        return _float_constants(geometry, None, columns, values)
    a_zero_point = values.a_zero_point + operand_shift(workload.a_dtype, isa.a_dtype)
    b_zero_point = values.b_zero_point - (128 if workload.b_dtype == "uint8" else 0)
    bias = _bias(values, geometry.n)
    multiplier = _multiplier(values, geometry.n)
    reach = np.abs(bias) + 255 * 255 * workload.k
    scalars, saturating = _requantization(workload.epilogue, values, reach, multiplier)
    product = workload.k * a_zero_point * b_zero_point
    points = np.asarray([a_zero_point, b_zero_point, product, 0], np.int64)
    arrays = {"bias": _per_column(bias.astype(np.int32), geometry, columns)}
    if workload.epilogue.out_dtype != "int32":
        arrays["multiplier"] = _per_column(multiplier, geometry, columns)
    arrays["scalars"] = scalars
    arrays["zero_points"] = points.astype(np.uint64).astype(np.uint32).view(np.int32)
    dot: Dot = "exact"
    if isa.adds_to_int32:
        dot = "vpdpbusd" if isa.dot == "vpdpbusd" else "sdot"
    facts = Facts(dot, saturating, values.zero_point != 0, False, b_zero_point != 0)
    return Packed(tuple(arrays.values()), tuple(arrays), facts)


def _bias(values: GemmValues, count: int) -> npt.NDArray[np.int64]:
    bias = np.zeros(count, np.int64) if values.bias is None else values.bias.astype(np.int64)
    if bias.shape != (count,):
        raise CodegenError(f"bias has shape {bias.shape}, expected ({count},)")
    return bias


def _tiles(geometry: Geometry, plan: TilePlan, columns: Array, weight: Array) -> Array:
    """Weights `[groups, n, runs, run]` as `[T, V, L, Q, G]`."""
    group, run = geometry.k_group, geometry.run
    padded = np.zeros((*weight.shape[:3], geometry.run_groups * group), weight.dtype)
    padded[..., :run] = weight
    rows = padded.reshape(geometry.groups, geometry.n, geometry.k_groups, group)
    tiles: Array = rows[:, columns]  # [groups, group_tiles, V, L, Q, G]
    tiles = np.where((columns >= 0)[None, :, :, :, None, None], tiles, weight.dtype.type(0))
    return tiles.reshape(plan.tiles, plan.nv, plan.lanes, geometry.k_groups, group)


def _per_column(vector: Array, geometry: Geometry, columns: Array) -> Array:
    """A value per output column in the order of the tiles' lanes."""
    picked = vector.reshape(geometry.groups, geometry.n)[:, columns]
    picked = np.where(columns[None] >= 0, picked, vector.dtype.type(0))
    return np.ascontiguousarray(picked.reshape(-1))


def _float_constants(
    geometry: Geometry, weights: FloatWeights | None, columns: Array, values: GemmValues
) -> Packed:
    """Constants of a float32 kernel, without weights for an activation B."""
    count = geometry.groups * geometry.n
    bias = np.zeros(count, np.float32) if values.bias is None else values.bias
    if bias.shape != (count,) or bias.dtype.name != "float32":
        raise CodegenError(f"bias is {bias.dtype}{bias.shape}, expected float32({count},)")
    scalars = np.zeros(8, np.float32)
    clip = _clip(values, scalars)
    arrays: dict[str, Array] = {} if weights is None else dict(weights.arrays)
    arrays |= {
        "bias": _per_column(bias, geometry, columns),
        "scalars": scalars,
    }
    if geometry.k_rows * geometry.k_cols > 1:
        arrays["offsets"] = k_offsets(geometry).astype(np.int32)
    facts = Facts("float", saturating=False, zero_point=False, clip=clip)
    if weights is not None:
        facts = replace(facts, storage=weights.storage, group=weights.group)
    return Packed(tuple(arrays.values()), tuple(arrays), facts)


def _half_constants(
    geometry: Geometry,
    isa: Isa,
    plan: TilePlan,
    weight: Weights,
    columns: Array,
    values: GemmValues,
) -> Packed:
    """Constants of a float16 kernel: weights and bias divided by each column's power of two."""
    needs_halves(isa, "product")
    if isinstance(weight, GroupedWeights) or weight.dtype != np.float16:
        raise CodegenError(f"weights are {weight.dtype.name}, the kernel takes float16")
    powers = column_powers(weight, geometry)
    divisor = powers.reshape(geometry.groups, geometry.n, 1, 1)
    halves = (weight.astype(np.float32) / divisor).astype(np.float16)
    tiles = _tiles(geometry, plan, columns, halves)[..., 0]
    bias = np.zeros(powers.shape, np.float32) if values.bias is None else values.bias
    divided = np.asarray(bias, np.float32) / powers
    packed = _float_constants(geometry, None, columns, replace(values, bias=divided))
    bits = np.ascontiguousarray(tiles.transpose(0, 3, 1, 2)).view(np.uint16)
    return Packed(
        (bits, _per_column(powers, geometry, columns), *packed.arrays),
        ("weight", "multiplier", *packed.names),
        replace(packed.facts, dot="half"),
    )
