# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Rows of the lowering table: elementwise operators, casts, tables and movement."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from qcompiler import numerics
from qcompiler.ir import Node, Value
from qcompiler.ops import _resize
from qcompiler.ops.movement import slices
from qcompiler.targets.cuda.lower_rows import result_text
from qcompiler.targets.cuda.lowering import (
    EIGHT_BITS,
    FLOATS,
    Answer,
    Maker,
    grid,
    row,
    scalar,
)
from qcompiler.targets.cuda.maps import THREADS, Operand, broadcast_strides, map_launch, row_major
from qcompiler.targets.cuda.program import Argument, Launch, Status
from qcompiler.targets.cuda.source import KernelText, c_type, entry, literal
from qcompiler.types import WIDENED, Array, DType, QuantParams, Shape


def source(v: Value) -> Argument:
    """Return where a value's elements are: a parameter for a constant."""
    return v.array() if v.is_constant else v


def plain(v: Value, shape: Shape) -> Operand:
    """Return a contiguous operand broadcast to a shape."""
    return Operand(source(v), v.dtype, broadcast_strides(v.shape, shape))


def result(v: Value) -> Operand:
    """Return the contiguous result."""
    return Operand(v, v.dtype, row_major(v.shape))


def simple(node: Node, expression: str, extra: list[tuple[str, Argument]] | None = None) -> Answer:
    """Return the map of a node over its operands, broadcast, in order."""
    out = node.output
    operands = [plain(v, out.shape) for v in node.operands[: 3 if extra is None else 1]]
    return (
        map_launch(node.op.name, out.shape, out, result(out), operands, expression, extra or ()),
    )


# ------------------------------------------------------------------------------- quantization


