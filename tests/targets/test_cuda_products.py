# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products and convolutions on the emulated GPU equal the interpreter, bit for bit."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from cuda_emulator import emulator

from qcompiler.interpreter import run
from qcompiler.ir import Graph, Value
from qcompiler.ops import Stage
from qcompiler.targets.cuda import backend
from qcompiler.targets.cuda.arch import ARCHES
from qcompiler.targets.cuda.lowering import lower_graph
from qcompiler.targets.cuda.products import Epilogue, Product, pack4, product_launch
from qcompiler.targets.cuda.program import Temporary
from qcompiler.targets.cuda.tiles import Tile, candidates, choose
from qcompiler.types import DType, PerAxis, PerTensor, QuantParams, TensorType

needs_emulator = pytest.mark.skipif(
    emulator.skip_reason() is not None, reason=emulator.skip_reason() or ""
)
Array = np.ndarray[Any, np.dtype[Any]]
U8, I8 = DType.UINT8, DType.INT8


def grid(
    dtype: DType, scale: float, zero: int, lo: int | None = None, hi: int | None = None
) -> QuantParams:
    return QuantParams(
        np.float32(scale), np.int32(zero), dtype, dtype.min if lo is None else lo,
        dtype.max if hi is None else hi, PerTensor(),
    )  # fmt: skip


