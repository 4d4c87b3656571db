# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""How operators that move elements, and resize, are written in ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.ir import Node
from qcompiler.onnx_export_ops import (
    Emitter,
    from_nchw,
    outputs_of,
    scalar_like,
    to_nchw,
    writer_of,
)
from qcompiler.ops import _resize as resize_rules


@writer_of("mask_tail")
def _mask_tail(e: Emitter, node: Node) -> None:
    x, tail = node.input(0), node.input(1)
    zero = e.const(scalar_like(tail, 0.0), f"{node.name}/zero", tail.dtype)
    used = e.step("Equal", [e.ref(tail), zero], node.name)
    behind = x.type.rank - 1 - int(node.attr("axis"))
    if behind:
        axes = e.ints(range(1, behind + 1), f"{node.name}/axes")
        used = e.step("Unsqueeze", [used, axes], node.name)
    nothing = e.const(scalar_like(x, 0.0), f"{node.name}/nothing", x.dtype)
    e.put("Where", [used, e.ref(x), nothing], outputs_of(e, node), node.name)


@writer_of("split")
def _split(e: Emitter, node: Node) -> None:
    sizes = e.ints(node.attr("sizes"), f"{node.name}/sizes")
    operands = [e.ref(node.input(0)), sizes]
    e.put("Split", operands, outputs_of(e, node), node.name, axis=node.attr("axis"))


@writer_of("slice")
def _slice(e: Emitter, node: Node) -> None:
    steering = [
        e.ints(node.attr(k), f"{node.name}/{k}") for k in ("starts", "ends", "axes", "steps")
    ]
    e.put("Slice", [e.ref(node.input(0)), *steering], outputs_of(e, node), node.name)


@writer_of("pad")
def _pad(e: Emitter, node: Node) -> None:
    x = node.input(0)
    value = node.attr("value")
    if x.qparams is not None:
        q = x.qparams
        value = int(np.clip(np.rint(value / q.s) + q.z, q.qmin, q.qmax))
    operands = [e.ref(x), e.ints(node.attr("pads"), f"{node.name}/pads")]
    if node.attr("mode") == "constant":
        fill = np.asarray(value).astype(x.dtype.numpy)
        operands.append(e.const(fill, f"{node.name}/value", x.dtype))
    e.put("Pad", operands, outputs_of(e, node), node.name, mode=node.attr("mode"))


@writer_of("reshape")
def _reshape(e: Emitter, node: Node) -> None:
    shape = node.attr("shape")
    operands = [e.ref(node.input(0)), e.ints(shape, f"{node.name}/shape")]
    allow = 1 if 0 in shape else None
    e.put("Reshape", operands, outputs_of(e, node), node.name, allowzero=allow)


@writer_of("expand")
def _expand(e: Emitter, node: Node) -> None:
    operands = [e.ref(node.input(0)), e.ints(node.attr("shape"), f"{node.name}/shape")]
    e.put("Expand", operands, outputs_of(e, node), node.name)


@writer_of("tile")
def _tile(e: Emitter, node: Node) -> None:
    operands = [e.ref(node.input(0)), e.ints(node.attr("repeats"), f"{node.name}/repeats")]
    e.put("Tile", operands, outputs_of(e, node), node.name)


@writer_of("depth_to_space", "space_to_depth")
def _depth(e: Emitter, node: Node) -> None:
    x = to_nchw(e, e.ref(node.input(0)), node, 4)
    attrs: dict[str, Any] = {"blocksize": node.attr("blocksize")}
    op = "SpaceToDepth"
    if node.op.name == "depth_to_space":
        op, attrs["mode"] = "DepthToSpace", node.attr("mode")
    from_nchw(e, op, [x], e.ref(node.output), node, 4, **attrs)


@writer_of("resize")
def _resize(e: Emitter, node: Node) -> None:
    x, y = node.input(0), node.output
    scales = np.asarray(node.attr("scales"), np.float32)
    ratios = np.asarray(y.shape, np.float64) / np.asarray(x.shape, np.float64)
    exact = np.array_equal(scales, ratios.astype(np.float32))
    if e.plain:
        # TVM takes the scale from the extents, resizes the last two axes, and knows no
        # antialiasing; nearest must pick the very same elements.
        usual = node.attr("coordinate_mode") != "half_pixel_symmetric" and not node.attr(
            "antialias"
        )
        inner = x.type.rank == 4 and x.shape[:2] == y.shape[:2]
        if node.attr("mode") == "nearest" or not (exact and usual and inner):
            _resize_by_axis(e, node)
            return
    attrs = {
        "mode": node.attr("mode"),
        "coordinate_transformation_mode": node.attr("coordinate_mode"),
    }
    if node.attr("mode") == "nearest":
        attrs["nearest_mode"] = node.attr("nearest_mode")
    if node.attr("mode") == "cubic":
        attrs["cubic_coeff_a"] = node.attr("cubic_coeff_a")
        attrs["exclude_outside"] = int(bool(node.attr("exclude_outside")))
    if node.attr("antialias"):
        attrs["antialias"] = 1
    # Sizes say the extents exactly. Scales are needed where they are not the quotient of extents
    # (7 * 1.5 gives 10 cells that lie 1 / 1.5 apart); aligned corners do not read them.
    if exact or node.attr("coordinate_mode") == "align_corners":
        steering = ["", "", e.ints(y.shape, f"{node.name}/sizes")]
    else:
        steering = ["", e.const(scales, f"{node.name}/scales")]
    e.put("Resize", [e.ref(x), *steering], outputs_of(e, node), node.name, **attrs)


def _resize_by_axis(e: Emitter, node: Node) -> None:
    """Write a resize as one Gather (nearest) or one matrix product per axis that changes."""
    x, rank = node.input(0), node.output.type.rank
    y = e.ref(x)
    for axis, (n, out, scale) in enumerate(
        zip(x.shape, node.output.shape, node.attr("scales"), strict=True)
    ):
        if n == out and scale == 1:
            continue
        if node.attr("mode") == "nearest":
            index = resize_rules.nearest_indices(
                resize_rules.source_positions(n, out, scale, node.attr("coordinate_mode")),
                n,
                node.attr("nearest_mode"),
            )
            table = e.const(index, f"{node.name}/index")
            y = e.step("Gather", [y, table], node.name, axis=axis)
            continue
        rows = resize_rules.weights(n, out, scale, node.attrs).astype(x.dtype.numpy)
        if axis == rank - 2:
            y = e.step("MatMul", [e.const(rows, f"{node.name}/weights"), y], node.name)
            continue
        perm = list(range(rank))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        weights = e.const(np.ascontiguousarray(rows.T), f"{node.name}/weights")
        y = e.step("Transpose", [y], node.name, perm=perm) if axis != rank - 1 else y
        y = e.step("MatMul", [y, weights], node.name)
        y = e.step("Transpose", [y], node.name, perm=perm) if axis != rank - 1 else y
    e.put("Identity", [y], outputs_of(e, node), node.name)