@row("quantize")
def _quantize(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    q = out.qparams
    if q is None or out.dtype.bits > 16 or x.dtype not in FLOATS:
        return f"it makes {out.type} of {x.type}: 16 bits or less of floats are supported"
    if q.is_per_tensor:
        return simple(node, result_text(out, f"__fdiv_rn(a, {literal(q.s)})"))
    low, high = (f"static_cast<float>({bound} - c)" for bound in (q.qmin, q.qmax))
    value = f"qc_as<{c_type(out.dtype)}>::of(qc_quantized(__fdiv_rn(a, b), {low}, {high}, c))"
    operands = [plain(x, out.shape), *_spread(q, out.shape)]
    return (map_launch("quantize", out.shape, out, result(out), operands, value),)


def _spread(q: QuantParams, shape: Shape) -> tuple[Operand, Operand]:
    """Return scales and zero points as operands of a map over a tensor of a shape."""
    scale, zero = (np.ascontiguousarray(v) for v in numerics.expanded(q, shape))
    return (
        Operand(scale, DType.FLOAT32, broadcast_strides(scale.shape, shape)),
        Operand(zero, DType.INT32, broadcast_strides(zero.shape, shape)),
    )


@row("dequantize")
def _dequantize(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    q = x.qparams
    if q is None or x.dtype.bits > 32:
        return f"its operand is {x.type}"
    centred = "__ll2float_rn(static_cast<qc_i64>(a) - {})"
    if x.dtype.bits <= 16:
        centred = "__int2float_rn(static_cast<int>(a) - ({}))"
    if q.is_per_tensor:
        return simple(node, f"__fmul_rn({centred.format(q.z)}, {literal(q.s)})")
    operands = [plain(x, out.shape), *_spread(q, out.shape)]
    text = f"__fmul_rn({centred.format('c')}, b)"
    return (map_launch("dequantize", out.shape, out, result(out), operands, text),)


@row("requantize")
def _requantize(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    q, o = grid(x), grid(out)
    if q is None or o is None:
        return f"it turns {x.type} into {out.type}: one scale and 8 or 16 bits are supported"
    m = literal(scalar(q.s, over=o.s))
    value = f"__fmul_rn(__int2float_rn(static_cast<int>(a) - ({q.z})), {m})"
    return simple(node, result_text(out, value))


@row("qadd", "qsub", "qmul")
def _qbinary(make: Maker, node: Node) -> Answer:
    a, b, out = node.input(0), node.input(1), node.output
    qa, qb, o = grid(a), grid(b), grid(out)
    if qa is None or qb is None or (o is None and out.dtype is not DType.FLOAT32):
        return f"it combines {a.type} and {b.type} into {out.type}"
    over = 1.0 if o is None else o.s
    ca = f"(static_cast<int>(a) - ({qa.z}))"
    cb = f"(static_cast<int>(b) - ({qb.z}))"
    if node.op.name == "qmul":
        m = literal(scalar(qa.s, qb.s, over=over))
        value = f"__fmul_rn(__int2float_rn(qc_wrap_mul({ca}, {cb})), {m})"
    else:
        ma, mb = literal(scalar(qa.s, over=over)), literal(scalar(qb.s, over=over))
        step = "__fadd_rn" if node.op.name == "qadd" else "__fsub_rn"
        value = (
            f"{step}(__fmul_rn(__int2float_rn({ca}), {ma}), __fmul_rn(__int2float_rn({cb}), {mb}))"
        )
    return simple(node, result_text(out, value))


@row("table")
def _table(make: Maker, node: Node) -> Answer:
    x, entries = node.input(0), node.input(1)
    if x.dtype not in EIGHT_BITS or not entries.is_constant:
        return f"its operand is {x.type}, expected 8 bits and constant entries"
    at = f"static_cast<int>(a) - ({x.dtype.min})"
    return simple(node, f"e0[{at}]", [(f"const {c_type(entries.dtype)}*", entries.array())])


# --------------------------------------------------------------------------------- float maps

# Functions of a float32 `a`; A, B and G stand for the attributes alpha, beta and gamma.
_UNARY = {
    "sigmoid": "1.0f / (1.0f + expf(-a))",
    "tanh": "tanhf(a)",
    "erf": "erff(a)",
    "silu": "a / (1.0f + expf(-a))",
    "exp": "expf(a)",
    "log": "logf(a)",
    "sqrt": "__fsqrt_rn(a)",
    "floor": "floorf(a)",
    "ceil": "ceilf(a)",
    "round": "rintf(a)",
    "sin": "sinf(a)",
    "cos": "cosf(a)",
    "tan": "tanf(a)",
    "sinh": "sinhf(a)",
    "cosh": "coshf(a)",
    "asin": "asinf(a)",
    "acos": "acosf(a)",
    "atan": "atanf(a)",
    "asinh": "asinhf(a)",
    "acosh": "acoshf(a)",
    "atanh": "atanhf(a)",
    "reciprocal": "__fdiv_rn(1.0f, a)",
    "leaky_relu": "a < 0.0f ? a * A : a",
    "hard_sigmoid": "qc_max()(qc_min()(__fadd_rn(__fmul_rn(a, A), B), 1.0f), 0.0f)",
    "hard_swish": "a * qc_max()(qc_min()(a * 0x1.555556p-3f + 0.5f, 1.0f), 0.0f)",
    "elu": "a < 0.0f ? A * expm1f(a) : a",
    "selu": "a > 0.0f ? G * a : G * A * expm1f(a)",
    "celu": "fmaxf(a, 0.0f) + fminf(0.0f, A * expm1f(fminf(a, 0.0f) / A))",
    "softplus": "fmaxf(a, 0.0f) + log1pf(expf(-fabsf(a)))",
    "softsign": "a / (1.0f + fabsf(a))",
    "thresholded_relu": "a > A ? a : 0.0f",
    "mish": "a * tanhf(fmaxf(a, 0.0f) + log1pf(expf(-fabsf(a))))",
}
_ATTRIBUTES = {"A": "alpha", "B": "beta", "G": "gamma"}


@row(*_UNARY)
def _unary(make: Maker, node: Node) -> Answer:
    if node.input(0).dtype not in FLOATS:
        return f"no kernel takes {node.input(0).dtype.value}"
    return simple(
        node,
        re.sub(
            r"\b[ABG]\b",
            lambda m: literal(float(node.attr(_ATTRIBUTES[m.group()]))),
            _UNARY[node.op.name],
        ),
    )


@row("gelu")
def _gelu(make: Maker, node: Node) -> Answer:
    if node.input(0).dtype not in FLOATS:
        return f"no kernel takes {node.input(0).dtype.value}"
    if node.attr("approximate") == "tanh":
        inner = f"{literal(math.sqrt(2 / math.pi))} * (a + {literal(0.044715)} * a * a * a)"
        return simple(node, f"0.5f * a * (1.0f + tanhf({inner}))")
    return simple(node, f"0.5f * a * (1.0f + erff(a * {literal(math.sqrt(0.5))}))")


@row("relu", "clip", "neg", "abs", "sign")
def _numeric(make: Maker, node: Node) -> Answer:
    x, name = node.input(0), node.op.name
    real = x.dtype in FLOATS

    def number(value: Any) -> str:
        if real:
            return literal(float(value))
        return repr(float(value)) if x.dtype is DType.FLOAT64 else f"{c_type(x.dtype)}({value})"

    if name in ("relu", "clip"):
        low, high = (0, None) if name == "relu" else (node.attr("min"), node.attr("max"))
        text = "a"
        if low is not None:
            text = f"qc_max()({text}, {number(low if real else int(low))})"
        if high is not None:
            text = f"qc_min()({text}, {number(high if real else int(high))})"
        return simple(node, text)
    zero = number(0)
    return simple(node, {
        "neg": "-a",
        "abs": f"(a < {zero} ? -a : a)" if not real else "fabsf(a)",
        "sign": f"(a > {zero} ? {number(1)} : a < {zero} ? {number(-1)} : a)",
    }[name])  # fmt: skip


_ARITHMETIC = {
    "add": "a + b",
    "sub": "a - b",
    "mul": "a * b",
    "max": "qc_max()(a, b)",
    "min": "qc_min()(a, b)",
    "prelu": "a < 0 ? a * b : a",
}
_COMPARE = {
    "equal": "a == b",
    "less": "a < b",
    "less_or_equal": "a <= b",
    "greater": "a > b",
    "greater_or_equal": "a >= b",
    "and": "a && b",
    "or": "a || b",
    "xor": "!a != !b",
}


@row(*_ARITHMETIC, *_COMPARE, "div", "mod", "pow")
def _binary(make: Maker, node: Node) -> Answer:
    name, a = node.op.name, node.input(0)
    text = _ARITHMETIC.get(name) or _COMPARE.get(name)
    real, double = a.dtype in FLOATS, a.dtype is DType.FLOAT64
    if name == "div":
        text = "__fdiv_rn(a, b)" if real else "a / b" if double else "b == 0 ? a : a / b"
    elif name == "mod":
        fmod = bool(node.attr("fmod"))
        if a.dtype.is_float:
            remainder = "fmodf(a, b)" if real else "fmod(a, b)"
            other_sign = f"{remainder} != 0 && ({remainder} < 0) != (b < 0)"
            text = remainder if fmod else f"{remainder} + ({other_sign} ? b : 0)"
        else:
            text = "b == 0 ? 0 : a % b" if fmod else "b == 0 ? 0 : (a % b + b) % b"
    elif name == "pow":
        if not real:
            return f"no kernel takes {a.dtype.value}"
        text = "powf(a, static_cast<float>(b))"
    assert text is not None  # one of the tables has every other operator
    return simple(node, text)


@row("where")
def _where(make: Maker, node: Node) -> Answer:
    return simple(node, "a ? b : c")


@row("not")
def _not(make: Maker, node: Node) -> Answer:
    return simple(node, "!a")


@row("isnan")
def _isnan(make: Maker, node: Node) -> Answer:
    return simple(node, "a != a")


@row("isinf")
def _isinf(make: Maker, node: Node) -> Answer:
    parts = []
    if node.attr("detect_positive"):
        parts.append("(a > 0 && a - a != a - a && a == a)")
    if node.attr("detect_negative"):
        parts.append("(a < 0 && a - a != a - a && a == a)")
    return simple(node, " || ".join(parts) or "false")


@row("cast")
def _cast(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if DType.BFLOAT16 in (x.dtype, out.dtype):
        return "no kernel takes bfloat16"
    if out.dtype is DType.BOOL:
        return simple(node, "a != 0")
    if out.dtype in WIDENED:
        whole = "a"
        if x.dtype.is_float:  # beyond 2**57 doubles are multiples of 16, and floats long before
            far = float(1 << 57) if x.dtype is DType.FLOAT64 else float(1 << 28)
            whole = f"(fabs(static_cast<double>(a)) < {far} ? a : {c_type(x.dtype)}(0))"
        low = f"(static_cast<qc_i64>({whole}) & 15)"
        return simple(node, f"({low} ^ 8) - 8" if out.dtype is DType.INT4 else low)
    if x.dtype.is_float and out.dtype.is_integer:
        return simple(node, "static_cast<qc_i64>(a)")
    return simple(node, "a")


@row("batch_norm")
def _batch_norm(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    if x.dtype is not DType.FLOAT32 or any(not v.is_constant for v in node.operands[1:]):
        return "it is float32 with constant statistics only"
    scale, bias, mean, var = (v.array().astype(np.float32) for v in node.operands[1:])
    factor = scale / np.sqrt(var + np.float32(node.attr("epsilon")))
    strides = tuple(1 if d == 1 else 0 for d in range(x.type.rank))
    operands = [plain(x, out.shape)]
    operands += [Operand(v, DType.FLOAT32, strides) for v in (mean, factor, bias)]
    text = "__fadd_rn(__fmul_rn(__fsub_rn(a, b), c), d)"
    return (map_launch("batch_norm", out.shape, out, result(out), operands, text),)


# ----------------------------------------------------------------------------------- movement


def _moved(node: Node, x: Operand, shape: Shape) -> Answer:
    out = node.output
    return (map_launch(node.op.name, shape, out, result(out), [x], "a"),)


@row("transpose")
def _transpose(make: Maker, node: Node) -> Answer:
    x = node.input(0)
    own = row_major(x.shape)
    strides = tuple(own[p] for p in node.attr("perm"))
    return _moved(node, Operand(source(x), x.dtype, strides), node.output.shape)


@row("expand")
def _expand(make: Maker, node: Node) -> Answer:
    return _moved(node, plain(node.input(0), node.output.shape), node.output.shape)


@row("slice")
def _slice(make: Maker, node: Node) -> Answer:
    x = node.input(0)
    own = row_major(x.shape)
    picks = [
        s.indices(n) for s, n in zip(slices("slice", x.shape, node.attrs), x.shape, strict=True)
    ]
    strides = tuple(s * step for s, (_, _, step) in zip(own, picks, strict=True))
    offset = sum(s * start for s, (start, _, _) in zip(own, picks, strict=True))
    return _moved(node, Operand(source(x), x.dtype, strides, offset), node.output.shape)


def _by_index(node: Node, index: dict[int, Array], fill: str = "0") -> Answer:
    """Return the map that takes, along some axes, elements by index (-1: the fill)."""
    x, out = node.input(0), node.output
    own = row_major(x.shape)
    tables = {
        axis: tuple(int(i) * own[axis] if i >= 0 else -1 for i in found)
        for axis, found in index.items()
    }
    operand = Operand(source(x), x.dtype, own, 0, tables, fill)
    return _moved(node, operand, out.shape)


@row("tile")
def _tile(make: Maker, node: Node) -> Answer:
    x = node.input(0)
    repeats = node.attr("repeats")
    index = {
        axis: np.tile(np.arange(n), times)
        for axis, (n, times) in enumerate(zip(x.shape, repeats, strict=True))
        if times != 1
    }
    return _by_index(node, index)


@row("pad")
def _pad(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    pads, mode, rank = node.attr("pads"), node.attr("mode"), x.type.rank
    index: dict[int, Array] = {}
    for axis, n in enumerate(x.shape):
        before, after = pads[axis], pads[rank + axis]
        if not before and not after:
            continue
        kept = np.arange(n)[max(0, -before) : n + min(0, after)]
        width = (max(0, before), max(0, after))
        if mode == "constant":
            index[axis] = np.pad(kept, width, constant_values=-1)
        else:
            index[axis] = np.pad(kept, width, mode=mode)
    value = float(node.attr("value"))
    q = out.qparams
    if q is not None:
        fill = str(int(np.clip(np.rint(value / q.s) + q.z, q.qmin, q.qmax)))
    elif out.dtype is DType.FLOAT16:
        fill = f"{{{int(np.float16(value).view(np.uint16))}}}"
    else:
        fill = literal(value) if out.dtype is DType.FLOAT32 else str(int(value))
    return _by_index(node, index, fill)


@row("resize")
def _resize_nearest(make: Maker, node: Node) -> Answer:
    if node.attr("mode") != "nearest":
        return f"no kernel interpolates ({node.attr('mode')})"
    x = node.input(0)
    index: dict[int, Array] = {}
    for axis, (n, out, scale) in enumerate(
        zip(x.shape, node.attr("shape"), node.attr("scales"), strict=True)
    ):
        if out == n and scale == 1:
            continue
        positions = _resize.source_positions(n, out, scale, str(node.attr("coordinate_mode")))
        index[axis] = _resize.nearest_indices(positions, n, str(node.attr("nearest_mode")))
    return _by_index(node, index)


@row("depth_to_space", "space_to_depth")
def _blocks(make: Maker, node: Node) -> Answer:
    x, out = node.input(0), node.output
    last = node.attr("layout") == "NHWC"
    b = int(node.attr("blocksize"))
    inward = node.op.name == "depth_to_space"
    deep = x if inward else out
    n, h, w, c = deep.shape if last else (deep.shape[0], *deep.shape[2:], deep.shape[1])
    d = c // (b * b)
    sn, sh, sw, sc = row_major(deep.shape) if last else _moved_axis(row_major(deep.shape))
    # Where depth lies in channels: DCR is (row, column, depth); space_to_depth has that order too.
    crd = inward and node.attr("mode") == "CRD"
    s_row, s_column, s_depth = (b, 1, b * b) if crd else (b * d, d, 1)
    # Coordinates of the shallow image: n, y, block row, x, block column, depth (layout order).
    axes = {"n": (n, sn), "h": (h, sh), "i": (b, sc * s_row), "w": (w, sw),
            "j": (b, sc * s_column), "d": (d, sc * s_depth)}  # fmt: skip
    order = "nhiwjd" if last else "ndhiwj"
    shape = tuple(axes[a][0] for a in order)
    deep_strides = tuple(axes[a][1] for a in order)
    if inward:
        operand = Operand(source(x), x.dtype, deep_strides)
        to = Operand(out, out.dtype, row_major(shape))
    else:
        operand = Operand(source(x), x.dtype, row_major(shape))
        to = Operand(out, out.dtype, deep_strides)
    return (map_launch(node.op.name, shape, out, to, [operand], "a"),)


def _moved_axis(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (strides[0], *strides[2:], strides[1])


@row("concat")
def _concat(make: Maker, node: Node) -> Answer:
    out = node.output
    axis = node.attr("axis") % out.type.rank
    own = row_major(out.shape)
    launches: list[Launch] = []
    at = 0
    for v in node.operands:
        if v.type.size:
            to = Operand(out, out.dtype, own, at * own[axis])
            launches.append(map_launch("concat", v.shape, out, to, [plain(v, v.shape)], "a"))
        at += v.shape[axis]
    return tuple(launches)


@row("gather")
def _gather(make: Maker, node: Node) -> Answer:
    x, indices, out = node.input(0), node.input(1), node.output
    axis = node.attr("axis") % x.type.rank
    inner, extent, count = math.prod(x.shape[axis + 1 :]), x.shape[axis], indices.type.size
    total = out.type.size
    ctype, itype = c_type(x.dtype), c_type(indices.dtype)
    v = math.gcd(inner, max(1, 16 // x.dtype.numpy.itemsize))
    body = f"""  const int at = static_cast<int>(blockIdx.x * {THREADS} + threadIdx.x) * {v};
  if (at >= {total}) return;
  const int rest = at / {inner};
  qc_i64 index = static_cast<qc_i64>(indices[rest % {count}]);
  if (index < -{extent} || index >= {extent}) {{
    atomicMax(status, 1);
    index = 0;
  }}
  if (index < 0) index += {extent};
  const int from = (rest / {count} * {extent} + static_cast<int>(index)) * {inner} + at % {inner};
  qc_store<{v}>(y + at, qc_load<{v}>(x + from));"""
    text = entry(
        f"const {ctype}* __restrict__ x, const {itype}* __restrict__ indices, int* status, "
        f"{ctype}* __restrict__ y", THREADS, body,
    )  # fmt: skip
    grid_ = (-(-total // (THREADS * v)), 1, 1)
    arguments = (source(x), source(indices), Status())
    return (Launch(KernelText("gather", text), grid_, THREADS, arguments, out),)
