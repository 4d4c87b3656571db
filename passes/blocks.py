# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Blocks of a network, and tiles of them that run forwards and backwards in numpy.

A block is a stretch between two places where one value alone is alive: a residual block, an
inverted residual block, a few plain layers. A tile is a square of the block's result and what it
depends on; borders are real zeros, as in the network. Arrays are [N, H, W, C], float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcompiler.ir import Graph, Node, Value
from qcompiler.numerics import fake_quantize
from qcompiler.passes.single_node import Unit
from qcompiler.passes.trails import live_values, recomputed_nodes
from qcompiler.types import Array, QuantParams

PLAIN = 3
"""Products at most that plain layers are gathered into one block."""


@dataclass(frozen=True)
class Block:
    """A stretch of a FLOAT graph with one operand and one result.

    Attributes:
        nodes: Its nodes, in order.
        source: The one value that is alive before it.
        result: What it gives.
        units: The products in it whose weights change.
    """

    nodes: tuple[Node, ...]
    source: Value
    result: Value
    units: tuple[Unit, ...]


def blocks_of(graph: Graph, kernels: Sequence[Unit], units: Sequence[Unit]) -> list[Block]:
    """Return the blocks of a FLOAT graph that hold products to change, in order.

    Args:
        graph: The graph.
        kernels: All products with what joins their kernels: no cut goes through one.
        units: The products to change.
    """
    nodes, fixed = graph.nodes, recomputed_nodes(graph)
    inner = set()
    for k in kernels:
        inner |= {graph.node(m).output.name for m in k.members} - {k.result}
    cuts: list[tuple[int, Value]] = []
    for i in range(len(nodes) + 1):
        live = live_values(graph, i, fixed)
        if len(live) == 1 and live[0].name not in inner:
            cuts.append((i, live[0]))
    wanted = {u.node: u for u in units}
    found: list[Block] = []
    open_part: list[Node] = []
    source: Value | None = None
    for (start, before), (end, after) in itertools.pairwise(cuts):
        part = [n for n in nodes[start:end] if n not in fixed]
        products = [n for n in part if n.name in wanted]
        if source is None:
            source = before
        held = [n for n in open_part if n.name in wanted]
        if len(products) > 1 and held:  # a residual block stands alone
            found.append(_block(open_part, source, before, wanted))
            open_part, source, held = [], before, []
        open_part += part
        last = after.producer
        linear = last is not None and last.name in wanted
        if len(products) > 1 or len(held) + len(products) >= PLAIN or (linear and products):
            found.append(_block(open_part, source, after, wanted))
            open_part, source = [], None
    if source is not None and any(n.name in wanted for n in open_part):
        found.append(_block(open_part, source, cuts[-1][1], wanted))
    return found


def _block(nodes: list[Node], source: Value, result: Value, wanted: Mapping[str, Unit]) -> Block:
    chosen = tuple(wanted[n.name] for n in nodes if n.name in wanted)
    return Block(tuple(nodes), source, result, chosen)


@dataclass(frozen=True)
class Region:
    """Where a tile lies in a value: rows from `scale * y + offset` on, for a tile at row y."""

    scale: int
    offset: tuple[int, int]
    size: tuple[int, int]


