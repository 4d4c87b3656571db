# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Launches of matrix products and convolutions, and how their weights are packed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from qcompiler.records import stable_text
from qcompiler.targets.cuda.arch import Arch
from qcompiler.targets.cuda.program import Argument, Buffer, Launch
from qcompiler.targets.cuda.source import NAME, KernelText, c_type, entry, struct
from qcompiler.targets.cuda.tiles import Tile, candidates, choose
from qcompiler.types import Array, DType

MAX_FLOAT = float(np.finfo(np.float32).max)
LONGEST_PACKED4 = 1 << 16
"""Greatest depth of a product with packed 4-bit weights: 16 times the sum must fit int32."""


@dataclass(frozen=True, slots=True)
class Window:
    """Geometry of a convolution, NHWC."""

    batch: int
    ih: int
    iw: int
    channels: int
    oh: int
    ow: int
    kh: int
    kw: int
    strides: tuple[int, int]
    pads: tuple[int, int]
    dilations: tuple[int, int]

    def constants(self) -> dict[str, object]:
        """Return the members of the kernels' parameter struct."""
        return {
            "IH": self.ih, "IW": self.iw, "C": self.channels, "OH": self.oh, "OW": self.ow,
            "KH": self.kh, "KW": self.kw, "SH": self.strides[0], "SW": self.strides[1],
            "PH": self.pads[0], "PW": self.pads[1], "DH": self.dilations[0],
            "DW": self.dilations[1],
        }  # fmt: skip

    @property
    def is_matrix(self) -> bool:
        """Whether rows of the product are rows of the image as it lies in memory."""
        return (self.kh, self.kw, self.strides, self.pads) == (1, 1, (1, 1), (0, 0)) and (
            (self.ih, self.iw) == (self.oh, self.ow)
        )


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What becomes of an accumulator.

    Attributes:
        out: Element type of the result.
        scale: float32 multipliers, one in all or one per column; None for half precision.
        bias: One per column (int32; float32 for half precision), or None.
        residual: Element type of the residual, or None.
        residual_zero: Its zero point.
        residual_scale: Its multiplier.
        low: Least value before the zero point is added; of a float, the clamp itself.
        high: Greatest one.
        zero: Zero point of the result.
    """

    out: DType
    scale: Array | None = None
    bias: Array | None = None
    residual: DType | None = None
    residual_zero: int = 0
    residual_scale: float = 0.0
    low: float = -MAX_FLOAT
    high: float = MAX_FLOAT
    zero: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A product of `batch` independent pairs (groups of a convolution, or leading axes).

    Attributes:
        a: Rows: [M][K], or an image under a window.
        b: Columns as rows: a constant [batch][N][K] to be packed, or a run-time buffer.
        rows, columns, depth: M, N, K of one pair.
        batch: Number of pairs.
        a_dtype, b_dtype: Element types.
        epilogue: See there.
        result: Buffer that receives [M][...] rows.
        residual: Argument, if the epilogue has one.
        window: Geometry, or None for a matrix.
        a_row: Elements between rows of a matrix A.
        out_row: Elements between rows of the result.
        a_offset, b_offset, c_offset: C++ text: where pair z begins, in elements.
        n_offset: C++ text: number of the first column of pair z in arrays per column.
        y_offset, x_offset: C++ text: by how much the windows of pair z lie lower, and further
            right, than those of the geometry.
        weights: Constant B before packing, [batch][N][K]; None for a run-time B.
        b_bits: Width of the constant weights.
        a_zero: Zero point of A.
        b_zero: Zero points of B: one in all or one per column.
    """

    a: Argument
    b: Argument | None
    rows: int
    columns: int
    depth: int
    batch: int
    a_dtype: DType
    b_dtype: DType
    epilogue: Epilogue
    result: Buffer
    residual: Argument | None = None
    window: Window | None = None
    a_row: int = 0
    out_row: int = 0
    a_offset: str = "0"
    b_offset: str = "0"
    c_offset: str = "0"
    n_offset: str = "0"
    y_offset: str = "0"
    x_offset: str = "0"
    weights: Array | None = None
    b_bits: int = 8
    a_zero: int = 0
    b_zero: Array = field(default_factory=lambda: np.zeros(1, np.int64))

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.rows * self.columns * self.depth * self.batch


