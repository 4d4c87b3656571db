# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import erf as exact_erf

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels import fmath
from qcompiler.targets.kernels.harness import assembly, build, run
from qcompiler.targets.kernels.pointwise import (
    ClipWorkload,
    DequantizeWorkload,
    FloatBinaryWorkload,
    FloatUnaryWorkload,
    QBinaryWorkload,
    QuantizeChainWorkload,
    QuantizeWorkload,
    RequantizeWorkload,
    TableWorkload,
    clip,
    collapse,
    dequantize,
    float_binary,
    float_unary,
    pack_table,
    qbinary,
    quantize,
    quantize_chain,
    requantize,
    table,
)

# The AVX-VNNI row adds only a dot product, so here it makes the code of the AVX2 row.
ROWS = [row for row in ISA_TABLE.values() if runnable(row) and row.name != "x86-avxvnni"]
X86 = [row for row in ISA_TABLE.values() if row.architecture == "x86_64"]
RANGES = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
F = np.float32
few = settings(max_examples=6, deadline=None)
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)


def quantized(real: np.ndarray, zero_point: int, qmin: int, qmax: int, dtype: str) -> np.ndarray:
    return np.clip(np.rint(real).astype(np.float64) + zero_point, qmin, qmax).astype(dtype)


def codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    low, high = RANGES[dtype]
    values = rng.integers(low, high, shape, endpoint=True)
    values = np.asarray(values)
    values.flat[: min(2, values.size)] = [low, high][: min(2, values.size)]
    return values.astype(dtype)


