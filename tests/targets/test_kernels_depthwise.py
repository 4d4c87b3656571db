# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.errors import CodegenError
from qcompiler.targets.isa import ISA_TABLE, runnable
from qcompiler.targets.kernels.depthwise import (
    DepthwiseParams,
    build_depthwise,
    default_params,
    is_plain,
    pack_depthwise,
    space,
)
from qcompiler.targets.kernels.depthwise_float import build_float_depthwise, pack_float_depthwise
from qcompiler.targets.kernels.harness import assembly, build, run
from qcompiler.targets.kernels.workload import ConvWorkload, Epilogue, GemmValues

ROWS = [row for row in ISA_TABLE.values() if runnable(row)]
X86 = [row for row in ISA_TABLE.values() if row.architecture == "x86_64"]
LIMITS = {"uint8": (0, 255), "int8": (-128, 127), "int16": (-32768, 32767)}
F = np.float32
rows = pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)


def sums(w: ConvWorkload, centred: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Depthwise sums of NHWC activations whose zero is 0."""
    top, left, bottom, right = w.pads
    padded = np.pad(centred, ((0, 0), (top, bottom), (left, right), (0, 0)))
    padded = np.repeat(padded, w.co // w.c, axis=3)
    (sh, sw), (dh, dw) = w.strides, w.dilations
    total = np.zeros(w.out_shape, centred.dtype)
    for i in range(w.kh):
        for j in range(w.kw):
            rows_used = slice(i * dh, i * dh + (w.oh - 1) * sh + 1, sh)
            cols_used = slice(j * dw, j * dw + (w.ow - 1) * sw + 1, sw)
            total += padded[:, rows_used, cols_used] * weight[:, 0, i, j].astype(centred.dtype)
    return total


def reference(w, x, weight, v: GemmValues, residual) -> np.ndarray:
    acc = sums(w, x.astype(np.int64) - v.a_zero_point, weight) + v.bias
    acc = acc.astype(np.uint64).astype(np.uint32).view(np.int32)
    dtype = w.epilogue.out_dtype
    if dtype == "int32":
        return acc
    t = acc.astype(F) * np.asarray(v.multiplier, F)
    if dtype == "float32":
        return t
    if residual is not None:
        centred = (residual.astype(np.int32) - v.residual_zero_point).astype(F)
        t = t + centred * F(v.residual_multiplier)
    low, high = LIMITS[dtype]
    low, high = v.qmin if v.qmin is not None else low, v.qmax if v.qmax is not None else high
    return np.clip(np.rint(t).astype(np.float64) + v.zero_point, low, high).astype(dtype)


@st.composite
def workloads(draw: st.DrawFn) -> ConvWorkload:
    kernel = (draw(st.sampled_from([1, 2, 3, 3, 5])), draw(st.sampled_from([1, 3, 3, 5, 7])))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    dilations = (draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 2])))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    size = [r + draw(st.integers(0, 9)) for r in reach]
    pads = tuple(draw(st.integers(0, k - 1)) for k in (*kernel, *kernel))
    channels = draw(st.sampled_from([1, 3, 8, 16, 20, 24, 32, 72, 100, 144, 192]))
    multiplier = draw(st.sampled_from([1, 1, 1, 2, 3, 4]))
    dtype = draw(st.sampled_from(["uint8", "int8", "int16", "float32", "int32"]))
    residual = None
    if dtype in LIMITS:
        residual = draw(st.sampled_from([None, "uint8", "int8", "int16"]))
    return ConvWorkload(
        draw(st.integers(1, 2)), *size, channels, channels * multiplier, *kernel,
        Epilogue(dtype, residual), strides, pads, dilations, channels,
        draw(st.sampled_from(["uint8", "int8"])),
    )  # fmt: skip


def check(
    w: ConvWorkload, isa, params: DepthwiseParams, seed: int, *, extreme: bool, bits: int = 8
) -> None:
    rng = np.random.default_rng(seed)
    low, high = LIMITS[w.a_dtype]
    x = rng.integers(low, high, w.a_shape, endpoint=True).astype(w.a_dtype)
    weight = rng.integers(-128, 127, w.weight_shape, endpoint=True).astype(np.int8)
    if extreme:  # the largest sums, of either sign
        x[:] = low if seed % 2 else high
        weight[:] = np.where(np.arange(w.co) % 2, -128, 127).reshape(-1, 1, 1, 1)
    weight >>= 8 - bits
    dtype = w.epilogue.out_dtype
    bounds = LIMITS.get(dtype, (0, 0))
    reach = w.kh * w.kw * 1000
    scale = rng.uniform(0.3, 2, w.co) * 100 / reach * (100 if dtype == "int16" else 1)
    narrow = bool(rng.integers(2)) and dtype in LIMITS
    clamp = sorted(rng.integers(*bounds, 2).tolist()) if narrow else (None, None)
    values = GemmValues(
        bias=rng.integers(-reach, reach, w.co).astype(np.int32),
        multiplier=scale.astype(F),
        a_zero_point=int(rng.integers(low, high, endpoint=True)),
        zero_point=int(rng.integers(bounds[0], bounds[1], endpoint=True)),
        qmin=clamp[0],
        qmax=clamp[1],
        residual_zero_point=3,
        residual_multiplier=float(F(0.37)),
    )
    residual = None
    if w.epilogue.residual_dtype:
        ends = LIMITS[w.epilogue.residual_dtype]
        residual = rng.integers(*ends, w.out_shape).astype(w.epilogue.residual_dtype)
    packed = pack_depthwise(w, isa, params, weight, values)
    library = build(build_depthwise(w, isa, params, packed), isa)
    inputs = [x] if residual is None else [x, residual]
    got = run(library, *inputs, *packed.arrays, shape=w.out_shape, dtype=dtype)
    np.testing.assert_array_equal(got, reference(w, x, weight, values, residual))


@rows
@settings(max_examples=8, deadline=None)
@given(
    w=workloads(),
    seed=st.integers(0, 2**31),
    choice=st.integers(0, 100),
    extreme=st.sampled_from([False, False, True]),
    bits=st.sampled_from([7, 8]),
)
def test_depthwise_equals_the_definition(isa, w, seed, choice, extreme, bits):
    options = space(w, isa)
    params = options[0] if choice < 50 else options[choice % len(options)]
    check(w, isa, params, seed, extreme=extreme, bits=bits)


MOBILENET = [
    (16, 32, 1), (17, 96, 2), (14, 144, 1), (14, 144, 2), (7, 576, 2), (7, 960, 1),
]  # fmt: skip


@rows
@pytest.mark.parametrize(("size", "channels", "stride"), MOBILENET)
def test_depthwise_of_mobilenet(isa, size, channels, stride):
    pads = (1, 1, 1, 1) if stride == 1 else (0, 0, 1, 1)
    w = ConvWorkload(
        1, size, size, channels, channels, 3, 3, Epilogue("uint8"), (stride, stride), pads,
        groups=channels,
    )  # fmt: skip
    assert not is_plain(w, isa, default_params(w, isa))
    for bits in (7, 8):
        check(w, isa, default_params(w, isa), size, extreme=False, bits=bits)


def test_bytes_are_multiplied_where_no_pair_can_leave_int16():
    """On both sides of the limit: 255 * (64 + 64) fits int16, 255 * (65 + 64) does not."""
    isa = ISA_TABLE["x86-avx2"]
    w = ConvWorkload(1, 9, 9, 32, 32, 3, 3, Epilogue("int32"), pads=(1, 1, 1, 1), groups=32)
    params = default_params(w, isa)
    x = np.full(w.a_shape, 255, np.uint8)
    for largest, a_qmax, dot in ((64, 255, "maddubs"), (65, 255, "exact"), (127, 127, "maddubs")):
        weight = np.full(w.weight_shape, 64, np.int8)
        weight[5] = largest
        values = GemmValues(a_zero_point=7, a_qmax=a_qmax, bias=np.zeros(32, np.int32))
        packed = pack_depthwise(w, isa, params, weight, values)
        assert packed.facts.dot == dot
        if not runnable(isa):
            continue
        filled = np.minimum(x, a_qmax)
        library = build(build_depthwise(w, isa, params, packed), isa)
        got = run(library, filled, *packed.arrays, shape=w.out_shape, dtype="int32")
        np.testing.assert_array_equal(got, reference(w, filled, weight, values, None))


@rows
@settings(max_examples=4, deadline=None)
@given(w=workloads(), seed=st.integers(0, 2**31), clip=st.booleans(), residual=st.booleans())
def test_float_depthwise_is_close(isa, w, seed, clip, residual):
    rng = np.random.default_rng(seed)
    epilogue = Epilogue("float32", "float32" if residual else None)
    w = ConvWorkload(
        w.n, w.h, w.w, w.c, w.co, w.kh, w.kw, epilogue, w.strides, w.pads, w.dilations, w.groups,
        "float32",
    )  # fmt: skip
    x = rng.normal(size=w.a_shape).astype(F)
    weight = rng.normal(size=w.weight_shape).astype(F)
    other = rng.normal(size=w.out_shape).astype(F)
    bounds = (-1.0, 2.5) if clip else (None, None)
    values = GemmValues(bias=rng.normal(size=w.co).astype(F), act_min=bounds[0], act_max=bounds[1])
    packed = pack_float_depthwise(w, weight, values)
    inputs = [x, other] if residual else [x]
    library = build(build_float_depthwise(w, isa, packed), isa)
    got = run(library, *inputs, *packed.arrays, shape=w.out_shape, dtype="float32")
    want = sums(w, x.astype(np.float64), weight) + values.bias + (other if residual else 0)
    want = np.clip(want, *bounds) if clip else want
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


INSTRUCTION = {
    "x86-64": "pmaddwd",
    "x86-avx2": "vpmaddwd",
    "x86-avxvnni": "{vex}\tvpdpbusd",
    "x86-avx512vnni": "vpdpbusd",
    "x86-amx": "vpdpbusd",
}


@pytest.mark.parametrize("isa", X86, ids=lambda row: row.name)
def test_the_inner_loop_uses_the_dot_instruction_and_never_fuses(isa):
    w = ConvWorkload(
        1, 14, 14, 64, 64, 3, 3, Epilogue("uint8", "uint8"), pads=(1, 1, 1, 1), groups=64
    )
    params = default_params(w, isa)
    values = GemmValues(bias=np.zeros(64, np.int32), multiplier=np.full(64, 0.01, F), qmax=200)
    packed = pack_depthwise(w, isa, params, np.ones(w.weight_shape, np.int8), values)
    text = assembly(build(build_depthwise(w, isa, params, packed), isa))
    assert INSTRUCTION[isa.name] in text
    assert "fmadd" not in text
    if isa.vector_bits == 512:
        assert "zmm" in text


def test_rejections():
    isa = ISA_TABLE["x86-64"]
    w = ConvWorkload(1, 5, 5, 16, 16, 3, 3, Epilogue("uint8"), groups=16)
    params = DepthwiseParams("h", 1, 1)
    with pytest.raises(CodegenError, match="depthwise weights are float64"):
        pack_depthwise(w, isa, params, np.zeros(w.weight_shape), GemmValues())
    weight = np.zeros(w.weight_shape, np.int8)
    with pytest.raises(CodegenError, match=r"bias has shape \(3,\), expected \(16,\)"):
        pack_depthwise(w, isa, params, weight, GemmValues(bias=np.zeros(3, np.int32)))
    packed = pack_depthwise(w, isa, params, weight, GemmValues())
    full = ConvWorkload(1, 5, 5, 16, 16, 3, 3, Epilogue("uint8"))
    with pytest.raises(CodegenError, match="depthwise: expected groups == channels and 8-bit"):
        build_depthwise(full, isa, params, packed)
    with pytest.raises(CodegenError, match="depthwise: expected groups == channels and floats"):
        build_float_depthwise(w, isa, packed)
    real = ConvWorkload(1, 5, 5, 4, 4, 3, 3, Epilogue("float32"), groups=4, a_dtype="float32")
    with pytest.raises(CodegenError, match="depthwise weights are int8"):
        pack_float_depthwise(real, np.zeros(real.weight_shape, np.int8), GemmValues())
    with pytest.raises(CodegenError, match=r"bias is int32\(4,\), expected float32\(4,\)"):
        pack_float_depthwise(
            real, np.zeros(real.weight_shape, F), GemmValues(bias=np.zeros(4, np.int32))
        )
