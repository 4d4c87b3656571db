# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Kernels and ResNet-50 on an NVIDIA GPU against torch, interleaved; needs a GPU and torch.

gemm: int8 products with our fused requantize against ``torch._int_mm`` (int32 results, no
epilogue) and a half-precision product of the same shape.
resnet50: our int8 and half-precision models at a batch against torch in half precision,
channels_last, captured as a CUDA graph, with cuDNN's benchmark mode. Device time alone on both
sides: inputs and results stay on the GPU.

Every figure is the median of interleaved rounds; the least and the spread are printed too. Results
are compared before anything is timed: integers with ``torch._int_mm``, bit for bit.

Usage: ``python benchmarks/cuda.py [gemm] [resnet50] [--batch 32] [--rounds 9] [--json FILE]``
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler import cuda_driver
from qcompiler.cuda_executor import CudaExecutor, load_executor
from qcompiler.driver import assemble, build_graph, quantize_model
from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph
from qcompiler.ops import Stage
from qcompiler.registry import get_target
from qcompiler.targets.cuda.arch import ARCHES
from qcompiler.types import DType, PerAxis, QuantParams, TensorType

Timer = Callable[[], list[float]]
SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (1024, 1024, 1024), (128, 4096, 4096))
_RUNS = 20


def own_target() -> str:
    """Return the widest target that this GPU runs."""
    capability = cuda_driver.driver().capability
    return [name for name, arch in ARCHES.items() if arch.sm <= capability][-1]


def interleaved(timers: dict[str, Timer], rounds: int) -> dict[str, dict[str, float]]:
    """Return median, least and spread of each timer, in microseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(statistics.median(timer()))
    found = {}
    for name, values in seconds.items():
        quarter = statistics.quantiles(values, n=4)
        median = statistics.median(values)
        found[name] = {
            "median_us": median * 1e6,
            "min_us": min(values) * 1e6,
            "spread": (quarter[2] - quarter[0]) / median,
        }
    return found


def torch_timer(function: Callable[[], Any]) -> Timer:
    """Return a timer of a torch function between two events, as a CUDA graph where it can be."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()

    def timer() -> list[float]:
        found = []
        for _ in range(_RUNS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) * 1e-3)
        return found

    return timer


def executor_of(graph: Graph) -> CudaExecutor:
    """Return an executor of a shaped graph on this GPU."""
    from qcompiler.driver import Quantized
    from qcompiler.plan import PrecisionPlan

    made = get_target(own_target())
    built = made.build(made.lower(graph), _no_tuning())
    compiled = assemble(built, made.spec, Quantized(None, graph, PrecisionPlan()))
    return load_executor(compiled.artifact)


def _no_tuning() -> Any:
    from qcompiler.targets.base import TuningBudget

    return TuningBudget()


def gemm(rows: int, columns: int, depth: int, rounds: int) -> dict[str, Any]:
    """Time one int8 product and check its integers."""
    import torch

    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (rows, depth)).astype(np.int8)
    w = rng.integers(-127, 128, (depth, columns)).astype(np.int8)
    scale = rng.uniform(1e-3, 2e-3, columns).astype(np.float32)
    q = QuantParams(np.float32(0.02), np.int32(0), DType.INT8, -128, 127)
    out = QuantParams(np.float32(0.02 * 74 * 74 * 1.5e-3 * depth**0.5 / 40), np.int32(0),
                      DType.INT8, -128, 127)  # fmt: skip
    graph = Graph("gemm", Stage.INTEGER)
    x = graph.add_input("x", TensorType(a.shape, DType.INT8, q))
    zeros = np.zeros(columns, np.int32)
    weights = graph.constant(w, "w", QuantParams(scale, zeros, DType.INT8, -128, 127, PerAxis(1)))
    node = graph.add("qmatmul", [x, weights], types=[TensorType((rows, columns), DType.INT8, out)])
    graph.set_outputs([("y", node.output)])
    executor = executor_of(graph)
    (got,) = executor.run([a])
    ta, tw = torch.from_numpy(a).cuda(), torch.from_numpy(np.ascontiguousarray(w.T)).cuda().t()
    acc = torch._int_mm(ta, tw).cpu().numpy()
    from qcompiler import numerics

    want = numerics.requantize(acc, np.float64(q.s) * scale.astype(np.float64), out)
    wrong = int((got != want).sum())
    ha, hw = ta.half(), tw.half()
    times = interleaved(
        {
            "qcompiler int8, requantized": lambda: executor.device_times([a], runs=_RUNS),
            "torch._int_mm": torch_timer(lambda: torch._int_mm(ta, tw)),
            "torch half": torch_timer(lambda: ha @ hw),
        },
        rounds,
    )
    own = times["qcompiler int8, requantized"]["median_us"]
    return {
        "shape": [rows, columns, depth],
        "wrong": wrong,
        "times": times,
        "tops": 2e-6 * rows * columns * depth / own,
        "speed_of_int_mm": times["torch._int_mm"]["median_us"] / own,
    }


