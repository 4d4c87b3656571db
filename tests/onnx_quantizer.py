# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models that ONNX Runtime's quantizer makes, compiled and compared with ONNX Runtime.

    python tests/onnx_quantizer.py [-o results.json] [--table FILE] [--only REGEX]

Both formats (QDQ, QOperator), static and dynamic, per tensor and per channel, unsigned and signed
activations, of the stored, the built and the external models. ONNX Runtime runs them without any
optimization (ORT_DISABLE_ALL), and so computes what the file says, operator by operator.

The criterion has three parts:

- layer by layer: every node of the integer graph gets the operands that ONNX Runtime computed. An
  integer result is then equal, or one code apart where its exact value is within `TIE` of a tie
  between two codes: both sides round float32 numbers, which differ in their last bits;
- the artifact computes what the interpreter of the integer graph computes (`OWN`);
- end to end: the compiled artifact and ONNX Runtime decide alike (the greatest output, or the
  sign against 0.5), except where ONNX Runtime's own margin is below `MARGIN` codes of the output.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime
from onnxruntime import quantization

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))
import catalogue

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.interpreter import evaluate
from qcompiler.interpreter import run as interpret
from qcompiler.ir import Graph, Node, Value
from qcompiler.ops import OpKind, Stage
from qcompiler.types import Array, DType, PerTensor, QuantParams, TensorType

Arrays = dict[str, Array]

TIE = 1 / 128
"""Greatest distance from a tie, codes: float32 sums of thousands of terms are not better."""
OWN = 0.05
"""Greatest share by which the artifact may differ from the interpreter: kernels in floats round
otherwise, and may turn codes behind them. Networks of integers alone are equal."""
MARGIN = 4
"""Codes of the output within which a decision may turn."""
FINE = 256
"""Steps per code in which the distance from a tie is measured."""


@dataclass(frozen=True)
class Variant:
    """One way to quantize.

    Attributes:
        form: `QDQ`, `QOperator` or `dynamic`.
        activation: Storage of activations, `u8` or `s8` (dynamic: u8 always).
        weight: Storage of weights.
        per_channel: Whether weights have a scale per output channel.
    """

    form: str
    activation: str
    weight: str
    per_channel: bool

    def __str__(self) -> str:
        channel = "channel" if self.per_channel else "tensor"
        return f"{self.form}-{self.activation}{self.weight}-{channel}"


STATIC = tuple(
    Variant(form, activation, "s8", per_channel)
    for form in ("QDQ", "QOperator")
    for activation in ("u8", "s8")
    for per_channel in (False, True)
)
VARIANTS = (
    *STATIC,
    Variant("QDQ", "u8", "u8", False),
    Variant("QOperator", "u8", "u8", False),
    Variant("dynamic", "u8", "s8", False),
    Variant("dynamic", "u8", "s8", True),
    Variant("dynamic", "u8", "u8", False),
)
_TYPES = {"u8": quantization.QuantType.QUInt8, "s8": quantization.QuantType.QInt8}


@dataclass(frozen=True)
class Source:
    """A float model with data."""

    name: str
    model: onnx.ModelProto
    calibration: Arrays
    evaluation: Arrays
    decision: str
    """`top1`, `threshold` or `values`."""


SMALL = ("digits_cnn", "digits_hybrid", "vgg_small")
NAMES = (
    *("digits_cnn", "digits_hybrid", "vgg_small", "mobilenet_v3_small", "mobilenet_v2"),
    *("resnet18", "resnet50", "encoder", "encoder_ids"),
    *("resnet20", "resnet20_raw", "resnet56", "ic_resnet8", "kws_dscnn", "mnist", "mobilenetv2"),
    *("minilm", "silero_vad", "ad_autoencoder", "vww_mobilenet"),
)
QUANTIZED = (
    *("ic_resnet8_qdq", "kws_dscnn_qdq", "mobilenetv2_qdq"),
    *("ad_autoencoder_qdq", "vww_mobilenet_qdq"),
)
"""External models that are quantized already."""
UNLABELLED = {
    f"{name}{suffix}": f"mlperf_tiny/{name}_{kind}.onnx"
    for name in ("ad_autoencoder", "vww_mobilenet")
    for suffix, kind in (("", "float"), ("_qdq", "qdq_int8"))
}
"""External models that come without data: noise shows whether the integers agree."""
FEW = {"minilm": 8, "resnet56": 16, "mobilenetv2": 8, "mobilenetv2_qdq": 8}
"""Samples of the large external models."""


