# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""What the report shows of a network's inside: which kernel reads which, value ranges, the error.

All of it is for people: nothing here decides anything, and nothing is in the artifact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompiler.interpreter import run
from qcompiler.ir import Graph, Node, Value
from qcompiler.metrics import SQNR_CEILING
from qcompiler.numerics import dequantize
from qcompiler.types import Array

if TYPE_CHECKING:
    from qcompiler.driver import Quantized
    from qcompiler.targets.base import Built

SECONDS = 4.0
"""Wall time after which no further sample is run for the error along the network."""
_RUNS = 8
_RESCALING = frozenset({"equalize", "smooth"})
"""Methods that give inner values other scales than the float model's."""


def reads(built: Built) -> list[list[int]]:
    """Return for each region of a built model the indices of the regions that it reads from.

    Views between regions are looked through; inputs of the model are not regions.
    """
    owner: dict[str, int] = {}
    for i, region in enumerate(built.regions):
        for name in region.nodes:
            owner.setdefault(name, i)
    for i, region in enumerate(built.regions):
        owner[region.name] = i
    found: list[set[int]] = [set() for _ in built.regions]
    of: dict[Node, int | None] = {}
    for node in built.graph.nodes:
        of[node] = next((owner[n] for n in (node.name, *node.sources) if n in owner), None)
    for node in built.graph.nodes:
        mine = of[node]
        if mine is None:
            continue
        waiting, seen = list(node.operands), set[Value]()
        while waiting:
            value = waiting.pop()
            made = value.producer
            if made is None or value in seen:
                continue
            seen.add(value)
            theirs = of[made]
            if theirs is None:
                waiting += made.operands
            elif theirs != mine:
                found[mine].add(theirs)
    return [sorted(f) for f in found]


def ranges(result: Quantized) -> dict[str, dict[str, Any]]:
    """Return what calibration found about each value that is quantized, as JSON.

    Per value: `bounds` (least and greatest element), `range` (what 8 bits cover), `mean`,
    `deviation`, and `histogram` (counts of equal bins over `bounds`).
    """
    if result.table is None:
        return {}
    wanted = {_plain(v.name) for v in result.graph.values() if v.type.is_quantized}
    return {
        name: {
            "bounds": list(t.bounds),
            "range": list(t.range),
            "mean": t.mean,
            "deviation": t.deviation,
            "histogram": list(t.histogram),
        }
        for name, t in result.table.tensors.items()
        if name in wanted
    }


def error_along(result: Quantized) -> dict[str, Any] | None:
    """Return how far inner values are from the float model's, along the network.

    The first calibration samples run through the interpreter, in float and in integers.

    Returns:
        `samples`, and `values`: in running order `{"value", "node", "sqnr"}`, SQNR in dB of each
        quantized result, and of the outputs, against the same value of the float model; None
        where there are no integers, no samples, or methods have rescaled inner values.
    """
    floats = result.float_graph
    if floats is None or result.calibration is None or _RESCALING & set(result.methods):
        return None
    pairs = _pairs(floats, result.graph)
    if not pairs:  # nothing is quantized
        return None
    for name, v in result.graph.outputs:
        pairs.setdefault(name, v.producer.name if v.producer is not None else name)
    sums = {name: [0.0, 0.0] for name in pairs}
    samples, started = 0, time.perf_counter()
    for done, batch in enumerate(result.calibration):
        if done >= _RUNS or (done and time.perf_counter() - started > SECONDS):
            break
        _compare(floats, result.graph, batch.inputs, pairs, sums)
        samples += batch.samples
    values = [
        {"value": name, "node": pairs[name], "sqnr": _level(signal, noise)}
        for name, (signal, noise) in sums.items()
        if signal or noise
    ]
    return {"samples": samples, "values": values}


def _pairs(floats: Graph, integers: Graph) -> dict[str, str]:
    """Return float value -> the integer node that makes its quantized form."""
    known = {v.name for v in floats.values()}
    return {
        _plain(v.name): node.name
        for node in integers.nodes
        for v in node.outputs
        if v.type.is_quantized and _plain(v.name) in known
    }


def _compare(
    floats: Graph,
    integers: Graph,
    inputs: Mapping[str, Array],
    pairs: Mapping[str, str],
    sums: dict[str, list[float]],
) -> None:
    reference: dict[str, Array] = {}
    compared: set[str] = set()

    def keep(value: Value, array: Array) -> None:
        if value.name in pairs:
            reference[value.name] = array

    def compare(value: Value, array: Array) -> None:
        name = _plain(value.name)
        if value.qparams is None or name not in reference or name not in pairs:
            return
        if array.shape == reference[name].shape:
            compared.add(name)
            _add(sums[name], reference[name], dequantize(array, value.qparams))

    first = run(floats, inputs, observe=keep)
    second = run(integers, inputs, observe=compare)
    for name, y in first.items():
        if name not in compared and y.dtype.kind == "f" == second[name].dtype.kind:
            _add(sums[name], y, second[name])


def _add(sums: list[float], reference: Array, other: Array) -> None:
    y, z = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    sums[0] += float((y * y).sum())
    sums[1] += float(((y - z) ** 2).sum())


def _plain(name: str) -> str:
    """Return the name that a value has in the float graph."""
    return name.removesuffix("_q")


def _level(signal: float, noise: float) -> float:
    if noise == 0.0:
        return SQNR_CEILING
    return min(10 * math.log10(signal / noise), SQNR_CEILING) if signal else 0.0
