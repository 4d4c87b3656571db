# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Write transposed convolutions as ordinary ones whose results are interleaved.

    conv_transpose(x[N, C, H, W], w[C, M, K, K]) of stride s
        ->  depth_to_space(conv(x, v[s * s * M, C, T, T]), s), cropped

Along one axis, result o adds up x[i] * w[k] over i * s + k * d = o + p. With o + c = q * s + r for
a phase r < s, the taps k of that phase read x[q - t] at whole distances t: a convolution with
T = max(t) - min(t) + 1 taps whose channels are the phases. The crop c is chosen such that T is
least. Nothing is added but products with zero, and every other rewrite, quantization and kernel
for convolutions then serves transposed ones.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from qcompiler.interpreter import known
from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import expanded
from qcompiler.passes.conv_to_matmul import scales_behind
from qcompiler.passes.rewrite import producer_of, supersede
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import Array, PerAxis, PerGroup, QuantParams, Shape


@dataclass(frozen=True)
class ConvTransposeToConv(Pass):
    """Rewrite conv_transpose as conv, interleaving and crop."""

    name: ClassVar[str] = "conv_transpose_to_conv"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was rewritten."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "conv_transpose":
                changed |= _rewrite(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


@dataclass(frozen=True)
class _Axis:
    """One axis of the convolution.

    Attributes:
        stride: Number of phases s.
        taps: Taps T of the convolution.
        places: Per tap k of the transposed one: (phase r, tap of the convolution).
        pads: Padding before and after.
        extent: Extent of the convolution's result.
        crop: Leading elements of the interleaved result to drop.
        out: Extent of the result.
    """

    stride: int
    taps: int
    places: tuple[tuple[int, int], ...]
    pads: tuple[int, int]
    extent: int
    crop: int
    out: int


def _axis(
    size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], extra: int
) -> _Axis | None:
    """Return the form with the fewest taps, then the least crop; None where there is no result."""
    out = (size - 1) * stride + (kernel - 1) * dilation + 1 + extra - sum(pads)
    if size == 1 and dilation == 1 and extra == 0:
        stride = kernel  # every tap is a phase of its own
    begin, best = pads[0], None
    for crop in range(stride):
        reach = [k * dilation + crop - begin for k in range(kernel)]
        phases = [n % stride for n in reach]
        distances = [n // stride for n in reach]
        least, most = min(distances), max(distances)
        extent = (crop + out - 1) // stride + 1
        after = extent - size - least
        if most < 0 or after < 0:
            continue
        places = tuple((r, most - t) for r, t in zip(phases, distances, strict=True))
        found = _Axis(stride, most - least + 1, places, (most, after), extent, crop, out)
        if best is None or found.taps < best.taps:
            best = found
    if best is None and any(pads) and out > 0:  # pads that would crop x crop the result
        whole = _axis(size, kernel, stride, dilation, (0, 0), extra)
        return None if whole is None else replace(whole, crop=whole.crop + begin, out=out)
    return best


def _rewrite(graph: Graph, node: Node) -> bool:
    if known(node.input(1)) is None:
        scales_behind(graph, node)
    x, w = node.input(0), node.input(1)
    rank, group = x.type.rank - 2, int(node.attr("group"))
    pads = node.attr("pads")
    axes = [
        _axis(
            x.shape[2 + i],
            w.shape[2 + i],
            node.attr("strides")[i],
            node.attr("dilations")[i],
            (pads[i], pads[rank + i]),
            node.attr("output_padding")[i],
        )
        for i in range(rank)
    ]
    chosen = [a for a in axes if a is not None]
    if len(chosen) != rank or 0 in x.shape:
        return False
    # With groups, the phases of one channel must be neighbours: they share its group.
    phase_major = group == 1
    if known(w) is None:
        weight: Value | None = _computed(graph, node, w, chosen, group, phase_major)
    else:
        weight = _weight(graph, w, chosen, group, phase_major)
    bias = node.optional(2)
    if weight is None:
        return False
    phases = int(np.prod([a.stride for a in chosen]))
    repeated = None if bias is None else _bias(graph, bias, phases, phase_major)
    conv = graph.add(
        "conv",
        [x, weight, repeated],
        {
            "strides": (1,) * rank,
            "pads": tuple(p for side in (0, 1) for p in (a.pads[side] for a in chosen)),
            "dilations": (1,) * rank,
            "group": group,
        },
        name=f"{node.name}/phases",
        names=[f"{node.output.name}/phases"],
        sources=node.sources,
    )
    y = _interleave(graph, node, conv.output, chosen, phase_major)
    crops = [
        (2 + i, a.crop, a.crop + a.out)
        for i, a in enumerate(chosen)
        if a.extent * a.stride != a.out
    ]
    if crops:
        on, starts, ends = (tuple(c[i] for c in crops) for i in range(3))
        attrs = {"axes": on, "starts": starts, "ends": ends, "steps": (1,) * len(on)}
        y = graph.add("slice", [y], attrs, name=f"{node.name}/crop", sources=node.sources).output
    if bias is not None and repeated is None:  # computed at run time
        y = _added(graph, node, y, bias)
    last = y.producer or conv
    name, own = node.name, last.name
    supersede(graph, node, last, node)
    if last is not conv:
        last.name, conv.name = own, name  # plans know the product by its name
    return True


def _interleave(graph: Graph, node: Node, y: Value, axes: list[_Axis], phase_major: bool) -> Value:
    """Return [N, s * s * M, Q...] as [N, M, Q * s...]."""
    strides = [a.stride for a in axes]
    phases, rank = int(np.prod(strides)), len(axes)
    if phases == 1:
        return y
    channels = y.shape[1] // phases
    out = (y.shape[0], channels, *(a.extent * a.stride for a in axes))
    name = f"{node.name}/interleave"

    def add(op: str, value: Value, **attrs: Any) -> Value:
        return graph.add(op, [value], attrs, name=name, sources=node.sources).output

    if rank == 2 and strides[0] == strides[1]:
        mode = "DCR" if phase_major else "CRD"
        return add("depth_to_space", y, blocksize=strides[0], mode=mode)
    if rank == 2 and strides[0] == 1 and phase_major:
        # Channels last, the phases of a pixel are already where they belong.
        last = add("transpose", y, perm=(0, 2, 3, 1))
        return add(
            "transpose",
            add("reshape", last, shape=(out[0], *out[2:], channels)),
            perm=(0, 3, 1, 2),
        )
    split = (*strides, channels) if phase_major else (channels, *strides)
    first, at = (1, 1 + rank) if phase_major else (2, 1)
    order = [0, at]
    for i in range(rank):
        order += [2 + rank + i, first + i]
    apart = add("reshape", y, shape=(y.shape[0], *split, *y.shape[2:]))
    return add("reshape", add("transpose", apart, perm=tuple(order)), shape=out)


def _computed(
    graph: Graph, node: Node, w: Value, axes: list[_Axis], group: int, phase_major: bool
) -> Value:
    """Return computed weights w[C, M / g, K...] as v[phases * M, C / g, T...], by moving them."""
    phases, taps = ([getattr(a, k) for a in axes] for k in ("stride", "taps"))
    kernel = w.shape[2:]
    count = math.prod(kernel)
    places = np.full((*phases, *taps), count, np.int32)  # behind the last tap there is a zero
    for flat, index in enumerate(itertools.product(*(range(k) for k in kernel))):
        at = [a.places[k] for a, k in zip(axes, index, strict=True)]
        places[tuple([r for r, _ in at] + [t for _, t in at])] = flat
    places = places.reshape(math.prod(phases), -1)

    def add(op: str, *values: Value, **attrs: Any) -> Value:
        name = f"{node.name}/weights"
        return graph.add(op, values, attrs, name=name, sources=node.sources).output

    each = w.shape[0] // group, w.shape[1]
    y = add("reshape", w, shape=(group, *each, count))
    if (places == count).any():
        y = add("pad", y, pads=(0,) * 7 + (1,))
    y = add("gather", y, graph.constant(places, f"{node.name}_places"), axis=3)
    y = add("transpose", y, perm=(0, 3, 2, 1, 4) if phase_major else (0, 2, 3, 1, 4))
    return add("reshape", y, shape=(w.shape[1] * group * places.shape[0], each[0], *taps))


# ------------------------------------------------------------------------------- constants


def _constant(value: Value) -> tuple[Array, QuantParams | None, Node | None] | None:
    """Return the elements of a constant, also of one behind a dequantize."""
    if value.is_constant and value.qparams is None:
        return value.array(), None, None
    node = producer_of(value, "dequantize")
    stored = node.input(0) if node is not None else None
    if stored is None or not stored.is_constant or stored.qparams is None:
        return None
    return stored.array(), stored.qparams, node


def _weight(
    graph: Graph, w: Value, axes: list[_Axis], group: int, phase_major: bool
) -> Value | None:
    """Return w[C, M / g, K...] as v[phases * M, C / g, T...], or None if it is not constant."""
    found = _constant(w)
    if found is None:
        return None
    data, q, node = found

    def placed(data: Array, rest: Array) -> Array:
        """Lay elements out as the convolution's, with `rest` where it has no weight.

        `rest` has one element per group and column, [g, M / g].
        """
        each = data.shape[1]
        strides, taps = [a.stride for a in axes], [a.taps for a in axes]
        rank = len(axes)
        by_group = data.reshape(group, -1, each, *data.shape[2:])
        new = np.empty((group, each, *strides, data.shape[0] // group, *taps), data.dtype)
        new[...] = rest.reshape(group, each, *(1,) * (2 * rank + 1))
        for index in itertools.product(*(range(k) for k in data.shape[2:])):
            places = [a.places[k] for a, k in zip(axes, index, strict=True)]
            to: tuple[Any, ...] = (
                slice(None),
                slice(None),
                *(r for r, _ in places),
                slice(None),
                *(t for _, t in places),
            )
            at: tuple[Any, ...] = (slice(None), slice(None), slice(None), *index)
            new[to] = by_group[at].swapaxes(1, 2)
        if phase_major:  # one group: [1, M, s..., C, T...] -> [s..., M, C, T...]
            new = np.moveaxis(new[0], 0, rank)
        phases = int(np.prod(strides))
        return np.ascontiguousarray(new.reshape(phases * group * each, -1, *taps))

    columns = (group, data.shape[1])
    if q is None or node is None:
        return graph.constant(placed(data, np.zeros(columns)), w.name, dtype=w.dtype)
    scales = _blocks(q, data.shape, group)
    if scales is None:
        return None
    scale, zero, size = scales
    # Where there is no weight the code is a zero point: that of the first block of its column.
    rest = zero.reshape(group, -1, *zero.shape[1:])[:, 0].reshape(*columns, -1)[..., 0]
    if size:
        # A place without a weight has its column's first scale: nothing is multiplied by it.
        first = scale.reshape(group, -1, *scale.shape[1:])[:, 0].reshape(*columns, -1)[..., 0]
        # One zero point serves a block, so blocks of places without a weight have `rest` too.
        grid = QuantParams(
            placed(scale, first), placed(zero, rest), q.storage, q.qmin, q.qmax, PerGroup(1, size)
        )
    elif q.is_per_tensor:
        grid = q
    else:
        phases = int(np.prod([a.stride for a in axes]))
        each = [_repeat(a.reshape(-1), phases, phase_major) for a in (scale, zero)]
        grid = QuantParams(each[0], each[1], q.storage, q.qmin, q.qmax, PerAxis(0))
    stored = graph.constant(placed(data, rest), node.input(0).name, grid)
    return graph.add("dequantize", [stored], name=node.name, sources=node.sources).output


def _blocks(q: QuantParams, shape: Shape, group: int) -> tuple[Array, Array, int] | None:
    """Return scales and zero points in the layout of w[C, M / g, K...], and the size of blocks.

    One row per group and no window where there is one per column: the size is 0 then. None where
    they vary along what is summed otherwise than in blocks of channels.
    """
    scale, zero = (np.broadcast_to(a, shape) for a in expanded(q, shape))
    each = shape[0] // group
    if q.is_per_tensor or (_same_in_groups(scale, group) and _same_in_groups(zero, group)):
        every = (slice(None, None, each), slice(None), *(slice(0, 1),) * (len(shape) - 2))
        return scale[every], zero[every], 0
    by = q.granularity
    if not isinstance(by, PerGroup) or by.axis != 0:
        return None
    size = by.group_size if group == 1 else math.gcd(each, by.group_size)
    at = np.concatenate([np.arange(g * each, (g + 1) * each, size) for g in range(group)])
    return scale[at], zero[at], size


def _same_in_groups(a: Array, group: int) -> bool:
    """Whether numbers of weights w[C, M / g, K...] are the same for all that is summed."""
    apart = a.reshape(group, -1, *a.shape[1:])
    one = slice(0, 1)
    at: tuple[Any, ...] = (slice(None), one, slice(None), *(one,) * (a.ndim - 2))
    first = apart[at]
    return bool((apart == first).all())


def _added(graph: Graph, node: Node, y: Value, bias: Value) -> Value:
    """Return [N, M, ...] plus a bias that is computed."""
    shape = (bias.type.size, *(1,) * (y.type.rank - 2))
    name = f"{node.name}/bias"
    wide = graph.add("reshape", [bias], {"shape": shape}, name=name, sources=node.sources)
    return graph.add("add", [y, wide.output], name=name, sources=node.sources).output


def _bias(graph: Graph, bias: Value, phases: int, phase_major: bool) -> Value | None:
    found = _constant(bias)
    if found is None:
        return None
    return _like(graph, bias, _repeat(found[0], phases, phase_major), found, phases, phase_major)


def _repeat(vector: Array, phases: int, phase_major: bool) -> Array:
    return np.tile(vector, phases) if phase_major else np.repeat(vector, phases)


def _like(
    graph: Graph,
    value: Value,
    data: Array,
    found: tuple[Array, QuantParams | None, Node | None],
    phases: int,
    phase_major: bool,
) -> Value:
    """Hold new elements the way the value's own are held; scales follow the channels."""
    _, q, node = found
    if q is None or node is None:
        return graph.constant(data, value.name, dtype=value.dtype)
    if not q.is_per_tensor:
        scale, zero = (_repeat(v.reshape(-1), phases, phase_major) for v in (q.scale, q.zero_point))
        q = QuantParams(scale, zero, q.storage, q.qmin, q.qmax, PerAxis(0))
    stored = graph.constant(data, node.input(0).name, q)
    return graph.add("dequantize", [stored], name=node.name, sources=node.sources).output
