# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Products in half precision: their bound against float64, their range, and their machine code.

The code is checked everywhere; what it computes, under emulation, on each row that has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import emulation
import gemm_reference as reference
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from machine_code import innermost_loops, spills

from qcompiler.driver import build_graph, quantize_model
from qcompiler.errors import CodegenError
from qcompiler.interpreter import run as interpret
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.registry import get_target
from qcompiler.targets.cpu_halves import for_row
from qcompiler.targets.isa import ISA_TABLE, Isa, tvm_target, with_processor
from qcompiler.targets.kernels import harness, layout, movement, pointwise, pool
from qcompiler.targets.kernels.depthwise_float import build_float_depthwise, pack_float_depthwise
from qcompiler.targets.kernels.gemm import (
    ConvWorkload,
    Epilogue,
    GemmValues,
    MatmulWorkload,
    build_conv,
    build_matmul,
    default_params,
    pack_conv,
    pack_matmul,
    space,
)
from qcompiler.targets.kernels.halves import BLOCK, block_starts, powers_of
from qcompiler.targets.kernels.plan import geometry_of
from qcompiler.targets.kernels.window import Window
from qcompiler.types import DType, TensorType

Array = np.ndarray[Any, np.dtype[Any]]
ARM = [isa for isa in ISA_TABLE.values() if isa.architecture == "aarch64"]
ROWS = [isa for isa in ARM if isa.halves]
each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
emulated = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "runs")
U = 2.0**-11
LARGEST = 65504.0


def halves(rng: np.random.Generator, shape: tuple[int, ...], size: float = 1.0) -> Array:
    return (rng.standard_normal(shape) * size).astype(np.float16)


@dataclass(frozen=True)
class Case:
    """A product with its operands."""

    workload: ConvWorkload | MatmulWorkload
    x: Array
    weight: Array
    values: GemmValues
    residual: Array | None = None

    @property
    def is_depthwise(self) -> bool:
        return isinstance(self.workload, ConvWorkload) and self.workload.groups == self.workload.c

    def sums(self, x: Array, w: Array) -> Array:
        """Sums of products of float64."""
        x, w = (a.astype(np.float32) for a in (x, w))
        if isinstance(self.workload, ConvWorkload):
            return reference.conv_sums(self.workload, x, w, 0)
        w = w.T if self.workload.transpose_b else w
        return np.asarray(x.astype(np.float64) @ w.astype(np.float64))

    def expected(self) -> Array:
        """The exact result."""
        exact = self.sums(self.x, self.weight)
        if self.values.bias is not None:
            exact = exact + self.values.bias
        if self.residual is not None:
            exact = exact + self.residual.astype(np.float64)
        low, high = self.values.act_min, self.values.act_max
        return np.clip(exact, -np.inf if low is None else low, np.inf if high is None else high)

    def bound(self, isa: Isa) -> Array:
        """How far the result may be from the exact one, as `kernels/halves` says."""
        size = self.sums(np.abs(self.x), np.abs(self.weight))
        count = int(np.prod(self.weight.shape)) // size.shape[-1]
        if self.is_depthwise:
            sizes = np.abs(self.weight.astype(np.float64)).reshape(len(self.weight), -1)
            block, powers = count, powers_of(sizes.sum(1))
        else:
            params = default_params(self.workload, isa)
            packed = pack(self, isa, params)
            block = min(BLOCK, count)
            # Every column of this layer, whatever the order of its tiles: the largest power.
            powers = packed.arrays[packed.names.index("multiplier")].max()
        steep = block * U / (1 - block * U) + count * 2.0**-24
        seen = self.sums(np.abs(self.x), np.ones_like(self.weight))
        bound = size * steep + powers * (count + seen) * 2.0**-25
        for extra in (self.values.bias, self.residual):
            if extra is not None:
                bound = bound + np.abs(extra.astype(np.float64)) * 2.0**-22
        if self.workload.epilogue.out_dtype == "float16":
            bound = bound + (np.abs(self.expected()) + bound) * U + 2.0**-25
        return np.asarray(bound)