def source(name: str, count: int = 64) -> Source | None:
    """Load a model by name; None where the external models are absent."""
    count = min(count, FEW.get(name, count))
    if name in UNLABELLED:
        return _unlabelled(name)
    if name in {m.name for m in catalogue.STORED}:
        stored = catalogue.stored(name)
        data = [dict(np.load(p)) for p in (stored.calibration, stored.evaluation)]
        inputs = [i.name for i in stored.inputs]
        calibration, evaluation = ({k: d[k][:count] for k in inputs} for d in data)
        return Source(name, onnx.load(stored.path), calibration, evaluation, "top1")
    if name in {m.name for m in catalogue.BUILT}:
        entry = catalogue.built(name)
        rng = np.random.default_rng(3)
        few = 2 if entry.inputs[0].shape[-1] == 224 else 4
        made = {i.name: _random(rng, i, few) for i in entry.inputs}
        return Source(name, entry.build(), made, made, "values")
    found = catalogue.external(name, 16, count)
    if found is None:
        return None
    model = onnx.load(found.path)
    stored = {t.name for t in model.graph.initializer}
    inputs = [i.name for i in model.graph.input if i.name not in stored]
    calibration, evaluation = (
        {k: d[k] for k in inputs} for d in (found.calibration, found.evaluation)
    )
    if name == "silero_vad":  # one sequence of `count` frames beside the states: already a sample
        decision = "threshold"
        calibration, evaluation = ({k: v[0][None] for k, v in d.items()} for d in
                                   (calibration, evaluation))  # fmt: skip
    else:
        decision = "top1" if found.metric == "top1" else "values"
    return Source(name, model, calibration, evaluation, decision)


def _unlabelled(name: str) -> Source | None:
    root = catalogue.external_root()
    if root is None or not (root / UNLABELLED[name]).is_file():
        return None
    model = onnx.load(root / UNLABELLED[name])
    info = model.graph.input[0]
    shape = (8, *(d.dim_value for d in info.type.tensor_type.shape.dim[1:]))
    made = {info.name: np.random.default_rng(3).standard_normal(shape).astype(np.float32)}
    return Source(name, model, made, made, "values")


def _random(rng: np.random.Generator, info: Any, count: int) -> Array:
    shape = (count, *(1 if isinstance(d, str) else d for d in info.shape[1:]))
    if info.dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(1 if info.name == "attention_mask" else 0, 2, shape).astype(info.dtype)


def rows(samples: Arrays, name: str) -> Iterator[Arrays]:
    """Yield the feeds of one call each."""
    count = len(next(iter(samples.values())))
    for i in range(count):
        keep = slice(i, i + 1)
        yield {k: v[i] if name == "silero_vad" else v[keep] for k, v in samples.items()}


class _Reader(quantization.CalibrationDataReader):
    def __init__(self, feeds: Iterator[Arrays]) -> None:
        self.feeds = feeds

    def get_next(self) -> Arrays | None:
        return next(self.feeds, None)


