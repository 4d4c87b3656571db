# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products on AMX tiles: exact for every tiling, the right instructions, permission asked for."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import gemm_reference as reference
import numpy as np
import pytest
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qcompiler import artifact, cpu
from qcompiler.errors import CodegenError, UnsupportedByTargetError
from qcompiler.manifest import TargetInfo
from qcompiler.targets.isa import ISA_TABLE, runnable, tvm_target
from qcompiler.targets.kernels.amx_plan import (
    applies,
    candidates,
    tile_registers,
    tiles_plan,
    worthwhile,
)
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmParams,
    GemmValues,
    MatmulWorkload,
    build_conv,
    default_params,
    pack_conv,
    space,
)
from qcompiler.targets.kernels.plan import geometry_of

AMX = ISA_TABLE["x86-amx"]
BLOCKS = [(2, 2), (1, 4), (4, 1), (1, 2), (2, 1), (1, 6), (3, 1)]
needs_amx = pytest.mark.skipif(not runnable(AMX), reason="this machine has no AMX")


@st.composite
def workloads(draw: st.DrawFn) -> ConvWorkload:
    """Convolutions that read in place, from planes of each phase, and from im2col."""
    return ConvWorkload(
        n=draw(st.integers(1, 2)),
        h=draw(st.integers(13, 23)),
        w=draw(st.integers(13, 23)),
        c=draw(st.sampled_from([1, 3, 4, 16, 24, 64, 72, 100, 130])),
        co=draw(st.sampled_from([5, 16, 24, 32, 50, 64])),
        kh=draw(st.sampled_from([1, 3, 5])),
        kw=draw(st.sampled_from([1, 3, 7])),
        epilogue=draw(
            st.sampled_from(
                [
                    Epilogue("uint8"),
                    Epilogue("uint8", "uint8"),
                    Epilogue("int8", "int8"),
                    Epilogue("int16", "uint8"),
                    Epilogue("int32"),
                    Epilogue("float32"),
                ]
            )
        ),
        strides=draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)])),
        pads=draw(st.sampled_from([(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1)])),
        dilations=draw(st.sampled_from([(1, 1), (1, 1), (2, 2)])),
        a_dtype=draw(st.sampled_from(["uint8", "uint8", "int8"])),
    )


@needs_amx
@given(
    workload=workloads(),
    block=st.sampled_from(BLOCKS),
    sizes=st.tuples(st.integers(1, 23), st.integers(1, 4)),
    order=st.sampled_from(["n", "m"]),
    largest=st.booleans(),
    narrow=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25)
def test_convolutions_are_exact(
    workload: ConvWorkload,
    block: tuple[int, int],
    sizes: tuple[int, int],
    order: Any,
    largest: bool,
    narrow: bool,
    seed: int,
) -> None:
    assume(applies(workload, AMX))
    rng = np.random.default_rng(seed)
    low, high = reference.LIMITS[workload.a_dtype]
    x = rng.integers(low, high + 1, workload.a_shape).astype(workload.a_dtype)
    weight = rng.integers(-128, 128, workload.weight_shape).astype(np.int8)
    if largest:
        x[...], weight[...] = high, rng.choice(np.int8([-128, 127]))
    if narrow:  # stored two to a byte
        weight = weight >> 4
    zero_point = int(rng.integers(low, high + 1))
    bias = rng.integers(-(10**5), 10**5, workload.co).astype(np.int32)
    sums = reference.conv_sums(workload, x, weight, zero_point) + bias
    out = workload.epilogue.out_dtype
    plain = rng.random() < 0.5
    scale = 1.5 * reference.LIMITS.get(out, (0, 100))[1] / max(1.0, np.abs(sums).max())
    values = GemmValues(
        bias=bias,
        multiplier=(rng.uniform(0.3, 1, workload.co) * scale).astype(np.float32),
        a_zero_point=zero_point,
        zero_point=0 if plain else 40,
        qmin=None if plain else 3,
        qmax=None if plain else 99,
        residual_zero_point=0 if plain else 7,
        residual_multiplier=float(np.float32(0.37)),
    )
    operands = [x]
    if workload.epilogue.residual_dtype is not None:
        residual = rng.integers(0, 128, workload.out_shape)
        operands.append(residual.astype(workload.epilogue.residual_dtype))
    expected = reference.requantize(sums, out, values, operands[1] if operands[1:] else None)
    params = GemmParams(16, *block, *sizes, order, "tiles")
    got = reference.run(workload, AMX, params, operands, weight, values)
    np.testing.assert_array_equal(got, expected)


@needs_amx
@pytest.mark.parametrize("k", [1, 4, 30, 63, 64, 65, 200])
@pytest.mark.parametrize("rows", [16, 17, 49])
def test_products_are_exact(rows: int, k: int) -> None:
    rng = np.random.default_rng(k)
    a = rng.integers(0, 256, (rows, k)).astype(np.uint8)
    b = rng.integers(-128, 128, (k, 40)).astype(np.int8)
    workload = MatmulWorkload(a.shape, b.shape, Epilogue("int32"))
    expected = a.astype(np.int64) @ b.astype(np.int64)
    for params in candidates(workload, AMX):
        got = reference.run(workload, AMX, params, [a], b, GemmValues())
        np.testing.assert_array_equal(got, expected, str(params))


