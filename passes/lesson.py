# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""One model that runs a sample through the float network and the quantized one, with slopes.

Weights and biases of the products to learn are inputs of the model. It returns the squared errors
of the quantized network's outputs and of its blocks' results against the float network's, and the
slopes of their weighted sum by the weights and biases. It may read smaller pictures than the
networks do: windows cost less, and no two are alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from qcompiler.errors import QCompilerError
from qcompiler.ir import Graph, Value
from qcompiler.numerics import dequantize
from qcompiler.onnx_export import to_onnx
from qcompiler.ort import Session
from qcompiler.passes.blocks import blocks_of
from qcompiler.passes.reconstruction import Reconstruction
from qcompiler.passes.single_node import units
from qcompiler.passes.slopes import Writer, add_slopes
from qcompiler.passes.views import is_picture
from qcompiler.types import Array, DType, TensorType

ERRORS = "errors"
SHARES = "shares"


class Lesson:
    """Errors and slopes of a quantized network against the float one, sample by sample.

    Args:
        walk: Both networks and the products to learn.
        window: Greatest extent of the pictures that it reads; None for that of the networks.
        count: Runs that it reads at a time.

    Attributes:
        window: Greatest extent of the pictures that it reads; None where it cannot be less.
        count: Runs that it reads at a time, joined along the first axis; 1 where it cannot be more.
        shares: What the squared error of each term counts: the outputs first, then the blocks.
        outputs: How many of the terms are outputs.
    """

    def __init__(self, walk: Reconstruction, window: int | None = None, count: int = 1) -> None:
        exact_graph, g, self.window, self.count = _pair(walk, window, count)
        learned: dict[str, Value] = {}
        for unit in walk.units:
            node = g.node(unit.node)
            for i in (1, 2):
                v = g.add_input(
                    operand(unit.node, i), TensorType(node.input(i).shape, DType.FLOAT32)
                )
                g.set_input(node, i, v)
                learned[v.name] = v
        _settle(g)
        by_name = {v.name: v for v in g.inputs}
        exact = copied(g, exact_graph, {v: by_name[v.name] for v in exact_graph.inputs})
        students = dict(g.outputs)
        terms = [(students[name], exact[v]) for name, v in exact_graph.outputs]
        self.outputs = len(terms)
        for block in blocks_of(exact_graph, units(exact_graph), walk.units):
            maker = block.result.producer
            if maker is not None and not exact_graph.is_output(block.result):
                terms.append((g.node(maker.name).output, exact[block.result]))
        self.shares: Array = np.zeros(len(terms), np.float32)
        shares = g.add_input(SHARES, TensorType((len(terms),), DType.FLOAT32))
        write = Writer(g, set())
        errors: list[Value] = []
        seeds: dict[Value, Value] = {}
        for i, (student, teacher) in enumerate(terms):
            off = write.add("sub", student, teacher)
            square = write.add("mul", off, off)
            total = write.add(
                "reduce_sum", square, axes=tuple(range(len(off.shape))), keepdims=False
            )
            errors.append(write.shaped(total, (1,)))
            share = write.add("slice", shares, starts=(i,), ends=(i + 1,), axes=(0,), steps=(1,))
            seed = write.add("mul", off, share)
            seeds[student] = write.add("add", seeds[student], seed) if student in seeds else seed
        slopes = add_slopes(g, seeds, list(learned.values()))
        results = [(ERRORS, write.add("concat", *errors, axis=0))]
        results += [(f"slope/{v.name}", d) for v, d in slopes.items()]
        g.set_outputs(results)
        g.eliminate_dead()
        # Optimised, ONNX Runtime would round the weights that `_settle` makes real to 8 bits again.
        self._session = Session(to_onnx(g).SerializeToString(), optimization="disabled")
        self._given = set(self._session.input_names)

    def run(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """Return the errors, and the slopes of half their weighted sum by the names of operands.

        Args:
            given: Inputs of a run; weights and biases by the names that `operand` gives.
        """
        feed = {**given, SHARES: self.shares}
        found = self._session.run({n: a for n, a in feed.items() if n in self._given})
        return {n.removeprefix("slope/"): a for n, a in found.items()}


def resized(graph: Graph, window: int | None, count: int) -> Graph | None:
    """Return a copy of a graph for smaller pictures, or for several runs at a time.

    Args:
        graph: Graph of stage FLOAT or QDQ.
        window: Greatest extent of pictures; None leaves them.
        count: Runs, joined along the first axis of each input.

    Returns:
        The copy; None where the operators tie the extents down.
    """
    changed = graph.clone()
    for v in changed.inputs:
        shape = list(v.shape)
        if not shape:
            return None
        if window is not None and is_picture(v.type):
            shape[2:] = [min(n, window) for n in shape[2:]]
        shape[0] *= count
        changed.set_type(v, TensorType(tuple(shape), v.dtype, v.qparams))
    try:
        for node in changed.nodes:
            given = [None if v is None else v.type for v in node.inputs]
            attrs = dict(node.attrs)
            if node.op.name == "reshape" and given[0] is not None:
                lead, *rest = node.attr("shape")
                if lead * count == given[0].shape[0]:
                    attrs["shape"] = (lead * count, *rest)
                    changed.set_attrs(node, shape=attrs["shape"])
            for v, t in zip(node.outputs, node.op.infer(given, attrs), strict=True):
                changed.set_type(v, TensorType(t.shape, v.dtype, v.qparams))
    except QCompilerError:
        return None
    return changed


def _pair(
    walk: Reconstruction, window: int | None, count: int
) -> tuple[Graph, Graph, int | None, int]:
    """Return the float network and a copy of the quantized one, for what both can read."""
    for extent, runs in ((window, count), (window, 1), (None, count)):
        exact, rounded = (resized(g, extent, runs) for g in (walk.exact, walk.qdq))
        if exact is not None and rounded is not None:
            return exact, rounded, extent, runs
    return walk.exact, walk.qdq.clone(), None, 1


def _settle(graph: Graph) -> None:
    """Replace dequantized constants by the floats that they stand for, once for all samples."""
    for node in graph.nodes:
        if node.op.name == "dequantize" and node.input(0).is_constant:
            q = node.input(0)
            assert q.qparams is not None
            held = graph.constant(dequantize(q.array(), q.qparams), graph.fresh(f"{q.name}_real"))
            graph.replace_uses(node.output, held)


def operand(name: str, i: int) -> str:
    """Return the name under which a lesson takes an operand of a product."""
    return f"lesson/{name}/{'xwb'[i]}"


def summed(results: Iterable[Mapping[str, Array]]) -> dict[str, Array]:
    """Return the sums over runs, in their order."""
    total: dict[str, Array] = {}
    for found in results:
        for name, a in found.items():
            total[name] = total[name] + a if name in total else a
    return total


def copied(into: Graph, other: Graph, values: Mapping[Value, Value]) -> dict[Value, Value]:
    """Append a copy of another graph's nodes.

    Args:
        into: The graph that takes them.
        other: The graph to copy.
        values: What stands for the other graph's inputs.

    Returns:
        The copy of each value.
    """
    found = dict(values)
    for node in other.nodes:
        for v in node.operands:
            if v.is_constant and v not in found:
                found[v] = into.constant(v.array(), f"teacher/{v.name}", v.qparams, v.dtype)
        ins = [None if v is None else found[v] for v in node.inputs]
        types = [v.type for v in node.outputs]
        twin = into.add(node.op.name, ins, node.attrs, types=types, name=f"teacher/{node.name}")
        found.update(zip(node.outputs, twin.outputs, strict=True))
    return found