def quantized(made_from: Source, variant: Variant) -> onnx.ModelProto:
    """Return the model that ONNX Runtime's quantizer makes."""
    logging.disable(logging.WARNING)
    model = onnx.ModelProto()
    model.CopyFrom(made_from.model)  # the quantizer moves weights out of what it is given
    if variant.per_channel and model.opset_import[0].version < 13:
        # Scales per channel came with opset 13: what the quantizer makes of less is no valid model.
        model = onnx.version_converter.convert_version(model, 13)
    try:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = Path(folder, "quantized.onnx")
            if variant.form == "dynamic":
                quantization.quantize_dynamic(
                    model,
                    target,
                    weight_type=_TYPES[variant.weight],
                    per_channel=variant.per_channel,
                )
            else:
                feeds = list(rows(made_from.calibration, made_from.name))[:16]
                quantization.quantize_static(
                    model,
                    target,
                    _Reader(iter(feeds)),
                    quant_format=quantization.QuantFormat[variant.form],
                    activation_type=_TYPES[variant.activation],
                    weight_type=_TYPES[variant.weight],
                    per_channel=variant.per_channel,
                )
            return onnx.load(target)
    finally:
        logging.disable(logging.NOTSET)


# -------------------------------------------------------------------------------------- runtime


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session that computes what the file says, on one thread."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def with_outputs(model: onnx.ModelProto, graph: Graph) -> onnx.ModelProto:
    """Return the model with every value of our graph as an output that it computes too."""
    known = {o for n in model.graph.node for o in n.output} - {o.name for o in model.graph.output}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for node in graph.nodes:
        for v in node.outputs:
            if v.name in known:
                wide.graph.output.append(onnx.ValueInfoProto(name=v.name))
    return wide


# -------------------------------------------------------------------------------- layer by layer


@dataclass
class Layers:
    """What came of comparing the nodes one by one.

    Attributes:
        nodes: Nodes whose result ONNX Runtime computes too.
        integers: Elements of integer results that were compared.
        apart: How many of them differ.
        codes: Greatest difference, codes.
        tie: Greatest distance from a tie of those that differ, codes.
        floats: Greatest difference of float results, as a share of their greatest magnitude.
        worst: Node of the greatest distance.
    """

    nodes: int = 0
    integers: int = 0
    apart: int = 0
    codes: int = 0
    tie: float = 0.0
    floats: float = 0.0
    worst: str = ""