@given(workload=workloads(), rows=st.integers(1, 23))
@settings(max_examples=60)
def test_chunks_hold_each_byte_of_k_once(workload: ConvWorkload, rows: int) -> None:
    geometry = geometry_of(workload, AMX)
    assume(applies(workload, AMX))
    plan = tiles_plan(geometry, GemmParams(16, 2, 2, rows, 1, algorithm="tiles"))
    k = workload.kh * workload.kw * workload.c
    count = np.zeros(k, int)
    for first, skip, used in plan.index:
        assert 0 <= skip <= plan.chunk - used
        count[first : first + used] += 1
    assert (count == 1).all()
    assert plan.chunk <= 64
    assert plan.chunk % 4 == 0
    # Every task fills a tile, and the tasks hold each output row once.
    last = geometry.oh - (plan.bands - 1) * plan.rows
    assert 0 < last <= plan.rows
    assert (last - 1) * plan.pitch + geometry.ow >= 16
    assert plan.pitch <= 2 * geometry.ow  # what is stored beyond a row stays in the next
    if plan.source == "direct":  # nothing is read beyond the input
        last = ((geometry.oh - 1) * plan.pitch + geometry.ow - 1) * plan.pixel
        assert last + max(plan.offsets) + plan.chunk <= geometry.h * geometry.w * geometry.c


def test_the_vectors_serve_what_tiles_would_waste() -> None:
    few_columns = ConvWorkload(1, 14, 14, 64, 10, 1, 1, Epilogue("uint8"))
    one_row = MatmulWorkload((1, 2048), (2048, 1000), Epilogue("uint8"))
    grouped = ConvWorkload(1, 14, 14, 64, 64, 3, 3, Epilogue("uint8"), groups=2)
    for workload in (few_columns, one_row, grouped):
        assert not worthwhile(workload, AMX)
        assert default_params(workload, AMX).algorithm != "tiles"
    usual = ConvWorkload(1, 14, 14, 64, 64, 3, 3, Epilogue("uint8"))
    assert default_params(usual, AMX).algorithm == "tiles"
    assert {params.algorithm for params in space(usual, AMX)} == {"tiles", "auto"}
    assert not applies(usual, ISA_TABLE["x86-avx512vnni"])
    assert not applies(replace(usual, epilogue=Epilogue("float32"), a_dtype="float32"), AMX)


def test_blocks_that_do_not_fit_the_registers() -> None:
    for mt, nv in BLOCKS:
        found = tile_registers(mt, nv)
        accumulators = {found.acc(m, v) for m in range(mt) for v in range(nv)}
        operands = {found.a(m) for m in range(mt)} | {found.b(v) for v in range(nv)}
        assert len(accumulators) == mt * nv
        assert not accumulators & operands
        assert max(accumulators | operands) < 8
    with pytest.raises(CodegenError, match="3 x 2 AMX tiles does not fit eight registers"):
        tile_registers(3, 2)


def test_hot_loop() -> None:
    """As many loads as products, nothing else of weight, and nothing on the stack."""
    workload = ConvWorkload(1, 14, 14, 8192, 32, 1, 1, Epilogue("uint8"))
    weight = np.ones(workload.weight_shape, np.int8)
    params = default_params(workload, AMX)
    assert (params.mt, params.nv) == (2, 2)
    packed = pack_conv(workload, AMX, params, weight, GemmValues(multiplier=1e-3))
    function = build_conv(workload, AMX, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(AMX))
    text = module.mod.inspect_source("asm")
    lines = [x.strip() for x in text.splitlines() if not re.search(r"\.loc\b|Ltmp|\.cfi", x)]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    bodies = []
    for end, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\.LBB\w+)", line)
        if jump and labels.get(jump.group(1), end) < end:
            body = lines[labels[jump.group(1)] + 1 : end]
            if any("tdpbusd" in inner for inner in body) and not any(
                re.match(r"j\w+\s", inner) for inner in body
            ):
                bodies.append(body)
    assert bodies
    for body in bodies:  # LLVM unrolls it
        products = sum("tdpbusd" in line for line in body)
        loads = sum("tileloadd" in line for line in body)
        assert loads in (products, products * 3 // 2), "\n".join(body)  # 2 x 2, or a rest of 1 x 2
        assert len(body) < 6 * products + 4, "\n".join(body)
        assert not any("%rsp" in line for line in body), "\n".join(body)
    for mnemonic in ("ldtilecfg", "tilerelease", "tilestored"):
        assert mnemonic in text


def test_refused_permission_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    info = TargetInfo(name="x86-amx", architecture="any", cpu_features=("amx_tile",))
    monkeypatch.setattr(artifact, "missing_features", lambda required: ())
    monkeypatch.setattr(artifact, "allow_tiles", lambda: False)
    with pytest.raises(UnsupportedByTargetError, match="refuses this process the AMX tile"):
        artifact.check_runnable(info, "the model")
    monkeypatch.setattr(artifact, "allow_tiles", lambda: True)
    artifact.check_runnable(info, "the model")


def test_no_permission_is_asked_without_the_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_features", lambda: frozenset({"avx2"}))
    assert cpu.allow_tiles.__wrapped__() is False
