# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Executed instructions per inference on an emulated ARM processor, against ONNX Runtime.

Without a board nothing can be timed; what can be counted, exactly and repeatably, is instructions.
Each model is quantized by ONNX Runtime's own quantizer (static, per output channel, activations in
int8 and in uint8), and the same QDQ file goes to our compiler and to ONNX Runtime's library for
aarch64. One C++ program runs either of them, in one thread, under qemu's user mode; a plugin of
qemu counts. An inference is the difference of 11 runs and 1 run, over 10.

With ``--floats``: our artifacts of the float models alone, in float32 and in half precision, 2 runs
less 1 run, since qemu computes halves in software.

Usage: ``python benchmarks/arm.py [--target arm-dotprod:neoverse-n1] [--models resnet20,encoder]
[--floats] [--json FILE]``. Needs Debian's packages qemu-user (its static sibling loads no plugins),
gcc and g++-aarch64-linux-gnu, and downloads the aarch64 wheels of TVM and ONNX Runtime once.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import qcompiler

Array = np.ndarray[Any, np.dtype[Any]]

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests/targets"), str(ROOT / "models")]
import builders  # noqa: E402 (beside the models)
import catalogue  # noqa: E402
import emulation  # noqa: E402 (beside the tests)

SOURCES = Path(__file__).with_name("emulated")
MODELS = ("resnet20", "mobilenetv2", "encoder")
GEMM = "gemm 128x384x1536"
FLOATS = ("fp32", "fp16")
FORMS = ("int8", "uint8")
FEW, MANY = 1, 11
CALIBRATION = 32
_N1 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc asimddp"
_CPUINFO = (
    f"processor\t: 0\nFeatures\t: {_N1}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
    "CPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n"
)
"""A Neoverse N1, for ONNX Runtime, which reads it; Linux shows the host's."""


@dataclass(frozen=True)
class Count:
    """One inference.

    Attributes:
        instructions: Executed ones.
        dots: Those among them that multiply 8-bit integers and add to 32 bits.
        outputs: What the last run returned.
    """

    instructions: int
    dots: int
    outputs: Mapping[str, Array]


