# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""ONNX's official backend tests, run against this compiler in processes that may die.

    python tests/onnx_backend.py -o results.json [--target host] [--only REGEX] [--table FILE]

A run that was stopped goes on where it was when it gets the same results.json; it says how far it
is. `--again refused,wrong` runs the cases with these outcomes again.

Every case is compiled with precision fp32, run, and compared with the suite's own tolerance. Its
outcome is `pass`, `refused` (an UnsupportedOpError or UnsupportedByTargetError), `wrong` (another
value, shape or dtype), `error` (any other exception), `crash` or `hang` of the process, or
`excluded` (sequences, optionals, strings, training and preview operators).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

STATUSES = ("pass", "refused", "wrong", "error", "crash", "hang", "excluded")
TIMEOUT_S = 60.0
PATIENCE = 20
"""How many times as long a case may take on a machine that does something else."""

_NOISE = "the expected values hold rounding errors of 2e-7 where the exact ones are 0"
TOLERANCES = dict.fromkeys(("test_dft_inverse", "test_dft_inverse_opset19"), (1e-6, _NOISE))
"""Absolute tolerances other than the suite's, and why (as ONNX's own runner takes them)."""

SHAPE_OPERANDS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Reshape", "Expand", "Tile", "Squeeze", "Unsqueeze", "Split"), (1,)),
    **dict.fromkeys(("TopK", "AffineGrid", "CenterCropPad", "OneHot", "MaxUnpool"), (1,)),
    **{
        f"Reduce{kind}": (1,)
        for kind in (
            *("Mean", "Sum", "Max", "Min", "Prod", "L1", "L2"),
            *("SumSquare", "LogSum", "LogSumExp"),
        )
    },
    "ConstantOfShape": (0,),
    "CumSum": (1,),
    "CumProd": (1,),
    "Col2Im": (1, 2),
    "DFT": (1, 2),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "STFT": (1, 3),
    "Trilu": (1,),
    "Upsample": (1,),
    **dict.fromkeys(("BlackmanWindow", "HannWindow", "HammingWindow"), (0,)),
    "MelWeightMatrix": (0, 1, 2, 3, 4),
}
"""Operands that only say shapes, axes, ranges or counts: a compiler needs them as constants."""
SHAPE_OPERANDS["MaxUnpool"] = (2,)
SHAPE_OPERANDS["OneHot"] = (1,)
SHAPE_OPERANDS["Loop"] = (0, 1)
"""The trip count and the condition of a loop decide the shape of its scan outputs."""

REFUSALS = ("cannot have the shape", "values that are NaN", "opsets 7 to")
"""Refusals of the whole model or its data: empty inputs, NaN or infinity, opsets out of range."""

_FORWARDS = frozenset(
    {
        *("Cast", "Concat", "Gather", "Slice", "Reshape", "Squeeze", "Unsqueeze", "Identity"),
        *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Max", "Min", "Where", "Equal", "Less"),
        *("Greater", "Range", "Expand", "ConstantOfShape", "Size", "Shape", "Abs"),
        *("Ceil", "Relu"),
    }
)
_EXCLUDED_OPS = re.compile(r"Sequence|Optional|String|Regex|Tokenizer")
_EXCLUDED_DOMAINS = re.compile("training|preview")


@dataclass(frozen=True)
class Outcome:
    """What came of one case.

    Attributes:
        status: One of STATUSES.
        reason: Message of the refusal or failure, in one line.
        seconds: Wall time.
    """

    status: str
    reason: str = ""
    seconds: float = 0.0


KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator")
"""Kinds of cases; all of `real` are downloads."""


def load_cases(kinds: Iterable[str] = KINDS) -> dict[str, Any]:
    """Return the suite's cases by name; those that need a download are not among them."""
    from onnx.backend.test.loader import load_model_tests

    cases = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in kinds:
            for case in load_model_tests(kind=kind):
                if case.model is not None or (case.model_dir and Path(case.model_dir).is_dir()):
                    cases[case.name] = case
    return cases


def _model(case: Any) -> onnx.ModelProto:
    if case.model is not None:
        return case.model
    return onnx.load(str(Path(case.model_dir) / "model.onnx"))


