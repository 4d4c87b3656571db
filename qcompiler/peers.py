# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Runners for `side_by_side`: the compiled model, and other runtimes on the same model.

Nothing here takes part in a compilation. Every function runs in a worker process and imports the
runtime it needs; one that is missing is a `QCompilerError`, which the comparison reports.

Each peer gets its best ordinary settings: all graph optimizations, the same number of threads, and
for int8 static quantization per output channel in the faster of ONNX Runtime's two formats. Weights
are quantized to 7 bits (`reduce_range`): with 8, ONNX Runtime's and OpenVINO's kernels for CPUs
without VNNI saturate and their results are wrong; the time does not depend on it.

What prepares a peer (quantizing, compiling) runs in a process of its own again, so that the memory
of the one that is measured is that of inference.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.errors import QCompilerError, UsageError
from qcompiler.side_by_side import Runner
from qcompiler.types import Array

Made = tuple[Callable[[], object], str]

OURS = "qcompiler"
PEERS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime-int8"),
    "openvino": ("openvino", "openvino-int8"),
    "tvm": ("tvm",),
}
"""What a user names, and the runners that it stands for."""

_FACTORIES = {
    "onnxruntime": "onnxruntime_float",
    "onnxruntime-int8": "onnxruntime_int8",
    "openvino": "openvino_float",
    "openvino-int8": "openvino_int8",
    "tvm": "tvm_float",
}
_LOAD_THE_MODEL = ("onnxruntime", "openvino")
"""Runners that need nothing prepared."""
_CALIBRATION_SAMPLES = 64


def expand(names: str) -> tuple[str, ...]:
    """Return the runners that a comma-separated list of peers or runners stands for.

    Raises:
        UsageError: A name that is neither.
    """
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in PEERS and name not in _FACTORIES:
            known = ", ".join(dict.fromkeys([*PEERS, *_FACTORIES]))
            raise UsageError(f"unknown peer {name!r}: known are {known}")
        found += PEERS.get(name, (name,))
    return tuple(dict.fromkeys(found))


def compiled_runner(artifact: Path, inputs: Path, threads: int) -> Runner:
    """Return the runner of an artifact.

    Args:
        artifact: The `.qcm` file.
        inputs: `.npz` with one batch per input.
        threads: Threads per call.
    """
    options = {"artifact": str(artifact), "inputs": str(inputs), "threads": threads}
    return Runner(OURS, f"{__name__}:compiled", options)


def peer_runner(
    name: str,
    model: Path,
    inputs: Path,
    threads: int,
    folder: Path,
    calibration: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    processor: str | None = None,
) -> Runner:
    """Return the runner of a peer.

    Args:
        name: One of the names that `expand` returns.
        model: The ONNX model.
        inputs: `.npz` with one batch per input.
        threads: Threads per call.
        folder: For what is prepared; the int8 runners share quantized models.
        calibration: Samples to quantize with; None: the one batch of inputs.
        environment: Variables of its process.
        processor: LLVM's name of the processor that plain TVM compiles for; None: this one.
    """
    options: dict[str, Any] = {"model": str(model), "inputs": str(inputs), "threads": threads}
    if name not in _LOAD_THE_MODEL:
        options["folder"] = str(folder)
    if name.endswith("-int8"):
        options["calibration"] = str(calibration) if calibration else None
    if name == "tvm":
        options["processor"] = processor
    return Runner(name, f"{__name__}:{_FACTORIES[name]}", options, environment or {})


def compiled(artifact: str, inputs: str, threads: int) -> Made:
    """Run the artifact as a user does: through `CompiledModel`, checks of the inputs included."""
    from qcompiler.runtime import load

    model = load(artifact, threads=threads)
    feeds = _arrays(inputs)
    return lambda: model(feeds), model.target.name


def onnxruntime_float(model: str, inputs: str, threads: int) -> Made:
    """Run the float model in ONNX Runtime."""
    return _session(model, _arrays(inputs), threads), f"ONNX Runtime {_version('onnxruntime')}"