class Tiles:
    """A block as a function of its weights, on tiles of its result.

    Args:
        block: The block.
        qdq: The quantized graph: what its products read is rounded as there.
        size: Side of a tile of the result; smaller where the result is.

    Raises:
        ValueError: The block holds something other than 2-d convolutions, sums and clamps.
    """

    def __init__(self, block: Block, qdq: Graph, size: int) -> None:
        self.block = block
        chosen = {u.node for u in block.units}
        active: dict[Value, Node] = {}
        for node in block.nodes:
            if node.name in chosen or any(v in active for v in node.operands):
                active[node.output] = node
        self.nodes = tuple(active.values())
        self.sources: dict[Value, tuple[Node, int]] = {}
        self.operands: dict[Node, QuantParams | None] = {}
        for node in self.nodes:
            _check_part(node)
            for i, v in enumerate(self._reads(node)):
                if v not in active:
                    self.sources.setdefault(v, (node, i))
                elif node.op.name == "conv":
                    pair = qdq.node(node.name).input(0).producer
                    self.operands[node] = None if pair is None else pair.input(0).qparams
        height, width = block.result.shape[2:]
        self.size = (min(size, height), min(size, width))
        self.regions: dict[Value, Region] = {block.result: Region(1, (0, 0), self.size)}
        for node in reversed(self.nodes):
            if node.output not in self.regions:
                raise ValueError(f"nothing in the block reads {node.output.name!r}")
            for v in self._reads(node):
                self._need(v, self._wanted(node, self.regions[node.output]))

    @staticmethod
    def _reads(node: Node) -> tuple[Value, ...]:
        return node.operands[:2] if node.op.name == "add" else (node.input(0),)

    def _wanted(self, node: Node, out: Region) -> Region:
        """Return the region of its operand that a region of a node's result depends on."""
        if node.op.name != "conv":
            return out
        kernel = node.input(1).shape[2:]
        pads, strides, dilations = (node.attr(a) for a in ("pads", "strides", "dilations"))
        offset = tuple(out.offset[i] * strides[i] - pads[i] for i in range(2))
        size = tuple(
            (out.size[i] - 1) * strides[i] + (kernel[i] - 1) * dilations[i] + 1 for i in range(2)
        )
        if strides[0] != strides[1]:
            raise ValueError(f"{node.name} has unequal strides")
        return Region(out.scale * strides[0], (offset[0], offset[1]), (size[0], size[1]))

    def _need(self, v: Value, region: Region) -> None:
        old = self.regions.get(v)
        if old is None:
            self.regions[v] = region
            return
        if old.scale != region.scale:
            raise ValueError(f"{v.name!r} is read at different strides")
        low = [min(old.offset[i], region.offset[i]) for i in range(2)]
        high = [max(r.offset[i] + r.size[i] for r in (old, region)) for i in range(2)]
        self.regions[v] = Region(old.scale, (low[0], low[1]), (high[0] - low[0], high[1] - low[1]))

    # ------------------------------------------------------------------------------ samples

    def positions(self, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Draw where tiles of one run begin in the result."""
        h, w = self.block.result.shape[2:]
        free = (h - self.size[0] + 1, w - self.size[1] + 1)
        chosen = rng.choice(free[0] * free[1], min(count, free[0] * free[1]), replace=False)
        return [(int(c) // free[1], int(c) % free[1]) for c in chosen]

    def cut(self, v: Value, array: Array, at: tuple[int, int]) -> Array:
        """Return a tile [N, h, w, C] of a value [N, C, H, W]; zeros beyond its borders."""
        r = self.regions[v]
        tile = np.zeros((array.shape[0], *r.size, array.shape[1]), np.float32)
        low = [r.scale * at[i] + r.offset[i] for i in range(2)]
        src = [slice(max(low[i], 0), min(low[i] + r.size[i], array.shape[2 + i])) for i in range(2)]
        dst = [slice(s.start - o, s.stop - o) for s, o in zip(src, low, strict=True)]
        tile[:, dst[0], dst[1]] = array[:, :, src[0], src[1]].transpose(0, 2, 3, 1)
        return tile

    def masks(self, at: Sequence[tuple[int, int]]) -> dict[Value, Array]:
        """Return which elements of inner values lie within their borders, where some do not."""
        found = {}
        for v, r in self.regions.items():
            if v in self.sources or v is self.block.result:
                continue
            inside = []
            for i in range(2):
                low = np.asarray([r.scale * a[i] + r.offset[i] for a in at])
                index = low[:, None] + np.arange(r.size[i])
                inside.append((index >= 0) & (index < v.shape[2 + i]))
            mask = inside[0][:, :, None] & inside[1][:, None, :]
            if not mask.all():
                found[v] = mask[..., None].astype(np.float32)
        return found

    # ------------------------------------------------------------------------------ running

    def forward(
        self,
        x: Mapping[Value, Array],
        weights: Mapping[str, tuple[Array, Array]],
        masks: Mapping[Value, Array],
        rows: Array | slice = slice(None),
    ) -> tuple[Array, list[_Step]]:
        """Return the result on tiles, and what `backward` needs.

        Args:
            x: Tiles of the sources.
            weights: Weights [G, K, O] (K = kernel rows, columns, channels) and bias [O] by product.
            masks: From `masks`.
            rows: The tiles, where `masks` has more.
        """
        values: dict[Value, Array] = dict(x)
        tape: list[_Step] = []
        for node in self.nodes:
            out = self.regions[node.output]
            reads = [self._slice(node, v, out) for v in self._reads(node)]
            arrays = [values[v][s] for v, s in zip(self._reads(node), reads, strict=True)]
            step = _Step(node, reads)
            if node.op.name == "conv":
                q = self.operands.get(node)
                a = arrays[0]
                if q is not None:
                    low = float(q.s) * (q.qmin - int(q.z))
                    high = float(q.s) * (q.qmax - int(q.z))
                    step.passed = (a >= low) & (a <= high)
                    a = fake_quantize(a, q)
                step.x = a
                y = step.multiply(*weights[node.name])
            elif node.op.name == "add":
                y = arrays[0] + arrays[1]
            else:
                low, high = _clamp(node)
                y = np.clip(arrays[0], low, high)
                step.passed = (arrays[0] > low) & (arrays[0] < high)
            if node.output in masks:
                step.mask = masks[node.output][rows]
                y = y * step.mask
            values[node.output] = y
            tape.append(step)
        return values[self.block.result], tape

    def _slice(self, node: Node, v: Value, out: Region) -> tuple[slice, ...]:
        want, have = self._wanted(node, out), self.regions[v]
        low = [want.offset[i] - have.offset[i] for i in range(2)]
        return (
            slice(None),
            slice(low[0], low[0] + want.size[0]),
            slice(low[1], low[1] + want.size[1]),
        )

    def backward(
        self,
        slope: Array,
        tape: list[_Step],
        weights: Mapping[str, tuple[Array, Array]],
    ) -> dict[str, tuple[Array, Array]]:
        """Return the slopes by weights and bias, given those by the result."""
        slopes: dict[Value, Array] = {self.block.result: slope}
        found: dict[str, tuple[Array, Array]] = {}
        for step in reversed(tape):
            node = step.node
            d = slopes.pop(node.output)
            if step.mask is not None:
                d = d * step.mask
            reads = self._reads(node)
            if node.op.name == "conv":
                wanted = reads[0] not in self.sources
                dw, db, dx = step.slopes(d, weights[node.name][0], wanted)
                found[node.name] = (dw, db)
                if dx is None:
                    continue
                d = dx
            if step.passed is not None:
                d = d * step.passed
            for v, part in zip(reads, step.reads, strict=True):
                if v in self.sources:
                    continue
                if v not in slopes:
                    shape = (d.shape[0], *self.regions[v].size, d.shape[3])
                    slopes[v] = np.zeros(shape, np.float32)
                slopes[v][part] += d
        return found


def _check_part(node: Node) -> None:
    plain = node.op.name in ("relu", "clip", "add")
    conv = node.op.name == "conv" and node.input(1).is_constant
    if not (plain or conv) or node.output.type.rank != 4:
        raise ValueError(f"{node.name} ({node.op.name}) cannot be part of a tile")
    if node.op.name == "add" and any(
        v.is_constant or v.shape != node.output.shape for v in node.operands
    ):
        raise ValueError(f"{node.name} adds something else than a tensor of its shape")


def _clamp(node: Node) -> tuple[float, float]:
    if node.op.name == "relu":
        return 0.0, np.inf
    low, high = node.attr("min"), node.attr("max")
    return (-np.inf if low is None else float(low)), (np.inf if high is None else float(high))


class _Step:
    """One node of a forward run: its operands and what its slope needs."""

    def __init__(self, node: Node, reads: list[tuple[slice, ...]]) -> None:
        self.node = node
        self.reads = reads
        self.passed: Array | None = None
        self.mask: Array | None = None
        self.x: Array = np.zeros(0, np.float32)
        if node.op.name == "conv":
            self.kernel = node.input(1).shape[2:]
            self.strides = node.attr("strides")
            self.dilations = node.attr("dilations")
            self.groups = int(node.attr("group"))
            self.depthwise = self.groups > 1 and node.input(1).shape[:2] == (self.groups, 1)

    def _taps(self) -> list[tuple[slice, ...]]:
        """Return what each tap of the kernel reads, in order."""
        h, w = self.x.shape[1:3]
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.strides, self.dilations
        oh, ow = (h - (kh - 1) * dh - 1) // sh + 1, (w - (kw - 1) * dw - 1) // sw + 1
        return [
            (
                slice(None),
                slice(i * dh, i * dh + (oh - 1) * sh + 1, sh),
                slice(j * dw, j * dw + (ow - 1) * sw + 1, sw),
            )
            for i in range(kh)
            for j in range(kw)
        ]

    def _columns(self) -> Array:
        """Return the operand rows [N, h, w, G, taps * C / G]."""
        parts = [self.x[t] for t in self._taps()]
        n, h, w, c = parts[0].shape
        if len(parts) == 1:
            return parts[0].reshape(n, h, w, self.groups, c // self.groups)
        stacked = np.stack([p.reshape(n, h, w, self.groups, -1) for p in parts], 4)
        return stacked.reshape(n, h, w, self.groups, -1)

    def multiply(self, weights: Array, bias: Array) -> Array:
        """Return the convolution of the operand with weights [G, K, O]."""
        if self.depthwise:
            y: Array | None = None
            for k, t in enumerate(self._taps()):
                part = self.x[t] * weights[:, k, 0]
                y = part if y is None else y + part
            assert y is not None
            return y + bias
        columns = self._columns()
        n, h, w = columns.shape[:3]
        if self.groups == 1:
            flat: Array = columns.reshape(n * h * w, -1) @ weights[0]
        else:
            moved = columns.reshape(n * h * w, self.groups, -1).transpose(1, 0, 2) @ weights
            flat = moved.transpose(1, 0, 2).reshape(n * h * w, -1)
        return flat.reshape(n, h, w, -1) + bias

    def slopes(self, d: Array, weights: Array, wanted: bool) -> tuple[Array, Array, Array | None]:
        """Return the slopes by weights, bias and (where wanted) the operand."""
        db = d.sum((0, 1, 2))
        dx = np.zeros_like(self.x) if wanted else None
        taps = self._taps()
        if self.depthwise:
            dw = np.empty_like(weights)
            for k, t in enumerate(taps):
                dw[:, k, 0] = np.einsum("nhwc,nhwc->c", self.x[t], d)
                if dx is not None:
                    dx[t] += d * weights[:, k, 0]
            return dw, db, dx
        columns = self._columns()
        rows = columns.shape[0] * columns.shape[1] * columns.shape[2]
        left = columns.reshape(rows, self.groups, -1).transpose(1, 2, 0)
        right = d.reshape(rows, self.groups, -1).transpose(1, 0, 2)
        dw = left @ right
        if dx is not None:
            back = (right @ np.swapaxes(weights, 1, 2)).transpose(1, 0, 2)
            back = back.reshape(*columns.shape[:4], len(taps), -1)
            for k, t in enumerate(taps):
                dx[t] += back[..., k, :].reshape(*columns.shape[:3], -1)
        return dw, db, dx


def tap_major(node: Node, w: Array) -> Array:
    """Return weights [O, I, kh, kw] of a convolution as [G, taps * I, O]."""
    groups = int(node.attr("group"))
    split = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    moved = split.transpose(0, 3, 4, 2, 1)
    return np.ascontiguousarray(moved.reshape(groups, -1, split.shape[1]), np.float32)


def channel_major(node: Node, m: Array) -> Array:
    """Return matrices as `tap_major` gives them in the shape of the weights."""
    o, i, kh, kw = node.input(1).shape
    groups = int(node.attr("group"))
    split = m.reshape(groups, kh, kw, i, o // groups).transpose(0, 4, 3, 1, 2)
    return np.ascontiguousarray(split.reshape(o, i, kh, kw))
