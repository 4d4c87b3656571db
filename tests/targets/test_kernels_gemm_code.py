# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The machine code of the matrix kernels: the right instructions, and no spills where it counts."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import tvm

from qcompiler.targets.isa import ISA_TABLE, Isa, tvm_target
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmValues,
    build_conv,
    default_params,
    pack_conv,
)

ROWS = [isa for isa in ISA_TABLE.values() if isa.architecture == "x86_64"]

DOT = {"none": "pmaddwd", "maddubs": "vpmaddubsw", "vpdpbusd": "vpdpbusd"}


def assembly(
    workload: ConvWorkload, isa: Isa, weights: str = "small", a_zero_point: int = 0
) -> str:
    """Machine code of a kernel; building needs no machine that runs it."""
    rng = np.random.default_rng(0)
    if workload.a_dtype == "float32":
        weight = rng.standard_normal(workload.weight_shape).astype(np.float32)
    elif weights == "factored":  # codes of 4 bits times a factor for every eight channels
        o, c, kh, kw = workload.weight_shape
        codes = rng.integers(-8, 8, (o, kh, kw, c // 8, 8))
        factors = rng.integers(1, 17, (o, kh, kw, c // 8, 1))
        rows = (codes * factors).astype(np.int8).reshape(o, kh, kw, c)
        weight = np.ascontiguousarray(rows.transpose(0, 3, 1, 2))
    else:
        largest = 40 if weights == "small" else 127
        weight = rng.integers(-largest, largest + 1, workload.weight_shape).astype(np.int8)
    params = replace(default_params(workload, isa), algorithm="direct")
    values = GemmValues(multiplier=1e-3, a_zero_point=a_zero_point)
    packed = pack_conv(workload, isa, params, weight, values)
    function = build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    text: str = module.mod.inspect_source("asm")
    return text


def innermost_loops(text: str, mnemonic: str) -> list[list[str]]:
    """Instructions of each loop without inner jumps that holds `mnemonic`."""
    lines = [
        line.strip() for line in text.splitlines() if not re.search(r"\.loc\b|Ltmp|\.cfi", line)
    ]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:$", line)}
    loops = []
    for end, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\.LBB\w+)", line)
        if jump is None or labels.get(jump.group(1), end) >= end:
            continue
        body = lines[labels[jump.group(1)] + 1 : end]
        if any(re.match(r"j\w+\s", inner) for inner in body):
            continue
        if any(mnemonic in inner for inner in body):
            loops.append(body)
    return loops


SHAPES = {
    "pointwise": {"h": 14, "w": 14, "c": 192, "co": 64, "kh": 1, "kw": 1},
    "3x3": {"h": 28, "w": 28, "c": 32, "co": 64, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1)},
    "strided": {"h": 15, "w": 15, "c": 192, "co": 96, "kh": 1, "kw": 1, "strides": (2, 2)},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
def test_integer_hot_loops(isa: Isa, shape: str) -> None:
    workload = ConvWorkload(n=1, epilogue=Epilogue("uint8"), **SHAPES[shape])  # type: ignore[arg-type]
    text = assembly(workload, isa)
    loops = innermost_loops(text, DOT[isa.dot])
    assert loops, "the loop over K was unrolled"
    register = {128: "xmm", 256: "ymm", 512: "zmm"}[isa.vector_bits]
    for body in loops:
        dots = [line for line in body if DOT[isa.dot] in line]
        assert all(register in line for line in dots)
        if isa.name == "x86-avxvnni":
            assert all(line.startswith("{vex}") for line in dots)
        spills = [line for line in body if "mm" in line and "%rsp" in line]
        assert not spills, "\n".join(body)
    if isa.vector_bits < 512:
        assert "zmm" not in text
    if isa.vector_bits < 256:
        assert "ymm" not in text


@pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
def test_float_hot_loops(isa: Isa) -> None:
    shape = SHAPES["3x3"]
    workload = ConvWorkload(n=1, epilogue=Epilogue("float32"), a_dtype="float32", **shape)  # type: ignore[arg-type]
    text = assembly(workload, isa)
    loops = innermost_loops(text, "vfmadd" if isa.fma else "mulps")
    assert loops
    for body in loops:
        assert not [line for line in body if "mm" in line and "%rsp" in line], "\n".join(body)
    assert ("vfmadd" in text) == isa.fma


@pytest.mark.parametrize("columns", [16, 64])
def test_unprovable_weights_are_multiplied_by_int16_pairs(columns: int) -> None:
    """Few column tiles take bytes apart in registers; more read activations widened before."""
    workload = ConvWorkload(1, 8, 8, 64, columns, 1, 1, Epilogue("uint8"))
    text = assembly(workload, ISA_TABLE["x86-avx2"], weights="largest", a_zero_point=128)
    for body in innermost_loops(text, "vpmaddwd"):
        assert not [line for line in body if "mm" in line and "%rsp" in line], "\n".join(body)
    pairs = [b for b in innermost_loops(text, "vpmaddwd") if not any("maddubs" in x for x in b)]
    assert pairs
    for body in pairs:
        assert any("vpsrlw" in line for line in body) == (columns == 16)


@pytest.mark.parametrize(("largest", "depth"), [(32, 2), (16, 4), (8, 8)])
def test_deep_sums_widen_once(largest: int, depth: int) -> None:
    """Weights at the limit of a depth: D K-groups take D + 1 products for each accumulator."""
    isa = ISA_TABLE["x86-avx2"]
    workload = ConvWorkload(n=1, epilogue=Epilogue("uint8"), **SHAPES["pointwise"])  # type: ignore[arg-type]
    weight = np.full(workload.weight_shape, largest, np.int8)
    weight[:, ::2] -= 1  # they have no factor in common
    params = default_params(workload, isa)
    packed = pack_conv(workload, isa, params, weight, GemmValues(multiplier=1e-3))
    assert packed.facts.depths == (depth,)
    function = build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    loops = innermost_loops(module.mod.inspect_source("asm"), "vpmaddubsw")
    assert loops
    for body in loops:
        narrow = sum("vpmaddubsw" in line for line in body)
        assert narrow == depth * sum("vpmaddwd" in line for line in body)
        spills = [line for line in body if "mm" in line and "%rsp" in line]
        assert not spills, "\n".join(body)


@pytest.mark.parametrize("shape", ["pointwise", "3x3"])
def test_factors_take_the_place_of_ones_where_sums_are_widened(shape: str) -> None:
    """Per two K-groups of a tile: twice the products, one addition in int16, one widening."""
    workload = ConvWorkload(n=1, epilogue=Epilogue("uint8"), **SHAPES[shape])  # type: ignore[arg-type]
    loops = innermost_loops(assembly(workload, ISA_TABLE["x86-avx2"], "factored"), "vpmaddubsw")
    assert loops
    for body in loops:
        count = {m: sum(m in line for line in body) for m in ("vpmaddubsw", "vpaddw", "vpmaddwd")}
        assert count["vpmaddubsw"] == 2 * count["vpmaddwd"] == 2 * count["vpaddw"] > 0
        assert not any("vpmull" in line for line in body)
        assert not [line for line in body if "mm" in line and "%rsp" in line], "\n".join(body)


@pytest.mark.parametrize("name", ["x86-avxvnni", "x86-avx512vnni"])
def test_factors_are_unpacked_by_16_bit_products(name: str) -> None:
    workload = ConvWorkload(n=1, epilogue=Epilogue("uint8"), **SHAPES["pointwise"])  # type: ignore[arg-type]
    text = assembly(workload, ISA_TABLE[name], "factored")
    for body in innermost_loops(text, "vpdpbusd"):
        assert not any("vpmull" in line for line in body), "\n".join(body)
    (unpack,) = innermost_loops(text, "vpmullw")
    assert not [line for line in unpack if "mm" in line and "%rsp" in line], "\n".join(unpack)


def test_the_residual_addition_is_not_contracted() -> None:
    workload = ConvWorkload(1, 8, 8, 64, 64, 1, 1, Epilogue("uint8", "uint8"))
    for isa in ROWS:
        assert "fmadd" not in assembly(workload, isa), isa.name


@pytest.mark.parametrize("isa", ROWS, ids=lambda row: row.name)
def test_few_columns_need_no_memory_of_their_own(isa: Isa) -> None:
    """The lanes that are outputs are stored one by one, but never by way of an allocation."""
    workload = ConvWorkload(1, 16, 16, 16, 2, 1, 1, Epilogue("uint8", "uint8"))
    assert "AllocWorkspace" not in assembly(workload, isa)