def pack(case: Case, isa: Isa, params: Any) -> Any:
    if case.is_depthwise:
        return pack_float_depthwise(case.workload, case.weight, case.values)
    how = pack_conv if isinstance(case.workload, ConvWorkload) else pack_matmul
    return how(case.workload, isa, params, case.weight, case.values)


def compiled(case: Case, isa: Isa, params: Any = None) -> tuple[Any, Any]:
    if case.is_depthwise:
        packed = pack(case, isa, None)
        function = build_float_depthwise(case.workload, isa, packed, "kernel")
    else:
        params = params or default_params(case.workload, isa)
        packed = pack(case, isa, params)
        how = build_conv if isinstance(case.workload, ConvWorkload) else build_matmul
        function = how(case.workload, isa, params, packed, "kernel")
    return tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa)), packed


def computed(case: Case, isa: Isa, params: Any = None) -> Array:
    """What the kernel returns under emulation."""
    module, packed = compiled(case, isa, params)
    out = np.full(case.workload.out_shape, 77, case.workload.epilogue.out_dtype)
    given = [case.x] if case.residual is None else [case.x, case.residual]
    arrays = [*given, *packed.arrays, out]
    return emulation.rig().call(isa.name, emulation.library_of(module), "kernel", arrays)


def convolution(out: str = "float16", residual: str | None = None, **shape: Any) -> ConvWorkload:
    base: dict[str, Any] = {"n": 1, "kh": 1, "kw": 1, "a_dtype": "float16", **shape}
    return ConvWorkload(epilogue=Epilogue(out, residual), **base)


def matmul(m: int, k: int, n: int, out: str = "float16", **options: Any) -> MatmulWorkload:
    b = (n, k) if options.get("transpose_b") else (k, n)
    return MatmulWorkload((m, k), b, Epilogue(out), "float16", "float16", **options)


def case_of(
    workload: ConvWorkload | MatmulWorkload, seed: int = 0, size: float = 0.1, **values: Any
) -> Case:
    rng = np.random.default_rng(seed)
    shape = workload.weight_shape if isinstance(workload, ConvWorkload) else workload.b_shape
    residual = workload.epilogue.residual_dtype
    return Case(
        workload,
        halves(rng, workload.a_shape),
        halves(rng, shape, size),
        GemmValues(bias=rng.standard_normal(workload.out_shape[-1]).astype(np.float32), **values),
        None if residual is None else halves(rng, workload.out_shape).astype(residual),
    )


WORKLOADS: dict[str, ConvWorkload | MatmulWorkload] = {
    "pointwise": convolution(h=14, w=14, c=192, co=64),
    "3x3": convolution(h=14, w=9, c=32, co=48, kh=3, kw=3, pads=(1, 1, 1, 1)),
    "first layer": convolution(
        h=15, w=16, c=3, co=32, kh=3, kw=3, pads=(1, 1, 0, 1), strides=(2, 2)
    ),
    "odd extents": convolution(h=9, w=11, c=37, co=10, kh=3, kw=3, pads=(1, 0, 1, 1)),
    "groups, dilated": convolution(h=9, w=11, c=24, co=16, kh=3, kw=3, groups=2, dilations=(2, 2)),
    "few columns": convolution(h=7, w=7, c=70, co=3),
    "float32 residual and out": convolution(
        "float32", "float32", h=6, w=6, c=40, co=24, kh=3, kw=3
    ),
    "half residual": convolution("float16", "float16", h=6, w=6, c=40, co=24),
    "matmul": matmul(33, 100, 70),
    "matmul, turned": matmul(3, 257, 12, "float32", transpose_b=True),
    "one row": matmul(1, 64, 1000),
    "depthwise": convolution(h=13, w=17, c=40, co=40, kh=3, kw=3, pads=(1, 1, 1, 1), groups=40),
    "depthwise 5x5": convolution(
        "float32", "float16", h=14, w=14, c=19, co=19, kh=5, kw=5, pads=(2, 2, 2, 2),
        strides=(2, 2), groups=19,
    ),
    "depthwise, two outputs each": convolution(h=6, w=6, c=4, co=8, kh=3, kw=3, groups=4),
}  # fmt: skip


