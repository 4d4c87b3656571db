# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Inner loops of the ARM kernels by llvm-mca: cycles of an iteration, and what they wait for.

Each kernel is compiled for a processor of its row, its hottest loop is cut out of the assembly, and
llvm-mca models it on LLVM's description of the processor: decoding, ports and latencies, with every
load a hit in level 1. Share of the peak: cycles of the multiplying instructions alone, over those
of the whole loop.

Usage: ``python benchmarks/arm_loops.py [--mca llvm-mca-19] [--json FILE]``. The models of Neoverse
came with LLVM 17 and 18 (Debian: package llvm-19); older ones take a Cortex-A57 for them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.targets.isa import Isa, isa_named, tvm_target, with_processor
from qcompiler.targets.kernels import depthwise, gemm
from qcompiler.targets.kernels.gemm import ConvWorkload, Epilogue, GemmValues

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests/targets"))
import machine_code  # noqa: E402 (beside the tests)

PROCESSORS = (
    ("arm-neon", "cortex-a53"),
    ("arm-neon", "cortex-a72"),
    ("arm-dotprod", "cortex-a55"),
    ("arm-dotprod", "neoverse-n1"),
    ("arm-i8mm", "neoverse-n2"),
    ("arm-i8mm", "neoverse-v1"),
)
SHAPES: dict[str, dict[str, Any]] = {
    "1x1, 192 to 64 channels": {"h": 14, "w": 14, "c": 192, "co": 64, "kh": 1, "kw": 1},
    "3x3, 64 to 64 channels": {
        "h": 28, "w": 28, "c": 64, "co": 64, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1)
    },
    "3x3, float32": {
        "h": 28, "w": 28, "c": 64, "co": 64, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1),
        "a_dtype": "float32",
    },
    "3x3, float16": {
        "h": 28, "w": 28, "c": 64, "co": 64, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1),
        "a_dtype": "float16",
    },
    "depthwise 3x3": {
        "h": 28, "w": 28, "c": 96, "co": 96, "kh": 3, "kw": 3, "pads": (1, 1, 1, 1), "groups": 96
    },
}  # fmt: skip
ITERATIONS = 200
_MULTIPLY = re.compile(r"(sdot|smmla|smlal2?|smull2?|fmla)\s+v\d+\.(\w+), v\d+\.(\w+)")
_UNIT = re.compile(r"^.*Unit|[^A-Za-z0-9]")
_PRODUCTS = {"sdot": 16, "smmla": 32, "8h": 8, "4s": 4}
_NEWEST = (21, 20, 19, 18, 17)


@dataclass(frozen=True)
class Loop:
    """What llvm-mca says of a loop.

    Attributes:
        instructions: Of an iteration.
        products: Multiplied and added numbers of an iteration.
        cycles: Of an iteration.
        least: Cycles of the multiplying instructions alone.
        pressure: Cycles that each unit is busy in an iteration, the busiest first.
    """

    instructions: int
    products: int
    cycles: float
    least: float
    pressure: tuple[tuple[str, float], ...]

    @property
    def share(self) -> float:
        """Share of the peak of the multiplying instructions."""
        return self.least / self.cycles


def find_mca(named: str | None = None) -> str | None:
    """Return llvm-mca, the newest that is here unless one is named; None without one."""
    names = [named] if named else [*(f"llvm-mca-{n}" for n in _NEWEST), "llvm-mca"]
    return next((path for name in names if (path := shutil.which(name))), None)


