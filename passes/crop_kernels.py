# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Leave out the rows and columns of a convolution's kernel that only ever meet padding.

Dilated kernels reach far: one of 3x3 with dilation 24 on a picture of 14x14 touches it with its
middle element alone, and is a convolution of 1x1.

conv(x[N, C, 14, 14], w[M, C, 3, 3], dilations=24, pads=24)  ->  conv(x, w[:, :, 1:2, 1:2])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.passes.rewrite import producer_of
from qcompiler.passmanager import Pass, PassContext
from qcompiler.types import PerAxis

__all__ = ["CropKernels", "touching"]


@dataclass(frozen=True)
class CropKernels(Pass):
    """Crop constant kernels to the elements that meet the picture."""

    name: ClassVar[str] = "crop_kernels"

    def run(self, graph: Graph, ctx: PassContext) -> bool:
        """Return whether anything was cropped."""
        del ctx
        changed = False
        for node in graph.nodes:
            if node.op.name == "conv" and node.attr("layout") == "NCHW":
                changed |= _crop(graph, node)
        if changed:
            graph.eliminate_dead()
            graph.sort()
        return changed


def touching(
    size: int, results: int, taps: int, stride: int, dilation: int, pads: tuple[int, int]
) -> range:
    """Return the taps of one axis from the first to the last that meets the input.

    Args:
        size: Extent of the input.
        results: Extent of the output.
        taps: Extent of the kernel.
        stride: Step of the windows.
        dilation: Step of the taps.
        pads: Padding before and after; a tap within reach of what stays is kept, so that neither
            becomes negative.
    """
    kept = []
    for tap in range(taps):
        at = tap * dilation - pads[0]
        last = at + (results - 1) * stride
        first = at + -(at // stride) * stride if at < 0 else at  # the first window not before 0
        if first < size and first <= last:
            kept.append(tap)
    if not kept:
        kept = [0]
    first = min(kept[0], pads[0] // dilation)
    last = max(kept[-1], taps - 1 - pads[1] // dilation)
    return range(first, last + 1)


def _crop(graph: Graph, node: Node) -> bool:
    x, w = node.input(0), node.input(1)
    rank = w.type.rank - 2
    strides, dilations, pads = node.attr("strides"), node.attr("dilations"), node.attr("pads")
    kept = [
        touching(
            x.shape[2 + i], node.output.shape[2 + i], w.shape[2 + i], strides[i], dilations[i],
            (pads[i], pads[rank + i]),
        )
        for i in range(rank)
    ]  # fmt: skip
    if all(len(taps) == w.shape[2 + i] for i, taps in enumerate(kept)) or 0 in node.output.shape:
        return False
    cropped = _cropped(graph, w, kept)
    if cropped is None:
        return False
    before = [pads[i] - taps.start * dilations[i] for i, taps in enumerate(kept)]
    after = [
        pads[rank + i] - (w.shape[2 + i] - taps.stop) * dilations[i] for i, taps in enumerate(kept)
    ]
    shape = node.output.shape
    graph.set_input(node, 1, cropped)
    graph.set_attrs(node, pads=(*before, *after))
    assert node.output.shape == shape
    return True


def _cropped(graph: Graph, w: Value, kept: Sequence[range]) -> Value | None:
    """Return the weights with the kept taps only; None unless they are constant."""
    node = producer_of(w, "dequantize")
    if node is not None:
        stored = _cropped(graph, node.input(0), kept)
        if stored is None:
            return None
        return graph.add(
            "dequantize", [stored], node.attrs, name=node.name, sources=node.sources
        ).output
    q = w.qparams
    whole = q is None or q.is_per_tensor
    whole = whole or (
        q is not None and isinstance(q.granularity, PerAxis) and q.granularity.axis < 2
    )
    if not w.is_constant or not whole:
        return None
    slices = (slice(None), slice(None), *(slice(taps.start, taps.stop) for taps in kept))
    data = np.ascontiguousarray(w.array()[slices])
    return graph.constant(data, w.name, q, w.dtype)