@emulated
@each_row
@pytest.mark.parametrize("name", WORKLOADS)
def test_products_stay_within_the_stated_bound(isa: Isa, name: str) -> None:
    case = case_of(WORKLOADS[name], act_max=3.0)
    error = np.abs(computed(case, isa) - case.expected())
    assert (error <= case.bound(isa)).all()
    # And they are typically much nearer than the worst that they may be.
    assert np.sqrt((error**2).mean()) <= 0.0015 * np.sqrt((case.expected() ** 2).mean())


@emulated
@each_row
def test_every_tiling_computes_the_same(isa: Isa) -> None:
    """Only the order within a column's blocks matters, and no tiling changes it."""
    for workload in (
        convolution(h=9, w=6, c=20, co=40, kh=3, kw=3, pads=(1, 1, 1, 1)),
        matmul(23, 70, 50),
    ):
        case = case_of(workload)
        candidates = space(workload, isa)
        first = computed(case, isa, candidates[0])
        for params in candidates[1 :: max(1, len(candidates) // 6)]:
            np.testing.assert_array_equal(computed(case, isa, params), first, str(params))


@emulated
@each_row
def test_no_sum_overflows_on_its_way(isa: Isa) -> None:
    """The largest halves, times weights that add up to a small result, or to a large one."""
    count = 96
    signs = np.where(np.arange(count) < count // 2, 1, -1)
    for scale in (1.0, 1000.0, LARGEST):
        w = np.repeat((signs * scale).astype(np.float16)[:, None], 8, 1)
        w[:, 1] = scale  # adds up: 96 * 65504 * scale
        w[:, 2] = 0
        w[0, 3:] = 1 / 128
        w[1:, 3:] = 0
        x = np.full((5, count), LARGEST, np.float16)
        for out in ("float32", "float16"):
            case = Case(matmul(5, count, 8, out), x, w, GemmValues())
            with np.errstate(over="ignore"):
                found, exact = computed(case, isa), case.expected()
                want = exact.astype(out)
            if out == "float32":
                assert (np.abs(found - exact) <= case.bound(isa)).all()
            else:
                assert np.isfinite(found[:, [0, 2, 3]]).all()
                assert np.isposinf(found[:, 1]).all()
            np.testing.assert_array_equal(found[:, 3:], want[:, 3:])


@emulated
@each_row
def test_results_beyond_the_range_are_infinite_and_clips_hold_them(isa: Isa) -> None:
    x = np.asarray([[60000.0, 5000.0], [-60000.0, -6000.0]], np.float16)
    w = np.ones((2, 8), np.float16)
    plain = computed(Case(matmul(2, 2, 8), x, w, GemmValues()), isa)
    np.testing.assert_array_equal(plain[:, 0], np.asarray([64992, -np.inf], np.float16))
    clipped = Case(matmul(2, 2, 8), x, w, GemmValues(act_min=-6.0, act_max=6.0))
    np.testing.assert_array_equal(computed(clipped, isa)[:, 0], [6, -6])
    x[0] = np.inf
    x[1] = np.nan
    found = computed(Case(matmul(2, 2, 8), x, w, GemmValues()), isa)
    assert np.isposinf(found[0]).all()
    assert np.isnan(found[1]).all()


@emulated
@each_row
def test_subnormal_activations_and_weights_count(isa: Isa) -> None:
    smallest = np.float16(2.0**-24)
    x = np.full((3, 40), smallest, np.float16)
    w = np.full((40, 16), 1 / 64, np.float16)  # they add up to less than one: not divided
    modest = Case(matmul(3, 40, 16, "float32"), x * np.float16(64), w, GemmValues())
    np.testing.assert_array_equal(computed(modest, isa), np.float32(40 * 2.0**-24))
    # Weights of 1024 are divided by 2^16, and what is below 2^-25 then is lost: within the bound.
    large = Case(matmul(3, 40, 16, "float32"), x, np.full((40, 16), 1024, np.float16), GemmValues())
    assert (np.abs(computed(large, isa) - large.expected()) <= large.bound(isa)).all()
    w = np.full((40, 16), smallest, np.float16)
    tiny = Case(matmul(3, 40, 16, "float32"), np.full_like(x, 1024), w, GemmValues())
    np.testing.assert_allclose(computed(tiny, isa), 40 * 2.0**-14, rtol=1e-6)  # weights are scaled


@given(
    runs=st.integers(1, 12),
    run=st.integers(1, 150),
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([1e-7, 1e-3, 1.0, 1e4]),
)
@settings(max_examples=30)
def test_weights_of_a_block_add_up_to_less_than_one(
    runs: int, run: int, seed: int, size: float
) -> None:
    starts = block_starts(runs, run)
    lengths = np.diff([*starts, runs * run])
    assert starts[0] == 0
    assert lengths.min() >= 1
    assert lengths.max() <= BLOCK
    rng = np.random.default_rng(seed)
    w = np.clip(rng.standard_normal((3, runs * run)) * size, -LARGEST, LARGEST).astype(np.float16)
    w[2] = 0
    sums = np.add.reduceat(np.abs(w.astype(np.float64)), starts, axis=1).max(1)
    powers = powers_of(sums)
    assert (sums / powers <= 0.96).all()
    exponents = np.log2(powers)
    np.testing.assert_array_equal(exponents, np.rint(exponents))
    kept = (w.astype(np.float32) / powers[:, None]).astype(np.float16).astype(np.float64)
    assert (np.abs(kept * powers[:, None] - w) <= powers[:, None] * 2.0**-25).all()


def assembly(case: Case, isa: Isa) -> str:
    return str(compiled(case, isa)[0].mod.inspect_source("asm"))


ON_HALVES = re.compile(r"fmla\s+v\d+\.8h, v\d+\.8h, v\d+\.(h\[\d\]|8h)$")


@pytest.mark.parametrize(
    ("isa", "mcpu"),
    [pytest.param(isa, mcpu, id=mcpu) for isa in ROWS for mcpu in (isa.mcpu, isa.mcpus[-2])],
)
@pytest.mark.parametrize("name", ["pointwise", "3x3", "matmul"])
def test_hot_loops_multiply_eight_halves_at_a_time(isa: Isa, mcpu: str, name: str) -> None:
    chosen = with_processor(isa, mcpu)
    loops = innermost_loops(assembly(case_of(WORKLOADS[name]), chosen), "fmla")
    assert loops
    for body in loops:
        products = [line for line in body if ON_HALVES.match(line)]
        assert len(products) >= 0.8 * len(body), "\n".join(body)
        # Where a run is cut in unequal blocks, LLVM keeps some totals in registers: with some
        # processors' schedules one or two too many.
        allowed = 0.04 * len(body) if name == "matmul" else 0
        moves = [line for line in body if re.match(r"mov\s+v", line)]
        assert len(spills(body)) + len(moves) <= allowed, "\n".join(body)
        assert not [line for line in body if re.match(r"fcvt|fmla\s+v\d+\.4s|dup", line)]


@each_row
def test_depthwise_kernels_multiply_eight_halves_at_a_time(isa: Isa) -> None:
    text = assembly(case_of(WORKLOADS["depthwise"]), isa)
    assert len(re.findall(r"\bfmla\s+v\d+\.8h", text)) >= 9 * 6 * 2


def test_rows_without_halves_refuse_them() -> None:
    for isa in (ISA_TABLE["arm-neon"], ISA_TABLE["x86-avx2"]):
        case = case_of(WORKLOADS["pointwise"])
        with pytest.raises(CodegenError, match=f"{isa.name} does not multiply float16"):
            pack(case, isa, default_params(case.workload, isa))
        depthwise = case_of(WORKLOADS["depthwise"])
        with pytest.raises(CodegenError, match=f"{isa.name} does not multiply float16"):
            build_float_depthwise(depthwise.workload, isa, pack(depthwise, isa, None))


def test_operands_that_do_not_go_together_are_refused() -> None:
    isa = ROWS[0]
    case = case_of(WORKLOADS["pointwise"])
    params = default_params(case.workload, isa)
    with pytest.raises(CodegenError, match="weights are float32, the kernel takes float16"):
        pack_conv(case.workload, isa, params, case.weight.astype(np.float32), GemmValues())
    with pytest.raises(CodegenError, match="must be finite"):
        pack_conv(case.workload, isa, params, case.weight * np.float16(np.inf), GemmValues())
    for make, message in (
        (lambda: convolution("int8", h=2, w=2, c=8, co=8), "float32 or float16, not int8"),
        (lambda: convolution("float16", h=2, w=2, c=8, co=8, a_dtype="int8"), "never give float16"),
        (lambda: convolution("float32", "int8", h=2, w=2, c=8, co=8), "a int8 residual"),
        (lambda: replace(matmul(2, 8, 8), b_dtype="float32"), "multiply float16 by float32"),
        (lambda: replace(matmul(2, 8, 8), b_constant=False), "needs constant weights"),
    ):
        with pytest.raises(CodegenError, match=message):
            make()
    assert geometry_of(case.workload, isa).k_group == 1


# ---------------------------------------------------------------- kernels between the products


def called(
    function: Any, isa: Isa, inputs: list[Array], shape: tuple[int, ...], dtype: str
) -> Array:
    module = harness.build(function, isa)
    out = np.full(shape, 77, dtype)
    library = emulation.library_of(module)
    return emulation.rig().call(isa.name, library, "main", [*inputs, out])


@emulated
@each_row
@pytest.mark.parametrize("out", ["float16", "float32"])
def test_elementwise_kernels_round_once(isa: Isa, out: str) -> None:
    rng = np.random.default_rng(0)
    a, b = halves(rng, (3, 5, 37)), halves(rng, (37,))
    for operation, function in (("add", np.add), ("mul", np.multiply)):
        w = pointwise.FloatBinaryWorkload(
            operation, a.shape, b.shape, a_dtype="float16", b_dtype="float16", dtype=out
        )
        found = called(pointwise.float_binary(w, isa), isa, [a, b], a.shape, out)
        exact = function(a.astype(np.float32), b.astype(np.float32)).astype(out)
        np.testing.assert_array_equal(found, exact)
    w1 = pointwise.FloatUnaryWorkload("sigmoid", a.shape, in_dtype="float16", dtype=out)
    found = called(pointwise.float_unary(w1, isa), isa, [a], a.shape, out)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-a.astype(np.float64))), rtol=1e-3)