def _data_sets(case: Any, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
    if case.data_sets is not None:
        yield from case.data_sets
        return
    stored = {t.name for t in model.graph.initializer}
    for folder in sorted(Path(case.model_dir).glob("test_data_set_*")):
        found: list[list[Any]] = []
        for what, infos in (("input", model.graph.input), ("output", model.graph.output)):
            arrays = []
            for i in range(len(infos)):
                if what == "input" and infos[i].name in stored:
                    continue  # old models list their weights among the inputs
                tensor = onnx.TensorProto()
                number = len(arrays)
                tensor.ParseFromString((folder / f"{what}_{number}.pb").read_bytes())
                arrays.append(onnx.numpy_helper.to_array(tensor))
            found.append(arrays)
        yield found[0], found[1]


def _inputs(model: onnx.ModelProto) -> list[str]:
    """Return the inputs that data comes for."""
    stored = {t.name for t in model.graph.initializer}
    return [i.name for i in model.graph.input if i.name not in stored]


def excluded(model: onnx.ModelProto, data: Mapping[str, Any] | None = None) -> str:
    """Return which feature takes the case out of the count, or an empty text.

    Args:
        model: The case's model.
        data: Its inputs by name.
    """
    for info in (*model.graph.input, *model.graph.output):
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            return f"{str(kind).removesuffix('_type')} values"
        if info.type.tensor_type.elem_type == onnx.TensorProto.STRING:
            return "strings"
    for node in _nodes(model.graph):
        if _EXCLUDED_DOMAINS.search(node.domain):
            return f"domain {node.domain}"
        if _EXCLUDED_OPS.search(node.op_type):
            return f"operator {node.op_type}"
        if any(a.name == "training_mode" and a.i for a in node.attribute):
            return "training mode"
        if node.op_type == "Dropout" and np.any((data or {}).get("".join(node.input[2:3]), False)):
            return "training mode"
        for a in node.attribute:
            if a.name == "to" and a.i == onnx.TensorProto.STRING:
                return "strings"
    return ""


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for a in node.attribute:
            for inner in (a.g, *a.graphs):
                yield from _nodes(inner)


def shape_inputs(model: onnx.ModelProto) -> list[str]:
    """Return the inputs that only say shapes, axes, ranges, counts or (`CastLike`) a dtype."""
    results = {o.name for o in model.graph.output}
    integers = onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.FLOAT
    loops = [n for n in model.graph.node if n.op_type == "Loop"]

    def counts_trips(name: str) -> bool:
        """Whether a trip count or condition depends on the value, whatever else reads it."""
        if any(name in n.input[:2] for n in loops):
            return True
        return any(
            name in n.input and n.op_type in _FORWARDS and any(map(counts_trips, n.output))
            for n in model.graph.node
        )

    def only_shapes(name: str) -> bool:
        if name in results:
            return False
        found = False
        for node in model.graph.node:
            for i, read in enumerate(node.input):
                if read != name:
                    continue
                found = True
                if i in SHAPE_OPERANDS.get(node.op_type, ()):
                    continue
                if node.op_type == "Shape":
                    continue
                if node.op_type not in _FORWARDS or not all(map(only_shapes, node.output)):
                    return False
        return found

    names = []
    for info in model.graph.input:
        readers = [
            (n, i) for n in model.graph.node for i, r in enumerate(n.input) if r == info.name
        ]
        if all(n.op_type == "CastLike" and i == 1 for n, i in readers):
            names.append(info.name)  # nothing reads its elements
            continue
        if loops and counts_trips(info.name):
            names.append(info.name)
            continue
        t = info.type.tensor_type
        if t.elem_type not in integers or len(t.shape.dim) > 1:
            continue
        if t.elem_type == onnx.TensorProto.FLOAT and not any(
            n.op_type in ("Resize", "Upsample", "Range", "MelWeightMatrix", "OneHot")
            for n in _nodes(model.graph)
        ):
            continue
        if only_shapes(info.name):
            names.append(info.name)
    return names


def _held(array: Any) -> Any:
    """Return the array in the numpy dtype in which this compiler holds its element type."""
    from qcompiler.onnx_import_tensors import from_onnx_array

    if isinstance(array, onnx.TensorProto):
        array = onnx.numpy_helper.to_array(array)
    return from_onnx_array(np.asarray(array))[0]


def run_case(case: Any, target: str = "host") -> Outcome:
    """Compile, run and compare one case."""
    from qcompiler.errors import QCompilerError, UnsupportedByTargetError, UnsupportedOpError

    started = time.perf_counter()

    def done(status: str, reason: str = "") -> Outcome:
        return Outcome(status, " ".join(reason.split())[:400], time.perf_counter() - started)

    try:
        model = _model(case)
        for inputs, outputs in _data_sets(case, model):
            feature = excluded(model, dict(zip(_inputs(model), inputs, strict=False)))
            if feature:
                return done("excluded", feature)
            problem = _compare(case, model, inputs, outputs, target)
            if problem:
                return done("wrong", problem)
    except (UnsupportedOpError, UnsupportedByTargetError) as error:
        return done("refused", f"{type(error).__name__}: {error.message}")
    except QCompilerError as error:
        if any(text in error.message for text in REFUSALS):
            return done("refused", f"{type(error).__name__}: {error.message}")
        return done("error", f"{type(error).__name__}: {error.message}")
    except Exception as error:  # whatever it is, it is a finding
        return done("error", f"{type(error).__name__}: {error}")
    names = ", ".join(_frozen_floats(model))
    return done("pass", f"freezes {names}" if names else "")


def _frozen_floats(model: onnx.ModelProto) -> list[str]:
    """Return the inputs that are frozen though they are no integers (and more than a dtype)."""
    integers = {onnx.TensorProto.INT64, onnx.TensorProto.INT32}
    fixed = set(shape_inputs(model))
    read = {n for node in model.graph.node if node.op_type != "CastLike" for n in node.input}
    return [
        i.name
        for i in model.graph.input
        if i.name in fixed & read and i.type.tensor_type.elem_type not in integers
    ]


def _compare(
    case: Any, model: onnx.ModelProto, inputs: list[Any], outputs: list[Any], target: str
) -> str:
    from qcompiler.driver import assemble, build_graph, quantize_model
    from qcompiler.registry import get_target

    names = _inputs(model)
    fixed = set(shape_inputs(model))
    data = dict(zip(names, inputs, strict=False))
    freeze = {n: _held(a) for n, a in data.items() if n in fixed}
    shapes = {
        i.name: _held(data[i.name]).shape
        for i in model.graph.input
        if i.name in data
        and i.name not in fixed
        and any(d.dim_value <= 0 for d in i.type.tensor_type.shape.dim)
    }
    backend = get_target(target)
    result = quantize_model(
        model, spec=backend.spec, precision="fp32", freeze=freeze, input_shapes=shapes
    )
    compiled = assemble(build_graph(result.graph, backend), backend.spec, result)
    # An input that nothing reads is none of the compiled model's.
    feeds = {n: _held(a) for n, a in data.items() if n in compiled.inputs}
    found = compiled(feeds)
    for info, want in zip(model.graph.output, outputs, strict=True):
        got, expected = found[info.name], _held(want)
        if got.dtype != expected.dtype or got.shape != expected.shape:
            have, wanted = (f"{a.dtype}{list(a.shape)}" for a in (got, expected))
            return f"{info.name}: {have} instead of {wanted}"
        try:
            atol = max(case.atol, TOLERANCES.get(case.name, (0.0, ""))[0])
            np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=atol)
        except AssertionError as error:
            return f"{info.name}: {error}"
    return ""


