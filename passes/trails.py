# SPDX-FileCopyrightText: The qcompiler authors
# SPDX-License-Identifier: Apache-2.0
"""Walk along a graph with many samples at once: what is alive at one node is kept for the next.

A method that looks at every product of a network in turn would run everything before it again and
again. A trail holds, for each run, the values that are made before a cut and read after it, and
moves the cut forward; each node runs once per run and trail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from qcompiler.cpu import allowed_cpus
from qcompiler.data import Batch
from qcompiler.ir import Graph, Node, Value
from qcompiler.onnx_export import subgraph_to_onnx
from qcompiler.ort import Session
from qcompiler.types import Array

T = TypeVar("T")
R = TypeVar("R")

MEMORY = 1 << 30
"""Bytes that the live values of a trail may take."""


class Trail:
    """The live values of some runs at a cut of a FLOAT or QDQ graph.

    Quantized values are held as integers. Constants that nodes after the cut read may be replaced
    while the trail is in use.

    Args:
        graph: The graph; its nodes must stay the same.
        batches: The runs.
    """

    def __init__(self, graph: Graph, batches: Iterable[Batch]) -> None:
        self.graph = graph
        self._at = 0
        self._fixed = recomputed_nodes(graph)
        names = [v.name for v in graph.inputs]
        self._runs: list[dict[str, Array]] = [{n: b.inputs[n] for n in names} for b in batches]

    def __len__(self) -> int:
        return len(self._runs)

    def values(self, wanted: Sequence[Value]) -> Iterator[dict[str, Array]]:
        """Yield for each run the values of that name, computed from the cut on."""
        after = set(self.graph.nodes[self._at :])
        made = after | self._fixed
        missing = [v for v in dict.fromkeys(wanted) if v.producer in made]
        present = [v.name for v in dict.fromkeys(wanted) if v not in set(missing)]
        session = self._session(after, missing)

        def found(held: dict[str, Array]) -> dict[str, Array]:
            known = {n: held[n] for n in present}
            return known if session is None else {**known, **_outputs(session, held)}

        yield from in_order(found, self._runs)

    def advance(self, node: Node) -> None:
        """Move the cut to right before a node; it must not lie behind.

        Raises:
            ValueError: The node lies before the cut.
        """
        nodes = self.graph.nodes
        index = nodes.index(node)
        if index < self._at:
            raise ValueError(f"{node.name} lies before the cut")
        live = live_values(self.graph, index, self._fixed)
        stretch = set(nodes[self._at : index])
        session = self._session(stretch, [v for v in live if v.producer in stretch])
        names = {v.name for v in live}

        def moved(held: dict[str, Array]) -> dict[str, Array]:
            found = held if session is None else {**held, **_outputs(session, held)}
            return {n: a for n, a in found.items() if n in names}

        for i, found in enumerate(in_order(moved, self._runs)):
            self._runs[i] = found
        self._at = index

    def join(self, batches: Iterable[Batch]) -> None:
        """Take more runs along; they catch up to the cut."""
        nodes = self.graph.nodes
        live = live_values(self.graph, self._at, self._fixed)
        stretch = set(nodes[: self._at])
        session = self._session(stretch, [v for v in live if v.producer in stretch])
        given = [v.name for v in live if v.producer is None]

        def held(b: Batch) -> dict[str, Array]:
            known = {n: b.inputs[n] for n in given}
            return known if session is None else {**known, **_outputs(session, b.inputs)}

        self._runs += in_order(held, batches)

    def mark(self) -> tuple[int, list[dict[str, Array]]]:
        """Return where the cut is, for `back_to`."""
        return self._at, list(self._runs)

    def back_to(self, mark: tuple[int, list[dict[str, Array]]]) -> None:
        """Move the cut back to where it was: constants behind it have changed."""
        self._at, self._runs = mark[0], list(mark[1])

    def _session(self, stretch: set[Node], wanted: Sequence[Value]) -> Session | None:
        """Return what computes values from the live ones, by nodes of a stretch."""
        if not wanted:
            return None
        nodes = [n for n in self.graph.nodes if n in stretch or n in self._fixed]
        model = subgraph_to_onnx(needed_nodes(nodes, wanted), outputs=list(wanted))
        return Session(model.SerializeToString())


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield what a function gives for each item, in order, computed by as many threads as cores.

    Few results are held at a time.
    """
    workers = len(allowed_cpus())
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _outputs(session: Session, values: Mapping[str, Array]) -> dict[str, Array]:
    """Return what a session computes from those of the values that it takes."""
    return session.run({n: values[n] for n in session.input_names})


def recomputed_nodes(graph: Graph) -> set[Node]:
    """Return the nodes whose results are not worth keeping.

    They compute from constants alone, which may change, or only dequantize.
    """
    fixed: set[Node] = set()
    for node in graph.nodes:
        if node.operands and all(v.is_constant or v.producer in fixed for v in node.operands):
            fixed.add(node)
    # What reads dequantized activations is worth keeping: only the dequantizing runs again.
    return fixed | {n for n in graph.nodes if n.op.name == "dequantize"}


def live_values(graph: Graph, index: int, recomputed: set[Node]) -> list[Value]:
    """Return the values made before a position that something from there on needs.

    Args:
        graph: The graph.
        index: Position in its nodes.
        recomputed: Nodes that run again where their results are needed.
    """
    nodes = graph.nodes
    before = {v for n in nodes[:index] for v in n.outputs} | set(graph.inputs)
    wanted = [v for n in nodes[index:] for v in n.operands if v in before]
    wanted += [v for v in graph.output_values if v in before]
    found: dict[Value, None] = {}
    while wanted:
        v = wanted.pop()
        if v.producer in recomputed:
            wanted += [o for o in v.producer.operands if not o.is_constant]
        elif not v.is_constant:
            found.setdefault(v)
    return list(found)[::-1]


def most_live(graph: Graph, start: int = 0) -> int:
    """Return the bytes that one run of a trail holds where they are most, from a position on."""
    last = {v: i for i, n in enumerate(graph.nodes) for v in n.operands if not v.is_constant}
    ends: dict[int, int] = {}
    held = sum(_bytes(v) for v in graph.inputs)
    most = held if start == 0 else 0
    for v in graph.inputs:
        ends[last.get(v, 0)] = ends.get(last.get(v, 0), 0) + _bytes(v)
    for i, node in enumerate(graph.nodes):
        if i == start:
            most = max(most, held)
        held -= ends.get(i, 0)
        for v in node.outputs:
            held += _bytes(v)
            end = last.get(v, i)
            if end == i:
                held -= _bytes(v)
            ends[end] = ends.get(end, 0) + _bytes(v)
        if i >= start:
            most = max(most, held)
    return most


def needed_nodes(nodes: Sequence[Node], wanted: Iterable[Value]) -> list[Node]:
    """Return those of the nodes that the wanted values depend on, in order."""
    open_values = set(wanted)
    kept = []
    for node in reversed(nodes):
        if open_values.intersection(node.outputs):
            kept.append(node)
            open_values.update(node.operands)
    return kept[::-1]


def _bytes(value: Value) -> int:
    return value.type.size * value.dtype.bits // 8