@emulated
@each_row
def test_casts_between_widths(isa: Isa) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([
        rng.standard_normal(50), 2.0 ** rng.uniform(-26, 17, 50),
        [0.0, -0.0, 65519.9, 65520.0, -1e9, 2.0**-25, 2.0**-24, np.inf, np.nan, 2049.0, 2051.0],
    ]).astype(np.float32)  # fmt: skip
    narrow = pointwise.CastWorkload(x.shape, "float32", "float16")
    with np.errstate(over="ignore"):
        want = x.astype(np.float16)
    found = called(pointwise.cast_floats(narrow, isa), isa, [x], x.shape, "float16")
    np.testing.assert_array_equal(found, want)
    wide = pointwise.CastWorkload(x.shape, "float16", "float32")
    found = called(pointwise.cast_floats(wide, isa), isa, [want], x.shape, "float32")
    np.testing.assert_array_equal(found, want.astype(np.float32))


@emulated
@each_row
def test_clips_pools_and_means_of_halves(isa: Isa) -> None:
    rng = np.random.default_rng(2)
    x = halves(rng, (1, 6, 7, 21))
    clip = pointwise.ClipWorkload(x.shape, "float16", -0.5, 0.75)
    found = called(pointwise.clip(clip, isa), isa, [x], x.shape, "float16")
    np.testing.assert_array_equal(found, np.clip(x, -0.5, 0.75))
    window = Window(1, (6, 7), (3, 3), (2, 2), (2, 2))
    highest = pool.PoolWorkload(window, 21, "float16")
    found = called(pool.max_pool(highest, isa), isa, [x], (1, 3, 3, 21), "float16")
    blocks = x[:, :, :6].reshape(1, 3, 2, 3, 2, 21).astype(np.float64)
    np.testing.assert_array_equal(found, blocks.max((2, 4)))
    for out, eps in (("float16", 2 * U), ("float32", 1e-6)):
        average = pool.PoolWorkload(window, 21, "float16", float_out=out)
        counts = pool.pack_counts(average)
        function = pool.average_pool(average, isa)
        found = called(function, isa, [x, counts], (1, 3, 3, 21), out)
        np.testing.assert_allclose(found, blocks.mean((2, 4)), rtol=eps, atol=eps * 0.1)
        mean = pool.ReduceWorkload(
            "mean", x.shape, (1, 1, 1, 21), 1, 42, 21, "float16", float_out=out
        )
        found = called(pool.reduce(mean, isa), isa, [x], (1, 1, 1, 21), out)
        exact = x.astype(np.float64).mean((1, 2), keepdims=True)
        np.testing.assert_allclose(found, exact, rtol=eps, atol=eps * 0.1)