def version(mca: str) -> int:
    """Return the major version of llvm-mca."""
    said = subprocess.run([mca, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"LLVM version (\d+)", said)
    return int(found.group(1)) if found else 0


def hot_loop(shape: dict[str, Any], isa: Isa) -> list[str]:
    """Return the innermost loop of a kernel that multiplies most; empty where it has none."""
    import tvm

    a_dtype = shape.get("a_dtype", "int8")
    if a_dtype == "float16" and not isa.halves:
        return []
    workload = ConvWorkload(n=1, epilogue=Epilogue(a_dtype), **{"a_dtype": a_dtype, **shape})
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, workload.weight_shape).astype(np.int8)
    values = GemmValues(multiplier=1e-3)
    params: Any
    if workload.groups > 1:
        params = depthwise.default_params(workload, isa)
        packed = depthwise.pack_depthwise(workload, isa, params, weight, values)
        function = depthwise.build_depthwise(workload, isa, params, packed, "kernel")
    else:
        given = weight if a_dtype == "int8" else weight.astype(a_dtype)
        params = gemm.default_params(workload, isa)
        packed = gemm.pack_conv(workload, isa, params, given, values)
        function = gemm.build_conv(workload, isa, params, packed, "kernel")
    module = tvm.compile(tvm.IRModule({"kernel": function}), target=tvm_target(isa))
    loops = machine_code.innermost_loops(module.mod.inspect_source("asm"), "")
    return max(loops, key=lambda body: sum(map(products, body)), default=[])


def products(line: str) -> int:
    """Return how many numbers an instruction multiplies and adds."""
    found = _MULTIPLY.match(line)
    if found is None:
        return 0
    return _PRODUCTS.get(found.group(1)) or _PRODUCTS.get(found.group(2), 0)


def model(body: list[str], isa: Isa, mca: str) -> Loop:
    """Run llvm-mca on a loop."""
    counted = sum(map(products, body))
    if not counted:
        raise ValueError("the loop multiplies nothing")
    whole = _modelled(body, isa, mca)
    # Independent sums: what the multiplying units take, without anything to wait for.
    alone = _modelled([line for line in body if products(line)], isa, mca)
    summary = whole["CodeRegions"][0]["SummaryView"]
    names = whole["TargetInfo"]["Resources"]
    usage: dict[int, float] = {}
    for entry in whole["CodeRegions"][0]["ResourcePressureView"]["ResourcePressureInfo"]:
        if entry["InstructionIndex"] == len(body):
            index = entry["ResourceIndex"]
            usage[index] = usage.get(index, 0.0) + entry["ResourceUsage"]
    busy = sorted(usage.items(), key=lambda item: -item[1])
    return Loop(
        len(body),
        counted,
        summary["TotalCycles"] / ITERATIONS,
        float(alone["CodeRegions"][0]["SummaryView"]["BlockRThroughput"]),
        tuple((_UNIT.sub("", names[index]), cycles) for index, cycles in busy),
    )


def _modelled(body: list[str], isa: Isa, mca: str) -> dict[str, Any]:
    command = [mca, f"-mtriple={isa.mtriple}", f"-mcpu={isa.mcpu}", "-json"]
    command += ["-mattr=+dotprod,+fullfp16,+i8mm", f"-iterations={ITERATIONS}"]
    done = subprocess.run(
        command, input="\n".join(body) + "\n", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"llvm-mca: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: list[tuple[str, str, str, Loop]]) -> str:
    """Return a Markdown table."""
    lines = [
        "| row, processor | kernel | instructions | cycles | products a cycle | share of the peak "
        "| busiest units (cycles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, processor, kernel, loop in rows:
        units = ", ".join(f"{name} {cycles:.0f}" for name, cycles in loop.pressure[:3])
        lines.append(
            f"| {row}, {processor} | {kernel} | {loop.instructions} | {loop.cycles:.1f} | "
            f"{loop.products / loop.cycles:.1f} | {loop.share:.0%} | {units} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Model all loops and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--mca")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    mca = find_mca(options.mca)
    if mca is None:
        raise SystemExit("no llvm-mca: install llvm-19")
    rows = []
    for row, processor in PROCESSORS:
        isa = with_processor(isa_named(row), processor)
        for kernel, shape in SHAPES.items():
            body = hot_loop(shape, isa)
            if sum(map(products, body)):
                rows.append((row, processor, kernel, model(body, isa, mca)))
    print(f"llvm-mca {version(mca)}\n\n{table(rows)}")
    if options.json:
        found = [
            {"row": r, "processor": p, "kernel": k, **vars(replace(loop))} for r, p, k, loop in rows
        ]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