def onnxruntime_int8(
    model: str, inputs: str, threads: int, folder: str, calibration: str | None
) -> Made:
    """Run ONNX Runtime's static int8 in the faster of its two formats, found by a short trial."""
    chosen = apart(f"{__name__}:_faster_format", model, inputs, threads, folder, calibration)
    run = _session(chosen["path"], _arrays(inputs), threads)
    source = "" if calibration else ", calibrated on one random batch"
    how = f"static {chosen['form']}, per channel, 7-bit weights{source}"
    return run, f"ONNX Runtime {_version('onnxruntime')}, {how}"


def _faster_format(
    model: str, inputs: str, threads: int, folder: str, calibration: str | None
) -> dict[str, str]:
    """Quantize into both formats; return the faster one's "form" and "path"."""
    feeds = _arrays(inputs)
    problems: list[str] = []

    def attempt(form: str) -> tuple[float, str, str] | None:
        try:
            path = _quantized(model, feeds, folder, calibration, form)
            return _quick(_session(path, feeds, threads)), form, path
        except Exception as error:  # a format that this model cannot have; the other one may do
            problems.append(f"{form}: {str(error).strip().splitlines()[0]}")
            return None

    trials = [trial for form in ("QDQ", "QOperator") if (trial := attempt(form)) is not None]
    if not trials:
        raise QCompilerError(f"ONNX Runtime cannot quantize the model: {'; '.join(problems)}")
    _, form, path = min(trials)
    return {"form": form, "path": path}


def openvino_float(model: str, inputs: str, threads: int) -> Made:
    """Run the float model in OpenVINO."""
    return _openvino(model, _arrays(inputs), threads), f"OpenVINO {_version('openvino')}"


def openvino_int8(
    model: str, inputs: str, threads: int, folder: str, calibration: str | None
) -> Made:
    """Run in OpenVINO the QDQ model that ONNX Runtime's quantizer makes."""
    _need("openvino")
    path = apart(f"{__name__}:_qdq_model", model, inputs, folder, calibration)["path"]
    how = "static QDQ, 7-bit weights"
    return _openvino(path, _arrays(inputs), threads), f"OpenVINO {_version('openvino')}, {how}"


def _qdq_model(model: str, inputs: str, folder: str, calibration: str | None) -> dict[str, str]:
    """Quantize into the QDQ format; return its "path"."""
    return {"path": _quantized(model, _arrays(inputs), folder, calibration, "QDQ")}


def tvm_float(
    model: str, inputs: str, threads: int, folder: str, processor: str | None = None
) -> Made:
    """Run the float model through TVM's own importer and default pipeline, untuned.

    TVM has no integer path for it: its importer turns quantized operators into float arithmetic.
    """
    _need("tvm")
    built = apart(f"{__name__}:_tvm_library", model, inputs, folder, processor)
    import tvm
    from tvm import relax

    feeds = _arrays(inputs)
    machine = relax.VirtualMachine(tvm.runtime.load_module(built["path"]), tvm.cpu())
    values = [tvm.runtime.tensor(feeds[name]) for name in built["order"]]
    main = machine["main"]
    return lambda: main(*values), f"TVM {tvm.__version__}, float32, default pipeline, untuned"


def _tvm_library(model: str, inputs: str, folder: str, processor: str | None) -> dict[str, Any]:
    """Compile with TVM alone; return the library's "path" and the inputs in their "order"."""
    import onnx
    import tvm
    from tvm.relax.frontend.onnx import from_onnx

    from qcompiler.linker import export_library

    mcpu = processor or str(tvm.target.codegen.llvm_get_system_cpu())
    path, notes = (Path(folder) / f"tvm_{mcpu}{suffix}" for suffix in (".so", ".json"))
    if not notes.exists():
        feeds = _arrays(inputs)
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        module = from_onnx(onnx.load(model), shape_dict=shapes, keep_params_in_input=False)
        order = [p.name for p in module["main"].params]
        _check_names(order, feeds)
        target = tvm.target.Target({"kind": "llvm", "mcpu": mcpu})
        path.write_bytes(export_library(tvm.compile(module, target=target)))
        notes.write_text(json.dumps({"path": str(path), "order": order}))
    found: dict[str, Any] = json.loads(notes.read_text())
    return found