@emulated
@each_row
def test_movement_of_halves(isa: Isa) -> None:
    rng = np.random.default_rng(3)
    x = halves(rng, (1, 5, 9, 13))
    turned = layout.TransposeWorkload(x.shape, (0, 2, 3, 1), "float16")
    found = called(layout.transpose(turned, isa), isa, [x], (1, 9, 13, 5), "float16")
    np.testing.assert_array_equal(found, x.transpose(0, 2, 3, 1))
    joined = movement.ConcatWorkload((x.shape, x.shape), 2, "float16")
    found = called(movement.concat(joined, isa), isa, [x, x], (1, 5, 18, 13), "float16")
    np.testing.assert_array_equal(found, np.concatenate([x, x], 2))
    padded = movement.PadWorkload(x.shape, (0, 1, 0, 2), (0, 0, 3, 1), "float16", 1.5)
    found = called(movement.pad(padded, isa), isa, [x], (1, 6, 12, 16), "float16")
    want = np.pad(x, ((0, 0), (1, 0), (0, 3), (2, 1)), constant_values=1.5)
    np.testing.assert_array_equal(found, want)


# ------------------------------------------------------------------------------- whole models


def network(rng: np.random.Generator) -> Graph:
    """Products of halves, with most of what may lie between them."""
    graph = Graph("net", Stage.FLOAT)
    x = graph.add_input("x", TensorType((1, 3, 20, 20), DType.FLOAT32))

    def conv(v: Any, co: int, kernel: int, name: str, **attrs: Any) -> Any:
        groups = attrs.get("group", 1)
        shape = (co, v.shape[1] // groups, kernel, kernel)
        w = graph.constant((rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4"))
        b = graph.constant(rng.standard_normal(co).astype(np.float32))
        pads = (kernel // 2,) * 4
        given = {"pads": pads, "dilations": (1, 1), "strides": (1, 1), "group": 1, **attrs}
        return graph.add("conv", [v, w, b], given, name=name).output

    a = graph.add("relu", [conv(x, 24, 3, "a", strides=(2, 2))]).output
    b = graph.add("clip", [conv(a, 24, 3, "b", group=24)], {"min": 0.0, "max": 6.0}).output
    c = graph.add("add", [conv(b, 24, 1, "c"), a]).output
    d = graph.add("silu", [c]).output
    window = {"kernel": (2, 2), "strides": (2, 2), "pads": (0,) * 4, "dilations": (1, 1)}
    pooled = graph.add("max_pool", [d], window).output
    e = conv(graph.add("concat", [pooled, pooled], {"axis": 1}).output, 40, 3, "e")
    m = graph.add("reduce_mean", [e], {"axes": (2, 3), "keepdims": False}).output
    w = graph.constant(rng.standard_normal((40, 10)).astype(np.float32) / 6)
    y = graph.add("matmul", [m, w], name="head").output
    graph.set_outputs([("y", graph.add("softmax", [y], {"axis": -1}).output)])
    return graph


def in_halves(graph: Graph) -> Graph:
    from qcompiler.passes.insert_qdq import quantize_passes
    from qcompiler.passmanager import PassContext, PassManager
    from qcompiler.plan import PrecisionPlan, uniform

    plan = uniform(graph, "fp16")
    ctx = PassContext()
    ctx.put(plan)
    return PassManager(quantize_passes(plan), given=(PrecisionPlan,)).run(graph, ctx)


@pytest.mark.parametrize("isa", ARM, ids=lambda isa: isa.name)
def test_values_between_products_are_halves_where_the_row_has_them(isa: Isa) -> None:
    backend = get_target(isa.name)
    graph = in_halves(network(np.random.default_rng(0)))
    shaped = PassManagerOf(backend).run(graph)
    found = for_row(shaped, isa)
    made = [v for n in found.nodes for v in n.outputs if v.dtype is DType.FLOAT16]
    if not isa.halves:
        assert found is shaped
        assert not made
        return
    products = [n for n in found.nodes if n.op.name in ("conv", "matmul")]
    assert len(products) == 5
    assert all(n.input(0).dtype is DType.FLOAT16 for n in products)
    # One cast: of the input; softmax reads float32.
    assert sum(n.op.name == "cast" and n.input(0) in made for n in found.nodes) == 0
    assert sum(n.op.name == "cast" and n.output in made for n in found.nodes) == 1
    assert products[-1].output.dtype is DType.FLOAT32


class PassManagerOf:
    """Runs a backend's own passes."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def run(self, graph: Graph) -> Graph:
        from qcompiler.passmanager import PassContext, PassManager

        return PassManager(self.backend.passes()).run(graph, PassContext())


@emulated
@pytest.mark.parametrize("isa", ARM, ids=lambda isa: isa.name)
def test_a_model_is_near_the_interpreter(isa: Isa) -> None:
    rng = np.random.default_rng(0)
    built = build_graph(in_halves(network(rng)), get_target(isa.name))
    assert built.library is not None
    assert any(r.precision.value == "fp16" for r in built.regions)
    assert not [v for n in built.graph.nodes for v in n.outputs if v.dtype is DType.FLOAT16]
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        for _ in range(2):
            x = rng.standard_normal((1, 3, 20, 20)).astype(np.float32)
            (found,) = execute.run([x])
            (want,) = interpret(built.graph, {"x": x}).values()
            error = float(np.abs(found - want).max())
            assert error <= (3e-3 if isa.halves else 1e-6)
            assert (error > 0) or not isa.halves


@emulated
@pytest.mark.parametrize("isa", ARM, ids=lambda isa: isa.name)
@pytest.mark.parametrize("name", ["digits_cnn", "digits_hybrid"])
def test_bundled_models_in_half_precision(isa: Isa, name: str) -> None:
    folder = emulation.ROOT / "models" / name
    samples = dict(np.load(folder / "eval.npz"))
    result = quantize_model(folder / "model.onnx", precision="fp16")
    built = build_graph(result.graph, get_target(isa.name))
    assert built.library is not None
    inputs = [v.name for v in built.graph.inputs]
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        for i in range(5):
            feeds = {n: samples[n][i : i + 1] for n in inputs}
            wanted = interpret(built.graph, feeds)
            for found, want in zip(execute.run(list(feeds.values())), wanted.values(), strict=True):
                size = np.abs(want).max()
                np.testing.assert_allclose(found, want, rtol=0, atol=4e-3 * size)
                assert found.argmax() == want.argmax()


def test_many_taps_of_the_largest_weights_do_not_overflow_either() -> None:
    powers = powers_of(np.asarray([961 * LARGEST, 2.0**-24, 0.0]))
    assert powers[0] == 2.0**26
    assert 961 * LARGEST / powers[0] <= 0.96
    assert powers[1] == 2.0**-23
    assert powers[2] == 1