def torch_resnet50() -> Any:
    """Return ResNet-50 v1.5 in torch, batch normalization folded away (as our compiler does)."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int) -> None:
            super().__init__()
            self.a = nn.Conv2d(channels, width, 1)
            self.b = nn.Conv2d(width, width, 3, stride, 1)
            self.c = nn.Conv2d(width, 4 * width, 1)
            change = stride != 1 or channels != 4 * width
            self.skip = nn.Conv2d(channels, 4 * width, 1, stride) if change else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.b(torch.relu(self.a(x))))
            return torch.relu(self.c(y) + self.skip(x))

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Block(channels, width, stride if i == 0 else 1))
            channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)]
    return nn.Sequential(*layers)


def resnet50(batch: int, rounds: int) -> dict[str, Any]:
    """Time ResNet-50 at a batch."""
    import torch

    sys.path.append(str(Path(__file__).resolve().parents[1] / "models"))
    builders = importlib.import_module("builders")
    model = builders.resnet50(batch=batch)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, 3, 224, 224)).astype(np.float32)
    made = get_target(own_target())
    timers: dict[str, Timer] = {}
    slowest: dict[str, list[tuple[str, float]]] = {}
    for precision in ("w8a8", "fp16"):
        options = {"calibration": [{"input": x}]} if precision == "w8a8" else {}
        result = quantize_model(model, spec=made.spec, precision=precision, **options)
        compiled = assemble(build_graph(result.graph, made), made.spec, result)
        executor = load_executor(compiled.artifact)
        name = f"qcompiler {precision}"
        timers[name] = lambda e=executor: e.device_times([x], runs=_RUNS)  # type: ignore[misc]
        slowest[name] = sorted(executor.profile([x]), key=lambda t: -t[1])[:10]
    torch.backends.cudnn.benchmark = True
    peer = torch_resnet50().half().cuda().eval().to(memory_format=torch.channels_last)
    held = torch.from_numpy(x).half().cuda().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        timers["torch half, channels_last"] = torch_timer(lambda: peer(held))
        times = interleaved(timers, rounds)
    base = times["torch half, channels_last"]["median_us"]
    return {
        "batch": batch,
        "times": times,
        "speed_of_torch_half": {n: base / t["median_us"] for n, t in times.items()},
        "slowest_kernels": slowest,
    }


def main() -> int:
    """Run what is asked for; print, and write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["gemm", "resnet50"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json")
    options = parser.parse_args()
    try:
        gpu = cuda_driver.driver()
    except QCompilerError as error:
        print(f"nothing is measured: {error}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("torch") is None:
        print("nothing is measured: torch is the peer, and is not installed", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"gpu": gpu.name, "capability": gpu.capability, "gemm": []}
    wrong = 0
    if "gemm" in options.what:
        for shape in SHAPES:
            found = gemm(*shape, options.rounds)
            wrong += found["wrong"]
            report["gemm"].append(found)
            print(json.dumps(found, indent=1))
    if "resnet50" in options.what:
        report["resnet50"] = resnet50(options.batch, options.rounds)
        print(json.dumps(report["resnet50"], indent=1))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if wrong:
        print(f"{wrong} integers are wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