@st.composite
def out_ranges(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A storage dtype, a zero point and a clamp range within it."""
    dtype = draw(st.sampled_from(sorted(RANGES)))
    low, high = RANGES[dtype]
    zero_point = draw(st.integers(low, high))
    if draw(st.booleans()):
        return dtype, zero_point, low, high
    qmin = draw(st.integers(low, high))
    return dtype, zero_point, qmin, draw(st.integers(qmin, high))


seeds = st.integers(0, 2**31)
sizes = st.one_of(st.integers(1, 200), st.sampled_from([1024, 4096 + 3]))


@rows
@few
@given(
    size=sizes,
    out=out_ranges(),
    scale=st.sampled_from([1e-6, 0.1, 0.25, 1 / 3, 7.0, 1e6]),
    seed=seeds,
)
def test_quantize_equals_the_definition(isa, size, out, scale, seed):
    dtype, zero_point, qmin, qmax = out
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=size) * 200 * scale).astype(F)
    x[rng.integers(0, size)] = F(scale) * F(2.5)  # often a tie
    odd = [np.nan, np.inf, -np.inf, 3e38, -0.0]
    x.flat[: min(5, size)] = odd[: min(5, size)]
    w = QuantizeWorkload((size,), scale, zero_point, dtype, qmin, qmax)
    got = run(build(quantize(w, isa), isa), x, shape=(size,), dtype=dtype)
    with np.errstate(over="ignore"):
        real = np.nan_to_num(x / F(scale), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        want = quantized(real, zero_point, qmin, qmax, dtype)
    np.testing.assert_array_equal(got, want)


@rows
@few
@given(
    names=st.lists(
        st.sampled_from(["add", "sub", "mul", "div", "round", "relu"]), min_size=1, max_size=5
    ),
    axes=st.integers(0, 7),
    out=out_ranges(),
    seed=seeds,
)
def test_steps_before_a_quantize_are_rounded_one_by_one(isa, names, axes, out, seed):
    dtype, zero_point, qmin, qmax = out
    rng = np.random.default_rng(seed)
    shape = (3, 5, 19)
    by = tuple(d if axes >> i & 1 else 1 for i, d in enumerate(shape))
    x = (rng.normal(size=shape) * 100).astype(F)
    x.flat[:5] = [np.nan, np.inf, -np.inf, 3e38, -0.0]
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
    real, constants, steps = x, [], []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            if name not in functions:
                real = np.rint(real) if name == "round" else np.maximum(real, F(0))
                steps.append((name, None))
                continue
            constants.append(rng.uniform(0.5, 3, by).astype(F))
            steps.append((name, by))
            real = functions[name](real, constants[-1])
        scale = 0.37
        w = QuantizeWorkload(shape, scale, zero_point, dtype, qmin, qmax)
        prim = quantize_chain(QuantizeChainWorkload(w, tuple(steps)), isa)
        got = run(build(prim, isa), x, *constants, shape=shape, dtype=dtype)
        real = np.nan_to_num(real / F(scale), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        want = quantized(real, zero_point, qmin, qmax, dtype)
    if "relu" in names:  # what a relu makes of NaN is not the same everywhere
        got, want = got.reshape(-1)[1:], want.reshape(-1)[1:]
    np.testing.assert_array_equal(got, want)


@rows
@few
@given(
    size=sizes,
    dtype=st.sampled_from(sorted(RANGES)),
    out=out_ranges(),
    factor=st.floats(2**-13, 2**13, width=32),
    seed=seeds,
)
def test_requantize_and_dequantize_equal_the_definition(isa, size, dtype, out, factor, seed):
    to, zero_point, qmin, qmax = out
    rng = np.random.default_rng(seed)
    q = codes(rng, (size,), dtype)
    zero = int(codes(rng, (3,), dtype)[2])
    w = RequantizeWorkload((size,), dtype, zero, factor, to, zero_point, qmin, qmax)
    real = (q.astype(np.int32) - zero).astype(F) * F(factor)
    got = run(build(requantize(w, isa), isa), q, shape=(size,), dtype=to)
    np.testing.assert_array_equal(got, quantized(real, zero_point, qmin, qmax, to))
    back = DequantizeWorkload((size,), dtype, factor, zero)
    got = run(build(dequantize(back, isa), isa), q, shape=(size,), dtype="float32")
    np.testing.assert_array_equal(got, real)


BROADCASTS = [
    ((37,), (37,)),
    ((3, 5, 67), (67,)),
    ((2, 4, 4, 40), (2, 1, 1, 40)),
    ((2, 3, 70), ()),
    ((1,), (5, 3)),
    ((4, 1, 6), (1, 5, 6)),
    ((3, 5, 1), (3, 1, 33)),
    ((1, 40, 64, 64), (1, 40, 1, 1)),
    ((), ()),
]
factors = st.floats(2**-10, 2, width=32)


@rows
@few
@given(
    operation=st.sampled_from(["add", "sub", "mul"]),
    shapes=st.sampled_from(BROADCASTS),
    a_dtype=st.sampled_from(sorted(RANGES)),
    b_dtype=st.sampled_from(sorted(RANGES)),
    out=st.one_of(st.none(), out_ranges()),
    multipliers=st.tuples(factors, factors),
    swap=st.booleans(),
    seed=seeds,
)
def test_qbinary_equals_the_definition(
    isa, operation, shapes, a_dtype, b_dtype, out, multipliers, swap, seed
):
    rng = np.random.default_rng(seed)
    a_shape, b_shape = shapes[::-1] if swap else shapes
    a, b = codes(rng, a_shape, a_dtype), codes(rng, b_shape, b_dtype)
    za, zb = int(codes(rng, (3,), a_dtype)[2]), int(codes(rng, (3,), b_dtype)[2])
    to, zero_point, qmin, qmax = out or ("float32", 0, 0, 0)
    w = QBinaryWorkload(
        operation, a_shape, b_shape, a_dtype, b_dtype, za, zb, *multipliers,
        to, zero_point, qmin, qmax,
    )  # fmt: skip
    ca, cb = a.astype(np.int32) - np.int32(za), b.astype(np.int32) - np.int32(zb)
    ma, mb = F(multipliers[0]), F(multipliers[1])
    if operation == "mul":
        with np.errstate(over="ignore"):
            real = (ca * cb).astype(F) * ma
    elif operation == "add":
        real = ca.astype(F) * ma + cb.astype(F) * mb
    else:
        real = ca.astype(F) * ma - cb.astype(F) * mb
    want = np.asarray(real if out is None else quantized(real, zero_point, qmin, qmax, to))
    got = run(build(qbinary(w, isa), isa), a, b, shape=want.shape, dtype=to)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("isa", X86, ids=lambda row: row.name)
def test_qadd_is_never_fused(isa):
    w = QBinaryWorkload("add", (512,), (512,), "uint8", "uint8", 3, 5, 0.1, 0.3, "uint8", 7, 0, 255)
    text = assembly(build(qbinary(w, isa), isa))
    assert "mulps" in text
    assert "fmadd" not in text


@rows
@pytest.mark.parametrize("in_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "float32"])
@pytest.mark.parametrize("size", [63, 1000])
def test_table_equals_the_entries(isa, in_dtype, dtype, size):
    rng = np.random.default_rng(size)
    entries = rng.integers(-128 if dtype != "uint8" else 0, 128, 256).astype(dtype)
    x = codes(rng, (size,), in_dtype)
    x[:256] = np.arange(256, dtype=np.uint8)[:size].view(in_dtype)
    w = TableWorkload((size,), in_dtype, dtype)
    packed = pack_table(entries, w, isa)
    got = run(build(table(w, isa), isa), x, packed, shape=(size,), dtype=dtype)
    np.testing.assert_array_equal(got, entries[x.astype(int) - RANGES[in_dtype][0]])


def test_pack_table_rejects_another_length():
    w = TableWorkload((4,), "uint8", "uint8")
    with pytest.raises(CodegenError, match=r"expected 256 entries, got shape \(255,\)"):
        pack_table(np.zeros(255, np.uint8), w, ISA_TABLE["x86-64"])


@rows
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 3, 200), ("int8", -5, None), ("int16", None, 99), ("float32", 0.0, 6.0)],
)
def test_clip(isa, dtype, low, high):
    x = np.random.default_rng(1).integers(-128, 128, (7, 31)).astype(np.int8)
    x = x.view(dtype) if dtype.endswith("int8") else x.astype(dtype)
    library = build(clip(ClipWorkload((7, 31), dtype, low, high), isa), isa)
    got = run(library, x, shape=x.shape, dtype=dtype)
    np.testing.assert_array_equal(got, np.clip(x, low, high))


@rows
@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "max", "min"])
@pytest.mark.parametrize("shapes", BROADCASTS[:4])
def test_float_binary(isa, operation, shapes):
    rng = np.random.default_rng(0)
    a, b = (np.asarray(rng.normal(size=shape), F) for shape in shapes)
    numpy_name = {"add": "add", "sub": "subtract", "mul": "multiply", "div": "divide"}
    want = getattr(np, numpy_name.get(operation, f"{operation}imum"))(a, b)
    w = FloatBinaryWorkload(operation, *shapes, low=-1.0, high=1.5)
    got = run(build(float_binary(w, isa), isa), a, b, shape=want.shape, dtype="float32")
    np.testing.assert_allclose(got, np.clip(want, -1, 1.5), rtol=1e-7)


EXACT = {
    "abs": np.abs,
    "ceil": np.ceil,
    "elu": lambda x: np.where(x < 0, 0.7 * np.expm1(x), x),
    "erf": exact_erf,
    "exp": np.exp,
    "floor": np.floor,
    "gelu": lambda x: 0.5 * x * (1 + exact_erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "hard_sigmoid": lambda x: np.clip(0.7 * x + 0.3, 0, 1),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "leaky_relu": lambda x: np.where(x < 0, 0.7 * x, x),
    "log": np.log,
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "neg": np.negative,
    "reciprocal": lambda x: 1 / x,
    "relu": lambda x: np.maximum(x, 0),
    "round": np.rint,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(0, x),
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
ABSOLUTE = {"elu": 3e-7, "gelu": 3e-6, "gelu_tanh": 3e-6, "softplus": 3e-7, "mish": 1e-6}
ABSOLUTE |= {"hard_swish": 1e-6, "hard_sigmoid": 3e-7}


@rows
@pytest.mark.parametrize("function", sorted(fmath.FUNCTIONS))
def test_float_functions_are_close(isa, function):
    rng = np.random.default_rng(2)
    parts = [rng.normal(size=3000) * scale for scale in (1e-3, 1, 10)]
    x = np.concatenate([*parts, np.linspace(-8, 8, 1001)]).astype(F)
    if function in ("log", "sqrt"):
        x = np.abs(x) + F(1e-30)
    if function == "reciprocal":
        x[x == 0] = 1
    w = FloatUnaryWorkload(function, x.shape, 0.7, 0.3)
    got = run(build(float_unary(w, isa), isa), x, shape=x.shape, dtype="float32")
    want = EXACT[function](x.astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1.5e-6, atol=ABSOLUTE.get(function, 1e-37))


def unary(isa, function: str, x: np.ndarray) -> np.ndarray:
    library = build(float_unary(FloatUnaryWorkload(function, x.shape), isa), isa)
    return run(library, x, shape=x.shape, dtype="float32")


@rows
def test_exp_and_log_at_the_ends(isa):
    x = np.array([-np.inf, -200, -103, -90, -0.0, 88.7, 89, 200, np.inf], F)
    with np.errstate(over="ignore"):
        want = np.exp(x.astype(np.float64)).astype(F)
    np.testing.assert_allclose(unary(isa, "exp", x), want, rtol=1e-6, atol=3e-45)
    x = np.array([0, 1e-45, 1e-38, 1, np.inf, -1, 3e38, 0.7071067], F)
    with np.errstate(divide="ignore", invalid="ignore"):
        want = np.log(x.astype(np.float64))
    np.testing.assert_allclose(unary(isa, "log", x), want, rtol=1e-6, equal_nan=True)


def test_collapse_finds_the_fewest_axes():
    assert collapse((2, 4, 4, 40), [(2, 4, 4, 40), (2, 1, 1, 40)]) == (
        [2, 16, 40],
        [[640, 40, 1], [40, 0, 1]],
    )
    assert collapse((5, 6), [(5, 6), (5, 6)]) == ([30], [[1], [1]])
    assert collapse((1, 8, 3, 3), [(1, 8, 3, 3), (8, 1, 1)]) == ([8, 9], [[9, 1], [1, 0]])
    assert collapse((), [(), ()]) == ([1], [[0], [0]])


def test_unknown_names_are_refused():
    isa = ISA_TABLE["x86-64"]
    with pytest.raises(CodegenError, match="expected operation add, sub or mul, got 'pow'"):
        qbinary(QBinaryWorkload("pow", (1,), (1,), "uint8", "uint8", 0, 0, 1, 1, "uint8"), isa)
    chain = QuantizeChainWorkload(QuantizeWorkload((1,), 1, 0, "int8", -128, 127), (("pow", ()),))
    with pytest.raises(CodegenError, match=r"quantize_chain: expected one of .* got 'pow'"):
        quantize_chain(chain, isa)
    with pytest.raises(CodegenError, match=r"float_binary: expected one of .* got 'pow'"):
        float_binary(FloatBinaryWorkload("pow", (1,), (1,)), isa)
    with pytest.raises(CodegenError, match=r"float_unary: expected one of .* got 'cosh'"):
        float_unary(FloatUnaryWorkload("cosh", (1,)), isa)