def compare_layers(
    model: onnx.ModelProto,
    graph: Graph,
    feeds: Mapping[str, Array],
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Layers:
    """Run every node on ONNX Runtime's own operands, and compare what it computes with it."""
    wide = with_outputs(model, graph)
    names = [o.name for o in wide.graph.output]
    theirs = dict(zip(names, session(wide).run(names, dict(feeds)), strict=True))
    found = Layers()
    spelled = quantize_model(model, input_shapes=shapes, stage=Stage.QDQ).graph
    values: dict[Value, Array] = {}
    for v in graph.inputs:
        values[v] = np.asarray(feeds[v.name], v.dtype.numpy)
    held: dict[Node, list[Array | None]] = {}
    for node in graph.nodes:
        operands = [None if v is None else (v.array() if v.is_constant else values[v])
                    for v in node.inputs]  # fmt: skip
        held[node] = operands
        for v, ours in zip(node.outputs, evaluate(node, operands), strict=True):
            values[v] = ours
            want = _in_codes(theirs.get(v.name), v)
            if want is None or want.shape != ours.shape or want.dtype != ours.dtype:
                continue
            values[v] = want
            found.nodes += 1
            if ours.dtype.kind == "f":
                _floats(found, node, ours, want)
            else:
                _codes(found, node, v, held, ours, want)
                if node.op.name == "table" and (ours != want).any():
                    _table(found, spelled, v, values, ours != want)
    return found


def _in_codes(array: Array | None, v: Value) -> Array | None:
    """Return what ONNX Runtime computed as the codes that we hold, where it is on their grid."""
    q = v.qparams
    if array is None or q is None or not q.is_per_tensor or array.dtype.kind != "f":
        return array
    exact = array.astype(np.float64) / q.s
    codes = np.rint(exact)
    if np.abs(exact - codes).max(initial=0) > 1e-3:
        return None
    return (codes + q.z).astype(v.dtype.numpy)


def _floats(found: Layers, node: Node, ours: Array, want: Array) -> None:
    share = float(np.abs(ours - want).max(initial=0)) / max(
        float(np.abs(want).max(initial=0)), 1e-6
    )
    found.floats = max(found.floats, share)


def _codes(
    found: Layers,
    node: Node,
    v: Value,
    held: Mapping[Node, list[Array | None]],
    ours: Array,
    want: Array,
) -> None:
    apart = np.abs(ours.astype(np.int64) - want.astype(np.int64))
    found.integers += apart.size
    found.apart += int((apart > 0).sum())
    found.codes = max(found.codes, int(apart.max(initial=0)))
    if not apart.any():
        return
    distance = _from_tie(node, v, held, apart > 0)
    if distance > found.tie:
        found.tie = distance
        found.worst = f"{node.op.name} {v.name}"


def _from_tie(node: Node, v: Value, held: Mapping[Node, list[Array | None]], where: Array) -> float:
    """Return the greatest distance of some results from a tie: by the same node on a finer grid."""
    if node.op.name == "table":
        return 0.0  # see _table
    if v.qparams is None or not v.qparams.is_per_tensor:
        return 0.5
    exact = _fine(node, v, held).astype(np.float64)[where] / FINE
    return float(np.abs(exact - np.floor(exact) - 0.5).max())


def _fine(node: Node, v: Value, held: Mapping[Node, list[Array | None]]) -> Array:
    """Return a result in steps of 1 / FINE code; movement moves those of its source."""
    q = v.qparams
    assert q is not None
    grid = QuantParams(
        np.float32(q.s / FINE), np.int32(0), DType.INT32, -(2**30), 2**30, PerTensor()
    )
    operands = list(held[node])
    changed = [v]
    if node.op.kind is OpKind.MOVEMENT:
        changed += [x for x in node.operands if x.type.is_quantized]
        for i, x in enumerate(node.inputs):
            if x is not None and x.type.is_quantized and x.producer in held:
                operands[i] = _fine(x.producer, x, held)
    before = [x.type for x in changed]
    try:
        for x in changed:
            x.type = TensorType(x.shape, DType.INT32, grid)
        return evaluate(node, operands)[node.outputs.index(v)]
    finally:
        for x, kept in zip(changed, before, strict=True):
            x.type = kept


def _table(
    found: Layers, spelled: Graph, v: Value, values: Mapping[Value, Array], where: Array
) -> None:
    """Note the distance from a tie of table results: by the floats that the entries stand for."""
    held = {x.name: a for x, a in values.items() if x.qparams is not None and x is not v}
    last = next(n for n in spelled.nodes if n.outputs[0].name == v.name)

    def at(x: Value) -> Array:
        if x.is_constant:
            return x.array()
        if x.name in held:
            return held[x.name]
        assert x.producer is not None, f"nothing computes {x.name}"
        operands = [None if o is None else at(o) for o in x.producer.inputs]
        return evaluate(x.producer, operands)[x.producer.outputs.index(x)]

    q = v.qparams
    assert q is not None
    assert last.op.name == "quantize", last.op.name
    exact = at(last.input(0)).astype(np.float64)[where] / q.s
    distance = float(np.abs(exact - np.floor(exact) - 0.5).max())
    if distance > found.tie:
        found.tie, found.worst = distance, f"table {v.name}"


# ------------------------------------------------------------------------------------ end to end


@dataclass
class Outcome:
    """What came of one model and variant.

    Attributes:
        status: `agrees`, or what does not hold.
        products: Integer products, of all products.
        layers: The comparison layer by layer.
        decisions: Decisions compared.
        turned: How many differ.
        margin: Greatest margin of a decision that differs, codes of the output.
        output: Greatest difference of an output, as a share of its greatest magnitude.
        own: The same between the artifact and the interpreter of its integer graph.
        seconds: Wall time.
    """

    status: str = "agrees"
    products: tuple[int, int] = (0, 0)
    layers: Layers | None = None
    decisions: int = 0
    turned: int = 0
    margin: float = 0.0
    output: float = 0.0
    own: float = 0.0
    seconds: float = 0.0


_PRODUCTS = frozenset({"conv", "conv_transpose", "matmul", "lstm", "gru", "rnn"})
_INTEGER_PRODUCTS = frozenset(
    {"qconv", "qconv_transpose", "qmatmul", "dynamic_matmul", "qlstm", "qgru", "qrnn"}
)


def products(graph: Graph) -> tuple[int, int]:
    """Return (integer products, all products)."""
    names = [n.op.name for n in graph.nodes]
    integer = sum(n in _INTEGER_PRODUCTS for n in names)
    return integer, integer + sum(n in _PRODUCTS for n in names)


def check(model: onnx.ModelProto, data: Source, *, compiled: bool = True) -> Outcome:
    """Compare a quantized model with ONNX Runtime, layer by layer and compiled as a whole.

    Args:
        model: The quantized model.
        data: What it was made from.
        compiled: Whether to compile it; without that only the layers are compared.
    """
    started = time.perf_counter()
    feeds = list(rows(data.evaluation, data.name))
    shapes = {k: v.shape for k, v in feeds[0].items()} if data.name == "silero_vad" else None
    named = {i.name for i in model.graph.input}
    open_ = {i.name for i in model.graph.input
             if any(d.dim_value <= 0 for d in i.type.tensor_type.shape.dim[1:])}  # fmt: skip
    shapes = shapes or {k: v.shape for k, v in feeds[0].items() if k in named & open_} or None
    graph = quantize_model(model, input_shapes=shapes).graph
    outcome = Outcome(products=products(graph))
    outcome.layers = compare_layers(model, graph, feeds[0], shapes)
    artifact = qcompiler.compile(model, input_shapes=shapes) if compiled else None
    reference = session(model)
    names = [o.name for o in model.graph.output]
    for feed in feeds if artifact is not None else ():
        ours = artifact(feed)
        want = dict(zip(names, reference.run(None, feed), strict=True))
        _decide(outcome, data, ours, want, graph)
    if artifact is not None:
        meant, ours = interpret(graph, feeds[0]), artifact(feeds[0])
        outcome.own = max(_apart(ours[name], meant[name]) for name in names)
    layers = outcome.layers
    wrong = []
    if outcome.own > OWN:
        wrong.append(f"the artifact is {outcome.own:.3g} apart from the interpreter")
    if layers.codes > 1 or layers.tie > TIE:
        wrong.append(f"{layers.codes} codes, {layers.tie:.3g} from a tie at {layers.worst}")
    if outcome.turned and outcome.margin > MARGIN:
        wrong.append(f"{outcome.turned} decisions turned, margin {outcome.margin:.3g} codes")
    outcome.status = "; ".join(wrong) or "agrees"
    outcome.seconds = time.perf_counter() - started
    return outcome


def _apart(a: Array, b: Array) -> float:
    """Return the greatest difference as a share of the greatest magnitude."""
    apart = np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)
    return float(apart) / max(float(np.abs(b.astype(np.float64)).max(initial=0)), 1e-9)


