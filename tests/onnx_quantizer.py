# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Models that ONNX Runtime's quantizer makes, compiled and compared with ONNX Runtime.

    python tests/onnx_quantizer.py -o results.json [--table FILE] [--only REGEX] [--layers]

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
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_quantizer_layers import Layers, compare_layers, session
from onnx_quantizer_models import CASES, Source, Variant, quantized, rows, source

import qcompiler
from qcompiler.driver import quantize_model
from qcompiler.interpreter import run as interpret
from qcompiler.ir import Graph, Value
from qcompiler.types import Array

TIE = 1 / 128
"""Greatest distance from a tie, codes: float32 sums of thousands of terms are not better."""
OWN = 0.05
"""Greatest share by which the artifact may differ from the interpreter: kernels in floats round
otherwise, and may turn codes behind them. Networks of integers alone are equal."""
MARGIN = 4
"""Codes of the output within which a decision may turn."""


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
