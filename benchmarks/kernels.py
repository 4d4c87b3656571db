# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Speed of the matrix kernels, shape by shape, on every instruction set of this machine.

    python benchmarks/kernels.py [--isa x86-avx2 ...] [--dtype uint8|float32] [--filter 3x3]
                                 [--weights normal|laplace|safe|flat|extreme] [--threads 1]
                                 [--weight-bits 8] [--activation-bits 8]
                                 [--activations rectified|uniform]

Prints GMAC/s (median and best of the repeats), the share of the peak, the tiling and the compile
time.  The peak is measured on the same core with a loop of nothing but dot instructions.  Weights
are quantized per output channel over the range of their bits; "safe" and "flat" weights never
saturate int16.  "rectified" activations are distributed as a rectifier leaves them, the largest
number at six standard deviations: kernels that ask for the size of their activations need it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import numpy as np

from qcompiler.targets.isa import ISA_TABLE, Isa, runnable, tvm_target
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

Workload = ConvWorkload | MatmulWorkload


def conv(
    size: int, c: int, co: int, kernel: int, dtype: str, stride: int = 1, residual: bool = False
) -> ConvWorkload:
    """A square convolution with "same" padding."""
    return ConvWorkload(
        n=1,
        h=size,
        w=size,
        c=c,
        co=co,
        kh=kernel,
        kw=kernel,
        epilogue=Epilogue(dtype, dtype if residual else None),
        strides=(stride, stride),
        pads=(kernel // 2,) * 4,
        a_dtype=dtype,
    )


def dense(m: int, k: int, n: int, dtype: str) -> MatmulWorkload:
    """A product with constant weights."""
    b_dtype = "float32" if dtype == "float32" else "int8"
    return MatmulWorkload((1, m, k), (k, n), Epilogue(dtype), dtype, b_dtype)


def attention(heads: int, tokens: int, width: int, dtype: str, scores: bool) -> MatmulWorkload:
    """Q times K transposed, or probabilities times V."""
    a = (1, heads, tokens, width if scores else tokens)
    b = (1, heads, tokens, width)
    return MatmulWorkload(a, b, Epilogue(dtype), dtype, dtype, False, False, scores)


def shapes(dtype: str) -> dict[str, Workload]:
    """The layers of ResNet-50, MobileNetV2 and an encoder that matter."""
    found: dict[str, Workload] = {
        "resnet 7x7/2 224 3-64": conv(224, 3, 64, 7, dtype, 2),
        "resnet 1x1 56 64-64": conv(56, 64, 64, 1, dtype),
        "resnet 1x1 56 64-256 +": conv(56, 64, 256, 1, dtype, residual=True),
        "resnet 1x1 56 256-64": conv(56, 256, 64, 1, dtype),
        "resnet 3x3 56 64": conv(56, 64, 64, 3, dtype),
        "resnet 3x3/2 56 128": conv(56, 128, 128, 3, dtype, 2),
        "resnet 1x1/2 56 256-512": conv(56, 256, 512, 1, dtype, 2),
        "resnet 1x1 28 512-128": conv(28, 512, 128, 1, dtype),
        "resnet 1x1 28 128-512 +": conv(28, 128, 512, 1, dtype, residual=True),
        "resnet 3x3 28 128": conv(28, 128, 128, 3, dtype),
        "resnet 1x1 14 1024-256": conv(14, 1024, 256, 1, dtype),
        "resnet 1x1 14 256-1024 +": conv(14, 256, 1024, 1, dtype, residual=True),
        "resnet 3x3 14 256": conv(14, 256, 256, 3, dtype),
        "resnet 1x1 7 2048-512": conv(7, 2048, 512, 1, dtype),
        "resnet 1x1 7 512-2048 +": conv(7, 512, 2048, 1, dtype, residual=True),
        "resnet 3x3 7 512": conv(7, 512, 512, 3, dtype),
        "resnet dense 2048-1000": dense(1, 2048, 1000, dtype),
        "mobile 1x1 112 32-16": conv(112, 32, 16, 1, dtype),
        "mobile 1x1 56 144-24": conv(56, 144, 24, 1, dtype),
        "mobile 1x1 28 192-32": conv(28, 192, 32, 1, dtype),
        "mobile 1x1 14 96-576": conv(14, 96, 576, 1, dtype),
        "mobile 1x1 14 384-64": conv(14, 384, 64, 1, dtype),
        "mobile 1x1 7 960-160": conv(7, 960, 160, 1, dtype),
        "mobile 1x1 7 320-1280": conv(7, 320, 1280, 1, dtype),
        "encoder 128x384x384": dense(128, 384, 384, dtype),
        "encoder 128x384x1536": dense(128, 384, 1536, dtype),
        "encoder 128x1536x384": dense(128, 1536, 384, dtype),
        "attention 12x128x64 scores": attention(12, 128, 64, dtype, True),
        "attention 12x128x64 values": attention(12, 128, 64, dtype, False),
    }
    return found


def make_weights(kind: str, shape: tuple[int, ...], axis: int, dtype: str, bits: int = 8) -> Any:
    """Weights of the named distribution, of some bits per output channel or float32."""
    rng = np.random.default_rng(0)
    if kind == "flat":
        w = np.ones(shape)
    elif kind == "laplace":
        w = rng.laplace(size=shape)
    elif kind == "extreme":
        w = rng.choice([-1.0, 1.0], shape)
    else:
        w = rng.standard_normal(shape)
    if dtype == "float32":
        return (w / 32).astype(np.float32)
    axes = tuple(i for i in range(w.ndim) if i != axis % w.ndim)
    largest = np.abs(w).max(axis=axes, keepdims=True)
    top = 64 if kind in ("safe", "flat") else 2 ** (bits - 1) - 1
    return np.round(w / largest * top).astype(np.int8)


def measure(
    workload: Workload,
    isa: Isa,
    weights: str,
    repeats: int,
    bits: tuple[int, int] = (8, 8),
    activations: str = "uniform",
) -> tuple[float, float, str, float]:
    """Median and best seconds, the tiling, and the seconds to compile.

    `bits` are those of the weights and of the activations.
    """
    import tvm

    rng = np.random.default_rng(1)

    def data(shape: tuple[int, ...], dtype: str) -> Any:
        if dtype == "float32":
            return rng.standard_normal(shape).astype(np.float32)
        top = 2 ** bits[1] - 1
        if activations == "uniform":
            return rng.integers(0, top, shape, endpoint=True).astype(dtype)
        return np.clip(rng.standard_normal(shape) * (top / 6), 0, top).astype(dtype)

    is_float = workload.a_dtype == "float32"
    values = (
        GemmValues()
        if is_float
        else GemmValues(multiplier=1e-4, a_zero_point=3, a_qmin=0, a_qmax=2 ** bits[1] - 1)
    )
    params = default_params(workload, isa)
    operands = [data(workload.a_shape, workload.a_dtype)]
    start = time.perf_counter()
    if isinstance(workload, ConvWorkload):
        weight = make_weights(weights, workload.weight_shape, 0, workload.a_dtype, bits[0])
        packed = pack_conv(workload, isa, params, weight, values)
        function = build_conv(workload, isa, params, packed, "kernel")
    else:
        b = None
        if workload.b_constant:
            b = make_weights(weights, workload.b_shape, -1, workload.a_dtype, bits[0])
        else:
            operands.append(data(workload.b_shape, workload.b_dtype))
        packed = pack_matmul(workload, isa, params, b, values)
        function = build_matmul(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    compiled = time.perf_counter() - start
    if workload.epilogue.residual_dtype is not None:
        operands.append(data(workload.out_shape, workload.epilogue.residual_dtype))
    out = np.zeros(workload.out_shape, workload.epilogue.out_dtype)
    tensors = [tvm.runtime.tensor(array) for array in (*operands, *packed.arrays, out)]
    once = module.mod.time_evaluator("kernel", tvm.cpu(), number=1)(*tensors).mean
    number = max(1, int(2e-3 / once))
    evaluator = module.mod.time_evaluator("kernel", tvm.cpu(), number=number, repeat=repeats)
    times = evaluator(*tensors).results
    tiling = f"{params.mt}x{params.nv}x{params.lanes} {packed.facts.dot}"
    if packed.facts.dot == "winograd":
        tiling = "winograd {}x{}".format(*packed.facts.patch)
    elif packed.facts.dot in ("maddubs", "mixed"):
        tiling += " " + ",".join(map(str, packed.facts.depths))
    return statistics.median(times), min(times), tiling, compiled


def peak(isa: Isa, dtype: str) -> float:
    """GMAC/s of one core on a product whose operands stay in the nearest cache.

    Without deep sums in int16, which can exceed this on rows that multiply with `vpmaddubsw`.
    """
    workload = dense(96, 1024, isa.lanes() * 2, dtype)
    _, best, _, _ = measure(workload, isa, "flat", 20)
    return workload.macs / best / 1e9


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    here = [isa.name for isa in ISA_TABLE.values() if runnable(isa)]
    parser.add_argument("--isa", nargs="*", default=here, choices=here)
    parser.add_argument("--dtype", default="uint8", choices=["uint8", "float32"])
    parser.add_argument("--weights", default="normal")
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--activations", default="rectified", choices=["rectified", "uniform"])
    parser.add_argument("--filter", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    os.environ["TVM_NUM_THREADS"] = str(arguments.threads)
    for name in arguments.isa:
        isa = ISA_TABLE[name]
        top = peak(isa, arguments.dtype) * arguments.threads
        print(f"{name} {arguments.dtype}, {arguments.threads} threads: peak {top:.0f} GMAC/s")
        for label, workload in shapes(arguments.dtype).items():
            if arguments.filter not in label:
                continue
            median, best, tiling, seconds = measure(
                workload,
                isa,
                arguments.weights,
                arguments.repeats,
                (arguments.weight_bits, arguments.activation_bits),
                arguments.activations,
            )
            speed, fastest = workload.macs / median / 1e9, workload.macs / best / 1e9
            print(
                f"  {label:27s} {workload.macs / 1e6:7.1f} MMAC  {speed:6.1f} (best {fastest:6.1f})"
                f" GMAC/s {fastest / top:4.0%}  {tiling:22s} {seconds:.2f} s to compile",
                flush=True,
            )


if __name__ == "__main__":
    main()