@dataclass
class Net:
    """A graph under construction, and the values of its inputs."""

    rng: np.random.Generator
    graph: Graph = field(default_factory=lambda: Graph("net", Stage.INTEGER))
    feeds: dict[str, Array] = field(default_factory=dict)
    results: list[tuple[str, Value]] = field(default_factory=list)

    def input(self, shape: tuple[int, ...], q: QuantParams, kind: str = "uniform") -> Value:
        v = self.graph.add_input(f"x{len(self.feeds)}", TensorType(shape, q.storage, q))
        lo, hi = q.storage.min, q.storage.max
        data = self.rng.integers(lo, hi, shape, endpoint=True)
        if kind == "extreme":
            data = self.rng.choice([lo, hi], shape)
        self.feeds[v.name] = data.astype(q.storage.numpy)
        return v

    def real(self, shape: tuple[int, ...], dtype: DType = DType.FLOAT32) -> Value:
        v = self.graph.add_input(f"x{len(self.feeds)}", TensorType(shape, dtype))
        self.feeds[v.name] = self.rng.standard_normal(shape).astype(dtype.numpy)
        return v

    def weights(self, shape: tuple[int, ...], axis: int, *, zero: int = 0, bits: int = 8) -> Value:
        lo, hi = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        data = self.rng.integers(lo, hi, shape, endpoint=True).astype(np.int8)
        n = shape[axis]
        q = QuantParams(
            self.rng.uniform(1e-3, 2e-2, n), np.full(n, zero), I8, lo, hi, PerAxis(axis)
        )
        return self.graph.constant(data, "w", q)

    def bias(self, n: int) -> Value:
        return self.graph.constant(self.rng.integers(-9000, 9000, n).astype(np.int32), "bias")

    def add(self, op: str, operands: list[Value | None], out: TensorType, **attrs: Any) -> Value:
        v = self.graph.add(op, operands, attrs, types=[out]).output
        self.results.append((f"y{len(self.results)}_{op}", v))
        return v

    def conv(
        self,
        image: tuple[int, int, int, int],
        channels: int,
        kernel: tuple[int, int] = (3, 3),
        *,
        strides: tuple[int, int] = (1, 1),
        pads: tuple[int, int, int, int] = (1, 1, 1, 1),
        dilations: tuple[int, int] = (1, 1),
        group: int = 1,
        x: tuple[DType, int] = (U8, 131),
        out: DType = U8,
        residual: DType | None = None,
        bits: int = 8,
        w_zero: int = 0,
        bias: bool = True,
        kind: str = "uniform",
    ) -> Value:
        n, h, w, c = image
        oh = (h + pads[0] + pads[2] - dilations[0] * (kernel[0] - 1) - 1) // strides[0] + 1
        ow = (w + pads[1] + pads[3] - dilations[1] * (kernel[1] - 1) - 1) // strides[1] + 1
        shape = (n, oh, ow, channels)
        operands: list[Value | None] = [
            self.input(image, grid(x[0], 0.02, x[1]), kind),
            self.weights((channels, c // group, *kernel), 0, zero=w_zero, bits=bits),
            self.bias(channels) if bias else None,
        ]
        if residual is not None:
            operands.append(self.input(shape, grid(residual, 0.05, 3)))
        scale = 0.03 * max(1.0, (c // group * kernel[0] * kernel[1]) ** 0.5) * 2.0 ** (bits - 8)
        q = grid(out, scale, 7, lo=out.min + 5) if out is not DType.FLOAT32 else None
        return self.add("qconv", operands, TensorType(shape, out, q), strides=strides, pads=pads,
                        dilations=dilations, group=group, layout="NHWC")  # fmt: skip

    def check(self, target: str = "cuda-sm80", **settings: str) -> None:
        self.graph.set_outputs(self.results)
        expected = run(self.graph, self.feeds)
        got = emulator.run_graph(self.graph, self.feeds, target, **settings)
        assert emulator.differences(got, {name: expected[name] for name, _ in self.results}) == []


@needs_emulator
@pytest.mark.parametrize(("target", "order"), [("cuda-sm80", "0"), ("cuda-sm75", "1")])
def test_convolutions(rng: np.random.Generator, target: str, order: str) -> None:
    net = Net(rng)
    net.conv((2, 9, 7, 16), 24)
    net.conv((1, 8, 8, 64), 40, (1, 1), pads=(0, 0, 0, 0), residual=U8)
    net.conv((1, 11, 5, 3), 17, (5, 3), strides=(2, 1), pads=(2, 0, 1, 2), x=(I8, -5), out=I8)
    net.conv((1, 6, 6, 20), 33, dilations=(2, 1), pads=(2, 1, 2, 1), x=(I8, 9), residual=I8, out=I8)
    net.conv((1, 7, 7, 1), 8, strides=(2, 2), bias=False)
    net.conv((1, 5, 6, 6), 10, (2, 2), pads=(0, 0, 0, 0), out=DType.FLOAT32)
    net.conv((3, 4, 4, 24), 12, group=3, residual=I8)
    net.conv((1, 4, 4, 32), 64, (1, 1), strides=(2, 2), pads=(0, 0, 0, 0), kind="extreme")
    net.conv((1, 5, 5, 8), 6, w_zero=3, x=(U8, 20))
    net.check(target, order=order)


@needs_emulator
def test_depthwise_convolutions(rng: np.random.Generator) -> None:
    net = Net(rng)
    net.conv((2, 9, 7, 16), 16, group=16)
    net.conv((1, 8, 9, 12), 12, group=12, strides=(2, 2), residual=U8, x=(I8, -3))
    net.conv((1, 6, 6, 5), 10, group=5, out=I8)
    net.conv((1, 12, 3, 8), 8, (5, 1), group=8, pads=(2, 0, 2, 0), out=DType.FLOAT32)
    net.conv((1, 7, 7, 6), 6, group=6, dilations=(2, 2), pads=(2, 2, 2, 2), w_zero=-2)
    net.check()


@needs_emulator
def test_four_bit_weights(rng: np.random.Generator) -> None:
    net = Net(rng)
    net.conv((1, 6, 6, 48), 40, bits=4, residual=U8)
    net.conv((1, 8, 8, 96), 24, (1, 1), pads=(0, 0, 0, 0), bits=4, x=(I8, -7), kind="extreme")
    net.conv((2, 5, 5, 10), 9, bits=4, out=DType.FLOAT32)
    net.check()


def matmul(
    net: Net,
    a: tuple[int, ...],
    b: tuple[int, ...],
    *,
    constant: bool = True,
    flip_a: bool = False,
    flip_b: bool = False,
    za: int = 12,
    zb: int = 0,
    types: tuple[DType, DType] = (U8, I8),
    out: DType = U8,
    residual: bool = False,
) -> None:
    sa = (*a[:-2], a[-1], a[-2]) if flip_a else a
    sb = (*b[:-2], b[-1], b[-2]) if flip_b else b
    shape = (*np.broadcast_shapes(sa[:-2], sb[:-2]), sa[-2], sb[-1])
    columns = len(b) - (2 if flip_b else 1)
    left = net.input(a, grid(types[0], 0.02, za))
    right = (
        net.weights(b, columns) if constant else net.input(b, grid(types[1], 0.01, zb), "extreme")
    )
    operands: list[Value | None] = [left, right, net.bias(shape[-1]) if constant else None]
    if residual:
        operands.append(net.input(shape, grid(out, 0.07, 4)))
    q = grid(out, 0.02 * sa[-1] ** 0.5, 3) if out is not DType.FLOAT32 else None
    net.add("qmatmul", operands, TensorType(shape, out, q), transpose_a=flip_a, transpose_b=flip_b)


@needs_emulator
@pytest.mark.parametrize("order", ["0", "1"])
def test_matrix_products(rng: np.random.Generator, order: str) -> None:
    net = Net(rng)
    matmul(net, (37, 64), (64, 48))
    matmul(net, (2, 3, 10, 33), (33, 19), residual=True)
    matmul(net, (5, 70), (30, 70), flip_b=True, out=DType.FLOAT32)
    matmul(net, (2, 40, 9), (40, 16), flip_a=True, types=(I8, I8), za=-4)
    # attention: scores and contexts, both operands at run time, zero points on both sides
    matmul(net, (2, 4, 17, 32), (2, 4, 17, 32), constant=False, flip_b=True, zb=9)
    matmul(net, (2, 4, 17, 17), (2, 4, 17, 24), constant=False, zb=-11)
    matmul(net, (3, 7, 20), (1, 20, 5), constant=False, types=(I8, U8), za=3, zb=100)
    matmul(net, (1, 2, 6, 8), (5, 1, 8, 4), constant=False, za=0)
    matmul(net, (1, 1024), (1024, 10))
    net.check(order=order)


def run_with_tiles(rng: np.random.Generator, tiles: list[Tile], monkeypatch: Any) -> None:
    """Check tiles on a product whose edges none of them meets."""
    net = Net(rng)
    matmul(net, (150, 300), (300, 140), residual=True)
    net.graph.set_outputs(net.results)
    expected = run(net.graph, net.feeds)
    for tile in tiles:
        choose = functools.partial(lower_graph, choose=lambda p, arch, tile=tile: tile)
        monkeypatch.setattr(backend, "lower_graph", choose)
        got = emulator.run_graph(net.graph, net.feeds, "cuda-sm90")
        assert emulator.differences(got, expected) == [], tile


@needs_emulator
def test_tiles_give_the_same_integers(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_tiles(rng, [Tile(128, 64, 128, 32, 32, 3), Tile(64, 32, 32, 32, 16, 2)], monkeypatch)


@needs_emulator
@pytest.mark.slow
def test_every_tile_gives_the_same_integers(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {
        tile
        for arch in ARCHES.values()
        for tile in candidates(arch, 300, packed4=False, out_bytes=1)
    }
    run_with_tiles(rng, sorted(tiles, key=dataclasses.astuple), monkeypatch)


@needs_emulator
def test_accumulators_wrap_like_the_interpreter(rng: np.random.Generator) -> None:
    net = Net(rng)
    x = net.input((3, 32), grid(I8, 1.0, 0))
    w = net.weights((32, 8), 1)
    top = np.full(8, np.iinfo(np.int32).max - 10, np.int32)
    bias = net.graph.constant(top, "bias")
    net.add(
        "qmatmul",
        [x, w, bias],
        TensorType((3, 8), DType.FLOAT32),
        transpose_a=False,
        transpose_b=False,
    )
    net.check()


@needs_emulator
def test_half_precision_products(rng: np.random.Generator) -> None:
    net = Net(rng)
    half = DType.FLOAT16
    x = net.real((1, 6, 7, 24), half)
    w = net.graph.constant((rng.standard_normal((40, 24, 3, 3)) / 15).astype(np.float16), "w")
    b = net.graph.constant(rng.standard_normal(40).astype(np.float16), "b")
    r = net.real((1, 6, 7, 40), half)
    net.add(
        "conv",
        [x, w, b, r],
        TensorType((1, 6, 7, 40), half),
        strides=(1, 1),
        pads=(1, 1, 1, 1),
        dilations=(1, 1),
        layout="NHWC",
        act_min=0.0,
    )
    a = net.real((2, 3, 9, 20), half)
    c = net.real((2, 3, 20, 11), half)
    net.add("matmul", [a, c], TensorType((2, 3, 9, 11), half))
    net.graph.set_outputs(net.results)
    expected = run(net.graph, net.feeds)
    for target in ("cuda-sm80", "cuda-sm75"):
        got = emulator.run_graph(net.graph, net.feeds, target)
        assert emulator.far_results(got, expected, list(expected), 4e-3) == []


@needs_emulator
def test_float_products(rng: np.random.Generator) -> None:
    net = Net(rng)
    f32 = DType.FLOAT32
    x = net.real((2, 6, 7, 10))
    w = net.graph.constant(rng.standard_normal((12, 5, 3, 2)).astype(np.float32), "w")
    b = net.graph.constant(rng.standard_normal(12).astype(np.float32), "b")
    net.add(
        "conv",
        [x, w, b],
        TensorType((2, 3, 6, 12), f32),
        strides=(2, 1),
        pads=(1, 0, 1, 0),
        dilations=(1, 1),
        group=2,
        layout="NHWC",
        act_min=-1.0,
        act_max=2.0,
    )
    d = net.graph.constant(rng.standard_normal((10, 1, 3, 3)).astype(np.float32), "d")
    net.add(
        "conv",
        [x, d, None, net.real((2, 6, 7, 10))],
        TensorType((2, 6, 7, 10), f32),
        strides=(1, 1),
        pads=(1, 1, 1, 1),
        dilations=(1, 1),
        group=10,
        layout="NHWC",
    )
    net.add("matmul", [net.real((70, 33)), net.real((33, 65))], TensorType((70, 65), f32))
    net.add("matmul", [net.real((2, 1, 5, 8)), net.real((3, 8, 4))], TensorType((2, 3, 5, 4), f32))
    net.add("matmul", [net.real((8,)), net.real((8, 4))], TensorType((4,), f32))
    net.graph.set_outputs(net.results)
    expected = run(net.graph, net.feeds)
    got = emulator.run_graph(net.graph, net.feeds)
    assert emulator.far_results(got, expected, list(expected), 1e-5) == []


# ------------------------------------------------------------------------------ without a GPU


def test_pack4_puts_every_weight_where_a_lane_looks(rng: np.random.Generator) -> None:
    w = rng.integers(-8, 8, (16, 64)).astype(np.int8)
    words = pack4(w).view("<u4").reshape(2, 2, 32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for byte in range(4):
            for half in range(2):
                bits = int(words[1, 1, lane]) >> (8 * byte + 4 * half) & 15
                assert (bits ^ 8) - 8 == w[8 + g, 32 + 16 * half + 4 * t + byte]


def test_the_choice_of_tiles_fills_the_gpu() -> None:
    arch = ARCHES["cuda-sm80"]
    large = choose(arch, 4096, 4096, 4096, 1, packed4=False, out_bytes=1)
    assert large.bm * large.bn >= 128 * 128
    small = choose(arch, 49, 512, 4608, 1, packed4=False, out_bytes=1)
    assert -(-49 // small.bm) * -(-512 // small.bn) >= 16
    for arch in ARCHES.values():
        for tile in candidates(arch, 4096, packed4=False, out_bytes=1):
            assert tile.shared(packed4=False, out_bytes=1) <= arch.shared_bytes
            assert tile.threads <= 256


def test_equal_products_share_one_kernel() -> None:
    def launch() -> Any:
        weights = np.ones((1, 32, 64), np.int8)
        p = Product(
            Temporary(1), None, 8, 32, 64, 1, U8, I8, Epilogue(U8, np.float32([0.5])),
            Temporary(1), a_row=64, out_row=32, weights=weights,
        )  # fmt: skip
        return product_launch(p, ARCHES["cuda-sm80"])

    assert launch().kernel == launch().kernel
