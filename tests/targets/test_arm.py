# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""The ARM rows: their machine code, and what it computes under emulation.

The machine code is checked everywhere. To run it takes an emulator; what is missing is named where
a test is skipped. The slow tests run the other modules of this folder on the ARM rows.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import emulation
import numpy as np
import pytest
import tvm
from block_models import Case
from built_models import executor
from by_path import imported
from computed_cases import COMPUTED
from machine_code import innermost_loops, spills
from product_models import Net
from row_block_cases import CASES

from qcompiler.driver import build_graph, quantize_model
from qcompiler.errors import UnknownTargetError
from qcompiler.interpreter import run as interpret
from qcompiler.registry import get_target
from qcompiler.targets.isa import ISA_TABLE, Isa, tvm_target, with_processor
from qcompiler.targets.kernels.depth import chain_depth
from qcompiler.targets.kernels.depthwise import build_depthwise, pack_depthwise
from qcompiler.targets.kernels.depthwise import default_params as depthwise_params
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
)
from qcompiler.types import DType

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "models"
ROWS = [isa for isa in ISA_TABLE.values() if isa.architecture == "aarch64"]
each_row = pytest.mark.parametrize("isa", ROWS, ids=lambda isa: isa.name)
emulated = pytest.mark.skipif(bool(emulation.why_not()), reason=emulation.why_not() or "runs")

DOT = {"arm-neon": "sadalp", "arm-dotprod": "sdot", "arm-i8mm": "smmla"}
BEYOND = {
    "arm-neon": r"\b([su]dot|usdot|sudot|[su]mmla|usmmla)\b",
    "arm-dotprod": r"\b(usdot|sudot|[su]mmla|usmmla)\b",
    "arm-i8mm": r"\bnothing_is_beyond\b",
}
# SVE registers; bfloat16 and half arithmetic; what only later processors have.
NEVER = (
    r"\bz\d+\.[bhsdq]\b|\bptrue\b|\bbf(dot|mmla|mlal\w|cvt\w*)\b|\bf(add|sub|mul|mla)\s+v\d+\.[48]h|"
    r"\bsqrdml\w+|\bfcmla\b|\beor3\b"
)

CONV: dict[str, dict[str, Any]] = {
    "pointwise": {"h": 14, "w": 14, "c": 192, "co": 64, "kh": 1, "kw": 1},
    "3x3": {"h": 28, "w": 28, "c": 32, "co": 64, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1)},
    "strided": {"h": 15, "w": 15, "c": 192, "co": 96, "kh": 1, "kw": 1, "strides": (2, 2)},
}


def convolution(shape: dict[str, Any], a_dtype: str = "int8", out: str = "int8") -> ConvWorkload:
    out = "float32" if a_dtype == "float32" else out
    return ConvWorkload(n=1, epilogue=Epilogue(out), a_dtype=a_dtype, **shape)