def pack4(w: Array) -> Array:
    """Return 4-bit weights [..., N, K] (N a multiple of 8, K of 32) in the order of the fragments.

    The word of lane 4 g + t, of 8 columns and 32 of K, holds in byte j the weights of column g at
    k = 4 t + j (lower half) and k = 16 + 4 t + j (upper half).
    """
    lead, (n, k) = w.shape[:-2], w.shape[-2:]
    split = w.reshape(*lead, n // 8, 8, k // 32, 2, 4, 4)
    low, high = split[..., 0, :, :], split[..., 1, :, :]
    packed = ((low & 15) | ((high & 15) << 4)).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(packed, -3, -4)).reshape(*lead, n // 8, k // 32, 128)


def _columns(values: Array, count: int, dtype: type) -> Array:
    return np.ascontiguousarray(np.broadcast_to(values.reshape(-1), (count,)).astype(dtype))


ChooseTile = Callable[["Product", Arch], Tile]
"""Picks the tile of a product for a GPU."""


def tile_of(p: Product, arch: Arch) -> Tile:
    """Return the analytic choice of the tile."""
    size = 2 if p.a_dtype is DType.FLOAT16 else 1
    out_bytes = p.epilogue.out.numpy.itemsize
    return choose(arch, p.rows, p.columns, p.depth * size, p.batch,
                  packed4=_is_packed4(p), out_bytes=out_bytes, sums=_has_sums(p))  # fmt: skip


def tiles_of(p: Product, arch: Arch) -> tuple[Tile, ...]:
    """Return every tile that a product can have, the analytic choice first."""
    size = 2 if p.a_dtype is DType.FLOAT16 else 1
    first = tile_of(p, arch)
    every = candidates(arch, p.depth * size, packed4=_is_packed4(p),
                       out_bytes=p.epilogue.out.numpy.itemsize, sums=_has_sums(p))  # fmt: skip
    return (first, *(t for t in every if t != first))


def workload_text(p: Product) -> str:
    """Return one text for products that the same tile serves equally well."""
    ep = p.epilogue
    window = "none" if p.window is None else stable_text(p.window)
    size = "packed4" if _is_packed4(p) else p.b_dtype.value
    facts = {
        "rows": p.rows, "columns": p.columns, "depth": p.depth, "batch": p.batch,
        "a": p.a_dtype.value, "b": size, "constant": p.weights is not None, "window": window,
        "out": ep.out.value, "scales": 0 if ep.scale is None else min(ep.scale.size, 2),
        "bias": ep.bias is not None,
        "residual": "none" if ep.residual is None else ep.residual.value,
        "a_zero": p.a_zero != 0, "b_zero": bool(p.b_zero.any()),
    }  # fmt: skip
    return "product " + " ".join(f"{name}={value}" for name, value in facts.items())


def _has_sums(p: Product) -> bool:
    """Whether zero points of B, or of a run-time B's partner, need sums at run time."""
    integers = p.a_dtype is not DType.FLOAT16
    return integers and bool(p.b_zero.any() or (p.weights is None and p.a_zero != 0))


def _is_packed4(p: Product) -> bool:
    return (
        p.weights is not None
        and p.b_bits <= 4
        and p.depth < LONGEST_PACKED4
        and not p.b_zero.any()
        and bool((p.weights >= -8).all() and (p.weights <= 7).all())
    )


def product_launch(p: Product, arch: Arch, tile: Tile | None = None) -> Launch:
    """Return the launch of a product on tensor cores: 8-bit integers or half precision."""
    tile = tile or tile_of(p, arch)
    half = p.a_dtype is DType.FLOAT16
    size = 2 if half else 1
    ep = p.epilogue
    packed4 = _is_packed4(p)
    kp = -(-p.depth * size // tile.bk) * tile.bk // size
    np_ = -(-p.columns // tile.bn) * tile.bn
    b: Argument
    all_columns = p.columns * (p.batch if p.n_offset != "0" else 1)
    if p.weights is not None:
        b, b_offset, correction = _packed_weights(p, np_, kp, packed4, size)
        bias = _folded_bias(p, all_columns, kp)
    else:
        assert p.b is not None
        b, correction = p.b, kp * p.a_zero * int(p.b_zero.reshape(-1)[0])
        b_offset = f"({p.b_offset}) * {size}"
        bias = None if ep.bias is None else ep.bias.astype(np.int32)
    if half:
        bias = None if ep.bias is None else ep.bias.astype(np.float32)
    scale_row = ep.scale is not None and ep.scale.size > 1
    multiplier = None
    if scale_row:
        assert ep.scale is not None
        multiplier = _columns(ep.scale, all_columns, np.float32)
    row_sums = not half and bool(p.b_zero.any())
    b_zero = _columns(p.b_zero, all_columns, np.int32) if row_sums else None
    pad = np.zeros(32, np.uint8)
    if not half:
        pad[:16] = np.array([p.a_zero]).astype(p.a_dtype.numpy).view(np.uint8)[0]
    still = p.y_offset == p.x_offset == "0"
    window = None if p.window is not None and p.window.is_matrix and still else p.window
    a_row = p.window.channels if window is None and p.window is not None else p.a_row
    channels = p.depth // (window.kh * window.kw) if window is not None else p.depth
    whole_rows = [channels, window.channels] if window is not None else [a_row, p.depth]
    out_size = ep.out.numpy.itemsize
    # Every pair begins at a multiple of a row's length, or at a group's first channel.
    a_piece = math.gcd(16, *(n * size for n in whole_rows))
    out_piece = math.gcd(16, p.out_row * out_size, p.columns * out_size)
    constants: dict[str, object] = {
        "HALF": half, "A_SIGNED": p.a_dtype is DType.INT8,
        "B_SIGNED": p.weights is not None or p.b_dtype is DType.INT8,
        "M": p.rows, "N": p.columns, "K": p.depth, "KP": kp, "NP": np_,
        "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "WM": tile.wm, "WN": tile.wn,
        "STAGES": tile.stages, "A_ROW": a_row, "CG": channels,
        "A_PIECE": a_piece if a_piece >= 4 else 1,
        "B_PIECE": max(1, math.gcd(16, p.depth * size)) if p.depth * size % 4 == 0 else 1,
        "PACKED4": packed4, "B_PADDED": p.weights is not None,
        "ROW_SUMS": row_sums,
        "COLUMN_SUMS": not half and p.weights is None and p.a_zero != 0,
        "ZA": p.a_zero, "CORRECTION": _wrapped(correction),
        "BIAS": bias is not None, "RESIDUAL": p.residual is not None, "SCALE_ROW": scale_row,
        "TO_FLOAT": ep.out is DType.FLOAT32, "RES_ZERO": ep.residual_zero,
        "RES_SCALE": float(ep.residual_scale), "LO": float(ep.low), "HI": float(ep.high),
        "ZERO": ep.zero,
        "SCALE": 0.0 if ep.scale is None or scale_row else float(ep.scale.reshape(-1)[0]),
        "OUT_STRIDE": p.out_row, "OUT_PIECE": out_piece,
        "GROUP_ROWS": 8,
    }  # fmt: skip
    constants |= window.constants() if window is not None else _NO_WINDOW
    res = c_type(ep.residual) if ep.residual is not None else c_type(ep.out)
    types = {
        "A": "qc_u16" if half else c_type(p.a_dtype),
        "B": "qc_u16" if half else c_type(p.b_dtype),
        "OUT": c_type(ep.out),
        "OUT_TYPE": c_type(ep.out),
        "RES": res,
    }
    functions = [
        f"int a_offset(int z) {{ return {p.a_offset}; }}",
        f"int b_offset(int z) {{ return {b_offset}; }}",
        f"int c_offset(int z) {{ return {p.c_offset}; }}",
        f"int n_offset(int z) {{ return {p.n_offset}; }}",
        f"int y_offset(int z) {{ return {p.y_offset}; }}",
        f"int x_offset(int z) {{ return {p.x_offset}; }}",
    ]
    base = "qc_half_epilogue" if half else "qc_int_epilogue"
    text = struct(base, types, constants, functions)
    parameters = (
        f"const {types['A']}* a, const void* b, const {res}* residual, const void* bias, "
        f"const float* multiplier, const int* b_zero, const void* pad, {types['OUT']}* out"
    )
    body = f"  qc_product<{NAME}_p>(a, b, residual, bias, multiplier, b_zero, pad, out);"
    # Two blocks on a multiprocessor hide each other's waits, where registers do for both; Turing
    # has two buffers only, and reads the next step through registers.
    room = tile.wm * tile.wn <= 2048 and tile.bk < 128 and not _has_sums(p)
    at_once = 2 if arch.async_copies and room else 1
    text += "\n" + entry(parameters, tile.threads, body, at_once)
    blocks = -(-p.rows // tile.bm) * -(-p.columns // tile.bn)
    arguments: tuple[Argument, ...] = (
        p.a, b,
        pad if p.residual is None else p.residual,
        pad if bias is None else bias,
        pad if multiplier is None else multiplier,
        pad if b_zero is None else b_zero,
        pad,
    )  # fmt: skip
    kind = ("conv" if p.window is not None else "matmul") + ("_f16" if half else "")
    kind += "_w4" if packed4 else ""
    return Launch(
        KernelText(kind, text, ("product.cuh",)), (blocks, p.batch, 1), tile.threads, arguments,
        p.result, tile.shared(packed4=packed4, out_bytes=out_size), p.macs,
    )  # fmt: skip


_NO_WINDOW: dict[str, object] = {
    "IH": 1, "IW": 1, "C": 1, "OH": 1, "OW": 1, "KH": 0, "KW": 0, "SH": 1, "SW": 1, "PH": 0,
    "PW": 0, "DH": 1, "DW": 1,
}  # fmt: skip


def _wrapped(value: int) -> int:
    """Return an integer modulo 2**32 as int32."""
    return (value + (1 << 31)) % (1 << 32) - (1 << 31)


def _packed_weights(
    p: Product, np_: int, kp: int, packed4: bool, size: int
) -> tuple[Array, str, int]:
    assert p.weights is not None
    w = np.zeros((p.batch, np_, kp), p.weights.dtype)
    w[:, : p.columns, : p.depth] = p.weights
    stride = np_ * kp * size
    if packed4:
        w, stride = pack4(w), stride // 2
    return w, f"z * {stride}" if p.batch > 1 else "0", 0


def _folded_bias(p: Product, count: int, kp: int) -> Array | None:
    """Return the bias that also takes off what the zero points contribute.

    sum (a - za) (w - zw) = sum a w - zw sum a - za sum w + KP za zw, where `a` is za in padding,
    and w is 0 in the columns that pad K; the term with sum a is the kernel's (ROW_SUMS).
    """
    assert p.weights is not None
    bias = p.epilogue.bias
    if p.a_dtype is DType.FLOAT16:
        return bias
    zero = np.broadcast_to(p.b_zero.reshape(-1), (count,)).astype(np.int64)
    total = -p.a_zero * p.weights.astype(np.int64).sum(axis=-1).reshape(-1)
    total = total + kp * p.a_zero * zero
    if bias is not None:
        total = total + bias.reshape(-1).astype(np.int64)
    if bias is None and not total.any():
        return None
    return np.asarray(total.astype(np.int32))


def float_product_launch(p: Product) -> Launch:
    """Return the launch of a product in float32, without tensor cores."""
    ep = p.epilogue
    window = p.window
    bounded = (ep.low > -MAX_FLOAT, ep.high < MAX_FLOAT)
    constants: dict[str, object] = {
        "M": p.rows, "N": p.columns, "K": p.depth, "A_ROW": p.a_row,
        "CG": p.depth // (window.kh * window.kw) if window is not None else p.depth,
        "BIAS": ep.bias is not None, "RESIDUAL": p.residual is not None,
        "CLAMP_LOW": bounded[0], "CLAMP_HIGH": bounded[1], "LO": float(ep.low),
        "HI": float(ep.high), "OUT_STRIDE": p.out_row,
    }  # fmt: skip
    constants |= window.constants() if window is not None else _NO_WINDOW
    if p.weights is not None:
        b: Argument = np.ascontiguousarray(p.weights, np.float32)
        b_offset = f"z * {p.columns * p.depth}" if p.batch > 1 else "0"
    else:
        assert p.b is not None
        b, b_offset = p.b, p.b_offset
    functions = [
        f"int a_offset(int z) {{ return {p.a_offset}; }}",
        f"int b_offset(int z) {{ return {b_offset}; }}",
        f"int c_offset(int z) {{ return {p.c_offset}; }}",
        f"int n_offset(int z) {{ return {p.n_offset}; }}",
    ]
    text = struct("", {}, constants, functions) + "\n"
    text += entry(
        "const float* a, const float* b, const float* residual, const float* bias, float* out",
        256, f"  qc_float_product<{NAME}_p>(a, b, residual, bias, out);",
    )  # fmt: skip
    none = np.zeros(1, np.float32)
    arguments: tuple[Argument, ...] = (
        p.a, b, none if p.residual is None else p.residual,
        none if ep.bias is None else ep.bias.astype(np.float32),
    )  # fmt: skip
    grid = (-(-p.rows // 64), -(-p.columns // 64), p.batch)
    kind = "conv_f32" if window is not None else "matmul_f32"
    kernel = KernelText(kind, text, ("float_product.cuh",))
    return Launch(kernel, grid, 256, arguments, p.result, 2 * 16 * 68 * 4, p.macs)