def apart(function: str, *arguments: object) -> dict[str, Any]:
    """Call "module:function" in another process; return what it returns, made of JSON.

    Raises:
        QCompilerError: The function raised one, or its process failed.
    """
    code = (
        "import json, sys; sys.path[:], name, arguments = json.loads(sys.argv[1]); "
        "from qcompiler import peers; peers.answer(name, arguments)"
    )
    request = json.dumps([sys.path, function, arguments])
    done = subprocess.run([sys.executable, "-c", code, request], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        raise QCompilerError(f"preparing the peer failed, status {done.returncode}: {last[:300]}")
    found: dict[str, Any] = json.loads(lines[-1])
    if "problem" in found:
        raise QCompilerError(found["problem"])
    return found


def answer(function: str, arguments: list[Any]) -> None:
    """Print, as JSON on a line, what "module:function" returns, or its problem."""
    module, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)(*arguments)
    except QCompilerError as error:
        found = {"problem": str(error)}
    print("\n" + json.dumps(found))


def _arrays(path: str) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise QCompilerError(f"{module} is not installed", hint="pip install 'qcompiler[bench]'")


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def _session(model: str, feeds: Mapping[str, Array], threads: int) -> Callable[[], object]:
    _need("onnxruntime")
    import onnxruntime

    from qcompiler.ort import runner

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    _check_names([i.name for i in session.get_inputs()], feeds)
    return runner(session, feeds)


def _openvino(model: str, feeds: Mapping[str, Array], threads: int) -> Callable[[], object]:
    _need("openvino")
    import openvino

    core = openvino.Core()
    network = core.read_model(model)
    _check_names([i.get_any_name() for i in network.inputs], feeds)
    network.reshape({name: list(array.shape) for name, array in feeds.items()})
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Without it OpenVINO computes in bfloat16 where the CPU has it: not the same work.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    values = dict(feeds)
    return lambda: request.infer(values)


def _check_names(names: list[str], feeds: Mapping[str, Array]) -> None:
    missing = [name for name in names if name not in feeds]
    if missing:
        raise QCompilerError(
            f"the artifact has no input {', '.join(missing)}: was it frozen to a constant?"
        )


def _quick(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Return the least time of one run among those of a third of a second, in seconds."""
    run()
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return best


def _quantized(
    model: str, feeds: Mapping[str, Array], folder: str, calibration: str | None, form: str
) -> str:
    """Return the path of the statically quantized model, made once per folder and format."""
    path = Path(folder) / f"{form}.onnx"
    if path.exists():
        return str(path)
    _need("onnxruntime")
    import onnx
    from onnx import version_converter
    from onnxruntime import quantization as q

    prepared = Path(folder) / "prepared.onnx"
    if not prepared.exists():
        proto = onnx.load(model)
        opset = max(
            (o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1
        )
        if opset < 13:  # the first opset whose QuantizeLinear has an axis
            proto = version_converter.convert_version(proto, 13)
        source = Path(folder) / "source.onnx"  # given a model in memory, it may lose tensors
        onnx.save(proto, source)
        with contextlib.redirect_stdout(None):
            q.quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    samples = _batches(feeds, calibration)

    class Reader(q.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Array] | None:
            return next(samples, None)

    q.quantize_static(
        str(prepared),
        str(path),
        Reader(),
        quant_format=getattr(q.QuantFormat, form),
        per_channel=True,
        activation_type=q.QuantType.QUInt8,
        weight_type=q.QuantType.QInt8,
        # Without VNNI, ONNX Runtime's kernels saturate with full 8-bit weights; same speed.
        reduce_range=True,
    )
    return str(path)


def _batches(feeds: Mapping[str, Array], calibration: str | None) -> Iterator[dict[str, Array]]:
    """Yield batches of the compiled size; those of the calibration file, or the one there is."""
    if calibration is None or not calibration.endswith(".npz"):
        yield dict(feeds)
        return
    arrays = _arrays(calibration)
    for start in range(_CALIBRATION_SAMPLES):
        batch: dict[str, Array] = {}
        for name, feed in feeds.items():
            values = arrays[name]
            if values.ndim == feed.ndim + 1:
                batch[name] = values[start : start + 1].reshape(-1, *feed.shape[1:])
            else:
                batch[name] = values[start * len(feed) : (start + 1) * len(feed)]
            if batch[name].shape != feed.shape:
                return
        yield batch