def _decide(
    outcome: Outcome, data: Source, ours: Mapping[str, Array], want: Mapping[str, Array],
    graph: Graph,
) -> None:  # fmt: skip
    name = next(iter(want))
    got, expected = ours[name].astype(np.float64), want[name].astype(np.float64)
    apart = np.abs(got - expected)
    outcome.output = max(
        outcome.output, float(apart.max()) / max(float(np.abs(expected).max()), 1e-9)
    )
    if data.decision == "values":
        return
    step = _step(graph, name)
    if data.decision == "threshold":
        mine, theirs = got.reshape(-1) > 0.5, expected.reshape(-1) > 0.5
        margins = np.abs(expected.reshape(-1) - 0.5) / step
    else:
        flat = expected.reshape(-1, expected.shape[-1])
        mine, theirs = got.reshape(flat.shape).argmax(1), flat.argmax(1)
        margins = (flat.max(1) - np.take_along_axis(flat, mine[:, None], 1)[:, 0]) / step
    turned = mine != theirs
    outcome.decisions += turned.size
    outcome.turned += int(turned.sum())
    outcome.margin = max(outcome.margin, float(margins[turned].max(initial=0)))


def _step(graph: Graph, name: str) -> float:
    """Return what one code of an output is worth."""
    value: Value | None = dict(graph.outputs)[name]
    while value is not None and value.producer is not None:
        q = value.qparams
        if q is not None and q.is_per_tensor:
            return float(q.s)
        value = next((v for v in value.producer.operands if not v.is_constant), None)
    return 1 / 256


