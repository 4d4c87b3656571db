# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels: machine code for every GPU, the right instructions, no spills."""

from __future__ import annotations

import collections
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qcompiler
from qcompiler.errors import CodegenError
from qcompiler.targets.base import TuningBudget
from qcompiler.targets.cuda import backend, nvcc
from qcompiler.targets.cuda.arch import ARCHES, Arch
from qcompiler.targets.cuda.products import Epilogue, Product, Window, product_launch
from qcompiler.targets.cuda.program import Launch, Temporary
from qcompiler.targets.cuda.source import module_source
from qcompiler.targets.cuda.tiles import Tile, candidates
from qcompiler.types import DType

ROOT = Path(__file__).resolve().parents[2]
U8, I8, F16 = DType.UINT8, DType.INT8, DType.FLOAT16
needs_nvcc = pytest.mark.skipif(nvcc.find_nvcc() is None, reason="no nvcc on this machine")


@functools.cache
def tool(name: str) -> str | None:
    """Return the path of a CUDA tool: on the PATH, or from its wheel (nvidia-cuda-...)."""
    found = shutil.which(name)
    if found:
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        for path in sorted(Path(folder).glob(f"*/bin/{name}")):
            return str(path)
    return None


needs_sass = pytest.mark.skipif(
    tool("cuobjdump") is None or tool("nvdisasm") is None or nvcc.find_nvcc() is None,
    reason="no nvcc, or no cuobjdump and nvdisasm (pip install nvidia-cuda-cuobjdump "
    "nvidia-cuda-nvdisasm)",
)


def product(
    arch: Arch, tile: Tile | None = None, *, bits: int = 8, half: bool = False,
    conv: bool = False, constant: bool = True,
) -> Launch:  # fmt: skip
    """Return a product large enough for any tile, with residual and zero points."""
    rows, columns, depth = 4096, 512, 1152
    window = None
    if conv:
        window = Window(4, 32, 32, 128, 32, 32, 3, 3, (1, 1), (1, 1), (1, 1))
    dtype = F16 if half else U8
    held = np.float16 if half else np.int8
    weights = np.ones((1, columns, depth), held) if constant else None
    scale = None if half else np.ones(columns, np.float32)
    epilogue = Epilogue(
        dtype, scale, np.ones(columns), dtype, 3, 0.5, 0.0 if half else -9.0, 90.0, 4
    )
    return product_launch(
        Product(
            Temporary(1), None if constant else Temporary(1), rows, columns, depth, 1, dtype,
            F16 if half else I8, epilogue, Temporary(1), Temporary(1), window, a_row=depth,
            out_row=columns, weights=weights, b_bits=bits, a_zero=0 if half else 5,
            b_zero=np.array([0 if constant or half else 7]),
        ),
        arch, tile,
    )  # fmt: skip


def compiled(launches: dict[str, Launch], arch: Arch) -> tuple[dict[str, str], str]:
    """Return (SASS by kernel, what ptxas said)."""
    found = nvcc.find_nvcc()
    assert found is not None
    source = module_source({name: launch.kernel for name, launch in launches.items()})
    image, said = nvcc.compile_fatbin(found, source, arch.sm, verbose=True)
    path = Path("kernels.fatbin")
    path.write_bytes(image)
    cuobjdump, nvdisasm = tool("cuobjdump"), tool("nvdisasm")
    assert cuobjdump is not None
    assert nvdisasm is not None
    done = subprocess.run(
        [cuobjdump, "-sass", str(path)], capture_output=True, text=True, check=True,
        env={**os.environ, "PATH": f"{Path(nvdisasm).parent}:{os.environ.get('PATH', '')}"},
    )  # fmt: skip
    parts = done.stdout.split("Function : ")[1:]
    return {part.split()[0]: part for part in parts}, said


def instructions(sass: str) -> list[tuple[int, str, str]]:
    """Return (address, opcode, operands) of each instruction."""
    return [
        (int(m[1], 16), m[3], m[4])
        for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?([A-Z0-9_.]+)([^;]*);", sass)
        if (m[2] or "").strip() != "@!PT"  # never executed: fillers that ptxas puts in
    ]