def compiled(
    workload: ConvWorkload, isa: Isa, largest: int = 127, algorithm: Any = "direct"
) -> tuple[Any, Any]:
    """A built convolution and its packed constants."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-largest, largest + 1, workload.weight_shape).astype(np.int8)
    if workload.a_dtype == "float32":
        weight = rng.standard_normal(workload.weight_shape).astype(np.float32)
    params = replace(default_params(workload, isa), algorithm=algorithm)
    packed = pack_conv(workload, isa, params, weight, GemmValues(multiplier=1e-3))
    function = build_conv(workload, isa, params, packed, "kernel")
    return tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa)), packed


def assembly(module: Any) -> str:
    text: str = module.mod.inspect_source("asm")
    return text


@pytest.mark.parametrize("shape", CONV)
@each_row
def test_integer_hot_loops(isa: Isa, shape: str) -> None:
    text = assembly(compiled(convolution(CONV[shape]), isa)[0])
    loops = innermost_loops(text, DOT[isa.name])
    assert loops, "the loop over K was unrolled"
    # LLVM fills the registers of the smlal chains to the brim: two moves in two hundred.
    allowed = 2 if isa.dot == "smlal" else 0
    for body in loops:
        assert len(spills(body)) <= allowed, "\n".join(body)
        assert not [line for line in body if line.startswith(("mul\t", "mla\t"))]
    assert not re.search(BEYOND[isa.name], text)
    assert not re.search(NEVER, text)


def test_winograd_wins_where_smlal_multiplies() -> None:
    workload = convolution({**CONV["3x3"], "c": 64})
    for isa in ROWS:
        module, packed = compiled(workload, isa, algorithm="auto")
        assert (packed.facts.dot == "winograd") == (isa.dot == "smlal")
        if isa.dot != "smlal":
            continue
        (body,) = innermost_loops(assembly(module), "smlal")[:1]
        products = [line for line in body if re.match(r"smlal\s+v\d+\.4s.*\.h\[\d\]$", line)]
        assert len(products) >= 0.8 * len(body)
        assert not spills(body)


def test_sdot_takes_activations_by_element() -> None:
    """At least four fifths of the loop are products: no broadcasts, one load for four of them."""
    text = assembly(compiled(convolution(CONV["pointwise"]), ISA_TABLE["arm-dotprod"])[0])
    (body,) = innermost_loops(text, "sdot")[:1]
    products = [line for line in body if line.startswith("sdot")]
    assert all(re.search(r"\.4b\[\d\]$", line) for line in products)
    assert len(products) >= 0.8 * len(body)


@each_row
def test_float_hot_loops_fuse(isa: Isa) -> None:
    text = assembly(compiled(convolution(CONV["3x3"], "float32"), isa)[0])
    loops = innermost_loops(text, "fmla")
    assert loops
    assert not any(spills(body) for body in loops)


@each_row
def test_requantization_is_never_fused(isa: Isa) -> None:
    for shape in (CONV["pointwise"], {**CONV["3x3"], "c": 64, "groups": 64}):
        workload = ConvWorkload(n=1, epilogue=Epilogue("int8", "int8"), a_dtype="int8", **shape)
        values = GemmValues(multiplier=0.01, residual_zero_point=3, residual_multiplier=0.3)
        weight = np.ones(workload.weight_shape, np.int8)
        if workload.groups > 1:
            params: Any = depthwise_params(workload, isa)
            packed = pack_depthwise(workload, isa, params, weight, values)
            function = build_depthwise(workload, isa, params, packed, "kernel")
        else:
            params = default_params(workload, isa)
            packed = pack_conv(workload, isa, params, weight, values)
            function = build_conv(workload, isa, params, packed, "kernel")
        module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
        text = assembly(module)
        assert not re.search(r"\b(fmla|fmls|fmadd|fmsub)\b", text)
        assert not re.search(NEVER, text)


@pytest.mark.parametrize(
    ("isa", "mcpu"),
    [pytest.param(isa, mcpu, id=mcpu) for isa in ROWS for mcpu in isa.mcpus],
)
def test_a_processor_adds_no_instructions_to_its_row(isa: Isa, mcpu: str) -> None:
    chosen = with_processor(isa, mcpu)
    target = tvm_target(chosen)
    assert tvm.get_global_func("target.llvm_is_valid_cpu")(mcpu, isa.mtriple)
    a = tvm.te.placeholder((1000,), "int8")
    b = tvm.te.placeholder((1000,), "int8")
    c = tvm.te.compute((1000,), lambda i: a[i].astype("int32") * b[i].astype("int32"))
    k = tvm.te.reduce_axis((0, 1000))
    total = tvm.te.compute((1,), lambda _: tvm.te.sum(a[k].astype("int32") * b[k], k))
    loops = tvm.compile(tvm.te.create_prim_func([a, b, c, total]), target=target)
    kernel = assembly(compiled(convolution(CONV["3x3"]), chosen)[0])
    assert not re.search(BEYOND[isa.name], assembly(loops) + kernel)
    assert not re.search(NEVER, assembly(loops) + kernel)
    assert_no_spills(kernel, isa)


def assert_no_spills(text: str, isa: Isa) -> None:
    # LLVM fills the registers of the smlal chains to the brim: four moves in two hundred.
    for body in innermost_loops(text, DOT[isa.name]):
        allowed = 0.025 * len(body) if isa.dot == "smlal" else 0
        assert len(spills(body)) <= allowed, "\n".join(body)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "mcpu"),
    [pytest.param(isa, mcpu, id=mcpu) for isa in ROWS for mcpu in isa.mcpus],
)
def test_registers_suffice_with_the_schedule_of_every_processor(isa: Isa, mcpu: str) -> None:
    chosen = with_processor(isa, mcpu)
    for shape in ("pointwise", "strided"):
        assert_no_spills(assembly(compiled(convolution(CONV[shape]), chosen)[0]), isa)
    loops = innermost_loops(
        assembly(compiled(convolution(CONV["3x3"], "float32"), chosen)[0]), "fmla"
    )
    assert loops
    for body in loops:
        assert not spills(body)
        moves = [line for line in body if re.match(r"mov\s+v\d+\.16b", line)]
        assert len(moves) <= 0.05 * len(body), "\n".join(body)


def test_a_processor_of_another_row_is_refused() -> None:
    with pytest.raises(UnknownTargetError, match=r"arm-dotprod cannot .* 'cortex-a72': .*-n1"):
        with_processor(ISA_TABLE["arm-dotprod"], "cortex-a72")
    with pytest.raises(UnknownTargetError, match="none but its own"):
        with_processor(ISA_TABLE["x86-avx2"], "znver3")


@pytest.mark.parametrize(
    ("members", "largest", "depth"),
    [
        ((-128, 0, -128, 0), 128, 0),  # 2 * 128 * 128 is one more than int16 holds
        ((-128, 0, -128, 0), 127, 1),
        ((127, -127, 127, 127), 128, 1),
        ((60, 60, 60, 60), 128, 2),
        ((31, -31, 31, 31), 128, 4),
        ((-8, 7, -8, 7), 128, 4),
    ],
)
def test_chains_stay_within_int16(members: tuple[int, ...], largest: int, depth: int) -> None:
    packed = np.zeros((1, 8, 1, 4, 4), np.int8)
    packed[0, :, 0, 2] = members
    assert chain_depth(packed, largest) == depth


def test_one_heavy_group_among_light_ones_limits_the_chain() -> None:
    packed = np.ones((1, 9, 1, 4, 4), np.int8)
    packed[0, 4, 0, 1] = (-128, 0, -127, 0)
    assert chain_depth(packed, 128) == 1
    assert chain_depth(packed[:, :4], 128) == 4


# Emulation.


@emulated
def test_the_emulator_refuses_what_a_processor_lacks() -> None:
    """Otherwise the other tests would not see an instruction beyond the row."""
    rng = np.random.default_rng(0)
    for built_for, runs_on in (("arm-dotprod", "arm-neon"), ("arm-i8mm", "arm-dotprod")):
        workload = convolution(CONV["pointwise"])
        module, packed = compiled(workload, ISA_TABLE[built_for])
        x = rng.integers(-128, 128, workload.a_shape).astype(np.int8)
        out = np.zeros(workload.out_shape, np.int8)
        library = emulation.library_of(module)
        arrays = [x, *packed.arrays, out]
        with pytest.raises(emulation.DiedError) as caught:
            emulation.rig().call(runs_on, library, "kernel", arrays)
        assert caught.value.signal is signal.SIGILL
        found = emulation.rig().call(built_for, library, "kernel", arrays)
        assert found.any()


@emulated
@pytest.mark.parametrize("largest", [127, 20])
@each_row
def test_convolutions_at_the_limits(isa: Isa, largest: int) -> None:
    """Weights and activations at the ends of their ranges: int16 sums would overflow first."""
    workload = convolution(CONV["strided"], out="int32")
    params = default_params(workload, isa)
    for value in (-128, 127):
        weight = np.full(workload.weight_shape, -128 if largest == 127 else -largest, np.int8)
        packed = pack_conv(workload, isa, params, weight, GemmValues())
        function = build_conv(workload, isa, params, packed, "kernel")
        module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
        x = np.full(workload.a_shape, value, np.int8)
        out = np.zeros(workload.out_shape, np.int32)
        library = emulation.library_of(module)
        found = emulation.rig().call(isa.name, library, "kernel", [x, *packed.arrays, out])
        np.testing.assert_array_equal(found, 192 * value * int(weight.flat[0]))


@emulated
@pytest.mark.parametrize("weight", [-128, -127, 127])
@each_row
def test_depthwise_at_the_limits(isa: Isa, weight: int) -> None:
    """Sums of two products in int16 overflow for weights of -128 alone; borders skip taps."""
    workload = ConvWorkload(
        1, 7, 9, 24, 24, 3, 3, Epilogue("int32"), pads=(1, 1, 1, 1), groups=24, a_dtype="int8"
    )
    weights = np.full(workload.weight_shape, weight, np.int8)
    values = GemmValues(a_zero_point=-5)
    params = depthwise_params(workload, isa)
    packed = pack_depthwise(workload, isa, params, weights, values)
    function = build_depthwise(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    library = emulation.library_of(module)
    taps = np.add.outer([2, *[3] * 5, 2], np.zeros(9, int)) * np.asarray([2, *[3] * 7, 2])
    for value in (-128, 127):
        x = np.full(workload.a_shape, value, np.int8)
        out = np.zeros(workload.out_shape, np.int32)
        found = emulation.rig().call(isa.name, library, "kernel", [x, *packed.arrays, out])
        want = np.broadcast_to((taps * (value + 5) * weight)[None, :, :, None], out.shape)
        np.testing.assert_array_equal(found, want)


@emulated
@pytest.mark.parametrize("transpose_b", [False, True])
@each_row
def test_products_of_two_activations(isa: Isa, transpose_b: bool) -> None:
    rng = np.random.default_rng(1)
    b_shape = (3, 21, 37) if transpose_b else (3, 37, 21)
    workload = MatmulWorkload(
        (3, 19, 37), b_shape, Epilogue("int32"), "int8", "int8", b_constant=False,
        transpose_b=transpose_b,
    )  # fmt: skip
    a = rng.integers(-128, 128, workload.a_shape).astype(np.int8)
    b = rng.integers(-128, 128, b_shape).astype(np.int8)
    values = GemmValues(a_zero_point=-128, b_zero_point=5)
    params = default_params(workload, isa)
    packed = pack_matmul(workload, isa, params, None, values)
    function = build_matmul(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    out = np.zeros(workload.out_shape, np.int32)
    library = emulation.library_of(module)
    found = emulation.rig().call(isa.name, library, "kernel", [a, b, *packed.arrays, out])
    right = b.astype(np.int64) - 5
    want = (a.astype(np.int64) + 128) @ (right.swapaxes(1, 2) if transpose_b else right)
    np.testing.assert_array_equal(found, want)


@emulated
@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a8-group"])
@each_row
def test_a_model_equals_the_interpreter(isa: Isa, precision: str) -> None:
    folder = MODELS / "digits_cnn"
    calibration = dict(np.load(folder / "calib.npz"))
    evaluation = np.load(folder / "eval.npz")
    result = quantize_model(folder / "model.onnx", calibration=calibration, precision=precision)
    built = build_graph(result.graph, get_target(isa.name))
    assert built.library is not None
    (name,) = (v.name for v in built.graph.inputs)
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        for i in range(3):
            x = evaluation[name][i : i + 1]
            (found,) = execute.run([x])
            (want,) = interpret(built.graph, {name: x}).values()
            np.testing.assert_array_equal(found, want)


@emulated
@pytest.mark.parametrize("precision", ["fp32", "w4", "w8a8-dynamic"])
@each_row
def test_precisions_that_need_no_calibration(isa: Isa, precision: str) -> None:
    folder = MODELS / "digits_cnn"
    evaluation = np.load(folder / "eval.npz")
    result = quantize_model(folder / "model.onnx", precision=precision)
    built = build_graph(result.graph, get_target(isa.name))
    assert built.library is not None
    (name,) = (v.name for v in built.graph.inputs)
    x = evaluation[name][:1]
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        (found,) = execute.run([x])
    (want,) = interpret(built.graph, {name: x}).values()
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-4)


BLOCKS = [
    Case("Conv", DType.UINT8, DType.UINT8, 12, 50, kernel=3, result=DType.UINT8, bias=True),
    Case("MatMul", DType.INT16, DType.UINT4, 12, 50, bias=True),
]


@emulated
@pytest.mark.parametrize("case", BLOCKS, ids=lambda c: c.op)
@each_row
def test_imported_weights_in_blocks(isa: Isa, case: Case) -> None:
    model, x = case.made()
    built = build_graph(quantize_model(model).graph, get_target(isa.name))
    assert {"qconv", "qmatmul"} & {n.op.name for n in built.graph.nodes}
    assert built.library is not None
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        (found,) = execute.run([x])
    (want,) = interpret(built.graph, {"x": x}).values()
    np.testing.assert_array_equal(found, want)


@emulated
@pytest.mark.parametrize(
    "name",
    [
        "blocks of 16 by uint4 in blocks of 8, any",
        "uint8 by computed ones in blocks of 12, one",
        "a window, int16, {'axis': 0}, middle",
        "depthwise, int16, one, columns",
        "dynamic, convolution",
    ],
)
@each_row
def test_imported_products_of_what_is_computed(isa: Isa, name: str) -> None:
    net = Net()
    model = net.model({**CASES, **COMPUTED}[name](net))
    built = build_graph(quantize_model(model).graph, get_target(isa.name))
    assert built.library is not None
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        (found,) = execute.run([net.samples[v.name] for v in built.graph.inputs])
    (want,) = interpret(built.graph, net.samples).values()
    np.testing.assert_array_equal(found, want)


@pytest.mark.slow
@emulated
@pytest.mark.parametrize("name", ["resnet20", "kws_dscnn", "mobilenetv2"])
@each_row
def test_a_model_equals_the_artifact_of_x86(isa: Isa, name: str) -> None:
    """The same numbers on both architectures, and both are the interpreter's, bit for bit."""
    models = imported("catalogue", MODELS / "catalogue.py")
    reason = models.skip_reason(name)
    if reason:
        pytest.skip(reason)
    model = models.external(name, 32, 3)
    result = quantize_model(model.path, calibration=model.calibration, precision="w8a8")
    built, native = (build_graph(result.graph, get_target(t)) for t in (isa.name, "x86-64"))
    assert built.library is not None
    here = executor(native)
    (value,) = built.graph.inputs
    with emulation.executor(isa.name, built.library, built.parameters) as execute:
        for i in range(3):
            x = model.evaluation[value.name][i : i + 1]
            (want,) = interpret(built.graph, {value.name: x}).values()
            np.testing.assert_array_equal(execute.run([x])[0], want)
            np.testing.assert_array_equal(here.run([x])[0], want)


MODULES = sorted(
    path.name
    for path in HERE.glob("test_kernels_*.py")
    if path.stem not in ("test_kernels_amx", "test_kernels_gemm_code")
)


def run_module(rows: str, module: str, *arguments: str) -> None:
    """Run a test module on emulated rows, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module),
         *arguments],
        env={**os.environ, "QCOMPILER_EMULATE": rows},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@emulated
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_under_emulation(module: str) -> None:
    # One test of the matrix products guards memory pages of this process.
    # Winograd is for the row that multiplies by smlal.
    named = [isa.name for isa in ROWS if isa.dot == "smlal" or "winograd" not in module]
    rows = ",".join(named)
    run_module(rows, module, "-k", "not test_no_access_leaves_the_operands")


@pytest.mark.slow
@emulated
@pytest.mark.parametrize("row", [isa.name for isa in ROWS])
def test_whole_models_under_emulation(row: str) -> None:
    """The bundled models, and resnet20, kws_dscnn, mobilenetv2 and others where they are."""
    run_module(row, "test_exactness.py", "-m", "slow or not slow")