@dataclass(frozen=True)
class Counter:
    """Programs that run a model under emulation and count."""

    emulator: str
    plugin: Path
    program: Path
    onnxruntime: Path
    sysroot: Path

    def count(
        self,
        model: str,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Any],
        cpu: str = "neoverse-n1",
        most: int = MANY,
    ) -> Count:
        """Count one inference.

        Args:
            model: What the program takes: a `.qcm`, or a library and an ONNX model.
            inputs: One batch.
            outputs: Dtype of each output.
            cpu: Emulated processor.
            most: Runs of which one is taken off.
        """
        with tempfile.TemporaryDirectory(prefix="qcompiler-count-") as text:
            folder = Path(text)
            arguments = []
            for i, (name, array) in enumerate(inputs.items()):
                (folder / f"in{i}").write_bytes(np.ascontiguousarray(array).tobytes())
                shape = "x".join(map(str, array.shape))
                arguments.append(f"{name}:{array.dtype.name}:{shape}:{folder / f'in{i}'}")
            for i, name in enumerate(outputs):
                arguments.append(f"{name}:{folder / f'out{i}'}")
            few = self._run(model, FEW, arguments, folder / "counts", cpu)
            many = self._run(model, most, arguments, folder / "counts", cpu)
            instructions, dots = ((b - a) / (most - FEW) for a, b in zip(few, many, strict=True))
            found = {
                name: np.frombuffer((folder / f"out{i}").read_bytes(), dtype)
                for i, (name, dtype) in enumerate(outputs.items())
            }
        return Count(round(instructions), round(dots), found)

    def _run(
        self, model: str, runs: int, arguments: list[str], counts: Path, cpu: str
    ) -> tuple[int, int]:
        command = [self.emulator, "-cpu", cpu, "-L", str(self.sysroot)]
        command += ["-plugin", f"{self.plugin},out={counts}"]
        done = subprocess.run(
            [*command, str(self.program), model, str(runs), *arguments],
            env={**os.environ, "TVM_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{model}: status {done.returncode}: {done.stdout}{done.stderr}")
        blocks = [line.split() for line in counts.read_text().splitlines()]
        return (
            sum(int(size) * int(times) for _, size, _, times in blocks),
            sum(int(dots) * int(times) for _, _, dots, times in blocks),
        )


@functools.cache
def counter() -> Counter:
    """Return the programs, made once.

    Raises:
        emulation.MissingError: Something that they take is not here; the message says what.
    """
    emulator = shutil.which("qemu-aarch64")
    if emulator is None:
        raise emulation.MissingError("no qemu-aarch64 that loads plugins: install qemu-user")
    compiler = shutil.which("gcc")
    if compiler is None:
        raise emulation.MissingError("no gcc to compile the counting plugin")
    site = emulation.rig().site
    source = SOURCES / "count.c"
    key = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    plugin: Path = emulation.cache_folder() / "bin" / f"count-{key}.so"
    if not plugin.exists():
        partial = plugin.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-fPIC", "-shared", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise emulation.MissingError(f"gcc cannot compile {source.name}: {done.stderr[-500:]}")
        partial.rename(plugin)
    version = metadata.version("onnxruntime")
    library = f"onnxruntime/capi/libonnxruntime.so.{version}"
    wheel = emulation.unpacked(("onnxruntime",), "onnxruntime", lambda name: name == library)
    program = emulation.compiled_program(SOURCES / "infer.cpp", site)
    return Counter(emulator, plugin, program, wheel / library, _sysroot())


def _sysroot() -> Path:
    """Return a folder that qemu takes files from before the host's: a machine with one ARM core.

    ONNX Runtime reads the topology of the machine as it is loaded, and dies where that is an x86's.
    """
    root: Path = emulation.cache_folder() / "sysroot"
    files = {"proc/cpuinfo": _CPUINFO}
    files |= {f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online")}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    libraries = root / "lib"
    with contextlib.suppress(FileExistsError):
        libraries.symlink_to("/usr/aarch64-linux-gnu/lib")
    return root


@dataclass(frozen=True)
class Case:
    """A float model and samples of its inputs."""

    name: str
    model: Path
    samples: Mapping[str, Array]


def case(name: str, folder: Path) -> Case:
    """Return a model: "gemm MxKxN", "encoder" and others of models/builders.py, or the catalogue's.

    Raises:
        emulation.MissingError: The model is not here.
    """
    if name.startswith("gemm "):
        path = folder / "gemm.onnx"
        rng = np.random.default_rng(0)
        m, k, n = map(int, name.removeprefix("gemm ").split("x"))
        path.write_bytes(_gemm(m, k, n, rng))
        return Case(name, path, {"x": rng.standard_normal((m, k)).astype(np.float32)})
    if name in builders.BUILDERS:
        path = folder / f"{name}.onnx"
        path.write_bytes(builders.BUILDERS[name]().SerializeToString())
        shapes = {i: s.shape for i, s in qcompiler.compile(path, precision="fp32").inputs.items()}
        rng = np.random.default_rng(0)
        samples = {
            i: rng.standard_normal((CALIBRATION, *shape[1:])).astype(np.float32)
            for i, shape in shapes.items()
        }
        return Case(name, path, samples)
    reason = catalogue.skip_reason(name)
    if reason:
        raise emulation.MissingError(reason)
    found = catalogue.external(name, CALIBRATION, 1)
    return Case(name, found.path, found.calibration)


def _gemm(m: int, k: int, n: int, rng: np.random.Generator) -> bytes:
    """Return an ONNX model of one product with constant weights."""
    from onnx import TensorProto, helper, numpy_helper

    w = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [numpy_helper.from_array(w, "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    found: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    return found


def quantized(given: Case, form: str, folder: Path) -> Path:
    """Return the QDQ model that ONNX Runtime's quantizer makes, activations in `form`."""
    import onnx
    from onnx import version_converter
    from onnxruntime import quantization as q

    proto = onnx.load(given.model)
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)
    if opset < 13:  # the first opset whose QuantizeLinear has an axis
        proto = version_converter.convert_version(proto, 13)
    source, prepared = folder / "source.onnx", folder / "prepared.onnx"
    path = folder / f"{given.name}_{form}.onnx"
    onnx.save(proto, source)
    q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)

    def batches() -> Iterator[dict[str, Array]]:
        for i in range(CALIBRATION):
            yield {name: array[i : i + 1] for name, array in given.samples.items()}

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = batches()

        def get_next(self) -> dict[str, Array] | None:
            return next(self.left, None)

    q.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=q.QuantFormat.QDQ,
        per_channel=True,
        activation_type=q.QuantType.QInt8 if form == "int8" else q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
    )
    return path


def bench(name: str, target: str) -> dict[str, Any]:
    """Count one model in both forms; returns the figures."""
    found: dict[str, Any] = {"model": name, "target": target}
    with tempfile.TemporaryDirectory(prefix="qcompiler-arm-") as text:
        folder = Path(text)
        given = case(name, folder)
        inputs = {i: array[:1] for i, array in given.samples.items()}
        for form in FORMS:
            model = quantized(given, form, folder)
            compiled = qcompiler.compile(model, target=target, calibration=dict(given.samples))
            artifact = folder / f"{name}_{form}.qcm"
            compiled.save(artifact)
            outputs = {o: s.dtype.numpy for o, s in compiled.outputs.items()}
            ours = counter().count(str(artifact), inputs, outputs)
            theirs = counter().count(f"{counter().onnxruntime}:{model}", inputs, outputs)
            found[form] = {
                "ours": ours.instructions,
                "ours_dots": ours.dots,
                "onnxruntime": theirs.instructions,
                "onnxruntime_dots": theirs.dots,
                "correlation": min(
                    float(np.corrcoef(ours.outputs[o], theirs.outputs[o])[0, 1]) for o in outputs
                ),
            }
    best = min(found[form]["onnxruntime"] for form in FORMS)
    found["ratio"] = max(found[form]["ours"] for form in FORMS) / best
    return found


def bench_floats(name: str, target: str) -> dict[str, Any]:
    """Count the float model in float32 and in half precision; returns the figures."""
    found: dict[str, Any] = {"model": name, "target": target}
    results: dict[str, Mapping[str, Array]] = {}
    with tempfile.TemporaryDirectory(prefix="qcompiler-arm-") as text:
        folder = Path(text)
        given = case(name, folder)
        inputs = {
            i: array if name.startswith("gemm ") else array[:1]
            for i, array in given.samples.items()
        }
        for precision in FLOATS:
            compiled = qcompiler.compile(given.model, target=target, precision=precision)
            artifact = folder / f"{precision}.qcm"
            compiled.save(artifact)
            outputs = {o: s.dtype.numpy for o, s in compiled.outputs.items()}
            counted = counter().count(str(artifact), inputs, outputs, most=FEW + 1)
            found[precision] = counted.instructions
            results[precision] = counted.outputs
    found["ratio"] = found["fp16"] / found["fp32"]
    found["error"] = max(
        float(np.linalg.norm(half.astype(np.float64) - whole) / np.linalg.norm(whole))
        for half, whole in zip(results["fp16"].values(), results["fp32"].values(), strict=True)
    )
    return found


def float_table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, in millions of instructions."""
    heading = "| model | fp32 | fp16 | fp16 / fp32 | error of the outputs |"
    lines = [
        f"| {row['model']} | {row['fp32'] / 1e6:.2f} | {row['fp16'] / 1e6:.2f} | "
        f"{row['ratio']:.2f} | {row['error']:.1e} |"
        for row in rows
    ]
    return "\n".join([heading, "|---|---|---|---|---|", *lines])


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table, in millions of instructions."""
    lines = [
        "| model | activations | qcompiler | of which dot products | ONNX Runtime | "
        "of which dot products | ours / theirs | correlation of the outputs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for form in FORMS:
            f = row[form]
            lines.append(
                f"| {row['model']} | {form} | {f['ours'] / 1e6:.2f} | {f['ours_dots'] / 1e6:.2f} | "
                f"{f['onnxruntime'] / 1e6:.2f} | {f['onnxruntime_dots'] / 1e6:.2f} | "
                f"{f['ours'] / f['onnxruntime']:.2f} | {f['correlation']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Run the benchmark and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--target", default="arm-dotprod:neoverse-n1")
    parser.add_argument("--models")
    parser.add_argument("--floats", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    usual = (*MODELS, GEMM) if options.floats else MODELS
    names = options.models.split(",") if options.models else usual
    try:
        rows = [(bench_floats if options.floats else bench)(n, options.target) for n in names]
    except emulation.MissingError as error:
        raise SystemExit(str(error)) from None
    print(f"millions of instructions per inference, {options.target} on neoverse-n1\n")
    print(float_table(rows) if options.floats else table(rows))
    for row in [] if options.floats else rows:
        print(f"{row['model']}: our most over their least: {row['ratio']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