def main_loop(sass: str) -> collections.Counter[str]:
    """Count the opcodes of the loop with the most tensor instructions, by their first word."""
    code = instructions(sass)
    best: collections.Counter[str] = collections.Counter()
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if not opcode.startswith("BRA") or target is None or int(target[1], 16) >= address:
            continue
        inside = [o for a, o, _ in code if int(target[1], 16) <= a <= address]
        words = collections.Counter(o.split(".")[0] for o in inside)
        if words["IMMA"] + words["HMMA"] > best["IMMA"] + best["HMMA"]:
            best = words
    return best


def check_products(launches: dict[str, Launch], arch: Arch) -> None:
    sass, said = compiled(launches, arch)
    assert re.findall(r"([1-9]\d*) bytes spill", said) == []
    for name in launches:
        text, loop = sass[name], main_loop(sass[name])
        half, packed = "half" in name, "w4" in name
        wanted = {
            (True, True): "HMMA.16816.F32", (True, False): "HMMA.1688.F32",
            (False, True): "IMMA.16832", (False, False): "IMMA.8816",
        }[(half, arch.async_copies)]  # fmt: skip
        assert wanted in text, name
        assert loop["HMMA" if half else "IMMA"] >= 4, name
        assert loop["LDSM"] >= 1, name
        assert (loop["LDGSTS"] > 0) == arch.async_copies, name
        # Nothing goes to local memory, and A comes by ldmatrix alone (w4 reads words of B).
        assert loop["LDL"] == loop["STL"] == 0, name
        assert (loop["LDS"] > 0) == packed, name


def sample(arch: Arch) -> dict[str, Launch]:
    stages = 4 if arch.async_copies else 2
    return {
        "gemm": product(arch, Tile(128, 128, 64, 64, 32, stages)),
        "conv": product(arch, Tile(64, 64, 64, 32, 32, stages), conv=True),
        "w4": product(arch, Tile(64, 128, 64, 32, 32, stages), bits=4),
        "half": product(arch, Tile(128, 64, 64, 32, 32, stages), half=True),
        "attention": product(arch, Tile(64, 64, 64, 32, 32, stages), constant=False),
    }


@needs_sass
@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm80", "cuda-sm90"])
def test_products_use_tensor_cores_async_copies_and_no_local_memory(name: str) -> None:
    check_products(sample(ARCHES[name]), ARCHES[name])


@needs_sass
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["cuda-sm75", "cuda-sm90"])
def test_a_convolution_in_blocks_stays_in_registers(name: str, bits: int) -> None:
    """Kernel positions are a pair each: where its windows begin depends on the block index."""
    window = Window(4, 32, 32, 128, 32, 32, 1, 1, (1, 1), (1, 1), (1, 1))
    launch = product_launch(
        Product(
            Temporary(1), None, 4096, 512, 64, 18, U8, I8,
            Epilogue(DType.FLOAT32, np.ones(1, np.float32)), Temporary(1), window=window,
            out_row=512, a_offset="z % 2 * 64", c_offset="z * 2097152", n_offset="z * 512",
            y_offset="z / 6 * 1", x_offset="z / 2 % 3 * 1",
            weights=np.ones((18, 512, 64), np.int8), b_bits=bits, a_zero=5,
        ),
        ARCHES[name],
    )  # fmt: skip
    sass, said = compiled({"blocks": launch}, ARCHES[name])
    assert re.findall(r"([1-9]\d*) bytes spill", said) == []
    words = collections.Counter(o.split(".")[0] for _, o, _ in instructions(sass["blocks"]))
    assert words["IMMA"] >= 4
    assert words["LDL"] == words["STL"] == 0


@needs_sass
@pytest.mark.slow
@pytest.mark.parametrize("name", list(ARCHES))
def test_every_tile_of_every_gpu(name: str) -> None:
    arch = ARCHES[name]
    launches: dict[str, Launch] = {}
    for kind, options in (
        ("gemm", {}), ("conv", {"conv": True}), ("w4", {"bits": 4}), ("half", {"half": True}),
        ("attention", {"constant": False}),
    ):  # fmt: skip
        wide = 2 if kind == "half" else 1
        every = candidates(
            arch, 1152 * wide, packed4=kind == "w4", out_bytes=wide, sums=kind == "attention"
        )
        # More buffers only change constants: the most that fit stand for all.
        most = {(t.bm, t.bn, t.bk): t for t in sorted(every, key=lambda t: t.stages)}
        for tile in most.values():
            launches[f"{kind}_{len(launches)}"] = product(arch, tile, **options)  # type: ignore[arg-type]
    check_products(launches, arch)