# ---------------------------------------------------------------------------------- processes


def _serve(cases: dict[str, Any], target: str, pipe: Connection) -> None:
    while True:
        name = pipe.recv()
        if name is None:
            return
        pipe.send(run_case(cases[name], target))


class Worker:
    """A process that runs one case after the other, and is replaced when it dies or hangs."""

    def __init__(self, cases: dict[str, Any], target: str = "host") -> None:
        self.cases, self.target = cases, target
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(self.cases, self.target, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def run(self, name: str, timeout: float = TIMEOUT_S) -> Outcome:
        """Run one case."""
        try:
            self.pipe.send(name)
            end = self._seconds() + timeout
            # Of processor time: on a busy machine a case may take long without hanging.
            for _ in range(int(PATIENCE)):
                if self.pipe.poll(timeout):
                    outcome: Outcome = self.pipe.recv()
                    return outcome
                if self._seconds() > end:
                    break
            outcome = Outcome("hang", f"no result after {timeout:g} s", timeout)
        except (EOFError, OSError):
            self.process.join()
            outcome = Outcome("crash", f"exit status {self.process.exitcode}")
        self.process.kill()
        self.process.join()
        self._start()
        return outcome

    def _seconds(self) -> float:
        """Return the processor time that the process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join(10)


def table(outcomes: dict[str, Outcome]) -> str:
    """Return the committed text: counts, then one line per case that does not pass."""
    counts = {s: sum(o.status == s for o in outcomes.values()) for s in STATUSES}
    counted = len(outcomes) - counts["excluded"]
    floats = sum("freezes" in o.reason for o in outcomes.values() if o.status == "pass")
    lines = [
        "# ONNX backend tests (onnx.backend.test), target host, fp32.",
        "# Written by: python tests/onnx_backend.py --table tests/onnx_backend_table.txt",
        f"# onnx {onnx.__version__}: {len(outcomes)} cases, {counts['excluded']} excluded"
        f" (sequence, optional, string, training, preview), {counted} counted:",
        f"# {counts['pass']} pass ({100 * counts['pass'] / max(counted, 1):.1f} %), "
        + ", ".join(f"{counts[s]} {s}" for s in STATUSES[1:-1]),
        "# Kinds: node, simple, pytorch-converted, pytorch-operator; all of `real` are downloads.",
        "# Shapes and counts that a test gives as inputs are frozen; frozen inputs that are floats",
        f"# or conditions of loops are named in the line: {floats} of those that pass.",
        *(f"# {name}: atol {atol:g}, because {why}." for name, (atol, why) in TOLERANCES.items()),
    ]
    for status in STATUSES:
        names = sorted(n for n, o in outcomes.items() if o.status == status)
        for n in names:
            reason = outcomes[n].reason
            reason = re.sub(r"^(\w+): .*? cannot be compiled because of: ", r"\1: ", reason)
            lines.append(f"{status} {n}" + (f": {reason[:160]}" if reason else ""))
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, help="JSON of outcomes, continued if it exists"
    )
    parser.add_argument("--table", type=Path)
    parser.add_argument("--target", default="host")
    parser.add_argument("--only", default="", help="regular expression of names")
    parser.add_argument("--again", default="", help="statuses to run again, comma-separated")
    args = parser.parse_args(argv)
    cases = load_cases()
    outcomes: dict[str, Outcome] = {}
    if args.output and args.output.exists():
        stored = json.loads(args.output.read_text())
        outcomes = {n: Outcome(*o) for n, o in stored.items() if n in cases}
    again = set(args.again.split(","))
    todo = [
        n
        for n in sorted(cases)
        if re.search(args.only, n) and (n not in outcomes or outcomes[n].status in again)
    ]
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    worker = Worker(cases, args.target)
    for i, name in enumerate(todo):
        outcomes[name] = worker.run(name)
        if outcomes[name].status in ("wrong", "error", "crash", "hang"):
            print(f"{outcomes[name].status} {name}: {outcomes[name].reason}", flush=True)
        if i % 50 == 49 or i == len(todo) - 1:
            minutes = (time.monotonic() - started) / 60
            print(f"{i + 1} of {len(todo)} cases, {minutes:.1f} min", file=sys.stderr, flush=True)
        if args.output and (i % 20 == 19 or i == len(todo) - 1):
            held = {n: (o.status, o.reason, round(o.seconds, 2)) for n, o in outcomes.items()}
            args.output.write_text(json.dumps(held, indent=0))
    worker.close()
    if args.table:
        args.table.write_text(table(outcomes))
    print("\n".join(table(outcomes).splitlines()[:4]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
