# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the CPU lowering table for operators that move elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qcompiler.ir import Node, Value
from qcompiler.ops import _resize
from qcompiler.passes.channels_last import TO_LAST
from qcompiler.targets.cpu_lowering import (
    CpuLowering,
    grid,
    is_float32,
    row,
    steps_before,
    storage,
)
from qcompiler.targets.tvm_lower import KernelCall
from qcompiler.types import WIDENED, DType

# What the copying kernels take.
_MOVABLE = frozenset(
    {DType.UINT8, DType.INT8, DType.INT16, DType.INT32, DType.INT64, DType.FLOAT32, DType.BOOL}
)


def _movable(self: CpuLowering, *values: Value) -> bool:
    able = all(WIDENED.get(v.dtype, v.dtype) in _MOVABLE or self.is_real(v) for v in values)
    return able and all(0 not in v.shape for v in values)


@row("transpose")
def _transpose(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels import layout

    x, perm = node.input(0), tuple(node.attr("perm"))
    if not _movable(self, x):
        return None
    q = x.producer
    alone = len(x.uses) == 1 and not (node.graph is not None and node.graph.is_output(x))
    # What is computed before a quantize is computed with it, not with what moves its codes.
    fits = perm == TO_LAST and q is not None and q.op.name == "quantize" and alone
    if q is not None and fits and not steps_before(q)[1]:
        source, o = q.input(0), x.qparams
        if is_float32(source) and o is not None and x.dtype in (DType.UINT8, DType.INT8):
            n, c, h, w = x.shape
            fused = layout.QuantizeToNhwcWorkload(n, c, h, w, o.s, o.z, storage(x), o.qmin, o.qmax)
            build = layout.quantize_nchw_to_nhwc
            return self.call("quantize", fused, build, (source,), covers=(q,))
    moved = layout.TransposeWorkload(x.shape, perm, storage(x))
    return self.call("transpose", moved, layout.transpose, (x,))


@row("depth_to_space", "space_to_depth")
def _blocks(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels import layout

    x = node.input(0)
    if not _movable(self, x) or x.type.rank != 4:
        return None
    block, order = int(node.attr("blocksize")), str(node.attr("layout"))
    if node.op.name == "depth_to_space":
        mode = str(node.attr("mode"))
        w = layout.depth_to_space(x.shape, block, storage(x), mode=mode, layout=order)
    else:
        w = layout.space_to_depth(x.shape, block, storage(x), layout=order)
    return self.call(node.op.name, w, layout.transpose, (x,))


@row("concat")
def _concat(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import ConcatWorkload, concat

    operands = node.operands
    if not _movable(self, *operands):
        return None
    w = ConcatWorkload(tuple(v.shape for v in operands), node.attr("axis"), storage(node.output))
    return self.call("concat", w, concat, operands)


@row("pad")
def _pad(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import PadWorkload, pad

    x, pads, rank = node.input(0), node.attr("pads"), node.input(0).type.rank
    if not _movable(self, x, node.output) or any(p < 0 for p in pads):
        return None
    if node.attr("mode") != "constant":
        maps = _axis_maps(node, x.shape)
        return None if maps is None else _remap(self, node, maps)
    value = float(node.attr("value"))
    if x.qparams is not None:
        value = float(grid(x).z) if value == 0.0 else math.nan
        if math.isnan(value):
            return None
    w = PadWorkload(x.shape, tuple(pads[:rank]), tuple(pads[rank:]), storage(x), value)
    return self.call("pad", w, pad, (x,))


@row("mask_tail")
def _mask_tail(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.masking import MaskTailWorkload, mask_tail

    x, tail = node.operands
    if not _movable(self, x, node.output):
        return None
    zero = 0.0 if x.qparams is None else float(grid(x).z)
    w = MaskTailWorkload(x.shape, int(node.attr("axis")), storage(x), zero)
    return self.call("mask_tail", w, mask_tail, (x, tail))


def _axis_maps(node: Node, shape: Sequence[int]) -> list[Any] | None:
    """Index maps of a pad that repeats elements (reflect, edge, wrap)."""
    pads, rank = node.attr("pads"), len(shape)
    modes = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    mode = modes.get(str(node.attr("mode")))
    if mode is None:
        return None
    maps: list[Any] = []
    for axis, size in enumerate(shape):
        before, after = pads[axis], pads[rank + axis]
        if not before and not after:
            maps.append(None)
            continue
        maps.append(np.pad(np.arange(size), (before, after), mode=mode))  # type: ignore[call-overload]
    return maps


def _remap(self: CpuLowering, node: Node, maps: list[Any]) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import RemapWorkload, pack_maps, remap

    x, out = node.input(0), node.output
    w = RemapWorkload(x.shape, out.shape, tuple(m is not None for m in maps), storage(x))
    return self.call(node.op.name, w, remap, (x,), (pack_maps(maps, w),))


@row("slice")
def _slice(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import StridedWorkload, strided

    x, out = node.input(0), node.output
    if not _movable(self, x, out):
        return None
    starts, steps = [0] * x.type.rank, [1] * x.type.rank
    bounds = (node.attr(k) for k in ("axes", "starts", "ends", "steps"))
    for axis, start, end, step in zip(*bounds, strict=True):
        axis %= x.type.rank
        size = x.shape[axis]
        if step < 0 and end < 0:
            end = None if end < -size else end  # ONNX: an end below -n includes index 0
        picked = range(size)[slice(start, end, step)]
        starts[axis], steps[axis] = picked.start, step
    w = StridedWorkload(x.shape, out.shape, tuple(starts), tuple(steps), storage(x))
    return self.call("slice", w, strided, (x,))


@row("expand")
def _expand(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import StridedWorkload, strided

    x, out = node.input(0), node.output
    if not _movable(self, x, out) or x.type.rank != out.type.rank:
        return None
    steps = tuple(0 if a == 1 and b != 1 else 1 for a, b in zip(x.shape, out.shape, strict=True))
    w = StridedWorkload(x.shape, out.shape, (0,) * x.type.rank, steps, storage(x))
    return self.call("expand", w, strided, (x,))


@row("tile")
def _tile(self: CpuLowering, node: Node) -> KernelCall | None:
    x, out = node.input(0), node.output
    if not _movable(self, x, out):
        return None
    maps = [None if a == b else np.arange(b) % a for a, b in zip(x.shape, out.shape, strict=True)]
    return _remap(self, node, maps)


@row("gather")
def _gather(self: CpuLowering, node: Node) -> KernelCall | None:
    from qcompiler.targets.kernels.movement import GatherWorkload, gather

    x, indices = node.input(0), node.input(1)
    if not _movable(self, x, node.output) or indices.dtype not in (DType.INT32, DType.INT64):
        return None
    w = GatherWorkload(x.shape, int(node.attr("axis")), indices.shape, storage(indices), storage(x))
    return self.call("gather", w, gather, (x, indices))


@row("resize")
def _resize_row(self: CpuLowering, node: Node) -> KernelCall | None:
    x, out = node.input(0), node.output
    if not _movable(self, x, out):
        return None
    scales, mode = node.attr("scales"), str(node.attr("coordinate_mode"))
    if mode == "tf_crop_and_resize":
        return None
    positions = [
        None if n == m and scale == 1 else _resize.source_positions(n, m, scale, mode)
        for n, m, scale in zip(x.shape, out.shape, scales, strict=True)
    ]
    if node.attr("mode") == "nearest":
        rounding = str(node.attr("nearest_mode"))
        maps = [
            None if p is None else _resize.nearest_indices(p, n, rounding)
            for p, n in zip(positions, x.shape, strict=True)
        ]
        return _remap(self, node, maps)
    plain = node.attr("mode") == "linear" and not (
        node.attr("antialias") or node.attr("exclude_outside")
    )
    outer = positions[0] is None and positions[-1] is None
    if not plain or not outer or not is_float32(x) or node.attr("layout") != "NHWC":
        return None
    from qcompiler.targets.kernels.movement import (
        ResizeLinearWorkload,
        pack_positions,
        resize_linear,
    )

    w = ResizeLinearWorkload(*x.shape, *out.shape[1:3])
    rows, columns = (
        np.arange(x.shape[axis], dtype=np.float64) if p is None else p
        for axis, p in ((1, positions[1]), (2, positions[2]))
    )
    return self.call("resize", w, resize_linear, (x,), pack_positions(rows, columns, w))