@needs_sass
def test_integer_epilogues_hold_no_fused_multiply_add() -> None:
    sass, _ = compiled({"gemm": product(ARCHES["cuda-sm80"])}, ARCHES["cuda-sm80"])
    words = collections.Counter(o.split(".")[0] for _, o, _ in instructions(sass["gemm"]))
    assert words["FFMA"] == 0
    assert words["FMUL"] > 0
    assert words["FADD"] > 0


@needs_nvcc
@pytest.mark.parametrize("name", list(ARCHES))
def test_digits_cnn_builds_for_every_gpu(name: str) -> None:
    folder = ROOT / "models" / "digits_cnn"
    compiled = qcompiler.compile(
        str(folder / "model.onnx"),
        target=name,
        calibration=str(folder / "calib.npz"),
        precision="w8a8",
    )
    extras = compiled.artifact.extras
    assert set(extras) == {backend.PROGRAM, backend.FATBIN}
    assert extras[backend.FATBIN][:4] == b"\x50\xed\x55\xba"  # the magic number of a fatbin
    program = json.loads(extras[backend.PROGRAM])
    assert program["arch"] == ARCHES[name].isa
    assert compiled.target.isa == ARCHES[name].isa


@needs_nvcc
def test_the_same_model_gives_the_same_bytes() -> None:
    folder = ROOT / "models" / "digits_cnn"
    first, second = (
        qcompiler.compile(
            str(folder / "model.onnx"),
            target="cuda-sm80",
            calibration=str(folder / "calib.npz"),
            precision="w8a8",
        ).artifact.digest()
        for _ in range(2)
    )
    assert first == second


@needs_nvcc
def test_what_nvcc_refuses_is_an_error() -> None:
    found = nvcc.find_nvcc()
    assert found is not None
    with pytest.raises(CodegenError, match=r"(?s)nvcc refused the kernels for sm_80: .*nonsense"):
        nvcc.compile_fatbin(found, "nonsense;", 80)


def fake_nvcc(folder: Path, release: str, body: str = "exit 0") -> str:
    path = folder / "nvcc"
    version = f"echo 'Cuda compilation tools, release {release}, V{release}.1'"
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then {version}; exit 0; fi\n{body}\n')
    path.chmod(0o755)
    return str(path)


def small_lowered(target: str) -> tuple[Any, Any]:
    from qcompiler.ir import Graph
    from qcompiler.ops import Stage
    from qcompiler.types import TensorType

    graph = Graph("net", Stage.INTEGER)
    x = graph.add_input("x", TensorType((4,), DType.FLOAT32))
    graph.set_outputs([("y", graph.add("relu", [x]).output)])
    made = backend.make(target)
    return made, made.lower(graph)


def test_without_nvcc_the_source_is_kept_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_nvcc", lambda: None)
    made, lowered = small_lowered("cuda-sm80")
    built = made.build(lowered, TuningBudget())
    assert b"relu_0" in built.members[backend.SOURCE]
    assert backend.FATBIN not in built.members
    assert built.notes == (
        "no nvcc was found: the kernels stay source, which NVRTC compiles when the model is loaded",
    )


def test_an_old_nvcc_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "11.2"))
    made, lowered = small_lowered("cuda-sm90")
    (note,) = made.build(lowered, TuningBudget()).notes
    assert re.match(
        r"nvcc 11\.2 at .* does not know sm_90, which needs 11\.8 or later: .*NVRTC", note
    )


def test_nvcc_is_found_by_its_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", fake_nvcc(tmp_path, "12.4"))
    found = nvcc.find_nvcc()
    assert found is not None
    assert found.version == (12, 4)
    assert nvcc.nvcc_version() == "12.4"
    broken = tmp_path / "elsewhere"
    broken.mkdir()
    monkeypatch.setenv("NVCC", fake_nvcc(broken, "nothing"))
    other = nvcc.find_nvcc()
    assert other is None or other.path != str(broken / "nvcc")
    monkeypatch.setattr(nvcc, "find_nvcc", lambda: None)
    assert nvcc.nvcc_version() == "none"