def run_one(name: str, variant: Variant | None, *, compiled: bool = True) -> Outcome:
    """Quantize one model in one way (or take it as it is) and check it."""
    data = source(name)
    if data is None:
        return Outcome(status="absent")
    try:
        model = data.model if variant is None else quantized(data, variant)
    except Exception as error:
        return Outcome(status=f"not quantized: {type(error).__name__}: {error}"[:200])
    return check(model, data, compiled=compiled)


LARGE = (
    *("mobilenet_v3_small", "mobilenet_v2", "resnet18", "resnet50", "encoder", "encoder_ids"),
    *("resnet56", "mobilenetv2", "minilm", "silero_vad"),
)
"""Models with fewer variants: each format, dtype and granularity once."""
CASES: tuple[tuple[str, Variant | None], ...] = (
    *(
        (name, variant)
        for name in NAMES
        for variant in VARIANTS
        if name not in LARGE or variant in (STATIC[3], STATIC[4], STATIC[1], VARIANTS[11])
    ),
    *((name, None) for name in QUANTIZED),
)


def main(argv: list[str] | None = None) -> int:
    """Run the cases and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default="", help="regular expression of cases")
    parser.add_argument("--layers", action="store_true", help="compile nothing")
    parser.add_argument("--table", type=Path, help="Markdown of what is stored")
    args = parser.parse_args(argv)
    held = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name, variant in CASES:
        key = f"{name} {variant or 'as it is'}"
        known = held.get(key, {}).get("status") == "agrees"
        if not re.search(args.only, key) or (known and (args.layers or held[key]["decisions"])):
            continue
        try:
            outcome = run_one(name, variant, compiled=not args.layers)
        except Exception as error:
            outcome = Outcome(status=f"{type(error).__name__}: {error}"[:400])
        held[key] = asdict(outcome)
        args.output.write_text(json.dumps(held, indent=1))
        print(f"{key}: {outcome.status} {asdict(replace(outcome, status=''))}", flush=True)
    if args.table:
        args.table.write_text(table(held))
    return 0


def table(held: Mapping[str, dict[str, Any]]) -> str:
    """Return a row per model: over its variants, sums and extremes."""
    lines = [
        "| model | variants | agree | integer products | codes compared | one apart | "
        "farthest from a tie | decisions | turned |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(key.partition(" ")[0] for key in held):
        rows = [o for key, o in held.items() if key.partition(" ")[0] == name and o["layers"]]
        layers = [o["layers"] for o in rows]
        if not rows:
            continue
        counts = sorted({"{} of {}".format(*o["products"]) for o in rows})
        lines.append(
            f"| {name} | {len(rows)} | {sum(o['status'] == 'agrees' for o in rows)} "
            f"| {', '.join(counts)} | {sum(r['integers'] for r in layers)} "
            f"| {sum(r['apart'] for r in layers)} | {max(r['tie'] for r in layers):.1g} "
            f"| {sum(o['decisions'] for o in rows) or 'no'} | {sum(o['turned'] for o in rows)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
